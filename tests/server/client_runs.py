"""Runs `python -m MODULE` once for each list of arguments on stdin, in one process: such imports take long."""

import json
import runpy
import sys


def run(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    module = sys.argv[1]
    for arguments in json.load(sys.stdin):
        run(module, arguments)
