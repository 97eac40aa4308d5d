"""Pictures of scenes as lazily drawn references, and the file of ready-made pixels behind them.

`SceneImage` is the `Drawn` of `data/sample.py`. With a cache folder the first picture asked for draws the whole split
into one file (raw RGB, memory-mapped afterwards); several processes may ask at once, one builds and the others wait.
The file is named by all that decides its pixels, so it never goes stale. It is large: about 50 KB a picture.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from vlm_lab.data.scenes.compose import compose
from vlm_lab.data.scenes.draw import render
from vlm_lab.data.scenes.world import WORLD_VERSION, Scene

Compose = Callable[
    [int, str, int], Scene | None
]  # (seed, split, number) -> what picture `number` shows, if there is one


@dataclass(frozen=True)
class ImageCache:
    """The pictures 0 to `count` - 1 that `compose` describes. Holds no pixels itself, so it pickles in a few bytes.

    `name` stands for `compose` in the file's name.
    """

    folder: str
    seed: int
    split: str
    count: int
    name: str = "scenes"
    compose: Compose = compose

    @property
    def path(self) -> Path:
        name = f"{self.name}-v{WORLD_VERSION}-{self.seed}-{self.split}-{self.count}.rgb"
        return Path(self.folder).expanduser() / name

    def read(self, index: int) -> Image.Image:
        sizes, starts, pixels = _open(self)
        flat = pixels[starts[index] : starts[index + 1]]
        return Image.frombytes("RGB", tuple(sizes[index].tolist()), flat.tobytes())


@lru_cache(maxsize=8)
def _open(cache: ImageCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes [count, 2] (width, height), starts [count + 1] and all pixels [bytes]; builds the file if there is none."""
    if not cache.path.exists():
        _build(cache)
    pixels = np.memmap(cache.path, dtype=np.uint8, mode="r")
    head = cache.count * 4
    sizes = pixels[:head].view("<u2").reshape(-1, 2)
    starts = head + np.concatenate([[0], np.cumsum(sizes.astype(np.int64).prod(axis=1) * 3)])
    return sizes, starts, pixels


def _build(cache: ImageCache) -> None:
    cache.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache.path}.lock"):
        if cache.path.exists():  # another process was faster
            return
        unfinished = cache.path.with_suffix(".tmp")  # one builder at a time, so a fixed name
        with unfinished.open("wb") as file:
            sizes = np.zeros((cache.count, 2), dtype="<u2")
            file.write(sizes.tobytes())
            for index in range(cache.count):
                scene = cache.compose(cache.seed, cache.split, index)
                if scene is not None:
                    sizes[index] = scene.size
                    file.write(render(scene).tobytes())
            file.seek(0)
            file.write(sizes.tobytes())
        os.replace(unfinished, cache.path)


@dataclass
class SceneImage:
    """Picture number `index` of those that `compose` describes; `size` is (width, height)."""

    size: tuple[int, int]
    seed: int
    split: str
    index: int
    cache: ImageCache | None = None
    compose: Compose = compose

    def draw(self) -> Image.Image:
        if self.cache is not None:
            return self.cache.read(self.index)
        scene = self.compose(self.seed, self.split, self.index)
        assert scene is not None
        return render(scene)
