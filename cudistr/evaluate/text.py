"""English technical prose that every Python carries: the language reference inside ``pydoc_data.topics``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import require

__all__ = ["prose", "tokenise"]


def prose() -> str:
    """All topics, one after the other. The text depends on the version of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenise(text: str, vocabulary: list[str], merges: list[str]) -> NDArray[np.int32]:
    """Tokens of a text: byte-level BPE, digits one by one, as SmolLM2 was trained."""
    tokenizers = require("tokenizers", "tokenizers")
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    words = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, pairs))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return np.array(tokenizer.encode(text).ids, np.int32)
