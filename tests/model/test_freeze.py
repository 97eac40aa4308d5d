"""What trains: the table, its longest prefix, optimizer groups, evaluation mode of frozen modules."""

import pytest
import torch
from helpers import tiny_vlm

from vlm_lab.model import freeze


def test_longest_prefix_wins() -> None:
    table = {"encoder": 1e-5, "encoder.eye.model.blocks.1": 2e-5, "encoder.eye.model.norm": None, "llm": None}
    assert freeze.rate("encoder.eye.model.blocks.0.mlp.fc1.weight", table) == 1e-5
    assert freeze.rate("encoder.eye.model.blocks.1.mlp.fc1.weight", table) == 2e-5
    assert freeze.rate("encoder.eye.model.blocks.10.mlp.fc1.weight", table) == 1e-5  # not a prefix by component
    assert freeze.rate("encoder.eye.model.norm.weight", table) is None
    assert freeze.rate("llm.lm_head.weight", table) is None
    assert freeze.rate("connector.project.0.weight", table) is None  # not named: frozen


def test_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.encoder\.nose"):
        freeze.apply(tiny_vlm(), {"encoder.nose": 1e-3})


def test_groups_hold_exactly_what_requires_grad() -> None:
    vlm, table = tiny_vlm(), {"connector": 1e-3, "llm": 1e-4}
    freeze.apply(vlm, table)
    groups = freeze.param_groups(vlm, table, 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in vlm.parameters() if p.requires_grad)
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert {group["lr"] for group in groups} == {1e-3, 1e-4}


def test_frozen_modules_stay_in_evaluation_mode() -> None:
    vlm = tiny_vlm()
    freeze.apply(vlm, {"connector": 1e-3, "encoder.eye.model.blocks.1": 1e-3})
    freeze.train_mode(vlm)
    assert vlm.connector.training
    assert not vlm.llm.training
    assert not vlm.encoder.eye.model.blocks[0].training
    assert vlm.encoder.eye.model.blocks[1].training


def test_trainability_counts_every_parameter_once() -> None:
    vlm, table = tiny_vlm(), {"connector": 1e-3, "encoder.eye.model.blocks.1": 2e-3}
    rows = {row.module: row for row in freeze.trainability(vlm, table)}
    assert sum(row.params for row in rows.values()) == sum(p.numel() for p in vlm.parameters())
    assert (rows["connector"].lr, rows["encoder.eye.model.blocks.1"].lr, rows["llm"].lr) == (1e-3, 2e-3, None)


def test_digests_notice_one_bit() -> None:
    vlm = tiny_vlm()
    before = freeze.digests(vlm)
    with torch.no_grad():
        next(vlm.connector.parameters()).view(-1)[0] += 1e-7
    after = freeze.digests(vlm)
    assert [name for name in before if before[name] != after[name]] == ["connector.project.0.weight"]
