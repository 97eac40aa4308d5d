"""Which process keeps the others waiting: read from the notes that each leaves in RUN/ranks. No torch in here."""

import json
import time
from pathlib import Path
from typing import Any

PHASES = ("loading", "forward", "backward")  # of a row, in order
WIDTH = 1024  # bytes of a note


def pulse_file(run: Path, rank: int) -> Path:
    return run / "ranks" / f"{rank}.json"


def last_signs(run: Path) -> str:
    """One line: who is behind, and what every process did last. Empty for a run of one process."""
    pulses = {int(path.stem): json.loads(path.read_text()) for path in (run / "ranks").glob("*.json")}
    if len(pulses) < 2:
        return ""
    behind = min(pulses, key=lambda rank: (progress(pulses[rank]), pulses[rank]["at"]))
    others = "; ".join(f"rank {rank}: {sentence(pulse)}" for rank, pulse in sorted(pulses.items()))
    return f"rank {behind} is behind ({others})"


def progress(pulse: dict[str, Any]) -> tuple[int, int]:
    return pulse["row"], PHASES.index(pulse["phase"])


def sentence(pulse: dict[str, Any]) -> str:
    samples = f" of samples {', '.join(pulse['samples'])}" if pulse["samples"] else ""
    return f"{pulse['phase']} in step {pulse['step']}{samples}, {time.time() - pulse['at']:.0f} s ago"
