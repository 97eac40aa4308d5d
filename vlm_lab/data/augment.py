"""Augmentation for encoder pretraining: inception crop and SimCLR's colour jitter, from a given random generator.

Not for VLM training: a question about a place or a colour must stay true.
"""

import math

from numpy.random import Generator
from PIL import Image
from torchvision.transforms import functional as TF

Box = tuple[float, float, float, float]  # left, top, right, bottom


def augment(image: Image.Image, side: int, crop: float, jitter: float, rng: Generator) -> Image.Image:
    """A part of the image of at least `crop` of its area as a square, its colours changed with strength `jitter`.

    `crop=1, jitter=0` squashes the whole image and draws no random number. Pillow's bilinear filter is antialiased.
    """
    box = None if crop >= 1 else inception_crop(image.size, crop, rng)
    square = image.resize((side, side), Image.Resampling.BILINEAR, box)
    return jittered(square, jitter, rng) if jitter else square


def inception_crop(size: tuple[int, int], least: float, rng: Generator) -> Box:
    """A box of `least` to all of the area with an aspect ratio of 3:4 to 4:3 (GoogLeNet); all of it if none fits."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(least, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, min(left + w, width), min(top + h, height)
    return 0, 0, width, height


def jittered(image: Image.Image, strength: float, rng: Generator) -> Image.Image:
    """SimCLR (arXiv 2002.05709, appendix A): jitter in 80 % of the cases, then grey in 20 %."""
    if rng.random() < 0.8:
        spread = 0.8 * strength
        steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
        factors = [rng.uniform(max(0.0, 1 - spread), 1 + spread) for _ in steps]
        changes = [*zip(steps, factors, strict=True), (TF.adjust_hue, rng.uniform(-0.2 * strength, 0.2 * strength))]
        for number in rng.permutation(len(changes)):
            change, factor = changes[number]
            image = change(image, factor)
    return TF.to_grayscale(image, 3) if rng.random() < 0.2 else image
