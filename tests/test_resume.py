"""Exact resume: a run that was killed at any step continues to the losses and weights of one that never stopped."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import finish, lines, run_folder, start, store_of
from safetensors.torch import load_file
from test_fit import fit

from vlm_lab.callbacks import AtomicFiles, Average, Background, Checkpoints, latest
from vlm_lab.callbacks.checkpoints import saved
from vlm_lab.data.process import Processor

STEPS = 8
LORA = "{lr:1.0e-3,adapt:lora,rank:2,dropout:0.2}"  # dropout draws from the global generator
BASE = [f"stages.align.steps={STEPS}", f"stages.instruct.steps={STEPS}", "eval.limit=1", "eval.images=[real]"]
CASES = {
    # packed rows, noise, accumulation; then adapters with dropout under 8-bit states
    "main process": ["trainer.num_workers=0", "++stages.align.neftune=5.0", "stages.align.micro_batch=1"],
    # two workers, a mixture of two sources, a schedule with warmup per path; averaged weights, background writing
    "workers": [
        "++stages.align.ema=0.9",
        "++trainer.checkpoint_async=true",
        "trainer.num_workers=2",
        "++data.mixtures.caption={captions:0.5,questions:0.5}",
        "++data.shuffle_turns=true",
    ],
}
SECOND = {
    "main process": [f"++stages.instruct.train.llm={LORA}", "++stages.instruct.optimizer=adamw8bit"],
    "workers": [],
}
"""What a later stage adds to a case."""


def numbers(run: Path) -> list[tuple]:
    return [(line["stage"], line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines(run)]


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    store, keys = store_of(run)
    return {stage: load_file(store.path(key) / "model.safetensors") for stage, key in keys.items()}


def assert_equal(run: Path, other: Path) -> None:
    """Bit for bit: every line of metrics.jsonl (but speeds) and every tensor of both stages."""
    assert numbers(run) == numbers(other)
    ours, theirs = weights(run), weights(other)
    for stage, tensors in theirs.items():
        assert ours[stage].keys() == tensors.keys()
        assert [name for name, tensor in tensors.items() if not torch.equal(ours[stage][name], tensor)] == []


def wait_for(run: Path, count: int, process: object) -> bool:
    """Until the live metrics.jsonl has `count` lines; False if the process ends first."""
    while process.is_alive():
        if len(lines(run)) >= count:
            return True
        time.sleep(0.002)
    return False


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_steps(case: str, tmp_path: Path, cache: Path) -> None:
    overrides = [*BASE, *CASES[case], *SECOND[case], "++trainer.checkpoint_every=3"]
    whole = run_folder(tmp_path / "whole", cache, *overrides)
    finish([start(whole)], whole, 120)
    draw, killed = random.Random(case), 0
    run = run_folder(tmp_path / "killed", cache, *overrides)
    for step in sorted(draw.sample(range(1, 2 * STEPS), 3)):
        process = start(run)
        if wait_for(run, step, process):
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
            killed += 1
        process.join()
    finish([start(run)], run, 120)
    assert killed == 3
    assert_equal(run, whole)


@pytest.mark.parametrize("background", ["false", "true"])
def test_sigterm_saves_and_the_same_command_continues(tmp_path: Path, cache: Path, background: str) -> None:
    """Signalled to the whole process group, as cluster schedulers do, loader workers included."""
    overrides = [*BASE, "trainer.num_workers=1", "++trainer.checkpoint_every=1000"]
    overrides += [f"++trainer.checkpoint_async={background}"]
    whole = run_folder(tmp_path / "whole", cache, *overrides)
    finish([start(whole)], whole, 120)
    run = run_folder(tmp_path / "stopped", cache, *overrides)
    process = start(run, group=True)
    assert wait_for(run, 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    store, keys = store_of(run)
    saved = list((store.partial(keys["align"]) / "checkpoints").glob("step-*.ckpt"))
    reason = json.loads((run / "failure.json").read_text())["reason"]
    assert f"stopped by SIGTERM after step {saved[0].stem.removeprefix('step-')}; the same command" in reason
    finish([start(run)], run, 120)
    assert_equal(run, whole)
    assert not store.partial(keys["align"]).exists()


def test_another_layout_is_refused_another_configuration_starts_anew(tmp_path: Path, cache: Path) -> None:
    overrides = [*BASE, "++trainer.checkpoint_every=2"]
    run = run_folder(tmp_path, cache, *overrides)
    process = start(run)
    assert wait_for(run, 5, process)
    process.kill()
    process.join()
    store, keys = store_of(run)
    assert latest(store.partial(keys["align"]) / "checkpoints") is not None
    other = run_folder(tmp_path, cache, *overrides, "stages.align.micro_batch=2")  # the same key: performance only
    assert store_of(other)[1] == keys
    process = start(other)
    process.join(60)
    reason = json.loads((other / "failure.json").read_text())["reason"]
    assert "rows per step 1, now 2" in reason
    assert "delete the folder to start the stage over" in reason
    changed = run_folder(tmp_path, cache, *overrides, "stages.align.beta2=0.9")
    finish([start(changed)], changed, 120)
    assert [line["step"] for line in lines(changed) if line["stage"] == "align"] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("files", [AtomicFiles(), Background(AtomicFiles(2))], ids=["at once", "background"])
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture, files: AtomicFiles | Background
) -> None:
    """Real writes against a limit on file size; what does not fit leaves nothing, and raises nothing."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    files.save_checkpoint({"step": 1}, folder / "step-1.ckpt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        files.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, folder / "step-2.ckpt")
        files.teardown()  # waits for the thread, if there is one
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.iterdir()] == ["step-1.ckpt"]
    assert "could not be written" in capsys.readouterr().err
    assert torch.load(latest(folder), weights_only=True) == {"step": 1}


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes as long for a checkpoint as training for a few steps."""
    write = AtomicFiles.save_checkpoint

    def slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)
        write(*args, **kwargs)

    monkeypatch.setattr(AtomicFiles, "save_checkpoint", slowly)


def test_background_checkpoints_are_those_of_their_step(processor: Processor, tmp_path: Path, slow_disk: None) -> None:
    """Every third step, the newest four, written while training goes on: bit for bit those that are written at once."""
    found = {}
    for background in ("false", "true"):
        folder = tmp_path / background
        options = ("trainer.checkpoint_keep=4", f"trainer.checkpoint_async={background}")
        fit(processor, tmp_path, extra=(Average(0.9), Checkpoints(folder, every=3, keep=4)), overrides=options)
        found[background] = {path.stem: leaves(torch.load(path, weights_only=True)) for path in saved(folder)}
    assert list(found["false"]) == [f"step-{step}" for step in (9, 12, 15, 18)]
    assert found["true"] == found["false"]
    assert any("average" in path for path in found["true"]["step-9"])


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """{path: value} of a nested container, tensors as their bytes; without what the clock says."""
    if isinstance(value, torch.Tensor):
        return {path: value.numpy().tobytes()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in leaves(item, f"{path}/{key}").items()}
    return {} if path.endswith(("/seconds", "/first_step_at")) else {path: value}
