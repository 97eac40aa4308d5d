"""Attention for packed rows: many samples in one row, none sees another.

Registered with transformers under the name "packed", so that any causal LM can use it. With `cu_seq_lens_q` (the
boundaries of the samples, as flash attention's varlen functions take them) every sample is attended to on its own: no
mask over the row is built and no score between samples is ever computed. On a GPU in half precision that is one call of
flash attention's kernel (torch's own), elsewhere one call per run of neighbours of equal length.
Without it (generation) it is transformers' own sdpa. Sliding windows, soft-capped scores (Gemma 2) and attention
sinks (gpt-oss) are honoured in both; a bias on the scores is refused.
"""

from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"
HALF = (torch.bfloat16, torch.float16)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: list[int] | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, L, d], key and value [B, kv_heads, L, d] -> [B, L, heads, d]; B is 1 if the row is packed.

    `cu_seq_lens_k` and `max_length_k` say the boundaries once more, for the kernel (see `for_kernel`). `kwargs` are
    what the family's attention layer passes: `scaling`, `dropout`, `sliding_window`, `softcap`, `s_aux`.
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias to the scores, which packed rows do not support"
        )
    if cu_seq_lens_k is not None and fits_kernel(value, **kwargs):
        return one_call(query, key, value, cu_seq_lens_k, max_length_k, **kwargs), None
    if cu_seq_lens_q is None:
        return whole_rows(module, query, key, value, attention_mask, **kwargs), None
    lengths = [end - start for start, end in pairwise(cu_seq_lens_q)]
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]  # neighbours of one length, and how many
    parts = (x[0].split([length * count for length, count in runs], dim=1) for x in (query, key, value))
    out = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)  # [count, heads, length, d]
        out.append(one_length(q, k, v, **kwargs).transpose(1, 2).flatten(0, 1))  # [count * length, heads, d]
    return torch.cat(out)[None], None


def for_kernel(bounds: list[int], device: torch.device) -> dict[str, Any]:
    """The boundaries of samples as flash attention's kernel takes them; nothing where there is no such kernel."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return {}
    longest = max(end - start for start, end in pairwise(bounds))
    return {"cu_seq_lens_k": torch.tensor(bounds, dtype=torch.int32, device=device), "max_length_k": longest}


def fits_kernel(value: Tensor, dropout: float = 0.0, **kwargs: Any) -> bool:
    size = value.shape[-1]
    return value.dtype in HALF and size % 8 == 0 and size <= 256 and dropout == 0 and not capped(**kwargs)


def one_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """A packed row by one kernel: `bounds` int32 [samples + 1], `longest` the longest sample; -> [1, L, heads, d]."""
    from torch.nn.attention.varlen import varlen_attn  # late: registering it takes a tenth of a second of every start

    q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))  # autocast leaves rotated ones wide
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # keys before and after the query's own
    out: Any = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=True
    )
    return out[None]


def one_length(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None = None, **kwargs: Any) -> Tensor:
    """Causal attention over samples of one length; a sliding window matters only for samples longer than it."""
    length = q.shape[2]
    windowed = sliding_window is not None and length > sliding_window
    if capped(**kwargs):
        return capped_attention(q, k, v, causal(length, length, q.device, sliding_window), **kwargs)
    scaling, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    if not windowed:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=gqa)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])  # fused kernels take a mask or grouped heads
    mask = causal(length, length, q.device, sliding_window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout)


def whole_rows(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Attention as transformers asks for it; it leaves the mask away where causality says all."""
    if not capped(**kwargs):
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]
    if mask is None:
        mask = causal(q.shape[2], k.shape[2], q.device)
    return capped_attention(q, k, v, mask, **kwargs).transpose(1, 2)


def capped(softcap: float | None = None, s_aux: Tensor | None = None, **_: Any) -> bool:
    """Whether the scores need what no fused kernel of torch computes."""
    return softcap is not None or s_aux is not None


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Scores held in memory: tanh soft capping (arXiv 2408.00118, section 2), a learnt sink [heads] in the softmax."""
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = q @ k.transpose(2, 3) * scaling  # [n, heads, queries, keys]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: padding attends to nothing else
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout) @ v


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[n, kv_heads, L, d] -> [n, heads, L, d]: every key and value head serves a group of query heads."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def causal(queries: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
    """True where a query sees a key [queries, keys]; the last query is the last key's own."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = ones.tril(keys - queries)
    return seen if window is None else seen & ones.triu(keys - queries + 1 - window)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
