"""LLaVA JSON: `.json` (one list) or `.jsonl` (one record a line), images in files beside it.

    {"id": "s1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nHow many?"},
                                                     {"from": "gpt", "value": "Three."}]}

`image` is a path, a list of paths, or absent (text only; Cambrian-10M also writes "", "None", "none", "nan"). A key
`source` becomes `Sample.source` and `Sample.group`; other keys go to `meta`. `<image>` is placed by the rules of
LLaVA-NeXT's train.py, `preprocess_multimodal`. Only byte offsets are kept, 24 bytes a record: a record is parsed when
it is asked for, and a pickled reader (a DataLoader worker's) carries no text. `video` is a path or a list, marked by
`<image>` or `<video>`, after the images if there are both. An `id` that the file repeats stays repeated.
"""

import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_lab.data.sample import BadRecord, ImageSlot, Message, Role, Sample, Video
from vlm_lab.data.sources.common import (
    Content,
    Unusable,
    answer,
    check_index,
    digest,
    file_below,
    file_hash,
    images_first,
    text,
)

MARK, VIDEO_MARK = "<image>", "<video>"
OWN_KEYS = ("id", "image", "video", "conversations", "source")
NO_IMAGE = (None, "", "None", "none", "nan")
ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}
DECODER = json.JSONDecoder()
SEPARATOR = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
OPENING = re.compile(r"(\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*")  # a UTF-8 byte order mark may come first


class LlavaJson:
    """`path`: the .json or .jsonl file. `root`: the folder that image paths are relative to (default: the file's own).

    No image may lie outside `root`, not even through a symbolic link.
    """

    def __init__(self, path: str, root: str | None = None) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".json", ".jsonl") or not self.path.is_file():
            raise ValueError(f"data.path = {path} is not a .json or .jsonl file; give a file in LLaVA's format")
        self.root = Path(os.path.realpath(root or self.path.parent))
        if not self.root.is_dir():
            raise ValueError(f"data.root = {root} is not a folder; give the one that image paths are relative to")
        self._spans = _index(self.path)  # [records, 3]: first byte, end, number for error messages
        self._file: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        start, end, number = self._spans[index].tolist()
        name = f"line {number}" if self.path.suffix == ".jsonl" else f"record {number}"
        try:
            record = _parse(self._bytes()[start:end])
            name += f" (id {record['id']})" if "id" in record else ""
            return self._sample(record, number)
        except Unusable as reason:
            raise BadRecord(str(self.path), name, str(reason)) from None

    def fingerprint(self) -> str:
        """Of the JSON file's content and of where `root` is, seen from it. The images are not hashed."""
        return digest("llava_json", file_hash(self.path), os.path.relpath(self.root, self.path.parent.resolve()))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def _bytes(self) -> mmap.mmap:
        """The mapped file. Mapped, not read: forked workers would share, and race for, one file position."""
        if self._file is None:
            with self.path.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._file

    def _sample(self, record: dict[str, Any], number: int) -> Sample:
        images = tuple(file_below(self.root, text(name, "`image`"), "image") for name in _names(record, "image"))
        videos = tuple(Video(file_below(self.root, text(name, "`video`"), "video")) for name in _names(record, "video"))
        shown: tuple[Path | Video, ...] = (*images, *videos)
        source = text(record.get("source") or "", "`source`")
        name = str(number if record.get("id") is None else record["id"])
        meta = {key: value for key, value in record.items() if key not in OWN_KEYS}
        return Sample(name, _messages(record, len(shown)), shown, source, source, meta, str(self.path))


def _index(path: Path) -> np.ndarray:
    """[records, 3]: first byte, end, and line (.jsonl) or place in the list (.json), both from 1."""
    found = _line_spans(path) if path.suffix == ".jsonl" else _item_spans(path)
    spans = np.fromiter(found, dtype=np.dtype((np.int64, 3)))
    if not len(spans):
        raise ValueError(f"data.path = {path} has no records; give a file in LLaVA's format with at least one")
    return spans


def _line_spans(path: Path) -> Iterator[tuple[int, int, int]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield start, start + len(line), number
            start += len(line)


def _item_spans(path: Path) -> Iterator[tuple[int, int, int]]:
    """Walks over the list's items. Read as latin-1, where one character is one byte, offsets hold for the file."""
    content = path.read_bytes().decode("latin-1")
    if not content.strip():
        return
    if (opening := OPENING.match(content)) is None:
        raise ValueError(f"data.path = {path} is not a JSON list; a file with one record a line is named .jsonl")
    at, number = opening.end(), 0
    separator = "" if content.startswith("]", at) else ","
    while separator == ",":
        number += 1
        start, at = at, _item_end(content, at, f"data.path = {path} is not valid JSON: item {number}")
        yield start, at, number
        between = SEPARATOR.match(content, at)
        assert between is not None  # it matches the empty string, too
        separator, at = between[1], between.end()
    if content[at:].strip() != "]":
        raise ValueError(f"data.path = {path} is not valid JSON: byte {at}: the list should end here; repair the file")


def _item_end(content: str, start: int, complaint: str) -> int:
    try:
        return DECODER.raw_decode(content, start)[1]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{complaint}: {error}; repair the file") from None


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise Unusable(f"is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise Unusable(f"is {type(record).__name__}, not an object with `conversations`")
    return record


def _names(record: dict[str, Any], key: str) -> list[object]:
    names = record.get(key)
    if isinstance(names, list):
        return names
    return [] if names in NO_IMAGE else [names]


def _messages(record: dict[str, Any], num_images: int) -> tuple[Message, ...]:
    turns = _turns(record)
    if "video" in record:
        turns = [(role, value.replace(VIDEO_MARK, MARK)) for role, value in turns]
    marks = sum(value.count(MARK) for _, value in turns)
    if marks not in (0, num_images):
        raise Unusable(f"has {marks} {MARK} mark(s) for {num_images} image(s)")
    unplaced = [ImageSlot(index) for index in range(num_images)] if not marks else []
    messages, placed = [], 0
    for number, (role, value) in enumerate(turns, 1):
        content = _content(value, placed)
        if role == "human" and unplaced:  # no mark anywhere: all images go before the first question
            content, unplaced = images_first(unplaced, content), []
        if not content:
            raise Unusable(f"turn {number} is empty")
        messages.append(Message(ROLES[role], content))
        placed += value.count(MARK)
    return tuple(messages)


def _content(value: str, placed: int) -> Content:
    """Text and slots in order. A single mark that is not at the front moves there; of several, each stays."""
    first, *rest = value.split(MARK)
    slots = [ImageSlot(placed + offset) for offset in range(len(rest))]
    if len(slots) == 1 and first:
        return images_first(slots, ((first + rest[0]).strip(),))
    pairs = zip(slots, rest, strict=True)
    return tuple(part for part in (first, *(part for pair in pairs for part in pair)) if part != "")


def _turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) pairs, in the only order that can be trained on: [system], then human and gpt in turn."""
    raw = record.get("conversations")
    if not isinstance(raw, list):
        raise Unusable("has no `conversations`" if raw is None else "`conversations` is not a list")
    turns = [_turn(turn, number) for number, turn in enumerate(raw, 1)]
    system = 1 if turns and turns[0][0] == "system" else 0
    for number, (role, _) in enumerate(turns[system:]):
        expected = ("human", "gpt")[number % 2]
        if role != expected:
            raise Unusable(f"turn {system + number + 1} is from {role}, expected {expected}")
    if len(turns) == system or (len(turns) - system) % 2:
        raise Unusable("ends without an answer (a gpt turn)")
    return turns


def _turn(turn: object, number: int) -> tuple[str, str]:
    what = f"turn {number}"
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise Unusable(f"{what} is not an object with `from` and `value`")
    role = text(turn["from"], f"{what} `from`")
    if role not in ROLES:
        raise Unusable(f"{what} is from {role!r}; known are {', '.join(ROLES)}")
    value = (answer if role == "gpt" else text)(turn["value"], f"{what} `value`")
    if role != "human" and MARK in value:
        raise Unusable(f"{what} has an {MARK} mark in a {role} turn; images belong to human turns")
    return role, value
