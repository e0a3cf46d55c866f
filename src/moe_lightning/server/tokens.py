"""Endpoints that turn text into tokens and back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from moe_lightning.engine.prompts import render
from moe_lightning.errors import RequestError
from moe_lightning.protocol.tokens import parse_detokenize, parse_tokenize
from moe_lightning.server import schemas
from moe_lightning.server.responses import JsonResponse
from moe_lightning.server.service import Service

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokens_router(service: Service) -> APIRouter:
    """Tokenize, detokenize, and what the tokenizer is."""
    router = APIRouter(tags=["Tokens"])
    tokenizer = service.llm.tokenizer

    def tokenized(body: dict[str, Any]) -> dict[str, Any]:
        call = parse_tokenize(body)
        service.check_model(call.model)
        if call.prompt is not None:
            ids = tokenizer(call.prompt, add_special_tokens=call.add_special_tokens)["input_ids"]
        else:
            ids, text = render(tokenizer, call.messages, add_generation_prompt=call.add_generation_prompt)
            if call.add_special_tokens:
                ids = tokenizer(text)["input_ids"]
        strings = tokenizer.convert_ids_to_tokens(list(ids)) if call.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": service.llm.max_model_len,
            "tokens": list(ids),
            "token_strs": strings,
        }

    def detokenized(body: dict[str, Any]) -> dict[str, Any]:
        call = parse_detokenize(body)
        service.check_model(call.model)
        for token in call.tokens:
            if token >= service.llm.spec.vocab_size:
                last = service.llm.spec.vocab_size - 1
                raise RequestError(f"{token} in tokens is no token id; they run from 0 to {last}")
        return {"prompt": service.decode(call.tokens)}

    @router.post("/tokenize", **schemas.operation("tokenize", service.names, service.llm.spec.vocab_size))
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or a conversation."""
        return JsonResponse(await service.parsed(request, tokenized))

    @router.post("/detokenize", **schemas.operation("detokenize", service.names, service.llm.spec.vocab_size))
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        return JsonResponse(await service.parsed(request, detokenized))

    @router.get("/tokenizer_info", **schemas.operation("tokenizer_info"))
    async def tokenizer_info() -> Response:
        """Special tokens and the chat template."""
        special = {name: _text(getattr(tokenizer, name, None)) for name in _SPECIAL}
        return JsonResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": len(tokenizer),
                "model_max_length": service.llm.max_model_len,
                **special,
                "chat_template": getattr(tokenizer, "chat_template", None),
            }
        )

    return router


def _text(token: Any) -> str | None:
    return None if token is None else str(token)
