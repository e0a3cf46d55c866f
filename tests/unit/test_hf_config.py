from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from moe_lightning.errors import ConfigError, UnsupportedModelError
from moe_lightning.models.hf_config import HFConfig


def _config(**values: Any) -> HFConfig:
    return HFConfig(values, "here/config.json")


def _write(directory: Path, config: Any, generation: Any = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_a_directory_and_its_file_give_the_same_config(tmp_path: Path) -> None:
    _write(tmp_path, {"vocab_size": 7}, {"eos_token_id": 3})
    by_directory, by_file = HFConfig.load(tmp_path), HFConfig.load(str(tmp_path / "config.json"))
    assert by_directory == by_file
    assert by_directory.integer("vocab_size") == 7
    assert by_directory.source == str(tmp_path / "config.json")


@pytest.mark.parametrize("name", [".", "missing", "missing/config.json"])
def test_a_path_without_a_config_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json; give a checkpoint directory"):
        HFConfig.load(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"7", b"\xff\xfe"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json .*download it again"):
        HFConfig.load(tmp_path)


def test_a_broken_generation_config_is_not_passed_over(tmp_path: Path) -> None:
    _write(tmp_path, {})
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        HFConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("getter", "value", "wanted"),
    [
        ("integer", 8, 8),
        ("number", 8, 8.0),
        ("number", 1e-5, 1e-5),
        ("flag", False, False),
        ("text", "silu", "silu"),
    ],
)
def test_a_getter_gives_a_value_of_its_type(getter: str, value: Any, wanted: Any) -> None:
    found = getattr(_config(key=value), getter)("key")
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("getter", "value"),
    [
        ("integer", True), ("integer", 8.0), ("integer", "8"), ("integer", [8]),
        ("number", "1e-5"), ("number", False), ("integer", 0), ("integer", -8),
        ("number", 0), ("number", -1.0), ("number", math.inf), ("number", math.nan),
        ("flag", 1), ("flag", "true"), ("text", 4), ("text", {}),
    ],
)  # fmt: skip
def test_a_value_of_another_type_or_out_of_range_is_refused_by_key_and_value(getter: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        getattr(_config(the_key=value), getter)("the_key")
    assert f"here/config.json: the_key={value!r}" in str(caught.value)


@pytest.mark.parametrize("values", [{}, {"key": None}])
def test_null_and_missing_give_the_default_or_fail(values: dict[str, Any]) -> None:
    config = _config(**values)
    assert config.integer("key", 3) == 3
    assert config.optional_int("key") is None
    assert not config.has("key")
    with pytest.raises(UnsupportedModelError, match="key is missing"):
        config.integer("key")


def test_an_optional_number_tells_null_from_missing() -> None:
    assert _config().optional_int("key", missing=4096) == 4096
    assert _config(key=None).optional_int("key", missing=4096) is None
    assert _config(key=7).optional_int("key", missing=4096) == 7
    with pytest.raises(UnsupportedModelError, match="key=0 "):
        _config(key=0).optional_int("key", missing=4096)


def test_a_lower_bound_may_be_moved() -> None:
    assert _config(key=0).integer("key", low=0) == 0
    with pytest.raises(UnsupportedModelError, match="key=-1 "):
        _config(key=-1).integer("key", low=0)


def test_a_section_names_itself_in_errors_of_its_values() -> None:
    section = _config(outer={"inner": "x"}).section("outer")
    assert section is not None
    with pytest.raises(UnsupportedModelError, match=r"here/config\.json: outer: inner='x' "):
        section.number("inner")


@pytest.mark.parametrize("values", [{}, {"outer": None}, {"outer": {}}])
def test_a_section_that_says_nothing_is_none(values: dict[str, Any]) -> None:
    assert _config(**values).section("outer") is None


@pytest.mark.parametrize("value", [[], "linear", 0])
def test_a_section_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(f"outer={value!r}")):
        _config(outer=value).section("outer")


def test_an_integer_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="key=1797"):
        _config(key=2**1024).number("key")


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        _config(key="x" * 10_000).integer("key")
    assert len(str(caught.value)) < 500


def test_a_required_value_may_be_missing_but_not_another() -> None:
    _config().require("hidden_act", "silu")
    _config(hidden_act="silu").require("hidden_act", "silu")
    _config(hidden_act=None).require("hidden_act", "silu")
    with pytest.raises(UnsupportedModelError, match=r"hidden_act='gelu' is not supported; only 'silu' is"):
        _config(hidden_act="gelu").require("hidden_act", "silu")


@pytest.mark.parametrize("names", [None, [], "MixtralForCausalLM", [3]])
def test_a_config_without_an_architecture_is_refused(names: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="architectures="):
        _ = _config(architectures=names).architecture


def test_both_spellings_of_the_dtype_are_read() -> None:
    assert _config(dtype="float16").dtype == _config(torch_dtype="float16").dtype == "float16"
    assert _config().dtype == "float32"


def test_the_dtype_may_be_spelled_as_torch_prints_it() -> None:
    assert _config(torch_dtype="torch.bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "", 16])
def test_a_dtype_that_no_kernel_reads_is_refused(name: Any) -> None:
    for key in ("dtype", "torch_dtype"):
        with pytest.raises(UnsupportedModelError, match=re.escape(f"{key}={name!r}")):
            _ = _config(**{key: name}).dtype


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([2, 5], (2, 5)), (0, (0,)), (None, ())])
def test_end_tokens_are_read_from_a_number_or_a_list(value: Any, ids: tuple[int, ...]) -> None:
    assert _config(eos_token_id=value).eos_token_ids == ids


def test_end_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    _write(tmp_path, {"eos_token_id": 1}, {"eos_token_id": [7, 8]})
    assert HFConfig.load(tmp_path).eos_token_ids == (7, 8)


def test_a_generation_config_without_end_tokens_leaves_those_of_the_config(tmp_path: Path) -> None:
    _write(tmp_path, {"eos_token_id": 1}, {"do_sample": True})
    assert HFConfig.load(tmp_path).eos_token_ids == (1,)


def test_null_end_tokens_in_the_generation_config_leave_those_of_the_config(tmp_path: Path) -> None:
    _write(tmp_path, {"eos_token_id": 1}, {"eos_token_id": None})
    assert HFConfig.load(tmp_path).eos_token_ids == (1,)


@pytest.mark.parametrize("value", ["2", [2, "5"], True, 2.0, -1, [2, -1]])
def test_end_tokens_that_are_no_ids_are_refused(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="eos_token_id="):
        _ = _config(eos_token_id=value).eos_token_ids


@pytest.mark.parametrize(("value", "token"), [(0, 0), (1, 1), (None, None)])
def test_the_start_token_may_be_zero_or_none(value: Any, token: int | None) -> None:
    assert _config(bos_token_id=value).bos_token_id == token


@pytest.mark.parametrize("value", ["1", -1, True])
def test_a_start_token_that_is_no_id_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(f"bos_token_id={value!r}")):
        _ = _config(bos_token_id=value).bos_token_id


def test_a_file_of_weights_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("{}")
    with pytest.raises(ConfigError, match="give a checkpoint directory"):
        HFConfig.load(tmp_path / "model.safetensors")
