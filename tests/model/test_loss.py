"""Blockwise cross-entropy: loss and gradients of the plain one, in less memory."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT, ColourSource, tiny_vlm
from torch import Tensor
from torch.nn import functional as F

from vlm_lab.data.loader import pack
from vlm_lab.data.process import Processor
from vlm_lab.model import loss
from vlm_lab.model.loss import blockwise_cross_entropy


def parts(bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, requires_grad=True), torch.randn(101, 16, requires_grad=True)
    return hidden, weight, torch.randn(101, requires_grad=True) if bias else None, torch.randint(0, 101, (37,))


@pytest.mark.parametrize("block", [1, 8, 37, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_loss(block: int, bias: bool) -> None:
    """Relative 1e-6, in the loss and in every gradient."""
    hidden, weight, offset, targets = parts(bias)
    inputs = [t for t in (hidden, weight, offset) if t is not None]
    plain = F.cross_entropy(F.linear(hidden, weight, offset), targets, reduction="sum") / 7
    ours = blockwise_cross_entropy(hidden, weight, offset, targets, block) / 7
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for mine, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, targets = parts(False)
    blockwise_cross_entropy(hidden, weight.detach(), None, targets, 8).backward()
    assert weight.grad is None and hidden.grad is not None
    assert float(blockwise_cross_entropy(hidden[:0], weight, None, targets[:0])) == 0.0


def test_the_model_uses_it_for_large_logits(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a whole VLM, with tied embeddings or not, and not for models that change their logits."""
    examples = [processor.example(ColourSource()[index]) for index in range(4)]
    batch = pack(examples, processor)
    for llm, used in (("qwen2", True), ("gemma2", False)):
        torch.manual_seed(0)
        vlm = tiny_vlm(llm)
        found = {}
        for limit in (2**26, 100):
            monkeypatch.setattr(loss, "SMALL", limit)
            vlm.zero_grad()
            total = vlm(batch)
            total.backward()
            found[limit] = [total.detach(), *(p.grad.clone() for p in vlm.parameters() if p.grad is not None)]
        assert loss.by_blocks(vlm.llm, 50) == used
        for ours, plain in zip(found[100], found[2**26], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    assert vlm.llm(input_ids=batch.input_ids.clamp(min=0)).logits.shape[-1] == 400  # the head is back


def peak_mib(call: str) -> float:
    """Growth of the resident memory of a process of its own over one forward and backward pass.

    Not by `ru_maxrss`: that begins at what the parent had.
    """
    code = f"""
import re, torch
from pathlib import Path
from torch.nn import functional as F
from vlm_lab.data.loader import pack
from vlm_lab.data.process import Processor
from vlm_lab.model import loss
from vlm_lab.model.loss import blockwise_cross_entropy as blockwise
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
hidden, weight = torch.randn(2048, 32, requires_grad=True), torch.randn(30000, 32, requires_grad=True)
targets = torch.randint(0, 30000, (2048,))
before = peak()
({call}).backward()
print((peak() - before) / 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(result.stdout)


def test_logits_never_materialise() -> None:
    """2048 x 30000 logits are 234 MiB; the plain loss holds them and their gradient, ours a block of 128 positions."""
    plain = peak_mib("F.cross_entropy(F.linear(hidden, weight), targets, reduction='sum')")
    ours = peak_mib("blockwise(hidden, weight, None, targets, 128)")
    assert plain > 300
    assert ours < 100
