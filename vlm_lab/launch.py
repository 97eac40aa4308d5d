"""The parent process: run folder, stage keys, child processes, result.json. Imports no torch.

One device: one child (vlm_lab.fit) trains the run's missing stages in order and evaluates, so start-up is paid once.
Several, or ZeRO: one torchrun tree per stage, so that no process group outlives its stage, then one child that
evaluates. SIGTERM is passed on to the children, which save a checkpoint and end.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from vlm_lab import build, schema
from vlm_lab.children import LOG, STOPPED, beside, child, threads
from vlm_lab.config import Config
from vlm_lab.console import console
from vlm_lab.pulses import last_signs
from vlm_lab.store import INPUTS, Store, hash_of, stage_inputs

FAILURE, RESULT, EVALUATION = "failure.json", "result.json", "evaluation.json"
PACKAGES = ("torch", "transformers", "timm", "lightning", "hydra-core")


class RunFailed(RuntimeError):
    """A child process failed; the reason is in the run's result.json."""


def launch(config: Config) -> float:
    """Train every stage, evaluate, write result.json. Returns the mean accuracy over tasks with the real image."""
    started, run = time.time(), run_folder(config)
    inputs = stage_inputs(config, build.fingerprints(config))
    keys = {name: hash_of(value) for name, value in inputs.items()}
    store = Store(Path(config.output) / "store")
    known = {name: store.record(key) for name, key in keys.items() if store.has(key)}
    prepare(run, config, inputs)
    if config.ablation is None:  # a sweep has a table of its own
        console.print(f"run [bold]{run}[/]", soft_wrap=True)
    try:
        train_and_evaluate(config, run, inputs, store)
    except subprocess.CalledProcessError as error:
        reason = failure(run, error)
        write_result(run, config, {"status": "failed", "reason": reason, "wall_s": time.time() - started})
        if error.returncode == STOPPED:  # whoever stops us does not want a sweep's next run either
            console.print(f"{reason} (see {run / RESULT})", soft_wrap=True)
            sys.exit(STOPPED)
        raise RunFailed(f"{reason} (see {run / RESULT})") from error
    made = {name: store.record(key) for name, key in keys.items()}  # not as before: that one was damaged
    stages = {name: {"key": key, "reused": known.get(name) == made[name], **made[name]} for name, key in keys.items()}
    metrics = json.loads((run / EVALUATION).read_text())["metrics"]
    body = {"status": "ok", "metrics": metrics, "stages": stages, "wall_s": time.time() - started}
    write_result(run, config, body)
    if config.ablation is None:
        console.print(f"results: {run / RESULT}", soft_wrap=True)  # a path to copy
    return metrics["eval/avg"]


def run_folder(config: Config) -> Path:
    """The same command gives the same folder: the label, and a hash of everything but where outputs go.

    Of a sweep only its name and the arm count, in the label: more seeds or another claim leave finished runs alone.
    """
    settings = json.dumps(config.model_dump(exclude={"output", "logger", "ablation"}))
    wherever = settings.replace(f'"{config.output}/', '"')  # caches of made-up pictures lie there, too
    return Path(config.output) / "runs" / f"{config.name}-{hash_of(wherever)[:8]}"


def prepare(run: Path, config: Config, inputs: dict[str, dict[str, Any]]) -> None:
    """The run folder with its configuration, its stages' keys and what they hash; nothing of an earlier try."""
    run.mkdir(parents=True, exist_ok=True)
    for stale in (FAILURE, RESULT, EVALUATION, LOG, "metrics.jsonl", "bad_records.jsonl"):
        (run / stale).unlink(missing_ok=True)
    shutil.rmtree(run / "ranks", ignore_errors=True)
    schema.dump(config, run / "config.yaml")
    (run / INPUTS).write_text(json.dumps(inputs, indent=1))
    (run / "stages.json").write_text(json.dumps({name: hash_of(value) for name, value in inputs.items()}, indent=1))


def train_and_evaluate(config: Config, run: Path, inputs: dict[str, dict[str, Any]], store: Store) -> None:
    log = run / LOG if config.ablation is not None else None
    if config.trainer.devices == 1 and not schema.shards(config.trainer.strategy):
        with beside(side_runs(config, run, inputs, store)):
            child("vlm_lab.fit", run, log=log)
        return
    for name, value in inputs.items():
        store.obtain(hash_of(value), partial(tree, config, run, name, log), value)
    child("vlm_lab.fit", run, log=log)  # every stage is in the store now: this links them and evaluates


def side_runs(config: Config, run: Path, inputs: dict[str, dict[str, Any]], store: Store) -> list[Path]:
    """Folders of runs that pretrain toy parts beside `run`, one for each further thread of the machine.

    A second thread makes no toy part faster. `run` goes through its stages in order, these from the end of the list;
    who comes to a part second finds it in the store, or waits.
    """
    parts = [name for name, stage in config.stages.items() if stage.bootstrap and not store.has(hash_of(inputs[name]))]
    count = min(threads(), len(parts)) - 1 if config.trainer.accelerator == "cpu" else 0
    folders = [run / "beside" / str(number) for number in range(count)]
    for number, folder in enumerate(folders):
        names = parts[:0:-1][number::count]
        only = {"stages": {name: config.stages[name] for name in names}, "logger": {}, "ablation": None}
        prepare(folder, config.model_copy(update=only), {name: inputs[name] for name in names})
    return folders


def tree(config: Config, run: Path, stage: str, log: Path | None, folder: Path) -> None:
    """One torchrun tree that trains `stage` into `folder`."""
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={config.trainer.devices}")
    child(*torchrun, "-m", "vlm_lab.fit", run, "--stage", stage, "--into", folder, log=log)


def failure(run: Path, error: subprocess.CalledProcessError) -> str:
    """Why a child failed: what it wrote, or the signal that killed it."""
    if (run / FAILURE).is_file():
        return json.loads((run / FAILURE).read_text())["reason"]
    if error.returncode == STOPPED:
        return "stopped by SIGTERM; the same command continues"
    signs = f"; {found}" if (found := last_signs(run)) else ""
    if error.returncode < 0:
        hint = " (out of memory?)" if error.returncode == -9 else ""
        return f"the training process was killed by signal {-error.returncode}{hint}{signs}"
    return f"the training process ended with exit code {error.returncode}{signs}"


def write_result(run: Path, config: Config, body: dict[str, Any]) -> None:
    """result.json: what every report reads. Written last, by one rename."""
    common = {
        "name": config.name,
        "sweep": config.ablation and config.ablation.name,
        "arm": config.ablation and config.ablation.arm,
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
