"""What the resamplers, cross-attention and the windowed connectors share: attention on torch's SDPA and a gated MLP.

Submodules carry transformers' names (`q_proj`, `gate_proj`, ...), so Idefics weights load unchanged.
Not here: position encodings, dropout, key-value caches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_lab.model.connectors.checks import divides

CUDA_BATCH = 65535  # largest batch that SDPA's CUDA kernels launch (pytorch issue 142228); windows make large batches


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q [B, Q, heads*d], k and v [B, K, n*d] with n dividing `heads` -> [B, Q, heads*d].

    `mask` [B, Q or 1, K] is True where a query may look. A query that may look nowhere gets zeros, not NaN.
    """
    dim = q.shape[-1] // heads
    q, k, v = (x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in (q, k, v))  # [B, heads or n, Q or K, d]
    if mask is None:
        return _sdpa(q, k, v, None).transpose(1, 2).flatten(2)  # [B, Q, heads*d]
    sees = mask.any(-1, keepdim=True)  # [B, Q or 1, 1]
    out = _sdpa(q, k, v, (mask | ~sees)[:, None])  # blind queries look everywhere, then count for nothing
    return out.transpose(1, 2).flatten(2) * sees


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if len(q) > CUDA_BATCH:
        masks = [None] * -(-len(q) // CUDA_BATCH) if mask is None else mask.split(CUDA_BATCH)
        parts = zip(q.split(CUDA_BATCH), k.split(CUDA_BATCH), v.split(CUDA_BATCH), masks, strict=True)
        return torch.cat([_sdpa(*part) for part in parts])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Multi-head attention from `dim` to `context_dim` wide keys; `kv_heads` < `heads` shares keys and values (GQA)."""

    def __init__(
        self, dim: int, context_dim: int, heads: int, head_dim: int, *, kv_heads: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        divides("kv_heads", kv_heads, heads, "connector.heads")
        self.heads = heads
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, Q, dim], context [B, K, context_dim], mask [B, Q or 1, K] -> [B, Q, dim]."""
        return self.o_proj(attend(self.q_proj(x), self.k_proj(context), self.v_proj(context), self.heads, mask))


class GatedMLP(nn.Module):
    """SwiGLU, no biases: down(silu(gate(x)) * up(x))."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_dim, hidden, bias=False)
        self.up_proj = nn.Linear(in_dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def normed_linear(in_dim: int, out_dim: int, bias: bool) -> nn.Sequential:
    """LayerNorm, then a linear map: how Cambrian and Mini-Gemini make queries, keys and values."""
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim, bias=bias))
