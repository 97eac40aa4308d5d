"""Arranging view tokens: as long as laid out, equal to transformers; native views; packed rows of several tilings."""

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ColourSource, Plain, max_difference, tiny_vlm
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings, Idefics2VisionTransformer
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vlm_lab.batch import IGNORE, Batch
from vlm_lab.data.chat import Chat
from vlm_lab.data.loader import pack
from vlm_lab.data.process import Example, Eye, Processor
from vlm_lab.data.tiling import HD, AnyRes, AnyResMax, Native, Split4, Squash, Tiling, View
from vlm_lab.eval.runner import pad_left
from vlm_lab.model.arrange import arrange
from vlm_lab.model.connectors.perceiver import Perceiver
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.native import buckets, native_features
from vlm_lab.model.vlm import VLM

LLAVA = [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)]
SIZES = [(28, 28), (10, 10), (40, 20), (20, 40), (100, 30), (30, 100), (57, 43), (2, 100), (300, 299), (280, 150)]
TILINGS = [Squash(), AnyRes(LLAVA), AnyResMax(3, 1, 4), AnyResMax(4, 2, 4), HD(2), Native(14), Split4(14)]
EXACT = [n for n in range(1, 71) if n not in (25, 49, 50, 55)]  # where float32 fractions do not lose a bucket


def laid(tiling: Tiling, size: tuple[int, int], grid: tuple[int, int], count: int = 1) -> list:
    return tiling.layouts([size] * count, View(14 * grid[0], 14, grid))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from(TILINGS),
)
def test_as_many_tokens_as_laid_out(sizes: list[tuple[int, int]], side: int, tiling: Tiling) -> None:
    layouts = tiling.layouts(sizes, View(14 * side, 14, (side, side)))
    views = sum(layout.views for layout in layouts)
    tokens = torch.zeros(views, side * side, 2)
    for part in (layouts, layouts[:1]):
        arranged = arrange(tokens[: sum(x.views for x in part)], (side, side), part, torch.ones(1, 2))
        assert len(arranged) == sum(layout.num_tokens for layout in part)


def packed_by_transformers(
    name: str, features: torch.Tensor, size: tuple[int, int], newline: torch.Tensor
) -> torch.Tensor:
    """`pack_image_features` of one image: features [1 + tiles, 4, D] of 28 px views with 14 px patches."""
    canvases = AnyRes(LLAVA).canvases if name == "next" else AnyResMax(3, 2, 4).canvases
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=28, patch_size=14),
        image_grid_pinpoints=[[28 * rows, 28 * columns] for rows, columns in canvases],
    )
    model, sizes = SimpleNamespace(config=config), [(size[1], size[0])]
    if name == "next":
        return LlavaNextModel.pack_image_features(model, [features], sizes, "full", newline)[0][0]
    return LlavaOnevisionModel.pack_image_features(model, [features], sizes, newline, "anyres_max_2")[0][0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["next", "onevision", "onevision_several"])
def test_arranged_as_transformers_does(name: str, size: tuple[int, int]) -> None:
    """Stitched, unpadded, scaled down to the cap, a newline per row; one padded view if there are several images."""
    tiling, count = AnyRes(LLAVA) if name == "next" else AnyResMax(3, 2, 4), 2 if name.endswith("several") else 1
    layout = laid(tiling, size, (2, 2), count)[0]
    tokens, newline = torch.randn(layout.views, 4, 6), torch.randn(6)
    expected = packed_by_transformers(name, tokens, size, newline)
    assert max_difference(arrange(tokens, (2, 2), [layout], newline[None]), expected) <= 1e-6


def test_the_cap_is_reached_by_these_sizes() -> None:
    scaled = [laid(AnyResMax(3, 2, 4), size, (2, 2))[0].blocks[1] for size in SIZES]
    assert 0 < sum(block.size != block.crop for block in scaled) < len(SIZES)


@pytest.mark.parametrize("side", [2, 5])
def test_frames_are_pooled_as_transformers_does(side: int) -> None:
    layout = AnyResMax(3, 2, 4).video(9, View(14 * side, 14, (side, side)))
    tokens, newline = torch.randn(4, side * side, 6), torch.randn(6)
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=14 * side, patch_size=14))
    pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), tokens)
    expected = torch.cat([pooled.flatten(0, 1), newline[None]])
    assert max_difference(arrange(tokens, (side, side), [layout], newline[None]), expected) <= 1e-6


def test_hd_keeps_the_order_of_its_views() -> None:
    tokens = torch.randn(5, 4, 3)
    assert torch.equal(arrange(tokens, (2, 2), laid(HD(2), (50, 40), (2, 2)), None), tokens.flatten(0, 1))


def test_layouts_and_views_must_agree() -> None:
    (layout,) = laid(AnyRes(LLAVA), (40, 20), (2, 2))
    with pytest.raises(ValueError, match="3 views laid out but 2 encoded"):
        arrange(torch.zeros(2, 4, 3), (2, 2), [layout], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="built without"):
        arrange(torch.zeros(3, 4, 3), (2, 2), [layout], None)
    (native,) = laid(Native(14), (42, 28), (3, 3))
    with pytest.raises(ValueError, match="a 2 x 3 part of tokens"):
        arrange(torch.zeros(1, 4, 3), (2, 2), [native], None)


@pytest.mark.parametrize(("n", "start"), [(27, [0, 2, 5, 7, 10, 12]), (52, [0, 1, 2, 4, 5, 6, 8]), (35, [0, 2, 4])])
def test_golden_buckets(n: int, start: list[int]) -> None:
    """Recorded from transformers 5.23 (facts/idefics2_onevision_openvision.md)."""
    assert buckets(torch.tensor([n]), n, 70)[0, : len(start)].tolist() == start


def test_positions_equal_transformers() -> None:
    """All rows and columns that float32 gets right, padded in one batch; the embedding itself, not only its index."""
    config = Idefics2VisionConfig(hidden_size=4, image_size=140, patch_size=2)
    theirs = Idefics2VisionEmbeddings(config)
    rows = torch.tensor(EXACT)
    columns = rows.flip(0)
    mask = torch.zeros(len(rows), 70, 70, dtype=torch.bool)
    for place, row, column in zip(mask, rows, columns, strict=True):
        place[:row, :column] = True
    theirs.patch_embedding.weight.data.zero_()
    theirs.patch_embedding.bias.data.zero_()
    expected = theirs(torch.zeros(len(rows), 3, 140, 140), mask).unflatten(1, (70, 70))
    table = theirs.position_embedding.weight
    index = buckets(rows, 70, 70)[:, :, None] * 70 + buckets(columns, 70, 70)[:, None]
    assert torch.equal(table[index][mask], expected[mask])


def test_native_features_equal_transformers() -> None:
    """Idefics2's vision tower with the weights of a timm SigLIP, on two padded views of different shapes."""
    eye = encoder(NAMES[0])
    config = Idefics2VisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config.hidden_act, config._attn_implementation = "gelu", "sdpa"
    theirs = Idefics2VisionTransformer(config).eval()
    theirs.load_state_dict(dict(transformers_names(eye.model.state_dict())))
    shapes = torch.tensor([[28, 12], [20, 32]])
    pixels = torch.randint(0, 256, (2, 3, 28, 32), dtype=torch.uint8)
    ours = native_features(eye, pixels, shapes)
    mask = ours.mask.unflatten(1, ours.grid)
    expected = theirs((pixels - eye.shift) / eye.scale, mask).last_hidden_state
    assert max_difference(ours.tokens[ours.mask], expected[ours.mask]) <= 1e-5


def transformers_names(timm: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    renamed = {
        "patch_embed.proj": "embeddings.patch_embedding",
        "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "blocks": "encoder.layers",
    }
    for name, value in timm.items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        if name == "pos_embed":
            yield "embeddings.position_embedding.weight", value[0]
        elif "attn.qkv" in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                yield name.replace("attn.qkv", f"self_attn.{part}_proj"), third
        else:
            yield re.sub(r"^norm", "post_layernorm", name), value


NAMES = [
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_base_patch14_reg4_dinov2.lvd142m",
]


def encoder(name: str) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder(name, None, -1, image_size=32, patch_size=4, width=16, depth=2, heads=2).eval()


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_real_patch(name: str) -> None:
    """Views of several shapes in one batch, over noise as padding, equal each alone; with and without class tokens."""
    eye, shapes = encoder(name), torch.tensor([[32, 32], [12, 32], [27, 9], [8, 8]])
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    together = native_features(eye, pixels, shapes)
    assert together.mask is not None
    for view, (height, width) in enumerate(shapes.tolist()):
        alone = native_features(eye, pixels[view : view + 1, :, :height, :width], shapes[view : view + 1])
        kept = together.tokens[view, together.mask[view]]
        assert alone.grid == (height // 4, width // 4)
        assert max_difference(kept, alone.tokens[0]) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_full_square_is_the_ordinary_forward_pass(name: str) -> None:
    eye, pixels = encoder(name), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert max_difference(eye(pixels).tokens, native_features(eye, pixels, torch.full((2, 2), 32)).tokens) <= 1e-5


def processors(chat: Chat) -> list[Processor]:
    """Every kind of layout for the tiny VLM: 16 px views, 2 x 2 tokens each."""
    tilings = [Squash(), AnyRes(LLAVA), AnyResMax(3, 1, 4), HD(2), Native(8), Split4(8, "|")]
    return [Processor(chat, tiling, {"eye": Eye(16, (0.5, 0.5, 0.5), 8)}, (2, 2), 400) for tiling in tilings]


def examples(chat: Chat, prompt: bool = False) -> list[Example]:
    """One image, two images, none, per tiling; of different shapes."""
    out = []
    for number, processor in enumerate(processors(chat)):
        for index in range(3):
            sample = ColourSource()[index + 3 * number]
            shapes = [(9 + 7 * number, 30), (12, 9 + 5 * index)]
            images = tuple(Plain(image.colour, shapes[i]) for i, image in enumerate(sample.images))
            sample = replace(sample, images=images)
            out.append(processor.prompt(sample) if prompt else processor.example(sample))
    return out


def built() -> VLM:
    torch.manual_seed(0)
    vlm = tiny_vlm()
    return VLM(dict(vlm.encoder), vlm.connector, vlm.llm, newline=True)


def gradients(vlm: VLM, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss over all batches, and every parameter's gradient of it."""
    vlm.zero_grad()
    losses = [vlm(batch) for batch in batches]
    for loss in losses:
        loss.backward()
    found = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    return sum(loss.item() for loss in losses), found


def test_packed_row_of_several_tilings_equals_unpacked(chat: Chat) -> None:
    """Loss and all gradients, newline's too, per answer token within 1e-5; views of several shapes in one row."""
    vlm, processor, cases = built(), processors(chat)[0], examples(chat)
    cases = [*cases[::2], cases[7]]  # every tiling with images, several of them under AnyResMax, and text alone
    row, single = pack(cases, processor), [pack([case], processor) for case in cases]
    assert row.pixels["eye"].shape[2:] == (16, 16)
    assert len(row.sizes["eye"]) == len(row.pixels["eye"])
    answers = int(row.targets.ne(IGNORE).sum())
    (loss, together), (losses, apart) = gradients(vlm, [row]), gradients(vlm, single)
    assert together["connector.newline.weight"].any()
    assert together.keys() == apart.keys() == dict(vlm.named_parameters()).keys()
    assert max(max_difference(together[n], apart[n]) for n in together) / answers <= 1e-5
    assert abs(loss - losses) / answers <= 1e-5


def test_batched_generation_over_several_tilings(chat: Chat) -> None:
    vlm, processor, cases = built().eval(), processors(chat)[0], examples(chat, prompt=True)
    stop = processor.chat.stop
    batched = vlm.generate(pad_left(cases, processor), 4, stop)
    for row, case in list(zip(batched, cases, strict=True))[::2]:
        alone = vlm.generate(pad_left([case], processor), 4, stop)[0]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_split_native_views_through_a_resampler(chat: Chat) -> None:
    """Idefics2's arrangement: every view its own shape, three latents each; a batch changes nothing."""
    vlm = built()
    connector = Perceiver({"eye": 16}, 32, latents=3, depth=1, heads=2, head_dim=8, kv_heads=1)
    vlm = VLM(dict(vlm.encoder), connector, vlm.llm)
    processor = Processor(chat, Split4(8, "|"), {"eye": Eye(16, (0.5, 0.5, 0.5), 8)}, (1, 3), 400)
    wide, tall = (replace(ColourSource()[0], images=(Plain("red", size),)) for size in ((40, 12), (9, 50)))
    cases = [processor.example(sample) for sample in (wide, tall)]
    assert [len(case.views["eye"]) for case in cases] == [5, 5]
    together = vlm(pack(cases, processor)).item()
    assert together == pytest.approx(sum(vlm(pack([case], processor)).item() for case in cases), rel=1e-5)


def test_a_text_only_row_leaves_the_newline_a_zero_gradient(chat: Chat) -> None:
    vlm, processor = built(), processors(chat)[1]
    _, found = gradients(vlm, [pack([processor.example(ColourSource()[2])], processor)])
    assert not found["connector.newline.weight"].any()
    assert found.keys() == dict(vlm.named_parameters()).keys()


def test_views_of_one_size_are_not_masked(processor: Processor) -> None:
    row = pack([processor.example(ColourSource()[0])], processor)
    assert row.sizes == {}
    assert np.prod(row.pixels["eye"].shape[2:]) == 16 * 16


def test_encoders_without_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="need learned positions, Identity has none"):
        native_features(torch.nn.Identity(), torch.zeros(1, 3, 8, 8), torch.tensor([[8, 8]]))
