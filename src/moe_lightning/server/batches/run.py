"""The files of a batch at work: which lines are done, which are not, where answers go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lightning.errors import JobError
from moe_lightning.jobs.answers import error_line, response_line
from moe_lightning.jobs.earlier import records
from moe_lightning.jobs.files import LineFile, encode_line
from moe_lightning.jobs.lines import BadLine, Envelope, LineRules, read_envelopes
from moe_lightning.server.batches.errors import StorageDamaged


@dataclass(frozen=True)
class Tally:
    """What is done: lines answered and refused, tokens of the answers, the model that gave them."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    model: str | None = None

    def with_line(self, record: dict[str, Any], *, is_error: bool) -> Tally:
        """With one line more."""
        if is_error:
            return replace(self, failed=self.failed + 1)
        try:
            body = record["response"]["body"]
            usage = body.get("usage") or {}
            read, written = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
            model = body.get("model", self.model)
        except (AttributeError, KeyError, TypeError, ValueError):
            read, written, model = 0, 0, self.model
        return Tally(
            self.completed + 1, self.failed, self.input_tokens + read, self.output_tokens + written, model
        )


class Run:
    """One batch's input, answers and failures; but for `lines`, to be used by one thread at a time.

    Every line of the input ends as one line of `answers` or `failures`, whatever interrupts the run.

    Attributes:
        tally: what is done.
        is_read: whether `tally` counts what earlier runs have done.
    """

    def __init__(self, input: Path, answers: Path, failures: Path, rules: LineRules) -> None:
        self._paths = {False: answers, True: failures}
        self._input, self._rules = input, rules
        self._files: dict[bool, LineFile] = {}
        self._done: set[str] = set()
        self.tally = Tally()
        self.is_read = False

    def open(self) -> None:
        """Find out what is done already; a torn last line is cut.

        Raises:
            JobError: the disk does not work.
            StorageDamaged: a file is not what was written there.
        """
        self.close()
        self._done, self.tally = set(), Tally()
        for is_error, path in self._paths.items():
            if path.exists():
                self._read(is_error)
        self.is_read = True

    def _read(self, is_error: bool) -> None:
        file = self._file(is_error)
        try:
            for _, record in records(file):
                self._done.add(record["id"])
                self.tally = self.tally.with_line(record, is_error=is_error)
            file.cut_torn_line()
        except JobError as e:
            raise StorageDamaged(f"the batch's {'error' if is_error else 'output'} file is damaged") from e

    def lines(self) -> Iterator[Envelope | BadLine]:
        """Lines that are not done; each is read when it is asked for."""
        with self._input.open("rb") as file:
            for line in read_envelopes(file, self._rules):
                if line.line_id not in self._done:
                    yield line

    def answer(self, line: Envelope, status: int, request_id: str, body: dict[str, Any]) -> None:
        """Write what came back for a line.

        Raises:
            JobError: the disk takes nothing more; nothing has been written.
        """
        record = response_line(line, status, request_id, body)
        if status == 200:
            self._write(record, is_error=False)
            return
        error = body.get("error")
        error = error if isinstance(error, dict) else {}
        code, message = error.get("code") or error.get("type"), error.get("message")
        record["error"] = {
            "code": str(code or "request_failed"),
            "message": f"line {line.number}: {message or f'the server answered {status}'}",
        }
        self._write(record, is_error=True)

    def refuse(self, line: Envelope | BadLine, code: str, message: str) -> None:
        """Write why a line gets no answer.

        Raises:
            JobError: the disk takes nothing more; nothing has been written.
        """
        self._write(error_line(line, code, message), is_error=True)

    def refuse_rest(self, code: str, message: str) -> None:
        """Write why none of the lines that are not done gets an answer; may be called again after a failure.

        Raises:
            JobError: the disk takes nothing more; whole lines have been written.
        """
        for line in self.lines():
            if isinstance(line, BadLine):
                self.refuse(line, line.code, line.message)
            else:
                self.refuse(line, code, message)

    def sync_if_due(self) -> None:
        """Make lines durable if old ones are not yet.

        Raises:
            JobError: the disk is full or broken.
        """
        for file in self._files.values():
            file.sync_if_due()

    def finish(self) -> tuple[int | None, int | None]:
        """Make all lines durable; bytes of answers and of failures, None where there are none.

        Raises:
            JobError: the disk is full or broken.
        """
        for is_error, file in list(self._files.items()):
            file.sync()
            if file.is_empty:
                del self._files[is_error]
                file.delete()
        sizes = {is_error: file.size for is_error, file in self._files.items()}
        return sizes.get(False), sizes.get(True)

    def close(self) -> None:
        """Let go of the files."""
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, is_error: bool) -> LineFile:
        if is_error not in self._files:
            self._files[is_error] = LineFile(self._paths[is_error])
        return self._files[is_error]

    def _write(self, record: dict[str, Any], *, is_error: bool) -> None:
        if record["id"] in self._done:
            return
        self._file(is_error).append(encode_line(record))
        self._done.add(record["id"])
        self.tally = self.tally.with_line(record, is_error=is_error)
