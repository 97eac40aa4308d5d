"""What stops a stage, or is said about it: numbers that are not finite, memory, spikes, silent processes."""

import json
import os
import resource
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from processes import run_folder, start, start_tree
from test_fit import fit

from vlm_lab.callbacks import Checkpoints
from vlm_lab.callbacks.meter import is_spike
from vlm_lab.data.process import Processor
from vlm_lab.module import VLMTraining


class Poison(Callback):
    """In step 6 one weight of the connector gets a number (a flipped bit), or its gradient does (an overflow)."""

    def __init__(self, number: float, gradient: bool) -> None:
        self.number, self.gradient = number, gradient
        self.before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: VLMTraining, batch: object, index: int) -> None:
        if trainer.global_step != 5 or self.before:
            return
        weight = pl_module.vlm.connector.project[0].weight
        self.before = {name: tensor.clone() for name, tensor in pl_module.vlm.llm.state_dict().items()}
        if self.gradient:
            weight.register_hook(lambda gradient: gradient * self.number)
        else:
            weight.data[0, 0] = self.number


@pytest.mark.parametrize(("number", "gradient"), [(float("nan"), False), (float("inf"), True)])
def test_not_finite(processor: Processor, tmp_path: Path, number: float, gradient: bool) -> None:
    """The step is not taken; the message has its number, its samples (of all rows) and the last good checkpoint."""
    culprit, what = Poison(number, gradient), "gradient" if gradient else "loss"
    saver = Checkpoints(tmp_path / "checkpoints", 2, 2)
    with pytest.raises(FloatingPointError, match=rf"{what} of step 6 is not finite; its samples: c\d+") as caught:
        fit(processor, tmp_path, micro_batch=4, extra=(culprit, saver))
    assert str(caught.value).count(",") == 7
    assert caught.value.__notes__ == [f"last checkpoint: {tmp_path}/checkpoints/step-4.ckpt"]
    model = caught.traceback[-1].frame.f_locals["self"].vlm.llm.state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in culprit.before.items())


def nan_in_rank_1() -> None:
    """The third row of the second process has a loss that is not a number."""
    from vlm_lab.batch import Batch
    from vlm_lab.model.vlm import VLM

    forward, calls = VLM.forward, []

    def broken(self: VLM, batch: Batch) -> torch.Tensor:
        calls.append(batch)
        return forward(self, batch) * (float("nan") if os.environ["RANK"] == "1" and len(calls) == 3 else 1)

    VLM.forward = broken


def test_not_finite_in_one_of_two_processes(tmp_path: Path, cache: Path) -> None:
    """Under ZeRO, which keeps the gradients to itself: all processes stop, and only the culprit's samples are named."""
    options = ["trainer.devices=2", "trainer.strategy=zero2", "++trainer.checkpoint_every=1", "trainer.num_workers=0"]
    run = run_folder(tmp_path, cache, *options, "stages.align.steps=5")
    processes = start_tree(run, "align", 2, nan_in_rank_1)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    reason = json.loads((run / "failure.json").read_text())["reason"]
    assert "loss of step 3 is not finite; its samples: " in reason
    assert reason.split("samples: ")[1].split(";")[0].count(",") == 1  # two of the step's four
    assert reason.endswith("step-2.ckpt")


def little_memory() -> None:
    """From the first step on, 100 MiB of address space more than the process has by then."""
    from vlm_lab.module import VLMTraining

    begin = VLMTraining.on_train_start

    def limited(self: VLMTraining) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 100 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        begin(self)

    VLMTraining.on_train_start = limited


def test_out_of_memory_says_what_would_fit(tmp_path: Path, cache: Path) -> None:
    """A real failure of the allocator: gradients of 230 MiB of weights do not fit."""
    wide = ["llm.shape.intermediate_size=300000", "trainer.num_workers=0", "stages.align.steps=1"]
    run = run_folder(tmp_path, cache, *wide)
    process = start(run, before=little_memory)
    process.join(60)
    assert process.exitcode == 1
    reason = json.loads((run / "failure.json").read_text())["reason"]
    assert "can't allocate memory" in reason
    assert "what needs less: stages.align.micro_batch=2 (now 4, same result)" in reason
    assert "trainer.gradient_checkpointing=true" in reason and "stages.align.optimizer=adamw8bit" in reason


class Jump(Callback):
    """Training takes a wrong turn in step 30."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: VLMTraining, batch: object, index: int) -> None:
        if trainer.global_step == 29:
            pl_module.vlm.llm.model.norm.weight.data *= -50


def test_a_loss_spike_is_flagged(processor: Processor, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(processor, tmp_path, steps=30, extra=(Jump(),))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("spike")] == [30]
    assert "loss spike at align step 30" in " ".join(capsys.readouterr().err.split())


def test_what_a_spike_is() -> None:
    """Hand-worked: a median of 2 and deviations of 1.4826 * 0.1 allow up to 3.186; a short past allows all."""
    past = [1.9, 2.0, 2.1] * 10
    assert not is_spike(3.18, past) and is_spike(3.19, past)
    assert not is_spike(9.0, past[:19])
    assert not is_spike(float("-inf"), past)


def stall_in_rank_1() -> None:
    """The second process falls asleep in the forward pass of step 3."""
    from vlm_lab.batch import Batch
    from vlm_lab.model.vlm import VLM

    forward, calls = VLM.forward, []

    def slow(self: VLM, batch: Batch) -> torch.Tensor:
        calls.append(batch)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            time.sleep(60)
        return forward(self, batch)

    VLM.forward = slow


def test_a_silent_process_is_named(tmp_path: Path, cache: Path) -> None:
    options = ["trainer.devices=2", "++trainer.timeout_s=3", "trainer.num_workers=0", "stages.align.steps=5"]
    run = run_folder(tmp_path, cache, *options)
    waiting, silent = start_tree(run, "align", 2, stall_in_rank_1)
    waiting.join(40)
    silent.kill()
    assert waiting.exitcode == 1
    reason = json.loads((run / "failure.json").read_text())["reason"]
    assert "rank 1 is behind (rank 0: backward in step 3" in reason
    assert "rank 1: forward in step 3 of samples" in reason
