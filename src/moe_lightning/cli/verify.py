"""The verb `verify`: checks the engine's text against plain PyTorch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from moe_lightning.cli.flags import add_engine_flags, engine_config, positive_count

if TYPE_CHECKING:
    from moe_lightning.verify import PromptCheck, Verification

SUMMARY = "check the pipeline against a plain PyTorch forward pass"
DESCRIPTION = (
    "Answers a few prompts with the engine, recomputes each alone with plain PyTorch straight from the checkpoint "
    "(one layer in memory at a time, no pages, no cache), and compares every token and its log-probabilities. "
    "In half precision it allows for what rounding does to PyTorch too. The exit status is 0 if they agree, else 1."
)
PROMPTS = (
    "The capital of France is",
    "1, 2, 3, 5, 8, 13,",
    "Write a short story about a lighthouse keeper who finds a map. Begin with the storm of the night before.",
    "def fibonacci(n):\n    ",
)


def add_flags(parser: ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument(
        "model_path", nargs="?", metavar="MODEL", help="checkpoint directory; same as --model"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt of your own; may be repeated"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive_count,
        default=16,
        metavar="N",
        help="tokens of each answer (default: 16)",
    )
    add_engine_flags(parser)


def run(args: Namespace) -> int:
    """Verify, print a line per prompt and the verdict; the exit status.

    Raises:
        MoELightningError: the model cannot be loaded.
    """
    args.model = args.model_path or args.model
    config = engine_config(args)
    from moe_lightning.llm import LLM  # imports torch
    from moe_lightning.verify import Verification, verify

    llm = LLM(**asdict(config))
    prompts = args.prompt or PROMPTS
    checks = []
    for prompt, check in zip(prompts, verify(llm, prompts, args.max_tokens), strict=True):
        checks.append(check)
        print(f"{_line(check)}  {prompt[:50]!r}", flush=True)
    result = Verification(tuple(checks), llm.dtype)
    print(_verdict(result))
    return 0 if result.is_equal else 1


def _line(check: PromptCheck) -> str:
    verdict = "ok" if not check.num_wrong else f"{check.num_wrong} WRONG"
    if check.num_not_finite:
        verdict += f", {check.num_not_finite} NOT FINITE"
    return (
        f"{check.num_tokens - check.num_wrong:4d} of {check.num_tokens} tokens {verdict}, "
        f"difference {check.median_difference:.1e} at the median, {check.max_difference:.1e} at most"
    )


def _verdict(result: Verification) -> str:
    found = result.all
    verdict = "equal" if result.is_equal else "NOT EQUAL"
    if found.num_not_finite:
        return (
            f"{verdict}: NaN or infinity in {found.num_not_finite} places. The checkpoint may be damaged: download "
            "it again; or float16 overflowed: try --dtype bfloat16"
        )
    text = f"{verdict}: {found.num_tokens} tokens in {result.dtype}, {found.num_wrong} of them wrong; "
    if result.is_strict:
        return text + (
            f"largest difference of a log-probability {found.max_difference:.1e}, tolerance {result.tolerance:.0e}"
        )
    return text + (
        f"median difference of a log-probability {found.median_difference:.1e}. Rounding allows a median of "
        f"{result.max_median:.1e}, twice what PyTorch has in {result.dtype}, and {result.max_wrong} wrong tokens, "
        f"where it turns a router's near tie; PyTorch has {found.num_rounded_wrong}"
    )
