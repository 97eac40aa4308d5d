"""The Weights & Biases workspace of one sweep, as code:

    python -m vlm_lab.dashboard outputs/sweeps/NAME [ENTITY/PROJECT]

Arms by colour and seeds averaged (runs made with logger=wandb carry the sweep as group and their arm in the config),
one section per metric group: scores, without and with another's image, losses, throughput. Saved to W&B when logged in
and ENTITY/PROJECT is given; its JSON is written to dashboard.json in any case. The report (vlm_lab/report.py) needs no
account and holds the statistics, which a dashboard does not.
"""

import json
import sys
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as ws

from vlm_lab.console import console
from vlm_lab.reporting.study import ALL, Study, load
from vlm_lab.wandb_logger import has_key

ARM = "ablation.arm"  # of a run's configuration
SUFFIXES = {"Scores": "", "Without the image": ".none", "With another question's image": ".shuffled"}


def workspace(study: Study, entity: str = "", project: str = "vlm_lab") -> ws.Workspace:
    """The workspace object; it is built without an account."""
    tasks = sorted({task for task, _ in study.cells})
    sections = [
        section(name, [bar(f"eval/{task}{suffix}/{group}") for task in tasks for group in groups(study, task)])
        for name, suffix in SUFFIXES.items()
    ]
    sections.append(section("Training", [curve("train/loss", log=True), curve("train/lr")]))
    sections.append(section("Cost", [curve("train/samples_per_s"), curve("train/tokens_per_s")]))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=study.ablation.name,
        sections=sections,
        runset_settings=ws.RunsetSettings(
            filters=[ws.Config("ablation.name") == study.ablation.name],
            groupby=[ws.Config(ARM)],
        ),
    )


def groups(study: Study, task: str) -> list[str]:
    return [ALL, *(group for name, group in study.cells if name == task)]


def section(name: str, content: list[Any]) -> ws.Section:
    return ws.Section(name=name, panels=content, is_open=True)


def bar(metric: str) -> panels.BarPlot:
    """One bar per arm: the mean over seeds with its standard error."""
    return panels.BarPlot(
        title=metric, metrics=[metric], groupby=panels.Config(ARM), groupby_aggfunc="mean", groupby_rangefunc="stderr"
    )


def curve(metric: str, log: bool = False) -> panels.LinePlot:
    return panels.LinePlot(
        title=metric,
        x="trainer/global_step",
        y=[metric],
        log_y=log,
        groupby=panels.Config(ARM),
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )


def as_json(space: ws.Workspace) -> str:
    """What W&B's server would be sent. `_to_model` is not public, hence the upper bound in pyproject.toml."""
    tree = json.loads(space._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(tree, indent=1)


def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, place = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else ""
    entity, _, project = place.rpartition("/")
    if place and not entity:
        sys.exit(f"error: {place}: say ENTITY/PROJECT")
    try:
        space = workspace(load(folder), entity, project or "vlm_lab")
    except ValueError as error:
        sys.exit(f"error: {error}")
    (folder / "dashboard.json").write_text(as_json(space))
    console.print(f"dashboard: {folder / 'dashboard.json'}", soft_wrap=True)
    if place and has_key():
        console.print(f"saved: {space.save().url}", soft_wrap=True)


if __name__ == "__main__":
    main()
