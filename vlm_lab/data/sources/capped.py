"""At most so many records of a source: Cambrian-1's cap t, which keeps large sources from drowning small ones."""

from vlm_lab.data.sample import Sample, Source
from vlm_lab.data.sources.common import check_index, digest


class Capped:
    """`cap` records of `source` (arXiv 2406.16860, section 5.2), evenly spread over it; all if it has no more."""

    def __init__(self, source: Source, cap: int) -> None:
        self.source, self.cap = source, cap

    def __len__(self) -> int:
        return min(self.cap, len(self.source))

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        return self.source[index * len(self.source) // len(self)]

    def fingerprint(self) -> str:
        return digest("capped", self.source.fingerprint(), self.cap)
