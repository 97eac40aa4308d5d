"""check(): every option composes and binds; every kind of mistake is one clear line, answered without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, composed

from vlm_lab import schema
from vlm_lab.config import Config, Data, Eval, Trainer
from vlm_lab.explain import explain
from vlm_lab.stages import COSMETIC, IDENTITY, PERFORMANCE, Rule, Stage

GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "sweep")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
NEEDS_PATH = {"llava_json", "cauldron", "obelics", "webdataset", "caption_parquet"}
COMPANIONS = {  # what an option cannot be without
    ("data", "scenes_onevision"): ["tiling=anyres_max"],
    ("stage", "knowledge"): ["tiling=anyres_max"],
    ("stage", "onevision"): ["data=scenes_onevision", "tiling=anyres_max"],
    ("stage", "interleaved"): ["data=scenes_interleaved"],
    ("stage", "interleaved_highres"): ["data=scenes_interleaved"],
    ("data", "obelics"): ["stage=[interleaved]"],
    ("connector", "mining"): ["encoder=[siglip,clip]"],
    ("connector", "sva"): ["encoder=[siglip,clip]"],
    ("tiling", "native"): ["connector=mlp"],
    ("tiling", "split4"): ["connector=perceiver"],
}


@pytest.mark.parametrize("scale", ["tiny", "full"])
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_binds(group: str, option: str, scale: str, tmp_path: Path) -> None:
    value = f"[{option}]" if group in ("encoder", "stage", "bootstrap") else option
    extra = [f"data.path={tmp_path}"] * (option in NEEDS_PATH) + COMPANIONS.get((group, option), [])
    choice = f"{group}={value}" if group != "scale" else f"scale={option}"
    config = schema.check(composed(*([] if group == "scale" else [f"scale={scale}"]), choice, *extra))
    assert config.stages


def test_every_field_is_classified() -> None:
    kinds = {IDENTITY, PERFORMANCE, COSMETIC}
    models = [Config, Stage, Rule, Data, Trainer, Eval]
    fields = [(m.__name__, name, info) for m in models for name, info in m.model_fields.items()]
    wrong = [
        f"{m}.{name}" for m, name, info in fields if len(kinds & {x for x in info.metadata if isinstance(x, str)}) != 1
    ]
    assert wrong == []


def test_several_encoders_and_ordered_stages() -> None:
    config = schema.check(
        composed("encoder=[dinov2,siglip]", "connector=concat", "stage=[instruct,align]"), {"connector": "concat"}
    )
    assert list(config.encoder) == ["dinov2", "siglip"]
    assert list(config.stages) == ["instruct", "align"]
    assert config.name == "dinov2+siglip-concat"


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = schema.check(composed())
    schema.dump(config, tmp_path / "config.yaml")
    assert schema.load(tmp_path / "config.yaml") == config


MISTAKES = [
    ("encoder=siglib", "encoder=siglib: no such option, did you mean siglip?"),
    ("encoder.siglip.dpth=3", "encoder.siglip.dpth: no such setting, did you mean depth?"),
    ("+encoder.siglip.dpth=3", "encoder.siglip.dpth: no such setting; did you mean depth?"),
    ("+typo=1", "typo: no such setting"),
    ("+data.typo=1", "data.typo: no such setting"),
    ("+stages.align.typo=1", "stages.align.typo: no such setting"),
    ("seed=abc", "seed = 'abc'"),
    ("seed=-1", "seed = -1"),
    ("stages.align.steps=0", "stages.align.steps = 0"),
    ("stages.align.epochs=1.0", "stages.align: give either steps or epochs"),
    ("stages.align.train.connector=fast", "stages.align.train.connector = 'fast'"),
    ("+stages.align.train.conector=1.0", "stages.align.train.conector: no such module"),
    ("+stages.align.train.encoder.clip=1.0", "stages.align.train.encoder"),
    ("stages.align.mixture=nothing", "stages.align.mixture = nothing: this data option offers caption, instruct"),
    ("+connector.out_dim=8", "connector.out_dim is set by code"),
    ("connector._target_=os.system", "connector._target_ = os.system: no such class or function below vlm_lab"),
    ("data=llava_json", "data.path must be given"),
    ("data=llava_json data.path=/no/such/file.json", "data.path = /no/such/file.json: no such file"),
    ("trainer.devices=3", "stages.align.batch = 16 is not a multiple of trainer.devices = 3"),
    ("trainer.precision=64", "trainer.precision = 64"),
    ("eval.images=[real,blurred]", "eval.images.1 = 'blurred'"),
    ("seed==1", "seed==1"),
    ("+stages.align.upscale=1.5", "stages.align.upscale = 1.5"),
    ("bootstrap=[llm] +stages.pretrain_llm.upscale=0.5", "stages.pretrain_llm.upscale is for training the whole model"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes_are_one_clear_line(overrides: str, message: str) -> None:
    with pytest.raises(Exception) as caught:
        schema.check(composed(*overrides.split()))
    line = explain(caught.value)
    assert message in line
    assert "\n" not in line


def test_a_typo_is_answered_by_the_command_in_a_second_without_torch() -> None:
    """Seconds of CPU, since the machine may be busy; the line goes to stderr and the exit code is 1."""
    seconds = []
    for _ in range(3):
        start = os.times()
        command = [sys.executable, "-X", "importtime", "train.py", "encoder=siglib"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        end = os.times()
        seconds.append(sum(end[2:4]) - sum(start[2:4]))  # of children, in user and system mode
    errors = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: encoder=siglib: no such option, did you mean siglip?; there are clip, ")
    assert result.returncode == 1
    imported = {
        line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert not imported & {"torch", "lightning", "transformers", "timm", "wandb", "numpy"}
    assert min(seconds) < 1.0
