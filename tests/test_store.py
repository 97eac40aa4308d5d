"""The stage store: what changes a key, one rename, one trainer per key."""

import threading
import time
from pathlib import Path

import pytest
from helpers import composed

from vlm_lab import schema
from vlm_lab.store import RECORD, Store, stage_keys

FINGERPRINTS = {"captions": "a", "questions": "b", "text": "c"}


def keys(*overrides: str, fingerprints: dict[str, str] = FINGERPRINTS) -> dict[str, str]:
    return stage_keys(schema.check(composed(*overrides)), fingerprints)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "encoder.siglip.depth=2",
        "connector=mlp",
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
    hub = ("llm.tokenizer=some/path",)
    assert keys(*hub)["align"] == keys(*hub, fingerprints=changed)["align"]


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
