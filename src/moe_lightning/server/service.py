"""What endpoints share: bodies become requests, outputs become answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

from starlette.requests import Request as HttpRequest

from moe_lightning.engine.draws import stable_seed
from moe_lightning.engine.request import Request, RequestOutput
from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.errors import RequestError
from moe_lightning.llm import LLM
from moe_lightning.protocol import (
    ChatCall,
    CompletionCall,
    chat_response,
    completion_response,
    parse_chat,
    parse_completion,
)
from moe_lightning.protocol.chunks import Chunks
from moe_lightning.protocol.failures import failure_of_reasons
from moe_lightning.protocol.fields import FORMS
from moe_lightning.protocol.forms import parse_form
from moe_lightning.protocol.native import NativeCall
from moe_lightning.protocol.stream_options import StreamOptions
from moe_lightning.server.bodies import BodyReader, parse_object
from moe_lightning.server.desk import Desk
from moe_lightning.server.errors import HttpError
from moe_lightning.server.forms import FormCompiler
from moe_lightning.server.inbox import News
from moe_lightning.server.limits import Limits
from moe_lightning.server.watch import Watch

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_INLINE_BYTES = 2**16  # a body up to this size is parsed and tokenized faster than another thread takes it up
_INLINE_MESSAGES = 64
_T = TypeVar("_T")
Call = ChatCall | CompletionCall | NativeCall


@dataclass(frozen=True)
class Work:
    """A checked call with its requests, one per prompt."""

    call: Call
    requests: Sequence[Request]
    response_id: str


class Service:
    """One model, served.

    Attributes:
        llm: the model; its engine is the engine thread's.
        desk: takes requests to the engine.
        limits: what clients may ask for.
        bodies: reads their bodies.
        watch: what is measured.
        names: the model's; the first is the one it answers with.
        created: when the server began, in seconds since 1970.
    """

    def __init__(self, llm: LLM, desk: Desk, limits: Limits, watch: Watch, names: Sequence[str]) -> None:
        self.llm, self.desk, self.limits, self.watch = llm, desk, limits, watch
        self.bodies = BodyReader(limits)
        self.names = tuple(names)
        self.created = int(time.time())
        # Normalizing may join characters: a few times what the longest token holds.
        longest = max(map(len, llm.tokenizer.get_vocab()), default=1)
        self._max_chars = 4 * longest * llm.max_model_len
        # One thread: tokenizers are not made for several.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._forms = FormCompiler(llm.prepare_form, limits, lambda: desk.retry_after)
        # So that interactive requests do not wait there for a whole batch.
        self._batching = asyncio.Semaphore(2)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self.llm.tokenizer.decode(list(ids)))

    async def parsed(self, request: HttpRequest, parse: Callable[[dict[str, Any]], _T]) -> _T:
        """What `parse` makes of the object in a body, without holding up other requests if that takes long.

        Raises:
            HttpError: it cannot be read or used.
        """
        try:
            async with self.bodies.read(request) as raw:  # it counts as held as long as it waits here
                if len(raw) <= _INLINE_BYTES:
                    body = parse_object(raw)
                    if form := _form_of(body):
                        await self._forms.prepare(form)
                    return parse(body)
                return await self._parsed_apart(raw, parse)
        except RequestError as error:
            raise HttpError(400, str(error)) from error
        except RecursionError:
            raise _too_deep() from None

    async def _parsed_apart(self, raw: bytes, parse: Callable[[dict[str, Any]], _T]) -> _T:
        # An object takes many times the memory of its text: only the one in the thread may be there. So the text
        # of one that asks for a form, which has to be compiled first, is read twice.
        def form_or_result() -> tuple[StructuredOutputsParams | None, _T | None]:
            body = parse_object(raw)
            form = _form_of(body)
            return form, None if form else parse(body)

        loop = asyncio.get_running_loop()
        form, result = await loop.run_in_executor(self._tokenizing, form_or_result)
        if form is None:
            return cast(_T, result)
        await self._forms.prepare(form)
        return await loop.run_in_executor(self._tokenizing, lambda: parse(parse_object(raw)))

    def check_model(self, name: str | None) -> None:
        """Make sure that a name is this model's.

        Raises:
            HttpError: it is another's.
        """
        if name is not None and name not in self.names:
            raise HttpError(
                404, f"model {name[:80]!r} is not served here; {self.names[0]!r} is", "model_not_found"
            )

    def work(self, url: str, body: dict[str, Any], request_id: str, *, is_background: bool = False) -> Work:
        """The requests that a body of an OpenAI endpoint asks for.

        Raises:
            RequestError, HttpError: it cannot be served.
        """
        call = parse_chat(body) if url == CHAT else parse_completion(body)
        return self.work_of(call, request_id, is_background=is_background)

    def work_of(self, call: Call, request_id: str, *, is_background: bool = False) -> Work:
        """The requests that a call asks for.

        Raises:
            RequestError, HttpError: it cannot be served.
        """
        self.check_model(call.model)
        self.limits.check(call)
        self._check_length(call)
        unique = uuid.uuid4().hex
        # Of the request's own id, so that whoever sends that again gets the same draws.
        seed = stable_seed(self.llm.config.seed, request_id)
        if isinstance(call, ChatCall):
            requests = [self.llm.chat_request(unique, list(call.messages), call.params, seed)]
        else:
            requests = [
                self.llm.completion_request(f"{unique}-{i}", prompt, call.params, _seed(seed, i))
                for i, prompt in enumerate(call.prompts)
            ]
        if is_background:
            requests = [replace(request, is_background=True) for request in requests]
        return Work(call, requests, f"{'chatcmpl' if isinstance(call, ChatCall) else 'cmpl'}-{unique}")

    def _check_length(self, call: Call) -> None:
        """Refuse text that is hopelessly long before minutes go into its tokens."""
        if isinstance(call, ChatCall):
            lengths = [sum(len(message["content"]) for message in call.messages)]
        else:
            lengths = [len(prompt) for prompt in call.prompts if isinstance(prompt, str)]
        if lengths and max(lengths) > self._max_chars:
            raise RequestError(
                f"the prompt has {max(lengths)} characters; {self._max_chars} are the most that "
                f"max_model_len={self.llm.max_model_len} tokens can hold. Shorten it"
            )

    async def outputs(self, work: Work) -> list[RequestOutput]:
        """All outputs of a call's requests.

        Raises:
            HttpError: one is no answer.
        """
        with self.watch.request() as seen:
            outputs = await self.desk.outputs(work.requests)
            seen.finish(outputs)
        self.check_finished(outputs)
        return outputs

    async def news(self, work: Work) -> AsyncGenerator[list[News], None]:
        """What is new of a call's requests, as it comes; an empty list after each silence.

        Raises:
            HttpError: there is no answer, or no more of it.
        """
        with self.watch.request() as seen:
            async with aclosing(self.desk.stream(work.requests)) as stream:
                async for news in stream:
                    seen.news([update for _, update in news])
                    self.check_finished([update.output for _, update in news])
                    yield news

    async def answer(self, work: Work) -> dict[str, Any]:
        """The body that answers a call of an OpenAI endpoint.

        Raises:
            HttpError: there is no answer.
        """
        outputs = await self.outputs(work)
        about: dict[str, Any] = {
            "response_id": work.response_id,
            "model": self.names[0],
            "created": int(time.time()),
            "decode": self.decode,
        }
        if isinstance(work.call, ChatCall):
            return chat_response(work.call, outputs[0], **about)
        assert isinstance(work.call, CompletionCall)
        return completion_response(work.call, outputs, **about)

    async def events(self, work: Work, options: StreamOptions) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The chunks that answer a call of an OpenAI endpoint, those that come together in one list.

        After each silence comes an empty list.

        Raises:
            HttpError: there is no answer, or no more of it.
        """
        assert not isinstance(work.call, NativeCall)
        chunks = Chunks(work.call, options, work.response_id, self.names[0], int(time.time()), self.decode)
        async with aclosing(self.news(work)) as stream:
            async for news in stream:
                found = [chunks.of(i, update.output, update.pieces) for i, update in news]
                yield [chunk for some in found for chunk in some]
        if last := chunks.last():
            yield last

    def check_finished(self, outputs: Sequence[RequestOutput]) -> None:
        """Make sure that outputs are answers, or will be.

        Raises:
            HttpError: one is none.
        """
        reasons = {c.finish_reason for output in outputs for c in output.outputs}
        if failure := failure_of_reasons(reasons):
            status = 503 if failure.code == "aborted" else 500
            retry_after = self.desk.retry_after if status == 503 else None
            raise HttpError(status, failure.message, failure.code, retry_after)

    async def answer_body(
        self, url: str, body: dict[str, Any], request_id: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and body that answer a call as background work; cancelling the task drops it."""
        try:
            async with self.desk.background_place():  # not before is it tokenized: thousands may wait
                if form := _form_of(body):
                    await self._forms.prepare(form, is_background=True)
                work = await self._background_work(url, body, request_id)
                return 200, await self.answer(work)
        except RequestError as error:
            failed = HttpError(400, str(error))
        except RecursionError:
            failed = _too_deep()
        except HttpError as error:
            failed = error
        return failed.status, failed.body()

    async def _background_work(self, url: str, body: dict[str, Any], request_id: str) -> Work:
        make = partial(self.work, url, body, request_id, is_background=True)
        async with self._batching:
            if _is_small(body):
                await asyncio.sleep(0)  # others come in between two lines
                return make()
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, make)

    def close(self) -> None:
        """Let go of the threads."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._forms.close()


def _form_of(body: dict[str, Any]) -> StructuredOutputsParams | None:
    """The form that a body asks for, however its field is written."""
    return parse_form({name: value for name, value in body.items() if name in FORMS and value is not None})


def _is_small(body: dict[str, Any]) -> bool:
    """Whether the prompt or the messages of a body not yet checked are text of a size that is tokenized inline."""
    prompt, messages = body.get("prompt"), body.get("messages", ())
    texts = [prompt] if prompt is not None else []
    if isinstance(messages, list) and len(messages) <= _INLINE_MESSAGES:
        texts += [message.get("content") if isinstance(message, dict) else None for message in messages]
    return (
        bool(texts) and all(isinstance(text, str) for text in texts) and sum(map(len, texts)) <= _INLINE_BYTES
    )


def _too_deep() -> HttpError:
    return HttpError(400, "the body is nested too deeply; flatten it")


def _seed(seed: int, index: int) -> int:
    return stable_seed(seed, str(index)) if index else seed
