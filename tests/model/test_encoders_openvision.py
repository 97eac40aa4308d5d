"""OpenVision: the published shapes, and the forward pass against a float64 reference written from the description.

The reference (arXiv 2505.04601 and its code): a patch convolution without bias, a class token, fixed sine-cosine
positions, pre-norm blocks with exact GELU and epsilon 1e-6, nothing before the blocks. Values lie within +-10; the
encoder, in fp32, may differ by 5e-5.
"""

import math
from pathlib import Path

import pytest
import torch
from helpers import max_difference
from safetensors.torch import save_file
from torch import Tensor

from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.encoders.openvision import RELEASES

# Parameters in millions (the table's own count, by patch size: patch convolution, class token, blocks, final norm and
# the head, a matrix of width x shared dimension; positions are not trained and not counted), and that dimension.
# The paper prints 5.9, 22.4, 87.4, 303.7, 412 and 632.1, without saying what is counted.
COUNTS = {
    ("tiny", 16): (5.52, 192),
    ("tiny", 8): (5.41, 192),
    ("small", 16): (21.74, 384),
    ("base", 16): (86.04, 512),
    ("large", 14): (303.7, 768),
    ("so400m", 14): (413.5, 1152),
    ("huge", 14): (631.7, 1024),
}
TOKENS = {(160, 16): 100, (224, 16): 196, (384, 16): 576, (160, 8): 400, (224, 8): 784, (384, 8): 2304}
TOKENS |= {(84, 14): 36, (224, 14): 256, (336, 14): 576, (384, 14): 729}
TINY = {"image_size": 36, "patch_size": 8, "width": 24, "depth": 3, "heads": 3}  # 4 x 4 patches, 4 pixels cut off
PIXELS = torch.randint(0, 256, (2, 3, 36, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_26_releases() -> None:
    assert len(RELEASES) == len(set(RELEASES)) == 26


@pytest.mark.parametrize(("size", "patch", "side"), RELEASES)
def test_published_shape(size: str, patch: int, side: int) -> None:
    """On the meta device: tokens, and the count up to the table's last digit."""
    with torch.device("meta"):
        encoder = TimmEncoder(f"openvision_vit_{size}_patch{patch}_{side}", None)
    assert encoder.image_size == side
    assert encoder.grid[0] * encoder.grid[1] == TOKENS[side, patch]
    if (size, patch) in COUNTS:
        count, shared = COUNTS[size, patch]
        ours = (sum(p.numel() for p in encoder.parameters()) + encoder.dim * shared) / 1e6
        assert ours == pytest.approx(count, abs=0.05 if count > 100 else 0.005)
    assert encoder.mean == (0.485, 0.456, 0.406)


def random_encoder(layer: int | list[int]) -> TimmEncoder:
    encoder = TimmEncoder("openvision_vit_base_patch16_224", None, layer, **TINY).eval()
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return encoder


# ---- the reference, for one image


def position(row: int, column: int, width: int) -> Tensor:
    quarter = width // 4
    angle = [(1 / 10000 ** (k / (quarter - 1))) for k in range(quarter)]
    waves = [(math.sin, column), (math.cos, column), (math.sin, row), (math.cos, row)]
    return torch.tensor([wave(place * a) for wave, place in waves for a in angle], dtype=torch.float64)


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attention(x: Tensor, state: dict[str, Tensor], name: str, heads: int) -> Tensor:
    queries, keys, values = linear(x, state, f"{name}.qkv").chunk(3, dim=-1)
    size, out = queries.shape[1] // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(size)
        out.append(scores.softmax(-1) @ values[:, part])
    return linear(torch.cat(out, dim=-1), state, f"{name}.proj")


def reference(image: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    """Patch tokens [N, C] after each block."""
    kernel = state["patch_embed.proj.weight"]  # [C, 3, 8, 8]
    rows = [state["cls_token"][0, 0]]
    for row in range(4):
        for column in range(4):
            patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            rows.append((kernel * patch).sum((1, 2, 3)) + position(row, column, len(kernel)))
    x, layers = torch.stack(rows), []
    for index in range(TINY["depth"]):
        x = x + attention(norm(x, state, f"blocks.{index}.norm1"), state, f"blocks.{index}.attn", TINY["heads"])
        h = linear(norm(x, state, f"blocks.{index}.norm2"), state, f"blocks.{index}.mlp.fc1")
        x = x + linear(0.5 * h * (1 + torch.erf(h / 2**0.5)), state, f"blocks.{index}.mlp.fc2")
        layers.append(x[1:])
    return layers


@pytest.mark.parametrize("layer", [-1, -2, [0, 2]])
def test_forward(layer: int | list[int]) -> None:
    encoder = random_encoder(layer)
    state = {name: value.double() for name, value in encoder.model.state_dict().items()}
    whole = {name: value.double() for name, value in random_encoder(-1).model.state_dict().items()}
    whole |= state  # the blocks that this encoder dropped: any weights will do
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    for pixels, tokens in zip(PIXELS, encoder(PIXELS).tokens, strict=True):
        layers = reference((pixels / 255.0 - mean) / std, whole)
        plain = [layers[index] for index in ([layer] if isinstance(layer, int) else layer)]
        expected = torch.cat([norm(x, whole, "norm") if layer == -1 else x for x in plain], dim=-1)
        assert max_difference(tokens.double(), expected) <= 5e-5


def test_what_is_neither_trained_nor_stored() -> None:
    """Positions are computed, and there is no bias of the patches."""
    encoder = random_encoder(-1)
    names = {*encoder.state_dict(), *dict(encoder.named_parameters())}
    assert not [name for name in names if "pos_embed" in name or "patch_embed.proj.bias" in name or "norm_pre" in name]
    assert max_difference(encoder.model.pos_embed[0, 7].double(), position(1, 3, 24)) <= 1e-6


def test_a_checkpoint_in_open_clip_naming_at_another_resolution(tmp_path: Path) -> None:
    """What the hub holds: text tower, head and positions of 2 x 2 patches included. The tower's weights are taken."""
    encoder = random_encoder(-1)
    renamed = {"patch_embed.proj": "conv1", "blocks": "transformer.resblocks", "attn.qkv.": "attn.in_proj_"}
    renamed |= {"attn.proj": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    renamed |= {"mlp.fc2": "mlp.c_proj", "cls_token": "class_embedding"}
    state = {"visual.proj": torch.zeros(24, 16), "visual.positional_embedding": torch.zeros(5, 24)}
    state |= {"text.cls_emb": torch.zeros(24), "logit_scale": torch.zeros(1)}
    for name, value in encoder.model.state_dict().items():
        new = "ln_post" + name[4:] if name.startswith("norm.") else name
        for ours, theirs in renamed.items():
            new = new.replace(ours, theirs)
        state[f"visual.{new}"] = value[0, 0].clone() if name == "cls_token" else value
    save_file(state, tmp_path / "open_clip_model.safetensors")
    loaded = TimmEncoder("openvision_vit_base_patch16_224", str(tmp_path / "open_clip_model.safetensors"), -1, **TINY)
    assert max_difference(loaded.eval()(PIXELS).tokens, encoder(PIXELS).tokens) == 0
