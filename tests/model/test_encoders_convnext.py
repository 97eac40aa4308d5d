"""ConvNeXt's multi-stage maps recomputed in float64 from the formulas (arXiv 2201.03545, Cambrian-1's resizing).

Convolutions are sums over windows, interpolation is written one output position at a time. Values lie within +-10; the
encoder, in fp32, may differ by 5e-5.
"""

import pytest
import torch
from helpers import max_difference
from torch import Tensor
from torch.nn import functional as F

from vlm_lab.model.encoders import TimmEncoder

DEPTHS, DIMS, SIDE = [1, 2, 1, 1], [8, 12, 16, 20], 5


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Over the channels of [C, h, w], epsilon 1e-5 (the XXL model's)."""
    centred = x - x.mean(0)
    scaled = centred / (centred.square().mean(0) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return torch.einsum("oc,chw->ohw", state[f"{name}.weight"], x) + state[f"{name}.bias"][:, None, None]


def strided(x: Tensor, state: dict[str, Tensor], name: str, size: int) -> Tensor:
    """A convolution whose windows touch but do not overlap: one matrix product per window."""
    windows = x.unfold(1, size, size).unfold(2, size, size)  # [C, h, w, size, size]
    out = torch.einsum("ocij,chwij->ohw", state[f"{name}.weight"], windows)
    return out + state[f"{name}.bias"][:, None, None]


def block(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    windows = F.pad(x, (3, 3, 3, 3)).unfold(1, 7, 1).unfold(2, 7, 1)  # [C, h, w, 7, 7]
    mixed = torch.einsum("cij,chwij->chw", state[f"{name}.conv_dw.weight"][:, 0], windows)
    h = norm(mixed + state[f"{name}.conv_dw.bias"][:, None, None], state, f"{name}.norm")
    h = linear(h, state, f"{name}.mlp.fc1")
    h = linear(0.5 * h * (1 + torch.erf(h / 2**0.5)), state, f"{name}.mlp.fc2")
    return x + state[f"{name}.gamma"][:, None, None] * h


def stages(image: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    x, maps = norm(strided(image, state, "stem.0", 4), state, "stem.1"), []
    for stage, depth in enumerate(DEPTHS):
        if stage:
            name = f"stages.{stage}.downsample"
            x = strided(norm(x, state, f"{name}.0"), state, f"{name}.1", 2)
        for index in range(depth):
            x = block(x, state, f"stages.{stage}.blocks.{index}")
        maps.append(x)
    return maps


def bilinear(x: Tensor, side: int) -> Tensor:
    """Half-pixel centres, clamped at the borders: a weighted mean of four values for each output position."""
    size, out = x.shape[1], torch.empty(len(x), side, side, dtype=x.dtype)
    for row in range(side):
        for column in range(side):
            y, z = (max((i + 0.5) * size / side - 0.5, 0.0) for i in (row, column))
            (top, left), (low, right) = (int(y), int(z)), (min(int(y) + 1, size - 1), min(int(z) + 1, size - 1))
            v, u = y - top, z - left
            upper = (1 - u) * x[:, top, left] + u * x[:, top, right]
            out[:, row, column] = (1 - v) * upper + v * ((1 - u) * x[:, low, left] + u * x[:, low, right])
    return out


@pytest.mark.parametrize(("layer", "side"), [([0, 1, 2, 3], SIDE), ([0, 1, 2, 3], None), ([1, 3], 7), (-1, None)])
def test_convnext_maps(layer: int | list[int], side: int | None) -> None:
    """All stages on a 5 x 5 grid (from 16, 8, 4 and 2), on the finest grid (as Mini-Gemini), two, and one."""
    options = {"depths": DEPTHS, "dims": DIMS}
    encoder = TimmEncoder("convnext_xxlarge.clip_laion2b_soup", None, layer, 64, side=side, options=options)
    torch.manual_seed(0)
    for parameter in encoder.parameters():  # norms and layer scale away from 1, biases from 0
        parameter.data += 0.3 * torch.randn_like(parameter)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    tokens = encoder(pixels).tokens
    state = {name: value.double() for name, value in encoder.model.state_dict().items()}
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    maps = stages((pixels[0] / 255.0 - mean) / std, state)
    used = [maps[index] for index in ([layer] if isinstance(layer, int) else layer)]
    expected = torch.cat([bilinear(m, side or used[0].shape[1]) for m in used])
    assert encoder.dim == len(expected)
    assert encoder.grid == expected.shape[1:]
    assert max_difference(tokens[0].double(), expected.flatten(1).T) <= 5e-5
