"""A checkpoint that cannot be right is refused; the message names the file or tensor and the remedy."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoints import load, rewrite, shards
from moe_lightning import LLM, SamplingParams
from moe_lightning.errors import CheckpointError, ConfigError, UnsupportedModelError
from moe_lightning.memory import checkpoint
from moe_lightning.models import registry
from moe_lightning.verify import from_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
NORM = "model.norm.weight"
_JSON_BYTES = list(b'0123456789"{}[],:.-e ')


@pytest.fixture
def sharded(sharded_mixtral, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(sharded_mixtral, tmp_path / "sharded")


def rewrite_header(path, change):
    """Change a file's header and leave its data."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def rewrite_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(directory, error, *words):
    """Loading raises the error, whose message has all the words."""
    with pytest.raises(error) as caught:
        load(directory)
    for word in words:
        assert word in str(caught.value)


class TestDamagedFiles:
    def test_a_missing_shard_is_named(self, sharded):
        shards(sharded)[1].unlink()
        refused(sharded, CheckpointError, "model-00002-of", "download it again")

    @pytest.mark.parametrize(
        "where", ["nothing", "length", "length only", "header", "no data", "data", "last"]
    )
    @pytest.mark.parametrize("kind", ["single", "sharded"])
    def test_a_truncated_file_is_named(self, kind, where, request):
        directory = request.getfixturevalue(kind)
        path = directory / SINGLE if kind == "single" else shards(directory)[2]
        content = path.read_bytes()
        header_end = 8 + struct.unpack("<Q", content[:8])[0]
        size = {
            "nothing": 0, "length": 5, "length only": 8, "header": header_end // 2, "no data": header_end,
            "data": (header_end + len(content)) // 2, "last": len(content) - 1,
        }[where]  # fmt: skip
        path.write_bytes(content[:size])
        refused(directory, CheckpointError, path.name, "truncated", "download it again")

    def test_a_file_with_bytes_after_its_last_tensor_is_named(self, single):
        with (single / SINGLE).open("ab") as file:
            file.write(b"\0" * 4)
        refused(single, CheckpointError, SINGLE, "download it again")

    @pytest.mark.parametrize(
        "header",
        [b"{", b"[]", b"\xff\xfe{}", b'"a"', b'{"a": 1}', b'{"a": {}}', b"null", b"[" * 100_000],
        ids=lambda header: repr(header[:9]),
    )
    def test_a_garbage_header_is_named(self, header, single):
        (single / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
        refused(single, CheckpointError, SINGLE, "download it again")

    @pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 10**9])
    def test_an_impossible_header_length_is_named(self, length, single):
        path = single / SINGLE
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        refused(single, CheckpointError, SINGLE, "download it again")

    @pytest.mark.parametrize(
        "offsets",
        [[-4, 252], [256, 0], [0], [0, 1, 2], "ab", None, [0, 1e400], [4, 260], [0.5, 256.5]],
        ids=str,
    )
    def test_impossible_offsets_are_refused(self, offsets, single):
        rewrite_header(single / SINGLE, lambda header: header[NORM].update(data_offsets=offsets))
        refused(single, CheckpointError, SINGLE)

    def test_tensors_that_share_bytes_are_refused(self, single):
        first, second = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"

        def share(header):
            header[second]["data_offsets"] = header[first]["data_offsets"]

        rewrite_header(single / SINGLE, share)
        refused(single, CheckpointError, SINGLE, "download it again")

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_a_changed_byte_in_the_header_never_moves_a_weight(self, data, mixtral, tmp_path):
        content = bytearray((mixtral / SINGLE).read_bytes())
        header_end = 8 + struct.unpack("<Q", content[:8])[0]
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(
            st.sampled_from(list(b'0123456789"{}[],:.-e '))
        )
        (tmp_path / SINGLE).write_bytes(content)
        spec = registry.resolve(str(mixtral))
        intact = checkpoint.check_tensors(checkpoint.open_checkpoint(mixtral), spec)
        try:
            found = checkpoint.check_tensors(checkpoint.open_checkpoint(tmp_path), spec)
        except CheckpointError:
            return
        assert [(t.name, s.offset, s.num_bytes, s.dtype) for t, s in found] == [
            (t.name, s.offset, s.num_bytes, s.dtype) for t, s in intact
        ]

    def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(self, single):
        stored = checkpoint.open_checkpoint(single)
        last = max(stored.values(), key=lambda tensor: tensor.offset)
        path = single / SINGLE
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=f"{SINGLE} ended inside {last.name}; download it again"):
            checkpoint.read_tensor(last)

    @pytest.mark.parametrize("kind", ["single", "sharded"])
    def test_a_directory_in_place_of_a_file_is_named(self, kind, request):
        directory = request.getfixturevalue(kind)
        path = directory / SINGLE if kind == "single" else shards(directory)[0]
        path.unlink()
        path.mkdir()
        refused(directory, CheckpointError, path.name, "download it again")

    def test_a_file_without_permission_is_named(self, single, monkeypatch):
        real = Path.open

        def denied(path, *args, **options):
            if path.name == SINGLE:  # root may read everything
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(Path, "open", denied)
        refused(single, CheckpointError, SINGLE, "Permission denied", "its mode")

    def test_an_index_that_is_a_directory_is_named(self, sharded):
        (sharded / INDEX).unlink()
        (sharded / INDEX).mkdir()
        refused(sharded, CheckpointError, INDEX, "Is a directory", "download it again")


class TestTiedHead:
    @pytest.fixture
    def tied(self, checkpoint_of, tmp_path):
        return shutil.copytree(checkpoint_of("llama-tied-llama3"), tmp_path / "tied")

    @staticmethod
    def add_head(directory, change=lambda head: head):
        def add(tensors):
            tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"].clone())

        rewrite(directory / SINGLE, add)

    def load(self, directory):
        return load(directory, pages_per_expert=4, resident_pages=(1, 0, 2), num_frames=5)

    def test_one_that_is_stored_and_equal_is_fine(self, tied):
        self.add_head(tied)
        assert self.load(tied).generate("the fox", SamplingParams(max_tokens=1))

    @pytest.mark.parametrize("place", [0, 150, -1])
    def test_one_with_another_value_is_refused_by_the_engine_and_by_plain_pytorch(
        self, place, tied, monkeypatch
    ):
        monkeypatch.setattr(checkpoint, "_PIECE", 1000)

        def change(head):
            head.view(-1)[place] += 1
            return head

        self.add_head(tied, change)
        for attempt in (self.load, lambda path: from_checkpoint(registry.resolve(str(path)), path)):
            with pytest.raises(CheckpointError) as caught:
                attempt(tied)
            for word in ("lm_head.weight", "model.embed_tokens.weight", "set tie_word_embeddings to false"):
                assert word in str(caught.value)

    def test_one_of_another_precision_is_refused(self, tied):
        self.add_head(tied, lambda head: head.half())
        with pytest.raises(CheckpointError, match="tie_word_embeddings"):
            self.load(tied)


class TestWrongTensors:
    @pytest.mark.parametrize(
        "dtype, name", [(torch.int64, "I64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")]
    )
    def test_an_unusable_dtype_is_named_with_its_tensor(self, dtype, name, single):
        rewrite(single / SINGLE, lambda tensors: tensors.update({GATE: tensors[GATE].to(dtype)}))
        refused(single, CheckpointError, GATE, name, "F32, F16, BF16 can be read")

    def test_a_shape_that_is_not_the_configs_is_named(self, single):
        rewrite_json(single / "config.json", lambda config: config.update(intermediate_size=48))
        refused(single, CheckpointError, ".w1.weight", "[96, 64]", "config.json says [48, 64]")

    def test_a_transposed_tensor_is_named(self, single):
        rewrite(single / SINGLE, lambda t: t.update({GATE: t[GATE].t().contiguous()}))
        refused(single, CheckpointError, GATE, "[64, 96]", "config.json says [96, 64]")

    def test_a_shape_that_its_bytes_do_not_have_is_refused(self, single):
        rewrite_header(single / SINGLE, lambda header: header[GATE].update(dtype="BF16"))
        refused(single, CheckpointError, GATE, SINGLE)

    @pytest.mark.parametrize("name", [GATE, NORM, "model.embed_tokens.weight", "lm_head.weight"])
    def test_a_missing_tensor_is_named(self, name, single):
        rewrite(single / SINGLE, lambda tensors: tensors.pop(name))
        refused(single, CheckpointError, name, "missing", "is it a complete Mixtral")

    def test_of_many_missing_tensors_some_are_named_and_the_rest_counted(self, single):
        rewrite_json(single / "config.json", lambda config: config.update(num_hidden_layers=4))
        refused(single, CheckpointError, "model.layers.3.", "and 28 more are missing")

    @pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.3.w"])
    def test_an_extra_tensor_is_named(self, name, single):
        rewrite(single / SINGLE, lambda tensors: tensors.update({name: torch.ones(4)}))
        refused(single, CheckpointError, name, "has no such tensor")

    def test_layers_that_the_config_leaves_out_are_refused(self, single):
        rewrite_json(single / "config.json", lambda config: config.update(num_hidden_layers=2))
        refused(single, CheckpointError, "model.layers.2.", "has no such tensor")

    def test_stored_inverse_frequencies_are_ignored(self, single):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        rewrite(single / SINGLE, lambda tensors: tensors.update({name: torch.ones(8)}))
        assert load(single).generate("the fox", SamplingParams(max_tokens=1))

    def test_a_tensor_in_two_shards_is_named_with_both(self, sharded):
        first, last = shards(sharded)[0], shards(sharded)[-1]
        name, tensor = next(iter(load_file(first).items()))
        rewrite(last, lambda tensors: tensors.update({name: tensor}))
        refused(sharded, CheckpointError, name, first.name, last.name, "keep one")


class TestIndex:
    def test_a_file_that_only_the_index_knows_is_named(self, sharded):
        rewrite_json(sharded / INDEX, lambda index: index["weight_map"].update({NORM: "absent.safetensors"}))
        refused(sharded, CheckpointError, "absent.safetensors", "download it again")

    def test_a_tensor_that_is_in_another_file_is_named(self, sharded):
        def move(index):
            here = index["weight_map"][GATE]
            index["weight_map"][GATE] = next(p.name for p in shards(sharded) if p.name != here)

        rewrite_json(sharded / INDEX, move)
        refused(sharded, CheckpointError, GATE, "but it is not", "download it again")

    def test_a_tensor_that_is_nowhere_is_named(self, sharded):
        name = shards(sharded)[0].name
        rewrite_json(sharded / INDEX, lambda index: index["weight_map"].update({"ghost": name}))
        refused(sharded, CheckpointError, "ghost", name, "download it again")

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\udcff"]
    )
    def test_a_garbage_index_is_named(self, text, sharded):
        (sharded / INDEX).write_bytes(text.encode(errors="surrogateescape"))
        refused(sharded, CheckpointError, INDEX, "download it again")

    def test_an_empty_index_misses_every_tensor(self, sharded):
        (sharded / INDEX).write_text('{"weight_map": {}}')
        refused(sharded, CheckpointError, "missing from the checkpoint")


class TestWrongDirectories:
    def test_no_safetensors_at_all(self, single):
        (single / SINGLE).rename(single / "pytorch_model.bin")
        refused(single, CheckpointError, SINGLE, INDEX, "convert")

    def test_a_missing_tokenizer(self, single):
        for path in single.glob("tokenizer*"):
            path.unlink()
        refused(single, ConfigError, str(single), "tokenizer", "put the model's tokenizer files there")

    def test_a_tokenizer_from_elsewhere_is_used(self, single, mixtral):
        for path in single.glob("tokenizer*"):
            path.unlink()
        assert LLM(single, tokenizer=str(mixtral)).tokenizer("the fox")["input_ids"]

    def test_a_damaged_tokenizer(self, single):
        (single / "tokenizer.json").write_text("{")
        refused(single, ConfigError, str(single), "put the model's tokenizer files there")

    def test_a_directory_without_a_config(self, tmp_path):
        refused(tmp_path, ConfigError, str(tmp_path), "config.json", "give a checkpoint directory")

    def test_a_path_that_does_not_exist(self, tmp_path):
        refused(tmp_path / "absent", ConfigError, "absent", "neither a path nor a known model")

    def test_a_known_name_without_a_download(self):
        refused("mixtral-8x7b", ConfigError, "mixtral-8x7b", "download the model")

    def test_a_file_instead_of_a_directory(self, single):
        refused(single / "config.json", ConfigError, "config.json", "give its directory")

    @pytest.mark.parametrize(
        "key, value",
        [
            ("architectures", ["GPT2LMHeadModel"]),
            ("architectures", None),
            ("hidden_act", "gelu"),
            ("num_hidden_layers", None),
            ("num_hidden_layers", "3"),
            ("num_key_value_heads", 3),
            ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            ("quantization_config", {"quant_method": "fp8"}),
        ],
        ids=str,
    )
    def test_an_unsupported_config_value_is_named(self, key, value, single):
        rewrite_json(single / "config.json", lambda config: config.update({key: value}))
        name = "rope_type" if key == "rope_parameters" else key
        name = "GPT2LMHeadModel" if value == ["GPT2LMHeadModel"] else name
        refused(single, UnsupportedModelError, "config.json", name)
