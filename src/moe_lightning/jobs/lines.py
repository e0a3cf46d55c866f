"""Lines of a batch input file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, TypeVar

from moe_lightning.engine.checks import shown, text
from moe_lightning.errors import RequestError
from moe_lightning.protocol import ChatCall, CompletionCall, parse_chat, parse_completion
from moe_lightning.units import format_bytes

LINE_ID_PREFIX = "batch_req_"
MAX_LINE_BYTES = 64 * 2**20  # a binary file without line breaks must not end up in memory
_BOM = b"\xef\xbb\xbf"
_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_CHAT = "/v1/chat/completions"
URLS = (_CHAT, "/v1/completions")


@dataclass(frozen=True, slots=True)
class LineRules:
    """What a line may be: longest line in bytes, levels of objects and lists in its body, urls."""

    max_bytes: int = MAX_LINE_BYTES
    max_depth: int = 100  # what writes a body down again is recursive
    urls: tuple[str, ...] = URLS


@dataclass(frozen=True, slots=True)
class Envelope:
    """A line whose body is still to be judged; `line_id` stands for its custom_id and body together.

    `size` are the line's bytes.
    """

    number: int
    line_id: str
    custom_id: str
    url: str
    body: dict[str, Any]
    size: int


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line that asks for something; `line_id` stands for its custom_id and body together."""

    number: int
    line_id: str
    custom_id: str
    call: ChatCall | CompletionCall


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be served; `line_id` stands for its bytes."""

    number: int
    line_id: str
    custom_id: str | None
    code: str
    message: str


class _LineError(Exception):
    """What is wrong with a line; `code` is for programs."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


_Line = TypeVar("_Line", BatchLine, Envelope)
_RULES = LineRules()


def read_batch(file: BinaryIO, end: int | None = None) -> Iterator[BatchLine | BadLine]:
    """The lines of `file` up to byte `end`, but for blank ones; each is read when it is asked for."""
    return _read(file, end, _RULES.max_bytes, parse_line)


def read_envelopes(file: BinaryIO, rules: LineRules = _RULES) -> Iterator[Envelope | BadLine]:
    """The lines of `file` but for blank ones, their bodies as they are; each is read when it is asked for."""
    return _read(file, None, rules.max_bytes, lambda raw, number: parse_envelope(raw, number, rules))


def _read(
    file: BinaryIO, end: int | None, max_bytes: int, parse: Callable[[bytes, int], _Line | BadLine]
) -> Iterator[_Line | BadLine]:
    seen: set[str] = set()
    copies: Counter[str] = Counter()
    for number, raw in _raw_lines(file, end, max_bytes):
        line = parse(raw, number)
        if line.custom_id is not None and line.custom_id in seen:
            message = f"custom_id {shown(line.custom_id)} is on an earlier line too; give each line its own"
            line = _bad(raw, number, _LineError("duplicate_custom_id", message, line.custom_id))
        elif line.custom_id is not None:
            seen.add(line.custom_id)
        if isinstance(line, BadLine):
            # Equal bad lines are told apart by their count, so that a resumed job reports each of them once.
            copies[line.line_id] += 1
            if (copy := copies[line.line_id]) > 1:
                line_id = _line_id(line.line_id, str(copy).encode())
                line = BadLine(number, line_id, line.custom_id, line.code, line.message)
        yield line


def _raw_lines(file: BinaryIO, end: int | None, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    file.seek(0)
    number = 0
    while end is None or file.tell() < end:
        raw = file.readline(max_bytes + 1)
        if not raw:
            return
        number += 1
        if len(raw) > max_bytes:
            _skip_line(file, raw, max_bytes)
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if raw.strip():
            yield number, raw


def _skip_line(file: BinaryIO, raw: bytes, max_bytes: int) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(max_bytes)


def parse_line(raw: bytes, number: int) -> BatchLine | BadLine:
    """What one line asks for, whatever its bytes are; `number` counts from 1 and is for messages."""
    line = parse_envelope(raw, number, _RULES)
    if isinstance(line, BadLine):
        return line
    try:
        return BatchLine(number, line.line_id, line.custom_id, _call(line.url, line.body))
    except RequestError as e:
        return _bad(raw, number, _LineError("invalid_request", str(e), line.custom_id))


def parse_envelope(raw: bytes, number: int, rules: LineRules = _RULES) -> Envelope | BadLine:
    """What one line holds, whatever its bytes are; `number` counts from 1 and is for messages."""
    try:
        return _envelope(raw, number, rules)
    except _LineError as e:
        return _bad(raw, number, e)


def _bad(raw: bytes, number: int, error: _LineError) -> BadLine:
    line_id = _line_id(error.custom_id, b"line", raw.rstrip(b"\r\n"))
    return BadLine(number, line_id, error.custom_id, error.code, f"line {number}: {error}")


def _envelope(raw: bytes, number: int, rules: LineRules) -> Envelope:
    record = _load(raw, rules.max_bytes)
    custom_id = _custom_id(record)
    try:
        url, body = _request(record, rules)
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        return Envelope(number, _line_id(custom_id, b"body", canonical), custom_id, url, body, len(raw))
    except _LineError as e:
        raise _LineError(e.code, str(e), custom_id) from None


def _load(raw: bytes, max_bytes: int) -> dict[str, Any]:
    if len(raw) > max_bytes:
        raise _LineError("line_too_long", f"longer than {format_bytes(max_bytes)}; split the request")
    try:
        record = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as e:
        raise _LineError("invalid_json", f"not UTF-8 at byte {e.start}; save the file as UTF-8") from None
    except RecursionError:
        raise _LineError("invalid_json", "nested too deeply; flatten the object") from None
    except ValueError as e:
        raise _LineError("invalid_json", f"not JSON ({e}); write one object per line") from None
    if not isinstance(record, dict):
        raise _LineError("invalid_line", f"{shown(record)} is not an object; write one object per line")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _custom_id(record: dict[str, Any]) -> str:
    custom_id = record.get("custom_id")
    if custom_id is None:
        raise _LineError("missing_custom_id", "custom_id is missing; give each line its own")
    if custom_id == "":
        raise _LineError("missing_custom_id", "custom_id is empty; give each line its own")
    try:
        return text("custom_id", custom_id)
    except RequestError as e:
        raise _LineError("invalid_custom_id", str(e)) from None


def _request(record: dict[str, Any], rules: LineRules) -> tuple[str, dict[str, Any]]:
    """Url and body of a line."""
    for name in sorted(record.keys() - _FIELDS):
        raise _LineError("unknown_field", f"unknown field {shown(name)}; remove it")
    if (method := record.get("method")) != "POST":
        raise _LineError("invalid_method", f"method={shown(method)}: give 'POST'")
    url = record.get("url")
    if url not in rules.urls:
        raise _LineError("invalid_url", f"url={shown(url)}: give {' or '.join(map(repr, rules.urls))}")
    body = record.get("body")
    if not isinstance(body, dict):
        raise _LineError("invalid_body", f"body={shown(body)}: give an object")
    if _is_deeper(body, rules.max_depth):
        raise _LineError("invalid_body", f"body is nested deeper than {rules.max_depth} levels; flatten it")
    return url, body


def _is_deeper(value: dict[str, Any], levels: int) -> bool:
    level: list[Any] = [value]
    for _ in range(levels):
        children = (x.values() if isinstance(x, dict) else x for x in level)
        level = [child for some in children for child in some if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _call(url: str, body: dict[str, Any]) -> ChatCall | CompletionCall:
    if url == _CHAT:
        return parse_chat(body)
    call = parse_completion(body)
    if len(call.prompts) > 1:
        raise RequestError(
            f"prompt is a list of {len(call.prompts)} prompts; a line holds one: give a single string "
            "or a single list of token ids, and a line to each prompt"
        )
    return call


def _line_id(custom_id: str | None, *parts: bytes) -> str:
    """Stable name of a line; parts are hashed with their lengths, so that no two lists look alike."""
    digest = hashlib.sha256()
    for part in (json.dumps(custom_id).encode(), *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return LINE_ID_PREFIX + digest.hexdigest()[:32]
