"""SVA against the formulas, query cell by query cell in float64 (relative tolerance 1e-6), and its invariants."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlm_lab.model.connectors.sva import SVA, SVABlock
from vlm_lab.model.features import FeatureMap

SIDE, HIDDEN, HEADS = 3, 8, 2
DIMS, WINDOWS = {"a": 5, "b": 6}, {"a": 1, "b": 2}


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.5
    return module


def make_sva(**settings: int) -> SVA:
    sva = SVA(DIMS, 10, **{"side": SIDE, "hidden": HIDDEN, "heads": HEADS, "windows": WINDOWS, **settings})
    sva.layer_blocks(5)
    return randomised(sva)


@pytest.fixture
def features(make_feature: Callable[..., FeatureMap]) -> dict[str, FeatureMap]:
    return {"a": make_feature((3, 3), 5, seed=1), "b": make_feature((6, 6), 6, seed=2)}


@pytest.fixture
def masks() -> dict[str, Tensor]:
    """View 0: last row is padding, and the window of cell (0, 0) in b too. View 1: nothing is padding."""
    a, b = torch.ones(2, 3, 3, dtype=torch.bool), torch.ones(2, 6, 6, dtype=torch.bool)
    a[0, 2], b[0, 4:], b[0, :2, :2] = False, False, False
    return {"a": a.flatten(1), "b": b.flatten(1)}


# ---- the formulas, one token at a time


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def project_in(x: Tensor, layers: nn.Sequential) -> Tensor:
    first, _, second, last = layers
    return norm(second.weight @ gelu(first.weight @ x + first.bias) + second.bias, last)


def attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    if not keys:
        return torch.zeros_like(q)
    d, heads = HIDDEN // HEADS, []
    for head in range(HEADS):
        at = slice(head * d, (head + 1) * d)
        weights = torch.stack([(q[at] @ k[at]) / d**0.5 for k in keys]).exp()
        heads.append(sum(w * v[at] for w, v in zip(weights, values, strict=True)) / weights.sum())
    return torch.cat(heads)


def block_on_one_cell(block: SVABlock, x: Tensor, g: Tensor, seen: dict[str, list[Tensor | None]]) -> Tensor:
    """`seen`: encoder -> the m*m projected features of this cell's window, None where masked."""
    u = block.reduce.weight @ torch.cat([x, block.context.weight @ g])
    keys, values = [], []
    for name, window in seen.items():
        for offset, feature in enumerate(window):
            if feature is None:
                continue
            f = feature + block.positions[name][offset] if len(window) > 1 else feature
            keys.append(block.key[name][1].weight @ norm(f, block.key[name][0]))
            values.append(block.value[name][1].weight @ norm(f, block.value[name][0]))
    q = block.query[1].weight @ norm(u, block.query[0])
    u = norm(u + block.out.weight @ attention(q, keys, values), block.norm)
    return x + block.mlp[2].weight @ gelu(block.mlp[0].weight @ u)


class Reference:
    """All projected features of one view, as lists per cell."""

    def __init__(self, sva: SVA, features: dict[str, FeatureMap], view: int) -> None:
        projected, self.seen = {}, {}
        for name, m in WINDOWS.items():
            feature, side = features[name], m * SIDE
            mask = torch.ones(side**2, dtype=torch.bool) if feature.mask is None else feature.mask[view]
            tokens = [project_in(t, sva.project_in[name]) for t in feature.tokens[view]]
            projected[name] = [t if real else None for t, real in zip(tokens, mask, strict=True)]
        real = [t for t in projected["a"] if t is not None]
        self.g = sum(real) / len(real)
        for i in range(SIDE):
            for j in range(SIDE):
                self.seen[i, j] = {
                    name: [projected[name][(m * i + a) * m * SIDE + m * j + b] for a in range(m) for b in range(m)]
                    for name, m in WINDOWS.items()
                }

    def block(self, block: SVABlock, x: Tensor) -> Tensor:
        cells = zip(x, self.seen.values(), strict=True)
        return torch.stack([block_on_one_cell(block, token, self.g, seen) for token, seen in cells])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_tokens_follow_the_formulas(
    groups: int, masked: bool, features: dict[str, FeatureMap], masks: dict[str, Tensor]
) -> None:
    sva = make_sva(groups=groups, depth=2)
    for name, feature in features.items():
        features[name] = feature._replace(mask=masks[name] if masked else None)
    out = sva(features)
    for view in range(2):
        reference, joined = Reference(sva, features, view), []
        for query, sampler in zip(sva.queries, sva.samplers, strict=True):
            x = torch.stack([query] * SIDE**2)
            for block in sampler:
                x = reference.block(block, x)
            joined.append(x)
        expected = sva.project_out(torch.cat(joined, dim=1))
        torch.testing.assert_close(out[view], expected, rtol=1e-6, atol=1e-9)


def test_llm_blocks_follow_the_formulas(features: dict[str, FeatureMap], masks: dict[str, Tensor]) -> None:
    sva, hidden = make_sva(depth=1), torch.randn(2, SIDE**2, 10, dtype=torch.float64)
    for name, feature in features.items():
        features[name] = feature._replace(mask=masks[name])
    block = sva.layer_blocks(5)[3]
    out = block(hidden, sva.memory(features))
    for view in range(2):
        expected = Reference(sva, features, view).block(block, hidden[view])
        torch.testing.assert_close(out[view], expected, rtol=1e-6, atol=1e-9)


# ---- invariants


def test_one_key_gives_the_projected_value(make_feature: Callable[..., FeatureMap]) -> None:
    sva = randomised(SVA({"a": 5}, 10, side=3, hidden=8, heads=2, depth=1))
    maps, u = sva.memory({"a": make_feature((3, 3), 5)}), torch.randn(2, 9, 8, dtype=torch.float64)
    block = sva.samplers[0][0]
    torch.testing.assert_close(block._aggregate(u, maps), block.out(block.value["a"](maps["a"].tokens)))


def test_features_outside_a_window_do_not_matter(features: dict[str, FeatureMap]) -> None:
    sva = make_sva(depth=2)
    before = sva(features)
    changed = features["b"].tokens.view(2, 6, 6, 6).clone()
    changed[:, 4:, 4:] = 9.0  # window of the last cell
    after = sva({**features, "b": FeatureMap(changed.flatten(1, 2), (6, 6))})
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_padded_square_equals_cropped(features: dict[str, FeatureMap], rows_mask: Callable[..., Tensor]) -> None:
    """Inference crops what training masks: both must agree on the kept cells."""
    sva, hidden = make_sva(depth=1), torch.randn(2, SIDE**2, 10, dtype=torch.float64)
    block, kept = sva.layer_blocks(5)[0], {"a": 6, "b": 24}  # two of three rows of cells
    maps = sva.memory(features)
    cropped = {k: FeatureMap(f.tokens[:, : kept[k]], (f.grid[0] * 2 // 3, f.grid[1])) for k, f in maps.items()}
    for name, feature in maps.items():
        maps[name] = feature._replace(mask=rows_mask(feature.grid, feature.grid[0] * 2 // 3))
    torch.testing.assert_close(block(hidden, maps)[:, :6], block(hidden[:, :6], cropped))


def test_gradients_reach_the_llm_blocks(features: dict[str, FeatureMap]) -> None:
    sva = make_sva()
    x, maps = sva(features), sva.memory(features)
    for block in sva.layer_blocks(5).values():
        x = block(x, maps)
    x.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in sva.parameters())


def test_maps_are_resized_to_their_windows(make_feature: Callable[..., FeatureMap]) -> None:
    features = {"a": make_feature((5, 4), 5), "b": make_feature((7, 7), 6)}
    maps = make_sva().memory(features)
    assert maps["a"].grid == (3, 3) and maps["b"].grid == (6, 6)


# ---- placement and size

PUBLISHED = {  # LLM width, layers, stride, blocks, layers with a block, millions of parameters
    "8b": (4096, 32, 3, 10, range(0, 28, 3), 302.8),
    "13b": (5120, 40, 4, 10, range(0, 37, 4), 334.2),
    "34b": (7168, 60, 7, 9, range(0, 57, 7), 375.1),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_size_and_placement(size: str) -> None:
    width, layers, stride, blocks, placed, millions = PUBLISHED[size]
    dims = {"siglip": 1152, "clip": 1024, "dinov2": 1536, "convnext": 5760}
    with torch.device("meta"):
        sva = SVA(dims, width, windows={"convnext": 4}, stride=stride, blocks=blocks)
        assert list(sva.layer_blocks(layers)) == list(placed)
    assert sum(p.numel() for p in sva.parameters()) == pytest.approx(millions * 1e6, rel=0.0005)
    assert sva.num_tokens({}) == 576


def test_layer_blocks_are_made_once_and_fit_the_llm() -> None:
    sva = SVA({"a": 5}, 10, side=2, hidden=8, heads=2)
    assert list(sva.layer_blocks(2)) == [0] and list(sva.layer_blocks(4)) == [0]  # none behind the last layer
    first = sva.layer_blocks(6)
    assert list(first) == [0, 3] and sva.layer_blocks(6)[3] is first[3]
    assert list(SVA({"a": 5}, 10, hidden=8, heads=2, blocks=0).layer_blocks(6)) == []


def test_wrong_settings_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"connector.heads = 16 does not divide connector.hidden = 100"):
        SVA({"a": 5}, 10, hidden=100)
    with pytest.raises(ValueError, match=r"connector.windows.a = 0: at least 1"):
        SVA({"a": 5}, 10, windows={"a": 0})
    with pytest.raises(ValueError, match=r"connector.start = 8: the LLM's 4 layers allow 0 to 2"):
        SVA({"a": 5}, 10, hidden=8, heads=2, start=8).layer_blocks(4)
