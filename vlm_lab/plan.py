"""What a run will need, before any GPU is taken: parameters per module and stage, memory for weights and training.

    python -m vlm_lab.plan experiment=cambrian1 scale=full trainer=zero3

Takes train.py's overrides. The model is built on torch's meta device: no weights, no data, no network, in seconds.
The memory is that of weights, gradients and optimizer state, as ZeRO divides them; activations come on top and depend
on micro_batch and lengths. No prediction of time.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from rich.table import Table

from vlm_lab import schema
from vlm_lab.config import Config
from vlm_lab.console import console
from vlm_lab.explain import CONFIG_ERRORS, explain
from vlm_lab.model import freeze
from vlm_lab.model.vlm import VLM
from vlm_lab.module import VLMTraining
from vlm_lab.parts import empty_model, stage_model
from vlm_lab.stages import Stage

CONF = Path(__file__).parent.parent / "conf"
EVERYTHING = ("weights", "gradients", "optimizer")
SHARDED = {"zero2": ("gradients", "optimizer"), "zero3": EVERYTHING, "fsdp": EVERYTHING}  # what is divided


@dataclass(frozen=True)
class Memory:
    """GiB per device."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def parameters(model: VLM) -> dict[str, int]:
    """Parameters of each encoder, the connector, the LLM, and `total`; tied weights count once."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        head = name.split(".")
        module = ".".join(head[: 2 if head[0] == "encoder" else 1])
        counts[module] = counts.get(module, 0) + parameter.numel()
    return {**counts, "total": sum(counts.values())}


def trainable(config: Config, stage: Stage) -> list[freeze.Row]:
    """The trainability table that the stage will print, adapters included."""
    with torch.device("meta"):
        model = stage_model(config, stage, weights=False)
        module = VLMTraining(model, stage, steps=1)
    return freeze.trainability(model, module.table)


def memory(total: int, trained: int, config: Config, averaged: bool = False) -> Memory:
    """AdamW in `trainer.precision`: two fp32 moments; DeepSpeed keeps an fp32 copy of weights that are half as wide.

    An average of the weights counts as state of the optimizer.
    """
    options = config.trainer
    wide = 2 if options.precision == "bf16-true" else 4  # bytes
    sizes = {
        "weights": wide * total,
        "gradients": wide * trained,
        "optimizer": (8 + 4 * (wide == 2) + 4 * averaged) * trained,
    }
    for kind in SHARDED.get(options.strategy.removesuffix("_offload"), ()):
        sizes[kind] //= options.devices
    return Memory(**{kind: size / 2**30 for kind, size in sizes.items()})


def show(config: Config) -> None:
    table = Table("module", "parameters")
    for name, count in parameters(empty_model(config)).items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    for name, stage in config.stages.items():
        rows = trainable(config, stage)
        trained = sum(row.trained for row in rows)
        need = memory(sum(row.params for row in rows), trained, config, stage.ema is not None)
        parts = f"weights {need.weights:.1f}, gradients {need.gradients:.1f}, optimizer {need.optimizer:.1f}"
        share = f"trains {trained:,} of {sum(row.params for row in rows):,}"
        console.print(f"{name}: {share}; {need.total:.1f} GiB per device before activations ({parts})", highlight=False)


def main() -> None:
    schema.register_resolvers()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = schema.check(compose("train", overrides=sys.argv[1:]))
        show(config)
    except CONFIG_ERRORS as error:
        sys.exit(f"error: {explain(error)}")


if __name__ == "__main__":
    main()
