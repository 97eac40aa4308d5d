"""Every process notes what it is doing, so that one that keeps the others waiting can be named."""

import json
import os
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from vlm_lab.batch import Batch
from vlm_lab.module import VLMTraining
from vlm_lab.pulses import PHASES, WIDTH, pulse_file


class Pulse(Callback):
    """Overwrites RUN/ranks/<rank>.json three times per row; `vlm_lab.pulses` reads it when a process fails."""

    def __init__(self, run: Path, stage: str, rank: int) -> None:
        self.stage, self.rank = stage, rank
        path = pulse_file(run, rank)
        path.parent.mkdir(exist_ok=True)
        self.file = os.open(path, os.O_CREAT | os.O_WRONLY)
        self.row = 0
        self.ids: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, module: VLMTraining, batch: Batch, index: int) -> None:
        self.row, self.ids = index, batch.ids[:4]
        self.note(trainer, "forward")

    def on_before_backward(self, trainer: Trainer, module: VLMTraining, loss: Any) -> None:
        self.note(trainer, "backward")

    def on_train_batch_end(self, trainer: Trainer, module: VLMTraining, outputs: Any, batch: Batch, index: int) -> None:
        self.row, self.ids = index + 1, []
        self.note(trainer, "loading")

    def note(self, trainer: Trainer, phase: str) -> None:
        assert phase in PHASES
        pulse = {"stage": self.stage, "step": trainer.global_step + 1, "row": self.row, "phase": phase}
        text = json.dumps({**pulse, "at": time.time(), "samples": [name[:60] for name in self.ids]})
        os.pwrite(self.file, text.ljust(WIDTH).encode(), 0)
