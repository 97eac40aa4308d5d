"""MAPL's mapping network against its formula in float64, and at its published size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_lab.model.connectors.mapping import MappingNetwork
from vlm_lab.model.features import FeatureMap


def by_hand(connector: MappingNetwork, tokens: Tensor, heads: int) -> Tensor:
    """One view's tokens [N, C], layer by layer and head by head, from the weights alone."""
    w = dict(connector.named_parameters())
    x = torch.cat([tokens @ w["down.weight"].T + w["down.bias"], w["constants"]])
    for layer in range(len(connector.layers)):
        p = {name.removeprefix(f"layers.{layer}."): value for name, value in w.items() if f"layers.{layer}." in name}
        y = F.layer_norm(x, x.shape[1:], p["norm1.weight"], p["norm1.bias"])
        q, k, v = (y @ p["self_attn.in_proj_weight"].T + p["self_attn.in_proj_bias"]).chunk(3, dim=1)
        each = zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
        seen = [torch.softmax(a @ b.T / a.shape[1] ** 0.5, dim=1) @ c for a, b, c in each]
        x = x + torch.cat(seen, 1) @ p["self_attn.out_proj.weight"].T + p["self_attn.out_proj.bias"]
        y = F.layer_norm(x, x.shape[1:], p["norm2.weight"], p["norm2.bias"])
        inner = (y @ p["linear1.weight"].T + p["linear1.bias"]).clamp(min=0)
        x = x + inner @ p["linear2.weight"].T + p["linear2.bias"]
    return x[len(tokens) :] @ w["up.weight"].T + w["up.bias"]


def test_formula(make_feature: Callable[..., FeatureMap]) -> None:
    """Padded views equal the same patches alone, to 1e-12."""
    torch.manual_seed(0)
    connector = MappingNetwork({"a": 10}, 6, constants=3, hidden=16, depth=2, heads=4).double()
    feature = make_feature((2, 4), 10, views=2)
    feature = feature._replace(mask=torch.arange(8)[None] < torch.tensor([[8], [5]]))
    expected = [by_hand(connector, tokens[mask], 4) for tokens, mask in zip(feature.tokens, feature.mask, strict=True)]
    for mode in (connector.train(), connector.eval()):
        with torch.no_grad():
            torch.testing.assert_close(mode({"a": feature}), torch.stack(expected), rtol=0, atol=1e-12)


def test_published_size() -> None:
    """CLIP-L to GPT-J: 3.4M parameters, as arXiv 2210.07179 says."""
    with torch.device("meta"):
        connector = MappingNetwork({"clip": 1024}, 4096)
    assert sum(p.numel() for p in connector.parameters()) / 1e6 == pytest.approx(3.4, abs=0.05)
