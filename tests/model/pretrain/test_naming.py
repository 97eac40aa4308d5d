"""Weights under open_clip's and timm's names: those libraries compute the same features, and the way back is exact."""

from pathlib import Path

import pytest
import timm
import torch
from helpers import max_difference
from pretrain_parts import OPENVISION, small_batch, small_encoder, small_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.pretrain.naming import from_open_clip, from_timm, to_open_clip, to_timm, write_open_clip


@pytest.mark.parametrize(("layer", "contrastive"), [((-1,), "infonce"), (-1, "infonce"), ((-1,), "sigmoid")])
def test_open_clip_computes_the_same_features(tmp_path: Path, layer: object, contrastive: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    model, batch = small_model(small_encoder(layer), contrastive=contrastive).eval(), small_batch()
    write_open_clip(model, tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images = model.encoder["eye"].normalised(batch.pixels)
    assert max_difference(theirs.encode_image(images, normalize=True), model.image_features(batch.pixels)) <= 1e-5
    assert max_difference(theirs.encode_text(batch.raw, normalize=True), model.text_features(batch.raw)) <= 1e-5
    assert max_difference(theirs.logit_scale, model.towers.contrast.log_scale) == 0


def test_open_clip_names_and_back(tmp_path: Path) -> None:
    model, batch = small_model(), small_batch()
    other = small_model(small_encoder(), seed=1)
    state = to_open_clip(model)
    assert max_difference(other.image_features(batch.pixels), model.image_features(batch.pixels)) > 1e-3
    missing, unexpected = other.load_state_dict(from_open_clip(state, other), strict=False)
    assert unexpected == [] and all(name.startswith("towers.decoder.") for name in missing)
    assert max_difference(other.image_features(batch.pixels), model.image_features(batch.pixels)) == 0
    assert max_difference(other.text_features(batch.raw), model.text_features(batch.raw)) == 0
    with pytest.raises(ValueError, match=r"open_clip weights: visual\.proj is missing, \[12, 16\] is expected"):
        from_open_clip({name: value for name, value in state.items() if name != "visual.proj"}, model)
    with pytest.raises(ValueError, match="a Vision Transformer with a class token, as CLIP's"):
        to_open_clip(small_model(small_encoder(-1, "vit_base_patch16_siglip_224")))


def test_timm_computes_the_same_features_and_back(tmp_path: Path) -> None:
    model, batch = small_model().eval(), small_batch()
    state = to_timm(model)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    theirs = timm.create_model(OPENVISION, num_classes=12, global_pool="avg", **shape).eval()
    theirs.load_state_dict(state)
    logits = theirs(model.encoder["eye"].normalised(batch.pixels))
    assert max_difference(F.normalize(logits, dim=-1), model.image_features(batch.pixels)) <= 1e-5
    other = small_model(small_encoder(), seed=1)
    assert other.load_state_dict(from_timm(state, other), strict=False).unexpected_keys == []
    assert max_difference(other.image_features(batch.pixels), model.image_features(batch.pixels)) == 0


def test_a_pretrained_encoder_is_a_checkpoint_of_encoder_weights(tmp_path: Path) -> None:
    """Both libraries' files serve as `encoder.<name>.weights`."""
    model, pixels = small_model(small_encoder(-1)), small_batch().pixels
    save_file(to_timm(model), tmp_path / "timm.safetensors")
    write_open_clip(model, tmp_path)
    assert load_file(tmp_path / "open_clip_model.safetensors").keys() >= {"visual.conv1.weight", "logit_scale"}
    for file in ("timm.safetensors", "open_clip_model.safetensors"):
        encoder = TimmEncoder(OPENVISION, str(tmp_path / file), -1, 32, 8, 16, 2, 2)
        assert max_difference(encoder(pixels).tokens, model.encoder["eye"](pixels).tokens) <= 1e-6
    assert torch.isfinite(model(small_batch()).total)
