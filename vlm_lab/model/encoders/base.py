"""What every encoder offers, and the arithmetic that all of them share: normalisation, and several maps made one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_lab.batch import Grid
from vlm_lab.model.connectors.spatial import resize, to_tokens
from vlm_lab.model.features import FeatureMap


class Encoder(nn.Module):
    """`forward(pixels uint8 [V, 3, S, S]) -> FeatureMap` with S == image_size: no class, register or padding tokens.

    `dim` channels on a `grid` of `stride` pixels per token. `mean` and `std` (RGB in 0..1) are the checkpoint's own;
    pixels are normalised with them here, on the device.
    """

    dim: int
    image_size: int
    stride: int
    grid: Grid
    shift: Tensor
    scale: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("shift", 255 * torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", 255 * torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [V, 3, H, W] -> the dtype of the weights (DeepSpeed narrows them, and no buffer), same shape."""
        return ((pixels.to(self.shift.dtype) - self.shift) / self.scale).to(next(self.parameters()).dtype)

    def feature_map(self, maps: Sequence[Tensor]) -> FeatureMap:
        """Maps [V, C_i, h_i, w_i] as one: each bilinear to `grid` (float32, half-pixel centres), then side by side."""
        features = [FeatureMap(to_tokens(m), (m.shape[2], m.shape[3])) for m in maps]
        return FeatureMap(torch.cat([resize(feature, self.grid).tokens for feature in features], dim=-1), self.grid)


def used_layers(name: str, layer: int | Sequence[int], depth: int) -> list[int]:
    """`layer` of the YAML as ascending indices. ValueError outside the model's `depth` layers."""
    layers = [layer] if isinstance(layer, int) else list(layer)
    for index in layers:
        if not -depth <= index < depth:
            raise ValueError(f"encoder {name}: layer {index} is outside its {depth} layers")
    if not layers:
        raise ValueError(f"encoder {name}: layer = [] names no layer; the last one is -1")
    return sorted({index % depth for index in layers})
