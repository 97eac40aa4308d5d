"""Compiled blocks: the losses and gradients of plain ones, one graph for rows of every shape, names as they were."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import ColourSource, composed, max_difference
from processes import finish, lines, run_folder, start, store_of
from test_inside import DEEP, SVA_TINY
from torch._dynamo.utils import counters

from vlm_lab import schema
from vlm_lab.batch import IGNORE, Batch
from vlm_lab.data.loader import pack
from vlm_lab.data.process import Processor
from vlm_lab.model import adapt, freeze
from vlm_lab.model.checkpointing import checkpoint_activations, keep_checkpointing
from vlm_lab.model.compiled import compile_blocks
from vlm_lab.model.connectors.sva import SVA
from vlm_lab.model.llms import build_llm
from vlm_lab.model.vlm import VLM

BACKEND = "aot_eager"  # traces, splits and differentiates as the real one, without a C++ compiler
LORA = {"llm": freeze.Rule(1e-3, "lora", rank=2), "connector": freeze.Rule(1e-3)}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def packed(processor: Processor, *rows: tuple[int, int]) -> list[Batch]:
    """Packed rows of the colour source's records from `start` to `end`."""
    examples = [processor.example(ColourSource()[index]) for index in range(24)]
    return [pack(examples[start:end], processor) for start, end in rows]


def losses_and_gradients(model: VLM, rows: list[Batch]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of every row, per answer token; of all rows together, per answer token."""
    model.zero_grad()
    counts, found = [int(row.targets.ne(IGNORE).sum()) for row in rows], []
    for row, count in zip(rows, counts, strict=True):
        loss = model(row)
        (loss / sum(counts)).backward()
        found.append(loss.item() / count)
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_when_compiled(model: VLM, rows: list[Batch]) -> None:
    """Losses and gradients within 1e-5; the state dict keeps its keys."""
    names = list(model.state_dict())
    plain, expected = losses_and_gradients(model, rows)
    compile_blocks(model, BACKEND)
    losses, gradients = losses_and_gradients(model, rows)
    assert losses == pytest.approx(plain, abs=1e-5)
    assert gradients.keys() == expected.keys()
    assert max(max_difference(gradients[name], expected[name]) for name in gradients) < 1e-5
    assert counters["stats"]["unique_graphs"] > 0
    assert list(model.state_dict()) == names


def test_rows_of_any_shape_share_their_graphs(make_vlm: Callable[..., VLM], processor: Processor) -> None:
    """What the first rows compiled serves all others: one to nine samples, from the third row on."""
    model = make_vlm().train()
    assert_equal_when_compiled(model, packed(processor, (0, 5), (2, 5), (0, 1)))
    compiled = counters["stats"]["unique_graphs"]
    losses_and_gradients(model, packed(processor, *((start, 2 * start) for start in range(1, 10))))
    assert counters["stats"]["unique_graphs"] == compiled
    assert sum(counters["recompile_limit"].values()) == 0


def test_adapters_blocks_inside_the_llm_and_checkpointing(make_vlm: Callable[..., VLM], processor: Processor) -> None:
    """SVA's blocks hang on hooks of compiled layers; those layers, with adapters, are computed twice."""
    llm = build_llm("qwen2", None, DEEP, None, "chatml", "")
    model = VLM(dict(make_vlm().encoder.items()), SVA({"eye": 16}, 32, **SVA_TINY), llm)
    table = freeze.resolve(model, LORA)
    adapt.inject(model, table)
    freeze.apply(model, table)
    freeze.train_mode(model)
    checkpoint_activations(model, reentrant=False)
    keep_checkpointing(model)
    assert_equal_when_compiled(model, packed(processor, (0, 5), (3, 5)))


def without_compiler() -> None:
    compile_blocks.__defaults__ = (BACKEND,)


def test_a_run_trains_compiled(tmp_path: Path, cache: Path) -> None:
    """`trainer.compile=true`: the losses of a plain run within 1e-5, from stages of their own."""
    base = [f"stages.{name}.steps=2" for name in ("align", "instruct")]
    base += ["eval.limit=1", "eval.images=[real]", "trainer.num_workers=0", "llm.shape.num_hidden_layers=1"]
    runs = [run_folder(tmp_path, cache, *base, f"trainer.compile={value}") for value in ("false", "true")]
    for run in runs:
        finish([start(run, before=without_compiler)], run, 300)
    plain, compiled = ([line["loss"] for line in lines(run)] for run in runs)
    assert compiled == pytest.approx(plain, abs=1e-5)
    assert store_of(runs[0])[1] != store_of(runs[1])[1]


def test_zero3_refuses() -> None:
    with pytest.raises(ValueError, match=r"trainer\.compile"):
        schema.check(composed("trainer=zero3", "trainer.compile=true"))
