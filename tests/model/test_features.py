"""Masks of the padding that made an image square: Cambrian-1's rule, at each encoder's own resolution."""

import pytest
import torch

from vlm_lab.batch import Block, Layout
from vlm_lab.model.features import FeatureMap, without_padding

ONE = Block((1, 1), (0, 0), (1, 1), (1, 1))


@pytest.mark.parametrize("side", [24, 27, 96])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 300), (4000, 7)])
def test_the_padding_is_masked(size: tuple[int, int], side: int) -> None:
    feature = FeatureMap(torch.zeros(1, side * side, 2), (side, side))
    mask = without_padding(feature, [Layout((ONE,), padded=size)]).mask.view(side, side)
    margin = (side - min(size) * side // max(size)) // 2
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[margin : side - margin] = True
    assert torch.equal(mask, expected if size[0] >= size[1] else expected.T)


def test_other_views_of_the_batch_are_whole() -> None:
    feature = FeatureMap(torch.zeros(3, 16, 2), (4, 4))
    mask = without_padding(feature, [Layout((ONE, ONE)), Layout((ONE,), padded=(100, 50))]).mask
    assert mask.sum(1).tolist() == [16, 16, 8]


def test_no_mask_without_need() -> None:
    feature = FeatureMap(torch.zeros(1, 4, 2), (2, 2))
    assert without_padding(feature, [Layout((ONE,))]) is feature and without_padding(feature, []) is feature
