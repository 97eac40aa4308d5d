"""The worker: trains the missing stages of a run, then evaluates it.

    python -m vlm_lab.fit RUN                              every stage in this process, then the evaluation
    torchrun ... -m vlm_lab.fit RUN --stage S --into DIR   one stage as one of several processes, no evaluation

Reads RUN/config.yaml and RUN/stages.json only. Started by the parent (vlm_lab/launch.py), or by hand in a debugger.
"""

import argparse
import json
import logging
import os
import resource
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning import seed_everything
from safetensors.torch import load_model, save_model

from vlm_lab import build, schema
from vlm_lab.callbacks import BadRecords, Contract, Meter
from vlm_lab.console import console, show_trainability
from vlm_lab.evaluate import evaluate_run
from vlm_lab.model import freeze
from vlm_lab.module import VLMTraining
from vlm_lab.store import RECORD, Store

FAILURE, METRICS = "failure.json", "metrics.jsonl"
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", help="train this stage only, and do not evaluate")
    parser.add_argument("--into", type=Path, help="the folder that --stage writes")
    args = parser.parse_args()
    quiet()
    try:
        fit(args.run, args.stage, args.into)
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        (args.run / FAILURE).write_text(json.dumps({"rank": RANK, "reason": reason}))
        sys.exit(1)


def fit(run: Path, stage: str | None = None, into: Path | None = None) -> None:
    """All stages of `run` and its evaluation, or `stage` alone, into the folder `into`."""
    worker = Worker(run)
    if stage is not None and into is not None:
        worker.train(stage, into)
    else:
        worker.train_missing()
        evaluate_run(run, worker.config, worker.logger)
    if worker.logger is not None:
        worker.logger.finish()


class Worker:
    """One process of one run: its configuration, its stages' keys, and the store that they live in."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.config = schema.load(run / "config.yaml")
        self.keys: dict[str, str] = json.loads((run / "stages.json").read_text())
        self.store = Store(Path(self.config.output) / "store")
        self.logger = build.logger(self.config, run) if RANK == 0 else None

    def train_missing(self) -> None:
        """Every stage in order, from the store where it is there; links and learning curves into the run folder."""
        for name, key in self.keys.items():
            if self.store.obtain(key, partial(self.train, name)):
                console.print(f"stage [bold]{name}[/]: reused from {self.store.path(key)}")
            link(self.run / "stages" / name, self.store.path(key))
        curves = [(self.store.path(key) / METRICS).read_text() for key in self.keys.values()]
        (self.run / METRICS).write_text("".join(curves))  # those of reused stages too

    def train(self, name: str, folder: Path) -> None:
        """Build, load what the stage before left, freeze, train, and write the weights to `folder`."""
        config, stage = self.config, self.config.stages[name]
        seed_everything(config.seed, verbose=False)
        vlm, tokenizer = build.vlm(config), build.tokenizer(config)
        before = list(self.keys)[: list(self.keys).index(name)]
        if before:
            load_model(vlm, self.store.path(self.keys[before[-1]]) / "model.safetensors")
        process = build.processor(config, vlm, tokenizer, stage.max_tokens, stage.tiling)
        loader = build.loader(config, stage, process, RANK, WORLD)
        module = VLMTraining(vlm, stage, loader.steps)
        rows = freeze.trainability(vlm, stage.train)
        if RANK == 0:
            show_trainability(name, rows)
        steps_before = sum(self.store.record(self.keys[stage])["steps"] for stage in before)
        meter = Meter(name, self.run / METRICS, self.logger, steps_before)
        bad = BadRecords(config.data.max_bad, self.run / "bad_records.jsonl")
        trainer = build.trainer(config, stage, loader, [meter, bad, Contract()])
        if trainer.world_size != config.trainer.devices or trainer.world_size != WORLD:
            raise RuntimeError(f"trainer.devices = {config.trainer.devices}, but {WORLD} processes run")
        trainer.fit(module, loader)
        if RANK == 0:
            save_model(vlm, str(folder / "model.safetensors"))
            tokenizer.save_pretrained(folder / "tokenizer")
            (folder / METRICS).write_text("".join(meter.lines))
            record = {**meter.summary(), "steps": loader.steps, "world_size": WORLD, "peak_gib": peak_gib()}
            record |= {"bad_records": len(bad.seen), "trainable": [row.as_dict() for row in rows]}
            (folder / RECORD).write_text(json.dumps(record, indent=1))


def link(place: Path, target: Path) -> None:
    """RUN/stages/<name> -> the store's folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(target, place.parent))


def peak_gib() -> float:
    """Peak memory of this process: on the device if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def quiet() -> None:
    """Lightning's tips and the libraries' start-up chatter would bury our own lines."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


if __name__ == "__main__":
    main()
