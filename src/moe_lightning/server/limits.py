"""What a server takes at most."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.engine.form_bounds import MAX_COUNT, MAX_DEPTH, check_bounds
from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.errors import RequestError
from moe_lightning.protocol import ChatCall, CompletionCall
from moe_lightning.protocol.native import NativeCall

_STOP_CHARS = 1024
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may ask for and hold; bytes and seconds.

    Attributes:
        max_queue: answers that wait for a place beside those that run; what comes then is refused with 429.
        max_queued_tokens: tokens of the prompts of all answers that run or wait.
        max_choices: answers to one request, prompts times n.
        max_stops: stop strings, and stop tokens, of one request.
        max_body_bytes: of one request's body.
        max_bodies_bytes: of all bodies at a time that are being read, or wait to be tokenized.
        max_forms: forms of answers at a time that are being compiled or wait for it.
        max_form_depth: levels of objects and lists of a form; the engine takes no more than the default.
        max_form_count: repetitions of a form in sum; likewise.
        max_connections: requests in progress, whatever they are for; what comes then is refused with 503. Twice as
            many connections may be open; what comes then is closed.
        head_seconds: that a connection may take to the end of a request's head.
        body_seconds: until a body has to be there.
        keep_alive_seconds: of silence in a stream, after which a comment is sent.
        write_seconds: that a response waits for a reader who takes nothing; then it is dropped.
        form_seconds: that the form of an answer may take to compile.
        shutdown_seconds: that running requests get after SIGTERM.
    """

    max_queue: int = 4096
    max_queued_tokens: int = 16 * MIB
    max_choices: int = 1024
    max_stops: int = 64
    max_body_bytes: int = 16 * MIB
    max_bodies_bytes: int = 256 * MIB
    max_forms: int = 1024
    max_form_depth: int = MAX_DEPTH
    max_form_count: int = MAX_COUNT
    max_connections: int = 8192
    head_seconds: float = 30.0
    body_seconds: float = 60.0
    keep_alive_seconds: float = 10.0
    write_seconds: float = 60.0
    form_seconds: float = 20.0
    shutdown_seconds: float = 30.0

    def check_form(self, form: StructuredOutputsParams) -> None:
        """Make sure that a form is not larger than forms may be.

        Raises:
            RequestError: it is; the message says the limit.
        """
        check_bounds(form, self.max_form_depth, self.max_form_count)

    def check(self, call: ChatCall | CompletionCall | NativeCall) -> None:
        """Make sure that a call is not larger than calls may be.

        Raises:
            RequestError: it is; the message says the limit.
        """
        prompts = 1 if isinstance(call, ChatCall) else len(call.prompts)
        if prompts * call.params.n > self.max_choices:
            raise RequestError(
                f"{prompts} prompts with n={call.params.n} are {prompts * call.params.n} answers; "
                f"one request gets {self.max_choices} at most"
            )
        params = call.params
        for name, count in (
            ("stop", len(params.stop_strings)),
            ("stop_token_ids", len(params.stop_token_ids or ())),
        ):
            if count > self.max_stops:
                raise RequestError(f"{name} has {count} entries; give {self.max_stops} at most")
        longest = max(map(len, params.stop_strings), default=0)
        if longest > _STOP_CHARS:
            raise RequestError(f"a string of stop has {longest} characters; give {_STOP_CHARS} at most")
