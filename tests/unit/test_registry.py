from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lightning.errors import ConfigError, UnsupportedModelError
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.known import ALIASES
from moe_lightning.models.registry import ARCHITECTURES, KNOWN_MODELS, resolve, spec_from_config
from moe_lightning.models.spec import ModelSpec, RopeScaling, RouterScoring

# As their publishers count them.
NUM_PARAMETERS = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x22b-instruct": 140_630_071_296,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-70b-instruct": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-instruct": 134_515_008,
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


def _spec(name: str, *absent: str, **changes: Any) -> ModelSpec:
    values = {**KNOWN_MODELS[name], **changes}
    return spec_from_config(HFConfig({k: v for k, v in values.items() if k not in absent}, "config"))


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


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_on_the_hub_is_the_same_model_without_its_organization(name: str) -> None:
    assert resolve(name.split("/")[1]) == resolve(name) == resolve(ALIASES[name])


@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [
        ("mistralai/Mixtral-8x22B-v0.1", 32000), ("mistralai/Mixtral-8x22B-Instruct-v0.1", 32768),
        ("mistralai/Mistral-7B-Instruct-v0.1", 32000), ("mistralai/Mistral-7B-Instruct-v0.3", 32768),
    ],
)  # fmt: skip
def test_a_revision_with_another_vocabulary_has_its_own(name: str, vocab_size: int) -> None:
    assert resolve(name).vocab_size == vocab_size


def test_the_third_mistral_has_no_window() -> None:
    third = resolve("mistralai/Mistral-7B-Instruct-v0.3")
    assert (third.attention.sliding_window, third.rope.theta) == (None, 1e6)


@pytest.mark.parametrize(
    "name, hint", [("mixtral-8x8b", "did you mean mixtral-8x7b"), ("qqq", "known names are ")]
)
def test_an_unknown_name_is_answered_in_whole_sentences(name, hint):
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    message = str(caught.value)
    assert f"{name!r} is neither a path nor a known model; {hint}" in message
    before, after = message.split(" Of another model, give the directory")
    assert before[-1] in ".?" and after


@pytest.mark.parametrize(
    "name",
    [
        "mistralai/Mistral-7B-Instruct-v0.2", "mixtral-8x7b-instruct-v0.1-gptq", "togethercomputer/LLaMA-2-7B-32K",
        "llama-2-7b-32k", "llama-2-7b-gptq", "someone/mixtral-8x7b-v0.1", "mixtral-8x22b-v0.3",
    ],
)  # fmt: skip
def test_a_name_that_only_begins_like_a_known_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a path nor a known model"):
        resolve(name)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "meta-llama/Meta-Llama-3.1-8B"])
def test_the_instruct_models_of_llama_end_at_their_turns_too(name: str) -> None:
    assert resolve(name).eos_token_ids == (128001,)
    assert resolve(f"{name}-Instruct").eos_token_ids == (128001, 128008, 128009)


def test_llama_2_is_published_in_half_precision_and_mixtral_in_bfloat16() -> None:
    assert resolve("llama-2-7b").dtype == "float16"
    assert resolve("mixtral-8x7b").dtype == "bfloat16"


def test_an_empty_name_is_not_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["llama-2-7b"]))
    monkeypatch.chdir(tmp_path)
    assert resolve(".") == resolve("llama-2-7b")
    with pytest.raises(ConfigError, match="names no model"):
        resolve("")


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
            ("rope_interleaved", True),
            ("partial_rotary_factor", 0.5),
            ("layer_types", ["sliding_attention"]),
            ("dtype", "float8_e4m3fn"),
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


@pytest.mark.parametrize("value", [0, -1, "8", 8.0, True])
@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings",
        "num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok",
        "sliding_window",
    ],
)  # fmt: skip
def test_a_size_that_is_no_positive_integer_is_refused_by_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(f"{key}={value!r} ")):
        _spec("mixtral-8x7b", **{key: value})


@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", math.nan])
def test_a_norm_without_a_positive_epsilon_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(f"rms_norm_eps={value!r} ")):
        _spec("llama-2-7b", rms_norm_eps=value)


def test_a_token_cannot_visit_more_experts_than_there_are() -> None:
    assert _spec("mixtral-8x7b", num_experts_per_tok=8).experts.top_k == 8
    with pytest.raises(UnsupportedModelError, match=r"num_experts_per_tok=9 .*num_local_experts=8"):
        _spec("mixtral-8x7b", num_experts_per_tok=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 48, "num_key_value_heads": 8}, "hidden_size=4096 "),
        ({"head_dim": 65}, "head_dim=65 "),
    ],
)
def test_heads_that_cannot_be_cut_or_turned_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        _spec("llama-2-7b", **changes)


LLAMA3 = KNOWN_MODELS["llama-3.1-8b"]["rope_scaling"]


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        ({"rope_type": "default"}, "rope_theta"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        *(({**LLAMA3, "rope_theta": 1e4, key: None}, key) for key in LLAMA3 if key != "rope_type"),
    ],
)
def test_rotary_parameters_that_lack_a_value_are_refused_by_name(
    section: dict[str, Any], missing: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"rope_parameters: {missing} is missing"):
        _spec("llama-2-7b", rope_parameters=section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rope_type": "default", "rope_theta": "1e4"}, "rope_theta='1e4' "),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor=0 "),
        ({"rope_type": 3, "rope_theta": 1e4}, "rope_type=3 "),
        ({**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": "8k"}, "embeddings='8k' "),
        ({**LLAMA3, "rope_theta": 1e4, "high_freq_factor": 1.0}, "high_freq_factor=1 .*low_freq_factor=1"),
    ],
)
def test_rotary_parameters_out_of_range_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        _spec("llama-2-7b", rope_parameters=section)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("name", "value"), [("rope_interleaved", True), ("partial_rotary_factor", 0.5)])
def test_a_rotation_of_other_pairs_is_refused_beside_the_scaling_too(key: str, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{key}: {name}={value!r} "):
        _spec("llama-2-7b", **{key: {"rope_type": "default", "rope_theta": 1e4, name: value}})


def test_a_theta_of_text_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="rope_theta='10000' "):
        _spec("llama-2-7b", rope_theta="10000")


@pytest.mark.parametrize("value", [[], "linear"])
def test_a_rope_scaling_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="rope_scaling="):
        _spec("llama-2-7b", rope_scaling=value)


def test_rotary_parameters_of_both_versions_must_agree() -> None:
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert _spec("llama-2-7b", rope_parameters=linear, rope_scaling=linear).rope.factor == 2.0
    with pytest.raises(UnsupportedModelError, match=r"rope_parameters=.* and rope_scaling=.* differ"):
        _spec("llama-2-7b", rope_parameters=linear, rope_scaling={**linear, "factor": 4.0})


def test_theta_beside_rotary_parameters_counts_when_they_have_none() -> None:
    section = {"rope_type": "linear", "factor": 2.0}
    assert _spec("llama-2-7b", rope_theta=5e5, rope_parameters=section).rope.theta == 5e5
    assert (
        _spec("llama-2-7b", rope_theta=5e5, rope_parameters={**section, "rope_theta": 7.0}).rope.theta == 7.0
    )


def test_the_oldest_spelling_of_a_scaling_is_read() -> None:
    rope = _spec("llama-2-7b", rope_scaling={"type": "linear", "factor": 2.0}).rope
    assert (rope.scaling, rope.factor, rope.theta) == (RopeScaling.LINEAR, 2.0, 1e4)


@pytest.mark.parametrize(
    ("name", "theta"), [("mixtral-8x7b", 1e6), ("mistral-7b", 1e4), ("llama-3.1-8b", 1e4)]
)
def test_an_absent_theta_is_that_of_the_family(name: str, theta: float) -> None:
    assert _spec(name, "rope_theta", "rope_scaling").rope.theta == theta


@pytest.mark.parametrize(
    ("name", "absent", "null", "given"),
    [("mistral-7b", 4096, None, 100), ("mixtral-8x7b", None, None, 100), ("llama-2-7b", None, None, None)],
)
def test_a_window_absent_null_or_given_means_what_transformers_makes_of_it(
    name: str, absent: int | None, null: int | None, given: int | None
) -> None:
    assert _spec(name, "sliding_window").attention.sliding_window == absent
    assert _spec(name, sliding_window=None).attention.sliding_window == null
    assert _spec(name, sliding_window=100).attention.sliding_window == given


@pytest.mark.parametrize(("kind", "name"), [("mistral", "mistral-7b"), ("mixtral", "mixtral-8x7b")])
def test_defaults_are_those_of_transformers(kind: str, name: str) -> None:
    config = pytest.importorskip("transformers").AutoConfig.for_model(kind)
    spec = _spec(name, "sliding_window", "rope_theta")
    assert spec.attention.sliding_window == config.sliding_window
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
