"""MAPL's mapping network: learned constants read the patches in one Transformer encoder, and are what comes out.

Source: arXiv 2210.07179 and its code (pre-norm, ReLU, MLP twice as wide): the middle row of Idefics2's connector table
(arXiv 2405.02246, table 11). Unlike in a perceiver, patches also attend to each other and to the constants.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.checks import at_least, divides
from vlm_lab.model.features import FeatureMap


class MappingNetwork(Connector):
    """`constants` tokens out, whatever the grid; `hidden` is the width of the network between two linear maps."""

    spatial = False

    def __init__(
        self,
        dims: dict[str, int],
        out_dim: int,
        *,
        constants: int = 32,
        hidden: int = 256,
        depth: int = 4,
        heads: int = 8,
    ) -> None:
        super().__init__(dims, out_dim)
        at_least(1, constants=constants, depth=depth)
        divides("heads", heads, hidden, "connector.hidden")
        (in_dim,) = dims.values()
        self.down = nn.Linear(in_dim, hidden)
        self.constants = nn.Parameter(torch.randn(constants, hidden))
        options: Any = {"dim_feedforward": 2 * hidden, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(hidden, heads, **options) for _ in range(depth)])
        self.up = nn.Linear(hidden, out_dim)

    def grid(self, grids: dict[str, Grid]) -> Grid:
        return 1, len(self.constants)

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        (feature,) = features.values()
        constants = self.constants.expand(len(feature.tokens), -1, -1)  # [V, constants, hidden]
        x = torch.cat([self.down(feature.tokens), constants], dim=1)  # [V, N + constants, hidden]
        hidden = None
        if feature.mask is not None:
            hidden = torch.cat([~feature.mask, feature.mask.new_zeros(constants.shape[:2])], dim=1)  # True: not seen
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=hidden)
        return self.up(x[:, -len(self.constants) :])
