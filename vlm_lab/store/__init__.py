"""The stage store: a finished stage is a folder named by the hash of everything that determines its weights.

Runs link to it, so a stage that two runs have in common trains once. An entry appears by one rename, after it is
complete; a lock keeps two processes from training the same key; checksums tell a damaged entry, which is then trained
anew. An unfinished stage keeps its checkpoints in `<key>.partial`, where the next process that wants it continues.

    python -m vlm_lab.store ls                       what is there
    python -m vlm_lab.store why RUN STAGE            why it was trained: what differs from the closest other entry
    python -m vlm_lab.store gc --older-than 30d      remove old entries that no run links to
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from vlm_lab.console import console
from vlm_lab.files import in_place, remove
from vlm_lab.store.keys import hash_of, stage_inputs, stage_keys

__all__ = ["CHECKPOINTS", "INPUTS", "RECORD", "Store", "hash_of", "stage_inputs", "stage_keys"]

RECORD, INPUTS, CHECKPOINTS = "stage.json", "inputs.json", "checkpoints"


class Store:
    """Finished stages below `root`: `<key>/` holds model.safetensors, tokenizer/, inputs.json and stage.json."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        return self.root / key

    def partial(self, key: str) -> Path:
        """Where an unfinished stage is being made."""
        return self.root / f"{key}.partial"

    def has(self, key: str) -> bool:
        return (self.path(key) / RECORD).is_file()

    def record(self, key: str) -> dict[str, Any]:
        return json.loads((self.path(key) / RECORD).read_text())

    def obtain(self, key: str, train: Callable[[Path], None], inputs: dict[str, Any] | None = None) -> bool:
        """Have `key` finished: reuse it (True), or let `train(folder)` make it under the lock.

        `train` writes the record, stage.json, last. `inputs`, which `key` is the hash of, are kept for `why`.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with self.locked(key):
            if self.intact(key):
                os.utime(self.path(key) / RECORD)  # "last used", for gc
                return True
            self.make(key, train, inputs or {})
        return False

    def locked(self, key: str) -> AcquireReturnProxy:
        """The lock of `key`, held until the context ends; says so when another process has it."""
        lock = FileLock(self.root / f"{key}.lock")
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            console.print(f"waiting for the process that trains {self.partial(key)}")
            return lock.acquire()

    def intact(self, key: str) -> bool:
        """Whether the entry is there, with every file as it was written."""
        if not self.has(key):
            return False
        if damaged := self.damaged(key):
            console.print(f"{self.path(key)} is damaged ({', '.join(damaged)}): trained anew")
        return not damaged

    def damaged(self, key: str) -> list[str]:
        """Files of an entry that are missing, or differ from what was written."""
        files = self.record(key).get("files", {})
        return [name for name, checksum in files.items() if checksum_of(self.path(key) / name) != checksum]

    def make(self, key: str, train: Callable[[Path], None], inputs: dict[str, Any]) -> None:
        """Train in the scratch folder, which becomes the entry by one rename; if that fails, its checkpoints stay."""
        scratch = self.partial(key)
        scratch.mkdir(exist_ok=True)
        (scratch / INPUTS).write_text(json.dumps(inputs, indent=1))
        try:
            train(scratch)
        except BaseException:
            if not any(scratch.glob(f"{CHECKPOINTS}/step-*")):
                shutil.rmtree(scratch)
            raise
        remove(scratch / CHECKPOINTS)
        seal(scratch)
        in_place(scratch, self.path(key))


def seal(folder: Path) -> None:
    """Add every file's checksum to the record."""
    record = json.loads((folder / RECORD).read_text())
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    record["files"] = {str(path.relative_to(folder)): checksum_of(path) for path in files}
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def checksum_of(path: Path) -> str:
    """Of a file's content; empty if there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
