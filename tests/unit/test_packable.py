"""A look at a checkpoint's experts says whether they can be packed."""

from __future__ import annotations

import torch

from moe_lightning.memory import checkpoint, packable
from moe_lightning.models import registry


def test_weights_whose_exponents_lie_close_together_can_be_packed(mixtral):
    tensors = checkpoint.open_model(mixtral, registry.resolve(str(mixtral)))
    assert packable.is_packable(tensors)


def test_weights_whose_exponents_are_anything_cannot(mixtral, monkeypatch):
    def anything(stored):
        bits = torch.randint(-(2**15), 2**15, stored.shape, generator=torch.Generator().manual_seed(1))
        return bits.to(torch.int16).view(torch.bfloat16)

    monkeypatch.setattr(packable, "read_tensor", anything)
    assert not packable.is_packable(checkpoint.open_model(mixtral, registry.resolve(str(mixtral))))
