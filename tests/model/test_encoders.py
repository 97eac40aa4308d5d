"""Encoders: every option at tiny size, the layers in use, checkpoints, other resolutions, native ratios, refusals."""

from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT, ColourSource, composed, max_difference
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from vlm_lab import build, schema
from vlm_lab.components import make
from vlm_lab.data.chat import Chat
from vlm_lab.data.loader import pack
from vlm_lab.model.encoders import Encoder, HFEncoder, TimmEncoder
from vlm_lab.model.native import native_features

NAME = "vit_base_patch16_siglip_224"
NAFLEX = "naflexvit_so400m_patch16_siglip.v2_webli"
TINY = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 3, "heads": 2}
TIMM = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
HF = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
OPTIONS = sorted(path.stem for path in (ROOT / "conf/encoder").glob("*.yaml"))
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def from_conf(option: str, *overrides: str) -> Encoder:
    return make(OmegaConf.to_container(composed(f"encoder=[{option}]", *overrides), resolve=True)["encoder"][option])


def unreached(module: torch.nn.Module) -> list[str]:
    """Parameters without a gradient, or with one of zeros."""
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_at_tiny_scale(option: str) -> None:
    """Shapes as promised, features near unit scale, a gradient for every single weight."""
    torch.manual_seed(0)
    encoder = from_conf(option)
    side = encoder.image_size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    features = encoder(pixels)
    h, w = encoder.grid
    assert features.grid == (h, w)
    assert features.tokens.shape == (2, h * w, encoder.dim)
    assert encoder.stride == side // h
    assert 0.2 <= features.tokens.std().item() <= 5
    (features.tokens * torch.randn_like(features.tokens)).sum().backward()
    assert unreached(encoder) == []


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in ("timm", "hf", "convnext", "sam")])
@pytest.mark.parametrize("layer", ["-2", "[0,-1]"])
def test_no_weight_behind_the_layer_in_use(option: str, layer: str) -> None:
    encoder = from_conf(option, f"encoder.{option}.layer={layer}")
    side = encoder.image_size
    features = encoder(torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8))
    (features.tokens * torch.randn_like(features.tokens)).sum().backward()
    assert unreached(encoder) == []
    assert features.tokens.shape[2] == encoder.dim == (256 if "," in layer else 128)
    assert len(encoder.model.blocks) == (3 if "," in layer else 2)


@pytest.mark.parametrize("layer", [-1, -2, 0, [2, 0], [-1]])
def test_layer_is_timms_own_intermediate(layer: int | list[int]) -> None:
    """Lists join their layers in the order of depth, without the final norm."""
    encoder = TimmEncoder(NAME, None, layer, **TINY).eval()
    whole = timm.create_model(NAME, img_size=32, **TIMM).eval()
    whole.load_state_dict(encoder.model.state_dict(), strict=False)
    normal = (PIXELS / 255 - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)
    maps = whole.forward_intermediates(normal, norm=layer == -1, output_fmt="NLC", intermediates_only=True)
    expected = [maps[layer]] if isinstance(layer, int) else [maps[i] for i in sorted(i % 3 for i in layer)]
    assert max_difference(encoder(PIXELS).tokens, torch.cat(expected, dim=-1)) <= 1e-5


def test_a_remainder_of_the_image_is_cut_off() -> None:
    """SigLIP's published 384 px at patch 14 is a grid of 27."""
    encoder = TimmEncoder(NAME, None, -1, **{**TINY, "image_size": 30})
    assert encoder.grid == (3, 3)
    assert encoder(torch.zeros(1, 3, 30, 30, dtype=torch.uint8)).tokens.shape == (1, 9, 16)


def test_side_resizes_the_map() -> None:
    encoder = TimmEncoder(NAME, None, -1, **TINY, side=3)
    plain = TimmEncoder(NAME, None, -1, **TINY)
    plain.load_state_dict(encoder.state_dict())
    square = plain(PIXELS).tokens.transpose(1, 2).unflatten(2, (4, 4))
    resized = torch.nn.functional.interpolate(square, size=(3, 3), mode="bilinear", align_corners=False)
    assert (encoder.grid, encoder.stride) == ((3, 3), 10)
    assert max_difference(encoder(PIXELS).tokens, resized.flatten(2).transpose(1, 2)) <= 1e-6


# ---- weights


@pytest.mark.parametrize("name", [NAME, "vit_base_patch16_clip_224.openai"])
def test_weights_from_a_file_at_two_resolutions(name: str, tmp_path: Path) -> None:
    """A checkpoint in timm's naming, with its classifier: the same features, and resampled positions at 48 px."""
    whole = timm.create_model(name, img_size=32, **TIMM).eval()
    path = tmp_path / "checkpoint.safetensors"
    save_file(whole.state_dict(), path)
    encoder = TimmEncoder(name, str(path), -1, **TINY).eval()
    prefix = whole.num_prefix_tokens
    normal = encoder.normalised(PIXELS)
    assert max_difference(encoder(PIXELS).tokens, whole.forward_features(normal)[:, prefix:]) <= 1e-5
    larger = TimmEncoder(name, str(path), -1, **{**TINY, "image_size": 48}).eval()
    positions = resample_abs_pos_embed(whole.pos_embed, (6, 6), num_prefix_tokens=prefix)
    assert max_difference(larger.model.pos_embed, positions) <= 1e-6
    assert larger(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)).tokens.shape == (1, 36, 16)
    assert torch.equal(larger.model.blocks[2].mlp.fc1.weight, whole.blocks[2].mlp.fc1.weight)
    assert "state_dict" not in larger.model.pretrained_cfg


def test_a_convnext_checkpoint_with_its_head(tmp_path: Path) -> None:
    name, options = "convnext_large_mlp.clip_laion2b_ft_soup_320", {"depths": [1] * 4, "dims": [8, 8, 16, 16]}
    whole = timm.create_model(name, **options)
    save_file(whole.state_dict(), tmp_path / "convnext.safetensors")
    encoder = TimmEncoder(name, str(tmp_path / "convnext.safetensors"), [0, 1, 2, 3], 64, options=options)
    assert all(torch.equal(p, whole.state_dict()[n]) for n, p in encoder.model.named_parameters())


@pytest.mark.parametrize("option", ["dinov3", "eva02", "sam", "siglip2_naflex"])
def test_a_saved_encoder_loads_again(option: str, tmp_path: Path) -> None:
    """Families with positions of their own kinds; SAM's and NaFlex' tables, and rotary ones, from the same file."""
    node = OmegaConf.to_container(composed(f"encoder=[{option}]"), resolve=True)["encoder"][option]
    shape = {"embed_dim": 128, "depth": 3, "num_heads": 4, "patch_size": 16, **(node.get("options") or {})}
    size = {} if "naflex" in option else {"img_size": 64}
    whole = timm.create_model(node["name"], **shape, **size)
    save_file(whole.state_dict(), tmp_path / "x.safetensors")
    encoder = make({**node, "weights": str(tmp_path / "x.safetensors")})
    assert all(torch.equal(p, whole.state_dict()[n]) for n, p in encoder.model.named_parameters())


# ---- native aspect ratio


@pytest.mark.parametrize(
    "name", [NAFLEX, NAME, "vit_base_patch14_reg4_dinov2.lvd142m", "openvision_vit_base_patch16_224"]
)
@pytest.mark.parametrize("layer", [-2, [0, 2]])
def test_padding_changes_no_real_patch(name: str, layer: int | list[int]) -> None:
    """Views of several shapes in one batch, over noise as padding, equal each alone."""
    torch.manual_seed(0)
    encoder, shapes = TimmEncoder(name, None, layer, **TINY).eval(), torch.tensor([[32, 40], [16, 40], [31, 9], [8, 8]])
    pixels = torch.randint(0, 256, (4, 3, 37, 41), dtype=torch.uint8)
    together = native_features(encoder, pixels, shapes)
    assert together.mask is not None
    assert together.tokens.shape == (4, 20, encoder.dim)
    for view, (height, width) in enumerate(shapes.tolist()):
        alone = native_features(encoder, pixels[view : view + 1, :, :height, :width], shapes[view : view + 1])
        kept = together.tokens[view, together.mask[view]]
        assert max_difference(kept, alone.tokens[0]) <= 1e-5


def test_a_naflex_square_is_the_ordinary_forward_pass() -> None:
    encoder = TimmEncoder(NAFLEX, None, -1, **TINY).eval()
    native = native_features(encoder, PIXELS, torch.full((2, 2), 32))
    assert max_difference(encoder(PIXELS).tokens, native.tokens) <= 1e-5


@pytest.mark.parametrize("name", ["vit_large_patch16_dinov3.lvd1689m", "eva02_large_patch14_clip_336.merged2b"])
def test_native_ratios_need_positions_that_can_be_spread(name: str) -> None:
    with pytest.raises(ValueError, match="need learned positions, Eva has none"):
        native_features(TimmEncoder(name, None, -1, **TINY), PIXELS, torch.full((2, 2), 32))


def test_native_ratios_and_side_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="encoder side = 3 resizes them"):
        native_features(TimmEncoder(NAME, None, -1, **TINY, side=3), PIXELS, torch.full((2, 2), 32))


@pytest.mark.parametrize("kind", ["native", "naflex", "hf"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    """Recomputed activations give the same gradients, where timm or transformers alone would not do it too."""
    encoder: Encoder = HFEncoder("dinov2", None, shape={**HF, "patch_size": 8})
    if kind != "hf":
        encoder = TimmEncoder(NAFLEX if kind == "naflex" else NAME, None, **TINY)
    sizes, found = torch.tensor([[32, 16], [24, 32]]), []
    for enable in (False, True):
        (encoder if kind == "hf" else encoder.model).set_grad_checkpointing(enable)
        encoder.zero_grad()
        features = encoder(PIXELS) if kind == "hf" else native_features(encoder, PIXELS, sizes)
        features.tokens.square().sum().backward()
        found.append([p.grad.clone() for p in encoder.parameters()])
    assert max(max_difference(a, b) / float(a.abs().max()) for a, b in zip(*found, strict=True)) <= 1e-5


# ---- several at once


@pytest.mark.parametrize("connector", ["concat", "sva"])
def test_four_encoders_train_together(connector: str, chat: Chat) -> None:
    """Cambrian-1's four families, each with its own size and mean colour, from the composition to the gradient."""
    config = schema.check(composed("encoder=[siglip,clip,dinov2,convnext]", f"connector={connector}"))
    model = build.vlm(config)
    process = build.processor(config, model, chat.tokenizer)
    assert {name: eye.side for name, eye in process.eyes.items()} == {n: e.image_size for n, e in model.encoder.items()}
    assert len({eye.mean for eye in process.eyes.values()}) == 3  # CLIP's two towers share theirs
    row = pack([process.example(ColourSource()[index]) for index in range(2)], process)
    model(row).backward()
    assert not [name for name in unreached(model) if name.startswith("encoder")]


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vit_enormous"}, "vit_enormous: timm has no such model"),
        ({"image_size": 7}, "image_size 7 is smaller than patch_size 8"),
        ({"heads": 3}, "width 16 is not a multiple of heads 3"),
        ({"options": {"mlp_ration": 2}}, "unexpected keyword argument 'mlp_ration'"),
        ({"layer": 3}, "layer 3 is outside its 3 layers"),
        ({"layer": [0, -4]}, "layer -4 is outside its 3 layers"),
        ({"layer": []}, "names no layer"),
        ({"weights": "/no/such/file"}, "no such file"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmEncoder(**{"name": NAME, "weights": None, "layer": -1, **TINY, **change})


@pytest.mark.parametrize("lost", ["blocks.1.mlp.fc1.weight", None])
def test_weights_that_do_not_fit(lost: str | None, tmp_path: Path) -> None:
    state = timm.create_model(NAME, img_size=32, num_classes=0, **TIMM).state_dict()
    save_file({name: value for name, value in state.items() if name != lost}, tmp_path / "x.safetensors")
    assert len(load_file(tmp_path / "x.safetensors")) == len(state) - (lost is not None)
    with pytest.raises(ValueError, match="do not fit") as caught:
        TimmEncoder(NAME, str(tmp_path / "x.safetensors"), -1, **(TINY if lost else {**TINY, "width": 32}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("nonsense", "transformers knows no such model_type"),
        ("siglip2_vision_model", "not a transformer with one token per patch"),
        ("vit_mae", "not a transformer with one token per patch"),
        ("convnext", "not a transformer with one token per patch"),
    ],
)
def test_families_that_the_hf_encoder_refuses(family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HFEncoder(family, None, shape=HF if family != "convnext" else {})


def test_checkpoints_that_the_hf_encoder_refuses(tmp_path: Path) -> None:
    whole = HFEncoder("siglip_vision_model", None, shape={**HF, "patch_size": 8}).model
    whole.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        HFEncoder("siglip_vision_model", str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match=r"encoder\.hf\.shape\.hidden_size = 32, but the checkpoint .* has 16"):
        HFEncoder("siglip_vision_model", str(tmp_path), shape={"hidden_size": 32})
    with pytest.raises(
        ValueError, match=r"encoder\.hf\.family = dinov2, but the checkpoint .* has siglip_vision_model"
    ):
        HFEncoder("dinov2", str(tmp_path))
    assert HFEncoder("siglip_vision_model", str(tmp_path)).dim == 16
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: v for n, v in state.items() if "layers.1.mlp.fc1" not in n},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"has no encoder\.layers\.1\.mlp\.fc1\.bias and 1 others"):
        HFEncoder("siglip_vision_model", str(tmp_path))
