"""What happens around the steps of a stage; one file per concern."""

from vlm_lab.callbacks.average import Average
from vlm_lab.callbacks.checkpoints import AtomicFiles, Background, Checkpoints, Preempted, latest
from vlm_lab.callbacks.contract import Contract
from vlm_lab.callbacks.features import Features
from vlm_lab.callbacks.meter import BadRecords, Meter
from vlm_lab.callbacks.pulse import Pulse

__all__ = [
    "AtomicFiles",
    "Average",
    "Background",
    "BadRecords",
    "Checkpoints",
    "Contract",
    "Features",
    "Meter",
    "Preempted",
    "Pulse",
    "latest",
]
