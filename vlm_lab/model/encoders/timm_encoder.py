"""Any model of timm as an encoder: Vision Transformers and hierarchical networks, at any width.

The name gives the architecture; what the YAML sets besides replaces the name's own shape, so `scale=tiny` is the same
class at toy size. `weights` are random, the hub's, or a file's; timm resamples position embeddings that were trained at
another resolution. Class and register tokens are dropped, and so are the layers behind the last one in use.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from vlm_lab.model.encoders import openvision  # noqa: F401  (makes its models known to timm)
from vlm_lab.model.encoders.base import Encoder, used_layers
from vlm_lab.model.features import FeatureMap


class TimmEncoder(Encoder):
    """A timm model as an encoder. A setting left null keeps the model's own.

    Args:
        name: timm model id, with its tag (`vit_so400m_patch14_siglip_384.webli`).
        weights: None (random), "pretrained" (timm downloads them), or the path of a checkpoint file.
        layer: the block (of a hierarchical model: the stage) whose output is used. -1 is the last one, with the final
            norm; others come without it. A list joins its layers' plain outputs on channels, as ConvNeXt's multi-stage
            maps in Cambrian-1 (arXiv 2406.16860) and Mini-Gemini (arXiv 2403.18814); [-1] is the last without norm.
        image_size, patch_size: pixels per side (a remainder is cut off, as 384 / 14 gives 27 patches).
        width, depth, heads: of a transformer.
        side: tokens per side that every map is resized to; null keeps the finest map's.
        options: further arguments of the timm model (`{depths: [3, 3, 27, 3]}`).

    Raises ValueError for an unknown name, a layer outside the model, and weights that do not fit the shape.
    """

    def __init__(
        self,
        name: str,
        weights: str | None,
        layer: int | Sequence[int] = -1,
        image_size: int | None = None,
        patch_size: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        side: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        config = published(name)
        super().__init__(config.mean, config.std)
        self.image_size = image_size or config.input_size[-1]
        if patch_size and self.image_size < patch_size:
            raise ValueError(f"encoder {name}: image_size {self.image_size} is smaller than patch_size {patch_size}")
        if width and heads and width % heads:
            raise ValueError(f"encoder {name}: width {width} is not a multiple of heads {heads}")
        shape = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads, **(options or {})}
        if config.fixed_input_size:
            shape["img_size"] = self.image_size
        self.model: Any = create(name, weights, {key: value for key, value in shape.items() if value is not None})
        layers = self.model.feature_info  # what timm knows of each: its channels, its stride
        self.layers = used_layers(name, layer, len(layers))
        self.norm = isinstance(layer, int) and self.layers[-1] == len(layers) - 1
        used = [layers[index] for index in self.layers]
        self.model.prune_intermediate_layers(self.layers, prune_norm=not self.norm)
        self.dim = sum(info.get("num_chs_norm", info["num_chs"]) if self.norm else info["num_chs"] for info in used)
        finest = min(info["reduction"] for info in used)
        self.stride = self.image_size // side if side else finest
        self.grid = (side or self.image_size // finest,) * 2

    def forward(self, pixels: Tensor) -> FeatureMap:
        maps = self.model.forward_intermediates(
            self.normalised(pixels), indices=self.layers, norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )  # each [V, C, h, w]
        return self.feature_map(maps)


def published(name: str) -> Any:
    """What timm knows of a model's checkpoint: mean, std, input size, whether that is built in."""
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(f"encoder {name}: timm has no such model; see timm.list_models") from error
    assert config is not None
    return config


def create(name: str, weights: str | None, shape: dict[str, Any]) -> Any:
    loaded, named = weights is not None, weights in (None, "pretrained")
    source = {} if named else {"state_dict": read(name, str(weights)), "num_classes": 0}
    try:
        model: Any = timm.create_model(name, pretrained=loaded, pretrained_cfg_overlay=source, num_classes=0, **shape)
    except TypeError as error:  # an argument that this architecture does not have
        raise ValueError(f"encoder {name}: {error}") from error
    except RuntimeError as error:  # torch lists all keys that do not fit: the first will do
        if not loaded:
            raise
        reason = " ".join(str(error).split("\n")[1:2] or [str(error)]).strip()
        raise ValueError(f"encoder {name}: weights = {weights} do not fit the shape {shape}: {reason}") from error
    model.pretrained_cfg.pop("state_dict", None)
    if not loaded:
        init_random(model)
    return model


def read(name: str, path: str) -> dict[str, Tensor]:
    """A checkpoint file without its classifier, which no encoder has."""
    if not Path(path).is_file():
        raise ValueError(f"encoder {name}: weights = {path}: no such file (or say `pretrained`)")
    classifier = published(name).classifier or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    dropped = tuple(f"{head}.{part}" for head in heads for part in ("weight", "bias"))
    return {key: value for key, value in load_state_dict(path).items() if key not in dropped}


def init_random(model: nn.Module) -> None:
    """Random weights at a scale that suits any width.

    timm draws linear maps with std 0.02, which is made for widths of 768 and more: at width 128 signals fade from
    block to block and learning starts late. Here they are Xavier-uniform (as in the original ViT), positions are
    as large as the patches that they are added to, and layer scale (1e-5 or 1e-6 where a model has it) starts at 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "pos_embed":
            nn.init.normal_(parameter, std=0.3)
        elif leaf in ("gamma", "gamma_1", "gamma_2"):
            nn.init.ones_(parameter)
