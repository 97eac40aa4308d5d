"""Train one vision-language model: every stage, then the evaluation.

    python train.py                                            the default, tiny, on this machine's CPU
    python train.py encoder=[siglip,dinov2] connector=mlp      any composition of what lies in conf/
    python train.py -m seed=0,1,2                              several runs, one after the other

Composes the configuration, checks it, and hands it to the parent process (vlm_lab/launch.py). No torch in here: a typo
is answered in under a second.
"""

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


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    job = HydraConfig.get()
    try:
        return launch(schema.check(cfg, dict(job.runtime.choices)))
    except ERRORS as error:
        if job.mode == RunMode.MULTIRUN:
            raise  # the other runs go on; Hydra reports this one at the end
        sys.exit(f"error: {explain(error)}")


if __name__ == "__main__":
    try:
        main()
    except ERRORS as error:
        sys.exit(f"error: {explain(error)}")
