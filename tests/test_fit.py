"""The training step under Lightning: golden losses, accumulation, the trainability contract, bad records."""

import json
from pathlib import Path

import pytest
import torch
from helpers import ColourSource, composed, max_difference, tiny_vlm
from lightning import seed_everything

from vlm_lab import build, schema
from vlm_lab.callbacks import BadRecords, Contract, Meter
from vlm_lab.data.loader import Loader, Records
from vlm_lab.data.mixture import Mixture
from vlm_lab.data.process import Processor
from vlm_lab.data.sample import BadRecord, Sample
from vlm_lab.model.vlm import VLM
from vlm_lab.module import VLMTraining, constant, cosine
from vlm_lab.stages import Stage

STEPS, BATCH = 20, 8
GOLDEN = [5.79, 5.183, 4.701, 4.4, 4.288]  # mean loss of steps 1-4, 5-8, ...; change it only with a reason


def fit(
    processor: Processor,
    folder: Path,
    *,
    micro_batch: int = BATCH,
    source: object | None = None,
    extra: tuple = (),
    checkpointing: bool | None = None,
    overrides: tuple[str, ...] = (),
    **stage: object,
) -> tuple[VLMTraining, list[float]]:
    """STEPS steps of a tiny VLM; what was trained, and its losses."""
    config = schema.check(composed("stage=[align]", *overrides))
    options = {"train": {"encoder": 3e-3, "connector": 3e-3, "llm": 3e-3}, "batch": BATCH, "micro_batch": micro_batch}
    plan = Stage.model_validate({**config.stages["align"].model_dump(), **options, "steps": STEPS, **stage})
    seed_everything(0, verbose=False)
    source = source or ColourSource()
    records = Records([source], Mixture([len(source)], [1.0], 0), processor)
    loader = Loader(records, plan.steps, BATCH, micro_batch)
    module = VLMTraining(tiny_vlm(), plan, plan.steps, checkpointing)
    meter = Meter("align", folder / "metrics.jsonl")
    build.trainer(config, plan, loader, [meter, Contract(), *extra]).fit(module, loader)
    return module, [json.loads(line)["loss"] for line in meter.lines]


def train(processor: Processor, folder: Path, **options: object) -> tuple[VLM, list[float]]:
    module, losses = fit(processor, folder, **options)
    return module.vlm, losses


def test_golden_losses(processor: Processor, tmp_path: Path) -> None:
    """A refactoring keeps these; float32 sums may differ between machines, so three digits are held."""
    _, losses = train(processor, tmp_path)
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, STEPS, 4)]
    assert means == pytest.approx(GOLDEN, abs=5e-3)


def test_training_is_deterministic(processor: Processor, tmp_path: Path) -> None:
    (first, a), (second, b) = train(processor, tmp_path), train(processor, tmp_path)
    assert a == b
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_accumulation_changes_nothing(processor: Processor, tmp_path: Path, micro_batch: int) -> None:
    """Rows of 4 or 1 samples: the losses of rows of 8, within 1e-4 relative (order of float32 sums)."""
    whole, expected = train(processor, tmp_path)
    parts, losses = train(processor, tmp_path, micro_batch=micro_batch)
    assert losses == pytest.approx(expected, rel=1e-4)
    pairs = zip(whole.parameters(), parts.parameters(), strict=True)
    assert (
        max(max_difference(p, q) for p, q in pairs) < 2e-3
    )  # Adam turns tiny differences of zero gradients into steps


def test_only_the_table_trains(processor: Processor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    seed_everything(0, verbose=False)
    before = {name: p.clone() for name, p in tiny_vlm().named_parameters()}
    vlm, _ = train(processor, tmp_path, train={"connector": 1e-3, "encoder.eye.model.blocks.1": 1e-3})
    moved = {name for name, p in vlm.named_parameters() if not torch.equal(p, before[name])}
    wanted = ("connector.", "encoder.eye.model.blocks.1.")
    assert moved == {name for name in before if name.startswith(wanted)}


class SomeBad(ColourSource):
    def __getitem__(self, index: int) -> Sample:
        if index % 8 == 0:
            raise BadRecord("records.json", f"record {index}", "the image is truncated")
        return super().__getitem__(index)


def test_bad_records_are_named_and_limited(processor: Processor, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = tmp_path / "bad.jsonl"
    train(processor, tmp_path, source=SomeBad(), extra=(BadRecords(100, report),))
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(lines) == 20  # an eighth of 160 draws
    assert lines[0].keys() == {"file", "record", "reason"}
    assert "records.json: record" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"\d+ bad records, data\.max_bad is 3; the last one: records\.json"):
        train(processor, tmp_path, source=SomeBad(), extra=(BadRecords(3, report),))


def test_schedules() -> None:
    """Hand-worked: 2 warmup steps of 10, then the peak, half of it in the middle, zero at the end."""
    assert [constant(step, 10, 2) for step in (0, 1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [cosine(step, 10, 2) for step in (0, 2, 6, 10)] == pytest.approx([1 / 3, 1, 0.5, 0])
