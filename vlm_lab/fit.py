"""The worker: trains the missing stages of a run, then evaluates it.

    python -m vlm_lab.fit RUN [--only-train]               every stage in this process, then the evaluation
    torchrun ... -m vlm_lab.fit RUN --stage S --into DIR   one stage as one of several processes, no evaluation

Reads RUN/config.yaml and RUN/stages.json only. Started by the parent (vlm_lab/launch.py), or by hand in a debugger.
"""

import argparse
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from safetensors.torch import save_model

from vlm_lab import build, parts, schema
from vlm_lab.callbacks import Average, BadRecords, Checkpoints, Contract, Meter, Preempted, Pulse, latest
from vlm_lab.callbacks.features import chip
from vlm_lab.console import console, show_trainability
from vlm_lab.evaluate import evaluate_run
from vlm_lab.failures import advice, is_out_of_memory, note_failure
from vlm_lab.model import adapt, freeze
from vlm_lab.model.compiled import compile_blocks
from vlm_lab.model.flops import mfu_counter
from vlm_lab.module import VLMTraining
from vlm_lab.probe import probe
from vlm_lab.stages import parents
from vlm_lab.store import CHECKPOINTS, INPUTS, RECORD, Store
from vlm_lab.strategies import Consolidate

METRICS, LAYOUT = "metrics.jsonl", "layout.json"
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", help="train this stage only, and do not evaluate")
    parser.add_argument("--into", type=Path, help="the folder that --stage writes")
    parser.add_argument("--only-train", action="store_true", help="do not evaluate")
    args = parser.parse_args()
    quiet()
    threading.Thread(target=end_with, args=(os.environ.get("VLM_LAB_PARENT"),), daemon=True).start()
    try:
        fit(args.run, args.stage, args.into, not args.only_train)
    except Exception as error:
        if not isinstance(error, (Preempted, parts.Misfit)):  # those say all there is to say
            traceback.print_exc()
        note_failure(args.run, RANK, error)
        sys.exit(128 + 15 if isinstance(error, Preempted) else 1)  # as a process that SIGTERM ends


def end_with(parent: str | None) -> None:
    """When the parent process, which holds the stage's lock, was killed: save and end, as on SIGTERM."""
    while parent is not None:
        time.sleep(1)
        try:
            os.kill(int(parent), 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def fit(run: Path, stage: str | None = None, into: Path | None = None, evaluate: bool = True) -> None:
    """All stages of `run` and its evaluation if `evaluate`, or `stage` alone, into the folder `into`."""
    worker = Worker(run)
    if stage is not None and into is not None:
        worker.train(stage, into)
    else:
        worker.train_missing()
        if evaluate:
            worker.evaluate()
    if worker.logger is not None:
        worker.logger.finish()


class Worker:
    """One process of one run: its configuration, its stages' keys, and the store that they live in."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.config = schema.load(run / "config.yaml")
        self.whole = list(self.config.stages.values())[-1].part is None  # the last stage leaves a whole model
        self.keys: dict[str, str] = json.loads((run / "stages.json").read_text())
        self.store = Store(Path(self.config.output) / "store")
        self.logger = build.logger(self.config, run) if RANK == 0 else None

    def train_missing(self) -> None:
        """Every stage in order, from the store where it is there; links and learning curves into the run folder."""
        inputs = json.loads((self.run / INPUTS).read_text())
        if self.whole and not all(map(self.store.has, self.keys.values())):
            parts.check_together(self.config)  # now, not after the minutes that pretraining takes
        for name, key in self.keys.items():
            if self.store.obtain(key, partial(self.train, name), inputs[name]):
                console.print(f"stage [bold]{name}[/]: reused from {self.store.path(key)}")
            link(self.run / "stages" / name, self.store.path(key))
        curves = [(self.store.path(key) / METRICS).read_text() for key in self.keys.values()]
        (self.run / METRICS).write_text("".join(curves))  # those of reused stages too

    def evaluate(self) -> None:
        """Scores of the model that the last stage left, or of the encoders if every stage only pretrains a part."""
        if self.whole:
            evaluate_run(self.run, self.config, self.logger)
            return
        scores = {
            f"eval/{name}/{key}": s["value"] for name, e in probe(self.run, self.config).items() for key, s in e.items()
        }
        metrics = {**scores, "eval/avg": float("nan")}  # that is the mean over a VLM's tasks
        (self.run / "evaluation.json").write_text(json.dumps({"metrics": metrics}, indent=1))

    def train(self, name: str, folder: Path) -> None:
        """Build, load what the stage before left, freeze, train or continue, and write plain weights to `folder`."""
        config, stage = self.config, self.config.stages[name]
        seed_everything(config.seed, verbose=False)
        made = parts.stage_parts(config, stage)
        before = [(self.store.path(self.keys[other]), config.stages[other]) for other in parents(config.stages, name)]
        parts.start(config, stage, made.model, dict(before))
        loader = made.loader(RANK, WORLD)
        zero3 = config.trainer.strategy.startswith("zero3")
        checkpointing = zero3 if config.trainer.gradient_checkpointing else None
        module = made.training(made.model, stage, loader.steps, checkpointing)
        device = torch.device("cuda" if config.trainer.accelerator == "gpu" else "cpu")
        mfu = mfu_counter(made.model, chip(device), config.trainer.precision != "32-true")
        if config.trainer.compile:
            compile_blocks(made.model)
        rows = freeze.trainability(made.model, module.table)
        if RANK == 0:
            show_trainability(name, rows)
        earlier = list(self.keys)[: list(self.keys).index(name)]
        steps_before = sum(self.store.record(self.keys[stage])["steps"] for stage in earlier)
        meter = Meter(name, folder / METRICS, self.run / METRICS, self.logger, steps_before, mfu=mfu)
        bad = BadRecords(config.data.max_bad, self.run / "bad_records.jsonl")
        features = build.features(config, loader)
        with one_thread() if stage.bootstrap else nullcontext():
            self.continue_or_start(name, module, loader, folder, [meter, bad, features])
        if RANK == 0:
            adapt.merge(made.model)
            save_model(made.model, str(folder / "model.safetensors"))
            made.tokenizer.save_pretrained(folder / "tokenizer")
            record = {"stage": name, **meter.summary(), "steps": loader.steps, "world_size": WORLD}
            record |= {"peak_gib": peak_gib(), "bad_records": len(bad.seen), "features": features.summary()}
            record |= {"trainable": [row.as_dict() for row in rows]}
            (folder / RECORD).write_text(json.dumps(record, indent=1))

    def continue_or_start(self, name: str, module: VLMTraining, loader: Any, folder: Path, counters: list[Any]) -> None:
        """Trainer.fit, from the newest checkpoint in `folder` if there is one."""
        options, checkpoints = self.config.trainer, folder / CHECKPOINTS
        saver = Checkpoints(checkpoints, options.checkpoint_every, options.checkpoint_keep)
        average = [] if module.stage.ema is None else [Average(module.stage.ema)]
        callbacks = [*counters, Pulse(self.run, name, RANK), Contract(), *average, saver, Consolidate()]
        trainer = build.trainer(self.config, module.stage, loader, callbacks)
        if trainer.world_size != options.devices or trainer.world_size != WORLD:
            raise RuntimeError(f"trainer.devices = {options.devices}, but {WORLD} processes run")
        torch.manual_seed(self.config.seed + RANK)  # dropout and noise differ between processes
        same_layout(checkpoints, {"processes": WORLD, "rows per step": loader.parts, "strategy": options.strategy})
        try:
            trainer.fit(module, loader, ckpt_path=latest(checkpoints), weights_only=True)
        except Exception as error:
            if is_out_of_memory(error):
                error.add_note(advice(self.config, name))
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread: toy parts gain nothing from a second, which can pretrain another part."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_layout(checkpoints: Path, layout: dict[str, Any]) -> None:
    """Note how the stage is laid out over processes. ValueError if its checkpoints were made under another layout."""
    path = checkpoints / LAYOUT
    if latest(checkpoints) is None:
        if RANK == 0:
            checkpoints.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(layout))
        return
    found = json.loads(path.read_text())
    changed = [f"{what} {found[what]}, now {value}" for what, value in layout.items() if found[what] != value]
    if changed:
        raise ValueError(
            f"the unfinished stage in {checkpoints.parent} had {'; '.join(changed)}: "
            "use the same trainer settings and micro_batch again, or delete the folder to start the stage over"
        )


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
