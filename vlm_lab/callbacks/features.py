"""Features of frozen encoders, kept instead of computed again: across epochs, the arms of a sweep, and runs.

A view's features depend on its pixels and on weights that do not change, so they are looked up by a hash of the pixels
in a folder that is named by a hash of the weights. A tower that trains, or that gets views of several shapes, computes.
`auto` keeps them only if looking up was measured to be faster than computing, if views come up again, and if the disk
has room. Off under ZeRO-3, whose processes must run an encoder together.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from rich.console import Console
from torch import Tensor, nn

from vlm_lab.feature_store import FeatureStore
from vlm_lab.model import freeze
from vlm_lab.model.features import FeatureMap
from vlm_lab.module import VLMTraining
from vlm_lab.strategies import shards_weights

PROBE = 3  # rows of a stage in which features are both computed and looked up; the first is for warming up
GROUP = 8  # views that a CPU encodes at once: how many they are decides where matrix products round


class Features(Callback):
    """Gives the model a `CachedTower` for every frozen encoder. `draws` of the stage, over `records`.

    `shared`: whether other runs will want the same features (a sweep's arms).
    """

    def __init__(self, folder: Path, mode: str, dtype: str | None, draws: int, records: int, shared: bool) -> None:
        self.folder, self.mode, self.dtype = folder, mode, dtype
        self.draws, self.records, self.shared = draws, records, shared
        self.towers: dict[str, CachedTower] = {}

    def on_train_start(self, trainer: Trainer, module: VLMTraining) -> None:
        vlm: Any = module.vlm
        if not hasattr(vlm, "lookups"):
            return  # a part is pretrained
        sharded = shards_weights(trainer)
        for name, encoder in vlm.encoder.items():
            if any(parameter.requires_grad for parameter in encoder.parameters()):
                continue
            compute = rounded(encoder if sharded else in_groups(encoder), self.dtype)
            vlm.lookups[name] = compute
            if self.mode != "off" and not sharded:
                again = self.shared or self.draws > self.records
                folder = self.folder / fingerprint(encoder, f"{self.dtype} {trainer.precision} {chip(module.device)}")
                views = min(self.draws, self.records)
                known, auto = again or folder.is_dir(), self.mode == "auto"
                tower = CachedTower(name, compute, folder, self.dtype, views, known, auto)
                vlm.lookups[name] = self.towers[name] = tower

    def on_train_end(self, trainer: Trainer, module: VLMTraining) -> None:
        vlm: Any = module.vlm
        getattr(vlm, "lookups", {}).clear()
        for tower in self.towers.values():
            tower.close()
            if trainer.is_global_zero:
                Console(stderr=True).print(tower.report(), highlight=False, soft_wrap=True)

    def on_exception(self, trainer: Trainer, module: VLMTraining, exception: BaseException) -> None:
        for tower in self.towers.values():
            tower.close()

    def summary(self) -> dict[str, Any]:
        """For stage.json: views looked up and computed, and seconds saved, of every tower with a cache."""
        return {name: tower.summary() for name, tower in self.towers.items()}


class CachedTower:
    """`pixels uint8 [V, 3, S, S] -> FeatureMap`, looked up where it is known, computed and kept elsewhere."""

    def __init__(
        self,
        name: str,
        compute: Callable[[Tensor], FeatureMap],
        folder: Path,
        dtype: str | None,
        views: int,
        again: bool,
        auto: bool,
    ) -> None:
        self.name, self.compute, self.folder = name, compute, folder
        self.kept: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.views, self.auto = views, auto
        self.store: FeatureStore | None = None
        self.why = "" if again or not auto else "no view comes up twice"  # why it is not in use
        self.rows = self.read = self.computed = 0
        self.seconds = {"read": 0.0, "compute": 0.0, "write": 0.0}
        self.counts = {"read": 0, "compute": 0, "write": 0}  # views behind `seconds`

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> FeatureMap:
        self.rows += 1
        if self.why:
            self.computed += len(pixels)
            return self.compute(pixels)
        keys = self.timed("read", len(pixels), lambda: keys_of(pixels))
        if self.rows <= PROBE or self.store is None or any(key not in self.store for key in keys):
            return self.fill(pixels, keys)
        self.read += len(keys)
        return self.timed("read", 0, lambda: self.looked_up(keys, pixels.device))

    def fill(self, pixels: Tensor, keys: list[bytes]) -> FeatureMap:
        """Compute all views of the row, keep those that are new, and in a stage's first rows measure."""
        found = self.timed("compute", len(keys), lambda: self.compute(pixels))
        self.computed += len(keys)
        if self.store is None:
            self.like = found._replace(tokens=found.tokens[:0].clone())
            self.kept = self.kept or found.tokens.dtype
            self.store = FeatureStore(self.folder, found.tokens[0].numel() * self.kept.itemsize)
        store, kept = self.store, self.kept
        self.timed("write", len(keys), lambda: store.add(keys, raw(found.tokens.to(kept))))
        if self.rows <= PROBE and all(key in store for key in keys):
            self.timed("read", 0, lambda: self.looked_up(keys, pixels.device))
        if self.rows == 1:
            self.seconds, self.counts = dict.fromkeys(self.seconds, 0.0), dict.fromkeys(self.counts, 0)
        elif self.rows == PROBE and self.auto:
            self.decide()
        return found

    def looked_up(self, keys: list[bytes], device: torch.device) -> FeatureMap:
        assert self.store is not None and self.kept is not None
        # Memory of torch, so that it is aligned as computed features are: for the same reason as in `rounded`.
        rows = torch.empty(len(keys), self.store.size, dtype=torch.uint8)
        self.store.read(keys, rows.numpy())
        tokens = rows.view(self.kept).view(len(keys), *self.like.tokens.shape[1:])
        return self.like._replace(tokens=tokens.to(device).to(self.like.tokens.dtype))

    def decide(self) -> None:
        """Give up where looking up takes as long as computing, or the disk may become full."""
        assert self.store is not None
        size = self.views * self.store.size
        if self.each("read") >= self.each("compute"):
            self.why = f"looking up takes {self.each('read') * 1e3:.2f} ms, computing {self.each('compute') * 1e3:.2f}"
        elif size > self.store.bytes_free / 2:
            self.why = f"{size / 2**30:.1f} GiB are more than half of the free disk"

    def timed(self, what: str, views: int, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        if isinstance(result, FeatureMap) and result.tokens.is_cuda:
            torch.cuda.synchronize()
        self.seconds[what] += time.perf_counter() - start
        self.counts[what] += views
        return result

    def each(self, what: str) -> float:
        """Seconds per view."""
        return self.seconds[what] / max(1, self.counts[what])

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def summary(self) -> dict[str, Any]:
        saved = self.read * (self.each("compute") - self.each("read")) - self.seconds["write"]
        return {"read": self.read, "computed": self.computed, "saved_s": saved, "off": self.why}

    def report(self) -> str:
        if self.why:
            return f"feature cache of {self.name}: not used, {self.why}"
        s = self.summary()
        full = f"; no more is kept: {self.store.full}" if self.store and self.store.full else ""
        return (
            f"feature cache of {self.name}: {s['read']:,} of {s['read'] + s['computed']:,} views looked up "
            f"({self.each('read') * 1e3:.2f} ms each, computing {self.each('compute') * 1e3:.2f}), "
            f"{s['saved_s']:.1f} s saved{full}"
        )


def in_groups(encoder: nn.Module) -> Callable[[Tensor], FeatureMap]:
    """On a CPU the same features, to the bit, in whatever company a view comes: always `GROUP` views, filled up.

    Not for an encoder whose weights are sharded: processes with other numbers of views would wait for each other.
    """

    def compute(pixels: Tensor) -> FeatureMap:
        if pixels.device.type != "cpu":
            return encoder(pixels)
        filled = torch.cat([pixels, pixels[:1].expand(-len(pixels) % GROUP, -1, -1, -1)])
        maps = [encoder(views) for views in filled.split(GROUP)]
        return maps[0]._replace(tokens=torch.cat([found.tokens for found in maps])[: len(pixels)])

    return compute


def rounded(encoder: Callable[[Tensor], FeatureMap], dtype: str | None) -> Callable[[Tensor], FeatureMap]:
    """The encoder, its features rounded to `dtype` (None: left as they are), in the cache or not.

    Contiguous, as they come from the cache: matrix products round in other places for other layouts of memory.
    """

    def compute(pixels: Tensor) -> FeatureMap:
        found: FeatureMap = encoder(pixels)
        tokens = found.tokens if dtype is None else found.tokens.to(getattr(torch, dtype)).to(found.tokens.dtype)
        return found._replace(tokens=tokens.contiguous())

    return compute


def chip(device: torch.device) -> str:
    """Another device rounds in other places."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def keys_of(pixels: Tensor) -> list[bytes]:
    views = pixels.cpu().contiguous().numpy()
    return [hashlib.blake2b(view.data, digest_size=16).digest() for view in views]


def raw(tokens: Tensor) -> Any:
    """[V, ...] of any dtype as bytes [V, size]."""
    return tokens.detach().cpu().contiguous().view(len(tokens), -1).view(torch.uint8).numpy()


def fingerprint(encoder: nn.Module, conditions: str) -> str:
    """Of all that the features depend on besides the pixels: weights, buffers (mean and std), and how it computes."""
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    lines = [f"{name} {freeze.digest(tensor)}" for name, tensor in tensors]
    settings = [f"{key}={getattr(encoder, key, None)}" for key in ("layers", "norm", "listed", "grid", "image_size")]
    text = "\n".join([repr(encoder), *lines, *settings, conditions, torch.__version__])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
