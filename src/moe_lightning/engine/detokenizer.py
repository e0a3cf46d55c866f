"""Text of a growing token sequence."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character (yet)


class Detokenizer:
    """Text of one sequence, token by token; a character is held back until its last byte is there.

    `text` only grows, with one exception that the decoder forces: byte-fallback tokenizers turn a whole run
    of byte tokens into replacement characters when any of it is invalid, characters that were already shown
    included. Then `text` is decoded anew once the run is over.

    Clean-up of spaces (`clean_up_tokenization_spaces`) is never done: it deletes what the model wrote.

    Args:
        tokenizer: of transformers; fast ones are decoded as a stream, others in full at each token.
        skip_special_tokens: leave special tokens out of the text.

    Tokens become text when somebody reads it: most answers are read once, at their end.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._text = ""
        self._num_new_chars = 0
        self._token_ids: list[int] = []
        self._pending: list[int] = []
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    @property
    def text(self) -> str:
        """The complete characters so far."""
        self._catch_up()
        return self._text

    @property
    def num_new_chars(self) -> int:
        """How many characters at the end of `text` the last `append` added or changed."""
        self._catch_up()
        return self._num_new_chars

    def append(self, token_id: int) -> None:
        """Add one token."""
        self._pending.append(token_id)

    def finish(self) -> str:
        """The final text: the tokenizer's own decoding of all tokens, unfinished characters included."""
        self._token_ids += self._pending
        self._pending.clear()
        self._replace_text(self._decode())
        return self._text

    def _catch_up(self) -> None:
        for token_id in self._pending:
            self._decode_next(token_id)
        self._pending.clear()

    def _decode_next(self, token_id: int) -> None:
        self._token_ids.append(token_id)
        if self._backend is None:
            self._decode_anew()
            return
        try:
            piece = self._stream.step(self._backend, token_id) or ""
        except Exception as error:  # tokenizers raises Exception itself; only the message tells which
            if not str(error).startswith("Invalid prefix"):
                raise
            self._decode_anew()
            self._stream = DecodeStream(self._token_ids, self._skip_special_tokens)
        else:
            self._text += piece
            self._num_new_chars = len(piece)

    def _decode_anew(self) -> None:
        text = self._decode()
        # The last token may have left a character open; what precedes it is shown with the next complete one.
        self._replace_text(self._text if text.endswith(_REPLACEMENT) else text)

    def _replace_text(self, text: str) -> None:
        self._num_new_chars = len(text) - _common_length(self._text, text)
        self._text = text

    def _decode(self) -> str:
        if self._backend is not None:
            text = self._backend.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        else:
            text = self._tokenizer.decode(
                self._token_ids,
                skip_special_tokens=self._skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        return str(text)


def _common_length(a: str, b: str) -> int:
    """Characters at the start that both have."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
