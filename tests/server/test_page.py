"""The page at / in a real browser, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from live import serving

from checkpoints import load
from moe_lightning.server.app import Settings

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
NAME = "<img src=x onerror=\"document.title='owned'\">"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


def dom(url, tmp_path):
    """The page after its script has run for some virtual seconds."""
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=4000", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def text_of(html, name):
    (found,) = re.findall(rf'<(\w+)[^>]* id="{name}"[^>]*>(.*?)</\1>', html, re.DOTALL)
    return re.sub(r"<[^>]*>", " ", found[1])


def test_the_page_shows_plan_lanes_and_throughput_and_what_it_shows_is_text(mixtral, tmp_path):
    with serving(load(mixtral), Settings(names=(NAME,))) as server:
        server.post("/v1/completions", {"prompt": "the fox", "max_tokens": 30, "ignore_eos": True})
        server.until(lambda: server.get("/get_server_info")[1]["lanes"] != {})
        html = dom(server.url, tmp_path)
    assert "<title>MoE-Lightning</title>" in html, "markup in a name is not run"
    assert "&lt;img" in text_of(html, "name")
    assert "ready" in text_of(html, "status")
    assert re.search(r"30\s+tokens generated", re.sub(r"<[^>]*>", " ", html))
    assert "num_frames" in text_of(html, "plan")
    assert html.count('class="lane"') == 5
    assert re.search(r'<path d="M0,100L[^"]*Z"', html)
    assert text_of(html, "error") == ""


def test_the_page_asks_for_the_key_where_the_server_does(mixtral, tmp_path):
    with serving(load(mixtral), Settings(api_key="sk-1")) as server:
        html = dom(server.url, tmp_path)
    assert "asks for its API key" in text_of(html, "error")
    assert '<form id="key">' in html
    assert '<main id="main" hidden="">' in html
