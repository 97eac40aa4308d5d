"""A sweep as its files tell it: index.json, and the folder of every finished run. Reads only; computes nothing.

The table of answers is the heart: points (0 or 100) of every run on every question, for each way of showing images.
Answers are scored anew from the prediction records, so runs of different days are scored alike.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlm_lab.ablation import Ablation
from vlm_lab.eval.metrics import Record, correct, normalise, words
from vlm_lab.launch import RESULT
from vlm_lab.stats import Array, Design

INDEX, ALL = "index.json", "all"
Cell = tuple[str, str]  # task, group


@dataclass
class Run:
    """One finished run: what it wrote."""

    arm: str
    seed: int
    folder: Path
    result: dict[str, Any]
    config: dict[str, Any]
    records: dict[str, list[Record]]  # way of showing images -> records of all tasks, each with its `task`

    def questions(self) -> list[tuple[str, str, str]]:
        return [(record["task"], record["id"], record["target"]) for record in self.records["real"]]

    def measured(self, mode: str, measure: str = "points") -> Array:
        """[questions]: 0 or 100 points, or the words of the answer."""
        if measure == "words":
            return np.array([float(words(record)) for record in self.records[mode]])
        return np.array([100.0 * correct(record) for record in self.records[mode]])

    def curve(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@dataclass
class Study:
    """All finished runs of one sweep; `missing` says why the others are not here."""

    folder: Path
    ablation: Ablation
    scale: str
    runs: list[Run] = field(default_factory=list)
    missing: list[tuple[str, int, str]] = field(default_factory=list)  # arm, seed, reason

    def of(self, arm: str) -> list[Run]:
        return [run for run in self.runs if run.arm == arm]

    @property
    def arms(self) -> list[str]:
        """Those with a finished run, in the file's order."""
        return [arm for arm in self.ablation.arms if self.of(arm)]

    @property
    def modes(self) -> list[str]:
        """Ways of showing images that every run was evaluated with; `real` is always there."""
        return [mode for mode in ("real", "none", "shuffled") if all(mode in run.records for run in self.runs)]

    @cached_property
    def records(self) -> list[Record]:
        """The questions, as the first run recorded them."""
        return self.runs[0].records["real"]

    @cached_property
    def cells(self) -> list[Cell]:
        return sorted({(record["task"], record["group"]) for record in self.records})

    @cached_property
    def design(self) -> Design:
        cells = {cell: code for code, cell in enumerate(self.cells)}
        images = {name: code for code, name in enumerate(dict.fromkeys(map(image, self.records)))}
        codes = [(cells[record["task"], record["group"]], images[image(record)]) for record in self.records]
        return Design(*np.array(codes, dtype=np.int64).T)

    @property
    def columns(self) -> list[str]:
        """`all`, then the benchmark groups."""
        return [ALL, *sorted({group for _, group in self.cells})]

    def weights(self, column: str) -> Array:
        """Of each cell. `all`: the mean over tasks of the mean over a task's groups, as eval/avg; else over tasks."""
        tasks = Counter(task for task, group in self.cells if column in (ALL, group))
        chosen = [column in (ALL, group) for _, group in self.cells]
        each = [chosen[i] / (len(tasks) * tasks[task]) if chosen[i] else 0.0 for i, (task, _) in enumerate(self.cells)]
        return np.array(each)

    def points(self, arm: str, mode: str = "real", seeds: list[int] | None = None, measure: str = "points") -> Array:
        """[seeds, questions], seeds in ascending order; of another `measure`, where one is given."""
        runs = sorted(self.of(arm), key=lambda run: run.seed)
        return np.stack([run.measured(mode, measure) for run in runs if seeds is None or run.seed in seeds])

    def common_seeds(self, a: str, b: str) -> list[int]:
        return sorted({run.seed for run in self.of(a)} & {run.seed for run in self.of(b)})

    @cached_property
    def majority(self) -> Array:
        """[questions]: points of whoever always gives a cell's most frequent answer."""
        targets = [(record["task"], record["group"], normalise(record["target"])) for record in self.records]
        best: dict[Cell, tuple[int, str]] = {}
        for (task, group, target), count in Counter(targets).items():
            best[task, group] = max(best.get((task, group), (0, "")), (count, target))
        return np.array([100.0 * (best[task, group][1] == target) for task, group, target in targets])


def image(record: Record) -> tuple[str, str]:
    return record["task"], record.get("image") or record["id"]


def load(folder: Path) -> Study:
    """Raises ValueError if there is no sweep in `folder`, or none of its runs is finished."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is no sweep folder: it has no {INDEX}")
    index = json.loads((folder / INDEX).read_text())
    study = Study(folder, Ablation.model_validate(index["ablation"]), index["scale"])
    for arm, seeds in index["runs"].items():
        for seed, place in seeds.items():
            add(study, arm, int(seed), folder / place)
    if not study.runs:
        raise ValueError(f"{folder}: none of its {len(study.missing)} runs is finished")
    return study


def add(study: Study, arm: str, seed: int, folder: Path) -> None:
    path = folder / RESULT
    result = json.loads(path.read_text()) if path.is_file() else {"status": "missing", "reason": "not finished yet"}
    if result["status"] != "ok":
        study.missing.append((arm, seed, result["reason"]))
        return
    config = yaml.safe_load((folder / "config.yaml").read_text())
    study.runs.append(Run(arm, seed, folder, result, config, read_records(folder / "eval")))


def read_records(folder: Path) -> dict[str, list[Record]]:
    """eval/<task>.<images>.jsonl of every task."""
    records: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        task, _, mode = path.stem.rpartition(".")
        lines = (json.loads(line) for line in path.read_text().splitlines())
        records.setdefault(mode, []).extend({"task": task, **line} for line in lines)
    return records
