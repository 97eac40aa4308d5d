"""The average of the weights: the formula by hand, what it leaves alone, and what a stage hands on."""

from pathlib import Path

import pytest
import torch
from helpers import composed, max_difference
from lightning import Callback, Trainer
from processes import finish, run_folder, start, store_of
from safetensors.torch import load_file
from test_fit import STEPS, fit
from torch import Tensor

from vlm_lab import schema
from vlm_lab.batch import Batch
from vlm_lab.callbacks import Average
from vlm_lab.data.process import Processor
from vlm_lab.module import VLMTraining

DECAY = 0.8


class Steps(Callback):
    """Every step's weights, as the optimizer left them."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: VLMTraining, outputs: object, batch: Batch, i: int) -> None:
        if batch.part == batch.parts - 1:
            self.weights.append({name: p.detach().clone() for name, p in module.vlm.named_parameters()})


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_the_formula_by_hand(processor: Processor, tmp_path: Path, micro_batch: int) -> None:
    """W_1, then 0.8 average + 0.2 W_n, in float64, once per step and not per row: within 1e-6. Frozen: bit for bit."""
    steps = Steps()
    table = {"connector": 3e-3, "llm.model.layers.1": 3e-3}
    module, _ = fit(processor, tmp_path, micro_batch=micro_batch, extra=(steps, Average(DECAY)), train=table)
    assert len(steps.weights) == STEPS
    for name, parameter in module.vlm.named_parameters():
        seen = [weights[name].double() for weights in steps.weights]
        if not parameter.requires_grad:
            assert torch.equal(parameter, steps.weights[0][name])
            continue
        expected = DECAY ** (STEPS - 1) * seen[0]
        expected = expected + sum((1 - DECAY) * DECAY ** (STEPS - n) * seen[n - 1] for n in range(2, STEPS + 1))
        assert (parameter.double() - expected).abs().max() < 1e-6
        assert not torch.equal(parameter, steps.weights[-1][name])


def test_a_stage_hands_on_the_average(tmp_path: Path, cache: Path) -> None:
    """With a decay near 1 those are the weights after the first step, where the plain stage went on for three more."""
    base = ["stages.align.steps=4", "stages.instruct.steps=1", "eval.limit=1", "eval.images=[real]"]
    found = []
    for ema in ("null", "0.999999999"):
        run = run_folder(tmp_path, cache, *base, "trainer.num_workers=0", f"stages.align.ema={ema}")
        finish([start(run)], run, 300)
        store, keys = store_of(run)
        found.append((keys["align"], load_file(store.path(keys["align"]) / "model.safetensors")))
    (key, plain), (other, averaged) = found
    assert key != other
    same = {name for name in plain if torch.equal(plain[name], averaged[name])}
    assert same == {name for name in plain if not name.startswith("connector.")}
    assert min(max_difference(plain[name], averaged[name]) for name in plain.keys() - same) > 1e-4


@pytest.mark.parametrize("trainer", ["zero2", "zero3"])
def test_zero_refuses(trainer: str) -> None:
    with pytest.raises(ValueError, match=r"stages\.align\.ema = 0\.9 needs trainer=gpu, cpu or ddp, not ZeRO"):
        schema.check(composed(f"trainer={trainer}", "stages.align.ema=0.9", "stages.align.optimizer=adamw"))
