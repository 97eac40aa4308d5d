"""Pictures with a raw and a synthetic caption, from WebDataset tar shards or parquet: for encoder pretraining.

A record is a one-turn conversation whose answer is the synthetic caption (the raw one if there is none); `meta["raw"]`
(a text or several) and `meta["synthetic"]` are what data/pretrain.py reads. Nothing is decoded.

    WebDataset("shards/", raw="txt", synthetic="json:re_caption")         img2dataset's layout of Recap-DataComp-1B
    CaptionParquet("rows/", raw="org_caption", synthetic="re_caption")    a table with the pictures in it
"""

import json
from pathlib import Path
from typing import Any

from vlm_lab.data.sample import BadRecord, ImageRef, ImageSlot, Message, Sample
from vlm_lab.data.sources.common import Unusable, check_index, digest, files_below, images_first, text
from vlm_lab.data.sources.parquet_rows import ParquetRows, read_schema
from vlm_lab.data.sources.tar_index import TarShards

REQUEST = "Describe the image."


class WebDataset:
    """`path`: a folder of `.tar` shards (searched to any depth) or one of them.

    `image`: the extensions that a picture may have. `raw`, `synthetic`: the extension of the member with that caption,
    `extension:field` for a field of a JSON member, or None if the data set has none.
    """

    def __init__(
        self,
        path: str,
        image: tuple[str, ...] | list[str] = ("jpg", "jpeg", "png", "webp"),
        raw: str | None = "txt",
        synthetic: str | None = "json:re_caption",
    ) -> None:
        _check_names(raw, synthetic)
        self.folder, files = files_below(Path(path), "tar", "tar shard")
        self.raw, self.synthetic = raw, synthetic
        texts = {name.partition(":")[0]: None for name in (raw, synthetic) if name}  # both may be in one JSON member
        self._places = {extension: 1 + number for number, extension in enumerate(texts)}
        self._shards = TarShards(files, (tuple(image), *((extension,) for extension in texts)))
        if not len(self):
            raise ValueError(
                f"data.path = {path}: no sample with {', '.join(image)}, {' or '.join(texts)} in its shards"
            )

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        file, row = self._shards.locate(index)
        key = self._shards.key(file, row)
        try:
            parts = self._shards.read(file, row)
            if parts[0] is None:
                raise Unusable("has no picture")
            raw, synthetic = (self._caption(name, parts) for name in (self.raw, self.synthetic))
            name = f"{file.relative_to(self.folder)}:{key}"
            return caption_sample(name, parts[0], raw, synthetic, str(self.folder))
        except Unusable as reason:
            raise BadRecord(str(file), key, str(reason)) from None

    def fingerprint(self) -> str:
        names = [str(file.relative_to(self.folder)) for file in self._shards.files]
        return digest("webdataset", names, self._shards.fingerprint(), self.raw, self.synthetic)

    def _caption(self, name: str | None, parts: list[bytes | None]) -> Any:
        if name is None:
            return None
        extension, colon, field = name.partition(":")
        data = parts[self._places[extension]]
        if data is None:
            return None
        try:
            return json.loads(data).get(field) if colon else data.decode()
        except (ValueError, AttributeError):
            raise Unusable(f"`{extension}` is not {'a JSON object' if colon else 'UTF-8'}") from None


class CaptionParquet:
    """`path`: a folder of parquet files (searched to any depth) or one. `image`: a column of bytes, or of structs with
    `bytes`; `raw` (a text or a list of texts), `synthetic`: columns, or None if the data set has none."""

    def __init__(
        self,
        path: str,
        image: str = "image",
        raw: str | None = "raw_caption",
        synthetic: str | None = "synthetic_caption",
    ) -> None:
        _check_names(raw, synthetic)
        self.folder, files = files_below(Path(path), "parquet", "parquet file")
        self.image, self.raw, self.synthetic = image, raw, synthetic
        columns = list(dict.fromkeys(name for name in (image, raw, synthetic) if name))
        for file in files:
            if missing := set(columns) - set(names := read_schema(file).names):
                raise ValueError(f"data.path: {file} has no column {', '.join(sorted(missing))}; there are {names}")
        self._rows = ParquetRows(files, columns)
        if not len(self):
            raise ValueError(f"data.path = {path} has no rows; give a data set with at least one")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        file, row = self._rows.locate(index)
        try:
            record = self._rows.row(file, row)
            image = record[self.image]
            image = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(image, bytes):
                raise Unusable(f"`{self.image}` has no bytes; pictures must be embedded")
            raw, synthetic = (record[name] if name else None for name in (self.raw, self.synthetic))
            return caption_sample(f"{file.relative_to(self.folder)}:{row}", image, raw, synthetic, str(self.folder))
        except Unusable as reason:
            raise BadRecord(str(file), f"row {row}", str(reason)) from None

    def fingerprint(self) -> str:
        names = [str(file.relative_to(self.folder)) for file in self._rows.files]
        return digest("captions", names, self._rows.fingerprint(), self.image, self.raw, self.synthetic)


def caption_sample(name: str, image: ImageRef, raw: Any, synthetic: Any, where: str) -> Sample:
    """The record that both readers make. Unusable if it says nothing at all."""
    raw = [text(one, "raw caption") for one in raw] if isinstance(raw, list) else text(raw or "", "raw caption")
    synthetic = text(synthetic or "", "synthetic caption")
    said = synthetic if synthetic.strip() else next((one for one in _alternatives(raw) if one.strip()), "")
    if not said:
        raise Unusable("has no caption")
    question = Message("user", images_first((ImageSlot(0),), (REQUEST,)))
    meta = {"raw": raw, "synthetic": synthetic}
    return Sample(name, (question, Message("assistant", (said,))), (image,), "captions", "captions", meta, where)


def _alternatives(raw: str | list[str]) -> list[str]:
    return [raw] if isinstance(raw, str) else raw


def _check_names(raw: str | None, synthetic: str | None) -> None:
    if raw is None and synthetic is None:
        raise ValueError("raw = null and synthetic = null: name where at least one caption is")
