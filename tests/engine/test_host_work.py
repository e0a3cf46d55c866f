"""The script that times the host's part of passes; what it prints is not looked at but for its shape."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import host_work


@pytest.mark.parametrize("more", [[], ["--by-function"]])
def test_it_tells_what_a_pass_takes_for_each_sequence(more, monkeypatch, capsys):
    monkeypatch.setattr(host_work, "collect_rarely", lambda: None)  # settings of the whole process
    monkeypatch.setattr(sys, "argv", ["host_work.py", "--num-seqs", "60", "--passes", "3", *more])
    host_work.main()
    text = capsys.readouterr().out
    assert re.match(
        r"\d+ sequences, \d+ in the end: [\d.]+ ms a pass in the middle, [\d.]+ us a sequence; ", text
    )
    assert ("_take_tokens" in text) == bool(more)
