"""Tokenizers: a checkpoint's own, or a stand-in for a model without one."""

from __future__ import annotations

from typing import Any

from moe_lightning.errors import ConfigError


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a directory.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer  # takes a second: not before it is needed

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {path} ({str(error).splitlines()[0]}); "
            "put the model's tokenizer files there or name their directory with tokenizer"
        ) from error


def dummy_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of a model of random weights: token 17 is the word ``w17``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
