"""Pretrained towers under other libraries' names, and back: timm's for the encoder, open_clip's for both towers.

    write_open_clip(model, folder)          then  open_clip.create_model("local-dir:folder"); python -m vlm_lab.export
    save_file(to_timm(model), path)         then  timm.create_model(..., num_classes=out_dim, global_pool="avg"), or
                                            encoder.<name>.weights=path here
    model.load_state_dict(from_open_clip(state, model), strict=False)

Only values are moved and renamed, so features stay the same. The caption decoder has no counterpart and is left out.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlm_lab.model.pretrain.dual import DualEncoder

BLOCK = {  # timm's names to those of OpenAI's CLIP, inside a block
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
VISION = {
    "patch_embed.proj.weight": "conv1.weight",  # which has no bias
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
}
TEXT = {
    "embedding": "token_embedding",
    "positions": "positional_embedding",
    "norm": "ln_final",
    "proj.weight": "text_projection",
}
OTHERS = {
    "towers.image.norm": "visual.ln_post",
    "towers.image.proj.weight": "visual.proj",
    "towers.contrast.log_scale": "logit_scale",
    "towers.contrast.bias": "logit_bias",
}
TRANSPOSED = ("visual.proj", "text.text_projection")  # open_clip multiplies from the right


def to_open_clip(model: DualEncoder) -> dict[str, Tensor]:
    """Weights of both towers as open_clip's `CustomTextCLIP` names them."""
    names = open_clip_names(model)
    state = {
        theirs: as_theirs(theirs, value) for theirs, value in zip(names.values(), values(model, names), strict=True)
    }
    table = vit(model).pos_embed[0]
    if len(table) == vit(model).patch_embed.num_patches:  # none for the class token; OpenVision's are computed
        state["visual.positional_embedding"] = torch.cat([torch.zeros_like(table[:1]), table])
    return {name: value.detach().contiguous().clone() for name, value in state.items()}


def from_open_clip(state: dict[str, Tensor], model: DualEncoder) -> dict[str, Tensor]:
    """The inverse: what `model.load_state_dict(..., strict=False)` takes. ValueError if a tower does not fit."""
    own, out = model.state_dict(), {}
    for name, theirs in open_clip_names(model).items():
        if theirs not in state or state[theirs].numel() != own[name].numel():
            found = "is missing" if theirs not in state else f"has the shape {list(state[theirs].shape)}"
            raise ValueError(f"open_clip weights: {theirs} {found}, {list(own[name].shape)} is expected for {name}")
        value = state[theirs].T if theirs in TRANSPOSED else state[theirs]
        out[name] = value.reshape(own[name].shape)
    return out


def open_clip_names(model: DualEncoder) -> dict[str, str]:
    """{our name: open_clip's} of every weight but the caption decoder's. ValueError if open_clip cannot hold one."""
    check_towers(model)
    image, out = f"encoder.{model.name}.model.", {}
    for name in model.state_dict():
        if name.startswith(image):
            found = renamed(name.removeprefix(image), "blocks.", VISION)
            if found is None:
                raise ValueError(f"encoder {model.name}: open_clip's tower has no place for {name.removeprefix(image)}")
            out[name] = f"visual.{found}"
        elif name.startswith("towers.text."):
            out[name] = f"text.{renamed(name.removeprefix('towers.text.'), 'transformer.blocks.', TEXT)}"
        elif not name.startswith("towers.decoder."):
            out[name] = swapped(name, OTHERS) or name
    return out


def check_towers(model: DualEncoder) -> None:
    """ValueError if the towers are not those of open_clip's `CustomTextCLIP`."""
    if getattr(model.towers, "text", None) is None:
        raise ValueError(f"encoder {model.name} was trained without a text tower: open_clip has no model of it alone")
    image = vit(model)
    if not isinstance(image, VisionTransformer) or image.cls_token is None:
        is_vit = isinstance(image, VisionTransformer)
        found = "this one has no class token" if is_vit else f"this is {type(image).__name__}"
        needed = "open_clip's tower is a Vision Transformer with a class token, as CLIP's"
        raise ValueError(f"encoder {model.name}: {needed}; {found} (encoder=openvision can be exported)")
    first: Any = image.blocks[0]
    if type(first.mlp.act) is not nn.GELU:
        act = type(first.mlp.act).__name__
        raise ValueError(f"encoder {model.name}: open_clip has exact GELU alone beside this text tower, {act} is used")


def renamed(name: str, blocks: str, table: dict[str, str]) -> str | None:
    if not name.startswith(blocks):
        return swapped(name, table)
    number, _, inside = name.removeprefix(blocks).partition(".")
    found = swapped(inside, BLOCK)
    return found and f"transformer.resblocks.{number}.{found}"


def swapped(name: str, table: dict[str, str]) -> str | None:
    """`name` with the prefix that is in `table` replaced; None if no prefix of it is."""
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return None


def values(model: DualEncoder, names: dict[str, str]) -> list[Tensor]:
    state = model.state_dict()
    return [state[name] for name in names]


def as_theirs(name: str, value: Tensor) -> Tensor:
    if name in TRANSPOSED:
        return value.T
    if name == "visual.class_embedding":
        return value.flatten()
    if name in ("logit_scale", "logit_bias"):
        return value.reshape(())
    return value.flatten(0, 1) if name == "visual.positional_embedding" else value


def open_clip_config(model: DualEncoder) -> dict[str, Any]:
    """What open_clip builds the same two towers from. ValueError as of `check_towers`."""
    check_towers(model)
    encoder, image, text = model.encoder[model.name], vit(model), model.towers.text
    assert text is not None
    epsilon = {"norm_kwargs": {"eps": 1e-6}}
    vision = {
        "image_size": encoder.image_size,
        "patch_size": image.patch_embed.patch_size[0],
        "no_ln_pre": isinstance(image.norm_pre, nn.Identity),
        "pool_type": "avg",
        "final_ln_after_pool": isinstance(image.norm, nn.Identity),
        **shape(image.blocks),
        **epsilon,
    }
    words = {
        "context_length": text.positions.shape[0],
        "vocab_size": text.embedding.num_embeddings,
        "no_causal_mask": True,
        "pool_type": "last",
        "act_kwargs": {"approximate": "tanh"},
        "hf_tokenizer_name": ".",  # the folder's own, laid out as OpenVision's texts
        "tokenizer_mode": "clips",
        **shape(text.transformer.blocks),
        **epsilon,
    }
    words["heads"] = words["width"] // words.pop("head_width")
    config = {"embed_dim": text.proj.out_features, "vision_cfg": vision, "text_cfg": words, "custom_text": True}
    bias = getattr(model.towers.contrast, "bias", None)  # SigLIP's
    return config if bias is None else {**config, "init_logit_bias": float(bias)}


def shape(blocks: Any) -> dict[str, Any]:
    first = blocks[0]
    width = first.mlp.fc1.in_features
    ratio = first.mlp.fc1.out_features / width
    return {"width": width, "layers": len(blocks), "head_width": width // first.attn.num_heads, "mlp_ratio": ratio}


def write_open_clip(model: DualEncoder, folder: Path) -> None:
    """A folder that `open_clip.create_model("local-dir:folder")` loads.

    Its tokenizer is `Wordpiece.save_for_transformers`. ValueError, before anything is written, if it has none such.
    """
    encoder: Any = model.encoder[model.name]
    state, preprocess = to_open_clip(model), {"mean": encoder.mean, "std": encoder.std, "resize_mode": "squash"}
    config = {"model_cfg": open_clip_config(model), "preprocess_cfg": preprocess}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    save_file(state, folder / "open_clip_model.safetensors")


def to_timm(model: DualEncoder) -> dict[str, Tensor]:
    """The encoder, its norm and its projection as a timm classifier whose logits are the image features."""
    state = dict(vit(model).state_dict())
    if (head := model.towers.image) is not None:
        state |= {f"fc_norm.{name}": value for name, value in head.norm.state_dict().items()}
        state |= {"head.weight": head.proj.weight, "head.bias": torch.zeros(head.proj.out_features)}
    return {name: value.detach().contiguous().clone() for name, value in state.items()}


def from_timm(state: dict[str, Tensor], model: DualEncoder) -> dict[str, Tensor]:
    """The inverse of `to_timm`, for `model.load_state_dict(..., strict=False)`."""
    places = {"fc_norm.": "towers.image.norm.", "head.weight": "towers.image.proj.weight"}
    out = {}
    for name, value in state.items():
        place = next(
            (ours + name.removeprefix(theirs) for theirs, ours in places.items() if name.startswith(theirs)), None
        )
        if name != "head.bias":
            out[place or f"encoder.{model.name}.model.{name}"] = value
    return out


def vit(model: DualEncoder) -> Any:
    """The timm model inside the encoder."""
    found = getattr(model.encoder[model.name], "model", None)
    if not hasattr(found, "blocks"):
        raise ValueError(f"encoder {model.name}: only timm's Vision Transformers have a name in other libraries")
    return found
