"""The ways to draw a timeline."""

from __future__ import annotations

from moe_lightning.pipeline.chrome import from_chrome, to_chrome
from moe_lightning.pipeline.gantt import to_svg
from moe_lightning.pipeline.text_chart import to_text

__all__ = ["from_chrome", "to_chrome", "to_svg", "to_text"]
