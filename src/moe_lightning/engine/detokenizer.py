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

    Attributes:
        text: the complete characters so far.
        num_new_chars: how many characters at the end of `text` the last `append` added or changed.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self.text = ""
        self.num_new_chars = 0
        self._token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def append(self, token_id: int) -> None:
        """Add one token's text."""
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
            self.text += piece
            self.num_new_chars = len(piece)

    def finish(self) -> str:
        """The final text: the tokenizer's own decoding of all tokens, unfinished characters included."""
        self._replace_text(self._decode())
        return self.text

    def _decode_anew(self) -> None:
        text = self._decode()
        # The last token may have left a character open; what precedes it is shown with the next complete one.
        self._replace_text(self.text if text.endswith(_REPLACEMENT) else text)

    def _replace_text(self, text: str) -> None:
        self.num_new_chars = len(text) - _common_length(self.text, text)
        self.text = text

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
