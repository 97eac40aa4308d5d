"""Equal logits, equal pixels and equal prompt ids with transformers' LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Idefics2.

Both directions: a stock model, saved by the test, comes in; a VLM of ours goes out, and `from_pretrained` loads it.
float32, logits within 1e-4, on pictures of random pixels. Pixels within 1e-5 of the processors on Pillow, on
which the logits are compared; within one level of 256 of those on torchvision, whose resampling rounds differently.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
import transformers as hf
from helpers import SHAPE, ColourSource, max_difference
from parity import VOCABULARY, Noise, Smooth, clip, siglip
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

from vlm_lab import convert
from vlm_lab.batch import Prompts
from vlm_lab.data.chat import Chat
from vlm_lab.data.sample import Video
from vlm_lab.data.tiling import AnyRes, AnyResMax, Native, Pad, Split4, Squash, Tiling
from vlm_lab.data.tokenizer import trained_tokenizer
from vlm_lab.model.vlm import VLM

CANVASES = [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]]
FAKE = "<fake_token_around_image>"
LEVEL = 1.001 / 255  # of 256, in 0..1
ONE = [(28, 28), (40, 30), (30, 40), (90, 25), (25, 90), (7, 5), (57, 56)]
EACH = [(Noise(size),) for size in ONE]
SEVERAL = [(Noise((40, 30)), Noise((13, 70))), (Noise((28, 28)), Noise((9, 9)), Noise((50, 20)))]
TEXT = {**SHAPE, "vocab_size": VOCABULARY, "initializer_range": 0.2}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "patch_size": 7}
TOWER |= {"image_size": 28, "initializer_range": 0.2}
CLIP_TOWER = {**TOWER, "num_hidden_layers": 3, "initializer_factor": 5.0}


@pytest.fixture(scope="module")
def chat(cache: Path) -> Chat:
    """The tests' chat, with a tokenizer that knows Idefics2's marker."""
    tokenizer = trained_tokenizer([ColourSource()], "chatml", 390, cache)
    tokenizer.add_tokens([FAKE], special_tokens=True)
    return Chat(tokenizer, "chatml")


@dataclass(frozen=True)
class Case:
    """One composition: ours, the stock class's configuration, and the pictures of each prompt."""

    tiling: Tiling
    ours: Callable[..., VLM]
    stock: Callable[[], Any]
    prompts: list[tuple[Noise, ...]]


def llava() -> Any:
    vision, text = CLIPVisionConfig(**CLIP_TOWER), LlamaConfig(**TEXT)
    return hf.LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2)


def llava_siglip() -> Any:
    vision = SiglipVisionConfig(**TOWER, num_hidden_layers=3, vision_use_head=False)
    settings = {"vision_feature_layer": [1, -1], "vision_feature_select_strategy": "full"}
    return hf.LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), **settings)


def llava_next() -> Any:
    pinpoints = [[28 * rows, 28 * columns] for rows, columns in CANVASES]
    vision, text = CLIPVisionConfig(**CLIP_TOWER), LlamaConfig(**TEXT)
    return hf.LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints)


def onevision() -> Any:
    vision = SiglipVisionConfig(**TOWER, num_hidden_layers=2, vision_use_head=False)
    pinpoints = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    settings = {"image_grid_pinpoints": pinpoints, "vision_aspect_ratio": "anyres_max_4"}
    return hf.LlavaOnevisionConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), **settings)


def idefics2() -> Any:
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 16, "num_key_value_heads": 1, "rms_norm_eps": 1e-6}
    vision = {**TOWER, "image_size": 56, "num_hidden_layers": 2}
    text = MistralConfig(**TEXT, pad_token_id=0, rms_norm_eps=1e-6)
    return hf.Idefics2Config(vision_config=vision, perceiver_config=perceiver, text_config=text)


def our_idefics2(vocabulary: int = VOCABULARY) -> VLM:
    return parity.idefics2(siglip(-1, 56, depth=2), vocabulary)


def ours(encoder: Callable[[], Any], tiling: Tiling, llm: str, **shape: Any) -> Callable[..., VLM]:
    return lambda vocabulary=VOCABULARY: parity.vlm(encoder(), tiling, llm, vocabulary, **shape)


SMALL, TALL = AnyRes(CANVASES), AnyResMax(largest=3, cap=4, frames=4)
NATIVE, SPLIT = Native(14, FAKE), Split4(14, FAKE)
CASES = {
    "llava-squash": Case(Squash(), ours(clip, Squash(), "llama"), llava, [*EACH, *SEVERAL]),
    "llava-pad": Case(Pad(), ours(clip, Pad(), "llama"), llava, EACH),
    "llava-siglip-layers": Case(Pad(), ours(lambda: siglip([0, 2]), Pad(), "llama"), llava_siglip, EACH[:3]),
    "llava-next": Case(SMALL, ours(clip, SMALL, "llama"), llava_next, [*EACH, *SEVERAL]),
    "onevision": Case(TALL, ours(siglip, TALL, "qwen2"), onevision, [*EACH, *SEVERAL, (Noise((200, 190)),)]),
    "idefics2": Case(NATIVE, our_idefics2, idefics2, [*EACH, *SEVERAL]),
    "idefics2-split": Case(SPLIT, our_idefics2, idefics2, [*EACH, *SEVERAL]),
}


def written_by_hand(case: Case, chat: Chat) -> Any:
    """A stock processor that shares no line with ours."""
    tokenizer: Any = copy.deepcopy(chat.tokenizer)
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    square = {"height": 28, "width": 28}
    clip_colours = {"image_mean": hf.image_utils.OPENAI_CLIP_MEAN, "image_std": hf.image_utils.OPENAI_CLIP_STD}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    config = case.stock()
    if isinstance(config, hf.LlavaConfig):
        strategy, extra = config.vision_feature_select_strategy, int(config.vision_config.model_type.startswith("clip"))
        colours = clip_colours if extra else half
        images = hf.LlavaImageProcessorPil(
            size=square, do_center_crop=False, do_pad=isinstance(case.tiling, Pad), **colours
        )
        return hf.LlavaProcessor(images, tokenizer, 7, strategy, num_additional_image_tokens=extra)
    if isinstance(config, hf.LlavaNextConfig):
        sizes = {
            "size": {"shortest_edge": 28},
            "crop_size": square,
            "image_grid_pinpoints": config.image_grid_pinpoints,
        }
        images = hf.LlavaNextImageProcessorPil(**sizes, **clip_colours)
        return hf.LlavaNextProcessor(images, tokenizer, 7, "default", num_additional_image_tokens=1)
    if isinstance(config, hf.LlavaOnevisionConfig):
        pinpoints = config.image_grid_pinpoints
        images = hf.LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints, **half)
        video = hf.LlavaOnevisionVideoProcessor(size=square, do_sample_frames=False, **half)
        return hf.LlavaOnevisionProcessor(images, tokenizer, video, 16, "full", vision_aspect_ratio="anyres_max_4")
    size = {"shortest_edge": 14, "longest_edge": 56}
    images = hf.Idefics2ImageProcessorPil(size=size, do_image_splitting=isinstance(case.tiling, Split4))
    return hf.Idefics2Processor(images, tokenizer, image_seq_len=4)


def asked(count: int, video: bool = False) -> str:
    places = ("<video>\n" if video else "<image>\n") * count
    return f"<|im_start|>user\n{places}What colour is it?<|im_end|>\n<|im_start|>assistant\n"


def views(inputs: Any, prompts: Prompts) -> Tensor:
    """Their pixel values as [V, 3, H, W], without the views that fill up a batch."""
    pixels = inputs["pixel_values"]
    if pixels.dim() == 4:
        return pixels
    if "pixel_attention_mask" in inputs:
        return pixels[0]
    counts = [layout.views for layout in prompts.layouts]
    return torch.cat([view[:count] for view, count in zip(pixels, counts, strict=True)])


def pixel_difference(model: VLM, prompts: Prompts, theirs: Tensor) -> float:
    """The largest, over the pixels that are not padding."""
    mine = parity.normalised(model, prompts)
    sizes = prompts.sizes.get("eye")
    boxes = [mine.shape[2:]] * len(mine) if sizes is None else sizes.tolist()
    pairs = zip(mine, theirs, boxes, strict=True)
    return max(max_difference(a[:, :h, :w], b[:, :h, :w]) for a, b, (h, w) in pairs)


def agree(case: Case, model: VLM, chat: Chat, stock: Any, processor: Any) -> None:
    """Same ids, same pixels, same logits, prompt by prompt."""
    process = parity.processor(model, case.tiling, chat)
    known = model.llm.config.vocab_size
    for images in case.prompts:
        prompts = parity.prompt_of(process, parity.question(*images))
        inputs = processor(images=[parity.drawn(images)], text=[asked(len(images))], return_tensors="pt")
        assert inputs["input_ids"].tolist() == parity.their_ids(prompts, processor.image_token_id).tolist(), images
        assert pixel_difference(model, prompts, views(inputs, prompts)) <= parity.PIXELS, images
        mine, theirs = parity.logits(model, prompts), run(stock, inputs)
        assert max_difference(mine, theirs[..., :known]) <= parity.TOLERANCE, images


@torch.inference_mode()
def run(stock: Any, inputs: Any) -> Tensor:
    return stock(**inputs).logits


@pytest.mark.parametrize("name", CASES)
def test_a_stock_checkpoint_comes_in(name: str, chat: Chat, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    config, processor = case.stock(), written_by_hand(case, chat)
    config.image_token_id = processor.image_token_id
    stock = getattr(hf, type(config).__name__.replace("Config", "ForConditionalGeneration"))(config).eval()
    stock.save_pretrained(tmp_path)
    model = case.ours()
    convert.start_from(model, str(tmp_path))
    agree(case, model, chat, stock, processor)


@pytest.mark.parametrize("name", CASES)
def test_our_model_goes_out(name: str, chat: Chat, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.ours(len(chat.tokenizer))  # no row is left for the placeholder
    assert convert.save(model, case.tiling, chat, tmp_path) == []
    stock = hf.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(stock.config) is type(case.stock())
    agree(case, model, chat, stock, processor_of(tmp_path))


def processor_of(folder: Path) -> Any:
    """As stock transformers loads it, but for Pillow instead of its default torchvision."""
    processor: Any = hf.AutoProcessor.from_pretrained(folder)
    processor.image_processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_a_video_gives_the_same_logits(frames: int, chat: Chat, tmp_path: Path) -> None:
    case = CASES["onevision"]
    model = case.ours(len(chat.tokenizer))
    convert.save(model, TALL, chat, tmp_path)
    stock, processor = hf.AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), processor_of(tmp_path)
    clip = [Noise((50, 30), seed) for seed in range(frames)]
    used = clip if frames <= TALL.frames else [clip[0], clip[1], clip[3], clip[5]]  # linspace, rounded down
    prompts = parity.prompt_of(parity.processor(model, TALL, chat), parity.question(Video(tuple(clip))))
    inputs = processor(videos=[np.stack(parity.drawn(used))], text=[asked(1, video=True)], return_tensors="pt")
    assert inputs["input_ids"].tolist() == parity.their_ids(prompts, processor.video_token_id).tolist()
    pixels = parity.normalised(model, prompts)[None]  # [1, frames, 3, H, W]
    assert max_difference(inputs["pixel_values_videos"], pixels) <= LEVEL / 0.5  # torchvision's: there is no other
    inputs["pixel_values_videos"] = pixels
    theirs = run(stock, inputs)[..., : model.llm.config.vocab_size]
    assert max_difference(parity.logits(model, prompts), theirs) <= parity.TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_torchvision_differs_by_a_level(name: str, chat: Chat, tmp_path: Path) -> None:
    """On a smooth picture; random pixels overshoot, and are cut off between two passes whose order differs."""
    case = CASES[name]
    model = case.ours(len(chat.tokenizer))
    convert.save(model, case.tiling, chat, tmp_path)
    processor = hf.AutoProcessor.from_pretrained(tmp_path)
    assert not type(processor.image_processor).__name__.endswith("Pil")
    for size in ONE:
        smooth = Smooth(size)
        prompts = parity.prompt_of(parity.processor(model, case.tiling, chat), parity.question(smooth))
        inputs = processor(images=[[smooth.draw()]], text=[asked(1)], return_tensors="pt")
        assert pixel_difference(model, prompts, views(inputs, prompts)) <= LEVEL / min(model.encoder["eye"].std)


def test_the_chat_template_goes_out_too(chat: Chat, tmp_path: Path) -> None:
    with_system = Chat(chat.tokenizer, "chatml", "Be brief.")
    case = CASES["llava-squash"]
    model = case.ours(len(chat.tokenizer))
    convert.save(model, case.tiling, with_system, tmp_path)
    content = [{"type": "image", "image": Noise((40, 30)).draw()}, {"type": "text", "text": "\nWhat colour is it?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    processor = processor_of(tmp_path)
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    prompts = parity.prompt_of(parity.processor(model, case.tiling, with_system), parity.question(Noise((40, 30))))
    assert inputs["input_ids"].tolist() == parity.their_ids(prompts, processor.image_token_id).tolist()
