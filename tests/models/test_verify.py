"""`verify` passes a sound pipeline in every precision, and fails one that computes something else."""

from __future__ import annotations

import shutil

import pytest
import torch

from checkpoints import load, prompts_of, random_model, rewrite, write_checkpoint, write_tokenizer
from moe_lightning import SamplingParams
from moe_lightning.cli.main import main
from moe_lightning.engine.request import CompletionOutput, Logprob
from moe_lightning.models import registry
from moe_lightning.verify import (
    PlainModel,
    PromptCheck,
    Verification,
    check,
    from_checkpoint,
    from_memory,
    verify,
)
from moe_lightning.verify.comparison import TOP, _compare

PROMPTS = prompts_of((5, 14, 25, 9))
NORM, LAYERS = "model.norm.weight", "model.layers.1."


def verified(llm):
    return Verification(tuple(verify(llm, PROMPTS)), llm.dtype)


def swap_pages(llm, layer, a, b):
    pages = llm._worker._weights.pages
    first, second = pages.home(layer, a), pages.home(layer, b)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def test_a_sound_pipeline_in_float32_is_equal_to_the_last_token(mixtral):
    result = verified(load(mixtral))
    assert result.is_equal and result.max_wrong == 0
    assert result.all.num_tokens == 16 * len(PROMPTS)
    assert result.all.max_difference < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sound_pipeline_in_half_precision_is_equal(dtype, seed, tmp_path):
    """A router's near tie goes the other way in most of these: the largest difference is several units."""
    random_model("mixtral", seed).to(dtype).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    result = verified(load(tmp_path))
    assert result.dtype is dtype and result.is_equal, result.all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_of_two_experts_that_are_swapped_are_noticed(dtype, tmp_path):
    llm = load(write_checkpoint(tmp_path, "mixtral", dtype))
    swap_pages(llm, 1, 2, 7)
    result = verified(llm)
    assert not result.is_equal
    assert result.all.num_wrong > result.max_wrong, "each of the two criteria notices it"
    assert result.is_strict or result.all.median_difference > result.max_median


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_checked_against_the_weights_in_memory(dtype, tmp_path):
    llm = load(write_checkpoint(tmp_path, "mixtral", dtype))
    source = from_memory(llm._worker._weights)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=TOP)
    outputs = llm.generate(PROMPTS, params)
    assert Verification(tuple(check(outputs, llm.spec, source, dtype)), dtype).is_equal
    swap_pages(llm, 1, 2, 7)
    swapped = Verification(tuple(check(outputs, llm.spec, source, dtype)), dtype)
    assert not swapped.is_equal and swapped.all.num_wrong > swapped.max_wrong


def test_a_sequence_recomputed_beside_others_has_the_logits_that_it_has_alone(mixtral):
    spec = registry.resolve(str(mixtral))
    model = PlainModel(spec, from_checkpoint(spec, mixtral), torch.float32)
    for found, tokens in zip(model.last_logits(PROMPTS, [1, 3, 25, 0]), PROMPTS, strict=True):
        wanted = model.logits(tokens)[len(tokens) - len(found) :]
        # Logits of 30 at most; products of other shapes add in another order, by 1.1e-5 with the AVX2 of MKL.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_one_page_that_is_not_there_is_noticed_in_float32(mixtral):
    llm = load(mixtral)
    llm._worker._weights.pages.home(1, 6).zero_()
    assert not verified(llm).is_equal


@pytest.mark.parametrize("name", [NORM, LAYERS + "self_attn.q_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_noticed_although_both_sides_have_it(name, value, single, tmp_path):
    def damage(tensors):
        tensors[name].view(-1)[5] = value

    rewrite(single / "model.safetensors", damage)
    result = verified(load(single))
    assert not result.is_equal and result.all.num_not_finite


def test_what_cannot_be_compared_is_not_equal():
    assert not Verification((), torch.float32).is_equal
    assert not Verification((PromptCheck(0, 0, 1),), torch.float32).is_equal
    assert not Verification((PromptCheck(4, 0, 1, 0, (0.0,)),), torch.bfloat16).is_equal
    assert Verification((PromptCheck(4, 0, 0, 0, (0.0,)),), torch.float32).is_equal


@pytest.mark.parametrize(
    ("num_wrong", "of_plain", "is_equal"),
    [(10, 0, True), (11, 0, False), (16, 8, True), (17, 8, False), (25, 50, True), (26, 50, False)],
)
def test_the_engine_may_have_twice_the_wrong_tokens_that_plain_pytorch_has(num_wrong, of_plain, is_equal):
    half, quarter = (
        PromptCheck(60, num_wrong, 0, of_plain - of_plain // 2),
        PromptCheck(40, 0, 0, of_plain // 2),
    )
    assert Verification((half, quarter), torch.bfloat16).is_equal is is_equal


def test_float32_allows_no_wrong_token_whatever_plain_pytorch_has():
    assert not Verification((PromptCheck(100, 1, 0, 50),), torch.float32).is_equal


def test_plain_pytorch_in_half_precision_turns_near_ties_too(tmp_path):
    random_model("mixtral", 1).to(torch.bfloat16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    llm = load(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=TOP)
    outputs = llm.generate(PROMPTS, params)
    found = check(outputs, llm.spec, from_memory(llm._worker._weights), torch.bfloat16)
    assert sum(c.num_rounded_wrong for c in found)


class TestCommand:
    FLAGS = ("--max-tokens", "4", "--device", "cpu", "--prompt", "the fox", "--prompt", "a dog")

    def test_it_exits_with_0_and_says_what_was_compared(self, mixtral, capsys):
        assert main(["verify", str(mixtral), *self.FLAGS]) == 0
        *lines, verdict = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and all("4 of 4 tokens ok" in line for line in lines)
        assert verdict.startswith("equal: 8 tokens in torch.float32, 0 of them wrong; largest difference")

    def test_half_precision_says_what_rounding_allows(self, mixtral, capsys):
        assert main(["verify", str(mixtral), *self.FLAGS, "--dtype", "bfloat16"]) == 0
        verdict = capsys.readouterr().out.splitlines()[-1]
        assert verdict.startswith("equal: 8 tokens in torch.bfloat16") and "Rounding allows" in verdict

    def test_it_exits_with_1_if_a_weight_is_no_number(self, mixtral, tmp_path, capsys):
        damaged = shutil.copytree(mixtral, tmp_path / "damaged")
        rewrite(damaged / "model.safetensors", lambda t: t[NORM].fill_(float("nan")))
        assert main(["verify", str(damaged), *self.FLAGS]) == 1
        verdict = capsys.readouterr().out.splitlines()[-1]
        assert verdict.startswith("NOT EQUAL: NaN or infinity") and "download it again" in verdict


def test_where_half_precision_overflows_plain_pytorch_excuses_no_wrong_token():
    wanted = torch.zeros(2, 8).log_softmax(-1) + torch.tensor([5.0] + [0.0] * 7)
    said = {7: Logprob(float(wanted[0, 7]), 1)}
    answer = CompletionOutput(0, "", (7, 7), "length", logprobs=[said, said])
    damaged = wanted.clone()
    damaged[:, 3] = float("nan")
    found = _compare(answer, wanted, damaged, 0.05)
    assert (found.num_wrong, found.num_rounded_wrong) == (2, 0)
    assert _compare(answer, wanted, wanted.flip(1), 0.05).num_rounded_wrong == 2
