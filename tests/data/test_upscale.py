"""Random up-scaling: how often, by how much, up to where; and that layout and pixels of a sample agree on it."""

import io
from pathlib import Path

import numpy as np
import pytest
from helpers import ColourSource, Plain
from PIL import Image

from vlm_lab.data.loader import Records
from vlm_lab.data.mixture import Mixture
from vlm_lab.data.process import Example, Processor
from vlm_lab.data.sample import BadRecord, Sample, Video
from vlm_lab.data.tiling import Eye, Native
from vlm_lab.data.upscale import Upscaled, upscaled


def test_how_often_and_by_how_much() -> None:
    """4000 images of 1000 x 500: 70 % within 3 standard errors; factors in [1.5, 3] with the triangle's mean, 2.5."""
    sample = Sample("s", (), (Plain("red", (1000, 500)),) * 4000)
    images = upscaled(sample, 0.7, 10_000, np.random.default_rng(0)).images
    sizes = np.array([image.size for image in images if isinstance(image, Upscaled)])
    assert abs(len(sizes) / 4000 - 0.7) < 3 * (0.7 * 0.3 / 4000) ** 0.5
    assert np.abs(sizes[:, 0] - 2 * sizes[:, 1]).max() <= 1
    factors = sizes[:, 0] / 1000
    assert factors.min() >= 1.5 and factors.max() <= 3
    assert factors.mean() == pytest.approx((1.5 + 3 + 3) / 3, abs=3 * (1.5**2 / 18 / len(factors)) ** 0.5)
    assert np.mean(factors < 2.25) == pytest.approx(0.25, abs=0.03)  # half of the range, a quarter of the triangle


def test_the_limit_and_what_stays() -> None:
    """Enlarged to the limit where the factor would pass it; beyond it, and videos, untouched."""
    small, large, clip = Plain("red", (400, 100)), Plain("red", (700, 20)), Video((Plain("red"),))
    first, second, third = upscaled(Sample("s", (), (small, large, clip)), 1.0, 600, np.random.default_rng(0)).images
    assert isinstance(first, Upscaled) and first.size == (600, 150)
    assert second is large and third is clip


def test_pixels_of_an_encoded_image(tmp_path: Path) -> None:
    """Drawn at the announced size, bicubic, from bytes and from a file; a broken one names its record."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    picture.save(tmp_path / "a.png")
    for ref in (buffer.getvalue(), tmp_path / "a.png"):
        (image,) = upscaled(Sample("s", (), (ref,)), 1.0, 1000, np.random.default_rng(1)).images
        assert isinstance(image, Upscaled)
        expected = picture.resize(image.size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(image.draw()), np.asarray(expected))
    with pytest.raises(BadRecord, match="web: r7: image is empty"):
        upscaled(Sample("r7", (), (b"",), "web"), 1.0, 1000, np.random.default_rng(1))


def test_a_draw_is_enlarged_the_same_way_every_time(processor: Processor) -> None:
    """At native size: more tokens than the plain image, as many as the placeholders say; another draw, another size."""
    process = Processor(processor.chat, Native(8), {"eye": Eye(160, (0.5, 0.5, 0.5), 4)}, (40, 40), 4000)

    def records(upscale: float | None) -> Records:
        return Records([ColourSource(1)], Mixture([1], [1.0], 0), process, upscale=upscale)

    def tokens(example: Example | BadRecord) -> int:
        assert isinstance(example, Example)
        (view,), (layout,) = example.views["eye"], example.layouts
        assert layout.num_tokens == (view.shape[0] // 4) * (view.shape[1] // 4) == int((example.ids == -200).sum())
        return layout.num_tokens

    assert tokens(records(None)[0]) == 5 * 3  # 20 x 12 pixels
    counts = [tokens(records(1.0)[draw]) for draw in range(8)]
    assert counts == [tokens(records(1.0)[draw]) for draw in range(8)]
    assert min(counts) >= 7 * 4 and max(counts) <= 15 * 9 and len(set(counts)) > 1
