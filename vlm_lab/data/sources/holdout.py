"""Splits any source in two: records to train on, and a few held out for evaluation.

The choice depends on the number of records, `count` and `seed` only. It is made by record: where several show one
picture (LLaVA JSON with a question a record) or are near-copies (NLVR's six permutations of a scene), both parts see
it. Use a split that the data set's authors made where there is one.
"""

import random
from typing import Literal

import numpy as np

from vlm_lab.data.sample import Sample, Source
from vlm_lab.data.sources.common import check_index, digest


class Holdout:
    """`part`: "eval" is `count` records of `source` drawn with `seed`; "train" is all the others, in their order."""

    def __init__(self, source: Source, part: Literal["train", "eval"], count: int, seed: int = 0) -> None:
        if part not in ("train", "eval"):
            raise ValueError(f"a hold-out has the parts train and eval, not {part}")
        if not 0 < count < len(source):
            raise ValueError(
                f"data.holdout = {count} must be between 1 and {len(source) - 1}: the source has {len(source)} records"
            )
        self.source, self.part, self.count, self.seed = source, part, count, seed
        self._held = np.array(sorted(random.Random(seed).sample(range(len(source)), count)))

    def __len__(self) -> int:
        return self.count if self.part == "eval" else len(self.source) - self.count

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        if self.part == "eval":
            return self.source[int(self._held[index])]
        # held[j] - j records are kept before held[j], so this counts the held-out records before the index-th kept one
        before = np.searchsorted(self._held - np.arange(self.count), index, side="right")
        return self.source[index + int(before)]

    def fingerprint(self) -> str:
        return digest("holdout", self.source.fingerprint(), self.part, self.count, self.seed)
