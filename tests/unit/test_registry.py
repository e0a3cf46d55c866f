from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lightning.errors import ConfigError, UnsupportedModelError
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.registry import ARCHITECTURES, KNOWN_MODELS, resolve, spec_from_config
from moe_lightning.models.spec import ModelSpec, RopeScaling, RouterScoring

# As their publishers count them.
NUM_PARAMETERS = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "mistral-7b": 7_241_732_096,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
}
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama": ("llama", {}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "mistral with wide heads": ("mistral", {"head_dim": 16}),
}


def _spec(name: str, **changes: Any) -> ModelSpec:
    return spec_from_config(HFConfig({**KNOWN_MODELS[name], **changes}, "config", {}))


def test_every_known_model_has_a_published_size() -> None:
    assert KNOWN_MODELS.keys() == NUM_PARAMETERS.keys()


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_a_known_model_has_as_many_parameters_as_published(name: str) -> None:
    assert resolve(name).num_parameters == NUM_PARAMETERS[name]


def test_mixtral_uses_a_quarter_of_its_experts_for_a_token() -> None:
    assert resolve("mixtral-8x7b").num_active_parameters == 12_879_925_248


@pytest.fixture(params=TINY_MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Any]:
    """A tiny model of transformers on a device, and the directory with its config."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, values = TINY_MODELS[request.param]
    config = transformers.AutoConfig.for_model(kind, **TINY, **values)

    def build(device: str) -> Any:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config)
        if device == "cpu":
            model.save_pretrained(tmp_path)
        else:
            config.architectures = [type(model).__name__]
            config.save_pretrained(tmp_path)
        return model, resolve(str(tmp_path)), tmp_path

    return build


def test_a_spec_has_as_many_parameters_as_transformers_model(tiny: Callable[[str], Any]) -> None:
    model, spec, _ = tiny("meta")
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())


def test_a_spec_names_exactly_the_tensors_that_transformers_saves(tiny: Callable[[str], Any]) -> None:
    safetensors = pytest.importorskip("safetensors")
    _, spec, directory = tiny("cpu")
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {tensor.name: tensor.shape for tensor in spec.tensors()} == saved


@pytest.mark.parametrize(
    "name",
    ["mixtral-8x7b", "Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"],
)
def test_a_known_model_is_found_by_its_name_on_the_hub(name: str) -> None:
    assert resolve(name) == resolve("mixtral-8x7b")


def test_both_names_of_llama_on_the_hub_are_known() -> None:
    assert resolve("meta-llama/Meta-Llama-3.1-8B") == resolve("meta-llama/Llama-3.1-8B")


def test_what_is_on_disk_goes_before_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixtral-8x7b").mkdir()
    config = {**KNOWN_MODELS["mixtral-8x7b"], "num_hidden_layers": 3}
    (tmp_path / "mixtral-8x7b" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert resolve("mixtral-8x7b").num_layers == 3


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"'mixtral-8x7c' .* mixtral-8x7b"):
        resolve("mixtral-8x7c")


def test_a_name_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("zzz")
    assert all(name in str(caught.value) for name in KNOWN_MODELS)


def test_an_unsupported_architecture_is_answered_with_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        _spec("llama-2-7b", architectures=["GPT2LMHeadModel"])
    assert all(name in str(caught.value) for name in (*ARCHITECTURES, "GPT2LMHeadModel"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (name, key, value)
        for name in ("mixtral-8x7b", "mistral-7b", "llama-2-7b")
        for key, value in (
            ("hidden_act", "gelu"),
            ("attention_bias", True),
            ("quantization_config", {"bits": 4}),
        )
    ]
    + [("llama-2-7b", "mlp_bias", True)],
)
def test_a_value_that_would_change_the_numbers_is_refused_by_name_and_value(
    name: str, key: str, value: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(f"{key}={value!r}")):
        _spec(name, **{key: value})


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_an_unknown_rope_scaling_is_refused_by_name_and_value(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"rope_type={kind!r}"):
        _spec("llama-2-7b", rope_scaling={"rope_type": kind, "factor": 2.0})


def test_both_spellings_of_rope_make_the_same_spec() -> None:
    scaling = KNOWN_MODELS["llama-3.1-8b"]["rope_scaling"]
    old = _spec("llama-3.1-8b").rope
    new = _spec(
        "llama-3.1-8b", rope_theta=None, rope_scaling=None, rope_parameters={**scaling, "rope_theta": 5e5}
    ).rope
    assert old == new
    assert (old.scaling, old.theta, old.factor) == (RopeScaling.LLAMA3, 5e5, 8.0)


def test_heads_that_do_not_share_evenly_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="num_key_value_heads=3"):
        _spec("llama-2-7b", num_key_value_heads=3)


def test_without_key_value_heads_each_query_head_has_its_own() -> None:
    assert _spec("llama-2-7b", num_key_value_heads=None).attention.num_kv_heads == 32


def test_a_window_is_taken_from_the_config() -> None:
    assert resolve("mistral-7b").attention.sliding_window == 4096
    assert _spec("mistral-7b", sliding_window=None).attention.sliding_window is None


def test_dense_models_are_one_expert_without_a_router_and_mixtral_is_eight_with() -> None:
    assert (resolve("llama-2-7b").experts.num_experts, resolve("llama-2-7b").experts.router) == (1, None)
    experts = resolve("mixtral-8x7b").experts
    assert experts.router is not None
    assert (experts.num_experts, experts.top_k) == (8, 2)
    assert (experts.router.scoring, experts.router.normalize) == (RouterScoring.SOFTMAX_TOPK, True)
