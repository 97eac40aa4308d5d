"""Train one vision-language model: every stage, then the evaluation.

    python train.py                                            the default, tiny, on this machine's CPU
    python train.py encoder=[siglip,dinov2] connector=mlp      any composition of what lies in conf/
    python train.py -m seed=0,1,2                              several runs, one after the other
    python train.py -m sweep=cambrian_frozen_encoder           a published ablation: arms x seeds (vlm_lab/sweep.py)
    python train.py -m sweep=cambrian_frozen_encoder --dry-run what it would train, and what the arms share

Composes the configuration, checks it, and hands it to the parent process (vlm_lab/launch.py). No torch in here: a typo
is answered in under a second.
"""

import math
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vlm_lab import schema
from vlm_lab.explain import CONFIG_ERRORS, explain
from vlm_lab.launch import RunFailed, launch

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let composition errors reach us: `explain` makes one line of them
schema.register_resolvers()
ERRORS = (*CONFIG_ERRORS, RunFailed)
DRY_RUN = "hydra.sweeper.dry_run=true"


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    job = HydraConfig.get()
    try:
        config = schema.check(cfg, dict(job.runtime.choices))
        if config.ablation is not None and config.ablation.arm is None:
            raise ValueError(f"a sweep is several runs: python train.py -m sweep={config.ablation.name}")
        return launch(config)
    except ERRORS as error:
        if isinstance(error, RunFailed) and "ablation.arm" in " ".join(job.overrides.task):
            return math.nan  # it is in the run's result.json, where the sweep will find it
        if job.mode == RunMode.MULTIRUN:
            raise  # the other runs go on; Hydra reports this one at the end
        sys.exit(f"error: {explain(error)}")


def with_dry_run(arguments: list[str]) -> list[str]:
    """`--dry-run` as the setting that it stands for: Hydra takes no flags of ours."""
    if "--dry-run" in arguments and not {"-m", "--multirun"} & set(arguments):
        sys.exit("error: --dry-run is for sweeps (-m sweep=NAME); for one run: python -m vlm_lab.plan OVERRIDES")
    return [DRY_RUN if argument == "--dry-run" else argument for argument in arguments]


if __name__ == "__main__":
    sys.argv = with_dry_run(sys.argv)
    try:
        main()
    except ERRORS as error:
        sys.exit(f"error: {explain(error)}")
