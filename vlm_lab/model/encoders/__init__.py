"""Vision encoders: uint8 pixels in, a `FeatureMap` out.

    timm_encoder.py   any model of timm: ViT, CLIP, SigLIP, DINO, EVA, ConvNeXt, SAM, NaFlex, ...
    hf_encoder.py     any vision transformer of transformers
    openvision.py     OpenVision, as models that timm can create

A family is a YAML in `conf/encoder/`; `base.Encoder` is the contract that the rest of the code relies on.
"""

from vlm_lab.model.encoders.base import Encoder
from vlm_lab.model.encoders.hf_encoder import HFEncoder
from vlm_lab.model.encoders.timm_encoder import TimmEncoder

__all__ = ["Encoder", "HFEncoder", "TimmEncoder"]
