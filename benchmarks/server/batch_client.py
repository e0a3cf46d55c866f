"""A client of files and batches that blocks."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

ENDED = {"completed", "failed", "expired", "cancelled"}
_BOUNDARY = "lines"


def call(port: int, path: str, data: bytes | None = None, kind: str = "application/json") -> bytes:
    """The body of a response."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as response:
        found: bytes = response.read()
    return found


def begin_batch(port: int, asked: list[dict[str, Any]]) -> str:
    """Send a file and begin its batch; the batch's id. The lines' ids are id-0, id-1 and so on."""
    lines = [
        json.dumps({"custom_id": f"id-{i}", "method": "POST", "url": "/v1/completions", "body": body})
        for i, body in enumerate(asked)
    ]
    form = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n'
        "Content-Type: application/jsonl\r\n\r\n" + "\n".join(lines) + f"\r\n--{_BOUNDARY}--\r\n"
    )
    kind = f"multipart/form-data; boundary={_BOUNDARY}"
    file = json.loads(call(port, "/v1/files", form.encode(), kind))
    order = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch: str = json.loads(call(port, "/v1/batches", json.dumps(order).encode()))["id"]
    return batch


def answers(port: int, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a completed batch's output."""
    content = call(port, f"/v1/files/{batch['output_file_id']}/content")
    return [json.loads(line) for line in content.splitlines()]
