"""Encoders against transformers' own classes, on the same random weights, in fp32: the same features within 1e-5.

transformers and timm share no code, nor names: weights are renamed here, by hand.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import composed, max_difference
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SamVisionConfig,
    SamVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from vlm_lab.model.encoders import Encoder, HFEncoder, TimmEncoder
from vlm_lab.model.native import native_features

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
TINY = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 4}
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RENAMED = {  # transformers' names, of all families, to timm's; in this order
    r"^(vision_encoder|model)\.": "",
    r"^(encoder\.)?layers?\.": "blocks.",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    **{f"^neck\\.{part}": f"neck.{i}" for i, part in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))},
    r"layer_norm(\d)": r"norm\1",
    r"(self_attn|attention)\.(out|o)_proj": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"mlp\.(up_proj|lin1)": "mlp.fc1",
    r"mlp\.(down_proj|lin2)": "mlp.fc2",
    r"^(post_layernorm|layernorm)": "norm",
    r"^pre_layrnorm": "norm_pre",
    r"^(embeddings\.)?(patch_embeddings?|patch_embed)(\.projection)?\.(?=weight|bias)": "patch_embed.proj.",
    r"^embeddings\.register_tokens": "reg_token",
    r"^embeddings\.(cls_token|class_embedding)": "cls_token",
    r"^embeddings\.(position_embeddings|position_embedding\.weight)": "pos_embed",
}


def randomised(module: nn.Module) -> Any:
    """Every weight, bias and norm away from its initial value, at a scale that keeps activations near 1."""
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        p.data = torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2)
        p.data += 1.0 * (p.ndim == 1 and name.endswith("weight"))
    return module.eval()


def as_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state in timm's naming: queries, keys and values in one matrix; the pooling head left out."""
    out, parts = {}, dict(state)
    for name in [name for name in state if "q_proj" in name]:
        triple = [parts.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        parts[re.sub(r"(self_attn|attention)\.q_proj", "attn.qkv", name)] = torch.cat(triple)
    for name, value in parts.items():
        new = name
        for pattern, replacement in RENAMED.items():
            new = re.sub(pattern, replacement, new)
        out[new] = value.reshape(1, -1, 32) if new in ("pos_embed", "cls_token") and value.ndim < 4 else value
    return {name: value for name, value in out.items() if not name.startswith("head.") and "mask_token" not in name}


def timm_encoder(name: str, theirs: PreTrainedModel, layer: int | list[int], **settings: object) -> TimmEncoder:
    """The timm model with transformers' weights; strict, but for the blocks and the norm that were dropped."""
    encoder = TimmEncoder(name, None, layer, **{**TINY, **settings}).eval()
    state = as_timm(theirs.state_dict())
    if "blocks.0.gamma_1" in encoder.model.state_dict():  # layer scale has another name in timm's class of EVA
        state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in state.items()}
    result = encoder.model.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert all(key.startswith(("norm.", "neck.", "blocks.2.")) for key in result.unexpected_keys)
    assert len(result.unexpected_keys) == 0 or layer != -1
    return encoder


def hidden(model: PreTrainedModel, encoder: Encoder, layer: int, prefix: int) -> Tensor:
    """transformers' features: its final output for -1, else hidden_states[layer]; class token dropped."""
    output = model(pixel_values=encoder.normalised(PIXELS), output_hidden_states=True)
    return (output.last_hidden_state if layer == -1 else output.hidden_states[layer])[:, prefix:]


@pytest.mark.parametrize("layer", [-1, -2])
def test_siglip(layer: int) -> None:
    theirs = randomised(SiglipVisionModel(SiglipVisionConfig(**SHAPE, image_size=32, patch_size=8)))
    node = OmegaConf.to_container(composed("encoder=[siglip]"), resolve=True)["encoder"]["siglip"]
    options = node["options"] | {"mlp_ratio": 4.0}
    ours = timm_encoder(node["name"], theirs, layer, options=options)
    assert max_difference(ours(PIXELS).tokens, hidden(theirs, ours, layer, 0)) <= 1e-5


def test_clip_at_layer_minus_2() -> None:
    """As LLaVA-1.5 uses it: hidden_states[-2], quick GELU, no class token."""
    theirs = randomised(CLIPVisionModel(CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8)))
    ours = timm_encoder("vit_large_patch14_clip_quickgelu_336.openai", theirs, -2)
    assert max_difference(ours(PIXELS).tokens, hidden(theirs, ours, -2, 1)) <= 1e-5


@pytest.mark.parametrize("layer", [-1, -2])
def test_dinov2(layer: int) -> None:
    theirs = randomised(Dinov2Model(Dinov2Config(**SHAPE, image_size=32, patch_size=8)))
    ours = timm_encoder("vit_large_patch14_dinov2.lvd142m", theirs, layer)
    assert max_difference(ours(PIXELS).tokens, hidden(theirs, ours, layer, 1)) <= 1e-5


@pytest.mark.parametrize("layer", [-1, -2])
def test_vit(layer: int) -> None:
    """The supervised one; MAE's and I-JEPA's encoders are the same class."""
    theirs = randomised(ViTModel(ViTConfig(**SHAPE, image_size=32, patch_size=8, layer_norm_eps=1e-6), False))
    ours = timm_encoder("vit_large_patch16_224.augreg_in21k", theirs, layer)
    assert max_difference(ours(PIXELS).tokens, hidden(theirs, ours, layer, 1)) <= 1e-5


@pytest.mark.parametrize("layer", [-1, -2])
def test_dinov3(layer: int) -> None:
    """Rotary positions and four register tokens. timm leaves out the biases of q and v, which are zero as published."""
    config = DINOv3ViTConfig(
        **SHAPE, image_size=32, patch_size=8, num_register_tokens=4, query_bias=False, value_bias=False
    )
    theirs = randomised(DINOv3ViTModel(config))
    ours = timm_encoder("vit_large_patch16_dinov3.lvd1689m", theirs, layer)
    assert max_difference(ours(PIXELS).tokens, hidden(theirs, ours, layer, 5)) <= 1e-5


@pytest.mark.parametrize("layer", [-1, [-1], -2])
def test_sam(layer: int | list[int]) -> None:
    """Windows, global blocks, relative positions; with its neck (-1), without ([-1]), and one block earlier."""
    shape = {**SHAPE, "mlp_dim": 128, "output_channels": 256, "window_size": 2, "global_attn_indexes": [1]}
    theirs = randomised(SamVisionModel(SamVisionConfig(**shape, image_size=32, patch_size=8)))
    options = {"window_size": 2, "global_attn_indexes": [1]}
    ours = timm_encoder("samvit_large_patch16.sa1b", theirs, layer, options=options)
    output = theirs(ours.normalised(PIXELS), output_hidden_states=True)
    tokens = output.hidden_states[layer if isinstance(layer, int) else -1].flatten(1, 2)  # from [V, h, w, C]
    expected = output.last_hidden_state.flatten(2).transpose(1, 2) if layer == -1 else tokens
    assert max_difference(ours(PIXELS).tokens, expected) <= 1e-5


SIZES = torch.tensor([[32, 16], [24, 32], [8, 40]])  # height, width of three views in one batch


@pytest.mark.parametrize("layer", [-1, -2])
def test_siglip2_at_native_ratio(layer: int) -> None:
    """NaFlex on padded views of three shapes, against transformers on the views' own patches."""
    theirs = randomised(Siglip2VisionModel(Siglip2VisionConfig(**SHAPE, num_patches=256, patch_size=8)))
    name = "naflexvit_so400m_patch16_siglip.v2_webli"
    ours = TimmEncoder(name, None, layer, **TINY, options={"mlp_ratio": 4.0}).eval()
    state = {key.replace("patch_embed", "embeds"): value for key, value in as_timm(theirs.state_dict()).items()}
    state["embeds.pos_embed"] = state.pop("pos_embed").view(1, 16, 16, 32)
    assert ours.model.load_state_dict(state, strict=False).missing_keys == []
    pixels = torch.randint(0, 256, (3, 3, 39, 47), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = native_features(ours, pixels, SIZES)
    for view, (height, width) in enumerate(SIZES.tolist()):
        image = ours.normalised(pixels[view : view + 1, :, :height, :width])
        grid = (height // 8, width // 8)
        cut = image.unflatten(3, (grid[1], 8)).unflatten(2, (grid[0], 8))  # [1, 3, h, 8, w, 8]
        patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(1, -1, 192)
        full = torch.ones(1, patches.shape[1], dtype=torch.long)
        output = theirs(patches, full, torch.tensor([grid]), output_hidden_states=True)
        expected = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        assert max_difference(features.tokens[view, features.mask[view]], expected[0]) <= 1e-5


FAMILIES = ["siglip_vision_model", "clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "ijepa"]


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_encoder_is_the_bare_model(family: str, tmp_path: Path) -> None:
    """Loaded from a folder: its own output, hidden_states[-2] and a list, each after dropping what is not used."""
    shape = {**SHAPE, "image_size": 32, "patch_size": 8}
    bare = randomised(HFEncoder(family, None, [0, 1, 2], shape=shape)).model  # any model of the family
    bare = randomised(type(bare)(bare.config))
    bare.save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    prefix = {"siglip_vision_model": 0, "ijepa": 0, "dinov2_with_registers": 5}.get(family, 1)
    for layer in (-1, -2):
        ours = HFEncoder(family, str(tmp_path), layer, shape=shape).eval()
        assert max_difference(ours(PIXELS).tokens, hidden(bare, ours, layer, prefix)) <= 1e-6
        assert ours.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    listed = HFEncoder(family, str(tmp_path), [1, -2, 0], shape=shape).eval()
    states = bare(pixel_values=listed.normalised(PIXELS), output_hidden_states=True).hidden_states
    assert max_difference(listed(PIXELS).tokens, torch.cat(states[1:3], dim=-1)[:, prefix:]) <= 1e-6
    assert listed.dim == 64


def test_hf_encoder_takes_the_vision_tower_of_a_two_tower_model(tmp_path: Path) -> None:
    vision, text = CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8), CLIPTextConfig(**SHAPE, vocab_size=64)
    both = randomised(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())))
    both.save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    ours = HFEncoder("clip_vision_model", str(tmp_path), -2).eval()
    assert max_difference(ours(PIXELS).tokens, hidden(both.vision_model, ours, -2, 1)) <= 1e-6
