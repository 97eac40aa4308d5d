"""DDP, ZeRO-2 and ZeRO-3 on a contrastive stage in two processes: the loss of the global batch, as one process has it.

Each process sees half of a step's pairs, and meets the other's as negatives; the towers are sharded like the encoder.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import max_difference
from processes import run_folder, store_of, train_tree
from safetensors.torch import load_file
from test_strategies import shard_everything

STAGE, STEPS = "clip_lowres.siglip", 4
BASE = [
    "stage=[clip_lowres,align,instruct]",
    "data.sources.pairs.size=40",
    *(f"stages.clip_lowres.{setting}" for setting in (f"steps={STEPS}", "batch=6", "micro_batch=2", "optimizer=adamw")),
    *(f"stages.clip_lowres.{setting}" for setting in ("train.encoder=1.0e-3", "train.towers=1.0e-3")),
    "+stages.clip_lowres.clip=1.0",
    *(f"stages.clip_lowres.towers.{setting}" for setting in ("width=32", "heads=2", "mlp=64", "out_dim=16")),
    "trainer.num_workers=0",
]
STRATEGIES = ("ddp", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """The stage in one process, and in two under every strategy."""
    output = tmp_path_factory.mktemp("contrastive")
    made = {"one": run_folder(output / "one", cache, *BASE)}
    for name in STRATEGIES:
        made[name] = run_folder(output / name, cache, *BASE, "trainer.devices=2", f"trainer.strategy={name}")
    for name, run in made.items():
        train_tree(run, STAGE, 1 if name == "one" else 2, 240, shard_everything if name == "zero3" else None)
    return made


def numbers(run: Path) -> list[tuple[float, ...]]:
    store, keys = store_of(run)
    lines = map(json.loads, (store.path(keys[STAGE]) / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    store, keys = store_of(run)
    return load_file(store.path(keys[STAGE]) / "model.safetensors")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(runs: dict[str, Path], strategy: str) -> None:
    """Losses, gradient norms and weights, within float32's order of summation; the key does not know the strategy."""
    run, one = runs[strategy], runs["one"]
    assert store_of(run)[1][STAGE] == store_of(one)[1][STAGE]
    assert len(numbers(one)) == STEPS
    for mine, single in zip(numbers(run), numbers(one), strict=True):
        assert mine == pytest.approx(single, rel=1e-4)
    ours, expected = weights(run), weights(one)
    assert ours.keys() == expected.keys()
    assert {name.split(".")[0] for name in ours} == {"encoder", "towers"}
    assert max(max_difference(ours[name], expected[name]) for name in expected) < 2e-4
