"""Space-to-depth, then a projection: fewer, wider tokens (Idefics3, SmolVLM, InternVL; nanoVLM's connector).

r x r neighbouring patches become one token of r * r * C channels, ordered as transformers' Idefics3 `pixel_shuffle`,
so its checkpoints load unchanged. Grids that r does not divide are refused: cropping would lose image content.
"""

from torch import Tensor

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.mlp import projection
from vlm_lab.model.features import FeatureMap


class PixelShuffle(Connector):
    """`factor` r: tokens shrink by r * r. `layers`: depth of the projection (1 in Idefics3)."""

    def __init__(self, dims: dict[str, int], out_dim: int, factor: int = 2, layers: int = 1) -> None:
        super().__init__(dims, out_dim)
        (in_dim,) = dims.values()
        self.factor = factor
        self.project = projection(in_dim * factor**2, out_dim, layers)

    def grid(self, grids: dict[str, Grid]) -> Grid:
        (h, w), r = super().grid(grids), self.factor
        if h % r or w % r:
            raise ValueError(f"connector.factor = {r} does not divide the encoder's {h} x {w} grid of patches")
        return h // r, w // r

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        (feature,) = features.values()
        return self.project(shuffle(feature.tokens, feature.grid, self.factor))


def shuffle(tokens: Tensor, grid: Grid, r: int) -> Tensor:
    """[V, h*w, C] -> [V, h/r * w/r, r*r*C]; channel order (row in block, column in block, C)."""
    (h, w), (v, _, c) = grid, tokens.shape
    blocks = tokens.view(v, h // r, r, w // r, r, c).permute(0, 1, 3, 2, 4, 5)  # [V, h/r, w/r, r, r, C]
    return blocks.reshape(v, (h // r) * (w // r), r * r * c)
