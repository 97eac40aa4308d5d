"""Toy parts pretrained side by side: by which process, once, and with the same weights."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, small
from safetensors.torch import load_file

from vlm_lab.children import beside, threads

PARTS = ["pretrain_encoder.siglip", "pretrain_encoder.dinov2", "pretrain_llm"]
SMALL = [
    *("encoder=[siglip,dinov2]", "connector=concat", "stage=[align]", "stages.align.steps=2"),
    *("stages.pretrain_encoder.steps=3", "stages.pretrain_llm.steps=3", "eval.limit=1", "eval.images=[real]"),
]


def train(output: Path, threads: int) -> Path:
    """The run folder of a run that may use so many threads."""
    overrides = [setting for setting in small() if not setting.startswith(("stages.instruct", "bootstrap"))]
    command = [sys.executable, str(ROOT / "train.py"), *overrides, *SMALL, f"output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = (output / "runs").iterdir()
    return run


def test_parts_are_pretrained_side_by_side(tmp_path: Path) -> None:
    """The process beside takes what comes last; the weights are those of one process that trains all in order."""
    alone, together = train(tmp_path / "alone", 1), train(tmp_path / "together", 2)
    assert not (alone / "beside").exists()
    (other,) = (together / "beside").iterdir()
    assert list(json.loads((other / "stages.json").read_text())) == PARTS[:0:-1]
    assert (other / "stages" / "pretrain_llm" / "stage.json").exists()
    for part in PARTS:
        one, two = (load_file(run / "stages" / part / "model.safetensors") for run in (alone, together))
        assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    records = [json.loads((run / "result.json").read_text())["stages"] for run in (alone, together)]
    assert [[record[name]["reused"] for name in PARTS] for record in records] == [[False] * 3] * 2
    curves = [(run / "metrics.jsonl").read_text().splitlines() for run in (alone, together)]
    assert [len(lines) for lines in curves] == [3 * 3 + 2] * 2


def test_a_process_beside_that_fails_is_not_missed(tmp_path: Path) -> None:
    log, end = tmp_path / "log.txt", time.monotonic() + 60
    with beside([tmp_path]):
        while not (log.exists() and "config.yaml" in log.read_text()):  # it has none
            assert time.monotonic() < end
            time.sleep(0.1)


def test_threads_are_those_that_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= threads() <= (os.cpu_count() or 1)
