"""Several encoders, joined channel by channel: Cambrian-1's baseline connector ("Concat.").

Source: arXiv 2406.16860 section 3.5 and cambrian `cambrian_arch.py`: every map is resized (bilinear) to one token
count, channels are concatenated in the encoders' order, then LLaVA-1.5's MLP. With one encoder and a small `side` it is
the paper's "interpolate + MLP" row of the 36-token comparison. No attention, no token interleaving.
"""

import torch
from torch import Tensor

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.checks import at_least
from vlm_lab.model.connectors.mlp import projection
from vlm_lab.model.connectors.spatial import resize
from vlm_lab.model.features import FeatureMap


class Concat(Connector):
    """side x side tokens out (24 in Cambrian-1); null keeps the first encoder's grid."""

    multi = True

    def __init__(self, dims: dict[str, int], out_dim: int, *, side: int | None = 24, layers: int = 2) -> None:
        super().__init__(dims, out_dim)
        if side is not None:
            at_least(1, side=side)
        self.side = side
        self.project = projection(sum(dims.values()), out_dim, layers)

    def grid(self, grids: dict[str, Grid]) -> Grid:
        return grids[next(iter(self.dims))] if self.side is None else (self.side, self.side)

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        size = self.grid({name: feature.grid for name, feature in features.items()})
        maps = [resize(features[name], size).tokens for name in self.dims]  # each [V, h*w, C_k]
        return self.project(torch.cat(maps, dim=-1))
