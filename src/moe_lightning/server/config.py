"""What a user may set of a server; flags and environment variables derive from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_lightning.config import setting
from moe_lightning.errors import ConfigError
from moe_lightning.server.hosts import parse_hosts
from moe_lightning.server.limits import Limits
from moe_lightning.units import parse_bytes, parse_count

_DEFAULTS = Limits()


def parse_seconds(text: str | float) -> float:
    """Seconds above 0.

    Raises:
        ConfigError: the text is none.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{text!r} is no time; give seconds above 0, such as 30")
    return seconds


def _parse_port(text: str | int) -> int:
    port = parse_count(text)
    if not 0 <= port < 2**16:
        raise ConfigError(f"port {port} is none; give one from 1 to 65535, or 0 for a free one")
    return port


def parse_positive(parse: Callable[[str], int]) -> Callable[[str], int]:
    """What parses numbers of at least 1."""

    def parse_one(text: str) -> int:
        if (value := parse(text)) < 1:
            raise ConfigError(f"{text!r} is too small; give at least 1")
        return value

    return parse_one


def _parse_up_to(largest: int) -> Callable[[str], int]:
    """What parses numbers from 1 to the largest."""

    def parse(text: str) -> int:
        if (value := parse_positive(parse_count)(text)) > largest:
            raise ConfigError(f"{text!r} is too large; give {largest} at most")
        return value

    return parse


def _parse_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError(f"{text!r} names no model; give names with commas between them")
    return names


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server; none is needed."""

    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 is every one: set an API key then", metavar="ADDRESS"
    )
    port: int = setting(30000, "port to listen on; 0 takes a free one", parse=_parse_port, metavar="N")
    api_key: str | None = field(
        default=None, repr=False,
        metadata={"help": "key that clients must send; better in the environment, where others do not see it",
                  "metavar": "KEY"},
    )  # fmt: skip
    allowed_hosts: tuple[str, ...] = setting(
        (), "names that the server is called by, with commas, such as behind a proxy; *.example.com and * are for "
        "many. Default: those of this machine when it listens on it alone, else any", parse=parse_hosts,
        metavar="NAMES",
    )  # fmt: skip
    served_model_name: tuple[str, ...] = setting(
        (), "names that clients may call the model by, with commas; default: the directory's",
        parse=_parse_names, metavar="NAMES",
    )  # fmt: skip
    chat_template: str | None = setting(
        None, "file with a chat template instead of the tokenizer's", metavar="FILE"
    )
    data_dir: str | None = setting(
        None, "directory of uploaded files and batches; default: there are none", metavar="DIR"
    )
    max_queue: int = setting(
        _DEFAULTS.max_queue, "answers that may wait beside those that run", parse=parse_positive(parse_count),
        metavar="N",
    )  # fmt: skip
    max_queued_tokens: int = setting(
        _DEFAULTS.max_queued_tokens, "tokens of the prompts of all answers that run or wait",
        parse=parse_positive(parse_count), metavar="N",
    )  # fmt: skip
    max_choices: int = setting(
        _DEFAULTS.max_choices, "answers to one request, prompts times n", parse=parse_positive(parse_count),
        metavar="N",
    )  # fmt: skip
    max_stops: int = setting(
        _DEFAULTS.max_stops, "stop strings, and stop tokens, of one request", parse=parse_positive(parse_count),
        metavar="N",
    )  # fmt: skip
    max_body_size: int = setting(
        _DEFAULTS.max_body_bytes, "of one request", parse=parse_positive(parse_bytes), metavar="SIZE"
    )
    max_connections: int = setting(
        _DEFAULTS.max_connections,
        "requests in progress at a time, whatever they are for; twice as many connections may be open",
        parse=parse_positive(parse_count), metavar="N",
    )  # fmt: skip
    max_forms: int = setting(
        _DEFAULTS.max_forms, "forms of answers that are being compiled or wait for it",
        parse=parse_positive(parse_count), metavar="N",
    )  # fmt: skip
    max_form_depth: int = setting(
        _DEFAULTS.max_form_depth, "levels of objects and lists of an answer's form; the default is the most",
        parse=_parse_up_to(_DEFAULTS.max_form_depth), metavar="N",
    )  # fmt: skip
    max_form_count: int = setting(
        _DEFAULTS.max_form_count, "repetitions in an answer's form, all together; the default is the most",
        parse=_parse_up_to(_DEFAULTS.max_form_count), metavar="N",
    )  # fmt: skip
    head_seconds: float = setting(
        _DEFAULTS.head_seconds, "that a connection may take to the end of a request's head", parse=parse_seconds,
        metavar="SECONDS",
    )  # fmt: skip
    body_seconds: float = setting(
        _DEFAULTS.body_seconds, "that a request's body may take", parse=parse_seconds, metavar="SECONDS"
    )
    form_seconds: float = setting(
        _DEFAULTS.form_seconds, "that the form of an answer may take to compile", parse=parse_seconds,
        metavar="SECONDS",
    )  # fmt: skip
    keep_alive: float = setting(
        _DEFAULTS.keep_alive_seconds, "seconds of silence in a stream until a comment is sent",
        parse=parse_seconds, metavar="SECONDS",
    )  # fmt: skip
    write_seconds: float = setting(
        _DEFAULTS.write_seconds, "that a response waits for a reader who takes nothing, until it is dropped",
        parse=parse_seconds, metavar="SECONDS",
    )  # fmt: skip
    shutdown_timeout: float = setting(
        _DEFAULTS.shutdown_seconds, "that running requests get to finish after SIGTERM", parse=parse_seconds,
        metavar="SECONDS",
    )  # fmt: skip
    avg_prompt_len: int | None = setting(
        None, "tokens of a usual prompt: on a GPU the plan is made for it",
        parse=parse_positive(parse_count), metavar="N",
    )  # fmt: skip
    gen_len: int | None = setting(
        None, "tokens of a usual answer", parse=parse_positive(parse_count), metavar="N"
    )

    def __post_init__(self) -> None:
        if (self.avg_prompt_len is None) != (self.gen_len is None):
            raise ConfigError("avg_prompt_len and gen_len belong together; give both or none")
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.strip() == self.api_key != ""
        ):
            raise ConfigError("api_key has other than ASCII characters, or spaces at an end; choose another")

    @property
    def limits(self) -> Limits:
        """What clients may ask for."""
        return Limits(
            max_queue=self.max_queue,
            max_queued_tokens=self.max_queued_tokens,
            max_choices=self.max_choices,
            max_stops=self.max_stops,
            max_body_bytes=self.max_body_size,
            max_bodies_bytes=max(_DEFAULTS.max_bodies_bytes, 4 * self.max_body_size),
            max_connections=self.max_connections,
            max_forms=self.max_forms,
            max_form_depth=self.max_form_depth,
            max_form_count=self.max_form_count,
            head_seconds=self.head_seconds,
            body_seconds=self.body_seconds,
            form_seconds=self.form_seconds,
            keep_alive_seconds=self.keep_alive,
            write_seconds=self.write_seconds,
            shutdown_seconds=self.shutdown_timeout,
        )
