"""Random up-scaling of images (`stages.*.upscale`), so that small ones are also seen at the sizes of large ones.

Source: Idefics2 (arXiv 2405.02246) and the authors' later code, whose numbers these are. An image
becomes 1.5 to 3 times as large, larger factors being more likely, before its tiling looks at it. Not beyond twice the
encoder's side, where every view, quarters of images included, would be shrunk again.
"""

from dataclasses import dataclass, replace

from numpy.random import Generator
from PIL import Image

from vlm_lab.data.images import image_size, load_image
from vlm_lab.data.sample import ImageRef, Sample, Video

LEAST, MOST = 1.5, 3.0


@dataclass
class Upscaled:
    """An image at another size (width, height): a reference like any other. `record` is named if it is broken."""

    image: ImageRef
    size: tuple[int, int]
    record: tuple[str, str]

    def draw(self) -> Image.Image:
        return load_image(self.image, *self.record).resize(self.size, Image.Resampling.BICUBIC)


def upscaled(sample: Sample, share: float, limit: int, rng: Generator) -> Sample:
    """Each image with probability `share` enlarged, its longest side to `limit` pixels at most; videos stay.

    Raises BadRecord for an image whose size cannot be read.
    """
    images = [ref if isinstance(ref, Video) else maybe_larger(ref, sample, share, limit, rng) for ref in sample.images]
    return replace(sample, images=tuple(images))


def maybe_larger(ref: ImageRef, sample: Sample, share: float, limit: int, rng: Generator) -> ImageRef:
    chosen, factor = rng.random() < share, rng.triangular(LEAST, MOST, MOST)  # both drawn for every image
    if not chosen:
        return ref
    record = sample.where, sample.id
    width, height = image_size(ref, *record)
    factor = min(factor, limit / max(width, height))
    return Upscaled(ref, (round(width * factor), round(height * factor)), record) if factor > 1 else ref
