"""Average pooling and VILA's mlp_downsample against loops over cells."""

from collections.abc import Callable

import pytest
import torch

from vlm_lab.model.connectors.pixel_shuffle import PixelShuffle
from vlm_lab.model.connectors.pool import AveragePool, MLPDownsample
from vlm_lab.model.features import FeatureMap


@pytest.mark.parametrize("setting", [{"side": 2}, {"stride": 2}])
def test_pool_is_the_mean_of_each_block(setting: dict[str, int], make_feature: Callable[..., FeatureMap]) -> None:
    connector, feature = AveragePool({"a": 5}, 7, **setting).double(), make_feature((4, 4), 5)
    tokens = feature.tokens.view(2, 4, 4, 5)
    cells = [tokens[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2) for j in (0, 2)]
    torch.testing.assert_close(connector({"a": feature}), connector.project(torch.stack(cells, 1)))


def test_pool_averages_real_patches_only(make_feature: Callable[..., FeatureMap]) -> None:
    """3 of 4 rows are real: the lower cells average one row of two patches, not two rows."""
    feature = make_feature((4, 4), 5, views=1)
    feature = feature._replace(mask=torch.arange(16)[None] < 12)
    connector = AveragePool({"a": 5}, 7, side=2).double()
    lower_left = connector.project(feature.tokens[0, [8, 9]].mean(0))
    torch.testing.assert_close(connector({"a": feature})[0, 2], lower_left)


def test_pool_to_a_side_that_does_not_divide_the_grid(make_feature: Callable[..., FeatureMap]) -> None:
    connector = AveragePool({"a": 5}, 7, side=3).double()
    assert connector({"a": make_feature((5, 8), 5)}).shape == (2, 9, 7)


def test_mlp_downsample_is_pixel_shuffle_with_a_norm(make_feature: Callable[..., FeatureMap]) -> None:
    connector, feature = MLPDownsample({"a": 5}, 7).double(), make_feature((4, 6), 5)
    norm, *mlp = connector.project
    plain = PixelShuffle({"a": 5}, 7, factor=2, layers=2).double()
    plain.project = torch.nn.Sequential(norm, *mlp)
    torch.testing.assert_close(connector({"a": feature}), plain({"a": feature}))


def test_mlp_downsample_pads_odd_grids_with_zeros(make_feature: Callable[..., FeatureMap]) -> None:
    connector, feature = MLPDownsample({"a": 5}, 7).double(), make_feature((3, 5), 5, views=1)
    out = connector({"a": feature})
    assert out.shape == (1, 6, 7) and connector.grid({"a": (3, 5)}) == (2, 3)
    corner = torch.cat([feature.tokens[0, 14], torch.zeros(15, dtype=torch.float64)])
    torch.testing.assert_close(out[0, 5], connector.project(corner))


def test_wrong_settings_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"connector.side = 2 and connector.stride = 2: set exactly one"):
        AveragePool({"a": 5}, 7, side=2, stride=2)
    with pytest.raises(ValueError, match=r"connector.stride = 0: at least 1"):
        AveragePool({"a": 5}, 7, stride=0)
    with pytest.raises(ValueError, match=r"connector.stride = 2 does not divide the encoder's 5 x 4 grid"):
        AveragePool({"a": 5}, 7, stride=2).grid({"a": (5, 4)})
    with pytest.raises(ValueError, match=r"connector.side = 12 exceeds the encoder's 8 x 8 grid"):
        AveragePool({"a": 5}, 7, side=12).grid({"a": (8, 8)})
