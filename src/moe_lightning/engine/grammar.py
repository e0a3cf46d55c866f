"""Answers of a prescribed form: which tokens may come next. Through xgrammar, an optional package."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_lightning.engine.form_bounds import check_bounds
from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.errors import RequestError

_CACHE_BYTES = 256 * 2**20
_FORM_BYTES = 64 * 2**20
_WHERE = re.compile(r"^\[[^]]*\] \S+: ")  # time, file and line before xgrammar's messages
REMEDY = "install it: pip install 'moe-lightning[grammar]'"
Bits = npt.NDArray[np.int32]


class Grammars:
    """Compiles forms for one tokenizer; those that come again are kept.

    Args:
        tokenizer: of transformers.
        vocab_size: of the model; its logits may have more tokens than the tokenizer.
        eos_token_ids: that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._compiler: Any = None
        self._kept: OrderedDict[tuple[str, Any], Form] = OrderedDict()  # the one asked for last is last
        self._mutex = threading.Lock()

    def compile(self, wanted: StructuredOutputsParams) -> Form:
        """The form that is wanted.

        Raises:
            RequestError: it cannot be understood, is too large, or no answer has it; or xgrammar is missing or does
                not know the tokenizer.
        """
        key = wanted.key
        with self._mutex:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        form = self._compiled(wanted)
        with self._mutex:
            self._kept[key] = form
            while sum(kept.num_bytes for kept in self._kept.values()) > _CACHE_BYTES:
                self._kept.popitem(last=False)
        return form

    def _compiled(self, wanted: StructuredOutputsParams) -> Form:
        check_bounds(wanted)
        compiler = self._ready()
        kind, value = wanted.kind_and_value
        try:
            compiled = _compile(compiler, kind, value)
        except (RuntimeError, UnicodeDecodeError) as error:
            message = str(error)
            if isinstance(error, UnicodeDecodeError):  # the message cuts a character of the form in two
                message = error.object.decode(errors="replace")
            found = _WHERE.sub("", message.strip()).partition("\n")[0]
            raise RequestError(f"{kind} of structured_outputs cannot be used: {found[:300]}") from error
        form = Form(compiled, self._vocab_size)
        if form.num_bytes > _FORM_BYTES:
            raise RequestError(
                f"{kind} of structured_outputs takes {form.num_bytes} bytes; {_FORM_BYTES} are the most"
            )
        if not form.begin().allowed().any():
            raise RequestError(f"{kind} of structured_outputs cannot be used: no answer has this form")
        return form

    def _ready(self) -> Any:
        with self._mutex:
            if self._compiler is None:
                self._compiler = self._load()
            return self._compiler

    def _load(self) -> Any:
        try:
            import xgrammar  # takes a second: not before it is needed
        except ImportError as error:
            raise RequestError(f"structured outputs need xgrammar, which is not here; {REMEDY}") from error
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._eos_token_ids
            )
        except (ValueError, RuntimeError) as error:
            raise RequestError(f"structured outputs do not know this model's tokenizer: {error}") from error
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def _compile(compiler: Any, kind: str, value: Any) -> Any:
    match kind:
        case "json":
            return compiler.compile_json_schema(value)
        case "json_object":
            return compiler.compile_json_schema('{"type": "object"}')
        case "regex":
            return compiler.compile_regex(value)
        case "choice":
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
            return compiler.compile_grammar(f"root ::= {choices}")
        case _:
            return compiler.compile_grammar(value)


class Form:
    """A compiled form, for any number of answers."""

    def __init__(self, compiled: Any, vocab_size: int) -> None:
        self._compiled, self._vocab_size = compiled, vocab_size
        self.num_bytes: int = compiled.memory_size_bytes

    def begin(self) -> Progress:
        """A new answer in this form."""
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self._compiled)
        return Progress(matcher, xgrammar.allocate_token_bitmask(1, self._vocab_size))


class Progress:
    """How far one answer is in its form."""

    def __init__(self, matcher: Any, bits: Any) -> None:
        self._matcher, self._bits = matcher, bits

    def allowed(self) -> Bits:
        """[ceil(V / 32)] int32: bit i % 32 of word i // 32 says whether token i may come next."""
        self._matcher.fill_next_token_bitmask(self._bits, 0)
        found: Bits = self._bits[0].numpy().copy()
        return found

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False if it does not fit, or the answer had ended."""
        return not self._matcher.is_terminated() and bool(self._matcher.accept_token(token_id))
