"""Attention for packed rows against a float64 loop over samples, heads and queries written from the formula."""

from collections.abc import Sequence

import pytest
import torch
from helpers import max_difference
from torch import Tensor, nn

from vlm_lab.model.attention import packed_attention

LENGTHS = [5, 5, 1, 9, 9, 9, 2]
BOUNDS = [0, 5, 10, 11, 20, 29, 38, 40]
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "window longer than samples": {"sliding_window": 9},
    "softcap": {"softcap": 0.7},
    "softcap and window": {"softcap": 0.7, "sliding_window": 3},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "sinks and window": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding_window": 4},
}


def row(kv_heads: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, sum(LENGTHS), 6) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    scaling: float,
    sliding_window: int = 10**9,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """softmax over the keys of the query's own sample, from its first (or the window's) to the query itself."""
    q, k, v = (x.detach().double()[0] for x in (q, k, v))
    heads, length, _ = q.shape
    out = torch.zeros(length, heads, v.shape[-1], dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // len(k))
        for t in range(length):
            first = max(*(b for b in bounds if b <= t), t - sliding_window + 1)
            scores = k[group, first : t + 1] @ q[head, t] * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            sink = 0.0 if s_aux is None else s_aux[head].double().exp()
            out[t, head] = (scores.exp() / (scores.exp().sum() + sink)) @ v[group, first : t + 1]
    return out[None]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_the_formula(option: str, kv_heads: int) -> None:
    """Within 1e-5, in fp32, with scores far from uniform."""
    qkv, options = row(kv_heads), {"scaling": 0.9, **OPTIONS[option]}
    out, _ = packed_attention(nn.Module(), *qkv, None, BOUNDS, **options)
    assert out.shape == (1, sum(LENGTHS), 4, 6)
    assert max_difference(out.detach().double(), reference(*qkv, BOUNDS, **options)) <= 1e-5


@pytest.mark.parametrize("option", OPTIONS)
def test_no_gradient_between_samples(option: str) -> None:
    """The fourth sample's output depends on its own queries, keys and values, and on no one else's: exactly 0."""
    qkv = row(2)
    out, _ = packed_attention(nn.Module(), *qkv, None, BOUNDS, scaling=0.9, **OPTIONS[option])
    own = slice(BOUNDS[3], BOUNDS[4])
    gradients = torch.autograd.grad(out[:, own].square().sum(), qkv)
    for gradient in gradients:
        others = torch.cat([gradient[:, :, : own.start], gradient[:, :, own.stop :]], dim=2)
        assert not others.any()
    assert all(gradient[:, :, own].any() for gradient in gradients)


@pytest.mark.parametrize("option", ["softcap", "sinks"])
@pytest.mark.parametrize("queries", [9, 1])
def test_whole_rows(option: str, queries: int) -> None:
    """Without boundaries (generation): the last queries of a row, causal where transformers leaves the mask away."""
    q, k, v = (x.detach()[:, :, 20:29] for x in row(2))
    options = {"scaling": 0.9, **OPTIONS[option]}
    out, _ = packed_attention(nn.Module(), q[:, :, -queries:], k, v, None, **options)
    assert max_difference(out.double(), reference(q, k, v, [0, 9], **options)[:, -queries:]) <= 1e-5


def test_a_bias_on_the_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="adds a position bias"):
        packed_attention(nn.Linear(1, 1), *row(2), None, BOUNDS, position_bias=torch.zeros(1))
