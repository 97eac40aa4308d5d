"""Gated cross-attention: visual tokens stay out of the sequence, text looks at them from inside the LLM.

Source: Flamingo (arXiv 2204.14198 section 2), Idefics (transformers `IdeficsGatedCrossAttentionLayer`) and the
cross-attention arm of Idefics2's ablations (arXiv 2405.02246 section 3.2). Gates start at zero, so the LLM is unchanged
at step 0. In Idefics, text that sees no image skips only the attention; here it skips the MLP too (as in Llama 3.2
Vision), so that text-only samples pass through untouched. A token sees every image of its sample that stands before it
(Flamingo: the last one only). At decode steps the blocks run on, on the same visual tokens. Not here: query/key norms,
positions, a cache of the visual keys.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_lab.model.connectors import DeepConnector, Grid
from vlm_lab.model.connectors.attention import Attention, GatedMLP
from vlm_lab.model.connectors.checks import at_least, divides
from vlm_lab.model.connectors.mlp import MLP
from vlm_lab.model.connectors.perceiver import EPS, Perceiver
from vlm_lab.model.features import FeatureMap
from vlm_lab.model.seen import Seen


class CrossAttention(DeepConnector):
    """Visual tokens for the blocks to look at, and one learned placeholder per view for the text sequence.

    `perceiver`: settings of the Perceiver that makes them; null: one linear map per patch.
    `interval` k: a block before every k-th layer (4 in Idefics). `mlp_ratio`: as the LLM's MLP (Mistral: 3.5).
    """

    multi = True
    spatial = False
    site: Literal["input", "output"] = "input"

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
        self.placeholder = nn.Parameter(torch.randn(out_dim) * out_dim**-0.5)
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
        return 1, 1

    def memory(self, features: dict[str, FeatureMap]) -> FeatureMap:
        """The visual tokens [V, S, out_dim]; padding patches are masked where nothing resamples them."""
        tokens = self.visual(features)
        masks = [feature.mask for feature in features.values()] if isinstance(self.visual, MLP) else [None]
        return FeatureMap(tokens, (1, tokens.shape[1]), masks[0])

    def tokens(self, memory: FeatureMap) -> Tensor:
        return self.placeholder.expand(len(memory.tokens), 1, -1)

    def inside(self, block: nn.Module, hidden: Tensor, seen: Seen) -> Tensor:
        """All rows as one: [1, B*L, D] look at [1, V*S, D], each position at the views that it sees."""
        decoding = hidden.shape[:2] != seen.image.shape
        sees = seen.visible[:, -1:] if decoding else seen.visible  # [B, L or 1, V]; a step comes after the whole prompt
        memory: FeatureMap = seen.memory
        mask = sees.flatten(0, 1).repeat_interleave(memory.tokens.shape[1], dim=1)  # [B*L, V*S]
        if memory.mask is not None:
            mask = mask & memory.mask.flatten()
        return block(hidden.flatten(0, 1)[None], memory.tokens.flatten(0, 1)[None], mask[None]).view_as(hidden)


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
