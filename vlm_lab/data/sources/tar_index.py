"""Random access to the samples of WebDataset tar shards: an index of every member's place, built once and kept.

Members `<key>.<extension>` with the same key are one sample. The index of a shard is one memory-mapped array in
`$XDG_CACHE_HOME/vlm_lab/tar` (default `~/.cache`), about 100 bytes a sample, so that a record costs one seek, whatever
order a mixture draws in. Nothing is decoded here. Compressed archives have no random access and are refused.
"""

import os
import tarfile
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlm_lab.data.sources.common import Unusable, digest, file_hash

HASHED_WHOLE = 1024**3  # bytes of all shards together; above it `fingerprint` samples
MISSING, DAMAGED = -1, -2  # in place of an offset
KEY = 200  # bytes of a key that are kept

Extensions = tuple[tuple[str, ...], ...]  # for each part of a sample, the extensions that it may have


class TarShards:
    """The samples of `files`, in order. `parts` names what a sample is made of, by extension; the rest is skipped."""

    def __init__(self, files: list[Path], parts: Extensions) -> None:
        self.files, self.parts = files, parts
        self.ends = np.cumsum([len(open_index(index_file(file, parts))) for file in files])
        self.bytes = sum(file.stat().st_size for file in files)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[Path, int]:
        """The shard that holds sample `index` of all, and the sample's number in it, from 0."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.files[number], index - (int(self.ends[number - 1]) if number else 0)

    def key(self, file: Path, row: int) -> str:
        return open_index(index_file(file, self.parts))["key"][row].decode(errors="replace")

    def read(self, file: Path, row: int) -> list[bytes | None]:
        """The sample's parts, None for one that it does not have. Unusable if the archive ends before its time."""
        spans = open_index(index_file(file, self.parts))["span"][row]  # [parts, (offset, size)]
        if spans[0, 0] == DAMAGED:
            raise Unusable("the archive is damaged from here on")
        with file.open("rb") as stream:
            return [
                None if offset == MISSING else _bytes(stream.fileno(), int(offset), int(size)) for offset, size in spans
            ]

    def fingerprint(self) -> str:
        """Of content; above 1 GiB (all shards together) of each one's size, first MiB and last."""
        return digest(self.parts, [file_hash(file, whole=self.bytes <= HASHED_WHOLE) for file in self.files])


def _bytes(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) < size:
        raise Unusable(f"the archive ends {size - len(data)} bytes too early")
    return data


@lru_cache(maxsize=1024)
def open_index(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@lru_cache(maxsize=4096)
def index_file(file: Path, parts: Extensions) -> Path:
    """The shard's index, made if it is not there. Renamed into place, so that no one sees half of it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm_lab" / "tar"
    stat = file.stat()
    cached = folder / f"{digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns, parts)}.npy"
    if not cached.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            part = Path(scratch) / cached.name
            np.save(part, scan(file, parts))
            part.replace(cached)
    return cached


def scan(file: Path, parts: Extensions) -> np.ndarray:
    """One record per sample: its key and its parts' (offset, size). Reads the headers only.

    An archive that breaks off gets one more record, which reports it when it is read. ValueError if it is no tar.
    """
    places = {extension: number for number, part in enumerate(parts) for extension in part}
    samples: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                key, extension = split_name(member.name)
                if member.isfile() and extension in places:
                    spans = samples.setdefault(key, np.full((len(parts), 2), MISSING))
                    spans[places[extension]] = member.offset_data, member.size
    except tarfile.TarError as error:
        if not samples:
            raise ValueError(f"data.path: {file} is not an uncompressed tar archive ({error})") from None
        samples[f"after {next(reversed(samples))}"] = np.full((len(parts), 2), DAMAGED)
    return table(samples, len(parts))


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file's name, the extension is what follows it."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def table(samples: dict[str, np.ndarray], parts: int) -> np.ndarray:
    out = np.zeros(len(samples), dtype=[("key", f"S{KEY}"), ("span", "<i8", (parts, 2))])
    out["key"] = [key.encode()[-KEY:] for key in samples]
    if samples:
        out["span"] = np.stack(list(samples.values()))
    return out
