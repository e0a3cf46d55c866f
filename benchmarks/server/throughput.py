"""A server's throughput beside `run-batch`'s: same model, same lines, same process, in turns.

The model is loaded once. In turns the lines are answered by the job that `run-batch` runs, by a server to clients
that wait for whole answers, and by a server to clients that stream. The clients run in a process of their own;
where cores are few they take their share of what the engine could have.

    python benchmarks/server/throughput.py --model .cache/demo-model --json throughput.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from client import ask, stream

ROOT = Path(__file__).resolve().parents[2]
BATCH, WHOLE, STREAMS = "run-batch", "server, whole answers", "server, streams"


def requests(count: int, new_tokens: int) -> list[dict[str, Any]]:
    """Bodies with prompts of the demo, each with an answer of exactly so many tokens."""
    lines = (ROOT / "examples" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["body"] for line in lines]
    texts = [(body.get("prompt") or body["messages"][-1]["content"])[:64] for body in found]
    return [
        {"prompt": texts[i % len(texts)], "max_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
        for i in range(count)
    ]


def run_batch(llm: Any, bodies: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """Seconds of a job without the loading of the model, and its texts."""
    from moe_lightning.jobs import BatchJob, JobFiles

    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        source.write_text("".join(
            json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
            for i, body in enumerate(bodies)
        ))  # fmt: skip
        start = time.perf_counter()
        with BatchJob(JobFiles.at(source, target)) as job:
            job.run(lambda: llm, lambda status: None)
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in target.read_text().splitlines()]
    texts = {int(r["custom_id"]): r["response"]["body"]["choices"][0]["text"] for r in rows}
    return seconds, [texts[i] for i in range(len(bodies))]


def clients(port: int, kind: str) -> None:
    """The other process: bodies on stdin, seconds and texts on stdout."""
    bodies = json.load(sys.stdin)

    async def all_of_them() -> list[str]:
        call = ask if kind == WHOLE else stream
        return [answer.text for answer in await asyncio.gather(*(call(port, body) for body in bodies))]

    start = time.perf_counter()
    texts = asyncio.run(all_of_them())
    json.dump([time.perf_counter() - start, texts], sys.stdout)


class Served:
    """A server of a loaded model, on a thread of this process, for the time of a block."""

    def __init__(self, llm: Any) -> None:
        from moe_lightning.server.app import create_app
        from moe_lightning.server.run import Server

        ready = threading.Event()
        self._server = Server(create_app(llm), ready.set)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=lambda: self._server.run(sockets=[self._listening]))
        self._thread.start()
        ready.wait()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()


def served(llm: Any, bodies: list[dict[str, Any]], kind: str) -> tuple[float, list[str]]:
    """Seconds that the clients took, and their texts."""
    with Served(llm) as server:
        command = [sys.executable, __file__, "--clients", kind, "--port", str(server.port)]
        done = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, check=True)
    seconds, texts = json.loads(done.stdout)
    return seconds, texts


def measure(model: str, count: int, new_tokens: int, turns: int) -> dict[str, Any]:
    from moe_lightning import LLM

    llm, bodies = LLM(model, dtype="float32"), requests(count, new_tokens)
    run_batch(llm, bodies[:2])  # warm-up
    seconds: dict[str, list[float]] = {BATCH: [], WHOLE: [], STREAMS: []}
    texts: dict[str, list[str]] = {}
    for turn in range(turns):
        for kind, taken in seconds.items():
            took, texts[kind] = run_batch(llm, bodies) if kind == BATCH else served(llm, bodies, kind)
            taken.append(took)
            print(
                f"turn {turn}: {kind:22} {took:7.2f} s, {count * new_tokens / took:7.1f} tokens/s", flush=True
            )
    best = {kind: count * new_tokens / min(taken) for kind, taken in seconds.items()}
    return {
        "requests": count, "tokens_each": new_tokens, "cores": len(os.sched_getaffinity(0)),
        "seconds": seconds, "tokens_per_s": best,
        "median_share": {k: statistics.median(seconds[BATCH]) / statistics.median(t) for k, t in seconds.items()},
        "same_texts": all(found == texts[BATCH] for found in texts.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clients", choices=(WHOLE, STREAMS), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clients:
        clients(args.port, args.clients)
        return
    found = measure(args.model, args.requests, args.tokens, args.turns)
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
