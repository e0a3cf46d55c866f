"""Which fields a request body may have."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from moe_lightning.engine.checks import shown
from moe_lightning.engine.request import MAX_LOGPROBS
from moe_lightning.errors import RequestError

# Sampling fields that go to SamplingParams under their own name, with the types JSON may give them.
NUMBER = (int, float)
SAMPLING: dict[str, tuple[type, ...]] = {
    "n": (int,),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": (int,),
    "min_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "seed": (int,),
    "stop": (str, list),
    "stop_token_ids": (list,),
    "ignore_eos": (bool,),
    "min_tokens": (int,),
    "prompt_logprobs": (int,),
    "skip_special_tokens": (bool,),
    "include_stop_str_in_output": (bool,),
}
_MAX_NAME = 80  # of a field: what is longer resembles none, and takes minutes to compare
IGNORED = frozenset({"user", "metadata", "store"})
# The form of an answer: OpenAI's field, vLLM's, and vLLM's older ones.
FORMS = frozenset(
    {
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    }
)
COMPLETION = frozenset({"model", "prompt", "max_tokens", "logprobs", "echo"}) | FORMS
CHAT = (
    frozenset({"model", "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"})
    | FORMS
)

# Fields of the API that are not supported, with the values that ask for nothing: some clients send those.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # says how tools are called; without tools it says nothing
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


def given_fields(body: Mapping[str, Any], own: frozenset[str]) -> dict[str, Any]:
    """The fields of `body` that say something: those that are null, ignored or neutral are left out.

    Raises:
        RequestError: a field is not known or asks for what is not supported.
    """
    given = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            if name not in IGNORED and not _is_known(name, own):
                raise _unknown(name, own)
        elif name in UNSUPPORTED:
            _require_neutral(name, value)
        elif name in own or name in SAMPLING:
            given[name] = value
        else:
            raise _unknown(name, own)
    return given


def exactly(body: Mapping[str, Any], names: frozenset[str], where: str = "") -> dict[str, Any]:
    """The fields of `body` that are not null, if it has no others than `names`; `where` goes before their names.

    Raises:
        RequestError: a field is not known; the message names it.
    """
    for name in body.keys() - names:
        raise _not_known(name, names, where)
    return {name: value for name, value in body.items() if value is not None}


def typed(name: str, value: Any, types: tuple[type, ...]) -> Any:
    """`value`, if it has one of the types; JSON's true is no number.

    Raises:
        RequestError: the value has another type.
    """
    if isinstance(value, types) and (bool in types or not isinstance(value, bool)):
        return value
    names = {int: "an integer", float: "a number", str: "a string", list: "a list", bool: "true or false"}
    wanted = " or ".join(names[t] for t in types if not (t is int and float in types))
    raise RequestError(f"{name}={shown(value)}: give {wanted}")


def num_logprobs(name: str, value: Any) -> int:
    """How many of the likeliest tokens to give, under a name that is not that of `SamplingParams`.

    Raises:
        RequestError: it is no such number.
    """
    count: int = typed(name, value, (int,))
    if not 0 <= count <= MAX_LOGPROBS:
        raise RequestError(f"{name}={shown(value)}: give an integer from 0 to {MAX_LOGPROBS}")
    return count


def _is_known(name: str, own: frozenset[str]) -> bool:
    return name in own or name in SAMPLING or name in UNSUPPORTED


def _require_neutral(name: str, value: Any) -> None:
    # Types are compared too: 1 == True.
    if any(type(value) is type(neutral) and value == neutral for neutral in UNSUPPORTED[name]):
        return
    raise RequestError(f"{name}={shown(value)} is not supported; remove the field")


def _unknown(name: str, own: frozenset[str]) -> RequestError:
    return _not_known(name, own | SAMPLING.keys())


def _not_known(name: str, known: frozenset[str], where: str = "") -> RequestError:
    close = get_close_matches(name[:_MAX_NAME], sorted(known), n=1)
    remedy = f"did you mean {close[0]!r}?" if close else "remove it"
    return RequestError(f"unknown field {shown(where + name)}; {remedy}")
