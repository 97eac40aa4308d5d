"""Parts that do not fit are refused by check() with one line; those that fit pass."""

import pytest
from helpers import composed

from vlm_lab import schema

REFUSED = [
    ("encoder=[siglip,clip]", "connector MLP takes one encoder, got 2: siglip, clip; choose concat"),
    ("encoder=[siglip] connector=mining", "connector PatchInfoMining takes 2 encoders, got 1: siglip"),
    ("connector=sva connector.windows=1", "connector SVA with one encoder and windows of 1"),
    ("connector=sva scale=full", "connector SVA with one encoder and windows of 1"),
    ("encoder=[siglip,clip] connector=concat tiling=native", "tiling Native takes one encoder, got 2"),
    ("connector=perceiver tiling=anyres", "tiling AnyRes stitches maps of tokens, but connector Perceiver gives none"),
    ("connector=cross_attention tiling=anyres_max", "tiling AnyResMax stitches maps"),
    ("connector=pixel_shuffle tiling=split4", "tiling Split4 needs one token per patch or a resampler"),
    ("connector=sva tiling=anyres_max", "tiling AnyResMax rescales tokens, but the blocks of connector SVA inside"),
    (
        "+stages.align.tiling={_target_:vlm_lab.data.tiling.AnyRes,canvases:[[1,2]]}",
        "stages.align.tiling AnyRes needs newline embeddings",
    ),
]
FITS = [
    "encoder=[siglip,clip,dinov2] connector=sva",
    "encoder=[siglip,clip] connector=mining",
    "connector=perceiver tiling=native",
    "connector=cross_attention tiling=split4",
    "connector=mlp tiling=native",
    "connector=sva connector.blocks=0 tiling=anyres_max",
    "connector=sva tiling=anyres",
    "tiling=anyres_max +stages.align.tiling={_target_:vlm_lab.data.tiling.Pad}",
]


@pytest.mark.parametrize(("command", "message"), REFUSED)
def test_what_does_not_fit_is_refused(command: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^(stages|connector|tiling)") as caught:
        schema.check(composed(*command.split()))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("command", FITS)
def test_what_fits_passes(command: str) -> None:
    assert schema.check(composed(*command.split())).stages
