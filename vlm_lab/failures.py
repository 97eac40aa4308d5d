"""Why a training process ended, as one line in RUN/failure.json that the parent shows."""

import json
from pathlib import Path

import torch

from vlm_lab.config import Config
from vlm_lab.pulses import last_signs

FAILURE = "failure.json"


def note_failure(run: Path, rank: int, error: BaseException) -> None:
    """Write the reason, unless it only repeats that another process, which has noted its own, has ended."""
    path = run / FAILURE
    lost = is_lost_contact(error)
    if lost and path.exists():
        return
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    notes = [*getattr(error, "__notes__", ()), last_signs(run) if lost else ""]
    path.write_text(json.dumps({"rank": rank, "reason": "; ".join(filter(None, [reason, *notes]))}))


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, or did not come in time."""
    words = ("timed out", "timeout", "connection closed by peer", "connection reset", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def advice(config: Config, stage: str) -> str:
    """What to change when a stage is out of memory, cheapest first."""
    micro, trainer = config.stages[stage].micro_batch, config.trainer
    stage = stage.partition(".")[0]  # as the command line calls what is spelt out per encoder
    options = [f"stages.{stage}.micro_batch={micro // 2} (now {micro}, same result)"] if micro > 1 else []
    if not trainer.gradient_checkpointing:
        options.append("trainer.gradient_checkpointing=true (same result, a third slower)")
    if trainer.strategy in ("auto", "ddp"):
        options += [
            "trainer=zero2 or zero3",
            f"stages.{stage}.optimizer=adamw8bit",
            f"stages.{stage}.train.llm.adapt=lora",
        ]
    elif "offload" not in trainer.strategy:
        options.append(f"trainer={trainer.strategy}_offload")
    return f"{memory()}what needs less: {', '.join(options)}"


def memory() -> str:
    """How much of the device was in use; empty without one."""
    if not torch.cuda.is_available():
        return ""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} of {total / 2**30:.1f} GiB; "
