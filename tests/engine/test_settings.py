"""Settings of an `LLM` and parameters of a request that cannot be used are errors that name them."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch

from checkpoints import load
from moe_lightning import LLM, SamplingParams
from moe_lightning.config import EngineConfig
from moe_lightning.errors import ConfigError, RequestError


def test_an_unknown_keyword_is_a_type_error(mixtral):
    with pytest.raises(TypeError, match="gpu_memory_utilization"):
        LLM(mixtral, gpu_memory_utilization=0.9)


def test_keywords_are_those_of_the_config_and_the_first_are_positional_as_in_vllm():
    parameters = list(inspect.signature(LLM).parameters.values())
    assert {p.name for p in parameters} == {f.name for f in fields(EngineConfig)}
    defaults = {f.name: f.default for f in fields(EngineConfig) if f.name != "model"}
    assert {p.name: p.default for p in parameters if p.name != "model"} == defaults
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        "model", "tokenizer", "dtype", "tensor_parallel_size", "quantization", "kv_cache_dtype",
        "max_model_len", "gpu_memory", "host_memory", "device", "seed",
    ]  # fmt: skip


def test_a_tokenizer_may_come_second(mixtral, tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer can be loaded from"):
        LLM(mixtral, str(tmp_path))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported yet"),
        ({"quantization": "awq"}, "quantization='awq' is not supported yet"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is not supported yet"),
        ({"max_model_len": 12.5}, "max_model_len=12.5: give an integer"),
        ({"tokenizer": 3.5}, "tokenizer=.*: give a path"),
        ({"policy": {"schedule": "cgopipe"}}, "policy=.*: give a path"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_used_is_named(settings, message, mixtral):
    with pytest.raises(ConfigError, match=message):
        LLM(mixtral, **settings)


@pytest.mark.parametrize(
    "changes", [{"resident_pages": (17, 0, 0)}, {"pages_per_expert": 5}, {"num_frames": 1}]
)
def test_pages_that_the_model_does_not_have_are_refused(changes, mixtral):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        load(mixtral, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stop": 1}, "stop=1: give"),
        ({"stop": {"a": 1}}, "stop=.*: give"),
        ({"stop": [1]}, "stop=.*: give"),
        ({"stop_token_ids": 5}, "stop_token_ids=5: give a list"),
        ({"stop_token_ids": "ab"}, "stop_token_ids='ab': give a list"),
        ({"ignore_eos": "no"}, "ignore_eos='no': give True or False"),
    ],
    ids=str,
)
def test_parameters_of_another_type_are_named(changes, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**changes)


def test_the_name_of_a_model_is_its_directorys(mixtral, monkeypatch):
    monkeypatch.chdir(mixtral)
    assert LLM(".").model_name == mixtral.name


def test_a_gpu_that_is_not_the_first_is_an_error_with_a_remedy(mixtral, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=3"):
        LLM(mixtral)


def test_a_policy_that_the_gpu_cannot_hold_is_an_error_with_a_remedy(mixtral, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.27 GiB.\nmore")

    monkeypatch.setattr("moe_lightning.engine.build.allocate", refuse)
    with pytest.raises(ConfigError, match=r"7\.27 GiB.*lower gpu_memory.*fewer resident_pages"):
        load(mixtral)
