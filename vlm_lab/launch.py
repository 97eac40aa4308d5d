"""The parent process: run folder, stage keys, child processes, result.json. Imports no torch.

One device: one child (vlm_lab.fit) trains the run's missing stages in order and evaluates, so start-up is paid once.
Several: one torchrun tree per stage, so that no process group outlives its stage, then one child that evaluates.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from vlm_lab import build, schema
from vlm_lab.console import console
from vlm_lab.schema import Config
from vlm_lab.store import Store, hash_of, stage_keys

FAILURE, RESULT, EVALUATION = "failure.json", "result.json", "evaluation.json"
PACKAGES = ("torch", "transformers", "timm", "lightning", "hydra-core")


class RunFailed(RuntimeError):
    """A child process failed; the reason is in the run's result.json."""


def launch(config: Config) -> float:
    """Train every stage, evaluate, write result.json. Returns the mean accuracy over tasks with the real image."""
    started, run = time.time(), run_folder(config)
    keys = stage_keys(config, build.fingerprints(config))
    store = Store(Path(config.output) / "store")
    reused = [name for name, key in keys.items() if store.has(key)]
    prepare(run, config, keys)
    console.print(f"run [bold]{run}[/]")
    try:
        train_and_evaluate(config, run, keys, store)
    except subprocess.CalledProcessError as error:
        reason = failure(run, error)
        write_result(run, config, {"status": "failed", "reason": reason, "wall_s": time.time() - started})
        raise RunFailed(f"{reason} (see {run / RESULT})") from error
    stages = {name: {"key": key, "reused": name in reused, **store.record(key)} for name, key in keys.items()}
    metrics = json.loads((run / EVALUATION).read_text())["metrics"]
    body = {"status": "ok", "metrics": metrics, "stages": stages, "wall_s": time.time() - started}
    write_result(run, config, body)
    console.print(f"results: {run / RESULT}")
    return metrics["eval/avg"]


def run_folder(config: Config) -> Path:
    """The same command gives the same folder: the label, and a hash of everything but where outputs go."""
    settings = config.model_dump(exclude={"output", "logger"})
    return Path(config.output) / "runs" / f"{config.name}-{hash_of(settings)[:8]}"


def prepare(run: Path, config: Config, keys: dict[str, str]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    for stale in (FAILURE, RESULT, EVALUATION, "metrics.jsonl", "bad_records.jsonl"):
        (run / stale).unlink(missing_ok=True)
    schema.dump(config, run / "config.yaml")
    (run / "stages.json").write_text(json.dumps(keys, indent=1))


def train_and_evaluate(config: Config, run: Path, keys: dict[str, str], store: Store) -> None:
    if config.trainer.devices == 1:
        child("vlm_lab.fit", run)
        return
    for name, key in keys.items():
        store.obtain(key, partial(tree, config, run, name))
    child("vlm_lab.fit", run)  # every stage is in the store now: this links them and evaluates


def child(module: str, *args: str | Path) -> None:
    """Run a module of this package, wherever the user stands. CalledProcessError if it fails."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", module, *map(str, args)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


def tree(config: Config, run: Path, stage: str, folder: Path) -> None:
    """One torchrun tree that trains `stage` into `folder`."""
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={config.trainer.devices}")
    child(*torchrun, "-m", "vlm_lab.fit", run, "--stage", stage, "--into", folder)


def failure(run: Path, error: subprocess.CalledProcessError) -> str:
    """Why a child failed: what it wrote, or the signal that killed it."""
    if (run / FAILURE).is_file():
        return json.loads((run / FAILURE).read_text())["reason"]
    if error.returncode < 0:
        hint = " (out of memory?)" if error.returncode == -9 else ""
        return f"the training process was killed by signal {-error.returncode}{hint}"
    return f"the training process ended with exit code {error.returncode}"


def write_result(run: Path, config: Config, body: dict[str, Any]) -> None:
    """result.json: what every report reads. Written last, by one rename."""
    common = {
        "name": config.name,
        "seed": config.seed,
        "config_hash": hash_of(config.model_dump()),
        "git": git_state(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "world_size": config.trainer.devices,
    }
    partial = run / f"{RESULT}.partial"
    partial.write_text(json.dumps({**body, **common}, indent=1))
    partial.rename(run / RESULT)


def git_state() -> dict[str, Any]:
    """Commit and whether files differ from it; empty outside a git checkout."""
    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain"))} if commit else {}


def git(*args: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
