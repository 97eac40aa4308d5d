"""Two views of a picture: the loss by its formula in float64, in parts as in one, and what does not count."""

from dataclasses import replace

import pytest
import torch
from pretrain_parts import small_batch, small_encoder

from vlm_lab.batch import CaptionBatch
from vlm_lab.model.pretrain import TwoViews
from vlm_lab.model.pretrain.two_views import SCALE


def parts() -> tuple[TwoViews, CaptionBatch]:
    """A model and eight pictures, the last one invalid; the second view is a little darker than the first."""
    torch.manual_seed(0)
    batch = small_batch()
    return TwoViews("eye", small_encoder()), replace(batch, again=batch.pixels // 2)


def by_the_formula(model: TwoViews, batch: CaptionBatch) -> torch.Tensor:
    """-log softmax of the picture's own other view among all valid ones, both ways, a picture's mean."""
    assert batch.again is not None
    first, second = (model.see(pixels)[batch.valid].double() for pixels in (batch.pixels, batch.again))
    first, second = (view / view.norm(dim=1, keepdim=True) for view in (first, second))
    loss, count = torch.zeros((), dtype=torch.float64), len(first)
    for here, there in ((first, second), (second, first)):
        for row in range(count):
            cosines = torch.stack([here[row] @ there[other] for other in range(count)])
            loss = loss - (SCALE * cosines[row] - (SCALE * cosines).exp().sum().log())
    return loss / (2 * count)


def test_the_loss_is_its_formula() -> None:
    """Within 1e-6 of float64; the invalid picture is no negative either."""
    model, batch = parts()
    losses = model(batch)
    assert losses.total.item() == pytest.approx(by_the_formula(model, batch).item(), abs=1e-6)
    assert losses.caption is None and losses.contrastive is losses.total
    changed = batch.pixels.clone()
    changed[-1] = 0
    assert torch.equal(model(replace(batch, pixels=changed)).total, losses.total)


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_parts_have_the_gradient_of_the_whole(micro_batch: int) -> None:
    model, batch = parts()
    found = []
    for size in (None, micro_batch):
        model.zero_grad()
        model(batch, size).total.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
