"""Tiny random checkpoints of each architecture: log-probabilities and greedy tokens must be transformers'."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from checkpoints import KINDS, load, prompts_of, reference, reference_logprobs, write_checkpoint
from moe_lightning import SamplingParams
from moe_lightning.pipeline.baselines import SCHEDULES

TOLERANCE = 1e-3
NEW_TOKENS = 8
BLOCK, CHUNK = 16, 24
LENGTHS = (1, BLOCK, BLOCK + 1, 3 * CHUNK + 5, 2, CHUNK, 40)
SCORED = SamplingParams(
    temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=20, prompt_logprobs=20
)


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def model(kind, checkpoint_of):
    return reference(checkpoint_of(kind))


def load_kind(kind, directory, **changes):
    """Under a policy that streams most pages: those of the one expert of a dense model are fewer."""
    if kind != "mixtral":
        changes = {"pages_per_expert": 4, "resident_pages": (1, 0, 2), "num_frames": 5, **changes}
    return load(directory, **changes)


def differences(output, model):
    """Of every log-probability of an output to the reference's for the same tokens."""
    answer = output.outputs[0]
    token_ids = [*output.prompt_token_ids, *answer.token_ids]
    wanted = reference_logprobs(model, token_ids)
    assert output.prompt_logprobs[0] is None
    given = [*output.prompt_logprobs[1:], *answer.logprobs]
    assert len(given) == len(token_ids) - 1
    return [
        abs(entry.logprob - wanted[position, token].item())
        for position, entries in enumerate(given)
        for token, entry in entries.items()
    ]


def assert_greedy(output, model):
    """Each token is the reference's most likely one after the same tokens, unless two are as good as equal."""
    num_prompt, answer = len(output.prompt_token_ids), list(output.outputs[0].token_ids)
    wanted = reference_logprobs(model, [*output.prompt_token_ids, *answer])[num_prompt - 1 : -1]
    top = wanted.topk(2)
    for token, values, best in zip(answer, top.values.tolist(), top.indices[:, 0].tolist(), strict=True):
        assert token == best or values[0] - values[1] <= TOLERANCE


def assert_same(outputs, model):
    for output in outputs:
        assert len(output.outputs[0].token_ids) == NEW_TOKENS
        assert max(differences(output, model)) < TOLERANCE
        assert_greedy(output, model)


def test_a_batch_of_mixed_lengths_has_the_references_logprobs_and_tokens(kind, checkpoint_of, model):
    llm = load_kind(kind, checkpoint_of(kind), chunk_tokens=CHUNK, block_size=BLOCK)
    assert_same(llm.generate(prompts_of(LENGTHS), SCORED), model)


def test_a_prompt_alone_has_the_references_logprobs_and_tokens(kind, checkpoint_of, model):
    llm = load_kind(kind, checkpoint_of(kind), chunk_tokens=CHUNK, block_size=BLOCK)
    for prompt in prompts_of((1, BLOCK, BLOCK + 1, 2 * CHUNK + 1), seed=2):
        assert_same(llm.generate(prompt, SCORED), model)


def test_sequences_that_decode_past_several_blocks_keep_the_references_tokens(kind, checkpoint_of, model):
    llm = load_kind(kind, checkpoint_of(kind), block_size=4, num_blocks=64)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for output in llm.generate(prompts_of((3, 4, 5)), params):
        assert_greedy(output, model)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_has_the_references_logprobs_under_a_sliding_window(schedule, checkpoint_of):
    """FlexGen attends to staged copies of the KV, other code than CGOPipe's; windows are where both are subtle."""
    directory = checkpoint_of("mistral-window")
    llm = load_kind("mistral-window", directory, schedule=schedule)
    assert_same(llm.generate(prompts_of(LENGTHS), SCORED), reference(directory))


def test_the_option_that_a_kind_is_there_for_changes_its_logprobs(kind, checkpoint_of, model):
    """Otherwise agreement would prove nothing about the option."""
    without = reference(checkpoint_of(kind), **KINDS[kind][2])
    (prompt,) = prompts_of((40,))
    change = reference_logprobs(model, prompt) - reference_logprobs(without, prompt)
    assert change.abs().max() > 100 * TOLERANCE


def test_the_logits_are_of_order_ten(kind, model):
    (prompt,) = prompts_of((100,))
    assert 5 < model(torch.tensor([prompt])).logits.abs().max() < 30


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.0125)])
def test_half_precision_is_as_close_to_float32_as_transformers_is(kind, dtype, tolerance, tmp_path):
    """Both round every operation. A router's near tie may go either way: so medians, not maxima."""
    directory = write_checkpoint(tmp_path, kind, dtype)
    exact, rounded = reference(directory), reference(directory, dtype)
    llm = load_kind(kind, directory)
    assert llm.dtype == dtype
    ours, theirs = [], []
    for output in llm.generate(prompts_of((1, BLOCK + 1, 2 * CHUNK + 1)), SCORED):
        ours += differences(output, exact)
        token_ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        wanted, found = reference_logprobs(exact, token_ids), reference_logprobs(rounded, token_ids)
        top = wanted[:-1].topk(20).indices
        theirs += (wanted - found)[:-1].gather(1, top).abs().flatten().tolist()
    assert median(ours) < tolerance
    assert median(ours) < 1.5 * median(theirs)
