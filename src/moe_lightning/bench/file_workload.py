"""The lengths of a file's prompts: a batch file, or the questions of MT-Bench."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lightning.engine.tokenizer import load_tokenizer
from moe_lightning.errors import ConfigError
from moe_lightning.jobs.survey import open_input, survey_input
from moe_lightning.perf.workload import Workload

_GEN_LEN = 128  # of MT-Bench, which sets no limit
_BYTES = 4  # of a token of text, about


def workload_of_file(
    path: Path, tokenizer: str | None, gen_len: int | None = None, num_requests: int | None = None
) -> Workload:
    """The workload of a file.

    Args:
        path: lines of OpenAI's batch format, or of MT-Bench's question.jsonl, of which the first turns count.
        tokenizer: directory of the model's; None for a guess, a token for each four bytes of text.
        gen_len: tokens of an answer, instead of what the file allows.
        num_requests: of the job, which need not be as many as the file has; None for what fills memory twice.

    Raises:
        JobError, ConfigError: it is no such file.
    """
    with open_input(path) as file:
        loaded = load_tokenizer(tokenizer) if tokenizer else None
        if _is_questions(file.readline()):
            lengths = tuple(_num_tokens(loaded, turn) for turn in _first_turns(path))
            return Workload(lengths, gen_len or _GEN_LEN, num_requests)
        file.seek(0)
        found = survey_input(file).lengths.workload(loaded)
    found = replace(found, num_requests=num_requests)
    return replace(found, gen_len=gen_len, gen_lens=None) if gen_len else found


def _is_questions(line: bytes) -> bool:
    try:
        return "turns" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _first_turns(path: Path) -> list[str]:
    turns = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            turns.append(str(json.loads(line)["turns"][0]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: no question with turns; give MT-Bench's file"
            ) from error
    return turns


def _num_tokens(tokenizer: Any | None, text: str) -> int:
    if tokenizer is None:
        return max(1, -(-len(text.encode()) // _BYTES))
    return max(1, len(tokenizer(text)["input_ids"]))
