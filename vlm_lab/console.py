"""What a person reads in the terminal: the trainability table of a stage, the result table of a run."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(highlight=False)


def show_trainability(stage: str, rows: Sequence[Any]) -> None:
    """`rows` have module, params, trained, and lr and adapt (None = frozen)."""
    table = Table(title=f"stage {stage}: what trains", title_justify="left")
    for heading in ("module", "parameters", "trained", "how", "learning rate"):
        table.add_column(heading, justify="left" if heading in ("module", "how") else "right")
    for row in rows:
        rate = "" if row.lr is None else f"{row.lr:g}"
        table.add_row(row.module, f"{row.params:,}", f"{row.trained:,}", row.adapt or "frozen", rate)
    console.print(table)


def show_scores(task: str, scores: dict[str, dict[str, Any]]) -> None:
    """`scores[images][group]` has accuracy (0..1) and n; one row per group, one column per way of showing images."""
    modes = list(scores)
    table = Table(title=f"{task}: accuracy in %, by the image that the model is shown", title_justify="left")
    for heading in ("group", "questions", *(HEADINGS[mode] for mode in modes), "majority"):
        table.add_column(heading, justify="left" if heading == "group" else "right", no_wrap=True)
    for group in scores[modes[0]]:
        cells = [scores[mode][group] for mode in modes]
        row = [f"{100 * cell['accuracy']:.1f}" for cell in cells] + [f"{100 * cells[0]['majority']:.1f}"]
        table.add_row(group, str(cells[0]["n"]), *row, style="bold" if group == "all" else None)
    console.print(table)


HEADINGS = {"real": "real image", "none": "no image", "shuffled": "shuffled"}
