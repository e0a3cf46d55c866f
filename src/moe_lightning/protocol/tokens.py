"""Bodies of /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lightning.engine.checks import shown, text
from moe_lightning.engine.messages import checked_messages
from moe_lightning.errors import RequestError
from moe_lightning.protocol.fields import exactly, typed

TOKENIZE = frozenset(
    {"model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs"}
)
DETOKENIZE = frozenset({"model", "tokens"})


@dataclass(frozen=True)
class TokenizeCall:
    """A checked body of /tokenize: either a prompt or messages."""

    model: str | None
    prompt: str | None
    messages: tuple[dict[str, str], ...]
    add_special_tokens: bool
    add_generation_prompt: bool
    return_token_strs: bool


@dataclass(frozen=True)
class DetokenizeCall:
    """A checked body of /detokenize."""

    model: str | None
    tokens: tuple[int, ...]


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeCall:
    """The call that a body of /tokenize makes.

    Raises:
        RequestError: a field is missing, unknown or cannot be used; the message names it.
    """
    given = exactly(body, TOKENIZE)
    if ("prompt" in given) == ("messages" in given):
        raise RequestError("give either prompt or messages")

    def flag(name: str, default: bool) -> bool:
        return bool(typed(name, given.get(name, default), (bool,)))

    is_chat = "messages" in given
    return TokenizeCall(
        _model(given),
        None if is_chat else text("prompt", given["prompt"]),
        checked_messages(given["messages"]) if is_chat else (),
        # A chat template writes special tokens itself.
        flag("add_special_tokens", not is_chat),
        flag("add_generation_prompt", True),
        flag("return_token_strs", False),
    )


def parse_detokenize(body: Mapping[str, Any]) -> DetokenizeCall:
    """The call that a body of /detokenize makes.

    Raises:
        RequestError: a field is missing, unknown or cannot be used; the message names it.
    """
    given = exactly(body, DETOKENIZE)
    tokens = given.get("tokens")
    if not isinstance(tokens, list):
        raise RequestError(f"tokens={shown(tokens)}: give a list of token ids")
    for i, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise RequestError(f"tokens[{i}]={shown(token)}: a token id is an integer from 0")
    return DetokenizeCall(_model(given), tuple(tokens))


def _model(given: Mapping[str, Any]) -> str | None:
    return text("model", given["model"]) if "model" in given else None
