"""From a study to report.json: every number, difference, verdict and warning of a report, as plain data.

Scores and differences are in points. Intervals are 95 %; p values of differences are corrected after Holm: over arms
for the mean over groups, over arms x groups for the groups, over all links `a > b` for the claims.
"""

from statistics import mean
from typing import Any

import numpy as np

from vlm_lab.ablation import Claim, Link
from vlm_lab.reporting.study import ALL, Study
from vlm_lab.stats import ALPHA, Array, Estimate, compare, correlation_interval, correlations, holm, over_seeds
from vlm_lab.verdict import Verdict, judge, judge_equal, worst

IGNORED = ("name", "seed", "output", "ablation", "logger")  # of a configuration: not what arms are about
Node = dict[str, Any]


def analyse(study: Study) -> Node:
    """The whole report; the keys are the sections of the page."""
    ablation, differences = study.ablation, against_baseline(study)
    head = ablation.model_dump(exclude={"arm", "claims"})
    return {
        **head,
        "scale": study.scale,
        "baseline": ablation.baseline,
        "columns": study.columns,
        "questions": len(study.records),
        "images": study.design.shape[0],
        "results": {arm: results(study, arm) for arm in study.arms},
        "majority": {c: float(study.design.scores(study.majority[None], study.weights(c))[0]) for c in study.columns},
        "differences": differences,
        "detectable": detectable(differences),
        "claims": claims(study),
        "correlations": correlation(study),
        "cost": {arm: cost(study, arm) for arm in study.arms},
        "total": total(study),
        "configuration": configuration(study),
        "missing": [{"arm": arm, "seed": seed, "reason": reason} for arm, seed, reason in study.missing],
        "warnings": warnings(study),
        "provenance": provenance(study),
    }


def as_node(e: Estimate) -> Node:
    low, high = e.interval()
    return {"mean": e.mean, "low": low, "high": high, "p": e.p, "seeds": e.seeds, "detectable": e.spread.detectable()}


def results(study: Study, arm: str) -> Node:
    """Per column: the mean over seeds with its interval, and what the image is worth (real - none, real - shuffled)."""
    points = {mode: study.points(arm, mode) for mode in study.modes}
    out: Node = {}
    for column in study.columns:
        weights = study.weights(column)
        scores = {mode: study.design.scores(rows, weights) for mode, rows in points.items()}
        out[column] = {
            "seeds": scores["real"].tolist(),
            "mean": float(scores["real"].mean()),
            "low": None,
            "high": None,
            "words": float(study.design.scores(study.points(arm, measure="words"), weights).mean()),
        }
        if len(scores["real"]) > 1:
            out[column]["low"], out[column]["high"] = over_seeds(scores["real"]).interval()
        for mode in study.modes[1:]:
            gain = compare(points["real"], points[mode], study.design, weights)
            out[column][mode] = {"mean": float(scores[mode].mean()), "gain": as_node(gain)}
    return out


def difference(study: Study, a: str, b: str, column: str, measure: str = "points") -> Estimate:
    """a - b, over the seeds that both have."""
    seeds = study.common_seeds(a, b)
    left, right = (study.points(arm, seeds=seeds, measure=measure) for arm in (a, b))
    return compare(left, right, study.design, study.weights(column))


def against_baseline(study: Study) -> Node:
    """{arm: {column: difference, p and Holm-corrected p}} of every arm that shares a seed with the baseline."""
    base = study.ablation.baseline
    others = [arm for arm in study.arms if arm != base and study.common_seeds(arm, base)]
    out: Node = {arm: {c: as_node(difference(study, arm, base, c)) for c in study.columns} for arm in others}
    for family in ([ALL], study.columns[1:]):
        members = [out[arm][column] for arm in others for column in family]
        for member, adjusted in zip(members, holm([member["p"] for member in members]), strict=True):
            member["adjusted"] = adjusted
    return out


def detectable(differences: Node) -> dict[str, float]:
    """Per column: the difference that every comparison with the baseline would find with 80 % power."""
    columns: Node = next(iter(differences.values()), {})
    return {column: max(row[column]["detectable"] for row in differences.values()) for column in columns}


def claims(study: Study) -> list[Node]:
    tested = [(claim, link, estimate_of(study, claim, link)) for claim in study.ablation.claims for link in claim.links]
    known = [e.p for _, link, e in tested if e is not None and link.relation == ">"]
    adjusted = iter(holm(known))
    judged: dict[int, list[Node]] = {}
    for claim, link, e in tested:
        p = next(adjusted) if e is not None and link.relation == ">" else None
        judged.setdefault(id(claim), []).append(judge_link(study, claim, link, e, p))
    return [claim_node(claim, judged[id(claim)]) for claim in study.ablation.claims]


def estimate_of(study: Study, claim: Claim, link: Link) -> Estimate | None:
    if claim.group not in study.columns or not same_questions(study) or not study.common_seeds(link.left, link.right):
        return None
    return difference(study, link.left, link.right, claim.group, claim.measure)


def judge_link(study: Study, claim: Claim, link: Link, e: Estimate | None, p: float | None) -> Node:
    published = study.ablation.published_difference(link, claim.published)
    node = {"link": str(link), "published": published, "difference": as_node(e) if e else None, "adjusted": p}
    if e is None:
        verdict = Verdict("not comparable", obstacle(study, claim, link))
    elif claim.margin is not None and link.relation == "=":
        verdict = judge_equal(e, claim.margin, claim.measure)
    elif claim.measure == "points" and not above_majority(study, claim, link):
        verdict = Verdict("not comparable", "neither arm is above the score of always giving the most frequent answer")
    else:
        verdict = judge(e, p if p is not None else e.p, published, claim.measure)
    return {**node, "verdict": verdict.verdict, "reason": verdict.reason}


def obstacle(study: Study, claim: Claim, link: Link) -> str:
    if claim.group not in study.columns:
        return f"these runs have no group {claim.group}; there are {', '.join(study.columns)}"
    if not same_questions(study):
        return "the runs were not asked the same questions"
    return f"{link.left} and {link.right} have no finished seed in common"


def above_majority(study: Study, claim: Claim, link: Link) -> bool:
    weights = study.weights(claim.group)
    for arm in (link.left, link.right):
        points = study.points(arm)
        e = compare(points, np.broadcast_to(study.majority, points.shape), study.design, weights)
        if e.mean > 0 and e.p < ALPHA:
            return True
    return False


def claim_node(claim: Claim, tested: list[Node]) -> Node:
    weakest = worst([Verdict(node["verdict"], f"{node['link']}: {node['reason']}") for node in tested])
    return {**claim.model_dump(), "verdict": weakest.verdict, "reason": weakest.reason, "links": tested}


def same_questions(study: Study) -> bool:
    first = study.runs[0].questions()
    return all(run.questions() == first for run in study.runs[1:])


def correlation(study: Study) -> Node:
    """Of the groups' scores across arms (Cambrian-1's benchmark analysis); with few arms its intervals are wide."""
    groups = study.columns[1:]
    rows = [[study.design.scores(study.points(arm), study.weights(g)).mean() for g in groups] for arm in study.arms]
    table: Array = np.array(rows)
    if len(table) < 3 or len(groups) < 2:
        return {"groups": groups, "arms": len(table), "matrix": None}
    matrix, order = correlations(table)
    values = [[None if np.isnan(matrix[i, j]) else float(matrix[i, j]) for j in order] for i in order]
    intervals = [[None if r is None else correlation_interval(r, len(table)) for r in row] for row in values]
    return {"groups": [groups[i] for i in order], "arms": len(table), "matrix": values, "intervals": intervals}


def cost(study: Study, arm: str) -> Node:
    """Means over seeds: what its stages took, whichever run trained them, and how many of them others use too."""
    runs = study.of(arm)
    stages = [list(run.result["stages"].values()) for run in runs]
    keys = ("seconds", "tokens", "label_tokens", "samples")
    sums = {key: mean(sum(stage[key] for stage in own) for own in stages) for key in keys}
    shared = mean(sum(uses(study, stage["key"]) > 1 for stage in own) for own in stages)
    peak = max(stage["peak_gib"] for own in stages for stage in own)
    parameters = mean(sum(row["params"] for row in own[-1]["trainable"]) for own in stages)
    trained = mean(sum(row["trained"] for row in own[-1]["trainable"]) for own in stages)
    node = {**sums, "stages": len(stages[0]), "shared": shared, "peak_gib": peak}
    return {**node, "wall_s": mean(run.result["wall_s"] for run in runs), "parameters": parameters, "trained": trained}


def uses(study: Study, key: str) -> int:
    return sum(stage["key"] == key for run in study.runs for stage in run.result["stages"].values())


def total(study: Study) -> Node:
    """Training time of the sweep, and what it would have been had no stage been shared."""
    every = [stage for run in study.runs for stage in run.result["stages"].values()]
    different = {stage["key"]: stage["seconds"] for stage in every}
    unshared = sum(stage["seconds"] for stage in every)
    return {"runs": len(study.runs), "trained_s": sum(different.values()), "unshared_s": unshared}


def configuration(study: Study) -> dict[str, dict[str, Any]]:
    """{setting: {arm: value}} of what differs between arms, and nothing else."""
    flat = {arm: flatten({k: v for k, v in study.of(arm)[0].config.items() if k not in IGNORED}) for arm in study.arms}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = {key: {arm: flat[arm].get(key, "-") for arm in study.arms} for key in keys}
    return {key: row for key, row in rows.items() if len({repr(value) for value in row.values()}) > 1}


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {key: value for k, v in tree.items() for key, value in flatten(v, f"{path}.{k}" if path else k).items()}
    return {path: tree}


def warnings(study: Study) -> list[str]:
    """What a careful reader should know before believing the table."""
    out = [] if same_questions(study) else ["the runs were not asked the same questions"]
    commits = {run.result["git"].get("commit", "none")[:10] for run in study.runs}
    if len(commits) > 1:
        out.append(f"the runs were made by different commits: {', '.join(sorted(commits))}")
    if any(run.result["git"].get("dirty") for run in study.runs):
        out.append("some runs were made by code that was not committed")
    if few := sorted({arm for arm in study.arms if len(study.of(arm)) < 3}):
        out.append(f"fewer than three seeds: {', '.join(few)}")
    return out


def provenance(study: Study) -> Node:
    first = study.runs[0].result
    return {"git": first["git"], "versions": first["versions"], "seeds": sorted({run.seed for run in study.runs})}
