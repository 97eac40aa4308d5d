"""EVA-02-CLIP against a reference in float64 that is written out here, as transformers has no such class.

From the papers (arXiv 2303.11331, 2303.15389) and their published code: learned positions and, in every block, rotary
ones for the patches alone; queries and values have a bias, keys have none; a norm inside attention and inside the
SwiGLU, before their last projection. Rotations are complex products here, a sine and a cosine table in timm.
"""

import pytest
import torch
from helpers import max_difference
from torch import Tensor
from torch.nn import functional as F

from vlm_lab.model.encoders import TimmEncoder

NAME = "eva02_large_patch14_clip_336.merged2b"
WIDTH, HEADS, PATCH = 32, 2, 8
PRETRAINED_GRID = 16  # positions are scaled to the 16 x 16 patches of 224 pixels, at which the family was pretrained
State = dict[str, Tensor]


def eva02(state: State, pixels: Tensor, depth: int) -> Tensor:
    """Normalised pixels [V, 3, S, S] -> [V, N, WIDTH] behind the final norm, without the class token."""
    patches = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    side, x = patches.shape[-1], patches.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    turns = rotations(side)
    for number in range(depth):
        block = {
            key.removeprefix(f"blocks.{number}."): v for key, v in state.items() if key.startswith(f"blocks.{number}.")
        }
        x = x + attention(block, norm(block, "norm1", x), turns)
        x = x + swiglu(block, norm(block, "norm2", x))
    return norm(state, "norm", x)[:, 1:]


def rotations(side: int) -> Tensor:
    """[N, head / 2] complex units: the first half of a head's pairs turns with the row, the second with the column."""
    quarter = WIDTH // HEADS // 4
    speeds = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.arange(side, dtype=torch.float64) * PRETRAINED_GRID / side
    angles = places[:, None] * speeds  # [side, quarter]
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    both = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return torch.polar(torch.ones_like(both), both)


def attention(block: State, x: Tensor, turns: Tensor) -> Tensor:
    def heads(name: str, bias: bool = True) -> Tensor:
        out = F.linear(x, block[f"attn.{name}_proj.weight"], block[f"attn.{name}_proj.bias"] if bias else None)
        return out.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [V, heads, 1 + N, head]

    q, k, v = turned(heads("q"), turns), turned(heads("k", bias=False), turns), heads("v")
    weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
    out = norm(block, "attn.norm", (weights @ v).transpose(1, 2).flatten(2))
    return F.linear(out, block["attn.proj.weight"], block["attn.proj.bias"])


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring channels are the two parts of a complex number; the class token stays as it is."""
    pairs = torch.view_as_complex(x[:, :, 1:].unflatten(-1, (-1, 2)).contiguous()) * turns
    return torch.cat([x[:, :, :1], torch.view_as_real(pairs).flatten(-2)], dim=2)


def swiglu(block: State, x: Tensor) -> Tensor:
    gate, value = (F.linear(x, block[f"mlp.fc1_{n}.weight"], block[f"mlp.fc1_{n}.bias"]) for n in ("g", "x"))
    hidden = norm(block, "mlp.norm", gate * gate.sigmoid() * value)
    return F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])


def norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


@pytest.mark.parametrize("side", [32, 48])
def test_eva02_is_its_reference(side: int) -> None:
    """16 and 36 patches; every weight random, so that no part of the architecture is without effect."""
    torch.manual_seed(0)
    encoder = TimmEncoder(NAME, None, -1, side, PATCH, WIDTH, depth=3, heads=HEADS).eval()
    with torch.no_grad():
        for name, weight in encoder.model.named_parameters():
            scale = 0.5 if "norm" in name or "bias" in name or weight.dim() == 3 else weight[0].numel() ** -0.5
            weight.normal_(std=scale).add_(float(name.endswith("norm.weight")))
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    expected = eva02(
        {name: value.double() for name, value in encoder.model.state_dict().items()},
        encoder.normalised(pixels).double(),
        depth=3,
    )
    with torch.no_grad():
        found = encoder(pixels).tokens
    assert found.shape == (2, (side // PATCH) ** 2, WIDTH)
    assert float(expected.std()) > 0.3
    assert max_difference(found.double(), expected) <= 1e-5
