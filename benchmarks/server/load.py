"""Many streams at a time for minutes: none is lost, none gets another's text, memory does not grow.

Every tenth client reads slowly, every tenth goes after some events; each of the others checks its text against what
`LLM.generate` gave for the same body before the server began. A client asks again as soon as it has its answer.

    python benchmarks/server/load.py --model .cache/demo-model --json benchmarks/results/server_load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from client import Answer, stream
from process import ServerProcess, serving

TOPICS = ("rivers", "bread", "the moon", "glass", "horses", "salt", "windmills", "maps", "bees", "trains")
FORMS = (
    "A short text about {}:",
    "Write about {} and",
    "Why {} matter:",
    "The history of {} began",
    "In praise of {}.",
)
SLOW, GOES, STAYS = "slow", "goes", "stays"
SAMPLE_S = 5.0


@dataclass
class Log:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, bytes, clients that wait
    wrong: list[tuple[int, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    waiting: int = 0
    most: int = 0


def bodies() -> list[dict[str, Any]]:
    """Bodies with answers of their own: half of them greedy, half of them drawn."""
    rng = random.Random(6)
    return [
        {
            "prompt": form.format(topic),
            "max_tokens": rng.randrange(4, 17),
            "temperature": (0, 0.8)[i % 2],
            "seed": i,
            "ignore_eos": True,
        }
        for i, (topic, form) in enumerate((t, f) for t in TOPICS for f in FORMS)
    ]


def references(model: str, asked: list[dict[str, Any]]) -> list[Answer]:
    """What each body gets without a server."""
    from moe_lightning import LLM, SamplingParams

    llm = LLM(model, dtype="float32")
    names = ("max_tokens", "temperature", "seed", "ignore_eos")
    params = [SamplingParams(**{name: body[name] for name in names}) for body in asked]
    outputs = llm.generate([body["prompt"] for body in asked], params, use_tqdm=False)
    return [
        Answer(o.outputs[0].text, len(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs
    ]


def role_of(client: int) -> str:
    """How a client behaves."""
    return {0: SLOW, 5: GOES}.get(client % 10, STAYS)


async def client(
    number: int, port: int, asked: list[dict[str, Any]], expected: list[Answer], until: float, log: Log
) -> None:
    """Ask until the time is over."""
    role, rng = role_of(number), random.Random(number)
    for turn in count():
        if time.monotonic() >= until:
            return
        which = (number + 17 * turn) % len(asked)
        log.waiting += 1
        log.most = max(log.most, log.waiting)
        start = time.monotonic()
        try:
            answer = await stream(
                port,
                asked[which],
                0.3 if role == SLOW else 0.0,
                rng.randrange(1, 4) if role == GOES else None,
            )
        except OSError as error:
            log.lost.append(f"client {number}: {error}")
            await asyncio.sleep(1)
            continue
        finally:
            log.waiting -= 1
        log.counts[role] += 1
        if answer.finish_reason is None:  # it went
            is_right = expected[which].text.startswith(answer.text)
        else:
            is_right = answer == expected[which]
            log.counts["tokens"] += answer.num_tokens or 0
            log.seconds.append(time.monotonic() - start)
        if not is_right:
            log.wrong.append((which, answer.text))


async def watch(server: ServerProcess, log: Log) -> None:
    """Take down memory every few seconds."""
    start = time.monotonic()
    while True:
        log.memory.append((time.monotonic() - start, server.resident_bytes, log.waiting))
        await asyncio.sleep(SAMPLE_S)


async def drive(
    server: ServerProcess,
    connections: int,
    seconds: float,
    asked: list[dict[str, Any]],
    expected: list[Answer],
) -> Log:
    log, until = Log(), time.monotonic() + seconds
    watching = asyncio.create_task(watch(server, log))
    await asyncio.gather(*(client(i, server.port, asked, expected, until, log) for i in range(connections)))
    await asyncio.sleep(2)  # those that went leave the engine
    log.memory.append((time.monotonic() - until + seconds, server.resident_bytes, log.waiting))
    watching.cancel()
    return log


def summary(log: Log, connections: int, seconds: float) -> dict[str, Any]:
    """What the run showed."""
    loaded = [size for at, size, waiting in log.memory if waiting >= connections * 0.9]
    third = max(1, len(loaded) // 3)
    early, late = (statistics.median(part) if part else 0 for part in (loaded[:third], loaded[-third:]))
    return {
        "connections": connections,
        "most_at_a_time": log.most,
        "seconds": seconds,
        "answers": dict(log.counts),
        "lost": len(log.lost),
        "wrong": len(log.wrong),
        "tokens_per_s": log.counts["tokens"] / log.memory[-1][0],
        "median_answer_s": statistics.median(log.seconds) if log.seconds else None,
        "memory_early_mib": early / 2**20,
        "memory_late_mib": late / 2**20,
        "memory_end_mib": log.memory[-1][1] / 2**20,
        "memory_mib": [[round(at), round(size / 2**20, 1), waiting] for at, size, waiting in log.memory],
    }


def main() -> int:
    from moe_lightning.bench.machine import facts

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--max-num-seqs", default="256")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asked = bodies()
    expected = references(str(args.model), asked)
    print(f"{len(asked)} bodies, {len({a.text for a in expected})} different answers", flush=True)
    with serving(args.model, "--dtype", "float32", "--max-num-seqs", args.max_num_seqs) as server:
        log = asyncio.run(drive(server, args.connections, args.seconds, asked, expected))
    about = facts() | {"model": args.model.name, "max_num_seqs": int(args.max_num_seqs)}
    found = about | summary(log, args.connections, args.seconds)
    print(json.dumps(found, indent=2))
    for line in (*log.lost[:5], *(f"body {which}: {text!r} instead of {expected[which].text!r}"
                                  for which, text in log.wrong[:5])):  # fmt: skip
        print(line)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if log.lost or log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
