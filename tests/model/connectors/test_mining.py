"""Patch info mining against the formula, cell by cell in float64 (relative tolerance 1e-6)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlm_lab.model.connectors.mining import PatchInfoMining
from vlm_lab.model.features import FeatureMap

LOW, HIGH = 6, 10
DIMS = {"low": LOW, "high": HIGH}


@pytest.fixture
def connector() -> PatchInfoMining:
    module = PatchInfoMining(DIMS, 8).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.5
    return module


@pytest.fixture
def features(make_feature: Callable[..., FeatureMap]) -> dict[str, FeatureMap]:
    return {"low": make_feature((2, 3), LOW, seed=1), "high": make_feature((4, 9), HIGH, seed=2)}


def phi(x: Tensor, layers: nn.Sequential) -> Tensor:
    """Linear(LayerNorm(x)) of one token."""
    norm, linear = layers
    centred = x - x.mean()
    normed = centred / (centred.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias
    return linear.weight @ normed + linear.bias


def mined(connector: PatchInfoMining, low: Tensor, window: list[Tensor]) -> Tensor:
    """low + softmax(q k^T / sqrt(C)) v over the features of one window."""
    q = phi(low, connector.query)
    weights = torch.stack([(q @ phi(f, connector.key)) / LOW**0.5 for f in window]).exp()
    values = torch.stack([phi(f, connector.value) for f in window])
    return low + (weights[:, None] * values).sum(0) / weights.sum()


def test_formula(connector: PatchInfoMining, features: dict[str, FeatureMap]) -> None:
    expected = torch.empty(2, 6, LOW, dtype=torch.float64)
    for v in range(2):
        high = features["high"].tokens[v].view(4, 9, HIGH)
        for i in range(2):
            for j in range(3):
                window = [high[2 * i + a, 3 * j + b] for a in range(2) for b in range(3)]
                expected[v, 3 * i + j] = mined(connector, features["low"].tokens[v, 3 * i + j], window)
    torch.testing.assert_close(connector(features), connector.project(expected), rtol=1e-6, atol=1e-9)


def test_one_key_gives_the_projected_value(connector: PatchInfoMining, make_feature: Callable[..., FeatureMap]) -> None:
    low, high = make_feature((2, 2), LOW), make_feature((2, 2), HIGH)
    expected = connector.project(low.tokens + connector.value(high.tokens))
    torch.testing.assert_close(connector({"low": low, "high": high}), expected)


def test_other_windows_and_the_order_inside_do_not_matter(
    connector: PatchInfoMining, features: dict[str, FeatureMap]
) -> None:
    before = connector(features)
    high = features["high"].tokens.view(2, 4, 9, HIGH).clone()
    high[:, :2, 3:6] = high[:, :2, 3:6].flip(1, 2)  # permute window (0, 1)
    high[:, 2:, 6:] = 7.0  # change window (1, 2)
    after = connector({**features, "high": FeatureMap(high.flatten(1, 2), (4, 9))})
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5], before[:, 5])


def test_masked_keys_are_left_out(connector: PatchInfoMining, features: dict[str, FeatureMap]) -> None:
    """Window (0, 0) keeps two of its features, window (0, 1) none: there the low-resolution token passes alone."""
    mask = torch.ones(2, 4, 9, dtype=torch.bool)
    mask[:, :2, :6] = False
    mask[:, 0, :2] = True
    masked = connector({**features, "high": FeatureMap(features["high"].tokens, (4, 9), mask.flatten(1))})
    high, low = features["high"].tokens[0], features["low"].tokens[0]
    expected = torch.stack([mined(connector, low[0], [high[0], high[1]]), low[1]])
    torch.testing.assert_close(masked[0, :2], connector.project(expected), rtol=1e-6, atol=1e-9)


def test_other_grids_are_resized_to_the_nearest_multiple(
    connector: PatchInfoMining, make_feature: Callable[..., FeatureMap]
) -> None:
    assert connector({"low": make_feature((3, 3), LOW), "high": make_feature((8, 8), HIGH)}).shape == (2, 9, 8)


def test_published_size() -> None:
    """CLIP-L and ConvNeXt-L (2880 channels) into a 4096-wide LLM: 6.96M for mining, 21.0M for the projector."""
    with torch.device("meta"):
        connector = PatchInfoMining({"clip": 1024, "convnext": 2880}, 4096)
    project = sum(p.numel() for p in connector.project.parameters())
    mining = sum(p.numel() for p in connector.parameters()) - project
    assert mining == pytest.approx(6.96e6, rel=0.005) and project == pytest.approx(21.0e6, rel=0.005)
    assert connector.num_tokens({"clip": (24, 24), "convnext": (192, 192)}) == 576


def test_wrong_encoders_are_named(connector: PatchInfoMining) -> None:
    with pytest.raises(ValueError, match=r"takes 2 encoders \(low, then high\), got 1"):
        PatchInfoMining({"a": 4}, 8)
    with pytest.raises(ValueError, match=r"grid 8 x 8 of high is smaller than the 24 x 24 of low"):
        connector.grid({"low": (24, 24), "high": (8, 8)})
