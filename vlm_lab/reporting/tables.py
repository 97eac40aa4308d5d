"""The tables of a report as rows of text: for Markdown, for CSV, and for the page."""

import csv
import io
from typing import Any

from vlm_lab.reporting.study import ALL

Node = dict[str, Any]
Rows = list[list[str]]  # the first row is the heading


def results(report: Node) -> Rows:
    """One row per arm: mean over groups and every group with its interval, without image, with another's, seeds."""
    modes = [mode for mode in ("none", "shuffled") if mode in first(report["results"])[ALL]]
    names = {"none": "no image", "shuffled": "shuffled"}
    heading = [
        "arm",
        *report["columns"],
        *(names[mode] for mode in modes),
        *(["vision gain"] if modes else []),
        "words per answer",
        "seeds",
    ]
    rows = [heading]
    for arm, row in report["results"].items():
        blind = [f"{row[ALL][mode]['mean']:.1f}" for mode in modes]
        gain = [interval(row[ALL][modes[0]]["gain"], "+")] if modes else []
        scores = [interval(row[column]) for column in report["columns"]]
        rows.append([arm, *scores, *blind, *gain, f"{row[ALL]['words']:.1f}", str(len(row[ALL]["seeds"]))])
    return rows


def differences(report: Node) -> Rows:
    rows = [["arm", *report["columns"], "p (Holm)"]]
    for arm, row in report["differences"].items():
        cells = [
            interval(row[column], "+") + ("*" if row[column]["adjusted"] < 0.05 else "") for column in report["columns"]
        ]
        rows.append([arm, *cells, f"{row[ALL]['adjusted']:.2g}"])
    needed = [f"{report['detectable'][column]:.1f}" for column in report["columns"]] if report["detectable"] else []
    return [*rows, ["detectable with 80 % power", *needed, ""]] if needed else rows


def published(report: Node) -> Rows:
    """Their numbers beside ours: ours where a column has one of our groups' names."""
    columns = list(dict.fromkeys(column for row in report["published"].values() for column in row))
    ours = [column for column in columns if column in report["columns"]]
    rows = [["arm", *(f"{column}, published" for column in columns), *(f"{column}, ours" for column in ours)]]
    for arm in report["arms"]:
        theirs = [number(report["published"].get(arm, {}).get(column)) for column in columns]
        row = report["results"].get(arm)
        rows.append([arm, *theirs, *(interval(row[column]) if row else "" for column in ours)])
    return rows


def claims(report: Node) -> Rows:
    rows = [["claim", "on", "verdict", "reason"]]
    return rows + [[claim["order"], asked_on(claim), claim["verdict"], claim["reason"]] for claim in report["claims"]]


def asked_on(claim: Node) -> str:
    """The group, and what was measured on it if not accuracy."""
    return claim["group"] if claim["measure"] == "points" else f"{claim['measure']} in {claim['group']}"


def cost(report: Node) -> Rows:
    rows = [
        ["arm", "training", "tokens", "answer tokens", "stages", "shared", "parameters", "trained last", "peak memory"]
    ]
    for arm, row in report["cost"].items():
        counts = [f"{row[key]:,.0f}" for key in ("tokens", "label_tokens")]
        stages = [str(row["stages"]), f"{row['shared']:g}"]
        sizes = [f"{row[key]:,.0f}" for key in ("parameters", "trained")]
        rows.append([arm, duration(row["seconds"]), *counts, *stages, *sizes, f"{row['peak_gib']:.1f} GiB"])
    return rows


def configuration(report: Node) -> Rows:
    arms = list(report["results"])
    return [["setting", *arms]] + [
        [key, *(str(values[arm]) for arm in arms)] for key, values in report["configuration"].items()
    ]


def interval(row: Node, sign: str = "") -> str:
    if row["low"] is None:
        return f"{row['mean']:{sign}.1f}"
    return f"{row['mean']:{sign}.1f} [{row['low']:{sign}.1f}, {row['high']:{sign}.1f}]"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def first(rows: Node) -> Node:
    return next(iter(rows.values()))


def markdown(report: Node) -> str:
    """table.md: claims, results, differences, the published table, cost."""
    parts = [f"# {report['name']}", report["question"], f"Scale {report['scale']}. {report['differs']}."]
    sections = {"Claims": claims, "Results": results, f"Difference from {report['baseline']}": differences}
    sections |= {"Published and ours": published, "Cost": cost}
    for title, table in sections.items():
        parts += [f"## {title}", pipes(table(report))]
    return "\n\n".join(parts) + "\n"


def pipes(rows: Rows) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def long_csv(report: Node) -> str:
    """table.csv: one line per arm and column, numbers unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "arm",
            "column",
            "seeds",
            "mean",
            "low",
            "high",
            "none",
            "shuffled",
            "difference",
            "diff_low",
            "diff_high",
            "p",
            "p_holm",
            "published",
        ]
    )
    for arm, columns in report["results"].items():
        for column, row in columns.items():
            blind = [row[mode]["mean"] if mode in row else "" for mode in ("none", "shuffled")]
            e = report["differences"].get(arm, {}).get(column, {})
            change = [e.get(key, "") for key in ("mean", "low", "high", "p", "adjusted")]
            theirs = report["published"].get(arm, {}).get(column, "")
            own = [len(row["seeds"]), row["mean"], row["low"], row["high"]]
            writer.writerow([arm, column, *own, *blind, *change, theirs])
    return out.getvalue()
