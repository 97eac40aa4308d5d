"""Names of weights, ours and transformers': rules from our name to theirs, which both directions read.

A rule is (regular expression of our name, their names). Several names are parts of one of our tensors, joined along the
first axis: timm keeps query, key and value in one matrix. Shapes may differ in axes of length one.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Rules = Sequence[tuple[str, tuple[str, ...]]]
State = Mapping[str, Tensor]

BLOCK = {
    "norm1": ("layer_norm1",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


def tower_rules(root: str) -> Rules:
    """A timm Vision Transformer as CLIP's, SigLIP's or Idefics2's vision model below `root`."""
    ours = r"encoder\.\w+\.model\."
    single = {
        r"cls_token": "embeddings.class_embedding",
        r"pos_embed": "embeddings.position_embedding.weight",
        r"patch_embed\.proj\.(\w+)": r"embeddings.patch_embedding.\1",
        r"norm_pre\.(\w+)": r"pre_layrnorm.\1",
        r"norm\.(\w+)": r"post_layernorm.\1",
    }
    rules: list[tuple[str, tuple[str, ...]]] = [
        (ours + pattern, (f"{root}.{name}",)) for pattern, name in single.items()
    ]
    for name, theirs in BLOCK.items():
        pattern = rf"{ours}blocks\.(\d+)\.{re.escape(name)}\.(\w+)"
        rules.append((pattern, tuple(rf"{root}.encoder.layers.\1.{part}.\2" for part in theirs)))
    return rules


def llm_rules(root: str) -> Rules:
    return [(r"llm\.model\.(.+)", (rf"{root}.\1",)), (r"llm\.lm_head\.(\w+)", (r"lm_head.\1",))]


def counterparts(name: str, rules: Rules, model: str) -> tuple[str, ...]:
    """Their names for one of ours."""
    for pattern, names in rules:
        if match := re.fullmatch(pattern, name):
            return tuple(match.expand(theirs) for theirs in names)
    raise ValueError(f"not expressible as {model}: it has no weight for {name}")


def to_theirs(ours: State, theirs: State, rules: Rules, model: str) -> dict[str, Tensor]:
    """Our weights under their names; `theirs` gives names and shapes (its values are not read).

    Their norm behind the last block, which no one reads where we have none, is the identity.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        names = counterparts(name, rules, model)
        for part, piece in zip(names, tensor.chunk(len(names)), strict=True):
            if part not in theirs or theirs[part].numel() != piece.numel():
                raise ValueError(f"not expressible as {model}: {name} {list(tensor.shape)} has no place in it")
            out[part] = piece.reshape(theirs[part].shape) if len(names) == 1 else piece.clone()
    for name in theirs.keys() - out.keys():
        if not (found := re.search(r"post_layernorm\.(weight|bias)$", name)):
            raise ValueError(f"not expressible as {model}: it needs {name}, which this model has not")
        shape = theirs[name].shape
        out[name] = torch.ones(shape) if found[1] == "weight" else torch.zeros(shape)
    return out


def to_ours(theirs: State, ours: State, rules: Rules, model: str) -> dict[str, Tensor]:
    """Their weights under our names and in our shapes; what they have besides (unused layers) stays behind."""
    out: dict[str, Tensor] = {}
    for name, like in ours.items():
        names = counterparts(name, rules, model)
        if missing := [part for part in names if part not in theirs]:
            raise ValueError(
                f"init: our {name} has no counterpart in the checkpoint, a {model}: {missing[0]} is missing"
            )
        parts = [theirs[part] for part in names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tensor.numel() != like.numel():
            raise ValueError(f"init: {name} is {list(like.shape)} here, {list(tensor.shape)} in the checkpoint")
        out[name] = tensor.reshape(like.shape)
    return out
