"""MobileVLM V2's light-weight downsample projector, LDPv2: per-patch MLP, average pool, depthwise conv with a skip.

Source: arXiv 2402.03766 section 3 and Meituan-AutoML/MobileVLM `vision_projector.py`, `LDPNetV2Projector`. The 3 x 3
depthwise convolution (the positional encoding generator of Twins) tells the pooled tokens where they are.
Not here: LDP of the first MobileVLM (inverted residual blocks).
"""

from torch import Tensor, nn

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.checks import at_least, pooled_grid
from vlm_lab.model.connectors.mlp import projection
from vlm_lab.model.connectors.spatial import pool, to_map, to_tokens
from vlm_lab.model.features import FeatureMap


class LDPv2(Connector):
    """side x side tokens out (144 in the paper). Padding cells are zero before the convolution, like the border."""

    def __init__(self, dims: dict[str, int], out_dim: int, *, side: int = 12) -> None:
        super().__init__(dims, out_dim)
        at_least(1, side=side)
        (in_dim,) = dims.values()
        self.side = side
        self.project = projection(in_dim, out_dim, 2)
        self.position = nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim)

    def grid(self, grids: dict[str, Grid]) -> Grid:
        return pooled_grid(self.side, super().grid(grids))

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        ((name, feature),) = features.items()
        projected = FeatureMap(self.project(feature.tokens), feature.grid, feature.mask)  # [V, N, out_dim]
        pooled = pool(projected, self.grid({name: feature.grid}))
        x = to_map(pooled.tokens, pooled.grid)  # [V, out_dim, side, side]
        return to_tokens(self.position(x) + x)
