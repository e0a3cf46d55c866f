"""A server's throughput beside `run-batch`'s: same model, same lines, same process, in turns.

The model is loaded once. In turns the lines are answered by the job that `run-batch` runs, by a server to clients
that wait for whole answers, by it to clients that stream, and by it as a batch. Each turn begins with another of
them. The clients run in a process of their own, on a core of their own if one is given; where cores are few they
take their share of what the engine could have. What other programs took of the cores is written down, too.

    taskset -c 0 python benchmarks/server/throughput.py --model .cache/demo-model --client-core 1 --json out.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batch_client import ENDED, answers, begin_batch, call
from client import ask, stream
from cores import Taken, taken

ROOT = Path(__file__).resolve().parents[2]
BATCH, WHOLE, STREAMS = "run-batch", "server, whole answers", "server, streams"
BATCHES = "server, /v1/batches"
POLL_S = 0.5  # each costs the server some milliseconds


def requests(count: int, new_tokens: int) -> list[dict[str, Any]]:
    """Bodies with prompts of the demo, each with an answer of exactly so many tokens."""
    lines = (ROOT / "examples" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["body"] for line in lines]
    texts = [(body.get("prompt") or body["messages"][-1]["content"])[:64] for body in found]
    return [
        {"prompt": texts[i % len(texts)], "max_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
        for i in range(count)
    ]


def run_batch(llm: Any, bodies: list[dict[str, Any]]) -> tuple[Taken, list[str]]:
    """What a job took without the loading of the model, and its texts."""
    from moe_lightning.jobs import BatchJob, JobFiles

    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        source.write_text("".join(
            json.dumps({"custom_id": f"id-{i}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
            for i, body in enumerate(bodies)
        ))  # fmt: skip
        with taken() as took, BatchJob(JobFiles.at(source, target)) as job:
            job.run(lambda: llm, lambda status: None)
        return took, texts_of([json.loads(line) for line in target.read_text().splitlines()])


def texts_of(rows: list[dict[str, Any]]) -> list[str]:
    """Texts of output lines, in the order of the bodies."""
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    return [texts[f"id-{i}"] for i in range(len(texts))]


def batch(port: int, bodies: list[dict[str, Any]]) -> list[str]:
    """Texts that /v1/batches gives."""
    batch_id = begin_batch(port, bodies)
    while (found := json.loads(call(port, f"/v1/batches/{batch_id}")))["status"] not in ENDED:
        time.sleep(POLL_S)
    assert found["status"] == "completed", found
    return texts_of(answers(port, found))


def clients(port: int, kind: str) -> None:
    """The other process: bodies on stdin, what it took and texts on stdout."""
    bodies = json.load(sys.stdin)

    async def all_of_them() -> list[str]:
        call = ask if kind == WHOLE else stream
        return [answer.text for answer in await asyncio.gather(*(call(port, body) for body in bodies))]

    with taken() as took:
        texts = batch(port, bodies) if kind == BATCHES else asyncio.run(all_of_them())
    json.dump([asdict(took), texts], sys.stdout)


class Served:
    """A server of a loaded model, on a thread of this process, for the time of a block."""

    def __init__(self, llm: Any, data_dir: Path) -> None:
        from moe_lightning.server.app import Settings, create_app
        from moe_lightning.server.run import Server

        ready = threading.Event()
        self._server = Server(create_app(llm, Settings(data_dir=data_dir)), ready.set)
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


def served(
    llm: Any, bodies: list[dict[str, Any]], kind: str, client_core: int | None
) -> tuple[Taken, list[str]]:
    """What the clients' answers took, the start of their process apart, and their texts."""
    command = [sys.executable, __file__, "--clients", kind]
    if client_core is not None:
        command = ["taskset", "-c", str(client_core), *command]
    with tempfile.TemporaryDirectory() as directory, Served(llm, Path(directory)) as server:
        command += ["--port", str(server.port)]
        with taken() as own:
            done = subprocess.run(
                command, input=json.dumps(bodies), capture_output=True, text=True, check=True
            )
    client, texts = json.loads(done.stdout)
    # Of the time between the client's first request and its last answer; before it, the server does nothing. To
    # the client the server is one of the others, if both share their cores.
    others = client["others"] - own.own if client_core is None else math.nan
    took = Taken(client["seconds"], own.own, client["own"], others)
    return took, texts


def undisturbed(
    llm: Any,
    bodies: list[dict[str, Any]],
    kind: str,
    args: argparse.Namespace,
    passes_since: Callable[[], int],
) -> tuple[Taken, list[str]]:
    """A measurement during which others took less of the cores than is allowed; tried until there is one."""
    while True:
        while True:  # wait for quiet
            with taken() as silence:
                time.sleep(1)
            if silence.others <= args.others:
                break
        passes_since()
        one, texts = run_batch(llm, bodies) if kind == BATCH else served(llm, bodies, kind, args.client_core)
        if not one.others > args.others * one.seconds:  # nan: not known
            return one, texts
        print(f"  once more, disturbed: {kind} {one}", flush=True)


def count_passes(engine: Any) -> Callable[[], int]:
    """A function that gives the passes since it was last asked."""
    step, counted = engine.step, [0]

    def counting() -> Any:
        counted[0] += 1
        return step()

    def passes() -> int:
        found, counted[0] = counted[0], 0
        return found

    engine.step = counting
    return passes


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from moe_lightning import LLM
    from moe_lightning.bench.machine import facts
    from moe_lightning.engine.garbage import collect_rarely

    found = facts()
    llm, bodies = LLM(args.model, dtype="float32"), requests(args.requests, args.tokens)
    run_batch(llm, bodies[:2])  # warm-up
    served(llm, bodies[:2], BATCHES, args.client_core)
    collect_rarely()  # as both commands do
    kinds = [BATCH, WHOLE, STREAMS, BATCHES]
    passes_since, passes = count_passes(llm.engine), {kind: list[int]() for kind in kinds}
    took: dict[str, list[Taken]] = {kind: [] for kind in kinds}
    texts: dict[str, list[str]] = {}
    for turn in range(args.turns):
        for kind in kinds[turn % 4 :] + kinds[: turn % 4]:
            one, texts[kind] = undisturbed(llm, bodies, kind, args, passes_since)
            took[kind].append(one)
            passes[kind].append(passes_since())
            print(f"turn {turn}: {kind:22} {passes[kind][-1]} passes, {one}", flush=True)
    return found | {
        "model": Path(args.model).name, "requests": args.requests, "tokens_each": args.tokens,
        "client_core": args.client_core, "others_share": args.others if args.others < 9 else None,
        "turns": {kind: [asdict(one) for one in several] for kind, several in took.items()},
        "passes": passes,
        "same_texts": all(found == texts[BATCH] for found in texts.values()),
        **summary(took, args.requests * args.tokens),
    }  # fmt: skip


def summary(took: dict[str, list[Taken]], tokens: int) -> dict[str, Any]:
    """Medians; shares are run-batch's seconds of a turn by the other's of the same turn.

    Without others: less the seconds that other programs had the cores. On one core that is what a measurement would
    have taken alone, but for times in which it waited for something itself and others worked.
    """

    def shares(seconds: Callable[[Taken], float]) -> dict[str, Any]:
        pairs = {kind: zip(took[BATCH], several, strict=True) for kind, several in took.items()}
        found = {kind: [seconds(base) / seconds(one) for base, one in pair] for kind, pair in pairs.items()}
        return {
            k: {"median": statistics.median(s), "least": min(s), "most": max(s)} for k, s in found.items()
        }

    return {
        "tokens_per_s": {k: tokens / statistics.median(t.seconds for t in took[k]) for k in took},
        "shares": shares(lambda one: one.seconds),
        "shares_without_others": shares(lambda one: one.seconds - one.others),
        "shares_of_own_cpu": shares(lambda one: one.own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument(
        "--client-core", type=int, help="for the clients alone; default: those of this process"
    )
    parser.add_argument(
        "--others", type=float, default=math.inf,
        help="share of a core that other programs may take in a measurement; it is repeated if they take more",
    )  # fmt: skip
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clients", choices=(WHOLE, STREAMS, BATCHES), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clients:
        clients(args.port, args.clients)
        return
    found = measure(args)
    print(
        json.dumps(
            {
                key: found[key]
                for key in ("same_texts", "passes", "tokens_per_s", "shares", "shares_without_others")
            },
            indent=2,
        )
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
