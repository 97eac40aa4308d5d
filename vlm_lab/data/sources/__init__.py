"""Readers, one file per format, and views that wrap any reader. Their constructor arguments are the YAML keys.

Adding a format: a class with `__len__`, `__getitem__` and `fingerprint` (see `Source`) in a file of its own.
Nothing here imports torch, and no pixel is decoded.
"""

from vlm_lab.data.sources.capped import Capped
from vlm_lab.data.sources.captions import CaptionParquet, WebDataset
from vlm_lab.data.sources.cauldron import Cauldron
from vlm_lab.data.sources.holdout import Holdout
from vlm_lab.data.sources.llava_json import LlavaJson
from vlm_lab.data.sources.obelics import Obelics
from vlm_lab.data.sources.single_turn import SingleTurn

__all__ = ["Capped", "CaptionParquet", "Cauldron", "Holdout", "LlavaJson", "Obelics", "SingleTurn", "WebDataset"]
