"""DDP, ZeRO-2, ZeRO-3 and FSDP in two real processes: what one process trains, exact resume, no process that hangs.

Two stages of a VLM whose connector also works inside the LLM: first all of it trains, then the connector and LoRA, with
the encoder frozen. Steps mix texts, questions on one image and on several, so that the ranks' rows differ in images.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import composed, max_difference
from processes import finish, lines, run_folder, start, start_tree, store_of, train_tree
from safetensors.torch import load_file

from vlm_lab import build, schema
from vlm_lab.callbacks import latest
from vlm_lab.data.mixture import Mixture

STAGES, STEPS, BATCH = ("align", "instruct"), 4, 4
BASE = [
    "connector=sva",
    "connector.side=2",
    "connector.hidden=16",
    "connector.heads=2",
    "connector.depth=1",
    "llm.shape.num_hidden_layers=3",
    "data=scenes_interleaved",
    *(f"data.sources.{name}.size=40" for name in ("comparisons", "documents", "text")),
    "data.tasks.multi_image.size=8",
    "+data.mixtures.caption.comparisons=1.0",
    "+data.mixtures.caption.text=2.0",
    *(f"stages.{name}.steps={STEPS}" for name in STAGES),
    *(f"stages.{name}.optimizer=adamw" for name in STAGES),  # for all: ZeRO takes no other
    "stages.align.micro_batch=1",
    "stages.instruct.train.encoder=null",
    "stages.instruct.train.llm={lr:1.0e-3,adapt:lora,rank:2}",
    "trainer.num_workers=0",
    "eval.limit=2",
    "eval.images=[real]",
]
STRATEGIES = ("ddp", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp")


def overrides(strategy: str) -> list[str]:
    common = [*BASE, "trainer.devices=2", f"trainer.strategy={strategy}", "++trainer.checkpoint_every=2"]
    return [*common, f"trainer.gradient_checkpointing={str(strategy == 'fsdp').lower()}"]


def at_start(strategy: str) -> Callable[[], None] | None:
    """What every process does first."""
    return shard_everything if strategy.startswith("zero3") else None


def shard_everything() -> None:
    """DeepSpeed keeps small parameters whole, and here all are small: ZeRO-3 would hide what it does to large ones."""
    from vlm_lab import strategies

    made = strategies.Zero.__init__

    def without_exceptions(self: strategies.Zero, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs)
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    strategies.Zero.__init__ = without_exceptions


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def single(output: Path, cache: Path) -> Path:
    run = run_folder(output / "one", cache, *BASE)
    finish([start(run)], run, 120)
    return run


@pytest.fixture(scope="module")
def double(output: Path, cache: Path) -> dict[str, Path]:
    """The same stages in two processes, under every strategy."""
    runs = {name: run_folder(output / name, cache, *overrides(name)) for name in STRATEGIES}
    for name, run in runs.items():
        for stage in STAGES:
            train_tree(run, stage, 2, 120, at_start(name))
    return runs


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    store, keys = store_of(run)
    return load_file(store.path(keys[stage]) / "model.safetensors")


def numbers(run: Path, stage: str) -> list[tuple[int, float, float, float]]:
    store, keys = store_of(run)
    text = (store.path(keys[stage]) / "metrics.jsonl").read_text()
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in map(json.loads, text.splitlines())]


def images_of_rows(run: Path, stage: str) -> list[list[tuple[int, ...]]]:
    """For each step, each rank's number of images per row."""
    config = schema.load(run / "config.yaml")
    mixed = config.data.mixtures[config.stages[stage].mixture]
    sources = [build.sources(config)[name] for name in mixed]
    mixture = Mixture([len(source) for source in sources], list(mixed.values()), config.seed)
    drawn = [mixture[draw] for draw in range(STEPS * BATCH)]
    counts = [len(sources[source][index].images) for source, index in drawn]
    return [[tuple(counts[step + rank : step + BATCH : 2]) for rank in (0, 1)] for step in range(0, len(counts), BATCH)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(single: Path, double: dict[str, Path], strategy: str, stage: str) -> None:
    """Losses, gradient norms (accumulated over rows) and weights, within float32's order of summation."""
    assert store_of(double[strategy])[1] == store_of(single)[1]
    same_but_for_rounding(double[strategy], single, stage)


def same_but_for_rounding(run: Path, one: Path, stage: str = "align") -> None:
    for mine, its in zip(numbers(run, stage), numbers(one, stage), strict=True):
        assert mine == pytest.approx(its, rel=1e-4)
    ours, expected = weights(run, stage), weights(one, stage)
    assert ours.keys() == expected.keys()  # frozen ones, too
    assert max(max_difference(ours[name], expected[name]) for name in expected) < 2e-4


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_compiled_layers_in_two_processes(single: Path, tmp_path: Path, cache: Path, strategy: str) -> None:
    run = run_folder(tmp_path, cache, *overrides(strategy), "trainer.compile=true")
    train_tree(run, "align", 2, 240)
    same_but_for_rounding(run, single)


def test_frozen_weights_pass_through(double: dict[str, Path]) -> None:
    """Bit for bit from the first stage's file to the second's; adapters are merged, so what they adapt has moved."""
    for run in double.values():
        first, second = weights(run, "align"), weights(run, "instruct")
        assert first.keys() == second.keys()
        same = {name for name in first if torch.equal(first[name], second[name])}
        assert {name for name in first if name.startswith("encoder.")} <= same
        assert "llm.model.norm.weight" in same
        assert "llm.model.layers.0.mlp.up_proj.weight" not in same


def test_the_ranks_rows_did_differ(double: dict[str, Path]) -> None:
    """What was trained above had a text-only row beside one with images, and rows with different numbers of images."""
    rows = [pair for ranks in images_of_rows(double["zero3"], "align") for pair in zip(*ranks, strict=True)]
    assert any(0 in pair and max(pair) > 0 for pair in rows)
    assert any(0 not in pair and len(set(pair)) == 2 for pair in rows)


def test_evaluation_after_zero3(double: dict[str, Path], single: Path) -> None:
    """The sharded stages are whole in the store: generation from them answers as after training in one process."""
    run = double["zero3"]
    finish([start(run)], run, 120)
    for task in ("scenes", "multi_image"):
        ours, theirs = ((r / "eval" / f"{task}.real.jsonl").read_text() for r in (run, single))
        assert len(ours.splitlines()) == 2
        assert [json.loads(line)["id"] for line in ours.splitlines()] == [
            json.loads(line)["id"] for line in theirs.splitlines()
        ]


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
def test_half_precision(single: Path, tmp_path: Path, cache: Path, strategy: str) -> None:
    """Trains in bf16, into which DeepSpeed turns weights but no buffer: losses within 2 % of fp32's."""
    run = run_folder(tmp_path, cache, *overrides(strategy), "trainer.precision=bf16-mixed")
    train_tree(run, "align", 2, 120, at_start(strategy))
    losses = [loss for _, loss, _, _ in numbers(run, "align")]
    assert losses == pytest.approx([loss for _, loss, _, _ in numbers(single, "align")], rel=0.02)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ddp"])
def test_killed_and_resumed(double: dict[str, Path], tmp_path: Path, cache: Path, strategy: str) -> None:
    """Killed behind a checkpoint; the continued stage has the same losses and weights, bit for bit."""
    run = run_folder(tmp_path, cache, *overrides(strategy))
    kill_behind_a_checkpoint(run, at_start(strategy))
    store, keys = store_of(run)
    found = latest(store.partial(keys["align"]) / "checkpoints")
    assert found is not None and found.stem == "step-2"
    train_tree(run, "align", 2, 120, at_start(strategy))
    same_to_the_bit(run, double[strategy])


def kill_behind_a_checkpoint(run: Path, before: Callable[[], None] | None = None) -> None:
    processes = start_tree(run, "align", 2, before)
    while len(lines(run)) < 3 and all(process.is_alive() for process in processes):
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()


def same_to_the_bit(run: Path, other: Path) -> None:
    assert numbers(run, "align") == numbers(other, "align")
    ours, expected = weights(run, "align"), weights(other, "align")
    assert [name for name, tensor in expected.items() if not torch.equal(ours[name], tensor)] == []


def test_average_and_checkpoints_in_the_background_under_ddp(tmp_path: Path, cache: Path) -> None:
    """Two processes hand on one process' average; killed, wherever the writing was, they go on to it bit for bit."""
    one = run_folder(tmp_path / "one", cache, *BASE, "stages.align.ema=0.8")
    train_tree(one, "align", 1, 120)
    added = ("stages.align.ema=0.8", "++trainer.checkpoint_async=true")
    two, killed = (run_folder(tmp_path / name, cache, *overrides("ddp"), *added) for name in ("two", "killed"))
    train_tree(two, "align", 2, 120)
    same_but_for_rounding(two, one)
    kill_behind_a_checkpoint(killed)
    train_tree(killed, "align", 2, 120)
    same_to_the_bit(killed, two)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("stages.align.ema=0.9", "stages.align.ema = 0.9 needs trainer=gpu, cpu or ddp, not FSDP"),
        ("stages.align.optimizer=muon", "stages.align.optimizer = muon needs trainer=gpu, cpu or ddp, not FSDP"),
        ("trainer.compile=true", "trainer.compile = true needs trainer=gpu, cpu or ddp, not FSDP"),
        ("trainer.checkpoint_async=true", "trainer.checkpoint_async = true needs trainer=gpu, cpu or ddp, not FSDP"),
        ("trainer.precision=16-mixed", "trainer.precision = 16-mixed needs trainer=gpu, cpu or ddp, not FSDP"),
        ("trainer.feature_cache=on", "under FSDP all processes run the encoder together; say auto"),
        ("bootstrap=[encoder]", "FSDP cannot, use trainer=ddp or zero2, or bootstrap=[]"),
    ],
)
def test_what_fsdp_refuses(override: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        schema.check(composed("trainer=fsdp", override))


def unguarded() -> None:
    """A text-only row skips the encoder, as it does in code bases whose users report deadlocks."""
    from vlm_lab.batch import Batch
    from vlm_lab.model import vlm

    shard_everything()
    forward = vlm.VLM.forward

    def skipping(self: vlm.VLM, batch: Batch) -> torch.Tensor:
        if batch.layouts:
            return forward(self, batch)
        return self.llm(input_ids=batch.input_ids).logits.sum()

    vlm.VLM.forward = skipping


def test_without_the_guard_it_hangs_and_the_rank_is_named(tmp_path: Path, cache: Path) -> None:
    run = run_folder(tmp_path, cache, *overrides("zero3"), "++trainer.timeout_s=5")
    processes = start_tree(run, "align", 2, unguarded)
    started = time.time()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    assert time.time() - started < 60
    reason = json.loads((run / "failure.json").read_text())["reason"]
    assert "is behind (rank 0: " in reason
