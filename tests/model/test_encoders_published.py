"""Published sizes, on the meta device: parameters of every full-size family in conf/encoder against a count elsewhere.

Counted by transformers' class at the checkpoint's published configuration (equal to the last parameter), or printed in
documentation and model cards (equal to the last digit), with the head that an encoder lacks added.
"""

import pytest
import torch
from helpers import composed
from omegaconf import OmegaConf
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from vlm_lab.components import make
from vlm_lab.model.encoders import Encoder, TimmEncoder

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, layer: int | list[int] = -1, image_size: int | None = None, side: int | None = None) -> Encoder:
    with torch.device("meta"):
        return TimmEncoder(name, None, layer, image_size, side=side)


@pytest.mark.parametrize(
    ("name", "image_size", "theirs"),
    [
        (
            "vit_so400m_patch14_siglip_384.webli",  # google/siglip-so400m-patch14-384
            384,
            lambda: SiglipVisionModel(
                SiglipVisionConfig(**SO400M, image_size=384, patch_size=14, vision_use_head=False)
            ),
        ),
        (
            "naflexvit_so400m_patch16_siglip.v2_webli",  # google/siglip2-so400m-patch16-naflex
            512,
            lambda: Siglip2VisionModel(
                Siglip2VisionConfig(**SO400M, num_patches=256, patch_size=16, vision_use_head=False)
            ),
        ),
        (
            "vit_large_patch14_clip_quickgelu_336.openai",  # openai/clip-vit-large-patch14-336
            336,
            lambda: CLIPVisionModel(CLIPVisionConfig(**LARGE, intermediate_size=4096, image_size=336, patch_size=14)),
        ),
        (
            "vit_large_patch14_dinov2.lvd142m",  # facebook/dinov2-large
            518,
            lambda: Dinov2Model(Dinov2Config(**LARGE, image_size=518, patch_size=14, use_mask_token=False)),
        ),
        (
            "vit_large_patch16_224.mae",  # facebook/vit-mae-large, without its decoder
            224,
            lambda: ViTModel(ViTConfig(**LARGE, intermediate_size=4096), add_pooling_layer=False),
        ),
        (
            "vit_giant_patch14_dinov2.lvd142m",  # facebook/dinov2-giant
            378,
            lambda: Dinov2Model(
                Dinov2Config(
                    hidden_size=1536,
                    num_hidden_layers=40,
                    num_attention_heads=24,
                    image_size=378,
                    patch_size=14,
                    use_swiglu_ffn=True,
                    use_mask_token=False,
                )
            ),
        ),
    ],
)
def test_as_many_as_transformers(name: str, image_size: int, theirs: object) -> None:
    with torch.device("meta"):
        assert size(on_meta(name, image_size=image_size)) == size(theirs())


def test_idefics2s_tower() -> None:
    """SigLIP-SO400M with 70 x 70 positions: 417,792,240 parameters (HuggingFaceM4/idefics2-8b)."""
    assert size(on_meta("vit_so400m_patch14_siglip_384.webli", image_size=980)) == 417_792_240


def test_convnext_large() -> None:
    """torchvision's convnext_large has 197,767,336, of which the head's norm and 1000 classes are none of ours."""
    encoder = on_meta("convnext_large_mlp.clip_laion2b_ft_soup_320", [0, 1, 2, 3], 768)
    assert size(encoder) == 197_767_336 - 2 * 1536 - (1536 + 1) * 1000
    assert (encoder.dim, encoder.grid, encoder.stride) == (2880, (192, 192), 4)  # Mini-Gemini's map


def test_convnext_xxlarge() -> None:
    """847M by laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg's card, with a norm and a projection to 1024."""
    encoder = on_meta("convnext_xxlarge.clip_laion2b_soup", [0, 1, 2, 3], 1024, 96)
    assert size(encoder) + 2 * 3072 + 3072 * 1024 == pytest.approx(847e6, abs=0.5e6)
    assert (encoder.dim, encoder.grid) == (5760, (96, 96))  # Cambrian-1's map


PRINTED = {  # "Params (M)" of timm's model cards; EVA-02 with its projection to 768
    "samvit_large_patch16.sa1b": (308.3, 0),
    "samvit_huge_patch16.sa1b": (637.0, 0),
    "vit_huge_patch14_224.mae": (630.8, 0),
    "vit_giant_patch14_dinov2.lvd142m": (1136.5, 0),
    "eva02_large_patch14_clip_336.merged2b": (304.4, 1025 * 768),
}


@pytest.mark.parametrize("name", PRINTED)
def test_as_printed(name: str) -> None:
    millions, head = PRINTED[name]
    assert (size(on_meta(name)) + head) / 1e6 == pytest.approx(millions, abs=0.05)


SIZES = {  # family -> (channels, tokens per side) at scale=full
    "clip": (1024, 24),
    "siglip": (1152, 27),
    "siglip2": (1152, 24),
    "siglip2_naflex": (1152, 32),
    "dinov2": (1024, 24),
    "dinov3": (1024, 24),
    "eva02": (1024, 24),
    "convnext": (5760, 96),
    "openvision": (1024, 24),
    "vit": (1024, 14),
    "mae": (1024, 14),
    "sam": (1024, 24),
    "timm": (1280, 27),
    "hf": (1024, 24),
}


@pytest.mark.parametrize("family", SIZES)
def test_full_scale_builds_without_network(family: str) -> None:
    node = OmegaConf.to_container(composed("scale=full", f"encoder=[{family}]"), resolve=True)["encoder"][family]
    with torch.device("meta"):
        encoder = make({**node, "weights": None})
    assert (encoder.dim, encoder.grid) == (SIZES[family][0], (SIZES[family][1],) * 2)
