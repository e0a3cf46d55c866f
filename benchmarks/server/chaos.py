"""A server that is killed at random moments during two batches and while clients wait for answers.

The moments are spread over the work, not over time: each comes when a random share of it is done, so that every
kill hits a server that has something to do. After each SIGKILL the server is started again on the same directory;
clients whose connection broke ask again. In between it is also stopped and continued. At the end each line of the
batches must be answered once, with what `LLM.generate` gives.

    python benchmarks/server/chaos.py --model .cache/demo-model --kills 20 --json benchmarks/results/chaos_demo.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batch_client import ENDED, answers, begin_batch, call
from client import Answer, ask
from process import ServerProcess, start

from moe_lightning.bench.machine import facts

POLL_S = 0.2
LAST_SHARE = 0.95  # of the lines, after which there is no kill
LONGEST_S = 2.0  # from a share of the work to its kill: some passes


def bodies(count: int, seed: int, tokens: int) -> list[dict[str, Any]]:
    """Bodies with texts and lengths of their own, around so many tokens; half of them are drawn with a seed."""
    rng = random.Random(seed)
    words = ("river", "bread", "moon", "glass", "horse", "salt", "mill", "map", "bee", "train")
    return [
        {
            "prompt": f"A {words[i % 10]} and a {words[rng.randrange(10)]},",
            "max_tokens": rng.randrange(tokens // 2, tokens * 3 // 2), "temperature": (0, 0.8)[i % 2],
            "seed": i + 1000 * seed, "ignore_eos": True,
        }
        for i in range(count)
    ]  # fmt: skip


def expected(model: str, asked: list[dict[str, Any]]) -> list[Answer]:
    """What each body gets without a server."""
    from moe_lightning import LLM, SamplingParams

    names = ("max_tokens", "temperature", "seed", "ignore_eos")
    params = [SamplingParams(**{name: body[name] for name in names}) for body in asked]
    outputs = LLM(model, dtype="float32").generate([b["prompt"] for b in asked], params, use_tqdm=False)
    return [
        Answer(o.outputs[0].text, len(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs
    ]


@dataclass(frozen=True)
class Kill:
    """What a kill hit: how long it had lived, lines that were not answered yet, and clients that waited."""

    lived_s: float
    lines_left: int
    clients_waiting: int


class Chaos:
    """The server of the moment, and what happened to it."""

    def __init__(self, model: Path, data: Path, flags: list[str], rng: random.Random) -> None:
        self._model, self._flags, self._rng = model, ["--data-dir", str(data), *flags], rng
        self.counts: Counter[str] = Counter()
        self.kills: list[Kill] = []
        self.clients_waiting = self.lines_done = 0
        self.server: ServerProcess = start(model, *self._flags)

    async def torment(self, kills: int, ids: list[str], lines: int) -> None:
        """Kill the server so many times; every third time stop it for a while first."""
        for kill in range(kills):
            born = time.monotonic()
            await self.until(ids, LAST_SHARE * lines * (kill + self._rng.random()) / kills)
            await asyncio.sleep(self._rng.uniform(0, LONGEST_S))
            if kill % 3 == 2:
                os.kill(self.server.process.pid, signal.SIGSTOP)
                await asyncio.sleep(self._rng.uniform(0.1, 2))
                os.kill(self.server.process.pid, signal.SIGCONT)
                self.counts["stops"] += 1
            await self.until(ids, 0)
            lived = round(time.monotonic() - born, 1)
            self.kills.append(Kill(lived, lines - self.lines_done, self.clients_waiting))
            self.server.process.kill()
            await asyncio.to_thread(self.server.process.wait)
            print(f"kill {kill}: {self.kills[-1]}", flush=True)
            self.server = await asyncio.to_thread(start, self._model, *self._flags)
        await self.until(ids, lines)

    async def until(self, ids: list[str], lines: float) -> None:
        """Wait until so many lines of the batches are done."""
        while True:
            found = [
                json.loads(await asyncio.to_thread(call, self.server.port, f"/v1/batches/{i}")) for i in ids
            ]
            self.lines_done = sum(batch["request_counts"]["completed"] for batch in found)
            if self.lines_done >= lines or all(batch["status"] in ENDED for batch in found):
                return
            await asyncio.sleep(POLL_S)

    async def answer(self, body: dict[str, Any], lines: float) -> Answer:
        """An answer, asked for once so many lines are done, and as often as the client has to."""
        while self.lines_done < lines:
            await asyncio.sleep(POLL_S)
        self.clients_waiting += 1
        try:
            while True:
                try:
                    return await ask(self.server.port, body)
                except (OSError, ValueError):
                    self.counts["asked again"] += 1
                    await asyncio.sleep(POLL_S)
        finally:
            self.clients_waiting -= 1

    async def ended(self, batch_id: str, seconds: float) -> dict[str, Any]:
        """A batch that has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            batch: dict[str, Any] = json.loads(
                await asyncio.to_thread(call, self.server.port, f"/v1/batches/{batch_id}")
            )
            if batch["status"] in ENDED:
                return batch
            await asyncio.sleep(POLL_S)
        raise TimeoutError(f"{batch_id} did not end within {seconds:g} s")

    def end(self) -> None:
        """Kill the last server."""
        self.server.process.kill()
        self.server.process.wait()


def judge(port: int, batch: dict[str, Any], wanted: list[Answer]) -> list[str]:
    """What is wrong with a batch."""
    if batch["status"] != "completed" or batch["error_file_id"]:
        return [f"{batch['id']}: {batch['status']}, errors {batch['errors']} {batch['error_file_id']}"]
    rows = answers(port, batch)
    times = Counter(row["custom_id"] for row in rows)
    found = [f"{name} was answered {count} times" for name, count in times.items() if count != 1]
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    found += [f"id-{i} was lost" for i in range(len(wanted)) if f"id-{i}" not in texts]
    found += [
        f"id-{i}: {texts[f'id-{i}']!r} instead of {want.text!r}"
        for i, want in enumerate(wanted) if texts.get(f"id-{i}", want.text) != want.text
    ]  # fmt: skip
    return found


async def run(args: argparse.Namespace, data: Path) -> tuple[list[str], Chaos]:
    """What is wrong at the end, and what happened until then."""
    n, total = args.lines, 2 * args.lines
    batches, waiting = (
        [bodies(n, seed, args.tokens) for seed in (1, 2)],
        bodies(args.requests, 3, args.tokens),
    )
    wanted = await asyncio.to_thread(expected, str(args.model), [*batches[0], *batches[1], *waiting])
    chaos = Chaos(args.model, data, ["--dtype", "float32", "--max-num-seqs", "16"], random.Random(args.seed))
    try:
        ids = [begin_batch(chaos.server.port, lines) for lines in batches]
        *answers, _ = await asyncio.gather(
            *(chaos.answer(b, LAST_SHARE * total * i / args.requests) for i, b in enumerate(waiting)),
            chaos.torment(args.kills, ids, total),
        )
        ended = [await chaos.ended(batch_id, 600) for batch_id in ids]
        problems = [p for i, batch in enumerate(ended)
                    for p in judge(chaos.server.port, batch, wanted[i * n : (i + 1) * n])]  # fmt: skip
        problems += [f"{a} instead of {w}" for a, w in zip(answers, wanted[total:], strict=True) if a != w]
        problems += [
            f"kill {i} hit a server without work" for i, k in enumerate(chaos.kills) if not k.lines_left
        ]
        return problems, chaos
    finally:
        chaos.end()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, default=100, help="of each batch")
    parser.add_argument("--requests", type=int, default=50, help="that clients wait for")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    start_time, about = time.monotonic(), facts()
    with tempfile.TemporaryDirectory() as directory:
        problems, chaos = asyncio.run(run(args, Path(directory)))
    result = about | {
        "model": args.model.name, "seed": args.seed, "batches": 2, "lines_of_each": args.lines,
        "requests": args.requests, "tokens_of_each": args.tokens, **chaos.counts,
        "seconds": round(time.monotonic() - start_time, 1), "kills": [asdict(kill) for kill in chaos.kills],
        "problems": problems,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(len(chaos.kills), "kills;", dict(chaos.counts))
    print(
        "\n".join(problems)
        or f"all {2 * args.lines} lines and {args.requests} requests are as computed alone"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
