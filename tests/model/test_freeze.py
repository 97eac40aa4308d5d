"""What trains: the table, its longest prefix, optimizer groups, evaluation mode of frozen modules."""

import copy

import pytest
import torch
from helpers import tiny_vlm

from vlm_lab.model import freeze
from vlm_lab.model.freeze import Rule


def rate(name: str, table: freeze.Table) -> float | None:
    rule = freeze.rule_of(name, table)
    return rule and rule.lr


def test_longest_prefix_wins() -> None:
    table = {
        "encoder": Rule(1e-5),
        "encoder.eye.model.blocks.1": Rule(2e-5),
        "encoder.eye.model.norm": None,
        "llm": None,
    }
    assert rate("encoder.eye.model.blocks.0.mlp.fc1.weight", table) == 1e-5
    assert rate("encoder.eye.model.blocks.1.mlp.fc1.weight", table) == 2e-5
    assert rate("encoder.eye.model.blocks.10.mlp.fc1.weight", table) == 1e-5  # not a prefix by component
    assert rate("encoder.eye.model.norm.weight", table) is None
    assert rate("llm.lm_head.weight", table) is None
    assert rate("connector.project.0.weight", table) is None  # not named: frozen


def test_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.encoder\.nose"):
        freeze.resolve(tiny_vlm(), {"encoder.nose": Rule(1e-3)})


def test_tied_weights_have_one_rule() -> None:
    """Stages name `lm_head` beside the embedding (Idefics2): with a tied LLM both are one tensor."""
    vlm = tiny_vlm()
    vlm.llm.config.tie_word_embeddings = True
    vlm.llm.tie_weights()
    assert vlm.llm.lm_head.weight is vlm.llm.model.embed_tokens.weight
    both = {"llm.model.embed_tokens": Rule(1e-4), "llm.lm_head": Rule(1e-4), "llm": Rule(1e-3)}
    assert freeze.resolve(vlm, both) == {"llm.model.embed_tokens": Rule(1e-4), "llm": Rule(1e-3)}
    with pytest.raises(ValueError, match=r"train\.llm\.lm_head: these weights are tied to llm\.model\.embed_tokens"):
        freeze.resolve(vlm, {"llm.lm_head": Rule(1e-4), "llm": Rule(1e-3)})


def test_groups_hold_exactly_what_requires_grad() -> None:
    vlm, table = (
        tiny_vlm(),
        {"connector": Rule(1e-3, weight_decay=0.1), "llm": Rule(1e-4, weight_decay=0.2, warmup=0.5)},
    )
    freeze.apply(vlm, table)
    groups = freeze.param_groups(vlm, table)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in vlm.parameters() if p.requires_grad)
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.1 if group["lr"] == 1e-3 else 0.2)
    assert {(group["lr"], group["warmup"]) for group in groups} == {(1e-3, 0.0), (1e-4, 0.5)}


def test_frozen_modules_stay_in_evaluation_mode() -> None:
    vlm = tiny_vlm()
    freeze.apply(vlm, {"connector": Rule(1e-3), "encoder.eye.model.blocks.1": Rule(1e-3)})
    freeze.train_mode(vlm)
    assert vlm.connector.training
    assert not vlm.llm.training
    assert not vlm.encoder.eye.model.blocks[0].training
    assert vlm.encoder.eye.model.blocks[1].training
    assert freeze.awake(vlm) == []
    vlm.encoder.eye.model.blocks[0].mlp.drop1.train()
    assert freeze.awake(vlm) == ["encoder.eye.model.blocks.0.mlp.drop1"]


def test_trainability_counts_every_parameter_once() -> None:
    vlm, table = tiny_vlm(), {"connector": Rule(1e-3), "encoder.eye.model.blocks.1": Rule(2e-3)}
    rows = {row.module: row for row in freeze.trainability(vlm, table)}
    assert sum(row.params for row in rows.values()) == sum(p.numel() for p in vlm.parameters())
    assert (rows["connector"].lr, rows["encoder.eye.model.blocks.1"].lr, rows["llm"].lr) == (1e-3, 2e-3, None)


def test_last_blocks_are_spelt_out() -> None:
    """Each encoder's own last blocks; a path that is given beside them wins; too many are refused."""
    vlm = tiny_vlm()
    vlm.encoder["other"] = copy.deepcopy(vlm.encoder["eye"])
    rule = Rule(1e-5, last=1)
    table = freeze.resolve(vlm, {"encoder": rule, "encoder.other.model.blocks.1": None, "llm": rule})
    trained = {name for name, _ in vlm.named_parameters() if freeze.trains(name, table)}
    wanted = ("encoder.eye.model.blocks.1.", "llm.model.layers.1.")
    assert trained == {name for name, _ in vlm.named_parameters() if name.startswith(wanted)}
    assert table["llm.model.layers.1"] == Rule(1e-5)
    with pytest.raises(ValueError, match=r"train\.llm\.last = 3, but there are 2 blocks"):
        freeze.resolve(vlm, {"llm": Rule(1e-5, last=3)})


def test_a_digest_notices_one_bit() -> None:
    tensor = torch.randn(3, 5, dtype=torch.bfloat16)
    before = freeze.digest(tensor)
    assert freeze.digest(tensor.clone()) == before
    tensor.view(torch.int16)[0, 0] += 1
    assert freeze.digest(tensor) != before
