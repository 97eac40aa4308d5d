"""What the parity tests share: tiny compositions of ours, random pictures, both models on one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from helpers import SHAPE
from PIL import Image
from torch import Tensor

from vlm_lab.batch import IMAGE_TOKEN, Prompts
from vlm_lab.data.chat import Chat
from vlm_lab.data.process import Eye, Processor
from vlm_lab.data.sample import ImageSlot, Message, Sample, Video
from vlm_lab.data.tiling import Tiling
from vlm_lab.eval.runner import pad_left
from vlm_lab.model.connectors.mlp import MLP
from vlm_lab.model.connectors.perceiver import Perceiver
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.llms import build_llm
from vlm_lab.model.vlm import VLM

TOLERANCE = 1e-4  # of logits in float32
PIXELS = 1e-5  # of normalised pixels
CLIP, SIGLIP = "vit_large_patch14_clip_quickgelu_336.openai", "vit_base_patch16_siglip_224"
VOCABULARY = 410  # rows of the embedding, more than the tokenizer has


@dataclass(frozen=True)
class Noise:
    """A picture of random pixels: the hardest to resize equally."""

    size: tuple[int, int]
    seed: int = 0

    def draw(self) -> Image.Image:
        pixels = np.random.default_rng([*self.size, self.seed]).integers(
            0, 256, (self.size[1], self.size[0], 3), dtype=np.uint8
        )
        return Image.fromarray(pixels)


@dataclass(frozen=True)
class Smooth:
    """A picture of slow colour gradients."""

    size: tuple[int, int]

    def draw(self) -> Image.Image:
        x, y = np.meshgrid(np.linspace(40, 200, self.size[0]), np.linspace(60, 180, self.size[1]))
        return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


def clip(layer: Any = -2) -> TimmEncoder:
    return TimmEncoder(CLIP, None, layer, image_size=28, patch_size=7, width=32, depth=3, heads=2)


def siglip(layer: Any = -2, side: int = 28, depth: int = 3) -> TimmEncoder:
    options = {"act_layer": "gelu_tanh"}
    return TimmEncoder(SIGLIP, None, layer, side, patch_size=7, width=32, depth=depth, heads=2, options=options)


def vlm(encoder: TimmEncoder, tiling: Tiling, llm: str, vocabulary: int = VOCABULARY, **shape: Any) -> VLM:
    torch.manual_seed(1)
    language = build_llm(
        llm, None, {**SHAPE, "initializer_range": 0.2, "vocab_size": vocabulary, **shape}, None, "", ""
    )
    return VLM({"eye": encoder}, MLP({"eye": encoder.dim}, 32), language, newline=tiling.newline).eval()


def idefics2(encoder: TimmEncoder, vocabulary: int = VOCABULARY) -> VLM:
    torch.manual_seed(1)
    shape = {**SHAPE, "initializer_range": 0.2, "vocab_size": vocabulary}
    resampler = {"latents": 4, "depth": 2, "heads": 2, "head_dim": 16, "kv_heads": 1, "mlp_ratio": 2.0}
    language = build_llm("mistral", None, shape, None, "", "")
    return VLM({"eye": encoder}, Perceiver({"eye": encoder.dim}, 32, **resampler), language).eval()


def processor(model: VLM, tiling: Tiling, chat: Chat) -> Processor:
    encoder: Any = model.encoder["eye"]
    eyes = {"eye": Eye(encoder.image_size, encoder.mean, encoder.stride)}
    return Processor(chat, tiling, eyes, model.connector.grid({"eye": encoder.grid}), max_tokens=10_000)


def question(*images: Noise | Video) -> Sample:
    """Every picture on a line of its own, then a question."""
    content = [part for index in range(len(images)) for part in (ImageSlot(index), "\n")]
    user = Message("user", (*content, "What colour is it?"))
    return Sample("q", (user, Message("assistant", ("red",))), images, "noise")


def prompt_of(processor: Processor, sample: Sample) -> Prompts:
    return pad_left([processor.prompt(sample)], processor)


@torch.inference_mode()
def logits(model: VLM, prompts: Prompts) -> Tensor:
    """[1, L, vocabulary]."""
    return model.llm(inputs_embeds=model.embed(prompts), attention_mask=prompts.attention_mask).logits


def their_ids(prompts: Prompts, placeholder: int) -> Tensor:
    """Our ids with their placeholder's."""
    return prompts.input_ids.masked_fill(prompts.input_ids == IMAGE_TOKEN, placeholder)


def normalised(model: VLM, prompts: Prompts) -> Tensor:
    """[V, 3, H, W] as the encoder sees them."""
    encoder: Any = model.encoder["eye"]
    return encoder.normalised(prompts.pixels["eye"])


def drawn(images: Sequence[Noise]) -> list[Image.Image]:
    return [image.draw() for image in images]
