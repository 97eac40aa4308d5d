"""Every published system at tiny size, by the real worker: all its stages train, then it is evaluated and asked."""

from pathlib import Path

import pytest
from helpers import ROOT, composed
from omegaconf import DictConfig
from PIL import Image

from vlm_lab import build, chat, launch, schema
from vlm_lab.evaluate import evaluate_run
from vlm_lab.fit import Worker
from vlm_lab.store import Store, stage_inputs

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def shortened(experiment: str, output: Path) -> DictConfig:
    """The experiment as it stands, but for few records and one optimizer step of four samples per stage."""
    cfg = composed(f"experiment={experiment}", f"output={output}", "eval.limit=2", "eval.max_new_tokens=2")
    for source in (*cfg.data.sources.values(), *cfg.data.tasks.values()):
        source.size = 32
    for stage in cfg.stages.values():
        stage.steps, stage.epochs, stage.batch, stage.micro_batch = 1, None, 4, 4
    cfg.trainer.num_workers = 0
    return cfg


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_trains_evaluates_and_answers(experiment: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    output = tmp_path_factory.getbasetemp() / "experiments"  # one cache of pictures and tokenizers for all of them
    config = schema.check(shortened(experiment, output))
    run = launch.run_folder(config)
    launch.prepare(run, config, stage_inputs(config, build.fingerprints(config)))
    worker = Worker(run)
    worker.train_missing()
    store = Store(output / "store")
    records = {name: store.record(key) for name, key in worker.keys.items()}
    assert {name: (record["steps"], record["samples"]) for name, record in records.items()} == dict.fromkeys(
        config.stages, (1, 4)
    )
    assert all(sum(row["trained"] for row in record["trainable"]) > 0 for record in records.values())
    scores = evaluate_run(run, config)
    assert scores.keys() == config.data.tasks.keys()
    assert all(modes.keys() == {"real", "none", "shuffled"} for modes in scores.values())
    Image.new("RGB", (90, 60), "navy").save(run / "asked.png")
    assert isinstance(chat.answer(run, "What colour is it?", [run / "asked.png"]), str)
