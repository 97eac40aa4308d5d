"""Connectors: encoder features to LLM embeddings, one file each.

A connector is an `nn.Module` built as `Connector(dims, out_dim, **yaml)`: `dims` maps encoder name to channel width,
`out_dim` is the LLM's hidden size. It offers

    forward(features: dict[str, FeatureMap]) -> [V, T, out_dim]
    grid(grids: dict[str, (h, w)]) -> (h, w)       of the tokens that come out; T == h * w (T in one row if not spatial)

One that also works between the LLM's layers is a `DeepConnector`.
"""

import math
from typing import Any, Literal

from torch import Tensor, nn

from vlm_lab.batch import Grid
from vlm_lab.model.features import FeatureMap
from vlm_lab.model.seen import Seen


class Connector(nn.Module):
    """Base of all connectors: checks how many encoders a connector can take, and counts tokens from `grid`."""

    multi = False  # whether several encoders can feed it
    spatial = True  # whether its tokens are a map (h, w) of the view
    per_patch = False  # whether each token comes from its own patch alone

    def __init__(self, dims: dict[str, int], out_dim: int) -> None:
        super().__init__()
        if len(dims) > 1 and not self.multi:
            raise ValueError(f"connector {type(self).__name__} takes one encoder, got {len(dims)}: {', '.join(dims)}")
        self.dims, self.out_dim = dict(dims), out_dim

    def grid(self, grids: dict[str, Grid]) -> Grid:
        """Shape (h, w) of the output tokens for these input grids. Default: as the first encoder's."""
        return next(iter(grids.values()))

    def num_tokens(self, grids: dict[str, Grid]) -> int:
        return math.prod(self.grid(grids))

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        raise NotImplementedError


class DeepConnector(Connector):
    """A connector with blocks inside the LLM. `site`: whether they work on what enters a layer, or on what leaves it.

    `memory` is computed once per pass: the visual tokens come from it (`tokens`), and the blocks attend to it.
    """

    site: Literal["input", "output"]

    def memory(self, features: dict[str, FeatureMap]) -> Any:
        raise NotImplementedError

    def tokens(self, memory: Any) -> Tensor:
        """[V, T, out_dim]."""
        raise NotImplementedError

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        return self.tokens(self.memory(features))

    def layer_blocks(self, num_layers: int) -> dict[int, nn.Module]:
        """Layer index -> block. The first call makes the blocks: before it, nobody knows the LLM's depth."""
        raise NotImplementedError

    def inside(self, block: nn.Module, hidden: Tensor, seen: Seen) -> Tensor:
        """Hidden states [B, L, D] after `block`; L == 1 at decode steps."""
        raise NotImplementedError
