"""What happens around the steps of a stage: the progress bar, metrics.jsonl, bad records, the trainability contract."""

import json
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm_lab.batch import Batch
from vlm_lab.data.sample import BadRecord
from vlm_lab.model import freeze
from vlm_lab.module import VLMTraining


class Meter(Callback):
    """Counts samples, tokens and seconds; writes a metrics.jsonl line and moves the progress bar once per step.

    Throughput is over the last `window` steps. Only rank 0 prints and writes; every rank takes part in the loss sum.
    `offset` is the number of steps of the stages before, for the logger's common axis.
    """

    def __init__(self, stage: str, path: Path, logger: Any = None, offset: int = 0, window: int = 20) -> None:
        self.stage, self.path, self.logger, self.offset, self.window = stage, path, logger, offset, window
        self.samples = self.tokens = self.answers = 0
        self.lines: list[str] = []  # what this stage wrote, to be kept beside its weights
        self.first_step_at = 0.0  # seconds since the epoch
        self.marks: list[tuple[float, int, int]] = []  # (time, samples, tokens) of the last steps
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def on_train_start(self, trainer: Trainer, module: VLMTraining) -> None:
        self.started = time.perf_counter()
        self.marks = [(self.started, 0, 0)]
        self.task = self.bar.add_task(self.stage, total=module.steps, text="")
        if trainer.is_global_zero:
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: VLMTraining, outputs: Any, batch: Batch, index: int) -> None:
        self.samples += len(batch.ids) * trainer.world_size
        self.tokens += batch.input_ids.numel() * trainer.world_size
        if batch.part == batch.parts - 1:
            self.answers += int(module.total)
            self.step_done(trainer, module)

    def step_done(self, trainer: Trainer, module: VLMTraining) -> None:
        loss, now = module.loss_of_step(), time.perf_counter()
        self.first_step_at = self.first_step_at or time.time()
        self.marks = [*self.marks[-self.window :], (now, self.samples, self.tokens)]
        since, samples, tokens = self.marks[0]
        seconds = now - since
        rates = {"samples_per_s": (self.samples - samples) / seconds, "tokens_per_s": (self.tokens - tokens) / seconds}
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        line = {"stage": self.stage, "step": trainer.global_step, "loss": loss, "lr": lr, **rates}
        if trainer.is_global_zero:
            self.lines.append(json.dumps(line) + "\n")
            with self.path.open("a") as file:
                file.write(self.lines[-1])
            text = f"loss {loss:.3f}  {rates['samples_per_s']:.0f} samples/s  {rates['tokens_per_s']:.0f} tokens/s"
            self.bar.update(self.task, advance=1, text=text)
            if self.logger is not None:
                self.logger.log_step({"loss": loss, "lr": lr, **rates}, self.offset + trainer.global_step)

    def on_train_end(self, trainer: Trainer, module: VLMTraining) -> None:
        self.seconds = time.perf_counter() - self.started
        self.bar.stop()

    def on_exception(self, trainer: Trainer, module: VLMTraining, exception: BaseException) -> None:
        self.bar.stop()

    def summary(self) -> dict[str, Any]:
        """Totals over all processes, for stage.json."""
        counts = {"samples": self.samples, "tokens": self.tokens, "label_tokens": self.answers}
        return {**counts, "seconds": self.seconds, "first_step_at": self.first_step_at}


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


class Contract(Callback):
    """What was declared is what trains.

    Before step 1: the table's trained parameters == `requires_grad` == the optimizer's parameters. At the end: every
    trained tensor has moved, every other one is bit-identical.
    """

    def on_train_start(self, trainer: Trainer, module: VLMTraining) -> None:
        vlm, table = module.vlm, module.stage.train
        named = dict(vlm.named_parameters())
        declared = {name for name in named if freeze.rate(name, table) is not None}
        requires = {name for name, parameter in named.items() if parameter.requires_grad}
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        optimized = {name for name, parameter in named.items() if id(parameter) in held}
        for what, names in (("requires_grad", requires), ("the optimizer", optimized)):
            if names != declared:
                raise RuntimeError(f"{what} differs from stages.*.train in {sorted(names ^ declared)[:5]}")
        self.trained, self.before = declared, freeze.digests(vlm)

    def on_train_end(self, trainer: Trainer, module: VLMTraining) -> None:
        after = freeze.digests(module.vlm)
        still = [name for name in self.trained if after[name] == self.before[name]]
        moved = [name for name in after if name not in self.trained and after[name] != self.before[name]]
        tied = tied_to(module.vlm, self.trained)
        moved = [name for name in moved if name not in tied]
        if still or moved:
            raise RuntimeError(f"trained but unmoved: {still[:5]}; frozen but moved: {moved[:5]}")


def tied_to(model: Any, names: set[str]) -> set[str]:
    """Other names under which the state dict holds the tensors of `names` (tied embeddings)."""
    state = model.state_dict(keep_vars=True)
    shared = {id(state[name]) for name in names}
    return {name for name, tensor in state.items() if id(tensor) in shared}
