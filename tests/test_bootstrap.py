"""Pretraining stages in the engine: which there are, what their keys depend on, what the next stage starts from."""

import json
from pathlib import Path

import pytest
import torch
from helpers import composed
from hydra.errors import ConfigCompositionException
from PIL import Image
from processes import finish, lines, run_folder, start, store_of
from safetensors.torch import load_file

from vlm_lab import build, fit, parts, schema
from vlm_lab.data.scenes import ScenePairs
from vlm_lab.explain import explain
from vlm_lab.probe import eye_of, pair_scores, probe
from vlm_lab.stages import parents
from vlm_lab.store import stage_keys

BOTH = "bootstrap=[encoder,llm]"
TWO = ["encoder=[siglip,dinov2]", "connector=concat"]


def stages(*overrides: str) -> dict[str, tuple[object, object]]:
    config = schema.check(composed(*overrides))
    return {name: (stage.objective, stage.part) for name, stage in config.stages.items()}


def keys(*overrides: str) -> dict[str, str]:
    config = schema.check(composed(BOTH, *overrides))
    return stage_keys(config, {name: name for name in config.data.sources})


def test_every_part_is_pretrained_by_itself_before_the_stages() -> None:
    assert stages(BOTH, *TWO) == {
        "pretrain_encoder.siglip": ("sigmoid", "encoder.siglip"),
        "pretrain_encoder.dinov2": ("simclr", "encoder.dinov2"),
        "pretrain_llm": ("next_token", "llm"),
        "align": ("vlm", None),
        "instruct": ("vlm", None),
    }
    assert stages(BOTH, "encoder=[clip]")["pretrain_encoder.clip"] == ("contrastive", "encoder.clip")


def test_it_goes_away_where_there_are_weights() -> None:
    assert list(stages("bootstrap=[encoder,llm]", "experiment=openvision_smol")) == [
        *("pretrain_encoder.openvision", "pretrain_llm", "align", "knowledge", "instruct")
    ]
    assert list(stages(BOTH, "scale=full")) == ["align", "instruct"]
    assert list(stages(BOTH, "encoder.siglip.weights=pretrained")) == ["pretrain_llm", "align", "instruct"]
    assert list(stages(BOTH, "init=hf:some/model")) == ["align", "instruct"]
    assert list(stages("bootstrap=[]")) == ["align", "instruct"]


def test_a_stage_starts_from_what_pretrained_its_parts() -> None:
    config = schema.check(composed(BOTH, *TWO))
    both = ["pretrain_encoder.siglip", "pretrain_encoder.dinov2", "pretrain_llm"]
    assert {name: parents(config.stages, name) for name in config.stages} == {
        **{name: [] for name in both},
        "align": both,
        "instruct": ["align"],
    }


@pytest.mark.parametrize("override", ["connector=linear", "llm=llama", "tiling=pad", "stages.align.steps=3"])
def test_an_encoder_is_shared_by_all_that_have_it(override: str) -> None:
    assert keys()["pretrain_encoder.siglip"] == keys(override)["pretrain_encoder.siglip"]
    assert keys()["align"] != keys(override)["align"]


def test_a_language_model_is_shared_and_several_encoders_share_with_one() -> None:
    for override in (["connector=linear"], ["encoder=[clip]"], ["encoder.siglip.depth=2"], TWO):
        assert keys()["pretrain_llm"] == keys(*override)["pretrain_llm"]
    assert keys()["pretrain_encoder.siglip"] == keys(*TWO)["pretrain_encoder.siglip"]


@pytest.mark.parametrize("override", ["seed=1", "encoder.siglip.depth=2", "stages.pretrain_encoder.steps=7"])
def test_what_changes_an_encoder(override: str) -> None:
    assert keys()["pretrain_encoder.siglip"] != keys(override)["pretrain_encoder.siglip"]
    assert keys()["align"] != keys(override)["align"]


MISTAKES = [
    (
        "stage=[align,instruct] +stages.align.objective=sigmoid +stages.align.encoder=clip",
        "stages.align.encoder = clip",
    ),
    ("+stages.align.towers={}", "stages.align.towers is for pretraining encoders, objective is vlm"),
    ("stages.pretrain_encoder.towers=null", "stages.pretrain_encoder.siglip.towers must be given"),
    (
        "stages.pretrain_encoder.objective.siglip=vlm",
        "stages.pretrain_encoder.objective.siglip = vlm: by encoder",
    ),
    ("stages.pretrain_encoder.towers.wdth=3", "no such setting"),
    (
        "stages.pretrain_encoder.objective.dinov2=dino",
        "objective.dinov2 = 'dino': input should be 'vlm', 'contrastive'",
    ),
    ("+stages.pretrain_encoder.views.twice=true", "siglip.views.twice is set by code"),
    ("encoder=[mae] +stages.pretrain_encoder.views.keep=1.0", "mae.views.keep = 1.0 hides nothing"),
    ("+stages.pretrain_llm.train.connector=1.0", "stages.pretrain_llm.train.connector: no such module; there are llm"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes(overrides: str, message: str) -> None:
    with pytest.raises((ValueError, ConfigCompositionException)) as caught:
        schema.check(composed(BOTH, *overrides.split()))
    assert message in explain(caught.value)


def test_a_masked_autoencoder_learns_from_hidden_patches(tmp_path: Path) -> None:
    small = ["encoder=[mae]", "encoder.mae.depth=1", "data.sources.pairs.size=8", f"output={tmp_path}"]
    config = schema.check(composed(BOTH, *small, "stages.pretrain_encoder.batch=4"))
    made = parts.stage_parts(config, config.stages["pretrain_encoder.mae"])
    batch = next(iter(made.loader(0, 1)))
    assert batch.kept.shape == (4, 6) and batch.again is None  # 0.4 of 16 patches
    made.model(batch).total.backward()
    assert all(p.grad is not None for p in made.model.towers.parameters())


def test_what_does_not_fit_is_refused_before_pretraining(tmp_path: Path, cache: Path) -> None:
    run = run_folder(tmp_path / "outputs", cache, BOTH, "tiling=native", "tiling.shortest=8")
    message = r"tiling.shortest = 8: needs to be from one patch of 16 to the encoder's 32 pixels"
    with pytest.raises(parts.Misfit, match=message):
        fit.fit(run)
    assert not (run / "metrics.jsonl").exists()


def test_pretraining_comes_first() -> None:
    late = ["+stages.late={objective:next_token,mixture:language,train:{llm:1.0},steps:1,batch:1,micro_batch:1}"]
    with pytest.raises(ValueError, match=r"stages\.late pretrains llm after instruct trained the model: put it first"):
        schema.check(composed(*late))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of stage, two steps each, in the real worker: SigLIP and DINOv2, the LLM, then the VLM."""
    folder = tmp_path_factory.mktemp("bootstrap")
    (folder / "cache").mkdir()
    small = [f"encoder.dinov2.{setting}" for setting in ("width=32", "depth=1", "image_size=32")]
    small += [f"stages.{name}.steps=2" for name in ("pretrain_encoder", "pretrain_llm", "align", "instruct")]
    small += [f"data.sources.{name}.size=40" for name in ("pairs", "language", "text")]
    small += [f"stages.pretrain_encoder.{setting}" for setting in ("batch=6", "micro_batch=4", "towers.width=32")]
    made = run_folder(folder / "out", folder / "cache", BOTH, *TWO, *small, "stages.pretrain_llm.batch=4")
    finish([start(made)], made, 240)
    return made


def test_the_stages_train_and_hand_over(run: Path) -> None:
    store, names = store_of(run)
    assert [(line["stage"], line["step"]) for line in lines(run)] == [(name, step) for name in names for step in (1, 2)]
    config = schema.load(run / "config.yaml")
    weights = {name: load_file(store.path(key) / "model.safetensors") for name, key in names.items()}
    siglip, dinov2, llm = (weights[n] for n in ("pretrain_encoder.siglip", "pretrain_encoder.dinov2", "pretrain_llm"))
    assert {name.split(".")[0] for name in siglip} == {"encoder", "towers"}
    assert {name.split(".")[0] for name in llm} == {"llm"}
    vlm = build.vlm(config)
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    folders = {store.path(names[name]): config.stages[name] for name in parents(config.stages, "align")}
    parts.start(config, config.stages["align"], vlm, folders)
    expected = {**siglip, **dinov2, **llm}
    for name, tensor in vlm.named_parameters():  # tied weights are saved under one of their names
        names_of = [other for other, value in vlm.state_dict().items() if value.data_ptr() == tensor.data_ptr()]
        saved = [expected[other] for other in names_of if other in expected]
        assert torch.equal(tensor, saved[0] if saved else before[name]), name
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], vlm.state_dict()[name])}
    assert changed == {"encoder", "llm"}


def test_records_tell_what_was_trained(run: Path) -> None:
    store, names = store_of(run)
    record = store.record(names["pretrain_encoder.siglip"])
    assert (record["steps"], record["samples"], record["label_tokens"]) == (2, 12, 12)
    assert {row["module"]: row["lr"] for row in record["trainable"]} == {"encoder": 4e-3, "towers": 4e-3}
    assert (store.path(names["pretrain_encoder.siglip"]) / "tokenizer" / "tokenizer.json").is_file()


def test_weights_that_do_not_fit_are_refused(run: Path) -> None:
    store, names = store_of(run)
    config = schema.check(composed(*TWO))
    folders = {store.path(names["pretrain_encoder.siglip"]): config.stages["align"].model_copy()}
    stage = schema.load(run / "config.yaml").stages["pretrain_encoder.siglip"]
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|do not fit"):
        parts.start(config, config.stages["align"], build.vlm(config), dict.fromkeys(folders, stage))


def test_the_encoders_of_a_run_are_scored_by_themselves(run: Path, tmp_path: Path) -> None:
    """On folders of one-coloured pictures: all scores are there, those of texts only for an encoder that reads."""
    for split in ("train", "test"):
        for number in range(6):
            colour = ("red", "blue")[number % 2]
            (tmp_path / split / colour).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + number, 30), colour).save(tmp_path / split / colour / f"{number}.png")
    found = probe(run, schema.load(run / "config.yaml"), str(tmp_path / "train"), str(tmp_path / "test"))
    assert {name: set(row) for name, row in found.items()} == {
        "siglip": {"linear_probe", "zero_shot"},
        "dinov2": {"linear_probe"},
    }
    assert all(row["linear_probe"] == {"value": 1.0, "chance": 0.5} for row in found.values())
    assert json.loads((run / "encoders.json").read_text()) == found
    pairs = pair_scores(eye_of(run, schema.load(run / "config.yaml"), "pretrain_encoder.siglip"), ScenePairs("val", 20))
    assert pairs["text_r10"][1] == 0.5 and set(pairs) == {
        f"{way}_r{k}" for way in ("text", "image") for k in (1, 5, 10)
    }
