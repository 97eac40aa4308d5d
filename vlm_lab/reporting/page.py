"""The report as one HTML page: styles, figures and pictures are inside it, nothing is fetched from anywhere."""

from collections.abc import Sequence
from html import escape
from typing import Any

from vlm_lab.reporting import tables
from vlm_lab.reporting.tables import Rows, duration

Node = dict[str, Any]

STYLE = """
:root { color-scheme: light; --line: #ddd; --soft: #666; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 88rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p { margin: .4rem 0; max-width: 60rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .83rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { font-weight: 600; }
.claim { border-left: .4rem solid #999; padding: .3rem .9rem; margin: .6rem 0; background: #f6f6f6; }
.claim b { text-transform: uppercase; font-size: .8rem; letter-spacing: .03em; }
.reproduced { border-color: #2a8a4a; } .direction-only { border-color: #86a82a; }
.underpowered { border-color: #999; } .contradicted { border-color: #c03a2b; } .not-comparable { border-color: #555; }
figure { margin: 1rem 0; } figure svg { width: 100%; min-width: 32rem; height: auto; display: block; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.sample { border: 1px solid var(--line); padding: .7rem; font-size: .87rem; overflow-wrap: anywhere; }
.sample img { max-width: 100%; height: 9rem; object-fit: contain; display: block; margin: 0 auto .5rem; }
.right { color: #1e7a3c; } .wrong { color: #b0301f; }
ul { padding-left: 1.2rem; margin: .3rem 0; }
"""


def page(report: Node, figures: Sequence[tuple[str, str]], samples: Sequence[Node]) -> str:
    shown = [
        f'<figure><div class="scroll">{picture}</div><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, picture in figures
    ]
    body = [
        head(report),
        section("Verdicts", "".join(map(claim, report["claims"]))),
        section("Results", results_note(report) + table(tables.results(report))),
        section(f"Difference from {report['baseline']}", difference_note() + table(tables.differences(report))),
        section("Figures", "".join(shown)),
        section("Published and ours", f"<p>{escape(report['setting'])}.</p>" + table(tables.published(report))),
        section("What differs between the arms", table(tables.configuration(report))),
        section("Cost", cost_note(report) + table(tables.cost(report))),
        section("Where the arms disagree", f'<div class="samples">{"".join(map(sample, samples))}</div>'),
        section("Made by", provenance(report)),
    ]
    title = escape(report["name"])
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    top = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{viewport}<title>{title}</title>'
    return f"{top}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"


def head(report: Node) -> str:
    counts = (
        f"{report['questions']} questions on {report['images']} images, seeds {', '.join(map(str, report['seeds']))}"
    )
    notes = "".join(f"<li>{escape(text)}</li>" for text in [*report["warnings"], *missing(report)])
    return (
        f"<h1>{escape(report['name'])}</h1><p>{escape(report['question'])}</p>"
        f'<p class="soft">{escape(report["source"])}. Here: scale {escape(report["scale"])}, {counts}. '
        f"What is different here: {escape(report['differs'])}.</p>"
        + (f"<p><b>Before believing this page:</b></p><ul>{notes}</ul>" if notes else "")
    )


def missing(report: Node) -> list[str]:
    return [f"{row['arm']}, seed {row['seed']}: {row['reason']}" for row in report["missing"]]


def claim(row: Node) -> str:
    kind = row["verdict"].replace(" ", "-")
    where = "mean over groups" if row["group"] == "all" else row["group"]
    return (
        f'<div class="claim {kind}"><b>{escape(row["verdict"])}</b> &ensp;{escape(row["order"])} '
        f'<span class="soft">({escape(where)})</span><br>{escape(row["reason"])}</div>'
    )


def results_note(report: Node) -> str:
    floor = f"{report['majority']['all']:.1f}"
    return (
        '<p class="soft">Accuracy in %, mean over seeds with its 95 % interval. Vision gain: what the image adds to '
        f"the score without it. Always giving a group's most frequent answer scores {floor}.</p>"
    )


def difference_note() -> str:
    return (
        '<p class="soft">Points, paired by question and seed; intervals know chance between seeds and between images. '
        "A star: significant at 5 % after Holm's correction. Detectable: what the arm with the widest interval would "
        "find with 80 % power, before correction.</p>"
    )


def cost_note(report: Node) -> str:
    total = report["total"]
    return (
        f'<p class="soft">Per run, mean over seeds. The {total["runs"]} runs trained {duration(total["trained_s"])}; '
        f"without sharing stages it would have been {duration(total['unshared_s'])}.</p>"
    )


def sample(row: Node) -> str:
    picture = f'<img alt="" src="data:image/png;base64,{row["image"]}">' if row["image"] else ""
    answers = "".join(
        f'<li class="{"right" if right else "wrong"}">{escape(arm)}: {escape(text) or "(nothing)"}</li>'
        for arm, (text, right) in row["answers"].items()
    )
    question = escape(row["question"]).replace("\n", "<br>")
    return (
        f'<div class="sample">{picture}<span class="soft">{escape(row["group"])}</span><br>{question}'
        f"<br><b>{escape(row['target'])}</b><ul>{answers}</ul></div>"
    )


def provenance(report: Node) -> str:
    git, versions = report["provenance"]["git"], report["provenance"]["versions"]
    code = git.get("commit", "no commit")[:12] + (", with changes that were not committed" if git.get("dirty") else "")
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f'<p class="soft">Code {escape(code)}; {escape(packages)}.</p>'


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table(rows: Rows) -> str:
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table></div>'
