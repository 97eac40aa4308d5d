"""Checkpoints out to and in from transformers' own classes, weight by weight, without a change of a single value.

    names.py        weights' names, ours and theirs: one table, read in both directions
    parts.py        configurations of the parts that the families share; refuses what they cannot express
    families.py     the four classes: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Idefics2
    processors.py   their processors: the tokenizer with its new tokens, the chat template, the image processor
    checkpoint.py   `save` a VLM as theirs, `start_from` theirs
    encoders.py     an encoder as a timm model

Only the composition is converted that a class has; anything else is refused with one line that says what is not
expressible.
"""

from vlm_lab.convert.checkpoint import save, start_from
from vlm_lab.convert.encoders import save_encoder

__all__ = ["save", "save_encoder", "start_from"]
