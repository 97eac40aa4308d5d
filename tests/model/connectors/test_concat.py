"""Channel concat against bilinear resizing written out by hand, and the shared resize with padding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlm_lab.model.connectors.concat import Concat
from vlm_lab.model.connectors.spatial import resize
from vlm_lab.model.features import FeatureMap


def bilinear(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[h*w, C] -> [side*side, C], half-pixel centres: source row = (i + 0.5) * h / side - 0.5, clamped to the map."""
    (h, w), out = grid, []
    for i in range(side):
        for j in range(side):
            y, x = max((i + 0.5) * h / side - 0.5, 0.0), max((j + 0.5) * w / side - 0.5, 0.0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            dy, dx = y - top, x - left
            above = (1 - dx) * tokens[top * w + left] + dx * tokens[top * w + right]
            below = (1 - dx) * tokens[bottom * w + left] + dx * tokens[bottom * w + right]
            out.append((1 - dy) * above + dy * below)
    return torch.stack(out)


def test_every_grid_is_resized_and_channels_joined_in_order(make_feature: Callable[..., FeatureMap]) -> None:
    connector = Concat({"a": 3, "b": 5, "c": 2}, 7, side=4).double()
    grids = {"a": (4, 4), "b": (3, 5), "c": (9, 9)}
    features = {k: make_feature(grids[k], dim, seed=i) for i, (k, dim) in enumerate(connector.dims.items())}
    joined = [torch.cat([bilinear(features[k].tokens[v], grids[k], 4) for k in ("a", "b", "c")], 1) for v in range(2)]
    shuffled = {k: features[k] for k in ("c", "a", "b")}
    torch.testing.assert_close(connector(shuffled), connector.project(torch.stack(joined)), rtol=1e-9, atol=1e-9)


def test_without_side_the_first_encoder_decides() -> None:
    connector = Concat({"a": 3, "b": 5}, 7, side=None)
    assert connector.grid({"b": (8, 8), "a": (3, 4)}) == (3, 4)


def test_resize_ignores_padding(make_feature: Callable[..., FeatureMap], rows_mask: Callable[..., Tensor]) -> None:
    """Constant real patches stay that constant next to padding, and the padded rows stay padded."""
    feature = make_feature((6, 6), 2)
    mask = rows_mask((6, 6), 4)
    feature = FeatureMap(torch.where(mask[..., None], 3.0, feature.tokens), (6, 6), mask)
    small = resize(feature, (3, 3))
    assert small.mask.tolist() == [[True] * 6 + [False] * 3] * 2
    torch.testing.assert_close(small.tokens[:, :6], torch.full((2, 6, 2), 3.0, dtype=torch.float64))


def test_resize_keeps_a_grid_that_fits(make_feature: Callable[..., FeatureMap]) -> None:
    feature = make_feature((4, 4), 2)
    assert resize(feature, (4, 4)) is feature


def test_wrong_settings_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"connector.side = 0: at least 1"):
        Concat({"a": 3}, 7, side=0)
