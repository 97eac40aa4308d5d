"""Encoders: shapes, the layer in use, checkpoints, normalisation; every option of conf/encoder at tiny size."""

from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT, composed, max_difference
from omegaconf import OmegaConf
from safetensors.torch import save_file

from vlm_lab.components import make
from vlm_lab.model.encoders import TimmEncoder

NAME = "vit_base_patch16_siglip_224"
TINY = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 3, "heads": 2}
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("option", sorted(path.stem for path in (ROOT / "conf/encoder").glob("*.yaml")))
def test_every_option_at_tiny_scale(option: str) -> None:
    node = OmegaConf.to_container(composed(f"encoder=[{option}]"), resolve=True)["encoder"][option]
    encoder = make(node)
    side = encoder.image_size
    features = encoder(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    h, w = encoder.grid
    assert features.grid == (h, w)
    assert features.tokens.shape == (2, h * w, encoder.dim)
    features.tokens.sum().backward()
    silent = [name for name, p in encoder.named_parameters() if p.grad is None and "cls" not in name]
    assert silent == []


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_layer_is_timms_own_intermediate(layer: int) -> None:
    encoder = TimmEncoder(NAME, None, layer, **TINY).eval()
    whole = timm.create_model(NAME, img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2).eval()
    whole.load_state_dict(encoder.model.state_dict(), strict=False)
    normal = (PIXELS / 255 - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)
    expected = whole.forward_intermediates(normal, norm=layer == -1, output_fmt="NLC", intermediates_only=True)[layer]
    assert max_difference(encoder(PIXELS).tokens, expected) <= 1e-5


def test_a_remainder_of_the_image_is_cut_off() -> None:
    """SigLIP's published 384 px at patch 14 is a grid of 27."""
    encoder = TimmEncoder(NAME, None, -1, **{**TINY, "image_size": 30})
    assert encoder.grid == (3, 3)
    assert encoder(torch.zeros(1, 3, 30, 30, dtype=torch.uint8)).tokens.shape == (1, 9, 16)


def test_weights_from_a_file(tmp_path: Path) -> None:
    """A checkpoint in timm's naming gives the same features; its positions are resampled if the grid differs."""
    whole = timm.create_model(NAME, img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0)
    save_file(whole.state_dict(), tmp_path / "siglip.safetensors")
    encoder = TimmEncoder(NAME, str(tmp_path / "siglip.safetensors"), -1, **TINY).eval()
    expected = whole.eval().forward_features((PIXELS / 255 - 0.5) / 0.5)
    assert max_difference(encoder(PIXELS).tokens, expected) <= 1e-5
    larger = TimmEncoder(NAME, str(tmp_path / "siglip.safetensors"), -1, **{**TINY, "image_size": 48})
    assert larger(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)).tokens.shape == (1, 36, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 7}, "image_size 7 is smaller than patch_size 8"),
        ({"layer": 3}, "layer 3 is outside its 3 layers"),
        ({"weights": "/no/such/file"}, "no such file"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmEncoder(**{"name": NAME, "weights": None, "layer": -1, **TINY, **change})
