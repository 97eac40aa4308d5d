"""OBELICS parquet (arXiv 2306.16527): `images` and `texts`, two lists of one length, one of the two null at each place.

    images: [null, "a.jpg", null]    texts: ["A bridge.", null, "It is old."]     three units: text, image, text

An image is bytes, `struct<bytes, path>`, or a path below `root`. The release has only addresses of images on the web;
nothing is downloaded, so such a document is a bad record: fetch the images, and put their bytes or paths in place.

Documents shorter than `MIN_UNITS` units are left out, and a long one is cut into runs, as Idefics2's authors do (they
count tokens where units are counted here): one of n units gives `max(1, n // max_units)` records, each `max_units`
neighbouring units. Where a run starts is drawn for each, from (seed, document, run): every unit is as likely, images
three times as likely, for what follows an image is often about it. Runs of a document may overlap, and an end may be in
none. Its length is known from the column `texts`, which is read once when the reader is built.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm_lab.data.sample import BadRecord, ImageRef, ImageSlot, Sample, document
from vlm_lab.data.sources.common import Unusable, check_index, digest, file_below, files_below, text
from vlm_lab.data.sources.parquet_rows import ParquetRows, read_schema

MIN_UNITS = 5
IMAGE_WEIGHT = 3  # of starting at an image; at a text it is 1


class Obelics:
    """`path`: a folder of parquet files (searched to any depth) or one file. `root`: the folder of image paths.

    `max_units`: units of one record at most; null keeps documents whole. `seed` decides where runs start.
    """

    def __init__(self, path: str, root: str | None = None, max_units: int | None = None, seed: int = 0) -> None:
        if max_units is not None and max_units < MIN_UNITS:
            raise ValueError(f"max_units = {max_units}: a record has at least {MIN_UNITS} units")
        self.folder, files = files_below(Path(path), "parquet", "parquet file")
        for file in files:
            _check_schema(file)
        self.root = Path(os.path.realpath(root or self.folder))
        self.max_units, self.seed = max_units, seed
        self._rows = ParquetRows(files, ["images", "texts"])
        units = self._rows.lengths("texts")
        self._kept = np.flatnonzero((units >= MIN_UNITS) | (units < 0))  # one without `texts` stays, to be reported
        runs = units[self._kept] // (max_units or max(1, units.max(initial=1)))
        self._ends = np.cumsum(np.maximum(1, runs))
        if not len(self):
            raise ValueError(
                f"data.path = {path} has no document of at least {MIN_UNITS} units; give one that has some"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        kept = int(np.searchsorted(self._ends, index, side="right"))
        number, run = int(self._kept[kept]), index - (int(self._ends[kept - 1]) if kept else 0)
        file, row = self._rows.locate(number)
        try:
            units = _units(self._rows.row(file, row))
            start = self._start(units, number, run)
            shown = [self._unit(unit) for unit in units[start : self.max_units and start + self.max_units]]
        except Unusable as reason:
            raise BadRecord(str(file), f"row {row}", str(reason)) from None
        images = [unit for unit in shown if not isinstance(unit, str)]
        slots = iter(range(len(images)))
        content = document(unit if isinstance(unit, str) else ImageSlot(next(slots)) for unit in shown)
        name = f"{file.relative_to(self.folder)}:{row}" + (f"#{run}" if self.max_units else "")
        return Sample(name, (content,), tuple(images), "obelics", "document", file=str(self.folder))

    def fingerprint(self) -> str:
        """Of the parquet files, see `ParquetRows.fingerprint`, and of the choice of runs. Images in files are not."""
        names = [str(file.relative_to(self.folder)) for file in self._rows.files]
        root = os.path.relpath(self.root, self.folder.resolve())
        return digest("obelics", names, self._rows.fingerprint(), root, self.max_units, self.seed)

    def _start(self, units: list[Any], number: int, run: int) -> int:
        starts = len(units) - (self.max_units or len(units)) + 1
        if starts <= 1:
            return 0
        weights = np.array([1 if isinstance(unit, str) else IMAGE_WEIGHT for unit in units[:starts]])
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number, run])))
        return int(np.searchsorted(np.cumsum(weights), rng.integers(weights.sum()), side="right"))

    def _unit(self, unit: str | dict[str, Any]) -> str | ImageRef:
        """A text as it is; an image as bytes or as a file below `root`."""
        if isinstance(unit, str):
            return unit
        if unit["bytes"] is not None:
            return unit["bytes"]
        relative = text(unit["path"], "an image's `path`")
        if "://" in relative:
            raise Unusable(f"image {relative[:80]} is on the web; fetch it, and give its bytes or a path")
        return file_below(self.root, relative, "image")


def _units(record: dict[str, Any]) -> list[str | dict[str, Any]]:
    """Texts, and images as {bytes, path}, in reading order."""
    images, texts = record["images"], record["texts"]
    if images is None or texts is None:
        raise Unusable(f"has no `{'images' if images is None else 'texts'}`")
    if len(images) != len(texts):
        raise Unusable(f"has {len(images)} `images` for {len(texts)} `texts`")
    return [_one(number, *pair) for number, pair in enumerate(zip(images, texts, strict=True), 1)]


def _one(number: int, image: Any, words: str | None) -> str | dict[str, Any]:
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path") is None:
        image = None
    if (image is None) == (words is None):
        raise Unusable(f"unit {number} has {'neither an image nor' if image is None else 'both an image and'} a text")
    if image is None:
        return text(words, f"unit {number}")
    if isinstance(image, dict):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    return {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": image}


def _check_schema(file: Path) -> None:
    expected = "expected are images: list<string>, list<binary> or list<struct<bytes, path>>, and texts: list<string>"
    schema = read_schema(file)
    for column, takes in (("images", _is_image), ("texts", _is_text)):
        if column not in schema.names:
            raise ValueError(f"data.path: {file} has no column `{column}` but {schema.names}; {expected}")
        kind = schema.field(column).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not takes(kind.value_type):
            raise ValueError(f"data.path: {file}: column `{column}` is {kind}; {expected}")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} & {field.name for field in kind} != set()
    return _is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
