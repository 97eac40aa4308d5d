"""The LightningModule of VLM training: loss scaling, optimizer, schedule. The step itself is plain PyTorch (`VLM`)."""

import math
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from vlm_lab.batch import Batch
from vlm_lab.model import freeze
from vlm_lab.model.vlm import VLM
from vlm_lab.schema import Stage


class VLMTraining(LightningModule):
    """Trains `vlm` as `stage` says for `steps` optimizer steps.

    The gradient of a step is that of (sum of cross-entropy) / (answer tokens), both over all rows and all processes, so
    neither accumulation nor packing nor the number of GPUs changes what is learnt.
    """

    def __init__(self, vlm: VLM, stage: Stage, steps: int) -> None:
        super().__init__()
        self.vlm, self.stage, self.steps = vlm, stage, steps
        freeze.apply(vlm, stage.train)
        self.total = torch.zeros(())  # answer tokens of the current step, over all processes
        self.step_loss = torch.zeros(())  # this process's share of the current step's loss

    def on_train_epoch_start(self) -> None:
        freeze.train_mode(self.vlm)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if batch.part == 0:
            self.total = self.sum_over_processes(torch.tensor(float(batch.num_answers), device=self.device)).clamp(
                min=1
            )
            self.step_loss = torch.zeros((), device=self.device)
        loss = self.vlm(batch) / self.total
        self.step_loss += loss.detach()
        return loss * batch.parts * self.trainer.world_size  # undoes Lightning's 1 / parts and the mean over processes

    def sum_over_processes(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def loss_of_step(self) -> float:
        """Mean cross-entropy per answer token of the step that just ended; call it on every process."""
        return float(self.sum_over_processes(self.step_loss.clone()))

    def configure_optimizers(self) -> Any:
        groups = freeze.param_groups(self.vlm, self.stage.train, self.stage.weight_decay)
        optimizer = AdamW(groups, betas=(0.9, self.stage.beta2), fused=True)
        factor = partial(SCHEDULES[self.stage.schedule], steps=self.steps, warmup=round(self.stage.warmup * self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def constant(step: int, steps: int, warmup: int) -> float:
    """Linear warmup from 1 / warmup, then the peak rate."""
    return min(1.0, (step + 1) / (warmup + 1))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warmup, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return constant(step, steps, warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


SCHEDULES = {"constant": constant, "cosine": cosine}
