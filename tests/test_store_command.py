"""The store's command line: what is there, why a stage was trained, what may be removed."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import composed

from vlm_lab import launch, schema
from vlm_lab.fit import link
from vlm_lab.store import RECORD, Store, stage_inputs, stage_keys
from vlm_lab.store.__main__ import main

FINGERPRINTS = {"captions": "a", "questions": "b", "text": "c"}
DAY = 86400


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two runs, as if trained: they share the first stage and differ in the second one's rate and length."""
    for changes in ([], ["stages.instruct.steps=7", "stages.instruct.train.llm=2.0e-3"]):
        finished(tmp_path, *changes)
    return tmp_path


def finished(output: Path, *overrides: str) -> Path:
    config = schema.check(composed(f"output={output}", *overrides))
    run, inputs = launch.run_folder(config), stage_inputs(config, FINGERPRINTS)
    launch.prepare(run, config, inputs)
    store = Store(output / "store")
    for stage, key in stage_keys(config, FINGERPRINTS).items():
        text = f'{{"stage": "{stage}", "steps": {config.stages[stage].steps}, "samples": 12345}}'
        store.obtain(key, lambda folder, text=text: (folder / RECORD).write_text(text), inputs[stage])
        link(run / "stages" / stage, store.path(key))
    return run


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["store", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def run_with(output: Path, text: str) -> Path:
    (run,) = (p.parent for p in (output / "runs").glob("*/config.yaml") if text in p.read_text())
    return run


def test_ls(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (output / "store" / "abc.partial").mkdir()
    out = command(monkeypatch, capsys, "--store", output / "store", "ls")
    rows = [re.findall(r"[\w.,]+", line) for line in out.splitlines() if re.match(r"│ [0-9a-f]{16}", line)]
    assert sorted((row[1], row[2], row[3], row[-1]) for row in rows) == [
        ("align", "400", "12,345", "2"),  # linked to by both runs
        ("instruct", "500", "12,345", "1"),
        ("instruct", "7", "12,345", "1"),
    ]
    assert f"unfinished: {output}/store/abc.partial" in out.replace("\n", "")


def test_why(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The one entry that is closest, and every setting in which it differs, and no other."""
    run = run_with(output, "steps: 7")
    out = command(monkeypatch, capsys, "why", run, "instruct").replace("\n", " ")
    assert "which is in the store" in out
    assert "(stage instruct), which differs in:" in out
    assert "stage.steps: here 7, there 500" in out
    assert re.search(r"stage\.train\.llm\.lr: here 0\.002, there 0\.003", out)
    assert out.count(": here") == 2
    monkeypatch.setattr(sys, "argv", ["store", "why", str(run), "algin"])
    with pytest.raises(SystemExit, match="has no stage algin; there are align, instruct"):
        main()


def test_gc(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Old entries without a link go; linked ones, young ones and those in use stay."""
    store = Store(output / "store")
    for key in ("old", "young", "used"):
        store.obtain(key, lambda folder: (folder / RECORD).write_text("{}"))
    store.partial("dead").mkdir()
    for folder in store.root.iterdir():
        path = folder if folder.suffix else folder / RECORD
        if folder.name != "young" and folder.suffix != ".lock":
            os.utime(path, (time.time() - 40 * DAY,) * 2)
    with FileLock(store.root / "used.lock"):
        out = command(monkeypatch, capsys, "--store", store.root, "gc", "--older-than", "30d")
    assert "removed 2 entries; kept 4 that are older" in out.replace("\n", " ")
    assert not store.has("old") and not store.partial("dead").exists()
    assert store.has("young") and store.has("used")
    assert all(link.resolve().exists() for link in (output / "runs").glob("*/stages/*"))
    monkeypatch.setattr(sys, "argv", ["store", "gc", "--older-than", "30 days"])
    with pytest.raises(SystemExit):
        main()
    assert "give a number and m, h or d, for example 30d" in capsys.readouterr().err
