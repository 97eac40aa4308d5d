"""The stage store: what changes a key, one rename, one trainer per key, damage."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import composed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import finish, run_folder, start, store_of

from vlm_lab import schema
from vlm_lab.config import Config, Data, Eval, Trainer
from vlm_lab.stages import COSMETIC, IDENTITY, PERFORMANCE, Rule, Stage
from vlm_lab.store import RECORD, Store, stage_keys

KINDS = (IDENTITY, PERFORMANCE, COSMETIC)
FINGERPRINTS = {"captions": "a", "questions": "b", "text": "c"}
COMPOSED = schema.check(composed())


def keys(*overrides: str, fingerprints: dict[str, str] = FINGERPRINTS) -> dict[str, str]:
    return stage_keys(schema.check(composed(*overrides)), fingerprints)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "encoder.siglip.depth=2",
        "connector=linear",
        "llm=llama",
        "tiling=pad",
        "stages.align.steps=7",
        "stages.align.train.llm=2.0e-3",
        "trainer.precision=bf16-mixed",
    ],
)
def test_identity_changes_every_key_from_there_on(override: str) -> None:
    before, after = keys(), keys(override)
    assert before["align"] != after["align"]
    assert before["instruct"] != after["instruct"]


@pytest.mark.parametrize(
    "override",
    [
        "trainer.devices=2",
        "trainer.num_workers=0",
        "eval.limit=3",
        "name=x",
        "output=/tmp/x",
        "logger=wandb",
        "stages.align.micro_batch=4",
    ],
)
def test_performance_and_looks_do_not(override: str) -> None:
    assert keys() == keys(override)


def test_a_later_stage_leaves_earlier_keys_alone() -> None:
    before, after = keys(), keys("stages.instruct.steps=5")
    assert before["align"] == after["align"]
    assert before["instruct"] != after["instruct"]
    assert before["align"] == keys("stage=[align]")["align"]


def test_data_counts_by_fingerprint() -> None:
    changed = {**FINGERPRINTS, "questions": "other"}
    assert keys()["instruct"] != keys(fingerprints=changed)["instruct"]
    assert keys()["align"] != keys(fingerprints=changed)["align"]  # the tokenizer has read the questions
    hub = ("llm.tokenizer=some/path", "~data.mixtures.caption.questions")
    assert keys(*hub)["align"] == keys(*hub, fingerprints=changed)["align"]


FIELDS = {
    model: {name: next(kind for kind in info.metadata if kind in KINDS) for name, info in model.model_fields.items()}
    for model in (Config, Stage, Rule, Data, Trainer, Eval)
}
SPECIAL = {  # another value that the keys can be computed with
    (Stage, "mixture"): "instruct",
    (Stage, "objective"): "next_token",
    (Config, "init"): "hf:some/model",
    (Data, "mixtures"): {"caption": {"captions": 0.7, "questions": 0.3}, "instruct": {"questions": 1.0}},
}
NESTED = {(Config, "stages"), (Config, "data"), (Config, "trainer"), (Config, "eval"), (Data, "sources")}
"""Fields whose own fields are tested; sources count by their fingerprints."""
CHANGES = [(model, name) for model, kinds in FIELDS.items() for name in kinds if (model, name) not in NESTED]


def place(config: Config, model: type) -> Any:
    """Where the first stage finds the settings of `model`."""
    stage = config.stages["align"]
    return {Config: config, Stage: stage, Rule: stage.train["connector"], Data: config.data}.get(model) or getattr(
        config, model.__name__.lower()
    )


def change(config: Config, model: type, name: str) -> None:
    node, value = place(config, model), getattr(place(config, model), name)
    other = SPECIAL.get((model, name), {**value, "changed": 1} if isinstance(value, dict) else f"not {value}")
    setattr(node, name, other)


@given(changes=st.sets(st.sampled_from(CHANGES), min_size=1, max_size=3))
@example(changes=set(CHANGES))
@settings(max_examples=150, deadline=None)
def test_the_key_follows_identity_and_nothing_else(changes: set[tuple[type, str]]) -> None:
    """Property: whatever is changed together, the first stage's key changes if one of the settings is identity."""
    config = COMPOSED.model_copy(deep=True)
    for model, name in changes:
        change(config, model, name)
    kinds = {FIELDS[model][name] for model, name in changes}
    same = stage_keys(config, FINGERPRINTS)["align"] == stage_keys(COMPOSED, FINGERPRINTS)["align"]
    assert same == (IDENTITY not in kinds)


@pytest.mark.parametrize(("model", "name"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_every_field(model: type, name: str) -> None:
    config = COMPOSED.model_copy(deep=True)
    change(config, model, name)
    same = stage_keys(config, FINGERPRINTS)["align"] == stage_keys(COMPOSED, FINGERPRINTS)["align"]
    assert same == (FIELDS[model][name] != IDENTITY)


def test_two_that_want_the_same_stage_train_it_once(tmp_path: Path) -> None:
    store, trained, reused = Store(tmp_path), [], []

    def train(folder: Path) -> None:
        trained.append(folder)
        time.sleep(0.2)
        (folder / RECORD).write_text("{}")

    threads = [threading.Thread(target=lambda: reused.append(store.obtain("key", train))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert sorted(reused) == [False, True, True]


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def train(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        store.obtain("key", train)
    assert not store.has("key")
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def make(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / RECORD).write_text(json.dumps({"stage": "align", "steps": 3}))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/tokenizer.json", "inputs.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, how: str) -> None:
    store = Store(tmp_path)
    assert not store.obtain("key", make)
    assert store.obtain("key", make)  # intact
    path = store.path("key") / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"" if how == "cut" else bytes([content[-1] ^ 1])))
    assert not store.obtain("key", make)
    assert f"is damaged ({name}): trained anew" in " ".join(capsys.readouterr().out.split())
    assert path.read_bytes() == content
    assert store.obtain("key", make)


def test_a_half_written_entry_is_made_anew(tmp_path: Path) -> None:
    """A folder under the final name that lacks its record, and one under the scratch name that was left behind."""
    store = Store(tmp_path)
    for folder in (store.path("key"), store.partial("key")):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    assert not store.obtain("key", make)
    assert (store.path("key") / "model.safetensors").read_bytes() == b"weights" * 100
    assert not store.partial("key").exists()


def test_two_processes_train_a_stage_once(tmp_path: Path, cache: Path) -> None:
    """Two real runs, alike in what decides weights, started together; then one whose stage was damaged on the disk."""
    options = ["stages.align.steps=3", "stages.instruct.steps=3", "trainer.num_workers=0", "eval.images=[real]"]
    runs = [run_folder(tmp_path, cache, *options, f"eval.limit={limit}") for limit in (1, 2)]
    assert runs[0] != runs[1]
    processes = [start(run) for run in runs]
    for process, run in zip(processes, runs, strict=True):
        finish([process], run, 120)
    logs = ["".join((run / "log-0.txt").read_text().split()) for run in runs]
    assert sum(log.count("reusedfrom") for log in logs) == 2
    assert sum(log.count("whattrains") for log in logs) == 2
    store, keys = store_of(runs[0])
    weights = store.path(keys["instruct"]) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    again = run_folder(tmp_path, cache, *options, "eval.limit=3")
    finish([start(again)], again, 120)
    log = "".join((again / "log-0.txt").read_text().split())
    assert "isdamaged(model.safetensors):trainedanew" in log and log.count("reusedfrom") == 1
    assert weights.read_bytes() == content
