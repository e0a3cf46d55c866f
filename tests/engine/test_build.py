"""What becomes of a load that fails."""

from __future__ import annotations

import threading

import pytest

from moe_lightning.engine import build
from moe_lightning.errors import CheckpointError


@pytest.mark.parametrize("error", [CheckpointError("a shard is missing"), KeyboardInterrupt()])
def test_an_error_while_weights_come_in_does_not_wait_for_kernels(error, monkeypatch):
    began, ended = threading.Event(), []

    def compile_all(weights, policy, stopped):
        began.set()
        ended.append(stopped.wait(10))

    def fill(*_):
        assert began.wait(10)
        raise error

    monkeypatch.setattr(build, "_compile", compile_all)
    monkeypatch.setattr(build, "_fill", fill)
    with pytest.raises(type(error)):
        build._fill_and_compile(None, None, None, None, 0, lambda done, total: None)
    assert ended == [True]
