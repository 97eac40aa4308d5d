"""What the callbacks cost: the time inside their hooks beside the time of a step, on the shape of train_throughput.py.

    python benchmarks/overhead.py

CPU seconds of this process, by hooks that run once per row or step; what runs once per stage (the trainability
contract's hashes of all weights, before and after) is printed by itself.
"""

import sys
import tempfile
import time
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import config, parts  # noqa: E402
from benchmarks.train_throughput import write_records  # noqa: E402

STEPS = 40
PER_ROW = ("on_train_batch_start", "on_before_backward", "on_train_batch_end", "on_before_optimizer_step")
PER_STAGE = ("on_train_start", "on_train_end")


def main() -> None:
    import torch

    from vlm_lab import build
    from vlm_lab.callbacks import BadRecords, Checkpoints, Contract, Meter, Pulse

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "data", 24, 24)
        cfg = config(folder / "data")
        module, loader = parts(cfg, "align", STEPS)
        callbacks = [
            Meter("bench", folder / "metrics.jsonl"),
            BadRecords(0, folder / "bad.jsonl"),
            build.features(cfg, loader),
            Pulse(folder, "bench", 0),
            Contract(),
            Checkpoints(folder / "checkpoints", 500, 2),
        ]
        spent = {(type(c).__name__, hook): clocked(c, hook) for c in callbacks for hook in (*PER_ROW, *PER_STAGE)}
        start = time.process_time()
        build.trainer(cfg, module.stage, loader, callbacks).fit(module, loader)
        total = time.process_time() - start
    report(spent, total)


def clocked(callback: Any, hook: str) -> list[float]:
    """Have a callback's hook note its CPU seconds."""
    calls: list[float] = []
    method = getattr(callback, hook)

    @wraps(method)
    def timed(*args: Any) -> None:
        start = time.process_time()
        method(*args)
        calls.append(time.process_time() - start)

    setattr(callback, hook, timed)
    return calls


def report(spent: dict[tuple[str, str], list[float]], total: float) -> None:
    first = spent["Contract", "on_train_batch_start"].pop(0)  # the contract's check before the first step
    once = first + sum(sum(calls) for (_, hook), calls in spent.items() if hook in PER_STAGE)
    rows = {name: sum(sum(c) for (n, hook), c in spent.items() if n == name and hook in PER_ROW) for name, _ in spent}
    steps = total - once
    for name, seconds in rows.items():
        print(f"  {name:12} {1e3 * seconds / STEPS:7.3f} ms a step, {100 * seconds / steps:5.2f} %")
    per_step = sum(rows.values())
    print(f"step {1e3 * steps / STEPS:.1f} ms of CPU, callbacks {100 * per_step / steps:.2f} % of it")
    print(f"once per stage: {once:.2f} s of CPU (hashes of all weights, before and after)")


if __name__ == "__main__":
    main()
