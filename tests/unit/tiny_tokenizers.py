"""Tokenizers small enough to build in a test, of the two kinds that MoE models come with."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>"]
MERGED = ["he", "ll", "hell", "wor", "ld", "\u0120wor", "\u0120a", "\u0120\u0120"]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2 and Llama 3: any bytes, any split of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet + MERGED)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def byte_level_ids(text: str) -> list[int]:
    """One token of `byte_level` for each byte of the text."""
    tokenizer = byte_level()
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids([char for piece, _ in pieces for char in piece])


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As of Llama 2 and Mixtral: a leading space is dropped; unknown characters become byte tokens."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["\u2581", "\u2581hello", "\u2581a", "\u2581\u2581", "lo", "\u4f60", ".", ",", "\ufffd"]
    tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return _wrap(tokenizer)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As of T5-like checkpoints: the Metaspace decoder drops the space before the first word."""
    tokens = ["<unk>", "\u2581", "\u2581a", "\u2581hello", "\u2581world", "s", "ing", "\u4f60", "."]
    tokenizer = Tokenizer(models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer)


class WithoutBackend:
    """A tokenizer that can only decode in full, as slow ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._tokenizer)

    def decode(self, token_ids, skip_special_tokens=False, **options):
        """Text of the ids."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **options)


ALL = {
    "byte_level": byte_level,
    "sentencepiece_like": sentencepiece_like,
    "metaspace": metaspace,
    "slow_byte_level": lambda: WithoutBackend(byte_level()),
    "slow_sentencepiece_like": lambda: WithoutBackend(sentencepiece_like()),
}
