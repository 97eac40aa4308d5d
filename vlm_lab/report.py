"""The report of a sweep, at any time, from its files alone:

    python -m vlm_lab.report outputs/sweeps/NAME

Writes report.html (one self-contained page), table.md, table.csv and report.json into that folder, and prints the
verdicts. Runs that are not finished are left out and named. No torch, no network; nothing is trained or evaluated here.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from vlm_lab.console import console
from vlm_lab.reporting import tables
from vlm_lab.reporting.analysis import analyse
from vlm_lab.reporting.page import page
from vlm_lab.reporting.plots import figures
from vlm_lab.reporting.samples import samples
from vlm_lab.reporting.study import load


def write(folder: Path) -> dict[str, Any]:
    """All four files; returns what report.json holds. Raises ValueError if there is nothing to report on."""
    study = load(folder)
    report = analyse(study)
    files = {
        "report.json": json.dumps(report, indent=1),
        "table.md": tables.markdown(report),
        "table.csv": tables.long_csv(report),
        "report.html": page(report, figures(study, report), samples(study)),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return report


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['name']} at scale {report['scale']}", title_justify="left")
    for heading in ("claim", "on", "verdict", "reason"):
        table.add_column(heading, overflow="fold")
    for row in tables.claims(report)[1:]:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    try:
        show(write(folder))
    except ValueError as error:
        sys.exit(f"error: {error}")
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    main()
