"""Cross-entropy of a language model without its logits: for one block of positions at a time.

A vocabulary of 150 thousand makes logits the largest tensor of training (4096 positions: 2.3 GiB in float32, and as
much again for their gradient). Here a block's logits are made, used for loss and gradients, and dropped in the forward
pass; the backward pass only scales. Equal to `F.cross_entropy` on whole logits, up to the order of sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

BLOCK = 1024  # positions; their logits at a vocabulary of 150k are 0.6 GiB in float32
SMALL = 2**26  # logits: up to 256 MiB in float32, whole ones are held, which is faster
RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # settings of models that change logits


class BlockwiseCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, block: int) -> Tensor:
        """hidden [N, D], weight [V, D], bias [V] or None, targets [N] -> the sum of the N cross-entropies, float32."""
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [
            torch.zeros_like(tensor, dtype=torch.float32) if need and tensor is not None else None
            for tensor, need in zip((hidden, weight, bias), needs[:3], strict=True)
        ]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), block):
            part = slice(start, start + block)
            logits = F.linear(hidden[part], weight, bias).float()  # [block, V]
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            total += (normaliser[:, 0] - logits.gather(1, targets[part, None])[:, 0]).sum()
            slope = logits.sub_(normaliser).exp_()  # softmax, in the place of the logits
            slope.scatter_add_(1, targets[part, None], slope.new_full((len(slope), 1), -1.0))
            accumulate(grads, hidden[part], weight, slope.to(hidden.dtype), part)
        inputs: list[Any] = [hidden, weight, bias]
        pairs = zip(grads, inputs, strict=True)
        ctx.save_for_backward(*(None if grad is None else grad.to(given.dtype) for grad, given in pairs))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        scaled = [None if grad is None else grad * outputs[0].to(grad.dtype) for grad in ctx.saved_tensors]
        return (*scaled, None, None)


def accumulate(grads: list[Tensor | None], hidden: Tensor, weight: Tensor, slope: Tensor, part: slice) -> None:
    """Add one block's share to the gradients of hidden states, weight and bias; `slope` is dloss/dlogits [block, V]."""
    by_hidden, by_weight, by_bias = grads
    if by_hidden is not None:
        by_hidden[part] = slope @ weight
    if by_weight is not None:
        by_weight += slope.T @ hidden
    if by_bias is not None:
        by_bias += slope.sum(0)


def blockwise_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, block: int = BLOCK
) -> Tensor:
    """Sum over N positions of the cross-entropy of softmax(hidden @ weight.T + bias): a scalar in float32."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    total: Tensor = BlockwiseCrossEntropy.apply(hidden, weight, bias, targets, block)  # type: ignore[no-untyped-call]
    return total


def by_blocks(llm: Any, positions: int) -> bool:
    """Whether the loss of `positions` tokens is better computed blockwise, and can be.

    It needs a plain output head whose weights lie on this process, and a model that leaves its logits as they are.
    """
    head = llm.get_output_embeddings()
    if type(head) is not nn.Linear or positions * head.out_features <= SMALL or hasattr(head.weight, "ds_id"):
        return False
    return all(getattr(llm.config, setting, None) in (None, 1, 1.0) for setting in RESCALED)


@contextmanager
def headless(llm: Any) -> Iterator[nn.Linear]:
    """Within the context `llm` returns what its output head would read, in the place of logits; gives the head."""
    head = llm.get_output_embeddings()
    head.forward = lambda hidden: hidden
    try:
        yield head
    finally:
        del head.forward
