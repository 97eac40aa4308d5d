"""The whole path in real processes: two stages, evaluation, reuse, failure, two processes, the run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, composed, max_difference, small
from PIL import Image
from safetensors.torch import load_file

from vlm_lab import chat, launch, schema

SMALL = ["bootstrap=[]", *small(), "stages.align.steps=2", "stages.instruct.steps=3"]


def train(output: Path, *overrides: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    absent = "stages.instruct" if "stage=[align]" in overrides else "-"
    small = [setting for setting in SMALL if not setting.startswith(absent)]
    command = [sys.executable, str(ROOT / "train.py"), *small, f"output={output}", *overrides]
    result = subprocess.run(command, cwd=output, capture_output=True, text=True, timeout=240, check=False)
    assert (result.returncode == 0) == ok, result.stdout + result.stderr
    return result


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def only_run(output: Path) -> Path:
    (run,) = (output / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def finished(output: Path) -> subprocess.CompletedProcess[str]:
    return train(output, "logger=wandb", "logger.samples=4")


def test_run_folder_contract(finished: subprocess.CompletedProcess[str], output: Path) -> None:
    run = only_run(output)
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "ok"
    assert {"eval/avg", "eval/scenes/general", "eval/scenes.none/all", "eval/scenes.shuffled/all"} <= result[
        "metrics"
    ].keys()
    assert list(result["stages"]) == ["align", "instruct"]
    stage = result["stages"]["instruct"]
    assert (stage["steps"], stage["samples"], stage["world_size"], stage["reused"]) == (3, 12, 1, False)
    assert stage["label_tokens"] > 0
    rates = {row["module"]: row["lr"] for row in stage["trainable"]}
    assert rates == {"encoder": None, "connector": 3e-3, "llm": 3e-3}
    assert {"git", "versions", "seed", "config_hash", "wall_s", "world_size"} <= result.keys()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("align", 1), ("align", 2)] + [
        ("instruct", s) for s in (1, 2, 3)
    ]
    assert all(line["loss"] > 0 and line["tokens_per_s"] > 0 for line in lines)
    weights = load_file(run / "stages" / "instruct" / "model.safetensors")
    assert any(name.startswith("encoder.siglip") for name in weights)
    records = [json.loads(line) for line in (run / "eval" / "scenes.real.jsonl").read_text().splitlines()]
    assert len(records) == 16
    assert {"id", "group", "question", "target", "prediction"} <= records[0].keys()


def test_a_run_has_the_same_name_wherever_outputs_go() -> None:
    places = ("outputs", "/data/outputs")
    folders = [launch.run_folder(schema.check(composed(f"output={place}"))) for place in places]
    assert folders[0].name == folders[1].name
    other = launch.run_folder(schema.check(composed("output=outputs", "stages.align.steps=7")))
    assert other.name != folders[0].name


def test_the_terminal_shows_the_table_and_the_folder(finished: subprocess.CompletedProcess[str], output: Path) -> None:
    for text in ("real image", "no image", "shuffled", "vision_centric", "what trains", "result.json"):
        assert text in finished.stdout
    assert "tokens/s" in finished.stderr


def test_wandb_run_reads_back(finished: subprocess.CompletedProcess[str], output: Path) -> None:
    """The offline run holds config, group, job type, tags, losses, scores, and the table with its images."""
    (folder,) = (only_run(output) / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for wanted in (
        '"job_type":"train"',
        "siglip",
        "train/loss",
        "eval/avg",
        "samples/scenes.real",
        "trainer/global_step",
    ):
        assert wanted.replace(" ", "") in text.replace(" ", ""), wanted
    staged = [path for path in (only_run(output) / "wandb" / "artifacts" / "staging").iterdir() if path.stat().st_size]
    assert sum(is_png(path) for path in staged) == 8  # four rows with the real image, four with a shuffled one


def test_chat_answers_from_the_run_folder_alone(
    finished: object, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (40, 30), "red").save(output / "red.png")
    (output / "torn.png").write_bytes((output / "red.png").read_bytes()[:60])
    monkeypatch.chdir(output)

    def ask(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["chat", str(only_run(output)), *words])
        chat.main()

    ask("red.png", "red.png", "What colour is it?")
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(SystemExit, match=r"error: rot\.png: no such image file; the question goes last"):
        ask("rot.png", "What colour?")
    with pytest.raises(SystemExit, match=r"error: .*torn\.png"):
        ask("torn.png", "What colour?")


def test_the_same_command_again_reuses_what_is_whole(finished: subprocess.CompletedProcess[str], output: Path) -> None:
    """One of the two stages was damaged on the disk: it is trained anew, and the result says so."""
    before = json.loads((only_run(output) / "result.json").read_text())
    weights = only_run(output) / "stages" / "instruct" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = train(output, "logger=wandb", "logger.samples=4")
    after = json.loads((only_run(output) / "result.json").read_text())
    assert again.stdout.count("reused from") == 1
    assert {name: stage["reused"] for name, stage in after["stages"].items()} == {"align": True, "instruct": False}
    assert after["metrics"] == before["metrics"]
    assert weights.read_bytes() == content


def test_evaluate_works_from_the_run_folder_alone(
    finished: subprocess.CompletedProcess[str], output: Path, tmp_path: Path
) -> None:
    """From another working directory, with a smaller question set."""
    command = [sys.executable, "-m", "vlm_lab.evaluate", str(only_run(output)), "eval.images=[real]", "eval.limit=8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "real image" in result.stdout
    assert "no image" not in result.stdout


def test_two_processes_equal_one(output: Path, tmp_path: Path, finished: subprocess.CompletedProcess[str]) -> None:
    """One torchrun tree of two processes on the same global batches; tests/test_strategies.py has the other cases."""
    train(tmp_path, "trainer.devices=2", "stage=[align]", "eval.images=[real]", "eval.limit=1")
    one, two = only_run(output), only_run(tmp_path)
    result, single = (json.loads((run / "result.json").read_text()) for run in (two, one))
    assert result["world_size"] == result["stages"]["align"]["world_size"] == 2
    assert result["stages"]["align"]["key"] == single["stages"]["align"]["key"]
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    weights = [load_file(run / "stages" / "align" / "model.safetensors") for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0][:2], rel=1e-4)
    assert max(max_difference(weights[0][name], weights[1][name]) for name in weights[0]) < 2e-4


CHILD = """
import signal, sys, time
from pathlib import Path

def save(*_):
    Path(sys.argv[1]).write_text("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
Path(sys.argv[2]).touch()
time.sleep(60)
"""
PARENT = """
import signal, sys
from vlm_lab.children import child

signal.signal(signal.SIGUSR2, lambda *_: sys.exit(9))  # submitit's handler: the job is back in the queue
child("patient", *sys.argv[1:])
"""


def test_a_queues_warning_lets_the_child_save(tmp_path: Path) -> None:
    """Slurm signals all processes of a job before its time is over: the child survives, and is told to stop."""
    (tmp_path / "patient.py").write_text(CHILD)
    saved, started = tmp_path / "saved", tmp_path / "started"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", PARENT, str(saved), str(started)]
    job = subprocess.Popen(command, env=environment, start_new_session=True)
    end = time.monotonic() + 60
    while not started.exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGUSR2)
    assert job.wait(timeout=30) == 9
    assert saved.read_text() == "saved"


def test_a_failing_stage_is_recorded(tmp_path: Path) -> None:
    result = train(
        tmp_path, "data.sources.questions.size=4", "+stages.instruct.train={encoder.siglip.nose:1.0}", ok=False
    )
    record = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert record["status"] == "failed"
    assert "train.encoder.siglip.nose: the model has no parameter below this path" in record["reason"]
    assert record["reason"] in result.stderr.splitlines()[-1]
    assert (only_run(tmp_path) / "config.yaml").is_file()
