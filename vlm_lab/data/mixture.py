"""Mixtures: draw number -> (source, record), a pure function of the seed.

Every draw has a number. A counter-based generator keyed (seed, block) says which source it is from, and a permutation
keyed (seed, source, epoch) which record. So the state of a run is one integer, the same on every rank, exact for any
number of workers, and seeking costs one pass over the blocks before.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLOCK = 4096  # draws per block


class Mixture:
    """`sizes` records per source, relative `weights`. `mixture[i] -> (source number, record index)`."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if len(sizes) != len(weights) or not sizes:
            raise ValueError(f"a mixture needs as many weights as sources, got {len(weights)} and {len(sizes)}")
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError(f"mixture weights must not be negative nor all zero, got {list(weights)}")
        self.sizes, self.seed = list(sizes), seed
        self.weights = np.array(weights, dtype=np.float64) / sum(weights)
        self.drawn = [np.zeros(len(sizes), dtype=np.int64)]  # per block: draws of each source before it

    def __getitem__(self, draw: int) -> tuple[int, int]:
        block, offset = divmod(draw, BLOCK)
        choices = self.choices(block)
        source = int(choices[offset])
        nth = int(self.before(block)[source] + np.count_nonzero(choices[:offset] == source))
        epoch, index = divmod(nth, self.sizes[source])
        return source, int(permutation(self.seed, source, epoch, self.sizes[source])[index])

    def choices(self, block: int) -> np.ndarray:
        """Source of each draw of a block, [BLOCK]."""
        return block_choices(self.seed, block, tuple(self.weights))

    def before(self, block: int) -> np.ndarray:
        while len(self.drawn) <= block:
            counts = np.bincount(self.choices(len(self.drawn) - 1), minlength=len(self.sizes))
            self.drawn.append(self.drawn[-1] + counts)
        return self.drawn[block]


@lru_cache(maxsize=64)
def block_choices(seed: int, block: int, weights: tuple[float, ...]) -> np.ndarray:
    return generator(seed, 0, block).choice(len(weights), size=BLOCK, p=weights)


@lru_cache(maxsize=32)
def permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    return generator(seed, 1 + source, epoch).permutation(size)


def generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
