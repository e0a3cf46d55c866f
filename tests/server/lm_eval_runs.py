"""Runs the command `lm_eval` once for each list of arguments on stdin, in one process: its imports take long."""

import json
import sys

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    for arguments in json.load(sys.stdin):
        sys.argv = ["lm_eval", *arguments]
        cli_evaluate()
