"""Idefics2's connector: gated MLP per patch, then a perceiver resampler to a fixed number of latents.

Source: arXiv 2405.02246 section 3 (projection first, then perceiver; three layers, 64 latents) and transformers'
`Idefics2Connector`, whose parameter names are kept. No positions are added; latents attend to patches and to
themselves together. Several encoders (the Resampler row of Cambrian-1's connector table) are projected separately and
attended to as one sequence. Not here: the query/key norms of Idefics2's training code (absent from the release).
"""

import torch
from torch import Tensor, nn

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.attention import Attention, GatedMLP
from vlm_lab.model.connectors.checks import at_least
from vlm_lab.model.features import FeatureMap

EPS = 1e-6


class Perceiver(Connector):
    """`latents` tokens out, whatever the grid. `mlp_ratio`: the gated MLP's hidden width over the LLM's (Mistral: 3.5).

    `mlp` off: one linear map instead of the gated MLP, the paper's arm without modality projection.
    """

    multi = True
    spatial = False

    def __init__(
        self,
        dims: dict[str, int],
        out_dim: int,
        *,
        latents: int = 64,
        depth: int = 3,
        heads: int = 16,
        head_dim: int = 96,
        kv_heads: int = 4,
        mlp_ratio: float = 3.5,
        mlp: bool = True,
    ) -> None:
        super().__init__(dims, out_dim)
        at_least(1, latents=latents, depth=depth, heads=heads, head_dim=head_dim)
        hidden = int(mlp_ratio * out_dim)
        self.modality_projection = nn.ModuleDict(
            {
                name: GatedMLP(dim, hidden, out_dim) if mlp else nn.Linear(dim, out_dim, bias=False)
                for name, dim in dims.items()
            }
        )
        self.perceiver_resampler = Resampler(out_dim, latents, depth, heads=heads, head_dim=head_dim, kv_heads=kv_heads)
        self.latents = latents

    def grid(self, grids: dict[str, Grid]) -> Grid:
        return 1, self.latents

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        context = [project(features[name].tokens) for name, project in self.modality_projection.items()]
        return self.perceiver_resampler(torch.cat(context, dim=1), joint_mask([features[name] for name in self.dims]))


def joint_mask(features: list[FeatureMap]) -> Tensor | None:
    """Masks of several maps as one sequence [V, sum of N]; None when nothing is masked."""
    if all(feature.mask is None for feature in features):
        return None
    ones = [feature.tokens.new_ones(feature.tokens.shape[:2], dtype=torch.bool) for feature in features]
    return torch.cat([one if f.mask is None else f.mask for f, one in zip(features, ones, strict=True)], dim=1)


class Resampler(nn.Module):
    """Learned latents, refined by `depth` layers of attention to a context [V, N, dim]."""

    def __init__(self, dim: int, latents: int, depth: int, *, heads: int, head_dim: int, kv_heads: int) -> None:
        super().__init__()
        # transformers starts from ones, which its checkpoints overwrite; equal latents would stay equal in training.
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.layers = nn.ModuleList([ResamplerLayer(dim, heads, head_dim, kv_heads) for _ in range(depth)])
        self.norm = nn.RMSNorm(dim, EPS)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """context [V, N, dim], mask [V, N] True on real patches -> [V, latents, dim]."""
        latents = self.latents.expand(len(context), -1, -1)  # [V, latents, dim]
        if mask is not None:  # latents always see each other
            mask = torch.cat([mask, mask.new_ones(latents.shape[:2])], dim=1)[:, None]  # [V, 1, N + latents]
        for layer in self.layers:
            latents = layer(latents, context, mask)
        return self.norm(latents)


class ResamplerLayer(nn.Module):
    """Pre-norm attention of the latents to [context, latents], then a SwiGLU MLP; both residual."""

    def __init__(self, dim: int, heads: int, head_dim: int, kv_heads: int) -> None:
        super().__init__()
        self.input_latents_norm = nn.RMSNorm(dim, EPS)
        self.input_context_norm = nn.RMSNorm(dim, EPS)
        self.self_attn = Attention(dim, dim, heads, head_dim, kv_heads=kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(dim, EPS)
        self.mlp = GatedMLP(dim, 4 * dim, dim)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        queries = self.input_latents_norm(latents)
        keys = torch.cat([self.input_context_norm(context), queries], dim=1)  # [V, N + latents, dim]
        latents = latents + self.self_attn(queries, keys, mask)
        return latents + self.mlp(self.post_attention_layernorm(latents))
