"""``python -m moe_lightning.launch_server``: starts a server as the published artifact does."""

from __future__ import annotations

import sys

from moe_lightning.cli.launch import main

if __name__ == "__main__":
    sys.exit(main())
