"""BLIP-2's Q-Former as a resampler: a BERT-style stack whose learned queries cross-attend to the patches.

Source: arXiv 2301.12597 section 3.1, and transformers' `Blip2QFormerModel` on its queries-only path (post-norm, exact
GELU, cross-attention in every second layer). `ln_vision` and the initialisation (normal, 0.02) are LAVIS's.
Not here: Q-Former's text branch, its pretraining losses and its dropout of 0.1.
"""

import torch
from torch import Tensor, nn

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.attention import Attention
from vlm_lab.model.connectors.checks import at_least, divides
from vlm_lab.model.features import FeatureMap

EPS = 1e-12


class QFormer(Connector):
    """`queries` tokens out, whatever the grid; `cross_every`: every how many layers the queries look at the image."""

    spatial = False

    def __init__(
        self,
        dims: dict[str, int],
        out_dim: int,
        *,
        queries: int = 32,
        hidden: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_hidden: int = 3072,
        cross_every: int = 2,
    ) -> None:
        super().__init__(dims, out_dim)
        at_least(1, queries=queries, depth=depth, cross_every=cross_every)
        divides("heads", heads, hidden, "connector.hidden")
        (in_dim,) = dims.values()
        self.queries = nn.Parameter(torch.randn(queries, hidden) * 0.02)
        self.ln_vision = nn.LayerNorm(in_dim)
        self.norm = nn.LayerNorm(hidden, EPS)
        context_dims = [in_dim if layer % cross_every == 0 else None for layer in range(depth)]
        self.layers = nn.ModuleList([QFormerLayer(hidden, dim, heads, mlp_hidden) for dim in context_dims])
        self.layers.apply(_bert_init)
        self.project = nn.Linear(hidden, out_dim)

    def grid(self, grids: dict[str, Grid]) -> Grid:
        return 1, len(self.queries)

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        (feature,) = features.values()
        context = self.ln_vision(feature.tokens)  # [V, N, C]
        mask = None if feature.mask is None else feature.mask[:, None]  # [V, 1, N]
        x = self.norm(self.queries).expand(len(context), -1, -1)  # [V, queries, hidden]
        for layer in self.layers:
            x = layer(x, context, mask)
        return self.project(x)


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention (unless `context_dim` is None) and FFN, each followed by add and norm."""

    def __init__(self, dim: int, context_dim: int | None, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.attention = Attention(dim, dim, heads, dim // heads, bias=True)
        self.attention_norm = nn.LayerNorm(dim, EPS)
        self.crossattention = None
        if context_dim is not None:
            self.crossattention = Attention(dim, context_dim, heads, dim // heads, bias=True)
            self.crossattention_norm = nn.LayerNorm(dim, EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, dim))
        self.mlp_norm = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(x + self.attention(x, x))
        if self.crossattention is not None:
            x = self.crossattention_norm(x + self.crossattention(x, context, mask))
        return self.mlp_norm(x + self.mlp(x))


def _bert_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
