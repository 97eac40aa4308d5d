"""What an encoder hands to a connector: tokens that know where on the image they sit."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class FeatureMap:
    """Patch tokens of V views. `tokens [V, N, C]` are row-major over `grid (h, w)`, N == h * w.

    `mask [V, N]` is True on real patches; None means that every patch is real (no padding).
    """

    tokens: Tensor
    grid: tuple[int, int]
    mask: Tensor | None = None
