"""A sweep that is stopped, then killed, then left alone ends with the same answers and report as one left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT
from test_sweeps import SWEEP, train

from vlm_lab.reporting.analysis import analyse
from vlm_lab.reporting.study import load

MADE_ANEW = ("cost", "total", "provenance")  # what differs between two equal sweeps: time and place


def start(output: Path) -> subprocess.Popen[str]:
    """The sweep in a process group of its own, so that it can be killed with all of its children."""
    command = [sys.executable, str(ROOT / "train.py"), *SWEEP, f"output={output}"]
    return subprocess.Popen(command, cwd=output, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def trained(output: Path, runs: int) -> Callable[[], bool]:
    """Whether that many runs have made their first optimizer step."""
    return lambda: len(list(output.glob("runs/*/metrics.jsonl"))) >= runs


def answers(output: Path) -> dict[str, str]:
    """By arm, seed and way of showing images; the hash behind a run's name knows the output folder."""
    found = output.glob("runs/*/eval/*.jsonl")
    return {f"{path.parts[-3].rpartition('-')[0]}/{path.name}": path.read_text() for path in found}


def report(output: Path) -> str:
    made = analyse(load(output / "sweeps" / "cambrian_frozen_encoder"))
    return json.dumps({key: value for key, value in made.items() if key not in MADE_ANEW}, sort_keys=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert train(output, *SWEEP).returncode == 0
    return output


def test_a_stopped_and_killed_sweep_ends_as_one_left_alone(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(whole / "cache")
    stopped = start(tmp_path)
    wait_until(trained(tmp_path, 1), stopped)
    stopped.terminate()  # the sweep alone: it passes the signal on, and does not begin the next run
    assert "stopped by SIGTERM" in stopped.communicate(timeout=120)[0]
    assert stopped.returncode == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob("runs/*"))) == 1
    killed = start(tmp_path)
    wait_until(trained(tmp_path, 2), killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    last = train(tmp_path, *SWEEP)
    assert last.returncode == 0, last.stderr
    assert "2 runs, 1 finished already" in last.stdout
    assert answers(tmp_path) == answers(whole)
    assert report(tmp_path) == report(whole)
