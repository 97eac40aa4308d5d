"""The one record that every reader produces and everything downstream consumes.

A `Sample` is a conversation plus the images that it mentions. Images stay undecoded references (bytes, a path, or a
source that draws them) until a loader worker needs the pixels. This file decodes nothing and knows no file format.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

Role = Literal["system", "user", "assistant", "document"]


class Drawn(Protocol):
    """An image that is made on demand: `draw()` gives an RGB picture, `size` is (width, height) in pixels."""

    size: tuple[int, int]

    def draw(self) -> Image.Image: ...


ImageRef = bytes | Path | Drawn


@dataclass(frozen=True)
class Video:
    """A video: a file, or its frames, made on demand. It stands where an image stands: one entry, one slot."""

    content: Path | tuple[Drawn, ...]


@dataclass(frozen=True)
class ImageSlot:
    """Marks where an image stands inside a message; `index` points into `Sample.images`."""

    index: int


@dataclass(frozen=True)
class Message:
    """One turn. `content` interleaves text and image slots in reading order.

    A `document` stands alone in its sample: no turn of a conversation but running text, all of which is learnt.
    """

    role: Role
    content: tuple[str | ImageSlot, ...]


def document(units: Iterable[str | ImageSlot]) -> Message:
    """An interleaved document of texts and images; a blank line between two texts that are neighbours."""
    content: list[str | ImageSlot] = []
    for unit in units:
        if isinstance(unit, str) and content and isinstance(content[-1], str):
            content[-1] += f"\n\n{unit}"
        else:
            content.append(unit)
    return Message("document", tuple(content))


@dataclass(frozen=True)
class Sample:
    """One training or evaluation record.

    `id` is unique within its source; `source` names where it came from; `group` is what evaluation averages over
    (a benchmark group, a sub-corpus); `meta` carries what a task needs besides (for example `choices`); `file` is
    where it was read from.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef | Video, ...] = ()
    source: str = ""
    group: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    file: str = ""

    @property
    def where(self) -> str:
        """What a message about this record names: its file if it has one, else its source."""
        return self.file or self.source


class Source(Protocol):
    """An index-addressable collection: `len` and random access are all that a mixture needs.

    `fingerprint()` is a short string that changes whenever any record would (it is hashed into stage keys).
    A record that cannot be used raises `BadRecord` from `__getitem__`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def fingerprint(self) -> str: ...


class BadRecord(ValueError):
    """A record that cannot be used. The loader counts and reports it, up to `data.max_bad`; never silently skipped."""

    def __init__(self, where: str, record: str, reason: str) -> None:
        super().__init__(f"{where}: {record}: {reason}")
        self.where, self.record, self.reason = where, record, reason

    def __reduce__(self) -> tuple[type["BadRecord"], tuple[str, str, str]]:
        return BadRecord, (self.where, self.record, self.reason)
