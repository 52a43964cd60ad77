"""Random token ids that no cache can have seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.common.prompts import Ids

FIRST_ID = 2  # of those that are drawn: shapes with dummy weights call 0 and 1 BOS and EOS


class FreshIds:
    """Sequences of random ids, of which each begins with another id than those before it.

    Two of them that follow the same tokens therefore share no cached token. First ids come again
    only after all ids of the vocabulary have been one.

    Args:
        vocab: size of the vocabulary.
        seed: the same seed draws the same sequences.
    """

    def __init__(self, vocab: int, seed: int) -> None:
        self._vocab = vocab
        self.random = np.random.default_rng(seed)
        self._firsts = self.random.permutation(np.arange(FIRST_ID, vocab))
        self._drawn = 0

    def sequence(self, length: int) -> Ids:
        """One sequence of ``length`` ids, 1 or more."""
        ids = self.random.integers(FIRST_ID, self._vocab, length)
        ids[0] = self._firsts[self._drawn % len(self._firsts)]
        self._drawn += 1
        return ids.tolist()


def vocab_of(model: str) -> int:
    """Size of a model's vocabulary, by its ``config.json``."""
    path = Path(model) / "config.json"
    size = json.loads(path.read_text()).get("vocab_size") if path.exists() else None
    if size is not None:
        return size
    from transformers import AutoConfig  # takes many seconds to import

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size
