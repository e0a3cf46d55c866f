"""The next token of each row of logits.

Everything that chooses is elementwise, an exact integer sum, or a maximum or sort within one row. So a row's
token depends on its own logits, parameters and random number only: not on the batch beside it, nor on the
order in which a device adds floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_lightning.kernels import ops
from moe_lightning.perf.memory import SORTED_AT_ONCE
from moe_lightning.runtime.sampling_batch import Penalties, SamplingBatch

# What a row has for a token whose logits say nothing: NaN and infinity come of damaged weights or overflow, and
# whatever token were taken would look like any other.
NOT_FINITE = -1
# A likelihood is an integer, in units of 2**-40 of the row's largest: 2**22 of them still sum below 2**63.
_LIKELIHOOD_ONE = 2.0**40
_SPREAD = 0x9E3779B9 - 2**32  # odd, and no two ids' products are near
# Rows are sorted a few at a time: a sorted logit needs some 50 bytes of workspace.
_SORTED_AT_ONCE = SORTED_AT_ONCE
_DRAWN_AT_ONCE = 2**18  # on a CPU: what fits in its cache


@dataclass(frozen=True)
class SampleOutput:
    """Chosen tokens and, where asked for, their log-probabilities under the unchanged logits.

    Attributes:
        token_ids: [R] int64; NOT_FINITE where the largest logit is no finite number.
        logprobs: [R] float32, of the chosen tokens.
        ranks: [R] int64, 1 for the most likely token; of equally likely ones the lowest id comes first.
        top_ids: [R, k] int64, the most likely tokens in the order of their ranks; None for k = 0.
        top_logprobs: [R, k] float32.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    ranks: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """One token per row: penalties, temperature, min-p, top-k and top-p, in this order, as in vLLM.

    A greedy row takes its most likely token after penalties, of equally likely ones that with the lowest id. A row
    whose largest logit is not finite has no token; logits of -inf beside a finite one are tokens that never follow.

    Args:
        logits: [R, V], any floating type; not modified.
        batch: parameters of the R rows, on the same device.

    Raises:
        ValueError: shapes do not agree.
    """
    if logits.dim() != 2 or logits.shape[0] != batch.num_rows:
        raise ValueError(
            f"logits of shape {list(logits.shape)} for {batch.num_rows} rows of parameters; give [R, V]"
        )
    adjusted = _adjust(logits, batch)
    token_ids = adjusted.argmax(dim=-1)
    # Of a row with a NaN, argmax takes that. Decided on the device: no pass waits for it.
    is_finite = adjusted.gather(1, token_ids[:, None])[:, 0].isfinite()
    if batch.random_rows is not None:
        at_once = _SORTED_AT_ONCE if logits.is_cuda else min(_SORTED_AT_ONCE, _DRAWN_AT_ONCE)
        rows_at_once = max(1, at_once // logits.shape[1])
        for rows in torch.split(batch.random_rows, rows_at_once):
            token_ids[rows] = _draw(adjusted, batch, rows)
    marked = torch.where(is_finite, token_ids, NOT_FINITE)
    if batch.num_logprobs is None:
        return SampleOutput(marked)
    return replace(score(logits, token_ids, batch.num_logprobs), token_ids=marked)


def prompt_logprobs(logits: Tensor, next_ids: Tensor, k: int) -> SampleOutput:
    """Log-probabilities of a prompt's tokens, each under the logits at the position before it.

    Args:
        logits: [T, V].
        next_ids: [T], the token that follows each position.
        k: how many of the most likely tokens to give beside.

    Raises:
        ValueError: shapes do not agree.
    """
    if logits.dim() != 2 or next_ids.shape != logits.shape[:1]:
        raise ValueError(
            f"logits of shape {list(logits.shape)} with next_ids of shape {list(next_ids.shape)}; "
            "give [T, V] and [T]"
        )
    return score(logits, next_ids.to(torch.int64), k)


def score(logits: Tensor, token_ids: Tensor, k: int) -> SampleOutput:
    """Log-probability and rank of one token per row, with the k most likely ones; NaN where logits are not finite.

    Args:
        logits: [R, V], any floating type.
        token_ids: [R] int64.
        k: 0 for none; no more than V are given.
    """
    at_once = max(1, _SORTED_AT_ONCE // logits.shape[1])
    if len(logits) > at_once:
        parts = zip(logits.split(at_once), token_ids.split(at_once), strict=True)
        return joined([score(some, ids, k) for some, ids in parts])
    logits = logits.float()
    log_sums = logits.logsumexp(dim=-1)
    log_sums = torch.where(
        log_sums.isfinite(), log_sums, torch.nan
    )  # beside infinity all others would be "-inf"
    own = logits.gather(1, token_ids[:, None])
    ids = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (ids < token_ids[:, None]))
    logprobs, ranks = own[:, 0] - log_sums, before.sum(dim=-1) + 1
    if k == 0:
        return SampleOutput(token_ids, logprobs, ranks)
    top_ids = _rank_keys(logits).topk(min(k, logits.shape[1]), dim=-1).indices
    top_logprobs = logits.gather(1, top_ids) - log_sums[:, None]
    return SampleOutput(token_ids, logprobs, ranks, top_ids, top_logprobs)


def joined(parts: Sequence[SampleOutput]) -> SampleOutput:
    """The rows of all parts, which give the same; at least one."""
    if len(parts) == 1:
        return parts[0]

    def join(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    token_ids = join("token_ids")
    assert token_ids is not None
    return SampleOutput(token_ids, *(join(name) for name in ("logprobs", "ranks", "top_ids", "top_logprobs")))


def _rank_keys(logits: Tensor) -> Tensor:
    """Integers in the order of (logit, then lower id): topk leaves open which of equal values it takes."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the equal of 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return (ordered << 32) - ids


def _adjust(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits in float32 after penalties, with forbidden tokens at -inf; a copy only if something changes."""
    adjusted = logits.float()
    is_changed = batch.penalties or batch.masked_rows is not None or batch.formed_rows is not None
    if adjusted is logits and is_changed:
        adjusted = logits.clone()
    if batch.penalties:
        _penalize_(adjusted, batch.penalties)
    if batch.masked_rows is not None:
        assert batch.masked_ids is not None
        # A Python number would be copied to the device, and the host wait for it.
        never = torch.full((), float("-inf"), device=adjusted.device)
        adjusted.index_put_((batch.masked_rows, batch.masked_ids), never)
    if batch.formed_rows is not None:
        _keep_allowed_(adjusted, batch)
    return adjusted


def _keep_allowed_(logits: Tensor, batch: SamplingBatch) -> None:
    """Let rows with a form choose only what it allows next."""
    assert batch.formed_rows is not None
    assert batch.allowed is not None
    ids = torch.arange(logits.shape[1], device=logits.device)
    word, bit = ids // 32, (ids % 32).to(torch.int32)
    at_once = max(1, _SORTED_AT_ONCE // logits.shape[1])
    for rows, allowed in zip(batch.formed_rows.split(at_once), batch.allowed.split(at_once), strict=True):
        is_allowed = (_on_device(allowed).index_select(1, word) >> bit) & 1 == 1
        logits[rows] = logits[rows].masked_fill(~is_allowed, float("-inf"))


def _on_device(allowed: Tensor) -> Tensor:
    """Bits of a few rows where they are read once for each token: there, each word is read 32 times."""
    if not allowed.is_cuda:
        return allowed
    here = torch.empty_like(allowed)
    ops.load_host_rows(allowed, here)
    return here


def _penalize_(logits: Tensor, penalties: Penalties) -> None:
    """Lower what was said before; touches only the tokens of the history, not all of [R, V]."""
    p = penalties
    values = logits[p.rows, p.token_ids]
    values = torch.where(values > 0, values / p.repetition, values * p.repetition)
    values = values - p.frequency * p.counts - p.presence * (p.counts > 0)
    logits[p.rows, p.token_ids] = values


def _draw(logits: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    """Token ids [r] of the given rows: every token's logit gets noise of its own, and the largest is taken.

    Noise of Gumbel's distribution gives each token its probability. What rounding changes is a draw in which two
    tokens come as close as the rounding. In the inverse distribution function every token has a border, which moves
    with the likelihoods of all before it: of flat distributions about one draw in a hundred may change with the
    batch.
    """
    assert batch.temperature is not None
    assert batch.uniforms is not None
    tempered = logits[rows]
    # From the row's largest on, lest numbers become so large that noise is lost in their rounding.
    tempered = (tempered - tempered.amax(dim=-1, keepdim=True)) / batch.temperature[rows, None]
    if batch.min_p is not None or batch.top_k is not None or batch.top_p is not None:
        tempered = _filtered(tempered, batch, rows)
    return tempered.add_(_gumbel(batch.uniforms[rows], logits.shape[1])).argmax(dim=-1)


def _gumbel(uniforms: Tensor, num_tokens: int) -> Tensor:
    """Noise [r, V] of rows' random numbers [r]: a hash of the 53 bits of each and the token's id, so made.

    The hash is lowbias32 by Wellons with a key before either product; integers wrap around.
    """
    bits = (uniforms * 2.0**53).to(torch.int64)[:, None]
    low, high = (bits & 0xFFFFFFFF).to(torch.int32), (bits >> 32).to(torch.int32)
    h = torch.arange(num_tokens, dtype=torch.int32, device=uniforms.device) * _SPREAD + low
    h ^= (h >> 16) & 0xFFFF  # the mask: a shift of a signed number brings its sign
    h *= 0x7FEB352D
    h ^= (h >> 15) & 0x1FFFF
    h += high
    h *= 0x846CA68B - 2**32
    h ^= (h >> 16) & 0xFFFF
    # An exponential variable is as fine as its smallest values, which choose: those come of a number near 0.
    uniform = (h & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _filtered(tempered: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    """Logits [r, V], -inf for what the filters leave out.

    Sorted by likelihood, each filter keeps a prefix of the row; so the filters only have to find its length.
    """
    in_order, order = tempered.sort(dim=-1, descending=True, stable=True)
    likelihoods = ((in_order - in_order[:, :1]).exp() * _LIKELIHOOD_ONE).to(torch.int64)
    kept = _num_kept(in_order, likelihoods, likelihoods.cumsum(dim=-1), batch, rows)
    places = torch.arange(in_order.shape[1], device=in_order.device)
    in_order.masked_fill_(places >= kept, float("-inf"))
    return tempered.scatter_(1, order, in_order)


def _num_kept(
    tempered: Tensor, likelihoods: Tensor, cumulative: Tensor, batch: SamplingBatch, rows: Tensor
) -> Tensor:
    """Length [r, 1] of the prefix that min-p, top-k and top-p leave; the first token always stays."""
    vocab_size = tempered.shape[1]
    kept = torch.full((len(rows), 1), vocab_size, device=tempered.device)
    if batch.min_p is not None:
        least = batch.min_p[rows, None].double() * _LIKELIHOOD_ONE
        kept = (likelihoods >= least).sum(dim=-1, keepdim=True)
    if batch.top_k is not None:
        k = batch.top_k[rows, None].clamp(max=vocab_size)
        least = tempered.gather(1, k - 1)
        # Tokens as likely as the k-th stay too, as in vLLM.
        kept = torch.minimum(kept, (tempered >= least).sum(dim=-1, keepdim=True))
    if batch.top_p is not None:
        total = cumulative.gather(1, kept.clamp(min=1) - 1)  # 0 where logits are not numbers
        enough = batch.top_p[rows, None] * total
        reached_before = cumulative - likelihoods >= enough  # the tokens before this one are already enough
        kept = torch.minimum(kept, (~reached_before).sum(dim=-1, keepdim=True))
    return kept.clamp(min=1)
