"""Gated cross-attention: visual tokens stay out of the sequence, text looks at them from inside the LLM.

Source: Flamingo (arXiv 2204.14198 section 2), Idefics (transformers `IdeficsGatedCrossAttentionLayer`) and the
cross-attention arm of Idefics2's ablations (arXiv 2405.02246 section 3.2). Gates start at zero, so the LLM is unchanged
at step 0. In Idefics, text that sees no image skips only the attention; here it skips the MLP too (as in Llama 3.2
Vision), so that text-only samples pass through untouched. Not here: query/key norms, positions, caches.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vlm_lab.model.connectors import Connector, Grid
from vlm_lab.model.connectors.attention import Attention, GatedMLP
from vlm_lab.model.connectors.checks import at_least, divides
from vlm_lab.model.connectors.mlp import MLP
from vlm_lab.model.connectors.perceiver import EPS, Perceiver
from vlm_lab.model.features import FeatureMap


class CrossAttention(Connector):
    """`forward` makes the visual tokens [V, T, out_dim] that the blocks look at; they never enter the text sequence.

    `perceiver`: settings of the Perceiver that makes them; null: one linear map per patch.
    `interval` k: a block before every k-th layer (4 in Idefics). `mlp_ratio`: as the LLM's MLP (Mistral: 3.5).
    """

    multi = True

    def __init__(
        self,
        dims: dict[str, int],
        out_dim: int,
        *,
        interval: int = 4,
        heads: int = 32,
        mlp_ratio: float = 3.5,
        perceiver: Mapping[str, Any] | None = MappingProxyType({}),
    ) -> None:
        super().__init__(dims, out_dim)
        at_least(1, interval=interval)
        divides("heads", heads, out_dim, "the LLM's width")
        self.interval, self.heads, self.mlp_hidden = interval, heads, int(mlp_ratio * out_dim)
        self.visual = MLP(dims, out_dim, layers=1) if perceiver is None else Perceiver(dims, out_dim, **perceiver)
        self.llm_blocks = nn.ModuleDict()

    def layer_blocks(self, num_layers: int) -> dict[int, nn.Module]:
        """Layer index -> block, to be run on the input of that decoder layer: block(hidden, visual, mask).

        The first call makes the blocks, since only the VLM knows its LLM's depth: call it before loading weights.
        """
        layers = range(0, num_layers, self.interval)
        for layer in layers:
            if str(layer) not in self.llm_blocks:
                self.llm_blocks[str(layer)] = GatedCrossAttention(self.out_dim, self.heads, self.mlp_hidden)
        return {layer: self.llm_blocks[str(layer)] for layer in layers}

    def grid(self, grids: dict[str, Grid]) -> Grid:
        return self.visual.grid(grids)

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        return self.visual(features)


class GatedCrossAttention(nn.Module):
    """x + tanh(a) * attention(norm(x), visual), then + tanh(b) * mlp(norm(x)); a and b start at 0."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(dim, EPS)
        self.cross_attn = Attention(dim, dim, heads, dim // heads)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = nn.RMSNorm(dim, EPS)
        self.mlp = GatedMLP(dim, mlp_hidden, dim)
        self.alpha_dense = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, visual: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, L, D], visual [B, S, D] of the same sample, mask [B, L, S] True where text sees -> [B, L, D]."""
        sees = mask.any(-1, keepdim=True)  # [B, L, 1]
        attended = self.cross_attn(self.input_layernorm(hidden), visual, mask)  # zero where nothing is seen
        hidden = hidden + self.alpha_cross_attn.tanh() * attended
        dense = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + self.alpha_dense.tanh() * dense * sees
