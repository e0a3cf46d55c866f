"""A batch job: every line of the input ends as one line of the output or of the error file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from moe_lightning.engine.request import PassStats, Request, RequestOutput
from moe_lightning.errors import JobError, RequestError
from moe_lightning.jobs.answers import BatchLLM, answer_line, error_line, make_request
from moe_lightning.jobs.earlier import Written, is_in_order, written
from moe_lightning.jobs.files import LineFile, encode_line
from moe_lightning.jobs.lines import BadLine, BatchLine, read_batch
from moe_lightning.jobs.paths import JobFiles
from moe_lightning.jobs.survey import open_input, survey_input
from moe_lightning.protocol.failures import failure_of

_RETRY = "run the job again to retry"


@dataclass(frozen=True)
class JobStatus:
    """Where a job stands.

    Of `num_total` lines `num_done` are answered or refused, `num_resumed` of them by earlier runs and
    `num_failed` of them refused by this one; `num_failed_earlier` of those of earlier runs are refused. Tokens and
    seconds are those of this run's passes; `num_ended` answers of it have ended, with `ended_tokens`.
    """

    num_total: int
    num_done: int
    num_resumed: int
    num_failed: int = 0
    num_failed_earlier: int = 0
    num_running: int = 0
    num_waiting: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    num_ended: int = 0
    ended_tokens: int = 0


class BatchJob:
    """A job whose files are checked and locked; `with` closes them.

    What an earlier run has answered stays. So does the error of a line that is wrong in itself. One that depends on
    the model or its settings, such as that of an over-long prompt, is removed and the line tried again.

    Attributes:
        survey: the lines of the input.
        status: where the job stands.
        earlier_models: that answered the lines which are answered already.
        is_in_order: all answers will be in the order of the input, those of earlier runs included, if the rest is.

    Raises:
        JobError: the input has no lines, or a file to write is in use or of another job.
    """

    def __init__(
        self, files: JobFiles, *, resume: bool = True, ordered: bool = False, limit: int | None = None
    ) -> None:
        self.files = files
        self._resume, self._ordered = resume, ordered
        self._in_flight: dict[str, tuple[int, BatchLine]] = {}
        self._held: dict[int, tuple[bool, bytes]] = {}  # answers by position, waiting for earlier ones
        self._num_fed = self._num_written = 0
        self._errors: LineFile | None = None
        self._input = open_input(files.input)
        try:
            self.survey = survey_input(self._input, limit)
            self._output = LineFile(files.output)
        except BaseException:
            self._input.close()
            raise
        try:
            answered, failed = self._earlier() if resume else (Written(), Written())
        except BaseException:
            self.close()
            raise
        self.earlier_models = answered.models
        self.is_in_order = is_in_order(self.survey, answered.ids)
        self._retried = self.survey.valid_ids & set(failed.ids)
        earlier_failures = self.survey.bad_ids & set(failed.ids)
        self._done = (self.survey.valid_ids & set(answered.ids)) | earlier_failures
        num_resumed = len(self._done)
        self.status = JobStatus(
            self.survey.num_lines, num_resumed, num_resumed, num_failed_earlier=len(earlier_failures)
        )

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Make what is written durable, and let go of the files."""
        self._input.close()
        try:
            self._output.close()
        finally:
            if self._errors is not None:
                self._errors.close()

    def run(
        self, load: Callable[[], BatchLLM], on_update: Callable[[JobStatus], None] | None = None
    ) -> JobStatus:
        """Answer what is not answered yet; the model is loaded only if a line needs it.

        Raises:
            JobError: a file cannot be written, or the engine lost requests.
        """
        llm = None if self.survey.valid_ids <= self._done else load()
        if not self._resume:  # not before the model is there: till then a mistake costs nothing
            self._discard_answers()
        self._discard_failures()
        if llm is None:
            self._refuse_bad_lines()
            return self.status
        update = on_update or (lambda _: None)

        def on_pass(stats: PassStats) -> None:
            self._note_pass(stats)
            update(self.status)

        for output in llm.run(self._requests(llm), on_pass):
            self._finish(llm, output)
            update(self.status)
        self._require_all_answered()
        return self.status

    def _refuse_bad_lines(self) -> None:
        for line in self._remaining():
            raise AssertionError(f"line {line.number} needs the model")

    def _require_all_answered(self) -> None:
        if self._in_flight:
            lost = next(iter(self._in_flight.values()))[1].custom_id
            raise JobError(
                f"the engine gave no answer to {len(self._in_flight)} requests, {lost!r} among them; "
                "run the job again to resume"
            )

    def _earlier(self) -> tuple[Written, Written]:
        """Answers and errors of earlier runs."""
        answered, failed = written(self.survey, self._output, may_be_shared=False), Written()
        if self.files.errors.exists():
            failed = written(self.survey, self._error_file(), may_be_shared=True)
        return answered, failed

    def _discard_answers(self) -> None:
        self._output.clear()
        if self.files.errors.exists():
            LineFile(self.files.errors).delete()

    def _discard_failures(self) -> None:
        """Remove the errors of lines that are tried again, so that each ends in one file only."""
        if self._errors is None or not self._retried:
            return
        self._errors.remove(self._retried)
        if self._errors.is_empty:
            self._errors.delete()
            self._errors = None

    def _error_file(self) -> LineFile:
        if self._errors is None:
            self._errors = LineFile(self.files.errors)
        return self._errors

    def _remaining(self) -> Iterator[BatchLine]:
        """Lines that need the model; the bad ones among them are refused on the way."""
        for line in read_batch(self._input, self.survey.size):
            if line.number > self.survey.last_line:
                return
            if line.line_id in self._done:
                continue
            if isinstance(line, BadLine):
                self._write(self._next_position(), error_line(line, line.code, line.message), is_error=True)
            else:
                yield line

    def _requests(self, llm: BatchLLM) -> Iterator[Request]:
        for line in self._remaining():
            position = self._next_position()
            try:
                request = make_request(llm, line)
            except RequestError as e:
                message = f"line {line.number}: {e}"
                self._write(position, error_line(line, "invalid_request", message), is_error=True)
                continue
            self._in_flight[line.line_id] = (position, line)
            yield request

    def _next_position(self) -> int:
        self._num_fed += 1
        return self._num_fed - 1

    def _finish(self, llm: BatchLLM, output: RequestOutput) -> None:
        position, line = self._in_flight.pop(output.request_id)
        if failure := failure_of([output], _RETRY):
            message = f"line {line.number}: {failure.message}"
            self._write(position, error_line(line, failure.code, message), is_error=True)
            return
        tokens = sum(len(answer.token_ids) for answer in output.outputs)
        status = self.status
        self.status = replace(
            status, num_ended=status.num_ended + 1, ended_tokens=status.ended_tokens + tokens
        )
        self._write(position, answer_line(llm, line, output), is_error=False)

    def _write(self, position: int, record: dict[str, Any], *, is_error: bool) -> None:
        data = encode_line(record)
        if not self._ordered:
            self._append(data, is_error=is_error)
            return
        self._held[position] = (is_error, data)
        while self._num_written in self._held:
            is_error, data = self._held.pop(self._num_written)
            self._num_written += 1
            self._append(data, is_error=is_error)

    def _append(self, data: bytes, *, is_error: bool) -> None:
        (self._error_file() if is_error else self._output).append(data)
        status = self.status
        self.status = replace(
            status, num_done=status.num_done + 1, num_failed=status.num_failed + int(is_error)
        )

    def _note_pass(self, stats: PassStats) -> None:
        self.status = replace(self.status, **vars(stats))
        self._output.sync_if_due()
        if self._errors is not None:
            self._errors.sync_if_due()
