"""Sweep files and the sweeper: every arm composes, published means are what they say, failures, skipping, order."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, composed, small

from hydra_plugins.ablation_sweeper import combined, lost_jobs_reported, raised
from vlm_lab import build, schema, sweep
from vlm_lab.ablation import Ablation, Link, links
from vlm_lab.config import Config
from vlm_lab.module import VLMTraining
from vlm_lab.store import Store
from vlm_lab.sweep import Job, in_order, last_line, source

FILES = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
SMALL = ["bootstrap=[]", *small(), "stages.align.steps=2", "stages.instruct.steps=2"]
TWO_STEPS = [*(f"data.sources.{name}.size=64" for name in ("captions", "questions", "text")), "trainer.num_workers=0"]


def first_arm(name: str) -> list[str]:
    arm, overrides = next(iter(arms_of(name, "tiny").items()))
    return [*overrides, f"+ablation.arm={arm}"]


def arms_of(name: str, scale: str) -> dict[str, list[str]]:
    return dict(composed(f"sweep={name}", f"scale={scale}").ablation.arms)


def check_arm(name: str, scale: str, arm: str, overrides: list[str]) -> Config:
    assert not any("None" in override for override in overrides), overrides  # a null that became text
    command = combined([f"sweep={name}", f"scale={scale}"], [*overrides, f"+ablation.arm={arm}"])
    return schema.check(composed(*command))


@pytest.mark.parametrize("name", FILES)
def test_every_arm_composes_and_passes_check(name: str) -> None:
    """All at scale=tiny, the last one at scale=full too; the name is the file's; no two arms are the same run."""
    arms = arms_of(name, "tiny")
    configs = [check_arm(name, "tiny", arm, list(overrides)) for arm, overrides in arms.items()]
    settings = [repr(c.model_dump(exclude={"name", "ablation"})) for c in configs]
    assert len(set(settings)) == len(arms)
    assert configs[0].ablation is not None
    assert configs[0].ablation.name == name
    arm, overrides = list(arms_of(name, "full").items())[-1]
    check_arm(name, "full", arm, list(overrides))


def test_half_of_the_adapter_data_is_the_same_share_at_both_scales() -> None:
    arms = arms_of("cambrian_adapter_data", "tiny")
    toy = [check_arm("cambrian_adapter_data", "tiny", arm, list(arms[arm])).stages["align"] for arm in ("0.5M", "1.2M")]
    half = list(arms_of("cambrian_adapter_data", "full")["0.5M"])
    full = check_arm("cambrian_adapter_data", "full", "0.5M", half).stages["align"]
    assert toy[0].steps / toy[1].steps == pytest.approx(full.epochs, abs=0.005)


@pytest.mark.parametrize("name", FILES)
def test_the_first_arm_trains(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two real optimizer steps of its last stage, from random weights; the losses are finite."""
    output = tmp_path_factory.getbasetemp() / "sweeps"  # one cache of pictures and tokenizers for all of them
    config = schema.check(composed(f"sweep={name}", *TWO_STEPS, f"output={output}", *first_arm(name)))
    stage = list(config.stages.values())[-1].model_copy(
        update={"steps": 2, "epochs": None, "batch": 4, "micro_batch": 4}
    )
    vlm = build.vlm(config)
    loader = build.loader(config, stage, build.processor(config, vlm, build.tokenizer(config), stage), 0, 1)
    module = VLMTraining(vlm, stage, loader.steps)
    trainer = build.trainer(config, stage, loader, [])
    trainer.fit(module, loader)
    assert trainer.global_step == 2
    assert math.isfinite(module.loss_of_step())


@pytest.mark.parametrize("name", FILES)
def test_published_means_are_the_means_of_their_groups(name: str) -> None:
    """Where a table gives Cambrian-1's four groups, `all` is their mean, to the table's rounding of 0.06."""
    for row in composed(f"sweep={name}").ablation.get("published", {}).values():
        groups = [row[g] for g in ("general", "knowledge", "ocr_chart", "vision_centric") if g in row]
        if len(groups) == 4:
            assert row["all"] == pytest.approx(sum(groups) / 4, abs=0.06)


def test_chains_are_read_as_links() -> None:
    assert links("a > b > c") == [Link("a", ">", "b"), Link("b", ">", "c")]
    assert links("depth1 = depth3") == [Link("depth1", "=", "depth3")]
    for wrong in ("a", "a >", "> a", "", "a > > b"):
        with pytest.raises(ValueError, match="no ordering of arms"):
            links(wrong)


SPEC = {
    **dict.fromkeys(("name", "question", "source", "setting", "differs"), "x"),
    "arms": {"a": [], "b": ["seed=1"]},
    "seeds": [0],
    "published": {"a": {"all": 1.0}, "b": {"all": 3.0}},
    "claims": [{"order": "b > a", "published": "all"}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claims": [{"order": "b > c"}]}, "c: no such arm; there are a, b"),
        ({"claims": [{"order": "b = a"}]}, "needs a margin"),
        ({"claims": [{"order": "b > a", "margin": 1.0}]}, "takes none"),
        ({"claims": [{"order": "b > a", "published": "DocVQA"}]}, "need the column DocVQA"),
        ({"arms": {"a b": [], "b": []}}, "arm 'a b': use letters"),
        ({"published": {"z": {"all": 1.0}}}, "z: no such arm"),
        ({"arm": "z"}, "z: no such arm"),
    ],
)
def test_mistakes_in_a_sweep_file(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ablation.model_validate({**SPEC, **change})


def test_published_differences() -> None:
    ablation = Ablation.model_validate(SPEC)
    assert ablation.published_difference(Link("b", ">", "a"), "all") == 2.0
    assert ablation.published_difference(Link("b", ">", "a"), None) is None
    assert ablation.baseline == "a"


def test_an_arm_overrides_the_command_line() -> None:
    assert combined(["seed=3", "connector=mlp", "+x=1"], ["connector=sva", "++x=2"]) == [
        "seed=3",
        "connector=sva",
        "++x=2",
    ]


def job(arm: str, **keys: str) -> Job:
    return Job(arm, 0, [], schema.check(composed()), keys)


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    """Two pairs that share a first stage each, and one run that shares nothing."""
    pairs = [("a1", "A", "1"), ("a2", "A", "2"), ("lone", "C", "5"), ("b1", "B", "3"), ("b2", "B", "4")]
    return [job(arm, align=first, instruct=second) for arm, first, second in pairs]


def test_whoever_trains_a_shared_stage_goes_first(jobs: list[Job]) -> None:
    assert [j.arm for j in in_order(jobs)] == ["a1", "b1", "a2", "lone", "b2"]


def test_the_plan_names_what_is_shared(jobs: list[Job], tmp_path: Path) -> None:
    store, owner = Store(tmp_path), {}
    (tmp_path / "C").mkdir()
    (tmp_path / "C" / "stage.json").write_text("{}")
    told = [source(j.keys["align"], j.arm, owner, store) for j in jobs]
    assert told == ["A to train", "A shared with a1", "C in the store", "B to train", "B shared with b1"]


def test_the_last_complete_line_of_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_line(path) is None
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_line(path) == {"step": 2}


def test_a_launcher_that_breaks_loses_no_run(jobs: list[Job]) -> None:
    def broken(_: object) -> list[str | None]:
        raise OSError("the queue is gone")

    assert set(sweep.start(broken, jobs).values()) == {"the launcher failed: OSError: the queue is gone"}


def train(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"output={output}"]
    return subprocess.run(command, cwd=output, capture_output=True, text=True, timeout=400, check=False)


SWEEP = ("-m", "sweep=cambrian_frozen_encoder", "ablation.seeds=[0]", *SMALL)


def test_mistakes_are_found_before_anything_starts(tmp_path: Path) -> None:
    for overrides, message in [
        ((*SWEEP, '+ablation.arms.bad=["connector=mpl"]'), "arm bad: connector=mpl: no such option, did you mean mlp?"),
        ((*SWEEP, "seed=0,1"), "seed=0,1: the sweep's arms say what varies"),
        (SWEEP[1:2], "a sweep is several runs: python train.py -m sweep=cambrian_frozen_encoder"),
        ((*SWEEP[1:2], "--dry-run"), "--dry-run is for sweeps (-m sweep=NAME)"),
        (("-m", "sweep=cambrian_frozen"), "did you mean cambrian_frozen_encoder?"),
    ]:
        result = train(tmp_path, *overrides)
        assert message in result.stderr.splitlines()[-1]
        assert result.returncode == 1
        assert not (tmp_path / "runs").exists()


BAD = '+ablation.arms.bad=["+stages.instruct.train={encoder.siglip.nose:1.0}"]'
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def check_a_sweep_with_a_bad_arm(output: Path, *launcher: str) -> None:
    """Three arms share the align stage, one process trains it; one names a module that the model has not."""
    first = train(output, *SWEEP, BAD, *launcher)
    assert first.returncode == 1
    assert "3 runs, 0 finished already" in first.stdout
    assert "failed bad, seed 0: ValueError: train.encoder.siglip.nose" in first.stdout
    assert first.stderr.splitlines()[-1] == "error: 1 of 3 runs failed; the same command tries them again"
    logs = {path.parent.name.split("-")[1]: path.read_text() for path in output.glob("runs/*/log.txt")}
    assert sum("stage align: what trains" in text for text in logs.values()) == 1
    assert sum("stage align: reused" in text for text in logs.values()) == 2


def has_slurm() -> bool:
    """Whether a controller answers: Slurm's commands may be installed without one."""
    command = ["sinfo", "--noheader", "--states=idle,mixed"]
    try:
        return bool(subprocess.run(command, capture_output=True, check=False, timeout=5).stdout)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def test_arms_as_jobs_of_slurm(tmp_path: Path) -> None:
    if not has_slurm():
        pytest.skip("needs Slurm")
    check_a_sweep_with_a_bad_arm(tmp_path, "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10")


def test_a_job_that_a_queue_loses_is_a_failure_of_its_own(tmp_path: Path) -> None:
    """One that ends without a result, and one behind it; submitit's launcher alone would leave at the first."""
    submitit = pytest.importorskip("submitit")
    executor, ask = submitit.LocalExecutor(tmp_path), submitit.Job.results
    jobs = [executor.submit(os._exit, 3), executor.submit(sum, (1, 2))]
    with lost_jobs_reported():
        (lost,), found = (job.results() for job in jobs)
    assert "UncompletedJobError" in str(raised(lost)) and "\n" not in str(raised(lost))
    assert found == [3]
    assert submitit.Job.results is ask


def test_a_failed_arm_is_recorded_the_others_go_on_and_are_not_run_again(tmp_path: Path) -> None:
    """Two at a time; then the same command again, one after the other."""
    check_a_sweep_with_a_bad_arm(tmp_path, *JOBLIB)
    again = train(tmp_path, *SWEEP)
    assert again.returncode == 0, again.stderr
    assert "2 runs, 2 finished already" in again.stdout
    plan = train(tmp_path, *SWEEP, "--dry-run").stdout
    assert "2 runs, 2 of them finished, of 4 stages" in plan
    assert "3 different ones, 0 of them to train" in plan
    report = subprocess.run(
        [sys.executable, "-m", "vlm_lab.report", str(tmp_path / "sweeps" / "cambrian_frozen_encoder")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    assert "unfrozen > frozen" in report.stdout
