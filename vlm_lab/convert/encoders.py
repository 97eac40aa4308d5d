"""An encoder as a timm model: the folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.

Weights carry timm's names; the blocks that the VLM does not use are gone, and so is the norm behind them unless it is
in use. `pretrained_cfg_overlay={"file": "FOLDER/model.safetensors"}` works as well, with the arguments in config.json.
OpenVision's encoders become timm's plain Vision Transformer, their computed positions written out.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vlm_lab.components import Node
from vlm_lab.model.encoders.openvision import OpenVisionViT

SETTINGS = {"patch_size": "patch_size", "width": "embed_dim", "heads": "num_heads"}  # ours, timm's


def save_encoder(name: str, node: Node, encoder: Any, folder: Path) -> None:
    """Write config.json and model.safetensors. ValueError if timm has no model of just the parts in use."""
    model = getattr(encoder, "model", None)
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"encoder {name} is no model of timm: export it with --format native")
    architecture, arguments, state = described(node, encoder)
    with torch.device("meta"):
        shell = timm.create_model(architecture, num_classes=0, **arguments)
    if odd := sorted(shell.state_dict().keys() ^ state.keys()):
        raise ValueError(f"encoder {name}: layer = {node['layer']} leaves a part of {architecture} unused ({odd[0]})")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(card(architecture, arguments, encoder), indent=1))


def described(node: Node, encoder: Any) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(timm's architecture, its arguments, the weights) of an encoder that was built from `node`."""
    model, architecture = encoder.model, node["name"].split(".")[0]
    arguments = {theirs: node[ours] for ours, theirs in SETTINGS.items() if node.get(ours) is not None}
    arguments |= {key: value for key, value in (node.get("options") or {}).items() if value is not None}
    state = model.state_dict()
    if not isinstance(model, VisionTransformer):
        return architecture, arguments, state
    arguments |= {"img_size": encoder.image_size, "depth": len(model.blocks)}
    arguments |= {"global_pool": "", "final_norm": bool(encoder.norm)}
    if not isinstance(model, OpenVisionViT):
        return architecture, arguments, state
    block: Any = model.blocks[0]
    arguments |= {"patch_size": encoder.stride, "embed_dim": model.embed_dim, "num_heads": block.attn.num_heads}
    arguments |= {"mlp_ratio": block.mlp.fc1.out_features / model.embed_dim, "no_embed_class": True}
    zeros = torch.zeros(model.embed_dim)
    return "vit_base_patch16_224", arguments, {**state, "pos_embed": model.pos_embed, "patch_embed.proj.bias": zeros}


def card(architecture: str, arguments: dict[str, Any], encoder: Any) -> dict[str, Any]:
    """The config.json of timm's hub format."""
    size = [3, encoder.image_size, encoder.image_size]
    preprocessing = {"input_size": size, "mean": list(encoder.mean), "std": list(encoder.std)}
    fixed = {"interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 0, "fixed_input_size": True}
    pretrained = {**preprocessing, **fixed, "classifier": None, "pool_size": None}
    return {"architecture": architecture, "num_classes": 0, "model_args": arguments, "pretrained_cfg": pretrained}
