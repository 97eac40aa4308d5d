"""Attention for packed rows: many samples in one row, none sees another.

Registered with transformers under the name "packed", so that any causal LM can use it. With `cu_seq_lens_q` (the
boundaries of the samples, as flash attention's varlen functions take them) every sample is attended to on its own:
no mask is built and no score between samples is ever computed. Without it (generation) it is transformers' own sdpa.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, L, d], key and value [1, kv_heads, L, d] -> [1, L, heads, d]."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = [end - start for start, end in pairwise(cu_seq_lens_q)]
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [one_sample(q, k, v, **kwargs) for q, k, v in parts]
    return torch.cat(out, dim=2).transpose(1, 2), None  # as transformers expects it: [1, L, heads, d]


def one_sample(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention over one sample; a sliding window matters only for samples longer than it."""
    gqa, length = q.shape[1] != k.shape[1], q.shape[2]
    if sliding_window is None or length <= sliding_window:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=gqa)
    ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
    mask = ones.tril() & ones.triu(1 - sliding_window)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=gqa)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
