"""Pretraining of a vision encoder with captions: CLIP, SigLIP, OpenVision and OpenVision 2 from the same parts.

text (bidirectional text tower), decoder (caption decoder with learnable queries), losses (exact across processes),
dual (`DualEncoder`: an encoder with its towers, images and captions in, losses out), kept (only some patches enter the
encoder), masked and two_views (self-supervised, for any encoder), resolution (weights of an earlier stage, positions of
another grid), naming (timm's and open_clip's names for the weights).

Nothing here reads files or configurations: data/pretrain.py makes the batches.
"""

from vlm_lab.model.pretrain.dual import DualEncoder, Towers
from vlm_lab.model.pretrain.masked import MaskedEncoder
from vlm_lab.model.pretrain.two_views import TwoViews

__all__ = ["DualEncoder", "MaskedEncoder", "Towers", "TwoViews"]
