"""Full-size experiments on the meta device: the published parameter counts, offline and in seconds."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT, composed

from vlm_lab import plan, schema
from vlm_lab.config import Config

# Parameters per module; sources: facts recomputed from the released configurations, model cards, transformers' classes.
PUBLISHED = {
    "llava15": {"encoder.clip": 303_507_456 - 12_596_224 - 2_048, "connector": 20_979_712, "llm": 6_738_415_616},
    "cambrian1": {"connector": 302.8e6, "llm": 8_030_261_248},
    "cambrian1_13b": {"connector": 334.2e6, "llm": 13_015_864_320},
    "cambrian1_34b": {"connector": 375.1e6, "llm": 34_388_917_248},
    "mini_gemini": {"connector": 6.96e6 + 20_979_712, "llm": 6_738_415_616},
    "mini_gemini_hd": {"connector": 6.96e6 + 20_979_712},
    "idefics2": {
        "encoder.siglip": 417_792_240,
        "connector": 91_750_400 + 651_468_800,
        "llm": 7_110_672_384 + 131_084_288,
        "total": 8_402_768_112,
    },
    "onevision_05b": {"encoder.siglip": 397_747_744, "connector": 1_836_800, "llm": 494_032_768, "total": 893_618_208},
    "onevision": {"connector": 16_980_992, "llm": 7_615_616_512, "total": 8_030_348_832},
    "onevision_72b": {"connector": 1152 * 8192 + 8192 + 8192**2 + 8192, "llm": 72.7e9},
    "openvision_smol": {"encoder.openvision": 86.04e6, "llm": 134_515_008},
}


def composed_full(name: str) -> Config:
    return schema.check(composed(f"experiment={name}", "scale=full"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    """Within 0.5 %. A last block or norm that is not used is not built, which the larger counts include."""
    counts = plan.parameters(plan.empty_model(composed_full(name)))
    for module, expected in PUBLISHED[name].items():
        near = 0.1 if module == "encoder.openvision" else 0.005  # one of its twelve blocks lies behind layer -2
        assert counts[module] == pytest.approx(expected, rel=near), module


def test_every_experiment_is_checked_here() -> None:
    assert {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")} >= PUBLISHED.keys()


def test_what_a_stage_trains() -> None:
    """Adapters count as what trains: LoRA on a linear map of m x n trains rank * (m + n)."""
    config = composed_full("idefics2")
    rows = {row.module: row for row in plan.trainable(config, config.stages["interleaved"])}
    assert rows["connector"].trained == rows["connector"].params == 743_219_200
    per_layer = 64 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)  # q, o; k, v; gate, up, down
    assert rows["llm"].trained == 32 * per_layer and rows["llm"].adapt == "lora"


def test_memory_is_divided_as_zero_does() -> None:
    config = schema.check(composed("scale=full", "trainer=zero3", "trainer.devices=8", "encoder=[clip]"))
    need = plan.memory(8 * 2**30, 2**30, config)
    assert (need.weights, need.gradients, need.optimizer, need.total) == (4.0, 0.5, 1.0, 5.5)
    alone = plan.memory(8 * 2**30, 2**30, schema.check(composed()))
    assert (alone.weights, alone.gradients, alone.optimizer) == (32.0, 4.0, 8.0)
    averaged = plan.memory(8 * 2**30, 2**30, schema.check(composed()), averaged=True)
    assert averaged.optimizer == 12.0


def test_nothing_is_allocated() -> None:
    assert all(p.device == torch.device("meta") for p in plan.empty_model(composed_full("llava15")).parameters())


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "vlm_lab.plan", "connector=mlp"]
    adapted = "stages.instruct.train.llm={lr:1.0e-4,adapt:lora}"
    good = subprocess.run([*command, adapted], capture_output=True, text=True, check=True, cwd=ROOT)
    assert good.stderr == ""
    assert "encoder.siglip" in good.stdout and "instruct: trains" in good.stdout
    monkeypatch.setattr(sys, "argv", ["plan", "connector=mlpp"])
    with pytest.raises(SystemExit, match="error: connector=mlpp: no such option"):
        plan.main()
