"""Every weight of a checkpoint lands where it belongs, and reading takes little memory beside it."""

from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import load, rewrite, shards
from moe_lightning.errors import CheckpointError
from moe_lightning.memory import checkpoint
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.memory.weights import allocate
from moe_lightning.models import registry, stored
from stopped_pool import stopped

SINGLE = "model.safetensors"
GATE = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
NORM = "model.norm.weight"


def weights_of(directory, dtype=torch.float32, pages_per_expert=2, resident=(3, 0, 5), **options):
    spec = registry.resolve(str(directory))
    layout = PageLayout.of(spec, pages_per_expert)
    placement = Placement(layout.pages_per_layer, resident, layout.pages_per_layer)
    weights = allocate(spec, layout, placement, dtype, torch.device("cpu"))
    checkpoint.load(checkpoint.open_model(directory, spec), weights, **options)
    return weights


class TestPlacement:
    @pytest.mark.parametrize("pages_per_expert", [1, 2, 3, 96])
    def test_pages_reassemble_to_the_checkpoints_matrices(self, pages_per_expert, mixtral):
        stored = load_file(mixtral / SINGLE)
        weights = weights_of(mixtral, pages_per_expert=pages_per_expert)
        layout = weights.pages.layout
        rows, hidden = layout.rows, layout.hidden_size
        for layer in range(3):
            for expert in range(8):
                first = expert * pages_per_expert
                pages = [weights.pages.home(layer, first + part) for part in range(pages_per_expert)]
                gate, up, down = zip(*(page.split(rows * hidden) for page in pages), strict=True)
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                assert torch.equal(torch.cat(gate).view(-1, hidden), stored[f"{prefix}.w1.weight"])
                assert torch.equal(torch.cat(up).view(-1, hidden), stored[f"{prefix}.w3.weight"])
                columns = [part.view(hidden, rows) for part in down]
                assert torch.equal(torch.cat(columns, dim=1), stored[f"{prefix}.w2.weight"])

    def test_everything_else_is_the_checkpoints(self, mixtral):
        stored, weights = load_file(mixtral / SINGLE), weights_of(mixtral)
        assert torch.equal(weights.embed, stored["model.embed_tokens.weight"])
        assert torch.equal(weights.lm_head, stored["lm_head.weight"])
        assert torch.equal(weights.final_norm, stored[NORM])
        for number, layer in enumerate(weights.layers):
            prefix = f"model.layers.{number}."
            qkv = [stored[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
            assert torch.equal(layer.qkv, torch.cat(qkv))
            assert torch.equal(layer.o, stored[f"{prefix}self_attn.o_proj.weight"])
            assert torch.equal(layer.router, stored[f"{prefix}block_sparse_moe.gate.weight"])
            assert torch.equal(layer.input_norm, stored[f"{prefix}input_layernorm.weight"])
            assert torch.equal(layer.post_norm, stored[f"{prefix}post_attention_layernorm.weight"])

    @pytest.mark.parametrize("resident", [(0, 0, 0), (16, 16, 16), (3, 0, 16)])
    def test_one_file_and_many_give_the_same_bytes(self, resident, mixtral, sharded_mixtral):
        assert len(shards(sharded_mixtral)) > 2
        one, many = (weights_of(path, resident=resident) for path in (mixtral, sharded_mixtral))
        assert torch.equal(one.pages.host, many.pages.host)
        assert torch.equal(one.pages.frames, many.pages.frames)
        assert torch.equal(one.embed, many.embed)
        assert all(torch.equal(a.qkv, b.qkv) for a, b in zip(one.layers, many.layers, strict=True))

    def test_a_tied_head_is_the_embedding_itself(self, checkpoint_of):
        weights = weights_of(checkpoint_of("llama-tied-llama3"), pages_per_expert=4, resident=(1, 0, 2))
        assert weights.lm_head.data_ptr() == weights.embed.data_ptr()

    @pytest.mark.parametrize("stored_as", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("run_as", [torch.float32, torch.float16, torch.bfloat16])
    def test_weights_are_rounded_once_from_any_precision_to_any(self, stored_as, run_as, single):
        def convert(tensors):
            for name in tensors:
                tensors[name] = tensors[name].to(stored_as)

        rewrite(single / SINGLE, convert)
        stored, weights = load_file(single / SINGLE), weights_of(single, run_as, pages_per_expert=1)
        assert torch.equal(weights.embed, stored["model.embed_tokens.weight"].to(run_as))
        page = weights.pages.home(1, 3)
        assert torch.equal(page[: 96 * 64].view(96, 64), stored[GATE].to(run_as))

    def test_files_of_mixed_precision_load(self, single):
        rewrite(single / SINGLE, lambda tensors: tensors.update({GATE: tensors[GATE].half()}))
        page = weights_of(single, pages_per_expert=1).pages.home(1, 3)
        assert torch.equal(page[: 96 * 64].view(96, 64), load_file(single / SINGLE)[GATE].float())


class TestReading:
    @pytest.mark.parametrize("num_readers", [1, 3])
    def test_no_more_than_a_tensor_per_reader_is_held(self, num_readers, mixtral, monkeypatch):
        read, held, larger = checkpoint.read_tensor, {}, []

        def counted(stored, buffer):
            if buffer is None:
                larger.append(stored)
            else:
                held[buffer.data_ptr()] = buffer.nbytes, weakref.ref(buffer)
            return read(stored, buffer)

        monkeypatch.setattr(checkpoint, "read_tensor", counted)
        weights_of(mixtral, num_readers=num_readers)
        stored = checkpoint.open_checkpoint(mixtral)
        largest = max(tensor.num_bytes for name, tensor in stored.items() if ".experts." in name)
        assert 1 <= len(held) <= num_readers
        assert all(largest <= size < largest + 64 and is_there() is None for size, is_there in held.values())
        assert {tensor.name for tensor in larger} == {
            name for name, tensor in stored.items() if tensor.num_bytes > largest
        }

    def test_progress_ends_at_all_bytes(self, mixtral):
        seen = []
        weights = weights_of(mixtral, progress=lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen)
        assert seen[-1] == (weights.num_bytes, weights.num_bytes)

    def test_the_first_error_stops_the_reading(self, mixtral, monkeypatch):
        num_read, is_stopped = 0, stopped(checkpoint, monkeypatch)

        def failing(stored, buffer):
            nonlocal num_read
            num_read += 1
            if num_read > 1:  # begun before the first error was heard of
                is_stopped.wait()
            raise CheckpointError(f"cannot read {stored.name}")

        monkeypatch.setattr(checkpoint, "read_tensor", failing)
        with pytest.raises(CheckpointError, match="cannot read"):
            weights_of(mixtral, num_readers=1)
        assert num_read <= 2

    @pytest.mark.parametrize("kind", ["mixtral", "sharded_mixtral"])
    def test_a_load_reads_the_header_of_each_file_once(self, kind, request, monkeypatch):
        directory, read, seen = request.getfixturevalue(kind), stored._read_header, []

        def counted(path, has_weights):
            seen.append(path.name)
            return read(path, has_weights)

        monkeypatch.setattr(stored, "_read_header", counted)
        load(directory)
        assert sorted(seen) == sorted(path.name for path in directory.glob("*.safetensors"))
