"""The verb `verify`: checks the engine's text against plain PyTorch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from moe_lightning.cli.flags import add_engine_flags, engine_config, positive_count

SUMMARY = "check the pipeline against a plain PyTorch forward pass"
DESCRIPTION = (
    "Answers a few prompts with the engine, recomputes each alone with plain PyTorch straight from the checkpoint "
    "(one layer in memory at a time, no pages, no cache), and compares every token and its log-probabilities. "
    "The exit status is 0 if all agree and 1 if not."
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
    from moe_lightning.verify import TOLERANCES, Verification, verify

    llm = LLM(**asdict(config))
    prompts = args.prompt or PROMPTS
    checks = []
    for prompt, check in zip(prompts, verify(llm, prompts, args.max_tokens), strict=True):
        checks.append(check)
        verdict = "ok" if not check.num_wrong else f"{check.num_wrong} WRONG"
        print(
            f"{check.num_tokens - check.num_wrong:4d} of {check.num_tokens} tokens {verdict}, largest difference "
            f"{check.max_difference:.1e}  {prompt[:50]!r}",
            flush=True,
        )
    result = Verification(tuple(checks), TOLERANCES[llm.dtype])
    equal = "equal" if result.is_equal else "NOT EQUAL"
    print(
        f"{equal}: {sum(c.num_tokens for c in checks)} tokens in {llm.dtype}; largest difference "
        f"of a log-probability {result.max_difference:.1e}, tolerance {result.tolerance:.0e}"
    )
    return 0 if result.is_equal else 1
