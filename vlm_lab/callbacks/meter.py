"""The progress bar, metrics.jsonl with its spikes flagged, and the records that could not be used."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from lightning import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm_lab.batch import Batch
from vlm_lab.data.sample import BadRecord
from vlm_lab.module import VLMTraining

COUNTS = ("samples", "tokens", "answers", "seconds", "first_step_at")


class Meter(Callback):
    """Counts samples, tokens and seconds; writes a line to `path` and moves the progress bar once per step.

    Throughput is over the last `window` steps. Only rank 0 prints and writes; every rank takes part in the loss sum.
    `mirror` gets the same lines. `offset` is the number of steps of the stages before, for the logger's common axis.
    A resumed stage keeps the lines up to its checkpoint. `mfu`: what a row asks for and what a device can do (see
    `model/flops.py`), so that lines say which share of the devices' arithmetic is used.
    """

    def __init__(
        self,
        stage: str,
        path: Path,
        mirror: Path | None = None,
        logger: Any = None,
        offset: int = 0,
        window: int = 20,
        mfu: tuple[Callable[[Batch], float], float] | None = None,
    ) -> None:
        self.stage, self.path, self.mirror = stage, path, mirror
        self.logger, self.offset, self.window, self.mfu = logger, offset, window, mfu
        self.flops = 0.0
        self.samples = self.tokens = self.answers = 0
        self.seconds = self.first_step_at = 0.0  # spent in earlier processes; since the epoch
        self.lines: list[str] = []
        self.losses: list[float] = []  # the last ones, to tell a spike
        self.marks: list[tuple[float, int, int, float]] = []  # (time, samples, tokens, FLOPs) of the last steps
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def on_train_start(self, trainer: Trainer, module: VLMTraining) -> None:
        self.started = time.perf_counter() - self.seconds
        self.marks = [(time.perf_counter(), self.samples, self.tokens, self.flops)]
        self.task = self.bar.add_task(self.stage, total=module.steps, completed=len(self.lines), text="")
        if trainer.is_global_zero:
            self.path.write_text("".join(self.lines))
            self.append(self.mirror, *self.lines)
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: VLMTraining, outputs: Any, batch: Batch, index: int) -> None:
        self.samples += len(batch.ids) * trainer.world_size
        self.tokens += batch.num_tokens * trainer.world_size
        if self.mfu is not None:
            self.flops += self.mfu[0](batch) * trainer.world_size
        if batch.part == batch.parts - 1:
            self.answers += int(module.total)
            self.step_done(trainer, module)

    def step_done(self, trainer: Trainer, module: VLMTraining) -> None:
        loss, norm, now = module.loss_of_step(), grad_norm(module), time.perf_counter()
        if not math.isfinite(loss) or not (norm is None or math.isfinite(norm) or trainer.precision == "16-mixed"):
            module.stop_at_nonfinite(trainer.global_step)  # DeepSpeed's: others stop before they take the step
        self.seconds, self.first_step_at = now - self.started, self.first_step_at or time.time()
        self.marks = [*self.marks[-self.window :], (now, self.samples, self.tokens, self.flops)]
        rates = self.rates(trainer.world_size)
        numbers = {"loss": loss, "grad_norm": norm, "lr": learning_rate(trainer), **rates}
        line = {"stage": self.stage, "step": trainer.global_step, **numbers}
        if is_spike(loss, self.losses):
            line["spike"] = True
            names = f"{self.stage} step {trainer.global_step}"
            self.bar.console.print(f"loss spike at {names}: {loss:.3f}, lately {median(self.losses):.3f}")
        self.losses = [*self.losses[-49:], loss]
        if trainer.is_global_zero:
            self.lines.append(json.dumps(line) + "\n")
            self.append(self.path, self.lines[-1])
            self.append(self.mirror, self.lines[-1])
            text = f"loss {loss:.3f}  {rates['samples_per_s']:.0f} samples/s  {rates['tokens_per_s']:.0f} tokens/s"
            text += f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
            self.bar.update(self.task, advance=1, text=text)
            if self.logger is not None:
                self.logger.log_step(numbers, self.offset + trainer.global_step)

    def rates(self, devices: int) -> dict[str, float]:
        """Per second, over the last steps."""
        (since, samples, tokens, flops), (now, *_) = self.marks[0], self.marks[-1]
        seconds = now - since
        rates = {"samples_per_s": (self.samples - samples) / seconds, "tokens_per_s": (self.tokens - tokens) / seconds}
        if self.mfu is not None:
            rates["mfu"] = (self.flops - flops) / seconds / (self.mfu[1] * devices)
        return rates

    @staticmethod
    def append(path: Path | None, *lines: str) -> None:
        if path is not None:
            with path.open("a") as file:
                file.writelines(lines)

    def on_train_end(self, trainer: Trainer, module: VLMTraining) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, module: VLMTraining, exception: BaseException) -> None:
        self.bar.stop()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": len(self.lines), **{name: getattr(self, name) for name in COUNTS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in COUNTS:
            setattr(self, name, state_dict[name])
        if self.path.is_file():  # rank 0's state is everyone's, and so are its lines
            self.lines = self.path.read_text().splitlines(keepends=True)[: state_dict["steps"]]
            self.losses = [json.loads(line)["loss"] for line in self.lines[-50:]]

    def summary(self) -> dict[str, Any]:
        """Totals over all processes, for stage.json."""
        counts = {"samples": self.samples, "tokens": self.tokens, "label_tokens": self.answers}
        return {**counts, "seconds": self.seconds, "first_step_at": self.first_step_at}


def learning_rate(trainer: Trainer) -> float:
    return trainer.optimizers[0].param_groups[0]["lr"]


def grad_norm(module: VLMTraining) -> float | None:
    """Of the step that just ended, before clipping."""
    engine = module.deepspeed_engine
    return module.grad_norm if engine is None else float(engine.get_global_grad_norm())


def is_spike(loss: float, before: list[float]) -> bool:
    """Whether `loss` is more than 8 standard deviations above the median of the last 20 to 50 steps.

    The deviation is 1.4826 times the median absolute one, which earlier spikes do not widen, and at least 2 %.
    """
    if len(before) < 20:
        return False
    middle = median(before)
    deviation = max(1.4826 * median(abs(x - middle) for x in before), 0.02 * middle)
    return loss > middle + 8 * deviation


class BadRecords(Callback):
    """Reports every record that could not be used, and stops the run when there are more than `limit`."""

    def __init__(self, limit: int, path: Path) -> None:
        self.limit, self.path = limit, path
        self.seen: list[BadRecord] = []

    def on_train_batch_start(self, trainer: Trainer, module: VLMTraining, batch: Batch, index: int) -> None:
        for bad in batch.bad:
            self.report(bad)
        if len(self.seen) > self.limit:
            last = self.seen[-1]
            raise ValueError(f"{len(self.seen)} bad records, data.max_bad is {self.limit}; the last one: {last}")

    def report(self, bad: BadRecord) -> None:
        self.seen.append(bad)
        with self.path.open("a") as file:
            file.write(json.dumps({"file": bad.where, "record": bad.record, "reason": bad.reason}) + "\n")
        Console(stderr=True).print(f"bad record {len(self.seen)} (data.max_bad {self.limit}): {bad}", highlight=False)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [[bad.where, bad.record, bad.reason] for bad in self.seen]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for fields in state_dict["seen"]:
            self.report(BadRecord(*fields))
