"""Random access to the rows of parquet files.

Parquet hands out whole row groups, often hundreds of MB, so a file is rewritten once as Arrow, where a row costs
microseconds: in memory (per process) for a small data set, else as a memory-mapped file, shared by all workers and
ranks, in `$XDG_CACHE_HOME/vlm_lab/arrow` (default `~/.cache`), which takes as much disk as the data set and is never
cleaned up: delete it when you like. Rewriting a file holds about one of its row groups in memory. Two processes that
need it at the same time may both do so, harmlessly.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_lab.data.sample import BadRecord
from vlm_lab.data.sources.common import digest, file_hash

BATCH = 64  # rows per Arrow batch
IN_MEMORY = 64 * 1024**2  # bytes of all files together; above it the Arrow file goes to disk
HASHED_WHOLE = 1024**3  # bytes of all files together; above it `fingerprint` samples (1 GiB takes about a second)


class ParquetRows:
    """`columns` of `files`, in the files' order; opens them when they are first needed, so it pickles small."""

    def __init__(self, files: list[Path], columns: list[str]) -> None:
        self.files, self.columns = files, columns
        self.ends = np.cumsum([pq.read_metadata(file).num_rows for file in files])
        self.bytes = sum(file.stat().st_size for file in files)
        self._open: dict[Path, ArrowFile] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[Path, int]:
        """The file that holds row `index` of all, and the row's number in it, from 0."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.files[number], index - (int(self.ends[number - 1]) if number else 0)

    def row(self, file: Path, row: int) -> dict[str, Any]:
        """Column -> value. Raises `BadRecord` if the file cannot be read."""
        if file not in self._open:
            self._open[file] = ArrowFile(file, self.columns, in_memory=self.bytes <= IN_MEMORY)
        return self._open[file][row]

    def column(self, name: str, field: str) -> Iterator[Any]:
        """A column of lists of structs, row by row, of which only `field` is read from disk."""
        for file in self.files:
            leaves = pq.read_metadata(file).schema  # "texts.list.element.source", or "item" in files of older writers
            paths = [leaves.column(number).path for number in range(len(leaves))]
            path = next(path for path in paths if path.startswith(f"{name}.") and path.endswith(f".{field}"))
            for batch in _batches(file, [path]):
                yield from batch.column(0).to_pylist()

    def lengths(self, name: str) -> np.ndarray:
        """How long the lists in a column are, row by row; -1 where there is none. Reads the whole column."""
        batches = [batch for file in self.files for batch in _batches(file, [name])]
        found = [batch.column(0).value_lengths().fill_null(-1).to_numpy() for batch in batches]
        return np.concatenate([np.zeros(0, dtype=np.int64), *found])

    def fingerprint(self) -> str:
        """Of content; above 1 GiB (all files together) of each file's size, first MiB and last, where the footer is.

        So in a very large data set an edit that keeps sizes, footer statistics and both ends goes unnoticed.
        """
        return digest([file_hash(file, whole=self.bytes <= HASHED_WHOLE) for file in self.files])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class ArrowFile:
    """One parquet file's rows as Arrow. Holds no file descriptor: there may be thousands of files."""

    def __init__(self, file: Path, columns: list[str], in_memory: bool) -> None:
        if in_memory:
            sink = pa.BufferOutputStream()
            _rewrite(file, columns, sink)
            buffer = sink.getvalue()
        else:
            with pa.memory_map(str(_cached(file, columns))) as mapped:
                buffer = mapped.read_buffer()  # stays mapped as long as the buffer lives
        self.reader = pa.ipc.open_file(buffer)
        sizes = [self.reader.get_batch(number).num_rows for number in range(self.reader.num_record_batches)]
        self.ends = np.cumsum(sizes)

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.ends, row, side="right"))
        start = int(self.ends[number - 1]) if number else 0
        return self.reader.get_batch(number).slice(row - start, 1).to_pylist()[0]


def read_schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data.path: {file} is not readable parquet ({' '.join(str(error).split())})") from None


def _cached(file: Path, columns: list[str]) -> Path:
    """The Arrow copy of `file`, made if it is not there. Renamed into place, so that no one sees half of it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm_lab" / "arrow"
    stat = file.stat()
    cached = folder / f"{digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns, columns)}.arrow"
    if cached.exists():
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        part = Path(scratch) / cached.name
        with pa.OSFile(str(part), "wb") as sink:
            _rewrite(file, columns, sink)
        part.replace(cached)
    return cached


def _rewrite(file: Path, columns: list[str], sink: pa.NativeFile) -> None:
    batches = _batches(file, columns)
    first = next(batches)
    with pa.ipc.new_file(sink, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Threads stay off: this runs in DataLoader workers, of which there are enough."""
    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            yield from parquet.iter_batches(BATCH, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise BadRecord(str(file), "whole file", f"cannot be read as parquet: {reason}") from error
