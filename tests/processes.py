"""Training in processes of its own that start at once: they are forked from a server that has the libraries loaded."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # before the server starts

import json
import multiprocessing
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers import composed, small

from vlm_lab import build, launch, schema
from vlm_lab.store import Store, stage_inputs

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vlm_lab.evaluate", "vlm_lab.callbacks", "peft", "bitsandbytes", "deepspeed", "timm"])


def run_folder(output: Path, cache: Path, *overrides: str) -> Path:
    """A prepared run below `output`; what is made from the data (`cache`) is shared between runs."""
    output.mkdir(exist_ok=True)
    if not (output / "cache").exists():
        (output / "cache").symlink_to(cache)
    config = schema.check(composed(*small(questions=8), f"output={output}", *overrides))
    run = launch.run_folder(config)
    launch.prepare(run, config, stage_inputs(config, build.fingerprints(config)))
    return run


def start(
    run: Path,
    *arguments: str,
    rank: int = 0,
    world: int = 1,
    port: int = 0,
    group: bool = False,
    before: Callable[[], None] | None = None,
) -> BaseProcess:
    """`python -m vlm_lab.fit RUN arguments` as one of `world` processes; `group`: in a process group of its own.

    `before` is called in the process first, to change what a test is about.
    """
    env = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    if world > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    process = SERVER.Process(target=fit, args=(run, arguments, {k: str(v) for k, v in env.items()}, group, before))
    process.start()
    return process


def fit(
    run: Path, arguments: tuple[str, ...], env: dict[str, str], group: bool, before: Callable[[], None] | None
) -> None:
    if group:
        os.setpgid(0, 0)
    os.environ |= {**env, "HF_HUB_OFFLINE": "1"}
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process that was not forked
    log = os.open(run / f"log-{env['RANK']}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from vlm_lab import fit as worker

    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.argv = ["fit", str(run), *arguments]
    worker.main()


def start_tree(run: Path, stage: str, world: int, before: Callable[[], None] | None = None) -> list[BaseProcess]:
    """What torchrun does for one stage, which is written to the store's scratch folder."""
    store, keys = store_of(run)
    folder = store.partial(keys[stage])
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ("--stage", stage, "--into", str(folder))
    return [start(run, *arguments, rank=rank, world=world, port=port, before=before) for rank in range(world)]


def train_tree(run: Path, stage: str, world: int, timeout: float, before: Callable[[], None] | None = None) -> None:
    """Train one stage in `world` processes and put it in the store. Fails if a process does, or hangs."""
    store, keys = store_of(run)

    def train(folder: Path) -> None:
        finish(start_tree(run, stage, world, before), run, timeout)

    store.obtain(keys[stage], train)


def finish(processes: list[BaseProcess], run: Path, timeout: float) -> None:
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(codes), f"{codes}\n" + "\n".join(path.read_text() for path in run.glob("log-*.txt"))


def store_of(run: Path) -> tuple[Store, dict[str, str]]:
    return Store(run.parent.parent / "store"), json.loads((run / "stages.json").read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
