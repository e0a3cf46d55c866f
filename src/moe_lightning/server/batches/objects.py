"""Files and batches as clients see them, field by field as in OpenAI's API."""

from __future__ import annotations

import re
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moe_lightning.jobs.lines import LineRules

MIN_EXPIRY, MAX_EXPIRY = 3600, 30 * 24 * 3600  # seconds that a file may be kept
_WINDOW = re.compile(r"([1-9][0-9]{0,3})(h|d)", re.ASCII)
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
OPEN: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileObject(_Frozen):
    """A file; times are Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    status_details: str | None = None


class FileDeleted(_Frozen):
    """Says that a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class RequestCounts(_Frozen):
    """Lines of a batch; `completed` and `failed` are among `total`."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputTokens(_Frozen):
    """What was read; this server keeps no prompts."""

    cached_tokens: int = 0


class OutputTokens(_Frozen):
    """What was written; this server does not tell thoughts apart."""

    reasoning_tokens: int = 0


class Usage(_Frozen):
    """Tokens of all answers."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    output_tokens_details: OutputTokens = OutputTokens()
    total_tokens: int = 0


class BatchError(_Frozen):
    """What is wrong with a batch, or with a line of its input, counted from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Errors(_Frozen):
    """All that is wrong with a batch."""

    object: Literal["list"] = "list"
    data: tuple[BatchError, ...]


class Batch(_Frozen):
    """A batch; times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: Errors | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: Usage = Usage()
    metadata: Metadata | None = None


class BatchRecord(_Frozen):
    """A batch with what its clients need not know.

    `answers_id` and `failures_id` are the files that it will have, if they get lines; `keep_seconds` is how long
    these are kept once they are complete, None for ever. `line_bytes` and `body_depth` were the limits when it
    began: under others a line that is done might be taken for another one.
    """

    batch: Batch
    answers_id: str
    failures_id: str
    keep_seconds: int | None = None
    line_bytes: int
    body_depth: int

    @property
    def rules(self) -> LineRules:
        """What its lines may be."""
        return LineRules(self.line_bytes, self.body_depth, (self.batch.endpoint,))

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.batch.status in OPEN


class Expiry(_Frozen):
    """When a file goes."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY, le=MAX_EXPIRY)]


class CreateBatch(_Frozen):
    """Body that asks for a batch."""

    input_file_id: Annotated[str, Field(max_length=64)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Annotated[
        str,
        Field(
            description="24h, or another number of hours (h) or days (d)",
            json_schema_extra={"pattern": f"^{_WINDOW.pattern}$"},
        ),
    ]
    metadata: Metadata | None = None
    output_expires_after: Expiry | None = None

    @field_validator("completion_window")
    @classmethod
    def _is_window(cls, value: str) -> str:
        if _WINDOW.fullmatch(value) is None:
            raise ValueError("give 24h, or another number of hours (h) or days (d)")
        return value

    @property
    def window_hours(self) -> int:
        """The completion window."""
        number, unit = _WINDOW.fullmatch(self.completion_window).groups()  # type: ignore[union-attr]
        return int(number) * (24 if unit == "d" else 1)


_Object = TypeVar("_Object", FileObject, Batch)


class Page(_Frozen, Generic[_Object]):
    """Part of a list."""

    object: Literal["list"] = "list"
    data: list[_Object]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(objects: list[_Object], *, has_more: bool) -> Page[_Object]:
    """The page that holds these."""
    first, last = (objects[0].id, objects[-1].id) if objects else (None, None)
    return Page(data=objects, first_id=first, last_id=last, has_more=has_more)
