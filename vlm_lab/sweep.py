"""A sweep: arms x seeds, each an ordinary run; only what is missing is started. No torch, no Hydra.

    python train.py -m sweep=NAME                                   run it; the same command again continues it
    python train.py -m sweep=NAME --dry-run                         list arms, what they share and what would train
    python train.py -m sweep=NAME hydra/launcher=joblib             arms in parallel (or submitit_slurm)
    python -m vlm_lab.report outputs/sweeps/NAME                    table, plots and verdicts, at any time

Writes outputs/sweeps/NAME/index.json (arm and seed -> run folder). Everything else is read from the run folders, so the
table is true whichever process, or machine, a run is on. Stages that arms have in common train once (vlm_lab/store.py).
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from vlm_lab import build
from vlm_lab.children import LOG
from vlm_lab.config import Config
from vlm_lab.console import console
from vlm_lab.launch import EVALUATION, RESULT, RunFailed, run_folder
from vlm_lab.store import Store, hash_of, stage_keys

INDEX = "index.json"


@dataclass
class Job:
    """One run of a sweep: `overrides` is its whole command line, `config` what they compose to."""

    arm: str
    seed: int
    overrides: list[str]
    config: Config
    keys: dict[str, str] = field(default_factory=dict)  # stage -> key in the store

    @property
    def run(self) -> Path:
        return run_folder(self.config)


def run(jobs: Sequence[Job], launch: Callable[[Sequence[Job]], list[str | None]], dry_run: bool = False) -> None:
    """Start the runs that are not finished, shared stages first. RunFailed at the end if any of them failed.

    `launch` starts runs, waits for them, and returns what each raised.
    """
    started = time.time()
    add_keys(jobs)
    if dry_run:
        return show_plan(jobs)
    folder = write_index(jobs)
    waiting = in_order([job for job in jobs if not finished(job)])
    console.print(
        f"sweep [bold]{folder}[/]: {len(jobs)} runs, {len(jobs) - len(waiting)} finished already", soft_wrap=True
    )
    for job in waiting:
        for stale in (RESULT, LOG):  # of a failed try, or of other code
            (job.run / stale).unlink(missing_ok=True)
    with Live(get_renderable=lambda: board(jobs), console=console, refresh_per_second=1, vertical_overflow="visible"):
        errors = start(launch, waiting)
    console.print()
    report_failures(jobs, errors)
    minutes = (time.time() - started) / 60
    console.print(
        f"{len(waiting)} runs in {minutes:.1f} minutes; report: python -m vlm_lab.report {folder}", soft_wrap=True
    )
    return None


def start(launch: Callable[[Sequence[Job]], list[str | None]], waiting: Sequence[Job]) -> dict[Path, str | None]:
    """What each run raised. A launcher may itself raise for one lost run: the others' folders tell how they ended."""
    try:
        return dict(zip([job.run for job in waiting], launch(waiting) if waiting else [], strict=True))
    except Exception as error:
        reason = " ".join(f"the launcher failed: {type(error).__name__}: {error}".split())
        return {job.run: reason for job in waiting}


def report_failures(jobs: Sequence[Job], errors: dict[Path, str | None]) -> None:
    failed = [job for job in jobs if not finished(job)]
    for job in failed:
        reason = result(job).get("reason") or errors.get(job.run) or "it left no result"
        console.print(f"[red]failed[/] {job.arm}, seed {job.seed}: {reason} (see {job.run / LOG})", soft_wrap=True)
    if failed:
        raise RunFailed(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them again")


def add_keys(jobs: Sequence[Job]) -> None:
    """Stage keys of every run; each data option is read once, however many runs share it."""
    known: dict[str, dict[str, str]] = {}
    for job in jobs:
        data = hash_of(job.config.data.model_dump())
        known[data] = known.get(data) or build.fingerprints(job.config)
        job.keys = stage_keys(job.config, known[data])


def finished(job: Job) -> bool:
    """The run is complete, and was made by the code and the data of today."""
    record = result(job)
    stages = {name: stage["key"] for name, stage in record.get("stages", {}).items()}
    return record.get("status") == "ok" and stages == job.keys


def result(job: Job) -> dict[str, Any]:
    path = job.run / RESULT
    return json.loads(path.read_text()) if path.is_file() else {}


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Whoever is first to need a stage that others need too goes first, so that parallel runs seldom wait for it."""
    uses = Counter(key for job in jobs for key in job.keys.values())
    seen: set[str] = set()
    leaders: list[Job] = []
    others: list[Job] = []
    for job in jobs:
        shared = {key for key in job.keys.values() if uses[key] > 1}
        (leaders if shared - seen else others).append(job)
        seen |= shared
    return leaders + others


def write_index(jobs: Sequence[Job]) -> Path:
    """outputs/sweeps/NAME/index.json: what was asked, and which run folder answers which part of it."""
    config = jobs[0].config
    assert config.ablation is not None
    folder = Path(config.output) / "sweeps" / config.ablation.name
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, str]] = {}
    for job in jobs:
        runs.setdefault(job.arm, {})[str(job.seed)] = os.path.relpath(job.run, folder)
    index = {"ablation": config.ablation.model_dump(exclude={"arm"}), "scale": config.scale, "runs": runs}
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(index, indent=1))
    partial.rename(folder / INDEX)
    return folder


def board(jobs: Sequence[Job]) -> Table:
    """The live table: one row per arm, one column per seed."""
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    table = Table(title="score in %", title_justify="left")
    for heading in ("arm", *(f"seed {seed}" for seed in seeds)):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    cells = {(job.arm, job.seed): state(job) for job in jobs}
    for arm in dict.fromkeys(job.arm for job in jobs):
        table.add_row(arm, *(cells[arm, seed] for seed in seeds))
    return table


def state(job: Job) -> str:
    if record := result(job):
        return f"[green]{100 * record['metrics']['eval/avg']:.1f}[/]" if record["status"] == "ok" else "[red]failed[/]"
    if not (job.run / LOG).is_file():
        return "[dim]waiting[/]"
    if (job.run / EVALUATION).is_file():
        return "evaluated"
    line = last_line(job.run / "metrics.jsonl")
    if line is None:
        return "starting"
    steps = job.config.stages[line["stage"]].steps
    return f"{line['stage']} {line['step']}" + (f"/{steps}" if steps else "")


def last_line(path: Path) -> dict[str, Any] | None:
    """The last complete line of a JSONL file that another process is writing."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines else None


def show_plan(jobs: Sequence[Job]) -> None:
    """What would happen: per arm its overrides and, for the first seed, where each stage comes from."""
    store = Store(Path(jobs[0].config.output) / "store")
    table = Table(title=f"arms, stages of seed {jobs[0].seed}", title_justify="left")
    for heading in ("arm", "overrides", "stages"):
        table.add_column(heading, overflow="fold")
    owner: dict[str, str] = {}
    for job in (job for job in jobs if job.seed == jobs[0].seed):
        stages = [f"{name} {source(key, job.arm, owner, store)}" for name, key in job.keys.items()]
        changed = [o for o in job.overrides if o in job.config.ablation.arms[job.arm]]  # type: ignore[union-attr]
        table.add_row(job.arm, escape("\n".join(changed)) or "-", "\n".join(stages))
    console.print(table)
    keys = [key for job in jobs for key in job.keys.values()]
    missing, done = {key for key in keys if not store.has(key)}, sum(map(finished, jobs))
    console.print(f"{len(jobs)} runs, {done} of them finished, of {len(keys)} stages:")
    console.print(f"{len(set(keys))} different ones, {len(missing)} of them to train")


def source(key: str, arm: str, owner: dict[str, str], store: Store) -> str:
    if store.has(key):
        return f"{key[:8]} in the store"
    if key in owner:
        return f"{key[:8]} shared with {owner[key]}"
    owner[key] = arm
    return f"{key[:8]} to train"
