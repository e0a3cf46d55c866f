"""A batch job on a directory, and the lines of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fake_llm import FakeLLM

from moe_lightning.jobs import BatchJob, JobFiles, JobStatus

CHAT = "/v1/chat/completions"


def completion(custom_id: str, prompt: Any = "Hi", **body: Any) -> dict[str, Any]:
    body = {"model": "fake", "prompt": prompt, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, text: str = "Hi", **body: Any) -> dict[str, Any]:
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def encode(*records: Any) -> bytes:
    lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in records)
    return b"".join(line + b"\n" for line in lines)


class Desk:
    """An input file with the job on it."""

    def __init__(self, directory: Path, content: bytes) -> None:
        self.input, self.output = directory / "in.jsonl", directory / "out.jsonl"
        self.errors = directory / "out.errors.jsonl"
        self.input.write_bytes(content)

    def run(self, llm: FakeLLM | None = None, **options: Any) -> JobStatus:
        with BatchJob(JobFiles.at(self.input, self.output), **options) as job:
            return job.run(lambda: llm or FakeLLM())

    def answers(self) -> dict[str, Any]:
        return {r["custom_id"]: without_time(r) for r in read_jsonl(self.output)}

    def failures(self) -> list[dict[str, Any]]:
        return read_jsonl(self.errors) if self.errors.exists() else []


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    records = [json.loads(line) for line in data.split(b"\n")[:-1]]
    assert len({r["id"] for r in records}) == len(records), "a line was written twice"
    return records


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    body = record["response"]["body"]
    return record | {"response": record["response"] | {"body": body | {"created": 0}}}


MIXED = encode(
    completion("a"), chat("b"), b"{broken", completion("c", [72, 105]), chat("d", n=2), b"{broken",
    completion("a", "again"), completion("e", "x" * 65), completion("f", "abort me"), chat("g", "last"),
)  # fmt: skip
VALID = ["a", "b", "c", "d", "g"]
RETRIED = ["e", "f"]  # they fail for what another run may do better


def by_id(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda r: str(r["id"]))


def never() -> FakeLLM:
    raise AssertionError("the model was loaded")
