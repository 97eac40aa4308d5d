"""The LightningModule of VLM training: loss scaling, optimizer, schedule. The step itself is plain PyTorch (`VLM`)."""

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vlm_lab.batch import Batch
from vlm_lab.components import attribute
from vlm_lab.model import adapt, freeze
from vlm_lab.model.checkpointing import checkpoint_activations, keep_checkpointing
from vlm_lab.model.neftune import neftune
from vlm_lab.model.vlm import VLM
from vlm_lab.optimizers import make_optimizer
from vlm_lab.stages import Stage


class VLMTraining(LightningModule):
    """Trains `vlm` as `stage` says for `steps` optimizer steps.

    The gradient of a step is that of (sum of cross-entropy) / (answer tokens), both over all rows and all processes, so
    neither accumulation nor packing nor the number of GPUs changes what is learnt. A checkpoint holds what trains;
    frozen weights come from the stage before. `checkpointing`: gradient checkpointing; None is off, else `reentrant`.
    """

    def __init__(self, vlm: VLM, stage: Stage, steps: int, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.vlm, self.stage, self.steps, self.checkpointing = vlm, stage, steps, checkpointing
        self.strict_loading = False
        self.table = freeze.resolve(vlm, idle(vlm, stage) | rules(stage))
        adapt.inject(vlm, self.table)
        freeze.apply(vlm, self.table)
        if checkpointing is not None:
            checkpoint_activations(vlm, checkpointing)
        self.noise: Any = None  # NEFTune's handle
        self.total = torch.zeros(())  # answer tokens of the current step, over all processes
        self.step_loss = torch.zeros(())  # this process's share of the current step's loss
        self.step_ids: list[str] = []  # this process's samples of the current step
        self.grad_norm: float | None = None  # of the last step, before clipping

    def configure_model(self) -> None:
        """Under FSDP: every block is gathered by itself, the rest with the whole model."""
        if self.device_mesh is None or isinstance(self.vlm, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for name in ("encoder", "llm"):
            for path in freeze.blocks(self.vlm, name) if hasattr(self.vlm, name) else ():
                fully_shard(self.vlm.get_submodule(path), mesh=mesh)
        fully_shard(self.vlm, mesh=mesh)

    def on_train_start(self) -> None:
        freeze.train_mode(self.vlm)
        if self.checkpointing is not None:
            keep_checkpointing(self.vlm)
        if self.stage.neftune is not None:
            self.noise = neftune(self.vlm.llm, self.stage.neftune)

    def on_train_end(self) -> None:
        if self.noise is not None:
            self.noise.remove()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if batch.part == 0:
            answers = torch.tensor(float(batch.num_answers), device=self.device)
            self.total = self.sum_over_processes(answers).clamp(min=1)
            self.step_loss, self.step_ids = torch.zeros((), device=self.device), []
        self.step_ids += batch.ids
        loss = self.vlm(batch) / self.total
        self.step_loss += loss.detach()
        return loss * self.divided_by(batch.parts)

    def divided_by(self, parts: int) -> int:
        """What the gradient will be divided by: Lightning does it by a step's rows, DeepSpeed does it once more."""
        return parts ** (1 if self.deepspeed_engine is None else 2) * self.trainer.world_size

    @property
    def deepspeed_engine(self) -> Any:
        """DeepSpeed's, which then holds gradients and weights; None under other strategies."""
        return getattr(self.trainer.strategy, "deepspeed_engine", None)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def loss_of_step(self) -> float:
        """Mean cross-entropy per answer token of the step that just ended; call it on every process."""
        return float(self.sum_over_processes(self.step_loss.clone()))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by norm, remember it, and stop before a step on a gradient that is not finite."""
        if self.deepspeed_engine is not None:  # it clips by itself, and tells the norm afterwards
            return
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in trained])
        self.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        scaled = self.trainer.precision == "16-mixed"  # there, infinite gradients only mean: try a smaller scale
        if not math.isfinite(self.grad_norm) and not (scaled and math.isfinite(self.loss_of_step())):
            self.stop_at_nonfinite(self.trainer.global_step + 1)
        if gradient_clip_val:
            clip_grads_with_norm_(trained, gradient_clip_val, norm)

    def stop_at_nonfinite(self, step: int) -> None:
        """Raise FloatingPointError naming step and samples: those of the processes whose own loss is not finite."""
        mine = (bool(torch.isfinite(self.step_loss)), self.step_ids)
        found: list[Any] = [mine]
        if self.trainer.world_size > 1:
            found = [None] * self.trainer.world_size
            dist.all_gather_object(found, mine)
        guilty = [ids for finite, ids in found if not finite] or [ids for _, ids in found]
        names = ", ".join(name for ids in guilty for name in ids)
        what = "gradient" if all(finite for finite, _ in found) else "loss"
        raise FloatingPointError(f"{what} of step {step} is not finite; its samples: {names}")

    def configure_optimizers(self) -> Any:
        groups = freeze.param_groups(self.vlm, self.table)
        optimizer = make_optimizer(self.stage, groups, self.vlm)
        schedule = SCHEDULES[self.stage.schedule]
        factors: list[Any] = [
            partial(schedule, steps=self.steps, warmup=round(g["warmup"] * self.steps)) for g in optimizer.param_groups
        ]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        kept = trained | {name for name, _ in self.named_buffers()}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in kept}


def idle(vlm: VLM, stage: Stage) -> freeze.Table:
    """What no sample of the stage can reach: newline embeddings, where its own tiling makes none."""
    without = stage.tiling is not None and not attribute(stage.tiling, "newline")
    return {"connector.newline": None} if without and hasattr(vlm.connector, "newline") else {}


def rules(stage: Stage) -> freeze.Table:
    """The stage's table with nothing left open: its own decay and warmup where a rule has none, alpha = 2 * rank."""
    table: freeze.Table = {}
    for path, rule in stage.train.items():
        if rule is None:
            table[path] = None
            continue
        defaults = {"weight_decay": stage.weight_decay, "warmup": stage.warmup, "alpha": 2.0 * rule.rank}
        given = {name: value for name, value in dict(rule).items() if value is not None}
        table[path] = freeze.Rule(**{**defaults, **given})
    return table


def constant(step: int, steps: int, warmup: int) -> float:
    """Linear warmup from 1 / warmup, then the peak rate."""
    return min(1.0, (step + 1) / (warmup + 1))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warmup, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return constant(step, steps, warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


SCHEDULES = {"constant": constant, "cosine": cosine}
