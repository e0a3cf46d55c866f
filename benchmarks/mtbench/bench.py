"""Throughput of a running server with prompts like MTBench's, as the paper's artifact measures it.

`--ubs` times `--n-ub` prompts are sent to the server's /generate, `--ubs` in one request, all requests at once; the
server groups them as it likes.

    python -m moe_lightning.launch_server --model-path mixtral --port 30000 --cpu-mem-bdw 76 --avg-prompt-len 77 \
        --gen-len 32
    python benchmarks/mtbench/bench.py --port 30000 --max-new-tokens 32 --ubs 324 --n-ub 14
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_WORDS = """
the a of to and in is that it for as with was on are by this be from or have an they which one you were all how why
what when explain compare describe write list model market river engine theorem recipe letter story function city
planet history argument budget light signal garden method travel music teacher student answer
"""
_MEAN_WORDS = 68  # about MTBench's 77 tokens
_POLL_S = 0.5


@dataclass(frozen=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    api_key: str | None

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """The response's JSON; tries again for as long as the server says that its queue is full."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        while True:
            connection = http.client.HTTPConnection(self.host, self.port)
            try:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
                data = response.read()
            except OSError as error:
                raise SystemExit(f"no answer from {self.host} port {self.port}: {error}") from error
            finally:
                connection.close()
            if response.status == 200:
                return json.loads(data)
            if response.status != 429:
                raise SystemExit(f"{path}: status {response.status}: {data.decode(errors='replace')[:500]}")
            time.sleep(int(response.headers.get("Retry-After", 1)))


def questions(path: Path | None, count: int, seed: int) -> list[str]:
    """The first turns of a file of MTBench's form, repeated as often as needed, or made-up ones of like length."""
    if path is not None:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["turns"][0] for line in lines if line.strip()]
        if not found:
            raise SystemExit(f"{path} has no questions; each line is an object with a list 'turns'")
        return (found * (count // len(found) + 1))[:count]
    rng = random.Random(seed)
    words, spread = _WORDS.split(), _MEAN_WORDS // 2
    lengths = [rng.randrange(_MEAN_WORDS - spread, _MEAN_WORDS + spread + 1) for _ in range(count)]
    return [" ".join(rng.choices(words, k=length)) + "?" for length in lengths]


def run(server: Server, prompts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Send all prompts and wait for all answers; what was measured."""
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": 0, "ignore_eos": not args.stop_at_eos}
    parts = [prompts[i : i + args.ubs] for i in range(0, len(prompts), args.ubs)]
    before = server.send("GET", "/get_server_info")
    start = time.perf_counter()
    with ThreadPoolExecutor(len(parts)) as threads:
        futures = [
            threads.submit(server.send, "POST", "/generate", {"text": part, "sampling_params": sampling})
            for part in parts
        ]
        watch(server, futures, before["load"]["generated_tokens"], len(prompts) * args.max_new_tokens)
        answers = [answer for future in futures for answer in future.result()]
    seconds = time.perf_counter() - start
    after = server.send("GET", "/get_server_info")
    metas = [answer["meta_info"] for answer in answers]
    generated = sum(meta["completion_tokens"] for meta in metas)
    prompt = sum(meta["prompt_tokens"] for meta in metas)
    return {
        "workload": {
            "questions": str(args.questions) if args.questions else "made up",
            "prompts": len(prompts),
            "ubs": args.ubs,
            "n_ub": args.n_ub,
            "max_new_tokens": args.max_new_tokens,
            "mean_prompt_tokens": prompt / len(prompts),
        },
        "seconds": seconds,
        "generated_tokens": generated,
        "generated_tokens_per_s": generated / seconds,
        "prompt_tokens_per_s": prompt / seconds,
        "passes": after["load"]["passes"] - before["load"]["passes"],
        "server": {
            name: after[name]
            for name in ("served_model_name", "version", "dtype", "plan", "prediction", "lanes")
        },
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def watch(server: Server, futures: list[Future[Any]], before: int, total: int) -> None:
    """A bar of generated tokens until all requests are answered."""
    done = threading.Event()
    for future in futures:
        future.add_done_callback(lambda _: all(f.done() for f in futures) and done.set())
    counts, rates = (
        TextColumn("{task.completed:.0f} of {task.total} tokens"),
        TextColumn("{task.fields[rate]}"),
    )
    columns = (counts, BarColumn(), rates, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, start = bar.add_task("", total=total, rate=""), time.perf_counter()
        while not done.wait(_POLL_S):
            generated = server.send("GET", "/get_server_info")["load"]["generated_tokens"] - before
            rate = f"{generated / (time.perf_counter() - start):.1f} tokens/s"
            bar.update(task, completed=generated, rate=rate)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description="Throughput of a running server with prompts like MTBench's."
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--api-key", help="the server's key, if it has one")
    add("--max-new-tokens", type=int, default=32, help="tokens of each answer (default: 32)")
    add("--ubs", type=int, default=324, help="prompts in a request (default: 324)")
    add("--n-ub", type=int, default=14, help="requests (default: 14)")
    add("--questions", type=Path, help="MTBench's question.jsonl; default: made-up questions of its length")
    add("--stop-at-eos", action="store_true", help="let answers end by themselves")
    add("--seed", type=int, default=0, help="of made-up questions")
    add("--result-file", type=Path, default=Path("mtbench.json"), help="where to write what was measured")
    args = parser.parse_args(argv)
    if min(args.ubs, args.n_ub, args.max_new_tokens) < 1:
        parser.error("--ubs, --n-ub and --max-new-tokens are 1 or more")
    server = Server(args.host, args.port, args.api_key)
    result = run(server, questions(args.questions, args.ubs * args.n_ub, args.seed), args)
    args.result_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{result['workload']['prompts']} prompts of {result['workload']['mean_prompt_tokens']:.0f} tokens, "
        f"{result['generated_tokens']} tokens generated in {result['seconds']:.1f} s: "
        f"{result['generated_tokens_per_s']:.2f} tokens/s; written to {args.result_file}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
