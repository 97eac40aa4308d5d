"""The figures of a report as SVG text, to be inlined into the page. matplotlib, without a display."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator

from vlm_lab.reporting.study import ALL, Study

Node = dict[str, Any]
COLOURS = mpl.color_sequences["tab10"]
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "svg.hashsalt": "vlm_lab",  # the same report is the same file
}


def figures(study: Study, report: Node) -> list[tuple[str, str]]:
    """(caption, SVG) of every figure that this study has the data for."""
    with mpl.rc_context(STYLE):
        drawn = [
            (
                "Score by group: mean over seeds with 95 % interval; a cross is the score without the image.",
                groups(report),
            ),
            ("Difference from the baseline in points, 95 % intervals; a diamond is the published one.", forest(report)),
            ("Difference from the baseline by group; bold: significant after correction.", effects(report)),
            ("Loss by optimizer step over all stages, mean over seeds, smoothed.", curves(study)),
            ("Correlation of group scores across arms; similar groups stand together.", heat(report["correlations"])),
        ]
        return [(caption, svg(figure)) for caption, figure in drawn if figure is not None]


def svg(figure: Figure) -> str:
    """Without the XML prologue and matplotlib's metadata, scaling with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    width = float(re.search(r'width="([\d.]+)pt"', text)[1])  # type: ignore[index]
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" style="max-width:{width:.0f}pt">', text, count=1
    )
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def groups(report: Node) -> Figure:
    """Dots per column, arms side by side."""
    arms, columns = list(report["results"]), report["columns"]
    figure, axes = canvas(max(5.5, 0.35 * len(arms) * len(columns)), 3.2)
    for number, arm in enumerate(arms):
        rows = [report["results"][arm][column] for column in columns]
        x = np.arange(len(columns)) + 0.7 * ((number + 0.5) / len(arms) - 0.5)
        means = [row["mean"] for row in rows]
        half = [0.0 if row["high"] is None else row["high"] - row["mean"] for row in rows]
        axes.errorbar(x, means, yerr=half, fmt="o", ms=4, capsize=2, label=arm, color=COLOURS[number % 10])
        if "none" in rows[0]:
            axes.plot(x, [row["none"]["mean"] for row in rows], "x", ms=4, color=COLOURS[number % 10], alpha=0.6)
    floor = [report["majority"][column] for column in columns]
    axes.hlines(
        floor,
        np.arange(len(columns)) - 0.4,
        np.arange(len(columns)) + 0.4,
        "0.6",
        "dotted",
        label="most frequent answer",
    )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("accuracy in %")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def forest(report: Node) -> Figure | None:
    rows = report["differences"]
    if not rows:
        return None
    figure, axes = canvas(5.5, 0.9 + 0.35 * len(rows))
    base = report["published"].get(report["baseline"], {}).get(ALL)
    for y, (arm, row) in enumerate(rows.items()):
        e = row[ALL]
        strong = e["adjusted"] < 0.05
        axes.plot([e["low"], e["high"]], [y, y], "-", color=COLOURS[0], lw=2 if strong else 1)
        axes.plot(e["mean"], y, "o", color=COLOURS[0], mfc=COLOURS[0] if strong else "white")
        theirs = report["published"].get(arm, {}).get(ALL)
        if base is not None and theirs is not None:
            axes.plot(theirs - base, y, "D", color=COLOURS[1], mfc="none")
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"points above {report['baseline']}, mean over groups")
    return figure


def effects(report: Node) -> Figure | None:
    rows, columns = report["differences"], report["columns"]
    if not rows:
        return None
    values = np.array([[row[column]["mean"] for column in columns] for row in rows.values()])
    figure, axes = canvas(1.8 + 0.95 * len(columns), 0.9 + 0.32 * len(rows))
    limit = max(1.0, float(np.abs(values).max()))
    tiles(axes, values, "RdBu", limit, list(rows), columns)
    for (y, x), value in np.ndenumerate(values):
        strong = list(rows.values())[y][columns[x]]["adjusted"] < 0.05
        write(axes, x, y, f"{value:+.1f}", abs(value) > 0.6 * limit, "bold" if strong else "normal")
    return figure


def heat(correlation: Node) -> Figure | None:
    if correlation["matrix"] is None:
        return None
    names = correlation["groups"]
    values = np.array([[np.nan if r is None else r for r in row] for row in correlation["matrix"]])
    figure, axes = canvas(1.5 + 0.85 * len(names), 0.8 + 0.45 * len(names))
    tiles(axes, values, "RdBu", 1.0, names, names)
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            write(axes, x, y, f"{value:.2f}", abs(value) > 0.6, "normal")
    return figure


def tiles(
    axes: Axes, values: np.ndarray, colours: str, limit: float, rows: Sequence[str], columns: Sequence[str]
) -> None:
    axes.imshow(values, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def write(axes: Axes, x: int, y: int, text: str, on_dark: bool, weight: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if on_dark else "black", weight=weight)


def curves(study: Study) -> Figure | None:
    """One line per arm; where a stage ends, a grey line of the first arm that has it."""
    figure, axes = canvas(6.5, 3.0)
    for number, arm in enumerate(study.arms):
        lines = [run.curve() for run in study.of(arm)]
        losses = [[line["loss"] for line in curve] for curve in lines]
        length = min(map(len, losses))
        if length == 0:
            continue
        average = np.mean([loss[:length] for loss in losses], axis=0)
        axes.plot(np.arange(1, length + 1), smooth(average), label=arm, color=COLOURS[number % 10], lw=1.2)
        if number == 0:
            stages = [line["stage"] for line in lines[0]]
            for end in (i for i in range(1, len(stages)) if stages[i] != stages[i - 1]):
                axes.axvline(end + 0.5, color="0.8", lw=0.8)
    if not axes.lines:
        return None
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())  # labels within less than a decade only
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fiftieth of the curve, at least one step."""
    window = max(1, len(values) // 50)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")
