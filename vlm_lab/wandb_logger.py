"""Weights & Biases as a mirror of the run folder: `logger=wandb`.

Online when a key is there (WANDB_API_KEY or an earlier `wandb login`), offline otherwise; offline runs lie in
RUN/wandb and are uploaded later by `wandb sync`. The run folder's JSON stays the source of truth.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from vlm_lab.config import Config
from vlm_lab.data.images import load_image
from vlm_lab.data.sample import Sample, Video
from vlm_lab.eval.metrics import Record, correct


class WandbLogger:
    """One W&B run per run folder; its id is the folder's name, so every process of the run writes to the same page.

    `group` defaults to the sweep, else to the run's label (seeds of one composition stand together); `samples` is the
    number of rows in the tables of predictions. The current directory gets no files.
    """

    def __init__(
        self, config: Config, run: Path, project: str, group: str | None, tags: list[str], samples: int
    ) -> None:
        self.samples, sweep = samples, config.ablation
        labels = [] if sweep is None else [f"sweep:{sweep.name}"[:64], f"arm:{sweep.arm}"[:64]]  # W&B's limit
        keep_files_below(run)
        self.run = wandb.init(
            project=project,
            name=config.name,
            id=run.name,
            group=group or (sweep.name if sweep else config.name),
            job_type="train",
            tags=[*tags, *labels, config.scale, *config.encoder],
            config=config.model_dump(),
            dir=run,
            mode="online" if has_key() else "offline",
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        self.run.define_metric("trainer/global_step")
        self.run.define_metric("train/*", step_metric="trainer/global_step")

    def log_step(self, metrics: Mapping[str, float], step: int) -> None:
        """`train/<name>` against the number of optimizer steps over all stages."""
        self.run.log({"trainer/global_step": step, **{f"train/{name}": value for name, value in metrics.items()}})

    def log_summary(self, metrics: Mapping[str, Any]) -> None:
        self.run.log(dict(metrics))

    def log_predictions(self, task: str, mode: str, samples: Sequence[Sample], records: Sequence[Record]) -> None:
        """`samples/<task>.<mode>`: the first rows with what the model was shown, asked, and answered."""
        table = wandb.Table(columns=["id", "group", "image", "question", "prediction", "target", "correct"])
        for sample, record in list(zip(samples, records, strict=True))[: self.samples]:
            pictures = [ref for ref in sample.images if not isinstance(ref, Video)]
            shown = pictures if "error" not in record else []
            image = wandb.Image(load_image(shown[0], sample.where, sample.id)) if shown else None
            fields = [record[key] for key in ("question", "prediction", "target")]
            table.add_data(record["id"], record["group"], image, *fields, correct(record))
        self.run.log({f"samples/{task}.{mode}": table})

    def finish(self) -> None:
        self.run.finish()


def has_key() -> bool:
    return os.environ.get("WANDB_MODE") != "offline" and wandb.login(prompt=False)


def keep_files_below(run: Path) -> None:
    """The images of tables are staged outside the run folder unless told otherwise, and would be lost with it."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(name, str(run.resolve() / "wandb"))
