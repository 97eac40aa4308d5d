"""The Cauldron's parquet: `images: list<struct<bytes, path>>`, `texts: list<struct<user, assistant, source>>`.

All questions on a row's images become one conversation, images before the first question, as Idefics2 trains on it
(arXiv 2405.02246): every question may be about every image. Images must be embedded (`bytes`); `path` is ignored.
Rows are read one at a time, see `parquet_rows.py`; nothing is decoded.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm_lab.data.sample import BadRecord, ImageSlot, Message, Sample
from vlm_lab.data.sources.common import Unusable, answer, check_index, digest, files_below, images_first, text
from vlm_lab.data.sources.parquet_rows import ParquetRows, read_schema

COLUMNS = {"images": ("bytes",), "texts": ("user", "assistant", "source")}  # column -> fields that are read


class Cauldron:
    """`path`: a folder of parquet files (searched to any depth) or one file.

    `turn_sources`: keep only the questions of these sources; rows that have none of them are not in the index.
    """

    def __init__(self, path: str, turn_sources: list[str] | None = None) -> None:
        self.folder, files = files_below(Path(path), "parquet", "parquet file")
        for file in files:
            _check_schema(file)
        self.turn_sources = turn_sources
        self._rows = ParquetRows(files, list(COLUMNS))
        self._kept = None if turn_sources is None else self._rows_with(turn_sources)
        if not len(self):
            raise ValueError(f"data.path = {path} has no rows (left); give a data set with at least one")

    def __len__(self) -> int:
        return len(self._rows if self._kept is None else self._kept)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        file, row = self._rows.locate(index if self._kept is None else int(self._kept[index]))
        try:
            return self._sample(self._rows.row(file, row), f"{file.relative_to(self.folder)}:{row}")
        except Unusable as reason:
            raise BadRecord(str(file), f"row {row}", str(reason)) from None

    def fingerprint(self) -> str:
        """Of all files, see `ParquetRows.fingerprint`, and of the choice of turns."""
        names = [str(file.relative_to(self.folder)) for file in self._rows.files]
        return digest("cauldron", names, self._rows.fingerprint(), sorted(self.turn_sources or []))

    def _rows_with(self, wanted: list[str]) -> np.ndarray:
        """Numbers of the rows to keep. Rows without any question stay: they are reported when they are read."""
        rows = [{turn and turn["source"] for turn in turns or ()} for turns in self._rows.column("texts", "source")]
        found = sorted(filter(None, set().union(*rows)))
        if missing := sorted(set(wanted) - set(found)):
            raise ValueError(f"data.turn_sources = {missing}: in no row of {self.folder}; there are {found}")
        return np.array([number for number, sources in enumerate(rows) if not sources or sources & set(wanted)])

    def _sample(self, record: dict[str, Any], name: str) -> Sample:
        images, turns = _images(record), self._turns(record)
        slots = [ImageSlot(index) for index in range(len(images))]
        messages = []
        for question, reply, _ in turns:
            content, slots = images_first(slots, (question,)), []
            if not content:
                raise Unusable("has a turn with neither an image nor a question")
            messages += [Message("user", content), Message("assistant", (reply,))]
        sources = [source for *_, source in turns]
        source = "+".join(filter(None, dict.fromkeys(sources)))
        return Sample(name, tuple(messages), images, source, source, {"turn_sources": sources}, str(self.folder))

    def _turns(self, record: dict[str, Any]) -> list[tuple[str, str, str]]:
        """(question, answer, source) of the turns that are kept."""
        if not record["texts"]:
            raise Unusable("has no turns in `texts`")
        wanted, turns = self.turn_sources, [_turn(*pair) for pair in enumerate(record["texts"], 1)]
        return [turn for turn in turns if wanted is None or turn[2] in wanted]


def _turn(number: int, turn: dict[str, Any] | None) -> tuple[str, str, str]:
    what, turn = f"turn {number}", turn or dict.fromkeys(COLUMNS["texts"])
    question, reply = text(turn["user"], f"{what} `user`"), answer(turn["assistant"], f"{what} `assistant`")
    return question, reply, text(turn["source"] or "", f"{what} `source`")


def _images(record: dict[str, Any]) -> tuple[bytes, ...]:
    if record["images"] is None:
        raise Unusable("has no `images`")
    images = tuple(image and image["bytes"] for image in record["images"])
    for number, image in enumerate(images, 1):
        if not isinstance(image, bytes):
            raise Unusable(f"image {number} has no `bytes`; images must be embedded")
    return images


def _check_schema(file: Path) -> None:
    expected = "expected are images: list<struct<bytes, path>> and texts: list<struct<user, assistant, source>>"
    schema = read_schema(file)
    for column, fields in COLUMNS.items():
        if column not in schema.names:
            raise ValueError(f"data.path: {file} has no column `{column}` but {schema.names}; {expected}")
        missing = set(fields) - set(_fields(schema.field(column).type))
        if missing:
            kind = schema.field(column).type
            raise ValueError(f"data.path: {file}: column `{column}` has no {sorted(missing)}, it is {kind}; {expected}")


def _fields(kind: pa.DataType) -> list[str]:
    """Field names of a list of structs; none of anything else."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    is_struct = is_list and pa.types.is_struct(kind.value_type)
    return [field.name for field in kind.value_type] if is_struct else []
