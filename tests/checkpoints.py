"""Tiny random checkpoints, as transformers writes them, and what transformers computes from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_lightning import LLM
from moe_lightning.policy import Policy

NUM_LAYERS = 3
NUM_EXPERTS = 8
MAX_POSITION = 256
LOGIT_STD = 3.0  # the largest of a few hundred such logits is about 10
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
_SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITION,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
# Scalings for contexts so short that both ends of the range are met within a test's prompt.
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# Per kind: class names and values of the config, and those that take the kind's option away again.
KINDS = {
    "mixtral": ("Mixtral", {**_EXPERTS, "tie_word_embeddings": False}, {"num_experts_per_tok": 1}),
    "llama-tied-llama3": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": _LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "llama-linear": (
        "Llama",
        {"tie_word_embeddings": False, "rope_parameters": _LINEAR},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "mistral-window": (
        "Mistral",
        {"sliding_window": 8, "tie_word_embeddings": False},
        {"sliding_window": None},
    ),
}


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with a chat template, a few merges and fewer tokens than the models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def random_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A model with weights that matter: no norm is one, no logit is small."""
    name, values, _ = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**_SHAPE, **values)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        logits = model(torch.arange(3, 103)[None]).logits
        model.model.norm.weight.mul_(LOGIT_STD / logits.std())
    return model


def write_checkpoint(
    directory: Path, kind: str, dtype: torch.dtype = torch.float32, **options: object
) -> Path:
    """A checkpoint of one kind with its tokenizer; options go to `save_pretrained`."""
    random_model(kind).to(dtype).save_pretrained(directory, **options)
    write_tokenizer(directory)
    return directory


def reference(directory: Path, dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
    """The checkpoint as transformers runs it; changes are values of its config."""
    config = transformers.AutoConfig.from_pretrained(directory)
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def reference_logprobs(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """[T, V] float32: what may follow each token of one sequence."""
    return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


def greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Greedy tokens, each from a whole new forward pass, and the smallest lead that one had over the second."""
    token_ids, margin = list(prompt), float("inf")
    for _ in range(num_tokens):
        top = reference_logprobs(model, token_ids)[-1].topk(2)
        margin = min(margin, float(top.values[0] - top.values[1]))
        token_ids.append(int(top.indices[0]))
    return token_ids[len(prompt) :], margin


def prompts_of(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, _SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def tiny_policy(**changes: object) -> Policy:
    """A policy under which every kind of task has work: streamed pages, several chunks and micro-batches."""
    values: dict[str, object] = {
        "max_num_seqs": 8, "micro_batch_size": 3, "group_size": 2, "look_ahead": 2, "prefill_tokens": 256,
        "chunk_tokens": 24, "pages_per_expert": 2, "resident_pages": (1, 0, 2), "num_frames": 20,
        "num_blocks": 64, "block_size": 16,
    }  # fmt: skip
    return Policy(**{**values, **changes})


def load(
    directory: Path, *, executor: str = "serial", device: str = "cpu", dtype: str = "auto", **changes: object
) -> LLM:
    """The checkpoint under `tiny_policy` with changes."""
    return LLM(directory, policy=tiny_policy(**changes), executor=executor, device=device, dtype=dtype)


def shards(directory: Path) -> list[Path]:
    """The weight files of a sharded checkpoint."""
    return sorted(directory.glob("model-*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
