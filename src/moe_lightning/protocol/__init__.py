"""OpenAI's request and response bodies; no web framework, no torch."""

from __future__ import annotations

from moe_lightning.protocol.requests import (
    ChatCall,
    CompletionCall,
    parse_chat,
    parse_completion,
)
from moe_lightning.protocol.responses import chat_response, completion_response

__all__ = [
    "ChatCall",
    "CompletionCall",
    "chat_response",
    "completion_response",
    "parse_chat",
    "parse_completion",
]
