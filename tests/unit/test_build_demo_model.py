from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import build_demo_model as builder
import smollm2_gguf

HIDDEN, INTERMEDIATE, EXPERTS = 12, 32, 8


def dense_expert(seed: int = 0) -> smollm2_gguf.Expert:
    rng = np.random.default_rng(seed)
    shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    return smollm2_gguf.Expert(*(rng.standard_normal(shape, dtype=np.float32) for shape in shapes))


def experts() -> list[smollm2_gguf.Expert]:
    return list(builder.make_experts(dense_expert(), EXPERTS, seed=3, layer=5))


def neuron_outputs(expert: smollm2_gguf.Expert, x: np.ndarray) -> np.ndarray:
    """Each neuron's contribution to the output, [T, H, I], with no sum whose order could differ."""
    gate, up = np.stack([expert.gate @ v for v in x]), np.stack([expert.up @ v for v in x])
    return (gate / (1 + np.exp(-gate)) * up)[:, None, :] * expert.down[None]


def run(expert: smollm2_gguf.Expert, x: np.ndarray) -> np.ndarray:
    return neuron_outputs(expert, x).astype(np.float64).sum(-1)


@pytest.mark.parametrize("index", range(EXPERTS))
def test_every_expert_computes_the_dense_function(index: int) -> None:
    x = np.random.default_rng(1).standard_normal((9, HIDDEN), dtype=np.float32)
    np.testing.assert_allclose(run(experts()[index], x), run(dense_expert(), x), rtol=1e-5, atol=1e-5)


def test_rescaling_a_neuron_is_exact() -> None:
    dense, expert = dense_expert(), experts()[0]
    order = [int(np.flatnonzero((dense.gate == row).all(1))[0]) for row in expert.gate]
    products = expert.up[:, :, None] * expert.down.T[:, None, :]
    np.testing.assert_array_equal(products, (dense.up[:, :, None] * dense.down.T[:, None, :])[order])


def test_no_two_experts_share_a_matrix_with_each_other_or_with_the_dense_model() -> None:
    for a, b in itertools.combinations([dense_expert(), *experts()], 2):
        for name in ("gate", "up", "down"):
            assert not np.array_equal(getattr(a, name), getattr(b, name)), name


def test_mixing_matrices_of_two_experts_changes_the_function() -> None:
    x = np.random.default_rng(1).standard_normal((4, HIDDEN), dtype=np.float32)
    a, b = experts()[:2]
    expected = run(dense_expert(), x)
    for mixed in (a._replace(gate=b.gate), a._replace(up=b.up), a._replace(down=b.down)):
        assert np.abs(run(mixed, x) - expected).max() > 1.0


def test_an_expert_depends_on_seed_and_layer_but_not_on_the_number_of_experts() -> None:
    dense = dense_expert()
    first = next(builder.make_experts(dense, 8, seed=0, layer=0))
    assert np.array_equal(first.gate, next(builder.make_experts(dense, 2, seed=0, layer=0)).gate)
    assert not np.array_equal(first.gate, next(builder.make_experts(dense, 8, seed=1, layer=0)).gate)
    assert not np.array_equal(first.gate, next(builder.make_experts(dense, 8, seed=0, layer=1)).gate)


def test_rope_rows_come_back_from_the_interleaved_order() -> None:
    heads, head_dim = 3, 4
    halves = np.arange(heads * head_dim, dtype=np.float32).reshape(-1, 1)
    # Per head: 0 1 | 2 3 is stored as 0 2 1 3.
    stored = halves.reshape(heads, 2, head_dim // 2, 1).swapaxes(1, 2).reshape(-1, 1)
    assert stored[:4, 0].tolist() == [0, 2, 1, 3]
    np.testing.assert_array_equal(smollm2_gguf.split_rope_halves(stored, heads), halves)


def test_shards_hold_every_tensor_once_where_the_index_says(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors comes with the extra dev")
    arrays = {f"t{i}": np.full((4, 4), i, dtype=np.float32) for i in range(5)}
    builder.write_shards(iter(arrays.items()), tmp_path, "float32", shard_bytes=2 * 4 * 4 * 4)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 4 * 4 * 4
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    for name, array in arrays.items():
        np.testing.assert_array_equal(
            safetensors.load_file(tmp_path / index["weight_map"][name])[name], array
        )


def checkpoint(tmp_path: Path, recipe: dict[str, object]) -> Path:
    (tmp_path / "weights").write_bytes(b"12345")
    (tmp_path / builder.MANIFEST).write_text(json.dumps({"recipe": recipe, "files": {"weights": 5}}))
    return tmp_path


def test_a_checkpoint_is_complete_only_under_its_own_recipe_and_at_full_size(tmp_path: Path) -> None:
    out = checkpoint(tmp_path, {"model": "moe"})
    assert builder.is_complete(out, {"model": "moe"})
    assert not builder.is_complete(out, {"model": "dense"})
    (out / "weights").write_bytes(b"1234")
    assert not builder.is_complete(out, {"model": "moe"})
    (out / "weights").unlink()
    assert not builder.is_complete(out, {"model": "moe"})


def test_a_directory_of_someone_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(builder.BuildError, match="did not write"):
        builder.build(tmp_path, {"model": "moe"})
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("arguments", [["--top-k", "9"], ["--top-k", "0"], ["--seed", "-1"]])
def test_unusable_options_end_in_a_message_with_the_value(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert builder.main(["--out", str(tmp_path / "moe"), *arguments]) == 1
    assert " ".join(arguments) in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()
