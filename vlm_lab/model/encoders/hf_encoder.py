"""Any vision transformer of transformers as an encoder: CLIP, SigLIP, DINOv2, DINOv3, ViT, I-JEPA, ...

Through `AutoModel`, from the hub, from a local folder, or random at any shape. For models that make one token per patch
and take `pixel_values` alone: hierarchical ones, and those that pack or shuffle patches, are refused (timm has them).
Remote code is never run.
"""

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from vlm_lab.model.encoders.base import Encoder, used_layers
from vlm_lab.model.features import FeatureMap

FINAL_NORMS = ("post_layernorm", "layernorm", "norm")  # transformers' names for the norm behind the last block


class HFEncoder(Encoder):
    """A transformers model as an encoder.

    Args:
        family: transformers' `model_type` (`siglip_vision_model`, `clip_vision_model`, `dinov2`, ...).
        weights: None (random), a hub id, or a local folder; of a model with two towers the vision tower is taken.
        layer: -1 is the model's own output (`last_hidden_state`), -2 the last but one of `hidden_states`. A list joins
            those of its layers on channels.
        image_size: pixels per side; null is the model's own, others resample the positions.
        shape: arguments of the family's configuration class; null takes them from the checkpoint. ValueError if a
            checkpoint has others: a model is planned from its YAML.

    Normalisation comes from the checkpoint's `preprocessor_config.json`; random models use 0.5.
    """

    square = True  # its positions cannot be spread over views of other shapes

    def __init__(
        self,
        family: str,
        weights: str | None,
        layer: int | Sequence[int] = -1,
        image_size: int | None = None,
        shape: dict[str, Any] | None = None,
    ) -> None:
        config = configuration(family, weights, shape or {})
        super().__init__(*normalisation(weights))
        self.model: Any
        self.model, missing = build(config, weights)
        check_inputs(family, self.model)
        depth = config.num_hidden_layers
        self.layers, self.listed = used_layers(family, layer, depth), not isinstance(layer, int)
        self.image_size, self.stride = image_size or config.image_size, config.patch_size
        self.grid = (self.image_size // self.stride, self.image_size // self.stride)
        self.dim = config.hidden_size * len(self.layers)
        keep_used_blocks(self.model, self.layers[-1], depth, plain=self.listed or self.layers[-1] < depth - 1)
        drop_unused(self)
        if lost := sorted(missing & dict(self.model.named_parameters()).keys()):
            raise ValueError(f"encoder.hf.weights = {weights} has no {lost[0]} and {len(lost) - 1} others")

    def forward(self, pixels: Tensor) -> FeatureMap:
        tokens = self.tokens(self.normalised(pixels))  # [V, prefix + N, C]
        return FeatureMap(tokens[:, -self.grid[0] * self.grid[1] :], self.grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name for it, so that checkpointing.py need not know whose model this is."""
        (self.model.gradient_checkpointing_enable if enable else self.model.gradient_checkpointing_disable)()

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised images -> what the layers in use give, [V, prefix + N, C]."""
        resample = {"interpolate_pos_encoding": True} if resamples(self.model) else {}
        output = self.model(pixel_values=images, output_hidden_states=self.listed, **resample)
        if not self.listed:
            return output.last_hidden_state
        return torch.cat([output.hidden_states[layer + 1] for layer in self.layers], dim=-1)  # 0 are the embeddings


def configuration(family: str, weights: str | None, shape: dict[str, Any]) -> PreTrainedConfig:
    """The vision tower's configuration, from the YAML or from the checkpoint."""
    if weights is None:
        try:
            return AutoConfig.for_model(family, **shape)
        except ValueError as error:
            raise ValueError(f"encoder.hf.family = {family}: transformers knows no such model_type") from error
    config = AutoConfig.from_pretrained(weights)
    config = getattr(config, "vision_config", config)
    for key, value in {"model_type": family, **shape}.items():
        if (found := getattr(config, key, value)) != value:
            field = "family" if key == "model_type" else f"shape.{key}"
            raise ValueError(f"encoder.hf.{field} = {value}, but the checkpoint {weights} has {found}")
    return config


def build(config: PreTrainedConfig, weights: str | None) -> tuple[nn.Module, set[str]]:
    """(model, names of the weights that the checkpoint lacks)."""
    if weights is None:
        return AutoModel.from_config(config, dtype=torch.float32), set()
    model, info = AutoModel.from_pretrained(weights, config=config, dtype=torch.float32, output_loading_info=True)
    return model, set(info["missing_keys"])


def normalisation(weights: str | None) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of the checkpoint's image processor."""
    if weights is None:
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(weights)
    except OSError as error:
        raise ValueError(f"encoder.hf.weights = {weights}: no preprocessor_config.json with mean and std") from error
    return settings["image_mean"], settings["image_std"]


def check_inputs(family: str, model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    config: Any = model.config
    sizes = [getattr(config, key, None) for key in ("image_size", "patch_size", "hidden_size", "num_hidden_layers")]
    plain = all(isinstance(value, int) for value in sizes) and family != "vit_mae"  # MAE shuffles its patches
    if set(needed) - {"pixel_values"} or not plain:
        raise ValueError(f"encoder {family}: not a transformer with one token per patch of an image; try encoder=timm")


def resamples(model: nn.Module) -> bool:
    """Whether positions for another resolution must be asked for (the others make them by themselves)."""
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def keep_used_blocks(model: nn.Module, layer: int, depth: int, plain: bool) -> None:
    """Drop the blocks behind `layer`, and with `plain` the norm behind them."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                setattr(parent, name, child[: layer + 1])
            elif plain and name in FINAL_NORMS and parent is model:
                setattr(parent, name, nn.Identity())


def drop_unused(encoder: HFEncoder) -> None:
    """Take out what the tokens do not depend on (poolers, mask tokens): it would never receive a gradient.

    Found by a backward pass on the meta device, which computes nothing.
    """
    model = encoder.model
    ghosts = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    ghost = copy.deepcopy(model, ghosts).to("meta")  # type: ignore[arg-type]
    images = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device="meta")
    encoder.model = ghost
    tokens = encoder.tokens(images)
    encoder.model = model
    if tokens.ndim != 3 or tokens.shape[1] < math.prod(encoder.grid):
        shape = " x ".join(map(str, tokens.shape[1:]))
        raise ValueError(
            f"encoder {type(model).__name__}: gives {shape} for a grid of {encoder.grid}; try encoder=timm"
        )
    tokens.sum().backward()
    dead = {name for name, parameter in ghost.named_parameters() if parameter.grad is None}
    for name, module in list(model.named_modules()):
        inside = {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        if inside and inside <= dead:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Identity())
            dead -= inside
    for name in dead:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, None)
