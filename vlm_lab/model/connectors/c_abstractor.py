"""Honeybee's C-Abstractor: convolutions around an average pool, so that fewer tokens keep local context.

Source: arXiv 2312.06742 section 3 and khanrc/honeybee `projectors/projectors.py`, `CAbstractor`, with the settings of
`configs/model_config/c-abs.yaml`: learned positions, L RegNet blocks with squeeze-excitation (timm's own), adaptive
average pool, L more blocks, two-layer SiLU MLP. Masked patches are zeroed on entry and left out of the pool; the
average inside squeeze-excitation still counts their cells. Not here: the D-Abstractor, eos tokens, pre-norm.
"""

from functools import partial

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.checks import at_least, pooled_grid
from vlm_lab.model.connectors.spatial import pool, real_tokens, resize, to_map, to_tokens
from vlm_lab.model.features import FeatureMap


class CAbstractor(Connector):
    """side x side tokens out (144 in the paper). `blocks`: RegNet blocks before and again after the pool.

    `positions`: side of the learned position table; it is resized (bilinear) where the encoder's grid differs.
    """

    def __init__(
        self,
        dims: dict[str, int],
        out_dim: int,
        *,
        side: int = 12,
        blocks: int = 3,
        hidden: int = 1024,
        positions: int = 24,
    ) -> None:
        super().__init__(dims, out_dim)
        at_least(1, side=side, blocks=blocks, hidden=hidden, positions=positions)
        (in_dim,) = dims.values()
        stage = partial(RegStage, blocks, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.side, self.position_grid = side, (positions, positions)
        self.positions = nn.Parameter(torch.empty(1, positions**2, in_dim))
        self.before = stage(in_dim, hidden)
        self.after = stage(hidden, hidden)
        self.project = nn.Sequential(nn.Linear(hidden, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.apply(_honeybee_init)

    def grid(self, grids: dict[str, Grid]) -> Grid:
        return pooled_grid(self.side, super().grid(grids))

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        ((name, feature),) = features.items()
        grid, mask = feature.grid, feature.mask
        positions = resize(FeatureMap(self.positions, self.position_grid), grid).tokens  # [1, N, C]
        tokens = real_tokens(FeatureMap(feature.tokens + positions, grid, mask))
        x = self.before(to_map(tokens, grid))  # [V, hidden, h, w]
        pooled = pool(FeatureMap(to_tokens(x), grid, mask), self.grid({name: grid}))
        x = self.after(to_map(pooled.tokens, pooled.grid))  # [V, hidden, side, side]
        return self.project(to_tokens(x))


def _honeybee_init(module: nn.Module) -> None:
    """Normal, 0.02, for linear maps and convolutions (honeybee `common_layers.py`)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
