"""Fixtures of the connector tests: random feature maps."""

from collections.abc import Callable

import pytest
import torch

from vlm_lab.model.features import FeatureMap


@pytest.fixture
def make_feature() -> Callable[..., FeatureMap]:
    """Random `FeatureMap(tokens [views, h*w, dim])`, always the same for the same arguments; float64 by default."""

    def make(
        grid: tuple[int, int],
        dim: int,
        *,
        views: int = 2,
        mask: torch.Tensor | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> FeatureMap:
        rng = torch.Generator().manual_seed(seed)
        tokens = torch.randn(views, grid[0] * grid[1], dim, generator=rng, dtype=torch.float64)
        return FeatureMap(tokens.to(dtype), grid, mask)

    return make


@pytest.fixture
def rows_mask() -> Callable[..., torch.Tensor]:
    """Mask [views, h*w] that keeps the first `keep` rows of a grid: padding below, as wide images have."""

    def make(grid: tuple[int, int], keep: int, views: int = 2) -> torch.Tensor:
        return (torch.arange(grid[0] * grid[1]) // grid[1] < keep).expand(views, -1)

    return make


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
