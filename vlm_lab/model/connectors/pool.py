"""Fewer tokens without learning where to look: average pooling, and VILA's space-to-depth `mlp_downsample`.

`AveragePool` is DeCo (arXiv 2405.20985): pool the patches, then the MLP of LLaVA-1.5. `MLPDownsample` is NVlabs/VILA
`multimodal_projector/base_projector.py`, `mlp_downsample`. It differs from `PixelShuffle(factor=2, layers=2)` by a
LayerNorm before the MLP and by zero-padding odd grids instead of refusing them. VILA emits its tokens column by column
(its block swaps the axes and never swaps them back); here they stay row-major, as everywhere in this package.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.checks import at_least, pooled_grid
from vlm_lab.model.connectors.mlp import projection
from vlm_lab.model.connectors.pixel_shuffle import shuffle
from vlm_lab.model.connectors.spatial import pool, real_tokens, to_map, to_tokens
from vlm_lab.model.features import FeatureMap


class AveragePool(Connector):
    """Either `side` (any grid to side x side, adaptive windows) or `stride` (windows of stride x stride patches)."""

    def __init__(
        self, dims: dict[str, int], out_dim: int, *, side: int | None = None, stride: int | None = None, layers: int = 2
    ) -> None:
        super().__init__(dims, out_dim)
        given = {name: value for name, value in (("side", side), ("stride", stride)) if value is not None}
        if len(given) != 1:
            raise ValueError(f"connector.side = {side} and connector.stride = {stride}: set exactly one of them")
        at_least(1, **given)
        (in_dim,) = dims.values()
        self.side, self.stride = side, stride
        self.project = projection(in_dim, out_dim, layers)

    def grid(self, grids: dict[str, Grid]) -> Grid:
        h, w = super().grid(grids)
        if self.side is not None:
            return pooled_grid(self.side, (h, w))
        assert self.stride is not None
        if h % self.stride or w % self.stride:
            raise ValueError(
                f"connector.stride = {self.stride} does not divide the encoder's {h} x {w} grid of patches"
            )
        return h // self.stride, w // self.stride

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        ((name, feature),) = features.items()
        return self.project(pool(feature, self.grid({name: feature.grid})).tokens)


class MLPDownsample(Connector):
    """2 x 2 patches side by side in channels (row, column, C), LayerNorm, two-layer MLP."""

    def __init__(self, dims: dict[str, int], out_dim: int) -> None:
        super().__init__(dims, out_dim)
        (in_dim,) = dims.values()
        self.project = nn.Sequential(nn.LayerNorm(4 * in_dim), *projection(4 * in_dim, out_dim, 2))

    def grid(self, grids: dict[str, Grid]) -> Grid:
        h, w = super().grid(grids)
        return -(-h // 2), -(-w // 2)

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        (feature,) = features.values()
        (h, w), tokens = feature.grid, real_tokens(feature)
        if h % 2 or w % 2:
            tokens = to_tokens(F.pad(to_map(tokens, (h, w)), (0, w % 2, 0, h % 2)))  # zeros on the right and below
        return self.project(shuffle(tokens.contiguous(), (h + h % 2, w + w % 2), 2))
