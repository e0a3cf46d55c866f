"""Requests made of the server's own OpenAPI document: no 5xx, and responses are what it says."""

from __future__ import annotations

from collections import Counter

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans
from live import serving
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from checkpoints import tiny_policy
from demo_model import IS_FULL
from moe_lightning import LLM
from moe_lightning.server.app import Settings
from moe_lightning.server.limits import Limits

CHECKS = [
    not_a_server_error, content_type_conformance, response_headers_conformance, response_schema_conformance,
    status_code_conformance,
]  # fmt: skip
TIMES = 10 if IS_FULL else 1  # that makes nine thousand requests
# Fields that a document cannot say of with which values of others they go.
DISAGREEING = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "min_tokens", "stream_options", "top_logprobs", "max_completion_tokens", "input_ids",
    "prompt_logprobs",
)  # fmt: skip


@pytest.fixture(scope="module")
def small(mixtral, tmp_path_factory):
    """Answers of it are short, so that many fit in a few seconds."""
    llm = LLM(mixtral, policy=tiny_policy(), max_model_len=64, executor="serial", device="cpu")
    with serving(
        llm, Settings(limits=Limits(max_choices=4), data_dir=tmp_path_factory.mktemp("schema"))
    ) as server:
        yield server


@pytest.fixture(scope="module")
def document(small):
    found = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    found.config.update(request_timeout=120)  # of a machine that is busy; its own is ten seconds
    return found


@pytest.fixture(scope="module")
def known(small):
    """Ids that a document cannot name, but clients know."""
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="none") as client:
        file = client.files.create(file=("a", b"{}"), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
    return {"input_file_id": file.id, "file_id": file.id, "batch_id": batch.id}


@pytest.mark.parametrize(
    "method, path, max_examples",
    [
        ("POST", "/v1/completions", 120),
        ("POST", "/v1/chat/completions", 120),
        ("POST", "/generate", 120),
        ("POST", "/tokenize", 80),
        ("POST", "/detokenize", 80),
        ("POST", "/v1/files", 60),
        ("GET", "/v1/files", 30),
        ("GET", "/v1/files/{file_id}", 20),
        ("GET", "/v1/files/{file_id}/content", 20),
        ("DELETE", "/v1/files/{file_id}", 20),
        ("POST", "/v1/batches", 80),
        ("GET", "/v1/batches", 30),
        ("GET", "/v1/batches/{batch_id}", 20),
        ("POST", "/v1/batches/{batch_id}/cancel", 20),
        ("GET", "/v1/models", 5),
        ("GET", "/v1/models/{name}", 40),
        ("GET", "/tokenizer_info", 5),
        ("GET", "/get_server_info", 5),
        ("GET", "/health", 5),
        ("GET", "/health/ready", 5),
    ],
)
def test_responses_are_what_the_document_says(document, known, method, path, max_examples):
    operation = document[path][method]

    seen = Counter()

    @settings(max_examples=TIMES * max_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy() | operation.as_strategy(GenerationMode.NEGATIVE), booleans())
    def check(case, is_agreeing):
        if is_agreeing and isinstance(case.body, dict):
            for name in DISAGREEING:
                case.body.pop(name, None)
        for named in (case.body, case.path_parameters):
            if is_agreeing and isinstance(named, dict) and method != "DELETE":
                named.update({name: known[name] for name in named.keys() & known.keys()})
        seen[case.call_and_validate(checks=CHECKS).status_code] += 1

    check()
    if method == "POST" and not path.endswith("/cancel"):
        assert seen[200], "none was a good one"


def test_the_document_has_all_endpoints(small):
    _, document = small.get("/openapi.json")
    assert {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize",
        "/tokenizer_info", "/generate", "/health", "/health/ready", "/get_server_info",
    } <= set(document["paths"])  # fmt: skip
