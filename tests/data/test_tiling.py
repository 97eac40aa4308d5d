"""Tilings: published token counts, the views of transformers' image processors, text markers, videos."""

from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from helpers import ColourSource
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from vlm_lab.batch import IGNORE, IMAGE_TOKEN
from vlm_lab.data.chat import Chat
from vlm_lab.data.process import Processor, spelt
from vlm_lab.data.sample import BadRecord, ImageSlot, Message, Sample, Video
from vlm_lab.data.tiling import HD, AnyRes, AnyResMax, Crop, Eye, Native, Pad, Split4, Squash, Tiling, Unpad, View
from vlm_lab.data.video import count_frames, read_frames

MEAN = (0.5, 0.5, 0.5)
LLAVA = [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)]  # (rows, columns), in LLaVA's own order
STAGE_1_5 = [(2, 2), (2, 1), (3, 1), (1, 2), (1, 3)]
ONE_VISION = View(384, 14, (27, 27))
IDEFICS2 = View(980, 14, (70, 70))
MARKER = "<fake_token_around_image>"
SIZES = [(28, 28), (10, 10), (40, 20), (20, 40), (100, 30), (30, 100), (57, 43), (3, 90), (64, 63)]
size = st.tuples(st.integers(1, 4000), st.integers(1, 4000))

# Image -> canvas, map, final map, tokens: recorded from LLaVA-VL/LLaVA-NeXT (facts/idefics2_onevision_openvision.md).
GOLDEN = {
    (384, 384): ((1, 1), (27, 27), (27, 27), 1485),
    (100, 100): ((1, 1), (27, 27), (27, 27), 1485),
    (336, 336): ((1, 1), (27, 27), (27, 27), 1485),
    (300, 200): ((1, 1), (19, 27), (19, 27), 1261),
    (640, 480): ((2, 2), (40, 54), (40, 54), 2929),
    (480, 640): ((2, 2), (54, 40), (54, 40), 2943),
    (512, 512): ((2, 2), (54, 54), (54, 54), 3699),
    (1024, 768): ((2, 3), (54, 73), (54, 73), 4725),
    (1280, 720): ((2, 4), (54, 96), (54, 96), 5967),
    (1000, 1000): ((3, 3), (81, 81), (81, 81), 7371),
    (1344, 896): ((3, 4), (73, 108), (73, 108), 8686),
    (1920, 1080): ((3, 5), (75, 135), (60, 108), 7269),
    (1080, 1920): ((5, 3), (135, 75), (108, 60), 7317),
    (3000, 1000): ((2, 6), (54, 162), (46, 140), 7215),
    (2304, 2304): ((6, 6), (162, 162), (81, 81), 7371),
    (4000, 400): ((1, 6), (17, 162), (17, 162), 3500),
    (4032, 3024): ((5, 6), (121, 162), (70, 93), 7309),
    (985, 1188): (None, None, None, 8765),  # the most expensive of 200,000 random sizes
}


@pytest.mark.parametrize("picture", GOLDEN)
def test_onevision_golden_counts(picture: tuple[int, int]) -> None:
    canvas, crop, final, tokens = GOLDEN[picture]
    (layout,) = AnyResMax(6, 9, 32).layouts([picture], ONE_VISION)
    base, tiles = layout.blocks
    assert (base.num_tokens, layout.num_tokens) == (729, tokens)
    assert canvas is None or (tiles.tiles, tiles.crop, tiles.size) == (canvas, crop, final)


@pytest.mark.parametrize(("cap", "tokens"), [(1, 1485), (4, 3699), (9, 7371), (16, 12501)])
def test_onevision_cap(cap: int, tokens: int) -> None:
    assert AnyResMax(6, cap, 32).layout((2304, 2304), ONE_VISION).num_tokens == tokens


def test_onevision_several_images_and_videos() -> None:
    tiling = AnyResMax(6, 9, 32)
    assert [layout.num_tokens for layout in tiling.layouts([(640, 480)] * 3, ONE_VISION)] == [730] * 3
    assert tiling.video(1000, ONE_VISION).num_tokens == 32 * 196 + 1
    assert tiling.video(5, ONE_VISION).num_tokens == 5 * 196 + 1
    assert AnyResMax(6, 9, 10, pool=1).video(99, ONE_VISION).num_tokens == 10 * 729 + 1


@pytest.mark.parametrize(("picture", "tokens"), [((640, 480), 2929), ((384, 384), 1513), ((1920, 1080), 2379)])
def test_plain_anyres_on_the_canvases_of_stage_1_5(picture: tuple[int, int], tokens: int) -> None:
    assert AnyRes(STAGE_1_5).layout(picture, ONE_VISION).num_tokens == tokens


@pytest.mark.parametrize(
    ("picture", "tokens"), [((336, 336), 1176), ((672, 672), 2928), ((640, 480), 2340), ((1008, 336), 2328)]
)
def test_llava_next_golden_counts(picture: tuple[int, int], tokens: int) -> None:
    assert AnyRes(LLAVA).layout(picture, View(336, 14, (24, 24))).num_tokens == tokens


def transformers_count(processor: type, side: int, canvases: list[tuple[int, int]], picture: tuple[int, int]) -> int:
    """The number of placeholders that a LLaVA processor of transformers writes, without its tokenizer."""
    theirs = SimpleNamespace(
        image_processor=SimpleNamespace(
            image_grid_pinpoints=[(side * rows, side * columns) for rows, columns in canvases]
        ),
        patch_size=14,
        num_additional_image_tokens=0,
        num_image_tokens=(side // 14) ** 2,
        vision_aspect_ratio="anyres_max_9",
    )
    theirs._get_unpadded_features = lambda *args: processor._get_unpadded_features(theirs, *args)
    return processor._get_number_of_features(theirs, picture[1], picture[0], side, side)


@settings(deadline=None, max_examples=300)
@given(size)
def test_counts_equal_transformers(picture: tuple[int, int]) -> None:
    following, one_vision = AnyRes(LLAVA), AnyResMax(6, 9, 32)
    expected = transformers_count(LlavaNextProcessor, 336, following.canvases, picture)
    assert following.layout(picture, View(336, 14, (24, 24))).num_tokens == expected
    expected = transformers_count(LlavaOnevisionProcessor, 384, one_vision.canvases, picture)
    assert one_vision.layout(picture, ONE_VISION).num_tokens == expected


FITTED = {  # image -> pixels, rows and columns of patches (facts/idefics2_onevision_openvision.md)
    (640, 480): ((640, 480), (34, 45)),
    (1920, 1080): ((980, 551), (39, 70)),
    (100, 100): ((378, 378), (27, 27)),
    (3000, 500): ((980, 378), (27, 70)),
    (500, 980): ((500, 980), (70, 35)),
    (980, 980): ((980, 980), (70, 70)),
}


@pytest.mark.parametrize("picture", FITTED)
def test_idefics2_golden_sizes(picture: tuple[int, int]) -> None:
    pixels, patches = FITTED[picture]
    tiling = Native(378)
    assert tiling.fit(picture, 980) == pixels
    assert tiling.layout(picture, IDEFICS2).blocks[0].size == patches
    assert tiling.layout(picture, View(980, 14, (1, 64))).num_tokens == 64


@given(size)
def test_cambrian_cuts_the_padding_off(picture: tuple[int, int]) -> None:
    """Rows and columns by `prepare_image_info`: new = int(short * side / long), (side - new) // 2 off at either end."""
    (width, height), side = picture, 24
    layout = Unpad().layout(picture, View(384, 14, (side, side)))
    short = int(min(picture) * side / max(picture) + 1e-9)  # float division falls short of whole numbers at times
    kept = side - 2 * ((side - short) // 2)
    rows, columns = (kept, side) if width >= height else (side, kept)
    assert layout.num_tokens == rows * (columns + 1)
    assert layout.padded == picture and layout.views == 1


def test_mini_gemini_hd_is_5n_tokens() -> None:
    assert HD(2).layout((640, 480), View(336, 14, (24, 24))).num_tokens == 2880


@pytest.fixture
def marked_chat(chat: Chat) -> Chat:
    """The same chat with Idefics2's marker as one token of its own."""
    copy = Chat(type(chat.tokenizer).from_pretrained(chat.tokenizer.name_or_path), "chatml")
    copy.tokenizer.add_special_tokens({"additional_special_tokens": [MARKER]})
    return copy


@pytest.mark.parametrize(("kind", "per_image"), [(Native, 66), (Split4, 326)])
def test_idefics2_text_around_images(marked_chat: Chat, kind: type[Native], per_image: int) -> None:
    """66 tokens for an image, 326 for a split one; touching images share a marker; nothing of it is learnt."""
    tiling, view = kind(378, MARKER), View(980, 14, (1, 64))
    content = (ImageSlot(0), ImageSlot(1), " and ", ImageSlot(2))
    sample = Sample("s", (Message("user", content), Message("assistant", ("red",))))
    layouts = tiling.layouts([(640, 480)] * 3, view)
    encoded = marked_chat.encode(*spelt(sample, layouts, tiling.marker))
    marker = marked_chat.tokenizer.convert_tokens_to_ids(MARKER)
    ours = np.isin(encoded.ids, (marker, IMAGE_TOKEN))
    assert ours.sum() == 3 * per_image - 1
    runs = "".join("i" if i == IMAGE_TOKEN else "m" if i == marker else "." for i in encoded.ids)
    one = "m" + ("i" * 64 + "m") * ((per_image - 1) // 65)
    assert runs.strip(".").split(".")[0] == one + one[1:]
    assert runs.strip(".").split(".")[-1] == one
    assert (encoded.targets[np.flatnonzero(ours) - 1] == IGNORE).all()


def test_without_a_marker_the_sample_is_left_alone() -> None:
    sample = ColourSource()[0]
    layouts = HD(2).layouts([(20, 12)], View(16, 8, (2, 2)))
    assert spelt(sample, layouts, "") == (sample, [20])


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(views: list[Image.Image], mean: float = 0.5, std: float = 0.5) -> np.ndarray:
    return ((np.stack(views) / 255 - mean) / std).transpose(0, 3, 1, 2)


def rendered(tiling: Tiling, image: Image.Image, side: int = 28, count: int = 1) -> list[Image.Image]:
    layout = tiling.layouts([image.size] * count, View(side, 14, (side // 14,) * 2))[0]
    return tiling.render(image, layout, Eye(side, MEAN, 14))


@pytest.mark.parametrize("picture", SIZES)
@pytest.mark.parametrize("name", ["anyres", "anyres_max", "anyres_max_several"])
def test_views_equal_transformers(name: str, picture: tuple[int, int]) -> None:
    """Pixel for pixel; transformers' PIL processors, with the canvases in our order (theirs settles ties otherwise)."""
    image, square = noise(*picture), {"height": 28, "width": 28}
    common = {"image_mean": MEAN, "image_std": MEAN, "do_pad": False}
    if name == "anyres":
        pinpoints = [[28 * rows, 28 * columns] for rows, columns in LLAVA]
        processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=pinpoints, **common
        )
        theirs, ours = processor(image)["pixel_values"][0], rendered(AnyRes(LLAVA), image)
    else:
        tiling, count = AnyResMax(3, 4, 8), 1 if name == "anyres_max" else 2
        pinpoints = [[28 * rows, 28 * columns] for rows, columns in tiling.canvases]
        processor = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints, **common)
        theirs, ours = processor([[image] * count])["pixel_values"][0], rendered(tiling, image, count=count)
    assert np.abs(normalised(ours) - np.asarray(theirs)).max() <= 1e-5


@pytest.mark.parametrize("picture", SIZES)
def test_cropped_views_equal_transformers(picture: tuple[int, int]) -> None:
    """Within one level of uint8: Pillow may take its two passes in the other order, and rounds between them."""
    image = noise(*picture).point(lambda level: 64 + level // 2)  # room for bicubic overshoot, clipped between passes
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=MEAN, image_std=MEAN
    )
    theirs = np.asarray(processor(image)["pixel_values"][0])
    assert np.abs(normalised(rendered(Crop(), image))[0] - theirs).max() <= 2 / 255 + 1e-5


@pytest.mark.parametrize("picture", SIZES)
@pytest.mark.parametrize("split", [False, True])
def test_native_views_equal_transformers(split: bool, picture: tuple[int, int]) -> None:
    image = noise(*picture)
    processor = Idefics2ImageProcessorPil(
        size={"shortest_edge": 28, "longest_edge": 70}, do_image_splitting=split, image_mean=MEAN, image_std=MEAN
    )
    theirs = processor(image)
    ours = rendered(Split4(28) if split else Native(28), image, 70)
    assert len(ours) == (5 if split else 1) == theirs["pixel_values"].shape[1]
    for view, values, mask in zip(ours, theirs["pixel_values"][0], theirs["pixel_attention_mask"][0], strict=True):
        height, width = mask.sum(0).max(), mask.sum(1).max()
        assert view.size == (width, height)
        assert np.abs(normalised([view])[0] - np.asarray(values)[:, :height, :width]).max() <= 1e-5


def test_hd_views_are_the_padded_square_and_its_quarters() -> None:
    image = noise(40, 20)
    whole, *crops = rendered(HD(2), image)
    assert np.array_equal(np.asarray(whole), np.asarray(rendered(Pad(), image)[0]))
    top, bottom = np.hstack([np.asarray(c) for c in crops[:2]]), np.hstack([np.asarray(c) for c in crops[2:]])
    large = rendered(Pad(), image, 56)[0]
    assert np.array_equal(np.vstack([top, bottom]), np.asarray(large))


def test_cropping_a_thin_image_builds_no_huge_one() -> None:
    assert rendered(Crop(), Image.new("RGB", (1, 20000)), 384)[0].size == (384, 384)


TILINGS = [Squash(), Pad(), Crop(), AnyRes(LLAVA), AnyResMax(3, 2, 4), HD(2), HD(3), Native(14), Split4(14)]


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.sampled_from(TILINGS))
def test_as_many_views_as_laid_out(picture: tuple[int, int], tiling: Tiling) -> None:
    """For encoders of different sides, each at its own."""
    image, view = Image.new("RGB", picture), View(28, 14, (2, 2))
    (layout,) = tiling.layouts([picture], view)
    for side in (28, 42):
        views = tiling.render(image, layout, Eye(side, MEAN, 14))
        assert len(views) == layout.views
        assert isinstance(tiling, Native) or {v.size for v in views} == {(side, side)}


@pytest.mark.parametrize(
    ("tiling", "grid", "encoders", "message"),
    [
        (AnyRes(LLAVA), (1, 64), 1, "tiling AnyRes stitches square maps, but the connector gives 1 x 64 tokens"),
        (Native(14), (1, 1), 2, "tiling Native takes one encoder, got 2"),
        (Native(70), (2, 2), 1, "tiling.shortest = 70: needs to be from one patch of 14 to the encoder's 28 pixels"),
        (Split4(14), (3, 3), 1, "needs a connector with one token per patch, or a resampler; this one makes 3 x 3"),
    ],
)
def test_parts_that_do_not_fit(tiling: Tiling, grid: tuple[int, int], encoders: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiling.check(View(28, 14, grid), encoders)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten grey frames of 32 x 16 pixels, each 20 levels brighter than the last."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for index in range(10):
            picture = np.full((16, 32, 3), 20 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_are_spread_over_the_video(film: Path) -> None:
    video = Video(film)
    assert count_frames(video, "films", "f") == 10
    for count, expected in ((1, [0]), (4, [0, 3, 6, 9]), (10, list(range(10)))):
        frames = read_frames(video, count, "films", "f")
        assert {frame.size for frame in frames} == {(32, 16)}
        assert [round(np.asarray(frame).mean() / 20) for frame in frames] == expected


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot be decoded"), (b"no film", "cannot be decoded")])
def test_broken_videos_are_bad_records(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "film.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadRecord, match=rf"films: f: video .*film.mp4 {reason}"):
        count_frames(Video(path), "films", "f")


def test_a_video_that_breaks_off_is_a_bad_record(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_lab.data.video.count_frames", lambda *_: 20)
    with pytest.raises(BadRecord, match="breaks off before frame 19"):
        read_frames(Video(film), 2, "films", "f")


def test_a_sample_with_a_video_and_an_image(chat: Chat, film: Path) -> None:
    """A video is one slot: here 3 frames of 1 token and a newline. The image beside it is alone, and so is tiled."""
    processor = Processor(chat, AnyResMax(3, 4, 3), {"eye": Eye(16, MEAN, 8)}, (2, 2), 200)
    source = ColourSource()[0]
    content = (ImageSlot(0), " and ", ImageSlot(1), " what colour?")
    sample = Sample("v", (Message("user", content), Message("assistant", ("red",))), (Video(film), *source.images))
    example = processor.example(sample)
    video, image = example.layouts
    assert (video.views, video.num_tokens, len(image.blocks)) == (3, 4, 2)
    assert (example.ids == IMAGE_TOKEN).sum() == video.num_tokens + image.num_tokens
    assert len(example.views["eye"]) == video.views + image.views
    assert [round(v.mean() / 20) for v in example.views["eye"][:3]] == [0, 4, 9]


@pytest.mark.parametrize("tiling", [Squash(), HD(2), Native(14)])
def test_other_tilings_refuse_videos(tiling: Tiling) -> None:
    with pytest.raises(ValueError, match="has no rule for videos"):
        tiling.video(10, ONE_VISION)
