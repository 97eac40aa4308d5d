"""The stage store: a finished stage is a folder named by the hash of everything that determines its weights.

Runs link to it, so a stage that two runs have in common trains once. An entry appears by one rename, after it is
complete; a lock keeps two processes from training the same key. No torch in here: the parent computes keys.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel

from vlm_lab.schema import IDENTITY, Config

PACKAGE = Path(__file__).parent
CODE = ("batch.py", "build.py", "fit.py", "module.py", "data/**/*.py", "model/**/*.py")  # what weights depend on
RECORD = "stage.json"


def stage_keys(config: Config, fingerprints: dict[str, str]) -> dict[str, str]:
    """{stage: key} in order. A key covers parts, stage, data, precision, seed, code, and all earlier stages."""
    keys: dict[str, str] = {}
    parent = code_version()
    for name in config.stages:
        parent = hash_of([parent, stage_identity(config, name, fingerprints)])
        keys[name] = parent
    return keys


def stage_identity(config: Config, name: str, fingerprints: dict[str, str]) -> dict[str, Any]:
    stage, fields = config.stages[name], identity(config)
    weights = config.data.mixtures[stage.mixture]
    used = fingerprints if config.llm["tokenizer"] is None else weights  # a trained tokenizer has seen every source
    parts = {key: fields[key] for key in ("seed", "encoder", "connector", "llm", "tiling", "trainer")}
    data = {key: getattr(config.data, key) for key in ("holdout", "shuffle_turns")}
    data |= {"weights": weights, "sources": {s: fingerprints[s] for s in sorted(used)}}
    return {**parts, "stage": identity(stage), "data": data}


def identity(model: BaseModel) -> dict[str, Any]:
    """The fields of kind IDENTITY, recursively, as plain data."""
    out: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if IDENTITY in info.metadata:
            out[name] = identity(value) if isinstance(value, BaseModel) else plain(value)
    return out


def plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity(value)
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


@cache
def code_version() -> str:
    files = sorted({path for pattern in CODE for path in PACKAGE.glob(pattern)})
    return hash_of([[str(path.relative_to(PACKAGE)), path.read_text()] for path in files])


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """Finished stages below `root`: `<key>/` holds model.safetensors, tokenizer/ and stage.json (written last)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        return self.root / key

    def has(self, key: str) -> bool:
        return (self.path(key) / RECORD).is_file()

    def record(self, key: str) -> dict[str, Any]:
        return json.loads((self.path(key) / RECORD).read_text())

    def obtain(self, key: str, train: Callable[[Path], None]) -> bool:
        """Have `key` finished: reuse it (True), or let `train(folder)` make it under the lock, stage.json last."""
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f"{key}.lock"):
            if self.has(key):
                return True
            with self.building(key) as folder:
                train(folder)
        return False

    @contextmanager
    def building(self, key: str) -> Iterator[Path]:
        """A scratch folder that becomes the entry by one rename; removed if the stage fails."""
        scratch = self.root / f"{key}.{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            yield scratch
            shutil.rmtree(self.path(key), ignore_errors=True)  # a half-written one of a killed process
            scratch.rename(self.path(key))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
