"""OpenVision's Vision Transformer (arXiv 2505.04601) as timm models: the 26 published shapes, from tiny/16 to huge/14.

Source: UCSC-VLAA/OpenVision, `models/vit.py` and its open_clip configurations. Against CLIP's tower: no bias in the
patch embedding, no norm before the blocks, exact GELU, epsilon 1e-6, and 2-D sine-cosine positions (zero for the class
token) that are computed anew for every resolution instead of being trained. Its pooling (mean of the patches, then the
norm, then a projection) has no use in a VLM and is not built.

    timm.create_model("openvision_vit_base_patch16_224")      # after importing this module
"""

from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
RELEASES = [(size, patch, side) for size in ("tiny", "small", "base") for patch in (16, 8) for side in (160, 224, 384)]
RELEASES += [("large", 14, side) for side in (84, 224, 336)]
RELEASES += [("so400m", 14, side) for side in (84, 224, 384)]
RELEASES += [("huge", 14, side) for side in (84, 224)]


class OpenVisionViT(VisionTransformer):
    """timm's Vision Transformer with what OpenVision changes; the arguments are timm's."""

    def __init__(self, **shape: Any) -> None:
        norm = partial(nn.LayerNorm, eps=1e-6)
        # pre_norm: timm ties the patch embedding's bias to it. The norm itself is taken out again.
        super().__init__(**shape, pre_norm=True, no_embed_class=True, norm_layer=norm, act_layer=nn.GELU)
        self.norm_pre = nn.Identity()
        positions = sincos_positions(self.patch_embed.grid_size, self.embed_dim)
        del self.pos_embed
        self.register_buffer("pos_embed", positions[None], persistent=False)  # [1, N, C]


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """[h * w, width] in row-major order: sin x, cos x, sin y, cos y, a quarter each (MoCo v3, arXiv 2104.02057)."""
    if width % 4:
        raise ValueError(f"width {width}: sine-cosine positions need a multiple of 4")
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter) / (quarter - 1))
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    by_x, by_y = (axis.flatten()[:, None] * omega for axis in (x, y))  # [h * w, quarter]
    return torch.cat([by_x.sin(), by_x.cos(), by_y.sin(), by_y.cos()], dim=1)


def without_positions(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """open_clip's or timm's naming to timm's, without what this model computes (positions) or lacks (the head)."""
    dropped = {"pos_embed", "positional_embedding", "visual.positional_embedding"}
    kept = {key: value for key, value in state.items() if key not in dropped}
    converted: dict[str, Tensor] = checkpoint_filter_fn(kept, model)  # type: ignore[arg-type]
    return {key: value for key, value in converted.items() if not key.startswith("head.")}


def published(size: str, patch: int, side: int) -> dict[str, Any]:
    return {
        "hf_hub_id": f"UCSC-VLAA/openvision-vit-{size}-patch{patch}-{side}",
        "hf_hub_filename": "open_clip_pytorch_model.bin",  # timm prefers the safetensors beside it
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "num_classes": 0,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def register(size: str, patch: int, side: int) -> None:
    name = f"openvision_vit_{size}_patch{patch}_{side}"

    def create(pretrained: bool = False, **shape: Any) -> nn.Module:
        return build_model_with_cfg(
            OpenVisionViT,
            name,
            pretrained,
            pretrained_filter_fn=without_positions,
            **{"img_size": side, "patch_size": patch, **SIZES[size], **shape},
        )

    create.__name__ = name  # what timm registers it under
    register_model(create)


default_cfgs = generate_default_cfgs(
    {f"openvision_vit_{size}_patch{patch}_{side}": published(size, patch, side) for size, patch, side in RELEASES}
)
for release in RELEASES:
    register(*release)
