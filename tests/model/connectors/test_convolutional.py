"""C-Abstractor and LDPv2 against loops over cells and taps, in float64 (relative tolerance 1e-6)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlm_lab.model.connectors.c_abstractor import CAbstractor
from vlm_lab.model.connectors.ldp import LDPv2
from vlm_lab.model.features import FeatureMap

Cells = dict[tuple[int, int], Tensor]  # (row, column) -> channels [C]


def cells_of(tokens: Tensor, w: int) -> Cells:
    return {(n // w, n % w): token for n, token in enumerate(tokens)}


def depthwise(cells: Cells, weight: Tensor, bias: Tensor | float = 0.0) -> Cells:
    """3 x 3, zero border: out[i, j, c] = bias[c] + sum over taps weight[c, a, b] * in[i+a-1, j+b-1, c]."""
    return {
        (i, j): bias
        + sum(
            weight[:, 0, a, b] * cells[i + a - 1, j + b - 1]
            for a in range(3)
            for b in range(3)
            if (i + a - 1, j + b - 1) in cells
        )
        for i, j in cells
    }


def block_means(cells: Cells, h: int, w: int, side: int) -> Cells:
    """Adaptive average pooling: cell i covers rows floor(i*h/side) .. ceil((i+1)*h/side) - 1."""
    out = {}
    for i in range(side):
        for j in range(side):
            rows = range(i * h // side, math.ceil((i + 1) * h / side))
            cols = range(j * w // side, math.ceil((j + 1) * w / side))
            out[i, j] = torch.stack([cells[r, c] for r in rows for c in cols]).mean(0)
    return out


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def regnet_block(cells: Cells, block: nn.Module) -> Cells:
    """1x1, 3x3 depthwise, squeeze-excitation, 1x1; LayerNorm over channels after each; shortcut; SiLU."""
    w1, w3 = block.conv1.conv.weight[..., 0, 0], block.conv3.conv.weight[..., 0, 0]
    x = {at: silu(norm(w1 @ cell, block.conv1.bn)) for at, cell in cells.items()}
    x = {at: silu(norm(cell, block.conv2.bn)) for at, cell in depthwise(x, block.conv2.conv.weight).items()}
    squeeze, excite = block.se.fc1, block.se.fc2
    mean = torch.stack(list(x.values())).mean(0)
    small = silu(squeeze.weight[..., 0, 0] @ mean + squeeze.bias)
    gate = 1 / (1 + (-(excite.weight[..., 0, 0] @ small + excite.bias)).exp())
    out = {}
    for at, cell in x.items():
        shortcut = cells[at]
        if not isinstance(block.downsample, nn.Identity):
            shortcut = norm(block.downsample.conv.weight[..., 0, 0] @ shortcut, block.downsample.bn)
        out[at] = silu(norm(w3 @ (cell * gate), block.conv3.bn) + shortcut)
    return out


def randomise(module: nn.Module) -> nn.Module:
    """Weights of order one everywhere, so that no term of the formula is negligible."""
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.5
    return module


def test_c_abstractor(make_feature: Callable[..., FeatureMap]) -> None:
    connector = randomise(CAbstractor({"a": 4}, 6, side=2, blocks=2, hidden=8, positions=5))
    feature = make_feature((5, 5), 4, views=2)
    expected = []
    for tokens in feature.tokens:
        cells = cells_of(tokens + connector.positions[0], 5)
        for block in connector.before.children():
            cells = regnet_block(cells, block)
        cells = block_means(cells, 5, 5, 2)
        for block in connector.after.children():
            cells = regnet_block(cells, block)
        first, _, second = connector.project
        expected.append(
            torch.stack([second.weight @ silu(first.weight @ c + first.bias) + second.bias for c in cells.values()])
        )
    torch.testing.assert_close(connector({"a": feature}), torch.stack(expected), rtol=1e-6, atol=1e-9)


def test_c_abstractor_resizes_its_positions(make_feature: Callable[..., FeatureMap]) -> None:
    connector = CAbstractor({"a": 4}, 6, side=2, blocks=1, hidden=8, positions=2).double()
    assert connector({"a": make_feature((4, 6), 4)}).shape == (2, 4, 6)


def test_c_abstractor_pools_real_patches_only(make_feature: Callable[..., FeatureMap]) -> None:
    """3 of 4 rows are real: the lower cells average one row of two patches."""
    connector, feature = (
        randomise(CAbstractor({"a": 4}, 6, side=2, blocks=1, hidden=4)),
        make_feature((4, 4), 4, views=1),
    )
    connector.before, connector.after = nn.Identity(), nn.Identity()
    connector.positions.data.zero_()
    feature = feature._replace(mask=torch.arange(16)[None] < 12)
    lower_left = connector.project(feature.tokens[0, [8, 9]].mean(0))
    torch.testing.assert_close(connector({"a": feature})[0, 2], lower_left)


def test_ldp_v2(make_feature: Callable[..., FeatureMap]) -> None:
    connector, feature = randomise(LDPv2({"a": 4}, 6, side=3)), make_feature((6, 6), 4)
    first, _, second = connector.project
    expected = []
    for tokens in feature.tokens:
        hidden = tokens @ first.weight.T + first.bias
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))  # exact GELU
        cells = block_means(cells_of(hidden @ second.weight.T + second.bias, 6), 6, 6, 3)
        conv = depthwise(cells, connector.position.weight, connector.position.bias)
        expected.append(torch.stack([conv[at] + cells[at] for at in cells]))
    torch.testing.assert_close(connector({"a": feature}), torch.stack(expected), rtol=1e-6, atol=1e-9)


def test_ldp_v2_padding_acts_like_the_border(
    make_feature: Callable[..., FeatureMap], rows_mask: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padded square and the cropped image give the same tokens on the rows that are kept."""
    connector, feature = randomise(LDPv2({"a": 4}, 6, side=4)), make_feature((8, 8), 4)
    feature = feature._replace(mask=rows_mask((8, 8), 6))
    padded = connector({"a": feature})[:, :12]
    monkeypatch.setattr(connector, "grid", lambda grids: (3, 4))
    cropped = connector({"a": FeatureMap(feature.tokens[:, :48], (6, 8))})
    torch.testing.assert_close(padded, cropped, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [CAbstractor, LDPv2])
def test_wrong_settings_name_the_field(kind: type[CAbstractor] | type[LDPv2]) -> None:
    with pytest.raises(ValueError, match=r"connector.side = 0: at least 1"):
        kind({"a": 4}, 6, side=0)
    with pytest.raises(ValueError, match=r"connector.side = 12 exceeds the encoder's 8 x 8 grid"):
        kind({"a": 4}, 16).grid({"a": (8, 8)})
