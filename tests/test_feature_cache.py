"""Features of frozen encoders that are kept: bit-equal to computed ones, shared, given up where they do not pay."""

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_vlm
from test_fit import fit
from torch import Tensor

from vlm_lab.callbacks import Features
from vlm_lab.callbacks.features import GROUP, PROBE, CachedTower, fingerprint, in_groups, keys_of
from vlm_lab.data.process import Processor
from vlm_lab.feature_store import FeatureStore
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.features import FeatureMap
from vlm_lab.module import VLMTraining

TABLE = {"connector": 3e-3, "llm": 3e-3}


def trained(
    processor: Processor, folder: Path, mode: str, dtype: str | None = None, **stage: object
) -> tuple[VLMTraining, list[float], Features]:
    """12 steps of 8 samples: 24 records, four times each."""
    cache = Features(folder / "features", mode, dtype, draws=96, records=24, shared=False)
    options = {"train": TABLE, "micro_batch": 4, "steps": 12, **stage}
    return *fit(processor, folder, extra=(cache,), **options), cache


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_on_equals_off(processor: Processor, tmp_path: Path, dtype: str | None) -> None:
    """Bit for bit, in losses and weights; a later run finds all features and computes those of its first rows only."""
    off, losses, _ = trained(processor, tmp_path, "off", dtype)
    for run in ("first", "second"):
        on, others, cache = trained(processor, tmp_path, "on", dtype)
        assert others == losses
        assert all(torch.equal(p, q) for p, q in zip(on.vlm.parameters(), off.vlm.parameters(), strict=True))
        counts = cache.summary()["eye"]
        assert counts["read"] > (60 if run == "second" else 30)
        assert cache.towers["eye"].rows == 24
        if run == "second":
            assert counts["computed"] <= PROBE * 8  # of two images at most in each of a row's four samples
    size = cache.towers["eye"].store.size
    assert size == 4 * 16 * (4 if dtype is None else 2)  # tokens * channels * bytes
    if dtype is not None:
        assert losses != trained(processor, tmp_path, "off")[1]


@pytest.mark.parametrize("side, patch, width", [(64, 16, 128), (96, 8, 192), (72, 8, 96), (56, 8, 64), (32, 16, 64)])
def test_a_view_has_the_same_features_in_any_company(side: int, patch: int, width: int) -> None:
    """To the bit, at 4 to 144 patches: a matrix product of other rows may round in other places."""
    torch.manual_seed(0)
    encoder = TimmEncoder(
        "vit_base_patch16_siglip_224", None, image_size=side, patch_size=patch, width=width, depth=2, heads=2
    )
    views = torch.randint(0, 255, (2 * GROUP + 3, 3, side, side), dtype=torch.uint8)
    compute = in_groups(encoder.eval())
    with torch.no_grad():
        found = compute(views)
        torch.testing.assert_close(found.tokens, encoder(views).tokens, rtol=1e-4, atol=1e-5)
        for number in (1, 2, 3, 5, 8, 13):
            some = torch.randperm(len(views))[:number]
            assert torch.equal(compute(views[some]).tokens, found.tokens[some])


def test_what_trains_is_computed(processor: Processor, tmp_path: Path) -> None:
    _, _, cache = trained(processor, tmp_path, "on", train={**TABLE, "encoder": 1e-3}, steps=2)
    assert cache.towers == {} and not (tmp_path / "features").exists()


def test_other_weights_or_preprocessing_have_other_features() -> None:
    torch.manual_seed(0)
    encoder = tiny_vlm().encoder["eye"]
    first = fingerprint(encoder, "float32")
    assert first == fingerprint(encoder, "float32") != fingerprint(encoder, "float16")
    encoder.shift += 1  # the mean that pixels are normalised with
    second = fingerprint(encoder, "float32")
    encoder.model.blocks[0].mlp.fc1.weight.data[0, 0] += 1e-6
    assert len({first, second, fingerprint(encoder, "float32")}) == 3
    views = torch.randint(0, 255, (2, 3, 4, 4), dtype=torch.uint8)
    changed = views.clone()
    changed[1, 0, 0, 0] ^= 1
    assert keys_of(views)[0] == keys_of(changed)[0] and keys_of(views)[1] != keys_of(changed)[1]


def tower(folder: Path, seconds: float, views: int = 10, again: bool = True) -> CachedTower:
    """A tower of 512 x 512 features that takes `seconds` for a view of any content."""
    features = torch.rand(512, 512)

    def compute(pixels: Tensor) -> FeatureMap:
        if seconds:
            time.sleep(seconds * len(pixels))
        return FeatureMap(features.expand(len(pixels), -1, -1), (16, 32))

    return CachedTower("eye", compute, folder, None, views, again, auto=True)


def test_auto_measures(tmp_path: Path) -> None:
    """Half a megabyte is looked up in well under 50 ms, and not for free; what costs nothing is computed."""
    views = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)
    slow, free = tower(tmp_path / "slow", 0.05), tower(tmp_path / "free", 0.0)
    for cached in (slow, free):
        first = cached(views)
        for _ in range(PROBE + 2):
            again = cached(views)
        assert torch.equal(again.tokens, first.tokens) and again.grid == (16, 32)
        cached.close()
    assert slow.why == "" and slow.read == 3 * 4
    assert 0.1 < slow.summary()["saved_s"] < 3 * 4 * 0.1
    assert "of 24 views looked up" in slow.report()
    assert free.read == 0 and "not used, looking up takes" in free.report()


def test_auto_needs_room_and_repetition(tmp_path: Path) -> None:
    views = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)
    huge = tower(tmp_path / "huge", 0.05, views=10**9)
    for _ in range(PROBE + 1):
        huge(views)
    assert "more than half of the free disk" in huge.report()
    once = tower(tmp_path / "once", 0.005, again=False)
    once(views)
    assert once.report().endswith("not used, no view comes up twice") and not (tmp_path / "once").exists()


def read(store: FeatureStore, wanted: list[bytes]) -> np.ndarray:
    out = np.empty((len(wanted), store.size), dtype=np.uint8)
    store.read(wanted, out)
    return out


def keys(count: int) -> list[bytes]:
    return [index.to_bytes(16, "big") for index in range(count)]


def test_rows_are_found_by_others(tmp_path: Path) -> None:
    """Two writers at once, rows in both, a later reader; a writer that dies before it publishes leaves nothing."""
    rows = np.random.default_rng(0).integers(0, 255, (6, 100), dtype=np.uint8)
    one, two = FeatureStore(tmp_path, 100), FeatureStore(tmp_path, 100)
    one.add(keys(4), rows[:4])
    assert (read(one, keys(4)[::-1]) == rows[:4][::-1]).all()
    two.add(keys(6)[2:], rows[2:])
    one.close()
    two.close()
    dead = FeatureStore(tmp_path, 100)
    dead.add([b"x" * 16], rows[:1])
    reader = FeatureStore(tmp_path, 100)
    assert (read(reader, keys(6)) == rows).all() and b"x" * 16 not in reader
    reader.add(keys(6), rows)  # nothing is kept twice
    reader.close()
    assert not reader.path.exists()


def test_a_segment_that_was_cut_is_not_read(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 100)
    store.add(keys(3), np.zeros((3, 100), dtype=np.uint8))
    store.close()
    os.truncate(store.path, 299)
    assert keys(1)[0] not in FeatureStore(tmp_path, 100)


def test_a_full_disk_ends_the_writing_only(tmp_path: Path) -> None:
    """Real writes against a limit on file size."""
    rows = np.random.default_rng(0).integers(0, 255, (40, 100), dtype=np.uint8)
    store = FeatureStore(tmp_path, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        store.add(keys(40), rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.close()
    assert store.full and (read(store, keys(20)) == rows[:20]).all()
    found = FeatureStore(tmp_path, 100)
    assert keys(40)[19] in found and keys(40)[20] not in found
    assert json.dumps(found.full) == '""'
