"""Vision encoders: pixels in, a `FeatureMap` of patch tokens out. Any Vision Transformer of timm, at any width.

Shapes come from the YAML, so `scale=tiny` is the same class at toy size; `weights` are random, the hub's, or a file's.
Pixels arrive as uint8 and are normalised here, on the device, with the checkpoint's own mean and std.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vlm_lab.model.features import FeatureMap


class TimmEncoder(nn.Module):
    """A timm Vision Transformer as an encoder.

    Args:
        name: timm model id, with its tag (`vit_so400m_patch14_siglip_384`).
        weights: None (random), "pretrained" (timm downloads them), or the path of a checkpoint file.
        layer: index of the block whose output is used (-1 the last one, with the final norm; others without it).
        image_size, patch_size: pixels per side (a remainder is cut off, as 384 / 14 gives 27 patches).
        width, depth, heads: of the transformer.

    `forward(pixels uint8 [V, 3, S, S]) -> FeatureMap` with S == image_size; class and register tokens are dropped.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str,
        weights: str | None,
        layer: int,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        if image_size < patch_size:
            raise ValueError(f"encoder {name}: image_size {image_size} is smaller than patch_size {patch_size}")
        if not -depth <= layer < depth:
            raise ValueError(f"encoder {name}: layer {layer} is outside its {depth} blocks")
        shape: dict[str, Any] = {
            "img_size": image_size,
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
        }
        self.model: Any = create(name, weights, shape)
        self.dim, self.image_size, self.stride = width, image_size, patch_size
        self.layer = layer % depth
        self.last = self.layer == depth - 1
        keep_used_blocks(self.model, self.layer, self.last)
        config: Any = self.model.pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.register_buffer("shift", 255 * torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", 255 * torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.stride
        return side, side

    def forward(self, pixels: Tensor) -> FeatureMap:
        images = (pixels.to(self.shift.dtype) - self.shift) / self.scale  # [V, 3, S, S]
        tokens = self.model.forward_intermediates(
            images, indices=[self.layer], norm=self.last, output_fmt="NLC", intermediates_only=True
        )[0]  # [V, h*w, C]
        return FeatureMap(tokens, self.grid)


def create(name: str, weights: str | None, shape: dict[str, Any]) -> nn.Module:
    if weights is None or weights == "pretrained":
        model = timm.create_model(name, pretrained=weights is not None, num_classes=0, global_pool="", **shape)
        if weights is None:
            init_random(model)
        return model
    if not Path(weights).is_file():
        raise ValueError(f"encoder {name}: weights = {weights}: no such file (or say `pretrained`)")
    overlay = {"file": weights, "num_classes": 0}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, global_pool="", **shape
    )


def init_random(model: Any) -> None:
    """Random weights at a scale that suits any width.

    timm draws linear maps with std 0.02, which is made for widths of 768 and more: at width 128 signals fade from
    block to block and learning starts late. Here they are Xavier-uniform (as in the original ViT), positions are
    as large as the patches that they are added to, and LayerScale (DINOv2's, 1e-5) starts at 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "gamma") and isinstance(module.gamma, nn.Parameter):
            nn.init.ones_(module.gamma)
    nn.init.normal_(model.pos_embed, std=0.3)


def keep_used_blocks(model: Any, layer: int, last: bool) -> None:
    """Drop what lies behind the layer in use: dead weights cost memory, and would never receive a gradient."""
    model.blocks = model.blocks[: layer + 1]
    for dead in ("attn_pool", "fc_norm", "head", *(() if last else ("norm",))):
        if getattr(model, dead, None) is not None:
            setattr(model, dead, nn.Identity())
