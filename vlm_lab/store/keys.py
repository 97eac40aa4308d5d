"""Stage keys: the hash of everything that determines a stage's weights. No torch in here: the parent computes them."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vlm_lab.config import Config
from vlm_lab.schema import HF
from vlm_lab.stages import IDENTITY, parents

PACKAGE = Path(__file__).parent.parent
CODE = (
    "batch.py",
    "build.py",
    "callbacks/average.py",
    "convert/*.py",
    "encoder_module.py",
    "fit.py",
    "module.py",
    "optimizers.py",
    "parts.py",
    "strategies.py",
)
TREES = ("data/**/*.py", "model/**/*.py")


def stage_keys(config: Config, fingerprints: dict[str, str]) -> dict[str, str]:
    """{stage: key} in order. A key covers parts, stage, data, precision, seed, code, and the stages it starts from.

    Of a stage that pretrains one part it covers that part alone, so every model with this part shares the stage.
    """
    return {name: hash_of(inputs) for name, inputs in stage_inputs(config, fingerprints).items()}


def stage_inputs(config: Config, fingerprints: dict[str, str]) -> dict[str, dict[str, Any]]:
    """{stage: what its key is the hash of} in order."""
    inputs: dict[str, dict[str, Any]] = {}
    for name in config.stages:
        before = [hash_of(inputs[parent]) for parent in parents(config.stages, name)]
        inputs[name] = {"before": before, "code": code(), **stage_identity(config, name, fingerprints)}
    return inputs


def stage_identity(config: Config, name: str, fingerprints: dict[str, str]) -> dict[str, Any]:
    stage, fields = config.stages[name], identity(config)
    weights = config.data.mixtures[stage.mixture]
    reads = stage.part in (None, "llm")  # the LLM's tokenizer, which has seen every source if it was trained on them
    used = fingerprints if reads and config.llm["tokenizer"] is None else weights
    parts = {key: fields[key] for key in ("seed", "trainer")}
    if stage.part is None:
        parts |= {key: fields[key] for key in ("encoder", "connector", "llm", "tiling")}
    else:
        parts["part"] = config.llm if stage.part == "llm" else config.encoder[str(stage.encoder)]
    data = {key: getattr(config.data, key) for key in ("holdout", "shuffle_turns")}
    data |= {"weights": weights, "sources": {s: fingerprints[s] for s in sorted(used)}}
    return {**parts, "init": checkpoint(config.init), "stage": identity(stage), "data": data}


def checkpoint(init: str | None) -> Any:
    """What stands for the checkpoint that training starts from: its files' hashes if it is local, else its id."""
    folder = Path((init or "").removeprefix(HF))
    if init is None or not folder.is_dir():
        return init
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {path.name: hash_of_file(path) for path in files}


def hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
def code() -> dict[str, str]:
    """{file: hash} of the source that weights depend on."""
    files = sorted({path for pattern in (*CODE, *TREES) for path in PACKAGE.glob(pattern)})
    return {str(path.relative_to(PACKAGE)): hash_of(path.read_text()) for path in files}


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
