"""From an image reference (bytes, a path, something drawn) to RGB pixels, or to its size alone.

Every way in which an image can be broken ends in one `BadRecord` with a short reason. What was transparent becomes
white, EXIF orientation is applied, and of an animation the first frame is used. Only `FORMATS` are read: Pillow's other
plugins are rare in training data, and its EPS reader starts a Ghostscript process. Resizing and normalisation are not
done here (tilings do that); no global Pillow setting is changed.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_lab.data.sample import BadRecord, ImageRef

MAX_PIXELS = 64 * 1024**2  # 64 Mpx (8192 x 8192): 192 MiB once decoded to RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> what makes it upright (EXIF 2.3, 4.6.4); 5 to 8 swap width and height
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(ref: ImageRef, where: str, record: str) -> Image.Image:
    """The upright RGB picture. `where` and `record` only name the culprit if this raises `BadRecord`."""
    if not isinstance(ref, bytes | Path):
        return ref.draw()
    with _opened(ref, where, record) as image:
        orientation = _orientation(image)
        image.load()
        upright = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
        return _rgb(upright)


def image_size(ref: ImageRef, where: str, record: str) -> tuple[int, int]:
    """(width, height) as `load_image` will return it, from the header alone. Raises `BadRecord` like `load_image`."""
    if not isinstance(ref, bytes | Path):
        return ref.size
    with _opened(ref, where, record) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


@contextmanager
def _opened(ref: bytes | Path, where: str, record: str) -> Iterator[Image.Image]:
    """The opened, not yet decoded image; whatever goes wrong until it is closed again becomes a `BadRecord`."""
    try:
        with _stream(ref) as stream, _header(stream) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes: OSError, SyntaxError, zlib...
        name = f"image {ref}" if isinstance(ref, Path) else "image"
        raise BadRecord(where, record, f"{name} {_reason(error)}") from error


def _stream(ref: bytes | Path) -> BinaryIO:
    return io.BytesIO(ref) if isinstance(ref, bytes) else ref.open("rb")


def _header(stream: BinaryIO) -> Image.Image:
    if not stream.read(1):
        raise _Refused("is empty (0 bytes)")
    image = Image.open(stream, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _Refused(f"is {width} x {height}, over the limit of {MAX_PIXELS} pixels")
    return image


class _Refused(ValueError):
    """An image that Pillow could open and we do not take; the message goes on from the image's name."""


def _reason(error: Exception) -> str:
    match error:
        case _Refused():
            return str(error)
        case FileNotFoundError():
            return "is not there"
        case UnidentifiedImageError():
            return f"is none of {', '.join(FORMATS)}"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"is over the limit of {MAX_PIXELS} pixels"
    return f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, without decoding pixels. Call it before `image.load()`."""
    # Pillow turns a TIFF itself, and decodes a whole PNG in search of an EXIF block that the header did not have.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken metadata is common on the web and says nothing about the pixels
        return 1
    return orientation if orientation in UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise _Refused("has floating-point pixels, for which no white is defined")
    if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion would clip all above 255 to white
        grey = np.clip(np.asarray(image) / 257, 0, 255).round().astype(np.uint8)  # 65535 -> 255
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white, rgba = Image.new("RGB", image.size, "white"), image.convert("RGBA")
    white.paste(rgba, mask=rgba)
    return white
