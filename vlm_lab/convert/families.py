"""The classes of transformers that a VLM of ours can be: which composition each has, and its configuration.

    LlavaForConditionalGeneration            tiling squash, pad or crop    connector mlp
    LlavaNextForConditionalGeneration        tiling anyres                 connector mlp
    LlavaOnevisionForConditionalGeneration   tiling anyres_max             connector mlp
    Idefics2ForConditionalGeneration         tiling native or split4       connector perceiver, encoder siglip

Encoders are timm's CLIP and SigLIP, the language model is any that `AutoModelForCausalLM` knows. LLaVA's classes read
a block before the final norm, Idefics2 behind it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from vlm_lab.convert import parts
from vlm_lab.convert.names import Rules, llm_rules, tower_rules
from vlm_lab.data.tiling import AnyRes, AnyResMax, Crop, Native, Pad, Split4, Squash, Tiling
from vlm_lab.model.vlm import VLM

IMAGE, VIDEO, FAKE = "<image>", "<video>", "<fake_token_around_image>"


@dataclass(frozen=True)
class Family:
    """One class. `tokens`: the placeholders that its tokenizer has; `settings` makes the rest of the configuration."""

    model_type: str
    name: str
    tilings: tuple[type[Tiling], ...]
    rules: Rules
    settings: Callable[[VLM, Tiling | None], dict[str, Any]]
    tokens: tuple[str, ...] = (IMAGE,)
    normed: bool = False  # whether it reads the encoder behind its final norm

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.name)

    def config(self, vlm: VLM, tiling: Tiling, ids: Sequence[int], vocabulary: int) -> PreTrainedConfig:
        """`ids` of the tokens; `vocabulary`: rows of the embedding with them. ValueError if `vlm` is none of these."""
        settings, text = self.settings(vlm, tiling), {**parts.text(vlm), "vocab_size": vocabulary}
        names = ("image_token_id", "video_token_id") if VIDEO in self.tokens else ("image_token_id",)
        make: Any = self.model_class.config_class
        return make(
            vision_config=self.vision(vlm),
            text_config=text,
            tie_word_embeddings=text["tie_word_embeddings"],
            **settings,
            **dict(zip(names, ids, strict=False)),
        )

    def vision(self, vlm: VLM) -> dict[str, Any]:
        config = parts.vision(vlm, self.name, self.normed)
        if config["model_type"] == "siglip_vision_model":
            config["vision_use_head"] = False
        if self.normed and config["model_type"] != "siglip_vision_model":
            raise ValueError(f"not expressible as {self.name}: its encoder is SigLIP; choose encoder=siglip")
        return config

    def agree(self, vlm: VLM, theirs: Any) -> None:
        """ValueError with both numbers if a checkpoint's configuration `theirs` has another shape than `vlm`."""
        vision = self.vision(vlm)
        vision.pop("num_hidden_layers")  # blocks behind the one in use are left behind
        layers = parts.used_layers(getattr(theirs, "vision_feature_layer", -1), theirs.vision_config.num_hidden_layers)
        _, encoder = parts.only_encoder(vlm, self.name)
        if (used := [layer + 1 for layer in encoder.layers]) != layers:
            raise ValueError(f"init: the encoder's output of block {used} is used here, {layers} in the checkpoint")
        if self.normed:  # Idefics2's own vision configuration has no name of its own for what is SigLIP
            vision.pop("model_type")
        text = parts.text(vlm)
        parts.agree("encoder", vision, theirs.vision_config)
        parts.agree("LLM", {key: text.get(key) for key in parts.TEXT_KEYS}, theirs.text_config)
        if self.normed:
            parts.agree("connector", parts.perceiver(vlm, self.name), theirs.perceiver_config)
        else:
            parts.agree("connector", {"projector_hidden_act": "gelu"}, theirs)


def llava(vlm: VLM, tiling: Tiling | None) -> dict[str, Any]:
    _, encoder = parts.only_encoder(vlm, "LLaVA")
    rows, columns = encoder.grid
    return {**parts.projector(vlm, "LLaVA"), "image_seq_length": rows * columns}


def llava_next(vlm: VLM, tiling: Any) -> dict[str, Any]:
    return {**parts.projector(vlm, "LLaVA-NeXT"), "image_grid_pinpoints": pinpoints(vlm, tiling)}


def onevision(vlm: VLM, tiling: Any) -> dict[str, Any]:
    if tiling.pool != 2:
        raise ValueError(f"not expressible as LLaVA-OneVision: tiling.pool = {tiling.pool}, its videos are pooled by 2")
    ratio = f"anyres_max_{tiling.cap}"
    return {
        **parts.projector(vlm, "LLaVA-OneVision"),
        "image_grid_pinpoints": pinpoints(vlm, tiling),
        "vision_aspect_ratio": ratio,
    }


def idefics2(vlm: VLM, tiling: Tiling | None) -> dict[str, Any]:
    return {"perceiver_config": parts.perceiver(vlm, "Idefics2")}


def pinpoints(vlm: VLM, tiling: AnyRes) -> list[list[int]]:
    """The canvases in pixels, (height, width), in the order that decides ties."""
    _, encoder = parts.only_encoder(vlm, "LLaVA")
    side = encoder.image_size
    return [[rows * side, columns * side] for rows, columns in tiling.canvases]


LLAVA_RULES: Rules = [
    *tower_rules("model.vision_tower"),
    (r"connector\.project\.0\.(\w+)", (r"model.multi_modal_projector.linear_1.\1",)),
    (r"connector\.project\.2\.(\w+)", (r"model.multi_modal_projector.linear_2.\1",)),
    (r"connector\.newline\.weight", ("model.image_newline",)),
    *llm_rules("model.language_model"),
]
IDEFICS2_RULES: Rules = [
    *tower_rules("model.vision_model"),
    (r"connector\.modality_projection\.\w+\.(\w+)_proj\.(\w+)", (r"model.connector.modality_projection.\1_proj.\2",)),
    (r"connector\.perceiver_resampler\.(.+)", (r"model.connector.perceiver_resampler.\1",)),
    *llm_rules("model.text_model"),
]
GENERATION = "ForConditionalGeneration"
FAMILIES = (
    Family("llava", f"Llava{GENERATION}", (Squash, Pad, Crop), LLAVA_RULES, llava),
    Family("llava_next", f"LlavaNext{GENERATION}", (AnyRes,), LLAVA_RULES, llava_next),
    Family("llava_onevision", f"LlavaOnevision{GENERATION}", (AnyResMax,), LLAVA_RULES, onevision, (IMAGE, VIDEO)),
    Family("idefics2", f"Idefics2{GENERATION}", (Native, Split4), IDEFICS2_RULES, idefics2, (IMAGE, FAKE), normed=True),
)


def by_tiling(tiling: Tiling) -> Family:
    """The class that has this tiling."""
    for family in FAMILIES:
        if type(tiling) in family.tilings:
            return family
    have = ", ".join(t.__name__ for f in FAMILIES for t in f.tilings)
    raise ValueError(f"not expressible in transformers: tiling {type(tiling).__name__}; its classes have {have}")


def by_model_type(source: str, model_type: str) -> Family:
    """The class of a checkpoint."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    have = ", ".join(f.model_type for f in FAMILIES)
    raise ValueError(f"init = hf:{source}: a checkpoint of model_type {model_type}; it can be {have}")
