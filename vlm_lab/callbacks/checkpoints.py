"""Checkpoints inside a stage: every n steps and on SIGTERM, so that the same command continues where it was.

A continued stage gives the losses and weights of one that never stopped, bit for bit on a CPU.
"""

import random
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning_utilities import apply_to_collection
from rich.console import Console

from vlm_lab.batch import Batch
from vlm_lab.files import in_place, remove
from vlm_lab.module import VLMTraining


class Preempted(Exception):
    """SIGTERM came; everything up to the last step is saved."""


class Checkpoints(Callback):
    """Saves to `folder`/step-<n>.ckpt after every `every`-th step and on SIGTERM; the newest `keep` stay.

    State: what trains, optimizer, schedule, the loader's integer, random generators of every process, and the other
    callbacks' counts. The last callback, so that theirs are up to date.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep
        self.terminated = False
        self.generators: list[dict[str, Any]] = []  # of every process, to be set when the first batch has come
        self.handler: Any = None

    def on_train_start(self, trainer: Trainer, module: VLMTraining) -> None:
        self.handler = signal.signal(signal.SIGTERM, self.on_sigterm)

    def on_sigterm(self, *_: object) -> None:
        self.terminated = True

    def on_train_batch_start(self, trainer: Trainer, module: VLMTraining, batch: Batch, index: int) -> None:
        if self.generators:  # as late as this: starting the loader has drawn from them
            set_generators(self.generators[trainer.global_rank])
            self.generators = []

    def on_train_batch_end(self, trainer: Trainer, module: VLMTraining, outputs: Any, batch: Batch, index: int) -> None:
        step = trainer.global_step
        if batch.part < batch.parts - 1 or step >= module.steps:
            return
        flag = torch.tensor(float(self.terminated), device=module.device)
        stop = bool(module.sum_over_processes(flag) > 0)
        if stop or step % self.every == 0:
            self.save(trainer, step)
        if stop:
            raise Preempted(f"stopped by SIGTERM after step {step}; the same command continues from there")

    def save(self, trainer: Trainer, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.folder / f"step-{step}.ckpt")
        if trainer.is_global_zero:
            prune(self.folder, self.keep)

    def on_exception(self, trainer: Trainer, module: VLMTraining, exception: BaseException) -> None:
        self.restore_handler()
        if not isinstance(exception, Preempted):
            newest = latest(self.folder)
            exception.add_note(f"last checkpoint: {newest}" if newest else "there is no checkpoint of this stage yet")

    def on_train_end(self, trainer: Trainer, module: VLMTraining) -> None:
        self.restore_handler()

    def restore_handler(self) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGTERM, self.handler)
            self.handler = None

    def state_dict(self) -> dict[str, Any]:
        mine = get_generators()
        every = [mine]
        if dist.is_initialized():
            every = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(every, mine)
        return {"generators": every}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generators = state_dict["generators"]


class AtomicFiles(TorchCheckpointIO):
    """A checkpoint appears by one rename; if it cannot be written, the ones before stay and training goes on.

    `keep`: how many of the newest stay when it is there; None leaves that to the caller.
    """

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        partial = Path(f"{path}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            in_place(partial, Path(path))
            if self.keep is not None:
                prune(Path(path).parent, self.keep)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter while it handles the former
            remove(partial)
            reason = " ".join(str(error.__context__ or error).split())
            Console(stderr=True).print(f"checkpoint {path} could not be written ({reason}); training goes on")


class Background(AsyncCheckpointIO):
    """Lightning's writing in a thread: training goes on as soon as the state is copied to main memory.

    One write at a time, so that snapshots cannot pile up before a slow disk. When training ends, or is stopped by an
    error or SIGTERM, Lightning's teardown waits for the last write.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.teardown()  # the write before, if it still runs
        on_host = apply_to_collection(checkpoint, torch.Tensor, lambda tensor: tensor.detach().cpu())
        super().save_checkpoint(on_host, path, storage_options)  # which copies what was in main memory already


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in saved(folder)[:-keep]:
        remove(old)


def saved(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def latest(folder: Path) -> Path | None:
    return next(iter(saved(folder)[::-1]), None)


def get_generators() -> dict[str, Any]:
    """The states of all global random generators of this process, in types that load without unpickling."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    state["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return state


def set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
