"""Every kind of image that must load, with its pixels checked, and every kind that must be refused with a reason."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_lab.data import images
from vlm_lab.data.images import UPRIGHT, image_size, load_image
from vlm_lab.data.sample import BadRecord

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def load(ref: bytes | Path) -> Image.Image:
    """Loads, and checks on the way that the header already told the truth about the size."""
    image = load_image(ref, "data.json", "line 3")
    assert image.mode == "RGB"
    assert image_size(ref, "data.json", "line 3") == image.size
    return image


def refused(ref: bytes | Path, function: object = load_image) -> str:
    with pytest.raises(BadRecord) as caught:
        function(ref, "data.json", "line 3")
    assert (caught.value.where, caught.value.record) == ("data.json", "line 3")
    assert "\n" not in caught.value.reason and len(caught.value.reason) < 200
    return caught.value.reason


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG", "JPEG2000", "AVIF"])
def test_formats_by_bytes_and_by_path(format: str, tmp_path: Path) -> None:
    data = encode(Image.new("RGB", (20, 10), RED), format)
    path = tmp_path / "picture"
    path.write_bytes(data)
    for image in (load(data), load(path)):
        assert image.size == (20, 10)
        assert np.abs(np.asarray(image)[5, 5].astype(int) - RED).max() <= 3


class Disc:
    size = (7, 5)

    def draw(self) -> Image.Image:
        return Image.new("RGB", self.size, RED)


def test_drawn() -> None:
    assert load(Disc()).getpixel((3, 3)) == RED


@pytest.mark.parametrize("mode, value", [("RGBA", (0, 0, 255, 0)), ("LA", (0, 0))])
def test_alpha_becomes_white(mode: str, value: tuple[int, ...]) -> None:
    assert load(encode(Image.new(mode, (4, 4), value))).getpixel((1, 1)) == WHITE


def test_half_transparent_is_mixed_with_white() -> None:
    assert load(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))).getpixel((1, 1)) == (255, 127, 127)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(format: str) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    loaded = load(encode(image, format, transparency=0))
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 1))) == (WHITE, RED)


def test_transparent_colour_key_becomes_white() -> None:
    assert load(encode(Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9))).getpixel((1, 1)) == WHITE


def test_plain_palette() -> None:
    assert load(encode(Image.new("RGB", (4, 4), RED).quantize())).getpixel((1, 1)) == RED


def test_cmyk() -> None:
    red = load(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert red[0] > 230 and red[1] < 30 and red[2] < 60


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_range(format: str) -> None:
    grey = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    assert np.asarray(load(encode(grey, format)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("value, expected", [(1, WHITE), (0, (0, 0, 0))])
def test_one_bit(value: int, expected: tuple[int, int, int]) -> None:
    assert load(encode(Image.new("1", (4, 4), value))).getpixel((1, 1)) == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, format: str) -> None:
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste(RED, (0, 0, 16, 8))  # red in the top left quarter
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo.get(orientation, UPRIGHT[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load(encode(stored, format, exif=exif))
    assert loaded.size == (32, 16)
    assert loaded.getpixel((4, 4))[0] > 200 and all(loaded.getpixel(at)[0] < 60 for at in [(28, 4), (4, 12), (28, 12)])


def test_broken_exif_does_not_matter() -> None:
    assert load(encode(Image.new("RGB", (8, 4), RED), "JPEG", exif=b"Exif\0\0not a tiff header")).size == (8, 4)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert load(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((1, 1)) == RED


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated(format: str, kept: float) -> None:
    data = encode(NOISE, format)
    refused(data[: int(len(data) * kept)])


def test_truncated_by_path_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(encode(NOISE)[:1000])
    assert str(path) in refused(path) and "cannot be decoded" in refused(path)


@pytest.mark.parametrize("function", [load_image, image_size])
def test_not_an_image(function: object, tmp_path: Path) -> None:
    page = tmp_path / "page.jpg"
    page.write_text("<html>404</html>")
    assert "is none of JPEG, PNG" in refused(page, function)
    assert "is none of JPEG, PNG" in refused(b"\x00\x01\x02", function)
    assert "is none of JPEG, PNG" in refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", function)


@pytest.mark.parametrize("function", [load_image, image_size])
def test_empty_and_missing(function: object, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert refused(tmp_path / "empty.png", function) == f"image {tmp_path / 'empty.png'} is empty (0 bytes)"
    assert refused(b"", function) == "image is empty (0 bytes)"
    assert refused(tmp_path / "gone.png", function) == f"image {tmp_path / 'gone.png'} is not there"
    assert "cannot be decoded" in refused(tmp_path, function)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises that many pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("function", [load_image, image_size])
@pytest.mark.parametrize("side", [8193, 10_000, 60_000])  # ours, Pillow's warning, Pillow's error
def test_decompression_bomb(side: int, function: object) -> None:
    pillows_own_limit = Image.MAX_IMAGE_PIXELS
    assert f"over the limit of {images.MAX_PIXELS} pixels" in refused(bomb(side, side), function)
    assert pillows_own_limit == Image.MAX_IMAGE_PIXELS


def test_decompression_bomb_where_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "over the limit" in refused(bomb(10_000, 10_000))


def test_size_needs_the_header_only() -> None:
    assert image_size(encode(NOISE)[:60], "data.json", "line 3") == (64, 64)


def test_float_pixels_are_refused() -> None:
    assert "floating-point" in refused(encode(Image.new("F", (4, 4), 0.5), "TIFF"))
