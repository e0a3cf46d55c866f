"""The commands of docs/batch.md, against a live server; blocks marked `server` need one at port 30000."""

import json
import re
import subprocess
import sys
from pathlib import Path

from openai import OpenAI

from moe_lightning import SamplingParams

DOCUMENT = Path(__file__).parents[2] / "docs" / "batch.md"
CHAT = "/v1/chat/completions"


def blocks(kind):
    """Blocks of one kind, in order; of console blocks what follows the prompts."""
    found = re.findall(rf"^```{kind} server\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    if kind == "console":
        found = ["\n".join(x.removeprefix("$ ") for x in b.splitlines() if x.startswith("$ ")) for b in found]
    return found


def example_line():
    return re.search(r"^```json\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)[1]


def execute(program, script, port, directory):
    """What a block prints."""
    script = script.replace(":30000/", f":{port}/")
    script = script.replace("sleep(1)", "sleep(0.02)").replace("sleep 1;", "sleep 0.02;")
    done = subprocess.run([*program, script], cwd=directory, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documents_commands_do_what_it_says(batching, alone, tmp_path):
    (python,), (curl, cancel) = blocks("python"), blocks("console")
    (tmp_path / "requests.jsonl").write_text(example_line())
    body = json.loads(example_line())["body"]
    (want,) = alone.chat(body["messages"], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    status, answer, _ = execute([sys.executable, "-c"], python, batching.port, tmp_path).splitlines()
    assert status.startswith("completed")
    answer = json.loads(answer)
    assert answer["custom_id"] == "1" and answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["usage"]["prompt_tokens"] == len(want.prompt_token_ids)
    printed = execute(["bash", "-ec"], curl, batching.port, tmp_path)
    assert json.loads((tmp_path / "answers.jsonl").read_text())["custom_id"] == "1"
    assert '"deleted":true' in printed and '"object":"list"' in printed
    with OpenAI(base_url=f"{batching.url}/v1", api_key="none") as client, batching.held():
        file = client.files.create(file=("in.jsonl", example_line().encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert '"status":"cancelling"' in execute(["bash", "-ec"], cancel, batching.port, tmp_path)
        batching.until(lambda: client.batches.retrieve(batch.id).status == "cancelled")
