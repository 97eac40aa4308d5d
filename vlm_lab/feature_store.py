"""Features of frozen encoders on the disk: rows of one size, found by what they were computed from, memory-mapped.

A folder belongs to one encoder with its weights, at one precision. Each process appends to a segment of its own and
publishes it by writing the keys behind the rows, so no lock is needed, and a process that is killed leaves nothing that
is read. Two processes may compute the same row; the first one found is used. A full disk ends the writing, not the run.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm_lab.files import in_place, remove

KEY = 16  # bytes


class FeatureStore:
    """Rows of `size` bytes below `folder`, by 16-byte keys; what was there at the start, and what is added."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.places: dict[bytes, tuple[int, int]] = {}  # key -> (segment, row)
        self.segments: list[np.ndarray] = []  # each [rows, size]
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.keys")):
            self.open(path)
        self.path = folder / f"{os.getpid()}-{os.urandom(4).hex()}.rows"
        self.file = self.path.open("wb", buffering=0)
        self.keys: list[bytes] = []  # of this process's segment
        self.published = 0
        self.full = ""  # why nothing more is written
        self.segments.append(np.empty((0, size), dtype=np.uint8))

    def open(self, path: Path) -> None:
        raw, rows = path.read_bytes(), path.with_suffix(".rows")
        count = len(raw) // KEY
        if count and rows.is_file() and rows.stat().st_size >= count * self.size:
            for row in range(count):
                self.places.setdefault(raw[row * KEY : (row + 1) * KEY], (len(self.segments), row))
            self.segments.append(np.memmap(rows, dtype=np.uint8, mode="r", shape=(count, self.size)))

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def read(self, keys: Sequence[bytes], out: np.ndarray) -> None:
        """Copy the rows of `keys` to `out` [len(keys), size]."""
        for index, key in enumerate(keys):
            segment, row = self.places[key]
            if row >= len(self.segments[segment]):  # added since this process's own segment was mapped
                mapped = np.memmap(self.path, dtype=np.uint8, mode="r", shape=(len(self.keys), self.size))
                self.segments[segment] = mapped
            out[index] = self.segments[segment][row]

    def add(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        """Append the rows [len(keys), size] whose keys are new."""
        for key, row in zip(keys, rows, strict=True):
            if key in self.places or self.full:
                continue
            try:
                if self.file.write(row.data) != self.size:
                    raise OSError("the disk is full")
            except OSError as error:
                self.full = str(error)
                continue
            self.places[key] = len(self.segments) - 1, len(self.keys)
            self.keys.append(key)
        if len(self.keys) - self.published >= 512:
            self.publish()

    def publish(self) -> None:
        """Let others find what was added."""
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_bytes(b"".join(self.keys))
            in_place(partial, self.path.with_suffix(".keys"))
        except OSError as error:
            self.full = str(error)
            remove(partial)
        self.published = len(self.keys)

    def close(self) -> None:
        self.file.close()
        if self.keys:
            self.publish()
        else:
            remove(self.path)

    @property
    def bytes_free(self) -> int:
        return shutil.disk_usage(self.folder).free
