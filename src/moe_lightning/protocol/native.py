"""Bodies of /generate: SGLang's native form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lightning.engine.checks import shown, text
from moe_lightning.engine.request import CompletionOutput, Logprobs, RequestOutput, SamplingParams
from moe_lightning.errors import RequestError
from moe_lightning.protocol.fields import SAMPLING, exactly, num_logprobs, typed
from moe_lightning.protocol.requests import Prompt, prompts_of, sampling_of
from moe_lightning.protocol.responses import Decode

FIELDS = frozenset(
    {"text", "input_ids", "sampling_params", "rid", "stream", "return_logprob", "top_logprobs_num",
     "logprob_start_len", "return_text_in_logprobs"}
)  # fmt: skip
# SGLang's names of sampling fields where they are not ours.
_RENAMED = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output",
}
_SAME = SAMPLING.keys() - {"prompt_logprobs", "min_tokens", "seed", "include_stop_str_in_output"}
PARAMS = frozenset({*_RENAMED, *_SAME})
_MAX_NEW_TOKENS = 128  # SGLang's default


@dataclass(frozen=True)
class NativeCall:
    """A checked body of /generate; `is_list` says that the answer is a list too."""

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    is_list: bool = False
    is_stream: bool = False
    rid: str | None = None
    wants_text: bool = False  # of tokens, beside their log-probabilities
    model: str | None = None


def parse_generate(body: Mapping[str, Any]) -> NativeCall:
    """The call that a body of /generate makes.

    Raises:
        RequestError: a field is missing, unknown, not supported or out of range; the message names it.
    """
    given = exactly(body, FIELDS)
    if ("text" in given) == ("input_ids" in given):
        raise RequestError("give either text or input_ids")
    name = "text" if "text" in given else "input_ids"
    prompts, is_list = given[name], _is_list(given[name])
    if name == "input_ids" and isinstance(prompts, str):
        raise RequestError(f"input_ids={shown(prompts)}: give a list of token ids")
    return NativeCall(
        prompts_of(name, prompts),
        SamplingParams(**_sampling(given)),
        is_list,
        bool(typed("stream", given.get("stream", False), (bool,))),
        text("rid", given["rid"]) if "rid" in given else None,
        bool(typed("return_text_in_logprobs", given.get("return_text_in_logprobs", False), (bool,))),
    )


def _is_list(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    params = given.get("sampling_params", {})
    if not isinstance(params, dict):
        raise RequestError(f"sampling_params={shown(params)}: give one object for all prompts")
    own = exactly(params, PARAMS, "sampling_params.")
    sampling = sampling_of({_RENAMED.get(name, name): value for name, value in own.items()})
    limit = own.get("max_new_tokens", _MAX_NEW_TOKENS)
    sampling["max_tokens"] = typed("sampling_params.max_new_tokens", limit, (int,))
    top = num_logprobs("top_logprobs_num", given.get("top_logprobs_num", 0))
    start = typed("logprob_start_len", given.get("logprob_start_len", -1), (int,))
    if not typed("return_logprob", given.get("return_logprob", False), (bool,)):
        return sampling
    if start not in (-1, 0):
        raise RequestError(
            f"logprob_start_len={start} is not supported; give 0 for the prompt's, -1 for none of them"
        )
    sampling["logprobs"] = top
    if start == 0:
        sampling["prompt_logprobs"] = top
    return sampling


def native_answers(
    call: NativeCall, output: RequestOutput, rid: str, seconds: float, decode: Decode
) -> list[dict[str, Any]]:
    """An object for each of the n answers to one prompt; `seconds` is what they took."""
    return [
        {
            "text": answer.text,
            "output_ids": list(answer.token_ids),
            "meta_info": native_meta(call, output, answer, rid, decode) | {"e2e_latency": seconds},
        }
        for answer in output.outputs
    ]


def native_meta(
    call: NativeCall, output: RequestOutput, answer: CompletionOutput, rid: str, decode: Decode
) -> dict[str, Any]:
    """What an answer says of itself; while it is not finished too."""
    meta: dict[str, Any] = {
        "id": rid,
        "finish_reason": _reason(answer),
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
        "cached_tokens": 0,
    }
    decode_one = decode if call.wants_text else None
    if call.params.logprobs is not None:
        entries = list(answer.logprobs or [])
        meta |= _logprobs("output", answer.token_ids, entries, call.params.logprobs, decode_one)
    if call.params.prompt_logprobs is not None:
        scored = output.prompt_logprobs or []
        meta |= _logprobs("input", output.prompt_token_ids, scored, call.params.prompt_logprobs, decode_one)
    return meta


def _reason(answer: CompletionOutput) -> dict[str, Any] | None:
    if answer.finish_reason is None:
        return None
    if answer.finish_reason == "length":
        return {"type": "length", "length": len(answer.token_ids)}
    # The token or string that stopped it; of the model's own end the last token.
    last = answer.token_ids[-1] if answer.token_ids else None
    return {"type": "stop", "matched": last if answer.stop_reason is None else answer.stop_reason}


def _logprobs(
    name: str, tokens: Sequence[int], entries: Sequence[Logprobs | None], top: int, decode: Decode | None
) -> dict[str, Any]:
    """Lists of [log-probability, token id, text or null], as SGLang writes them."""

    def triple(token: int, logprob: float | None) -> list[Any]:
        return [logprob, token, decode([token]) if decode else None]

    pairs = list(zip(tokens, entries, strict=False))
    found: dict[str, Any] = {
        f"{name}_token_logprobs": [triple(t, e[t].logprob if e else None) for t, e in pairs]
    }
    if top:
        found[f"{name}_top_logprobs"] = [
            [triple(t, p.logprob) for t, p in sorted(e.items(), key=lambda i: i[1].rank) if p.rank <= top]
            if e
            else None
            for _, e in pairs
        ]
    return found
