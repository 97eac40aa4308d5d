"""The report on a sweep made by hand, with a planted effect, and what it says when runs cannot be compared."""

import csv
import json
import random
from pathlib import Path

import pytest
from helpers import composed

from vlm_lab import build, report, schema
from vlm_lab.ablation import Claim
from vlm_lab.config import Config
from vlm_lab.dashboard import as_json, workspace
from vlm_lab.reporting import tables
from vlm_lab.reporting.analysis import analyse
from vlm_lab.reporting.page import page
from vlm_lab.reporting.study import load

QUESTIONS, SEEDS = 120, (0, 1, 2)
CHANCE = {"concat": 0.5, "sva": 0.85, "resampler": 0.2}  # of a right answer, with the image
ABLATION = {
    "name": "by_hand",
    "question": "Which connector is <best>?",
    "source": "a test",
    "setting": "made up",
    "differs": "everything",
    "arms": {arm: [] for arm in CHANCE},
    "seeds": list(SEEDS),
    "published": {"concat": {"all": 54.7}, "sva": {"all": 84.7}, "resampler": {"all": 74.7}},
    "claims": [
        {"order": "sva > concat", "published": "all"},
        {"order": "resampler > concat", "published": "all"},
        {"order": "sva > resampler", "group": "ocr_chart"},
        {"order": "sva > concat", "group": "video"},
    ],
}
STAGES = {
    "align": {"seconds": 10.0, "tokens": 1000, "label_tokens": 100, "samples": 8, "peak_gib": 1.0, "reused": False},
    "instruct": {"seconds": 4.0, "tokens": 500, "label_tokens": 50, "samples": 8, "peak_gib": 1.5, "reused": False},
}
TRAINABLE = [{"module": "llm", "params": 100, "trained": 10, "lr": 1e-3, "adapt": "lora"}]


def answers(config: Config, chance: float, rng: random.Random) -> list[dict]:
    """One record per question of the made-up world, right with probability `chance`."""
    source = build.tasks(config)["scenes"]
    samples = [source[index] for index in range(QUESTIONS)]
    texts = [(s, "".join(map(str, s.messages[-1].content))) for s in samples]
    return [
        {
            "id": s.id,
            "group": s.group,
            "image": s.id,
            "question": "What is it?",
            "target": target,
            "prediction": target if rng.random() < chance else "zebra",
            "choices": None,
        }
        for s, target in texts
    ]


def write_run(base: Config, folder: Path, arm: str, seed: int) -> None:
    config = base.model_copy(update={"seed": seed, "connector": {**base.connector, "factor": len(arm)}})
    rng = random.Random(f"{arm} {seed}")
    (folder / "eval").mkdir(parents=True)
    schema.dump(config, folder / "config.yaml")
    for mode, chance in (("real", CHANCE[arm]), ("none", 0.2), ("shuffled", 0.2)):
        lines = [json.dumps(record) + "\n" for record in answers(config, chance, rng)]
        (folder / "eval" / f"scenes.{mode}.jsonl").write_text("".join(lines))
    keys = {"align": f"align{seed}", "instruct": f"{arm}{seed}"}
    stages = {name: {**row, "key": keys[name], "trainable": TRAINABLE} for name, row in STAGES.items()}
    result = {"status": "ok", "stages": stages, "wall_s": 20.0, "git": {"commit": "c" * 40, "dirty": False}}
    (folder / "result.json").write_text(json.dumps({**result, "versions": {"torch": "2"}}))
    curve = [{"stage": stage, "step": step, "loss": 3.0 / step} for stage in STAGES for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    base = schema.check(composed(f"output={root}", f"data.tasks.scenes.size={QUESTIONS}"))
    runs: dict[str, dict[str, str]] = {}
    for arm in CHANCE:
        for seed in SEEDS:
            write_run(base, root / "runs" / f"{arm}-{seed}", arm, seed)
            runs.setdefault(arm, {})[str(seed)] = f"../../runs/{arm}-{seed}"
    runs["sva"]["3"] = "../../runs/not-yet"
    place = root / "sweeps" / "by_hand"
    place.mkdir(parents=True)
    (place / "index.json").write_text(json.dumps({"ablation": ABLATION, "scale": "tiny", "runs": runs}))
    return place


@pytest.fixture(scope="module")
def written(folder: Path) -> dict:
    return report.write(folder)


def test_verdicts(written: dict) -> None:
    """+35 points planted and +30 published; -30 against +20; a group without published size; a group not there."""
    verdicts = [claim["verdict"] for claim in written["claims"]]
    assert verdicts == ["reproduced", "contradicted", "direction only", "not comparable"]
    assert "these runs have no group video" in written["claims"][3]["reason"]


def test_scores_differences_and_vision_gain(written: dict) -> None:
    """The planted sizes, within their 95 % intervals; `all` is the mean over groups."""
    sva = written["results"]["sva"]
    groups = written["columns"][1:]
    assert groups == ["general", "knowledge", "ocr_chart", "vision_centric"]
    assert sva["all"]["mean"] == pytest.approx(sum(sva[g]["mean"] for g in groups) / 4)
    change = written["differences"]["sva"]["all"]
    assert change["low"] < 35 < change["high"]
    assert change["adjusted"] < 0.01
    gain = sva["all"]["none"]["gain"]
    assert gain["low"] < 65 < gain["high"]
    blind = written["results"]["resampler"]["all"]["none"]["gain"]
    assert blind["low"] < 0 < blind["high"]
    assert 0 < written["detectable"]["all"] < 20


def test_a_claim_about_the_length_of_answers(folder: Path) -> None:
    """Three words more in every answer of one arm, whatever is right: `>` holds, `=` within one word does not."""
    study = load(folder)
    for record in [record for run in study.of("sva") for record in run.records["real"]]:
        record["prediction"] += " as you see"
    orders = [{"order": "sva > concat"}, {"order": "sva = concat", "margin": 1.0}]
    study.ablation.claims = [Claim(**order, measure="words") for order in orders]  # type: ignore[arg-type]
    told = analyse(study)
    assert [claim["verdict"] for claim in told["claims"]] == ["direction only", "contradicted"]
    assert told["claims"][0]["links"][0]["difference"]["mean"] == pytest.approx(3, abs=0.2)
    assert " words [" in told["claims"][0]["reason"]
    assert told["results"]["sva"]["all"]["words"] == pytest.approx(4, abs=0.2)
    assert told["results"]["concat"]["all"]["words"] == pytest.approx(1, abs=0.2)
    assert tables.claims(told)[1][1] == "words in all"
    assert tables.results(told)[0][-2:] == ["words per answer", "seeds"]


def test_cost_configuration_and_what_is_missing(written: dict) -> None:
    assert written["cost"]["sva"] | {"seconds": 14.0, "shared": 1, "stages": 2, "trained": 10} == written["cost"]["sva"]
    assert written["total"] == {"runs": 9, "trained_s": 3 * 10 + 9 * 4, "unshared_s": 9 * 14}
    assert written["configuration"] == {"connector.factor": {"concat": 6, "sva": 3, "resampler": 9}}
    assert written["missing"] == [{"arm": "sva", "seed": 3, "reason": "not finished yet"}]
    assert written["correlations"]["arms"] == 3
    assert written["correlations"]["matrix"][0][0] == pytest.approx(1.0)


def test_the_page_is_self_contained_and_escaped(folder: Path, written: dict) -> None:
    html = (folder / "report.html").read_text()
    names = ('xmlns:xlink="http://www.w3.org/1999/xlink"', 'xmlns="http://www.w3.org/2000/svg"', "url(#")
    for harmless in names:
        html = html.replace(harmless, "")
    for remote in ("http://", "https://", "<script", "@import", "url("):
        assert remote not in html, remote
    assert "Which connector is &lt;best&gt;?" in html
    assert html.count("<svg") == 5
    assert html.count("data:image/png;base64,") >= 4
    assert "sva, seed 3: not finished yet" in html


def test_tables(folder: Path, written: dict) -> None:
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == 3 * 5
    row = next(row for row in rows if (row["arm"], row["column"]) == ("sva", "all"))
    assert float(row["mean"]) == written["results"]["sva"]["all"]["mean"]
    assert float(row["published"]) == 84.7
    text = (folder / "table.md").read_text()
    assert "| sva > concat | all | reproduced |" in text
    assert json.loads((folder / "report.json").read_text())["claims"] == written["claims"]


def test_the_same_runs_give_the_same_report(folder: Path, written: dict) -> None:
    before = {name: (folder / name).read_bytes() for name in ("report.html", "report.json", "table.md", "table.csv")}
    report.write(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_runs_that_were_asked_other_questions_are_not_compared(folder: Path) -> None:
    study = load(folder)
    study.runs[0].records["real"] = study.runs[0].records["real"][1:] + study.runs[0].records["real"][:1]
    told = analyse(study)
    assert {claim["verdict"] for claim in told["claims"]} == {"not comparable"}
    assert "the runs were not asked the same questions" in told["warnings"]


def test_arms_below_the_majority_answer_are_not_compared(folder: Path) -> None:
    study = load(folder)
    for run in study.runs:
        run.records["real"] = [{**record, "prediction": "zebra"} for record in run.records["real"]]
    reasons = [claim["reason"] for claim in analyse(study)["claims"]][:3]
    assert all("most frequent answer" in reason for reason in reasons)


def test_one_seed_is_reported_as_such(folder: Path) -> None:
    study = load(folder)
    study.runs = [run for run in study.runs if run.seed == 0]
    told = analyse(study)
    assert told["claims"][0]["verdict"] == "underpowered"
    assert "one seed" in told["claims"][0]["reason"]
    assert "fewer than three seeds: concat, resampler, sva" in told["warnings"]
    assert "underpowered" in page(told, [], [])


def test_a_folder_without_a_sweep_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no sweep folder"):
        load(tmp_path)


def test_the_dashboard_groups_by_arm(folder: Path) -> None:
    """Built without an account: a section per way of showing images, every panel grouped by the arm."""
    tree = json.loads(as_json(workspace(load(folder), "us", "bench")))
    assert (tree["entity"], tree["project"], tree["displayName"]) == ("us", "bench", "by_hand")
    sections = tree["spec"]["section"]["panelBankConfig"]["sections"]
    names = [section["name"] for section in sections]
    assert names[:5] == ["Scores", "Without the image", "With another question's image", "Training", "Cost"]
    shown = [panel["config"] for section in sections[:5] for panel in section["panels"]]
    assert {config["groupBy"] for config in shown} == {"ablation.value.arm"}
    assert ["eval/scenes.none/ocr_chart"] in [config["metrics"] for config in shown]
