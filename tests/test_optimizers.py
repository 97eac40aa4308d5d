"""Muon beside AdamW as one optimizer: its step against a float64 reference, what it is given, its state."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_vlm
from torch import Tensor, nn

from vlm_lab import optimizers
from vlm_lab.model.pretrain.decoder import CaptionDecoder
from vlm_lab.optimizers import MuonWithAdamW, StackedMuon, hidden_matrices, make_optimizer

LR, DECAY = 0.01, 0.1


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 24), nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 16, bias=False))


def built(model: nn.Module) -> MuonWithAdamW:
    group = {"params": list(model.parameters()), "lr": LR, "weight_decay": DECAY, "warmup": 0.0}
    return MuonWithAdamW([group], hidden_matrices(model), 0.98)


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def orthogonal(update: Tensor) -> Tensor:
    """Five Newton-Schulz steps of the quintic of Jordan et al. 2024, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.double()
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def test_muon_steps_are_those_of_the_formula() -> None:
    """Two steps with Nesterov momentum 0.95; torch iterates in bfloat16, so to 2 % of the step."""
    model = small()
    optimizer = built(model)
    weight: Any = model[1].weight
    reference, momentum = weight.detach().double(), torch.zeros_like(weight).double()
    for seed in (1, 2):
        before = weight.detach().double()
        step(model, optimizer, seed)
        momentum = 0.95 * momentum + 0.05 * weight.grad.double()
        change = orthogonal(0.05 * weight.grad.double() + 0.95 * momentum)
        reference = before * (1 - LR * DECAY) - LR * 0.2 * max(weight.shape) ** 0.5 * change
        assert (weight - reference).norm() / (reference - before).norm() < 0.02


@pytest.mark.parametrize("most", [1 << 22, 2 * 24 * 40])
def test_stacked_matrices_take_torchs_steps(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of matrices of two shapes, lying and standing, beside torch's Muon: to bfloat16's rounding."""
    monkeypatch.setattr(optimizers.alike, "__defaults__", (most,))
    torch.manual_seed(0)
    ours = nn.ParameterList(torch.randn(shape) for shape in [(24, 40), (40, 24), (24, 40), (16, 16), (24, 40)])
    theirs = copy.deepcopy(ours)
    settings: Any = {"lr": LR, "weight_decay": DECAY, "adjust_lr_fn": "match_rms_adamw"}
    mine, other = StackedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for seed in (1, 2, 3):
        step(ours, mine, seed)
        step(theirs, other, seed)
    for p, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=3 * LR * 0.2 * 40**0.5 * 2**-8)


def test_chunks_hold_one_shape_and_every_matrix_once() -> None:
    shapes = [(2, 8), (4, 4), (2, 8), (2, 8), (30, 2)]
    chunks = list(optimizers.alike([torch.empty(shape) for shape in shapes], most=40))
    assert chunks == [[0, 2], [3], [1], [4]]


def test_the_others_take_adamws_step() -> None:
    model, twin = small(), small()
    mine, theirs = built(model), torch.optim.AdamW(twin.parameters(), LR, (0.9, 0.98), weight_decay=DECAY)
    for seed in (1, 2, 3):
        step(model, mine, seed)
        step(twin, theirs, seed)
    for (name, ours), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=1e-6) == (name not in ("1.weight", "3.weight")), name


def test_hidden_matrices_are_neither_embeddings_nor_heads() -> None:
    vlm = tiny_vlm()
    muon = hidden_matrices(vlm)
    names = {name for name, parameter in vlm.named_parameters() if id(parameter) in muon}
    assert not [name for name in names if "embed" in name.rpartition(".")[0] or "lm_head" in name or "norm" in name]
    assert any(name.endswith("q_proj.weight") for name in names) and any(name.startswith("encoder.") for name in names)
    decoder = CaptionDecoder(8, None, 16, 1, 2, 32, vocab=50, queries=4)
    muon = hidden_matrices(decoder)
    assert id(decoder.out.weight) not in muon and id(decoder.from_image.weight) in muon


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    """From the state dict of torch's own form, with a rate that a schedule has changed."""
    model = small()
    optimizer = built(model)
    step(model, optimizer, 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.003
    twin = copy.deepcopy(model)
    other = built(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 2)
    step(twin, other, 2)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert {group["lr"] for group in other.param_groups} == {0.003}


@pytest.mark.parametrize("frozen", ["1", "0"])
def test_every_trained_parameter_is_in_exactly_one_group(frozen: str) -> None:
    model = small()
    trained = [p for n, p in model.named_parameters() if not n.startswith(frozen)]
    stage: Any = SimpleNamespace(optimizer="muon", beta2=0.98)
    optimizer = make_optimizer(stage, [{"params": trained, "lr": LR, "weight_decay": 0.0}], model)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, trained))
