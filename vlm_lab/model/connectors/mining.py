"""Mini-Gemini's patch info mining: each low-resolution token gathers detail from its own patch of a sharper map.

Source: arXiv 2403.18814 section 3 and dvlab-research/MGM `mgm_arch.py`, `unified_resampler`. Paper: T = MLP(Q +
softmax(phi(Q) phi(K)^T) phi(V)), K and V the M x M high-resolution features under each patch. Where they differ the
code is followed: phi is three separate LayerNorm + Linear, logits are scaled by 1/sqrt(C), one head, and the residual
is the raw low-resolution token. Not here: the views of the HD variant, and the low-resolution image made from the
sharp one (both are tiling).
"""

from torch import Tensor

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.attention import attend, normed_linear
from vlm_lab.model.connectors.mlp import projection
from vlm_lab.model.connectors.spatial import cut_windows, resize, window_mask
from vlm_lab.model.features import FeatureMap


class PatchInfoMining(Connector):
    """Two encoders: the first in the list gives the tokens (their grid is the output's), the second the detail.

    MGM only runs where the sharp grid is a multiple of the other (M = 8); others are resized to the nearest multiple.
    """

    multi = True
    encoders = 2

    def __init__(self, dims: dict[str, int], out_dim: int) -> None:
        super().__init__(dims, out_dim)
        if len(dims) != 2:
            raise ValueError(f"connector PatchInfoMining takes 2 encoders (low, then high), got {len(dims)}")
        (self.low, low_dim), (self.high, high_dim) = dims.items()
        self.query = normed_linear(low_dim, low_dim, bias=True)
        self.key = normed_linear(high_dim, low_dim, bias=True)
        self.value = normed_linear(high_dim, low_dim, bias=True)
        self.project = projection(low_dim, out_dim, 2)

    def grid(self, grids: dict[str, Grid]) -> Grid:
        (h, w), (high_h, high_w) = grids[self.low], grids[self.high]
        if high_h < h or high_w < w:
            raise ValueError(
                f"connector PatchInfoMining: the grid {high_h} x {high_w} of {self.high} is smaller than the"
                f" {h} x {w} of {self.low}; name the low-resolution encoder first"
            )
        return h, w

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        low, high = features[self.low], features[self.high]
        h, w = self.grid({self.low: low.grid, self.high: high.grid})
        high = resize(high, (round(high.grid[0] / h) * h, round(high.grid[1] / w) * w))
        q = self.query(low.tokens).flatten(0, 1)[:, None]  # [V*N, 1, C]
        k = cut_windows(self.key(high.tokens), high.grid, (h, w))  # [V*N, M*M, C]
        x = cut_windows(self.value(high.tokens), high.grid, (h, w))
        mask = None if high.mask is None else window_mask(high, (h, w))[:, None]  # [V*N, 1, M*M]
        mined = attend(q, k, x, heads=1, mask=mask).reshape(low.tokens.shape)  # [V, N, C]
        return self.project(low.tokens + mined)
