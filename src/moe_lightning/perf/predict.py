"""The timeline of a pass that has not run."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.cost import PassWork
from moe_lightning.perf.rates import DatasheetRates, Rates
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.simulate import simulate
from moe_lightning.pipeline.task import PassShape
from moe_lightning.pipeline.timeline import Timeline


def predict(
    spec: ModelSpec,
    shape: PassShape,
    tokens: Sequence[int],
    mean_context: float,
    hardware: HardwareSpec | Rates,
    *,
    pages_per_expert: int,
    dtype: str | None = None,
    schedule: str = "cgopipe",
    prompt_len: float | None = None,
) -> Timeline:
    """The timeline of a pass whose decode sequences are about equally long and whose chunks are whole prompts.

    Args:
        spec: the model.
        shape: the pass; its layers are the model's.
        tokens: of each micro-batch, prefill first: those of the prompt, or one for each sequence.
        mean_context: tokens that a decode sequence holds on average, the new one among them.
        hardware: where it would run: at the peaks of a specification, or at rates.
        pages_per_expert: slices of an expert's intermediate dimension.
        dtype: of weights, activations and KV; default: the checkpoint's.
        schedule: name of the builder.
        prompt_len: tokens of each prompt in a chunk; default: a chunk is one prompt.

    Raises:
        ConfigError: the values do not describe one pass of this model, or the machine has no rate for the dtype.
        ScheduleError: the ring cannot hold the pages of a layer.
    """
    _check_tokens(shape, tokens, mean_context)
    work = pass_work(
        spec,
        shape,
        tokens,
        mean_context,
        pages_per_expert=pages_per_expert,
        dtype=dtype,
        prompt_len=prompt_len,
    )
    return predict_pass(work, shape, hardware, schedule)


def pass_work(
    spec: ModelSpec,
    shape: PassShape,
    tokens: Sequence[int],
    mean_context: float,
    *,
    pages_per_expert: int,
    dtype: str | None = None,
    prompt_len: float | None = None,
    token_prompt: float | None = None,
    packed: bool = False,
) -> PassWork:
    """What the tasks of such a pass work on; arguments as `predict` has them.

    `token_prompt`: tokens of the prompt that a token of a chunk is in, on average. Where prompts are unequal it is
    more than `prompt_len`, since long ones have more of the tokens. Pairs of query and key go with it: in n prompts
    they are sum(l^2) / 2 = n mean(l) token_prompt / 2.
    """
    window = spec.attention.sliding_window
    keys = min(mean_context, window or mean_context)
    n = shape.num_prefill
    prompts = [max(1.0, count / prompt_len) if prompt_len else 1.0 for count in tokens[:n]]
    longer = token_prompt or prompt_len
    like = [max(1.0, count / longer) if longer else 1.0 for count in tokens[:n]]
    context = [
        round(number * _causal_pairs(round(count / number), window))
        for count, number in zip(tokens, like, strict=False)
    ]
    context += [round(count * keys) for count in tokens[n:]]
    # A prompt's last token is sampled from, and each decode token.
    rows = tuple(round(number) for number in prompts) + tuple(tokens[n:])
    return PassWork(
        spec, dtype or spec.dtype, pages_per_expert, tuple(tokens), tuple(context), rows, shape.num_parts,
        first_swept(n, len(tokens)) if packed else None, shape.first_part_at_once, n, sum(shape.streamed_pages),
        shape.num_keeping_kv / shape.num_layers, shape.num_on_cpu / shape.num_layers,
    )  # fmt: skip


def first_swept(num_prefill: int, num_micro_batches: int) -> int:
    """The micro-batch whose experts come first in a layer: decode sequences before prompts."""
    return num_prefill if num_prefill < num_micro_batches else 0


def predict_pass(
    work: PassWork, shape: PassShape, hardware: HardwareSpec | Rates, schedule: str = "cgopipe"
) -> Timeline:
    """The timeline of a pass of known work.

    With a specification each task is as fast as if its lane had memory and link to itself: where attention and
    copies read host memory at once, each is given all of its bandwidth, and predictions err to the fast side.

    Raises:
        ConfigError: shape and work are of different passes, there is no such schedule, or no rate for the dtype.
        ScheduleError: the ring cannot hold the pages of a layer.
    """
    _check(work, shape, schedule)

    if isinstance(hardware, HardwareSpec):
        hardware = DatasheetRates(hardware, 1.0, 1.0, 1.0, 1.0, 1.0)  # at its peaks
    return simulate(SCHEDULES[schedule](shape), hardware.seconds(work))


def _causal_pairs(count: int, window: int | None) -> int:
    """Pairs of query and key of a prompt: the i-th token attends to i, and to no more than the window."""
    seen = min(count, window or count)
    return seen * (seen + 1) // 2 + (count - seen) * seen


def _check_tokens(shape: PassShape, tokens: Sequence[int], mean_context: float) -> None:
    if len(tokens) != shape.num_micro_batches or min(tokens, default=1) < 1:
        raise ConfigError(
            f"tokens={tuple(tokens)} for {shape.num_prefill} prefill and {shape.num_decode} decode "
            "micro-batches; give a number of 1 or more for each"
        )
    if not mean_context >= 1:
        raise ConfigError(f"mean_context={mean_context}: a sequence holds its new token; give 1 or more")


def _check(work: PassWork, shape: PassShape, schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ConfigError(f"no schedule is named {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if len(work.tokens) != shape.num_micro_batches:
        raise ConfigError(
            f"work of {len(work.tokens)} micro-batches for a pass of {shape.num_micro_batches}; give one entry each"
        )
    if shape.num_layers != work.spec.num_layers:
        raise ConfigError(
            f"num_layers={shape.num_layers}, but {work.spec.architecture} has {work.spec.num_layers}; "
            "give the model's"
        )
    most, pages = max(shape.streamed_pages, default=0), work.spec.experts.num_experts * work.pages_per_expert
    if most > pages:
        raise ConfigError(
            f"streamed_pages={most}, but a layer has {pages} pages ({work.spec.experts.num_experts} experts of "
            f"pages_per_expert={work.pages_per_expert}); stream fewer or cut experts into more"
        )
