"""The trainability contract: what was declared is what trains, under every strategy."""

from typing import Any

from lightning import Callback, Trainer

from vlm_lab.batch import Batch
from vlm_lab.model import freeze
from vlm_lab.module import VLMTraining
from vlm_lab.strategies import optimized, whole_tensors


class Contract(Callback):
    """What was declared is what trains.

    Before the first step: the table's trained parameters == `requires_grad` == the optimizer's parameters, and frozen
    modules are in evaluation mode. At the end: every trained tensor has moved, every other one is bit-identical. A
    resumed stage is compared with its own beginning.
    """

    def __init__(self) -> None:
        self.before: dict[str, str] = {}
        self.checked = False

    def on_train_batch_start(self, trainer: Trainer, module: VLMTraining, batch: Batch, index: int) -> None:
        if self.checked:
            return
        for what, names in freeze.differences(module.vlm, module.table, optimized(trainer)).items():
            if names:
                raise RuntimeError(f"{what} differs from stages.*.train in {names[:5]}")
        self.check_modes(module)
        self.before = self.before or digests(trainer, module)
        self.checked = True

    def on_train_end(self, trainer: Trainer, module: VLMTraining) -> None:
        self.check_modes(module)
        after = digests(trainer, module)
        if not trainer.is_global_zero:
            return
        trained = {name for name, _ in module.vlm.named_parameters() if freeze.trains(name, module.table)}
        same = {name for name in after if after[name] == self.before[name]}
        still = sorted(trained & same)
        if module.steps == 1:  # the first step moves B alone: as long as it is 0, A gets no gradient
            still = [name for name in still if ".lora_A." not in name]
        moved = sorted(after.keys() - same - trained - tied_to(module.vlm, trained))
        if still or moved:
            raise RuntimeError(f"trained but unmoved: {still[:5]}; frozen but moved: {moved[:5]}")

    def check_modes(self, module: VLMTraining) -> None:
        if awake := freeze.awake(module.vlm):
            raise RuntimeError(f"frozen, but in training mode (dropout, batch statistics): {awake[:5]}")

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]


def digests(trainer: Trainer, module: VLMTraining) -> dict[str, str]:
    """A short hash of every parameter and buffer, on the first process; the others only help to gather."""
    tensors = whole_tensors(module.vlm)
    return {name: freeze.digest(tensor) if trainer.is_global_zero else "" for name, tensor in tensors}


def tied_to(model: Any, names: set[str]) -> set[str]:
    """Every name under which the state dict holds the tensors of `names` (tied embeddings have two)."""
    state = model.state_dict(keep_vars=True)
    shared = {id(state[name]) for name in names}
    return {name for name, tensor in state.items() if id(tensor) in shared}
