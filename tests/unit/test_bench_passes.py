"""Passes of a measurement say when what they measure has gone wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_lightning.bench.passes import run_passes
from moe_lightning.errors import DeviceError


def engine_whose_answers_end_with(reason):
    outputs = [
        SimpleNamespace(request_id=str(number), outputs=[SimpleNamespace(finish_reason=found)])
        for number, found in enumerate(("length", reason))
    ]
    return SimpleNamespace(
        num_waiting=0, num_unfinished=2, num_generated_tokens=0, num_prompt_tokens=0, num_running=2,
        step=lambda: outputs,
    )  # fmt: skip


def passes_of(engine):
    source = SimpleNamespace(keep=lambda outputs: None)
    return list(run_passes(engine, iter(()), source, 0, num_passes=2, count=0))


def test_logits_that_are_not_finite_end_a_measurement():
    with pytest.raises(
        DeviceError, match="1 sequences ended because their logits were not finite, '1' first"
    ):
        passes_of(engine_whose_answers_end_with("error"))


def test_answers_that_end_otherwise_do_not():
    assert len(passes_of(engine_whose_answers_end_with("length"))) == 2
