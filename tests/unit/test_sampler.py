from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_lightning.runtime import sampler
from moe_lightning.runtime.sampler import prompt_logprobs, sample
from moe_lightning.runtime.sampling_batch import RowSampling, build_sampling_batch

torch.set_num_threads(1)

VOCAB = 12
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=8)
# Steps of 1/4 make ties, exact in every dtype; the range makes tails that filters cut.
LOGITS = st.lists(st.integers(-24, 24).map(lambda i: i / 4), min_size=VOCAB, max_size=VOCAB)
ROWS = st.builds(
    RowSampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.integers(-1, VOCAB + 3),
    top_p=st.sampled_from([0.05, 0.35, 0.8, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
    forbidden_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
    prompt_ids=IDS,
    output_ids=IDS,
)
BATCHES = st.lists(st.tuples(LOGITS, ROWS), min_size=1, max_size=5)


def choose(logits, rows):
    logits = torch.tensor(np.array(logits), dtype=torch.float32)
    return sample(logits, build_sampling_batch(rows, logits.shape[1])).token_ids.tolist()


def penalized(logits, row):
    """vLLM's formulas, one token after the other."""
    values = np.array(logits, dtype=np.float64)
    for token in range(len(values)):
        count = list(row.output_ids).count(token)
        if count or token in row.prompt_ids:
            factor = row.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= row.frequency_penalty * count + row.presence_penalty * (count > 0)
    values[list(row.forbidden_ids)] = -np.inf
    return values


def kept_tokens(values, row):
    """Ids that the filters leave, most likely first, with their probabilities; and how close a filter was."""
    tempered = values / row.temperature
    order = sorted(range(len(values)), key=lambda i: (-tempered[i], i))
    weights = np.exp(tempered[order] - tempered[order[0]])
    margins = [1.0]
    if row.min_p > 0:
        margins += [abs(w - row.min_p) for w in weights if w != 1.0]
        weights = weights[weights >= row.min_p]
    if 0 < row.top_k < len(weights):
        kth = tempered[order[row.top_k - 1]]
        margins += [abs(tempered[i] - kth) for i in order if tempered[i] != kth]
        weights = weights[tempered[order[: len(weights)]] >= kth]
    if row.top_p < 1:
        sums = np.cumsum(weights) / weights.sum()
        margins += list(abs(sums - row.top_p))
        weights = weights[: int(np.argmax(sums >= row.top_p)) + 1]
    return order[: len(weights)], weights / weights.sum(), min(margins)


def reference(logits, row):
    """The token of one row in float64 and how far rounding would have to reach to change it."""
    values = penalized(logits, row)
    if row.temperature == 0:
        return int(values.argmax()), gap(logits, row)
    ids, probabilities, margin = kept_tokens(values, row)
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities) + noise(row.uniform, len(values))[ids]
    best = np.argsort(-scores)
    return ids[best[0]], min(margin, gap(logits, row), *-np.diff(scores[best[:2]]), 1.0)


def noise(uniform, num_tokens):
    """Gumbel's, of lowbias32 with the two halves of the random number as keys."""
    bits = int(uniform * 2**53)
    h = np.arange(num_tokens, dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(bits % 2**32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) + np.uint32(bits >> 32)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return -np.log(-np.log1p(-((h % 2**31).astype(np.float64) + 0.5) / 2**31))


def gap(logits, row):
    """The smallest difference between tokens of different logit or history; float32 may order otherwise.

    Tokens of equal logit and history tie exactly in every precision.
    """
    values, outputs = penalized(logits, row), list(row.output_ids)
    kinds = {
        (logits[t], outputs.count(t), t in row.prompt_ids): values[t]
        for t in range(len(logits))
        if np.isfinite(values[t])
    }
    return min(np.diff(sorted(kinds.values())), default=1.0)


@settings(max_examples=300, deadline=None)
@given(LOGITS, ROWS)
def test_each_row_gets_the_token_of_the_plain_float64_sampler(logits, row):
    expected, margin = reference(logits, row)
    assume(margin > 1e-5)
    assert choose([logits], [row]) == [expected]


@settings(max_examples=150, deadline=None)
@given(BATCHES, st.randoms(use_true_random=False))
def test_a_rows_token_does_not_depend_on_the_other_rows_nor_on_their_order(batch, random):
    logits, rows = zip(*batch, strict=True)
    together = choose(logits, rows)
    assert together == [choose([row_logits], [row])[0] for row_logits, row in batch]
    order = random.sample(range(len(batch)), len(batch))
    assert choose([logits[i] for i in order], [rows[i] for i in order]) == [together[i] for i in order]


def test_large_vocabularies_give_the_same_token_alone_and_in_a_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 5003, generator=generator) * 2
    rows = [RowSampling(uniform=(i + 0.5) / 24, top_p=1.0 if i % 2 else 0.95) for i in range(24)]
    batch = build_sampling_batch(rows, 5003)
    together = sample(logits, batch).token_ids.tolist()
    assert together == [
        sample(logits[i : i + 1], build_sampling_batch([rows[i]], 5003)).token_ids.item() for i in range(24)
    ]
    assert len(set(together)) > 12


def test_sorting_a_few_rows_at_a_time_changes_nothing(monkeypatch):
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = [RowSampling(uniform=i / 7, top_k=0 if i % 3 else 4, temperature=float(i != 2)) for i in range(7)]
    batch = build_sampling_batch(rows, VOCAB)
    at_once = sample(logits, batch).token_ids
    monkeypatch.setattr(sampler, "_SORTED_AT_ONCE", 2 * VOCAB)
    assert torch.equal(sample(logits, batch).token_ids, at_once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_greedy_takes_the_lowest_id_of_the_most_likely(dtype):
    logits = torch.zeros(3, 40_000, dtype=dtype)
    logits[0, [39_999, 17, 20_000]] = 3.0
    logits[1, [5, 4]] = 3.0
    batch = build_sampling_batch([RowSampling(temperature=0.0)] * 3, 40_000)
    assert sample(logits, batch).token_ids.tolist() == [17, 4, 0]


def test_greedy_is_the_limit_of_every_filter():
    logits = [[0.0, 2.0, 2.0, 1.0]]
    for i in range(20):
        assert choose(logits, [RowSampling(top_p=1e-6, uniform=i / 20)]) == [1]
        assert choose(logits, [RowSampling(temperature=1e-4, uniform=i / 20)])[0] in (1, 2)


def frequencies(logits, row, draws):
    rows = [dataclasses.replace(row, uniform=(i + 0.5) / draws) for i in range(draws)]
    tokens = choose([logits] * draws, rows)
    return np.bincount(tokens, minlength=len(logits)) / draws


@settings(max_examples=60, deadline=None)
@given(LOGITS, ROWS.filter(lambda row: row.temperature > 0))
def test_each_token_is_drawn_as_often_as_its_probability_says(logits, row):
    values = penalized(logits, row)
    ids, probabilities, margin = kept_tokens(values, row)
    assume(min(margin, gap(logits, row)) > 1e-5)
    expected = np.zeros(VOCAB)
    expected[ids] = probabilities
    found = frequencies(logits, row, 500)
    deviations = np.sqrt(expected * (1 - expected) / 500)
    assert (abs(found - expected) <= 5 * deviations + 2 / 500).all()
    assert not found[expected == 0].any()


def test_random_numbers_of_a_generator_give_each_token_its_probability():
    logits = np.array([1.0, 0.0, -1.0, 0.5, 2.0, -3.0])
    draws = 20_000
    uniforms = np.random.default_rng(3).random(draws)
    tokens = choose([logits] * draws, [RowSampling(uniform=u) for u in uniforms])
    expected = np.exp(logits) / np.exp(logits).sum() * draws
    chi_square = ((np.bincount(tokens, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 5 + 5 * math.sqrt(2 * 5)  # five standard deviations


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_prefix_that_reaches_p(logits, top_p):
    logits = sorted(logits, reverse=True)
    probabilities = np.exp(np.array(logits)) / np.exp(np.array(logits)).sum()
    assume(abs(np.cumsum(probabilities) - top_p).min() > 1e-5)
    (ids,) = kept([logits], [RowSampling(top_p=top_p)])
    assert ids == list(range(len(ids)))
    assert probabilities[ids].sum() >= top_p
    assert probabilities[ids[:-1]].sum() < top_p


def kept(logits, rows):
    """Ids that the filters leave, row by row."""
    batch = build_sampling_batch(rows, len(logits[0]))
    filtered = sampler._filtered(
        torch.tensor(np.array(logits), dtype=torch.float32), batch, batch.random_rows
    )
    return [row.isfinite().nonzero()[:, 0].tolist() for row in filtered]


def test_top_p_that_is_reached_exactly_adds_no_further_token():
    rows = [RowSampling(top_p=p) for p in (0.25, 0.26, 0.5, 0.75, 1.0)]
    assert list(map(len, kept([[0.0] * 4] * 5, rows))) == [1, 2, 2, 3, 4]


def test_min_p_keeps_tokens_at_the_bound():
    assert kept([[0.0, 1.0, 1.0, 0.5]], [RowSampling(min_p=1.0)]) == [[1, 2]]


def test_top_k_keeps_tokens_as_likely_as_the_kth():
    found = frequencies([3.0, 2.0, 2.0, 1.0], RowSampling(top_k=2), 200)
    assert list(found > 0) == [True, True, True, False]


def test_top_k_beyond_the_vocabulary_keeps_all():
    rows = [RowSampling(top_k=k) for k in (-1, 0, 4, 2**31, 3)]
    assert list(map(len, kept([[0.0, -1.0, -2.0, -3.0]] * 5, rows))) == [4, 4, 4, 4, 3]


def test_no_random_number_draws_a_token_of_probability_zero():
    logits = [0.0, -math.inf, 1.0, -math.inf, -200.0]
    uniforms = [0.0, 1 - 2**-53, *np.random.default_rng(4).random(2000)]
    drawn = choose([logits] * len(uniforms), [RowSampling(uniform=u) for u in uniforms])
    assert set(drawn) == {0, 2}


@pytest.mark.parametrize("top_k", [0, 4000])
def test_rounding_hardly_changes_a_draw_from_many_unlikely_tokens(top_k):
    """By the inverse distribution function 14 of these change: each token is a border, and all move together."""
    draws, vocab = 1000, 5000
    random = np.random.default_rng(5)
    logits = np.tile(random.normal(size=vocab) * 2, (draws, 1))
    rows = [RowSampling(uniform=u, top_k=top_k) for u in random.random(draws)]
    before = choose(logits, rows)
    logits[:, : vocab // 2] += random.normal(size=(draws, 1)) * 3e-5  # as much as a batch moves them
    after = choose(logits, rows)
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 1
    assert len(set(before)) > 500


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_never_chosen(temperature):
    rows = [
        RowSampling(
            temperature=temperature,
            forbidden_ids=(0, 2),
            uniform=i / 50,
            output_ids=[0],
            presence_penalty=-2.0,
        )
        for i in range(50)
    ] + [RowSampling(temperature=0.0)]
    chosen = choose([[9.0, 1.0, 8.0, 1.0]] * 51, rows)
    assert set(chosen[:-1]) <= {1, 3}
    assert chosen[-1] == 0


def test_ids_outside_the_vocabulary_are_ignored():
    row = RowSampling(
        temperature=0.0,
        forbidden_ids=(4, -1, 2**31),
        prompt_ids=[99],
        output_ids=[-1, 4],
        repetition_penalty=2.0,
    )
    assert choose([[1.0, 2.0, 0.0, 0.0]], [row]) == [1]


def test_a_prompts_tokens_matter_to_the_repetition_penalty_only():
    logits = [[3.0, 2.9]]
    row = RowSampling(temperature=0.0, prompt_ids=[0, 0])
    assert choose(logits, [dataclasses.replace(row, presence_penalty=2.0, frequency_penalty=2.0)]) == [0]
    assert choose(logits, [dataclasses.replace(row, repetition_penalty=1.1)]) == [1]


@settings(max_examples=150, deadline=None)
@given(BATCHES)
def test_penalties_equal_the_formula(batch):
    logits, rows = zip(*batch, strict=True)
    adjusted = sampler._adjust(torch.tensor(logits), build_sampling_batch(rows, VOCAB)).numpy()
    expected = np.stack([penalized(values, row) for values, row in batch])
    np.testing.assert_allclose(adjusted, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(BATCHES)
def test_the_callers_logits_are_not_modified(batch):
    logits, rows = zip(*batch, strict=True)
    given_logits = torch.tensor(logits)
    sample(given_logits, build_sampling_batch(rows, VOCAB))
    assert torch.equal(given_logits, torch.tensor(logits))


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.integers(0, VOCAB + 2))
def test_logprobs_are_of_the_raw_logits_and_ranks_count_from_one(batch, k):
    logits, rows = zip(*batch, strict=True)
    rows = [dataclasses.replace(row, num_logprobs=k if i == 0 else None) for i, row in enumerate(rows)]
    out = sample(torch.tensor(logits), build_sampling_batch(rows, VOCAB))
    for i, values in enumerate(np.array(logits)):
        logprobs = values - np.log(np.exp(values).sum())
        order = sorted(range(VOCAB), key=lambda t, values=values: (-values[t], t))
        token = int(out.token_ids[i])
        assert float(out.logprobs[i]) == pytest.approx(logprobs[token], abs=1e-5)
        assert int(out.ranks[i]) == order.index(token) + 1
        if k == 0:
            assert out.top_ids is None
            assert out.top_logprobs is None
        else:
            assert out.top_ids[i].tolist() == order[:k]
            np.testing.assert_allclose(out.top_logprobs[i].numpy(), logprobs[order[:k]], atol=1e-5)


def test_without_a_wish_for_logprobs_there_are_none():
    out = sample(torch.zeros(1, 4), build_sampling_batch([RowSampling()], 4))
    assert (out.logprobs, out.ranks, out.top_ids, out.top_logprobs) == (None, None, None, None)


def test_zero_and_negative_zero_are_equally_likely_in_the_ranking():
    out = prompt_logprobs(torch.tensor([[-0.0, 0.0, -1.0, -0.0]]), torch.tensor([3]), 4)
    assert out.top_ids.tolist() == [[0, 1, 3, 2]]
    assert out.ranks.tolist() == [3]


def test_prompt_logprobs_score_the_given_tokens():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(2)).bfloat16()
    ids = torch.tensor([0, 8, 3, 3, 1], dtype=torch.int32)
    out = prompt_logprobs(logits, ids, 2)
    expected = logits.double().log_softmax(-1)
    assert out.token_ids.tolist() == ids.tolist()
    torch.testing.assert_close(out.logprobs.double(), expected[range(5), ids.long()], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.top_logprobs.double(), expected.topk(2).values, atol=1e-5, rtol=0)
    assert prompt_logprobs(logits, ids, 0).top_ids is None
    assert prompt_logprobs(logits[:0], ids[:0], 2).top_ids.shape == (0, 2)


def test_no_rows_give_no_tokens():
    assert sample(torch.zeros(0, 4), build_sampling_batch([], 4)).token_ids.shape == (0,)


def test_greedy_batches_carry_nothing_to_compute():
    batch = build_sampling_batch([RowSampling(temperature=0.0, top_p=0.5, top_k=3, min_p=0.5)] * 2, VOCAB)
    unused = (batch.random_rows, batch.top_k, batch.top_p, batch.min_p, batch.penalties, batch.masked_rows)
    assert unused == (None,) * 6


def test_shapes_that_do_not_agree_are_refused():
    batch = build_sampling_batch([RowSampling()] * 2, 4)
    with pytest.raises(ValueError, match=r"\[3, 4\] for 2 rows"):
        sample(torch.zeros(3, 4), batch)
    with pytest.raises(ValueError, match=r"\[2\]; give"):
        prompt_logprobs(torch.zeros(3, 4), torch.tensor([1, 2]), 1)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "row",
    [
        RowSampling(temperature=0.0),
        RowSampling(uniform=0.0),
        RowSampling(top_k=2, top_p=0.9, min_p=0.1, uniform=0.5),
    ],
)
@pytest.mark.parametrize("num_logprobs", [None, 0, 2])
@pytest.mark.parametrize(
    "bad", [[NAN, 1.0, 2.0], [1.0, INF, 2.0], [NAN, NAN, NAN], [-INF, -INF, -INF]], ids=str
)
def test_a_row_without_finite_logits_has_no_token_and_leaves_the_others_theirs(bad, num_logprobs, row):
    row = dataclasses.replace(row, num_logprobs=num_logprobs)
    good = [1.0, -INF, 2.0]  # a model may forbid tokens
    logits = torch.tensor([good, bad, good])
    found = sample(logits, build_sampling_batch([row] * 3, 3))
    alone = sample(logits[:1], build_sampling_batch([row], 3))
    assert found.token_ids.tolist() == [alone.token_ids.item(), sampler.NOT_FINITE, alone.token_ids.item()]
    if num_logprobs is not None:
        assert found.logprobs[1].isnan()
        assert found.logprobs[0] == found.logprobs[2] == alone.logprobs[0]


def test_a_masked_token_is_no_fault_of_the_logits():
    row = RowSampling(temperature=0.0, forbidden_ids=[2])
    assert choose([[1.0, 0.0, 5.0]], [row]) == [0]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_the_score_of_a_token_under_logits_that_are_not_finite_is_nan(bad):
    scores = prompt_logprobs(torch.tensor([[0.0, bad], [0.0, 1.0]]), torch.tensor([0, 0]), 1).logprobs
    assert scores.isnan().tolist() == [True, False]


@pytest.mark.parametrize("k", [0, 3])
def test_scores_of_rows_taken_a_few_at_a_time_are_those_of_all_at_once(k, monkeypatch):
    logits, ids = torch.randn(11, 50), torch.randint(0, 50, (11,))
    whole = sampler.score(logits, ids, k)
    monkeypatch.setattr(sampler, "_SORTED_AT_ONCE", 150)
    parts = sampler.score(logits, ids, k)
    for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
        a, b = getattr(whole, name), getattr(parts, name)
        assert (a is None and b is None) or torch.equal(a, b)
