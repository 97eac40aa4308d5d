"""What all readers share: how images are placed before a text, how bad text is refused, how files are hashed.

No file format is known here.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from vlm_lab.data.sample import ImageSlot

Content = tuple[str | ImageSlot, ...]

EDGE = 1024**2  # bytes hashed at each end of a file that is too large to be hashed whole


class Unusable(Exception):
    """Why a record cannot be used. Only the reader knows file and record: it raises `BadRecord` from this."""


def text(value: object, what: str) -> str:
    """`value` if it is text that a tokenizer can take; `what` names it in the complaint."""
    if value is None:
        raise Unusable(f"{what} is null")
    if not isinstance(value, str):
        raise Unusable(f"{what} is {type(value).__name__}, not text")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise Unusable(f"{what} has half of a surrogate pair, which is not valid Unicode")
    return value


def answer(value: object, what: str) -> str:
    """An answer must say something, or there is nothing to learn from it."""
    if not (said := text(value, what)).strip():
        raise Unusable(f"{what} is an empty answer")
    return said


def images_first(slots: Iterable[ImageSlot], content: Content) -> Content:
    """The images, a line break, then the text: LLaVA-NeXT's form.

    All readers use it, so that a mixture, or evaluating on another format than one trained on, compares nothing else.
    """
    slots, content = tuple(slots), tuple(part for part in content if part != "")
    if slots and content and isinstance(content[0], str):
        return (*slots, "\n" + content[0], *content[1:])
    return (*slots, *content)


def file_below(root: Path, relative: str, what: str) -> Path:
    """The file at `relative` below the folder `root` (a real path), of which not even a symbolic link leads out."""
    try:
        path = Path(os.path.realpath(root / relative))
        found = path.is_file()
    except (ValueError, OSError) as error:  # a null character, a name that is too long
        raise Unusable(f"{what} path {relative[:80]!r} cannot be used: {error}") from None
    if not path.is_relative_to(root):
        raise Unusable(f"{what} {relative} lies outside data.root = {root}")
    if not found:
        raise Unusable(f"{what} {relative} is not in data.root = {root}")
    return path


def check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")


def file_hash(path: Path, whole: bool = True) -> str:
    """Hash of the content, or (`whole=False`) of the size and the first and last MiB, for files of very many GiB."""
    with path.open("rb") as file:
        if whole:
            return hashlib.file_digest(file, "blake2b").hexdigest()
        size = os.fstat(file.fileno()).st_size
        start = file.read(EDGE)
        file.seek(max(0, size - EDGE))
        return digest(size, start, file.read())


def digest(*parts: object) -> str:
    """A short hash of values that print exactly (strings, bytes, numbers, lists of them)."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def files_below(path: Path, ending: str, kind: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files: `path` itself or all below it. ValueError if none."""
    if path.is_file():
        return path.parent, [path]
    if not (files := sorted(path.rglob(f"*.{ending}"))):
        raise ValueError(f"data.path = {path} is not a {kind} nor a folder that has some; give one of them")
    return path, files
