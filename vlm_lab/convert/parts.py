"""Configurations of the parts that several of transformers' classes share: vision tower, language model, projector.

They are written when a model goes out, and compared when one comes in: `agree` refuses a checkpoint of another shape.
"""

from collections.abc import Mapping
from typing import Any

from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlm_lab.model.connectors.mlp import MLP
from vlm_lab.model.connectors.perceiver import EPS, Perceiver
from vlm_lab.model.vlm import VLM

TEXT_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "sliding_window"),
    *("attention_bias", "tie_word_embeddings"),
)


def only_encoder(vlm: VLM, model: str) -> tuple[str, Any]:
    """(name, encoder) of a VLM with one timm Vision Transformer whose map is used as it is."""
    if len(vlm.encoder) != 1:
        raise ValueError(
            f"not expressible as {model}: {len(vlm.encoder)} encoders ({', '.join(vlm.encoder)}), it has one"
        )
    ((name, encoder),) = vlm.encoder.items()
    vit: Any = getattr(encoder, "model", None)
    if type(vit) is not VisionTransformer or encoder.stride != vit.patch_embed.patch_size[0]:
        raise ValueError(f"not expressible as {model}: encoder {name} is no plain ViT of timm; choose clip or siglip")
    return name, encoder


def vision(vlm: VLM, model: str, normed: bool) -> dict[str, Any]:
    """The vision tower's configuration; `normed`: whether the class applies the norm behind the last block."""
    name, encoder = only_encoder(vlm, model)
    vit = encoder.model
    if encoder.norm != normed:
        where, way = ("behind", "-1") if normed else ("before", "-2 (or [-1], the last block without the norm)")
        raise ValueError(
            f"not expressible as {model}: it reads its encoder {where} the final norm, set encoder.{name}.layer={way}"
        )
    first = vit.blocks[0]
    return {
        "model_type": family(name, vit, model),
        "hidden_size": vit.embed_dim,
        "intermediate_size": first.mlp.fc1.out_features,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": first.attn.num_heads,
        "image_size": encoder.image_size,
        "patch_size": encoder.stride,
        "hidden_act": activation(first.mlp.act),
        "layer_norm_eps": first.norm1.eps,
    }


def family(name: str, vit: Any, model: str) -> str:
    """CLIP's tower has a class token and a norm in front of the blocks, SigLIP's has neither."""
    clip = vit.cls_token is not None and not isinstance(vit.norm_pre, nn.Identity)
    siglip = vit.cls_token is None and isinstance(vit.norm_pre, nn.Identity)
    if not (clip or siglip) or vit.reg_token is not None or vit.pos_embed is None:
        raise ValueError(f"not expressible as {model}: encoder {name} is built neither like CLIP nor like SigLIP")
    return "clip_vision_model" if clip else "siglip_vision_model"


def activation(module: nn.Module) -> str:
    """Transformers' name of an activation."""
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    tanh = getattr(module, "approximate", "tanh" if "Tanh" in type(module).__name__ else "none") == "tanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


def text(vlm: VLM) -> dict[str, Any]:
    """The language model's configuration, as its own class writes it."""
    return vlm.llm.config.to_dict()


def projector(vlm: VLM, model: str) -> dict[str, Any]:
    """LLaVA's settings of what stands between the two: which layers are read, the two linear maps behind them."""
    if type(vlm.connector) is not MLP or len(vlm.connector.project) != 3:
        name = type(vlm.connector).__name__
        raise ValueError(f"not expressible as {model}: connector {name}, it has mlp with layers=2")
    _, encoder = only_encoder(vlm, model)
    layers = [layer + 1 for layer in encoder.layers]  # theirs counts the embeddings as layer 0
    return {
        "vision_feature_layer": -1 if len(layers) == 1 else layers,
        "vision_feature_select_strategy": "full" if encoder.model.cls_token is None else "default",
        "projector_hidden_act": "gelu",
    }


def perceiver(vlm: VLM, model: str) -> dict[str, Any]:
    """Idefics2's connector."""
    connector = vlm.connector
    if type(connector) is not Perceiver:
        raise ValueError(f"not expressible as {model}: connector {type(connector).__name__}, it has perceiver")
    resampler, (found,) = connector.perceiver_resampler, connector.modality_projection.values()
    projection: Any = found
    if isinstance(projection, nn.Linear):
        raise ValueError(f"not expressible as {model}: connector.mlp = false, it projects with a gated MLP")
    hidden, wanted = projection.gate_proj.out_features, vlm.llm.config.intermediate_size
    if hidden != wanted:
        raise ValueError(
            f"not expressible as {model}: its connector's MLP is as wide as the LLM's, {wanted}, ours is {hidden}; "
            f"set connector.mlp_ratio={wanted / connector.out_dim:g}"
        )
    attention: Any = resampler.layers[0].self_attn
    head_dim = attention.q_proj.out_features // attention.heads
    return {
        "hidden_size": connector.out_dim,
        "rms_norm_eps": EPS,
        "resampler_n_latents": connector.latents,
        "resampler_depth": len(resampler.layers),
        "resampler_n_heads": attention.heads,
        "resampler_head_dim": head_dim,
        "num_key_value_heads": attention.k_proj.out_features // head_dim,
    }


def agree(part: str, ours: Mapping[str, Any], theirs: Any) -> None:
    """ValueError for the first setting of a checkpoint's configuration that is not ours."""
    for key, value in ours.items():
        if value is not None and (found := getattr(theirs, key, None)) is not None and found != value:
            raise ValueError(f"init: the {part}'s {key} is {value} here, {found} in the checkpoint")


def used_layers(layer: int | list[int], depth: int) -> list[int]:
    """Which of `depth` blocks' outputs a transformers class reads, counted from 1."""
    return [index if index >= 0 else depth + 1 + index for index in ([layer] if isinstance(layer, int) else layer)]
