"""Losses of encoder pretraining, exact across processes.

Every function returns this process's share: the sum of the shares over all processes is the loss of the global batch,
and the sum of their gradients is its gradient (`gathered` sends gradients back to where a row came from). Pairs with
`valid` False (records that could not be read) count nowhere. Without a process group everything is local. Features
should come in float32, and autocast be off.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from vlm_lab.batch import IGNORE


def info_nce(image: Tensor, text: Tensor, scale: Tensor, valid: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (arXiv 2103.00020, figure 3), mean over the global batch.

    `image`, `text` [B, E] of length 1, row i of both from the same pair; `scale` multiplies cosines; `valid` [B].
    """
    return (_choose(image, text, scale, valid) + _choose(text, image, scale, valid)) / (2 * _count(valid))


def _choose(queries: Tensor, keys: Tensor, scale: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of finding each query's own key among those of all processes, summed over this process."""
    logits = scale * queries @ gathered(keys).T  # [B, world * B]
    logits = logits.masked_fill(~gathered(valid), torch.finfo(logits.dtype).min)
    return (F.cross_entropy(logits, _own(queries), reduction="none") * valid).sum()


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, valid: Tensor) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, algorithm 1): every image with every text, a pair or not; per global image."""
    logits = scale * image @ gathered(text).T + bias  # [B, world * B]
    sign = torch.full_like(logits, -1.0)
    sign[torch.arange(len(image)), _own(image)] = 1.0
    pairs = valid[:, None] & gathered(valid)
    return -(F.logsigmoid(sign * logits) * pairs).sum() / _count(valid)


def caption_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy of `logits` [n, vocab] at `targets` [n]; divide by `target_count` of the whole batch."""
    return F.cross_entropy(logits, targets, reduction="sum")


def target_count(targets: Tensor) -> Tensor:
    """Caption tokens of the global batch (at least 1); `targets` are this process's."""
    return summed((targets != IGNORE).sum()).clamp(min=1)


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes in rank order, [world * B, ...]; B must be the same on every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    if not x.requires_grad:
        return torch.cat(_all(x))
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """All rows forward; backward, a row's gradients of all processes summed up where the row came from."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.cat(_all(x))

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _all(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def summed(count: Tensor) -> Tensor:
    """The sum over all processes; carries no gradient."""
    total = count.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def _count(valid: Tensor) -> Tensor:
    return summed(valid.sum()).clamp(min=1)


def _own(rows: Tensor) -> Tensor:
    """Where this process's rows stand among the gathered ones, [B]."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return torch.arange(len(rows), device=rows.device) + rank * len(rows)
