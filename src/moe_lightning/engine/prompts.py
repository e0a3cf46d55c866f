"""From what a user gives as prompts to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from moe_lightning.engine.checks import shown, text
from moe_lightning.engine.messages import checked_messages
from moe_lightning.engine.request import SamplingParams
from moe_lightning.errors import RequestError

Prompt = str | Sequence[int] | dict[str, Any]
Tokens = tuple[tuple[int, ...], str | None]  # ids, and the text they are of where it is known
_KEYS = ("prompt_token_ids", "prompt")


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or several as a list, not checked yet: `tokenize` says of each what is wrong with it."""
    if isinstance(prompts, np.ndarray):
        return list(prompts) if prompts.ndim > 1 else [prompts]
    if isinstance(prompts, str | bytes | dict) or not hasattr(prompts, "__iter__"):
        return [prompts]
    several = list(prompts)
    return [several] if several and isinstance(several[0], Integral) else several


def as_conversations(messages: Any) -> list[Any]:
    """One conversation or several as a list, not checked yet: `render` says of each what is wrong with it."""
    if not isinstance(messages, list | tuple):
        return [messages]
    is_one = bool(messages) and not isinstance(messages[0], list | tuple)
    return [messages] if is_one else list(messages)


def params_of_each(params: Any, count: int) -> list[SamplingParams]:
    """The parameters of each of `count` prompts.

    Raises:
        RequestError: there are more or fewer, or one is none.
    """
    several = list(params) if isinstance(params, list | tuple) else [params] * count
    if len(several) != count:
        raise RequestError(
            f"{len(several)} sampling_params for {count} prompts; give one for all or one each"
        )
    return [_params(one) for one in several]


def _params(params: Any) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise RequestError(
            f"sampling_params={shown(params)}: give a SamplingParams, or a list of one for each"
        )
    return params


def tokenize(tokenizer: Any, prompt: Any) -> Tokens:
    """A prompt's token ids, and its text where it has one.

    Args:
        tokenizer: of the model.
        prompt: text, token ids, or a dict of either; with both in a dict the ids are run.

    Raises:
        RequestError: it is none of these, or holds something that would be left out.
    """
    if isinstance(prompt, str):
        return tuple(tokenizer(text("prompt", prompt))["input_ids"]), prompt
    if not isinstance(prompt, dict):
        return _token_ids(prompt), None
    given = {key: value for key, value in prompt.items() if value is not None}
    if not given.keys() & set(_KEYS):
        raise RequestError(f"a prompt has keys {sorted(map(str, prompt))}; give {' or '.join(_KEYS)}")
    for key in given.keys() - set(_KEYS):
        raise RequestError(f"{shown(key)} in a prompt is not supported; remove it")
    if "prompt_token_ids" not in given:
        return tokenize(tokenizer, text("prompt", given["prompt"]))
    shown_text = text("prompt", given["prompt"]) if "prompt" in given else None
    return _token_ids(given["prompt_token_ids"]), shown_text


def _token_ids(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size):
        return tuple(ids.tolist())
    if not isinstance(ids, list | tuple):
        raise RequestError(
            f"{shown(ids)} is no prompt; give text, or a list or a one-dimensional integer array of token ids"
        )
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(f"{shown(token)} is no token id; give integers")
    return tuple(int(token) for token in ids)


def render(tokenizer: Any, messages: Any, *, add_generation_prompt: bool = True) -> Tokens:
    """A conversation's token ids and text, through the model's chat template.

    `add_generation_prompt` lets an answer begin at its end.

    Raises:
        RequestError: the model has no template, or the conversation does not fit it.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("the model's tokenizer has no chat template; send a plain prompt instead")
    checked = [dict(message) for message in checked_messages(messages)]
    try:
        rendered = tokenizer.apply_chat_template(
            checked, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:  # a template raises whatever its author wrote
        raise RequestError(f"the chat template refuses these messages: {str(error)[:300]}") from error
    return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"]), rendered


def check_tokens(ids: Sequence[int], vocab_size: int, max_model_len: int, params: SamplingParams) -> None:
    """Make sure that the model can run a prompt.

    Raises:
        RequestError: it is empty, too long, or has ids that are no tokens.
    """
    longest = max_model_len - (0 if params.max_tokens == 0 else 1)
    if not ids:
        raise RequestError("the prompt is empty; a model needs at least one token")
    if len(ids) > longest:
        raise RequestError(
            f"the prompt has {len(ids)} tokens; {longest} fit into max_model_len={max_model_len} "
            "with room for an answer. Shorten it or raise max_model_len"
        )
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{token} is no token id; they run from 0 to {vocab_size - 1}")
