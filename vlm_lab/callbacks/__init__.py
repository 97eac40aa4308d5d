"""What happens around the steps of a stage; one file per concern."""

from vlm_lab.callbacks.checkpoints import AtomicFiles, Checkpoints, Preempted, latest
from vlm_lab.callbacks.contract import Contract
from vlm_lab.callbacks.features import Features
from vlm_lab.callbacks.meter import BadRecords, Meter
from vlm_lab.callbacks.pulse import Pulse

__all__ = ["AtomicFiles", "BadRecords", "Checkpoints", "Contract", "Features", "Meter", "Preempted", "Pulse", "latest"]
