"""Hydra's sweeper for `python train.py -m sweep=NAME`: a sweep file's arms x seeds; without one, the usual grid.

Registered as hydra/sweeper=ablation (conf/train.yaml). Here lies only what needs Hydra: composing and checking every
run before the first starts. What happens then is in vlm_lab/sweep.py. Launchers (basic, joblib, submitit) stay usable.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from vlm_lab import schema
from vlm_lab.config import Config
from vlm_lab.explain import explain


@dataclass
class AblationSweeperConf:
    _target_: str = "hydra_plugins.ablation_sweeper.AblationSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None
    dry_run: bool = False  # list arms, what they share and what would train; start nothing


ConfigStore.instance().store(group="hydra/sweeper", name="ablation", node=AblationSweeperConf, provider="vlm_lab")


class AblationSweeper(BasicSweeper):
    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None, dry_run: bool) -> None:
        super().__init__(max_batch_size, params)
        self.dry_run = dry_run

    def sweep(self, arguments: list[str]) -> Any:
        if OmegaConf.select(self.config, "ablation") is None:
            return super().sweep(arguments)
        from vlm_lab import sweep

        self.refuse_grid(arguments)
        sweep.run(self.jobs(arguments), self.launch, self.dry_run)
        return None

    def jobs(self, arguments: Sequence[str]) -> list[Any]:
        """Every run, composed and checked. ValueError names the arm of the first mistake."""
        from vlm_lab.sweep import Job

        ablation = self.config.ablation
        jobs = []
        for seed in ablation.seeds:
            for arm, changes in ablation.arms.items():
                overrides = combined(arguments, [*changes, f"seed={seed}", f"+ablation.arm={arm}"])
                try:
                    jobs.append(Job(arm, seed, overrides, self.checked(overrides)))
                except Exception as error:  # of Hydra, OmegaConf or ours: all become one line
                    raise ValueError(f"arm {arm}: {explain(error)}") from error
        return jobs

    def checked(self, overrides: list[str]) -> Config:
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra")
        return schema.check(cfg, choices)

    def launch(self, jobs: Sequence[Any]) -> list[str | None]:
        """Start the runs and wait; what each raised, if anything. How it ended is in its folder."""
        here = str(Path(__file__).parent.parent)  # where workers unpickle this class from
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        with lost_jobs_reported():
            returns = self.launcher.launch([job.overrides for job in jobs], initial_job_idx=0)
        return [raised(value) for value in returns]

    def refuse_grid(self, arguments: list[str]) -> None:
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        for override in parser.parse_overrides(arguments):
            if override.is_sweep_override():
                raise ValueError(f"{override.input_line}: the sweep's arms say what varies; give one value here")


@contextmanager
def lost_jobs_reported() -> Iterator[None]:
    """submitit's launcher leaves at the first job that a queue lost, though others run on: here that is its result."""
    try:
        from submitit import Job
    except ImportError:  # an extra: no job of it will be lost
        yield
        return
    ask = Job.results

    def results(job: Any) -> Any:
        try:
            return ask(job)
        except Exception as error:
            lost = RuntimeError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            return [JobReturn(overrides=[f"job {job.job_id}"], _return_value=lost, status=JobStatus.FAILED)]

    Job.results = results
    try:
        yield
    finally:
        Job.results = ask


def raised(value: JobReturn) -> str | None:
    try:
        _ = value.return_value  # raises what the job raised
    except Exception as error:
        return explain(error)
    return None


def combined(arguments: Sequence[str], arm: Sequence[str]) -> list[str]:
    """The command line's overrides, then the arm's; where both set the same key, the arm's alone."""
    keys = {key(override) for override in arm}
    return [*(override for override in arguments if key(override) not in keys), *arm]


def key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")
