"""``python -m moe_lightning``: the command line."""

from __future__ import annotations

import sys

from moe_lightning.cli.main import main

sys.exit(main())
