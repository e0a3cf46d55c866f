"""The command `moe-lightning`."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from moe_lightning import __version__
from moe_lightning.cli import bench, doctor, plan, profile, run_batch, serve, trace, verify
from moe_lightning.errors import MoELightningError

_DESCRIPTION = """\
Batch inference for Mixture-of-Experts models that do not fit on the GPU.

Expert weights stay in host memory and stream through the GPU; attention over the KV cache runs where the cache
lies, most of it on the CPU, so that copies, GPU and CPU work at the same time. Many requests share each stream of
the weights: give it a file of requests and let it run.
"""
_EXAMPLES = """\
examples:
  moe-lightning run-batch -i requests.jsonl -o answers.jsonl --model ./mixtral
      answer every line; run it again after a crash or Ctrl-C and it goes on where it stopped
  moe-lightning run-batch -i requests.jsonl -o answers.jsonl --model ./mixtral --limit 20 --trace pass.json
      try the first 20 lines and record when copies, GPU and CPU worked
  moe-lightning serve ./mixtral
      answer requests over HTTP, at http://127.0.0.1:30000/v1
  moe-lightning trace pass.json --svg pass.svg
      draw that record

`moe-lightning VERB --help` lists the flags of a verb.
"""


_VERBS = (
    (run_batch, "run-batch"),
    (serve, "serve"),
    (plan, "plan"),
    (trace, "trace"),
    (verify, "verify"),
    (profile, "profile"),
    (bench, "bench"),
    (doctor, "doctor"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command: 0, 2 for an error that the user can act on, 128 + signal if interrupted."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except MoELightningError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        if e.name != "torch":  # which `plan` alone does without
            raise
        print("error: PyTorch is missing; install it: pip install 'torch>=2.9'", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print("interrupted", file=sys.stderr)
        return run_batch.interrupt_status(e)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        # Python flushes stdout once more at exit; that must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def build_parser() -> ArgumentParser:
    """The parser of all verbs; `args.run(args)` runs the one that was given."""
    parser = ArgumentParser(
        prog="moe-lightning",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moe-lightning {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module, name in _VERBS:
        verb = verbs.add_parser(name, help=module.SUMMARY, description=module.DESCRIPTION, allow_abbrev=False)
        module.add_flags(verb)
        verb.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
