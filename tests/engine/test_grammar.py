"""Answers of a prescribed form: whatever the model would say, they have it."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch

from checkpoints import load
from moe_lightning import SamplingParams, StructuredOutputsParams
from moe_lightning.engine import grammar
from moe_lightning.errors import RequestError
from moe_lightning.runtime.sampler import sample
from moe_lightning.runtime.sampling_batch import RowSampling, build_sampling_batch

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "is": {"type": "boolean"}},
    "required": ["n", "is"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(mixtral):
    return load(mixtral)


def answers(llm, n=4, **form):
    values = {"temperature": 1.0, "max_tokens": 120} | {
        name: form.pop(name) for name in ("temperature", "logprobs", "stop") if name in form
    }
    params = [
        SamplingParams(seed=seed, structured_outputs=StructuredOutputsParams(**form), **values)
        for seed in range(n)
    ]
    outputs = llm.generate(["the fox"] * n, params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_regex_choice_grammar_and_schema_are_kept_to(llm, temperature):
    for answer in answers(llm, regex=r"[0-9]{3}-[a-c]+x", temperature=temperature):
        pattern = r"[0-9]{3}-[a-c]+x" if answer.finish_reason == "stop" else r"[0-9]{3}-[a-c]+"
        assert re.fullmatch(pattern, answer.text)
    for answer in answers(llm, choice=["yes", 'n"o\n', "vielleicht ä"], temperature=temperature):
        assert answer.text in ("yes", 'n"o\n', "vielleicht ä")
        assert answer.finish_reason == "stop"
    for answer in answers(llm, grammar='root ::= "a" b\nb ::= "b" | "c"', temperature=temperature):
        assert answer.text in ("ab", "ac")
    for answer in answers(llm, json=SCHEMA, temperature=temperature):
        if answer.finish_reason == "stop":
            value = json.loads(answer.text)
            assert set(value) == {"n", "is"}
            assert 0 <= value["n"] <= 99
            assert isinstance(value["is"], bool)


def test_any_json_is_an_object(llm):
    for answer in answers(llm, json_object=True, n=6):
        assert answer.text.lstrip()[:1] == "{"
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)


def test_requests_with_and_without_a_form_share_passes_and_do_not_change_each_other(llm):
    plain = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    formed = SamplingParams(
        temperature=0, max_tokens=10, structured_outputs=StructuredOutputsParams(regex="[ab]+")
    )
    alone = [llm.generate(["the fox"], p, use_tqdm=False)[0].outputs[0].token_ids for p in (plain, formed)]
    together = llm.generate(["the fox"] * 6, [plain, formed] * 3, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in together] == alone * 3


def test_a_form_survives_preemption(mixtral, llm):
    few = load(mixtral, num_blocks=12, block_size=4)
    few.engine._batcher._answer_lengths.count(0, 10**9)
    params = SamplingParams(
        temperature=0, max_tokens=20, structured_outputs=StructuredOutputsParams(regex="(ab|c){30}")
    )
    prompts = [[5] * 5, [6] * 6, [7] * 7, [8] * 8]
    got, want = (one.generate(prompts, params, use_tqdm=False) for one in (few, llm))
    assert few.engine.num_preemptions > 0
    assert [o.outputs[0].text for o in got] == [o.outputs[0].text for o in want]


def test_log_probabilities_are_those_of_the_model(llm):
    (answer,) = answers(llm, n=1, choice=["yes"], logprobs=0, temperature=0)
    assert answer.text == "yes"
    assert all(
        entry[token].logprob < 0 for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)
    )


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 70])
def test_a_row_chooses_only_among_its_bits(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size, generator=generator)
    kept = [0, vocab_size // 2, vocab_size - 1]
    bits = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token in kept:
        bits[token // 32] |= np.uint32(1 << (token % 32))
    row = RowSampling(temperature=0, allowed=bits.view(np.int32))
    batch = build_sampling_batch([RowSampling(temperature=0), row, row], vocab_size)
    before = logits.clone()
    got = sample(logits, batch).token_ids.tolist()
    assert got[0] == int(logits[0].argmax())
    assert got[1:] == [max(kept, key=lambda t: float(logits[r, t])) for r in (1, 2)]
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "form, message",
    [
        ({"regex": "("}, "regex of structured_outputs cannot be used: .*[Pp]aren"),
        ({"json": {"type": "cat"}}, 'json of structured_outputs cannot be used: .*"cat"'),
        ({"json": "{"}, "json of structured_outputs cannot be used"),
        ({"grammar": "root ::= nothing"}, "grammar of structured_outputs cannot be used: .*nothing"),
        ({"grammar": "root ::= é"}, "grammar of structured_outputs cannot be used: EBNF"),
        ({"grammar": "root ::= root"}, "no answer has this form"),
        ({"json": {"$ref": "#"}}, "no answer has this form"),
        ({"regex": "a{10001}"}, "more than 10000 times"),
        ({"regex": "(a{9000}){9000,}"}, "more than 10000 times"),
        ({"grammar": 'root ::= "a"{1, 99999999999999}'}, "more than 10000 times"),
        ({"json": {"items": [{"maxLength": 6000}, {"minItems": 6000}]}}, "more than 10000 times"),
        ({"json": {"pattern": "a{10001}"}}, "more than 10000 times"),
        ({"json": {"maxLength": 1e300}}, "more than 10000 times"),
        ({"json": json.loads('{"not":' * 40 + "{}" + "}" * 40)}, "more than 32 levels deep"),
        ({"json": "[" * 5000}, "levels deep|no JSON"),
    ],
)
def test_a_form_that_cannot_be_is_a_request_error(llm, form, message):
    with pytest.raises(RequestError, match=message):
        answers(llm, **form)


def test_a_form_that_comes_again_is_kept_until_others_need_its_memory(llm, monkeypatch):
    def compiled(regex):
        return llm._grammars.compile(StructuredOutputsParams(regex=regex))

    first = compiled("[xyz]+")
    assert compiled("[xyz]+") is first
    monkeypatch.setattr(grammar, "_CACHE_BYTES", first.num_bytes)
    other = compiled("[yz]+")
    assert compiled("[yz]+") is other
    assert compiled("[xyz]+") is not first
    monkeypatch.setattr(grammar, "_FORM_BYTES", 1)
    with pytest.raises(RequestError, match="1 are the most"):
        compiled("[z]+")


def test_without_xgrammar_the_remedy_is_said(mixtral, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(RequestError, match=r"pip install 'moe-lightning\[grammar\]'"):
        answers(load(mixtral), regex="a")
