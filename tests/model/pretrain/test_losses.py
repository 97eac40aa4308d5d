"""Losses against the papers' formulas in float64, and across processes and parts of a batch: the same gradient."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pretrain_parts import small_batch, small_model
from processes import SERVER
from torch import Tensor
from torch.nn import functional as F

from vlm_lab.batch import IGNORE
from vlm_lab.model.pretrain.losses import info_nce, sigmoid_loss

ALL = torch.ones(5, dtype=torch.bool)


def unit_vectors(count: int, dim: int, seed: int) -> Tensor:
    return F.normalize(
        torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def test_info_nce_is_the_formula() -> None:
    image, text, scale = unit_vectors(5, 7, 0), unit_vectors(5, 7, 1), 9.0
    e = np.exp(scale * image.numpy() @ text.numpy().T)
    by_image, by_text = -np.log(np.diag(e) / e.sum(1)).mean(), -np.log(np.diag(e) / e.sum(0)).mean()
    assert float(info_nce(image, text, torch.tensor(scale), ALL)) == pytest.approx((by_image + by_text) / 2, abs=1e-12)


def test_sigmoid_loss_is_the_formula() -> None:
    image, text, scale, bias = unit_vectors(5, 7, 0), unit_vectors(5, 7, 1), 9.0, -2.5
    sign = 2 * np.eye(5) - 1
    expected = np.log1p(np.exp(-sign * (scale * image.numpy() @ text.numpy().T + bias))).sum() / 5
    found = sigmoid_loss(image, text, torch.tensor(scale), torch.tensor(bias), ALL)
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_info_nce_of_random_vectors_is_near_the_logarithm_of_their_number() -> None:
    """At a scale of 1 cosines of random directions in 512 dimensions hardly differ."""
    found = info_nce(unit_vectors(256, 512, 0), unit_vectors(256, 512, 1), torch.tensor(1.0), torch.ones(256).bool())
    assert float(found) == pytest.approx(math.log(256), abs=0.01)


@pytest.mark.parametrize("loss", [info_nce, lambda i, t, s, v: sigmoid_loss(i, t, s, torch.tensor(-1.0), v)])
def test_invalid_pairs_count_nowhere(loss: Callable[..., Tensor]) -> None:
    image, text, scale = unit_vectors(5, 7, 0), unit_vectors(5, 7, 1), torch.tensor(5.0)
    valid = torch.tensor([True, False, True, True, False])
    expected = loss(image[valid], text[valid], scale, torch.ones(3, dtype=torch.bool))
    image.requires_grad_()
    found = loss(image, text, scale, valid)
    assert found.item() == pytest.approx(float(expected), abs=1e-12)
    found.backward()
    assert image.grad is not None and not image.grad[~valid].any()
    assert loss(image, text, scale, torch.zeros(5, dtype=torch.bool)).item() == 0


def gradients(contrastive: str | None, micro_batch: int | None = None, part: slice = slice(None)) -> dict[str, Tensor]:
    """Of the whole model's loss in float64, over `part` of the batch in this process."""
    model = small_model(contrastive=contrastive).double()
    model(small_batch()[part], micro_batch).total.backward()
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("contrastive", ["infonce", "sigmoid", None])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(contrastive: str | None, micro_batch: int) -> None:
    whole, parts = gradients(contrastive), gradients(contrastive, micro_batch)
    for name, gradient in whole.items():
        assert float((parts[name] - gradient).abs().max()) <= 1e-12, name


def one_of_two(rank: int, folder: str, losses: tuple[str, ...]) -> None:
    """This process's half of the batch; the sums of the gradients over both are written to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for contrastive in losses:
        found = gradients(contrastive, micro_batch=2, part=slice(4 * rank, 4 * rank + 4))
        for gradient in found.values():
            dist.all_reduce(gradient)
        torch.save(found, f"{folder}/{contrastive}.{rank}")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    """Captions of unequal length and an invalid pair are in the batch, so shares are unequal, too."""
    batch, losses = small_batch(), ("infonce", "sigmoid")
    lengths = (batch.targets != IGNORE).sum(1)
    assert lengths[:4].sum() != lengths[4:].sum() and not batch.valid.all()
    processes = [SERVER.Process(target=one_of_two, args=(rank, str(tmp_path), losses)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    for contrastive in losses:
        expected = gradients(contrastive)
        for rank in range(2):
            found = torch.load(tmp_path / f"{contrastive}.{rank}", weights_only=True)
            for name, gradient in expected.items():
                assert float((found[name] - gradient).abs().max()) <= 1e-6, name
