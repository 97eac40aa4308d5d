"""The trainability contract against the silent bugs that users of other code bases met."""

from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from test_fit import fit
from torch import nn

from vlm_lab.data.process import Processor
from vlm_lab.module import VLMTraining


class Culprit(Callback):
    """Does what a well-meaning line somewhere else in a program does, behind the table's back."""


class LoraBecomesFull(Culprit):
    """The base weights of a LoRA stage are unfrozen again (helpers for gradient checkpointing do)."""

    def setup(self, trainer: Trainer, pl_module: VLMTraining, stage: str) -> None:
        pl_module.vlm.llm.requires_grad_(True)


class LateUnfreeze(Culprit):
    """The encoder is unfrozen after the optimizer was made: it takes gradients, and never moves."""

    def on_train_start(self, trainer: Trainer, pl_module: VLMTraining) -> None:
        pl_module.vlm.encoder.requires_grad_(True)


class LostGroup(Culprit):
    """One parameter group is missing from the optimizer."""

    def on_train_start(self, trainer: Trainer, pl_module: VLMTraining) -> None:
        del trainer.optimizers[0].param_groups[-1]


class Awake(Culprit):
    """Dropout and batch statistics of a frozen tower are switched on by a call to train() on the whole model."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: VLMTraining, *_: object) -> None:
        pl_module.vlm.train()


class Statistics(Culprit):
    """A batch norm in a frozen tower updates its running statistics."""

    def setup(self, trainer: Trainer, pl_module: VLMTraining, stage: str) -> None:
        norm = nn.BatchNorm2d(3).eval().requires_grad_(False)
        pl_module.vlm.encoder["eye"].model.patch_embed.proj.register_module("extra", norm)

    def on_train_batch_end(self, trainer: Trainer, pl_module: VLMTraining, *_: object) -> None:
        norm = pl_module.vlm.encoder["eye"].model.patch_embed.proj.extra
        norm.train()(torch.rand(2, 3, 4, 4))
        norm.eval()


class NewRows(Culprit):
    """Rows are added to the embedding table after the optimizer was made: they are never trained."""

    def on_train_start(self, trainer: Trainer, pl_module: VLMTraining) -> None:
        pl_module.vlm.llm.resize_token_embeddings(402, mean_resizing=False)


class Touch(Culprit):
    """A frozen weight is overwritten in the middle of training."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: VLMTraining, *_: object) -> None:
        with torch.no_grad():
            pl_module.vlm.llm.model.norm.weight[0] += 1e-3


class Detached(Culprit):
    """A trained layer whose output is thrown away gets no gradient."""

    def on_train_start(self, trainer: Trainer, pl_module: VLMTraining) -> None:
        block = pl_module.vlm.encoder["eye"].model.blocks[1]
        block.forward = lambda x, **_: x.detach() + 0 * sum(p.sum() for p in block.parameters()).detach()


CONNECTOR = {"connector": 1e-3}
LORA = {"connector": 1e-3, "llm": {"lr": 1e-3, "adapt": "lora", "rank": 2}}
CASES = [
    (LoraBecomesFull, LORA, r"requires_grad differs .*llm\.lm_head|requires_grad differs .*llm\.model"),
    (LateUnfreeze, CONNECTOR, r"requires_grad differs from stages\.\*\.train in \['encoder\.eye"),
    (LostGroup, {"connector": 1e-3, "encoder": 1e-4}, r"the optimizer differs from stages\.\*\.train"),
    (Awake, CONNECTOR, r"frozen, but in training mode"),
    (Statistics, CONNECTOR, r"frozen but moved: .*extra\.num_batches_tracked"),
    (NewRows, {"llm": 1e-3}, r"the optimizer differs .*embed_tokens|the optimizer differs .*lm_head"),
    (Touch, CONNECTOR, r"frozen but moved: \['llm\.model\.norm\.weight'\]"),
    (Detached, {"connector": 1e-3, "encoder.eye.model.blocks.1": 1e-3}, r"trained but unmoved: \['encoder\.eye"),
]


@pytest.mark.parametrize(("culprit", "table", "message"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_contract_notices(
    processor: Processor, tmp_path: Path, culprit: type[Callback], table: dict, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        fit(processor, tmp_path, train=table, steps=2, extra=(culprit(),))


@pytest.mark.parametrize("adapt", ["lora", "dora", "qlora"])
def test_adapters_keep_the_contract(processor: Processor, tmp_path: Path, adapt: str) -> None:
    """Also for one step, in which LoRA's A cannot move yet."""
    rule = {"lr": 1e-2, "adapt": adapt, "rank": 2}
    for steps in (1, 3):
        module, _ = fit(processor, tmp_path, train={"llm": rule}, steps=steps)
    assert {name.split(".")[-3] for name, p in module.vlm.named_parameters() if p.requires_grad} >= {"lora_A", "lora_B"}
