"""Exponential moving average of the weights that train (`stages.*.ema`), which the stage hands on in their place.

    average = first weights; then average = decay * average + (1 - decay) * weights, after every optimizer step

The first weights are those after the first step, as in torch's `AveragedModel`. Kept in float32, since half precision
would lose the small changes. Lightning's `WeightAveraging` is not used: it copies the frozen weights too, also into
every checkpoint. Buffers (batch statistics) are the last ones, not averages.
"""

from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vlm_lab.batch import Batch
from vlm_lab.module import VLMTraining


class Average(Callback):
    """Averages with `decay` in (0, 1). In front of `Checkpoints`, which saves it, and behind `Contract`, whose subject
    are the weights that the optimizer left."""

    def __init__(self, decay: float) -> None:
        self.update = get_ema_multi_avg_fn(decay)
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, module: VLMTraining, outputs: Any, batch: Batch, index: int) -> None:
        if batch.part < batch.parts - 1:
            return
        weights = {name: p.detach().float() for name, p in module.named_parameters() if p.requires_grad}
        if not self.average:
            self.average = {name: weight.clone() for name, weight in weights.items()}
            return
        self.average = {name: self.average[name].to(weight.device) for name, weight in weights.items()}
        self.update(list(self.average.values()), list(weights.values()), 0)  # in place; the count is not used

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, module: VLMTraining) -> None:
        for name, parameter in module.named_parameters():
            if name in self.average:
                parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]
