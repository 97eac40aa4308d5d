"""Processes that the parent starts: they get its SIGTERM, and do not outlive it. Imports no torch."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

LOG = "log.txt"
STOPPED = 128 + signal.SIGTERM  # exit code, as a shell gives it


def child(module: str, *args: str | Path, log: Path | None = None) -> None:
    """Run a module of this package, wherever the user stands; its output to the terminal, or appended to `log`.

    CalledProcessError if it fails, with the code STOPPED if SIGTERM came meanwhile.
    """
    with started(module, *args, log=log) as process, sigterm_to(process) as told:
        code = waited_for(process)
    if code or told:
        raise subprocess.CalledProcessError(STOPPED if told else code, process.args)


def started(module: str, *args: str | Path, log: Path | None = None, **environment: str) -> subprocess.Popen:
    """A process that runs a module of this package."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "VLM_LAB_PARENT": str(os.getpid()), **environment}
    with nullcontext() if log is None else log.open("a") as out:
        error = None if log is None else subprocess.STDOUT
        settings: dict[str, Any] = {"env": env, "stdout": out, "stderr": error, "preexec_fn": deaf}
        return subprocess.Popen([sys.executable, "-m", module, *map(str, args)], **settings)


@contextmanager
def beside(runs: Sequence[Path]) -> Iterator[None]:
    """While the context lasts, processes of one thread train what `runs` lists.

    One that fails is not missed: whoever needs its stage trains it, and says what is wrong.
    """
    with ExitStack() as processes:
        for run in runs:
            command = ("vlm_lab.fit", run, "--only-train")
            process = processes.enter_context(started(*command, log=run / LOG, OMP_NUM_THREADS="1"))
            processes.callback(process.terminate)
        yield


def threads() -> int:
    """How many threads PyTorch may use here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("OMP_NUM_THREADS", cores))


def deaf() -> None:
    """A queue's warning (Slurm's SIGUSR2, before the time is over) is for the parent: it would kill a child."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def waited_for(process: subprocess.Popen) -> int:
    """The exit code. If this process is told to exit meanwhile (submitit does, having put the job back into the queue),
    the child saves a checkpoint first, as on SIGTERM."""
    try:
        return process.wait()
    except SystemExit:
        process.terminate()
        raise


@contextmanager
def sigterm_to(process: subprocess.Popen) -> Iterator[list[int]]:
    """While the context lasts, SIGTERM goes to `process` instead (in the main thread; others get no signals).

    Gives the list of those that came.
    """
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def pass_on(number: int, _: Any) -> None:
        told.append(number)
        process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
