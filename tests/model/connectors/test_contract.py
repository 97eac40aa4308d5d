"""What every connector promises: token counts, gradients everywhere, no influence of masked patches, empty batches."""

from collections.abc import Callable

import pytest
import torch

from vlm_lab.model.connectors import Connector
from vlm_lab.model.connectors.c_abstractor import CAbstractor
from vlm_lab.model.connectors.concat import Concat
from vlm_lab.model.connectors.ldp import LDPv2
from vlm_lab.model.connectors.mapping import MappingNetwork
from vlm_lab.model.connectors.mining import PatchInfoMining
from vlm_lab.model.connectors.perceiver import Perceiver
from vlm_lab.model.connectors.pool import AveragePool, MLPDownsample
from vlm_lab.model.connectors.qformer import QFormer
from vlm_lab.model.connectors.sva import SVA
from vlm_lab.model.features import FeatureMap

OUT = 24
ONE, TWO = {"a": 12}, {"a": 12, "b": 20}
GRIDS = {"a": (8, 8), "b": (16, 16)}
TINY_PERCEIVER = {"latents": 5, "depth": 2, "heads": 4, "head_dim": 8, "kv_heads": 2}
BUILDS: dict[str, Callable[[], Connector]] = {
    "pool_side": lambda: AveragePool(ONE, OUT, side=4),
    "pool_stride": lambda: AveragePool(ONE, OUT, stride=2),
    "mlp_downsample": lambda: MLPDownsample(ONE, OUT),
    "perceiver": lambda: Perceiver(ONE, OUT, **TINY_PERCEIVER),
    "perceiver_linear_two": lambda: Perceiver(TWO, OUT, mlp=False, **TINY_PERCEIVER),
    "qformer": lambda: QFormer(ONE, OUT, queries=3, hidden=16, depth=3, heads=2, mlp_hidden=32),
    "mapping": lambda: MappingNetwork(ONE, OUT, constants=3, hidden=16, depth=2, heads=2),
    "c_abstractor": lambda: CAbstractor(ONE, OUT, side=4, blocks=2, hidden=16, positions=6),
    "ldp": lambda: LDPv2(ONE, OUT, side=4),
    "concat": lambda: Concat(TWO, OUT, side=None),
    "concat_resized": lambda: Concat(TWO, OUT, side=4),
    "sva": lambda: SVA(TWO, OUT, side=4, hidden=16, heads=2, depth=2, groups=2, windows={"b": 4, "unused": 9}),
    "mining": lambda: PatchInfoMining(TWO, OUT),
}


@pytest.fixture(params=BUILDS)
def connector(request: pytest.FixtureRequest) -> Connector:
    return BUILDS[request.param]().double()


@pytest.fixture
def features(connector: Connector, make_feature: Callable[..., FeatureMap]) -> dict[str, FeatureMap]:
    return {name: make_feature(GRIDS[name], dim, seed=i) for i, (name, dim) in enumerate(connector.dims.items())}


def test_tokens_are_as_many_as_announced(connector: Connector, features: dict[str, FeatureMap]) -> None:
    out = connector(features)
    assert out.shape == (2, connector.num_tokens({k: f.grid for k, f in features.items()}), OUT)
    assert out.isfinite().all()


def test_gradients_reach_every_parameter(connector: Connector, features: dict[str, FeatureMap]) -> None:
    connector(features).pow(2).sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        # A bias on keys shifts all logits of a query alike, so its gradient is zero up to rounding.
        assert parameter.grad.abs().max() > 0 or name.endswith(("k_proj.bias", "key.0.bias", "key.1.bias")), name


def test_masked_patches_have_no_influence(
    connector: Connector, features: dict[str, FeatureMap], rows_mask: Callable[..., torch.Tensor]
) -> None:
    """The last quarter of the rows is padding: what it holds may not move any token above it."""
    noise = torch.Generator().manual_seed(1)
    outs = []
    for scale in (0.0, 100.0):
        padded = {}
        for name, feature in features.items():
            mask = rows_mask(feature.grid, feature.grid[0] * 3 // 4)
            junk = torch.randn(feature.tokens.shape, generator=noise, dtype=torch.float64) * scale
            padded[name] = FeatureMap(torch.where(mask[..., None], feature.tokens, junk), feature.grid, mask)
        outs.append(connector(padded))
    h, w = connector.grid({k: f.grid for k, f in features.items()})
    kept = w if h == 1 else h * 3 // 4 * w  # resamplers have no padded tokens
    torch.testing.assert_close(outs[0][:, :kept], outs[1][:, :kept], rtol=1e-9, atol=1e-9)
    assert outs[1].isfinite().all()


def test_a_view_of_padding_only_gives_no_nan(connector: Connector, features: dict[str, FeatureMap]) -> None:
    for name, feature in features.items():
        mask = torch.ones(feature.tokens.shape[:2], dtype=torch.bool)
        mask[1] = False
        features[name] = FeatureMap(feature.tokens.requires_grad_(), feature.grid, mask)
    connector(features).sum().backward()
    assert all(feature.tokens.grad.isfinite().all() for feature in features.values())
    assert all(parameter.grad.isfinite().all() for parameter in connector.parameters())


def test_views_do_not_see_each_other(connector: Connector, features: dict[str, FeatureMap]) -> None:
    alone = connector({k: FeatureMap(f.tokens[:1], f.grid) for k, f in features.items()})
    torch.testing.assert_close(connector(features)[:1], alone, rtol=1e-9, atol=1e-9)


def test_no_views_and_half_precision(connector: Connector, features: dict[str, FeatureMap]) -> None:
    none = connector({k: FeatureMap(f.tokens[:0], f.grid) for k, f in features.items()})
    assert none.shape[0] == 0 and none.shape[2] == OUT
    half = connector.bfloat16()({k: FeatureMap(f.tokens.bfloat16(), f.grid) for k, f in features.items()})
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
