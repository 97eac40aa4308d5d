"""What only a CUDA device can show; skipped without one. Nothing here is downloaded.

python -m pytest tests/test_gpu.py -n 8        about two minutes
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, ColourSource
from torch import nn
from torch.nn import functional as F

from vlm_lab.data.loader import pack
from vlm_lab.data.process import Processor
from vlm_lab.model.attention import for_kernel, packed_attention
from vlm_lab.model.connectors.attention import attend
from vlm_lab.model.loss import blockwise_cross_entropy
from vlm_lab.model.vlm import VLM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = [0, 700, 701, 1000, 1300, 1337]
TINY = [
    "trainer.num_workers=0",
    "trainer.devices=1",
    "bootstrap=[]",
    "eval.limit=8",
    "eval.max_new_tokens=4",
    *(f"data.sources.{name}.size=200" for name in ("captions", "questions")),
]


def run(output: Path, *overrides: str, trainer: str = "gpu", stages: Sequence[str] = ("align", "instruct")) -> Path:
    """`python train.py` with the tiny parts on the GPU, 12 steps a stage: its run folder."""
    chosen = [f"trainer={trainer}", f"stage=[{','.join(stages)}]", *(f"stages.{name}.steps=12" for name in stages)]
    command = [sys.executable, str(ROOT / "train.py"), f"output={output}", *chosen, *TINY, *overrides]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    environment.pop("DS_ACCELERATOR", None)
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (output / "runs").glob("*")
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("option", [{}, {"sliding_window": 64}])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_the_kernel_equals_sample_by_sample(kv_heads: int, option: dict[str, int]) -> None:
    """Flash attention over a packed row in bf16 against float64, output and gradients: within 2 % of the largest."""
    torch.manual_seed(0)
    row = [torch.randn(1, heads, BOUNDS[-1], 64, dtype=torch.float64) for heads in (8, kv_heads, kv_heads)]
    weight = torch.randn(1, BOUNDS[-1], 8, 64, dtype=torch.float64)
    found = {}
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        inputs = [x.to(device, dtype).requires_grad_() for x in row]
        kernel = for_kernel(BOUNDS, torch.device(device))
        assert bool(kernel) == (device == "cuda")
        out, _ = packed_attention(nn.Module(), *inputs, None, cu_seq_lens_q=BOUNDS, scaling=0.125, **kernel, **option)
        (out * weight.to(device, dtype)).sum().backward()
        found[device] = [out.detach(), *(x.grad for x in inputs)]
    for ours, expected in zip(found["cuda"], found["cpu"], strict=True):
        assert float((ours.cpu().double() - expected).abs().max() / expected.abs().max()) < 0.02


def test_a_packed_row_in_half_precision(make_vlm: Callable[..., VLM], processor: Processor) -> None:
    """Loss and gradient norm of a whole VLM under autocast within 1 % of float32 on the CPU."""
    row = pack([processor.example(ColourSource()[index]) for index in range(6)], processor)
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        vlm = make_vlm().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = vlm(row.to(device)) / 10
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in vlm.parameters() if p.grad is not None])
        found[device] = torch.stack([loss.detach().cpu(), norm.cpu()])
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=0.01, atol=0)


def test_large_vocabularies_never_hold_their_logits() -> None:
    """4096 positions x 151,936 tokens in bf16: less than half of the plain loss's memory, the same gradient."""
    torch.manual_seed(0)
    hidden = torch.randn(4096, 896, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(151936, 896, device="cuda") / 30).to(torch.bfloat16)
    targets = torch.randint(0, 151936, (4096,), device="cuda")

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum")

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return blockwise_cross_entropy(h, w, None, targets)

    found, peaks = [], []
    for loss in (plain, ours):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = loss(*inputs) / 4096
        value.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append([value.detach(), *(x.grad.float() for x in inputs)])
        del inputs
    assert peaks[1] < peaks[0] / 2, peaks
    for mine, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_more_windows_than_one_launch_takes() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(70_000, length, 16) for length in (1, 4, 4))
    on_gpu = attend(q.cuda(), k.cuda(), v.cuda(), heads=2)
    torch.testing.assert_close(on_gpu.cpu(), attend(q, k, v, heads=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "32-true"])
def test_trains_and_evaluates(precision: str, tmp_path: Path) -> None:
    folder = run(tmp_path, f"trainer.precision={precision}")
    logged = lines(folder)
    losses = [line["loss"] for line in logged if line["stage"] == "instruct"]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert all(0 < line["mfu"] < 1 for line in logged) if precision != "32-true" else "mfu" not in logged[0]
    record = json.loads((folder / "stages" / "instruct" / "stage.json").read_text())
    assert 0 < record["peak_gib"] < 20


def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    """Losses of the first steps within 2 % of the uncompiled ones."""
    plain, compiled = run(tmp_path / "plain"), run(tmp_path / "compiled", "trainer.compile=true")
    for ours, expected in zip(lines(compiled), lines(plain), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit", "lion8bit", "muon"])
def test_optimizers(optimizer: str, tmp_path: Path) -> None:
    folder = run(tmp_path, f"stages.instruct.optimizer={optimizer}", stages=["instruct"])
    assert lines(folder)[-1]["loss"] < lines(folder)[0]["loss"]


@pytest.mark.parametrize("adapt", ["lora", "dora", "qlora"])
def test_adapters(adapt: str, tmp_path: Path) -> None:
    rule = f"stages.instruct.train.llm={{lr: 1.0e-2, adapt: {adapt}, rank: 8}}"
    folder = run(tmp_path, rule, "stages.instruct.optimizer=adamw", stages=["instruct"])
    assert lines(folder)[-1]["loss"] < lines(folder)[0]["loss"]


@pytest.mark.parametrize("strategy", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_zero(strategy: str, tmp_path: Path) -> None:
    """Both stages, evaluation after the second; the losses of one device without sharding, within 1 %."""
    pytest.importorskip("deepspeed")
    adamw = [f"stages.{stage}.optimizer=adamw" for stage in ("align", "instruct")]
    folder = run(tmp_path / "sharded", *adamw, trainer=strategy)
    plain = run(tmp_path / "plain", *adamw)
    for ours, expected in zip(lines(folder), lines(plain), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=0.01)
    assert (folder / "evaluation.json").exists()


def test_out_of_memory_says_what_would_fit(tmp_path: Path) -> None:
    """The same stage again, in a process that may take 0.05 % of the device."""
    sizes = [f"stages.align.{field}=512" for field in ("batch", "micro_batch")]
    folder = run(tmp_path, "stages.align.steps=1", *sizes, stages=["align"])
    limit = "import sys, torch; torch.cuda.set_per_process_memory_fraction(0.0005)"
    code = f"{limit}; from vlm_lab import fit; fit.main()"
    again = tmp_path / "again"
    again.mkdir()
    command = [sys.executable, "-c", code, str(folder), "--stage", "align", "--into", str(again)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert "what needs less: stages.align.micro_batch=256 (now 512, same result)" in result.stderr
