"""`export` of a finished run, `init` from a checkpoint, encoders for timm and open_clip; what is refused, and how."""

import json
import shutil
from pathlib import Path
from typing import Any

import parity
import pytest
import timm
import torch
from helpers import composed, max_difference
from parity import Noise, clip, siglip
from PIL import Image
from safetensors.torch import save_model

from vlm_lab import build, convert, export, parts, schema
from vlm_lab.components import make
from vlm_lab.config import Config
from vlm_lab.data.chat import Chat
from vlm_lab.data.tiling import HD, Crop, Native, Pad, Squash
from vlm_lab.data.wordpiece import train
from vlm_lab.evaluate import load_run
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.probe import eye_of, pretrained
from vlm_lab.store.keys import stage_keys

LLAVA = ["encoder=[clip]", "connector=mlp", "llm=llama", "tiling=pad", "encoder.clip.layer=-2", "llm.chat=chatml"]


@pytest.fixture(scope="module")
def run(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run as `fit` leaves it, its weights random."""
    folder = tmp_path_factory.mktemp("run")
    config = schema.check(composed(*LLAVA, "llm.shape.vocab_size=400"))
    last = folder / "stages" / list(config.stages)[-1]
    last.mkdir(parents=True)
    schema.dump(config, folder / "config.yaml")
    save_model(build.vlm(config.model_copy(update={"seed": 5})), str(last / "model.safetensors"))
    chat.tokenizer.save_pretrained(last / "tokenizer")
    return folder


def logits_of(folder: Path, config: Config) -> torch.Tensor:
    model, processor = load_run(folder, config)
    return parity.logits(model.eval(), parity.prompt_of(processor, parity.question(Noise((40, 30)))))


def test_native_reloads_exactly(run: Path, tmp_path: Path) -> None:
    assert export.export(run, "native", tmp_path / "native") == []
    moved = shutil.move(tmp_path / "native", tmp_path / "elsewhere")
    config = schema.load(moved / "config.yaml")
    assert config == schema.load(run / "config.yaml")
    assert torch.equal(logits_of(moved, config), logits_of(run, config))


def test_out_and_in_again_through_transformers_is_exact(run: Path, tmp_path: Path) -> None:
    """The placeholder's row is new; everything else comes back bit for bit, by `init=hf:FOLDER`."""
    export.export(run, "hf", tmp_path)
    rows = json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"]
    config = schema.check(composed(*LLAVA, f"init=hf:{tmp_path}", f"llm.shape.vocab_size={rows}"))
    model = build.vlm(config)
    build.start(config, model)
    assert "<image>" in build.tokenizer(config).get_vocab()
    before = load_run(run, schema.load(run / "config.yaml"))[0].state_dict()
    assert all(torch.equal(tensor[: len(before[name])], before[name]) for name, tensor in model.state_dict().items())


def test_init_enters_the_stage_keys(run: Path, tmp_path: Path) -> None:
    export.export(run, "hf", tmp_path)

    def keys(*overrides: str) -> dict[str, str]:
        config = schema.check(composed(*LLAVA, *overrides))
        return stage_keys(config, build.fingerprints(config))

    plain, first = keys(), keys(f"init=hf:{tmp_path}")
    copied = shutil.copytree(tmp_path, tmp_path / "copy")
    assert keys(f"init=hf:{copied}") == first  # content, not place
    (copied / "config.json").write_text("{}")
    assert len({plain["instruct"], first["instruct"], keys(f"init=hf:{copied}")["instruct"]}) == 3


@pytest.mark.parametrize("init", ["llava-hf/llava", "hf:", "hf:./nowhere"])
def test_a_wrong_init_is_refused_at_once(init: str) -> None:
    with pytest.raises(ValueError, match=r"^init = "):
        schema.check(composed(*LLAVA, f"init={init}"))


def test_another_shape_is_refused_with_both_numbers(run: Path, tmp_path: Path) -> None:
    export.export(run, "hf", tmp_path)
    wider = [*LLAVA, f"init=hf:{tmp_path}", "llm.shape.vocab_size=400"]
    for change, words in [
        ("llm.shape.hidden_size=64", "LLM's hidden_size is 64 here, 128 in the checkpoint"),
        ("encoder.clip.image_size=32", "encoder's image_size is 32 here, 64 in the checkpoint"),
        ("encoder.clip.layer=-3", r"block \[1\] is used here, \[2\] in the checkpoint"),
    ]:
        config = schema.check(composed(*wider, change))
        with pytest.raises(ValueError, match=words):
            build.start(config, build.vlm(config))


def test_what_no_class_can_express_is_refused_in_one_line(chat: Chat, tmp_path: Path) -> None:
    cases: list[tuple[Any, Any, str]] = [
        (parity.vlm(clip(), HD(2), "llama"), HD(2), "tiling HD; its classes have Squash, Pad, Crop"),
        (parity.vlm(clip(-1), Pad(), "llama"), Pad(), r"before the final norm, set encoder.eye.layer=-2"),
        (parity.idefics2(siglip(-1)), Squash(), "connector Perceiver, it has mlp with layers=2"),
        (parity.idefics2(siglip(-2)), Native(14), "behind the final norm, set encoder.eye.layer=-1"),
        (parity.vlm(siglip(-1), Native(14), "llama"), Native(14), "connector MLP, it has perceiver"),
    ]
    for model, tiling, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            convert.save(model, tiling, chat, tmp_path)
        assert "\n" not in str(error.value)


def test_a_marker_that_is_no_token_leaves_the_processor_out(chat: Chat, tmp_path: Path) -> None:
    (note,) = convert.save(parity.idefics2(siglip(-1)), Native(14, "|"), chat, tmp_path)
    assert "no processor" in note
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("layer", [-1, -2, [0, 2]])
@pytest.mark.parametrize("family", ["clip", "siglip", "openvision"])
def test_timm_loads_an_encoder(family: str, layer: Any, tmp_path: Path) -> None:
    node = schema.check(composed(f"encoder=[{family}]")).encoder[family] | {"layer": layer}
    torch.manual_seed(0)
    encoder = TimmEncoder(**{key: value for key, value in node.items() if key != "_target_"}).eval()
    convert.save_encoder(family, node, encoder, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    options = {"indices": encoder.layers, "norm": encoder.norm, "output_fmt": "NLC", "intermediates_only": True}
    with torch.inference_mode():
        theirs = model.forward_intermediates(encoder.normalised(pixels), **options)
        assert max_difference(torch.cat(theirs, dim=-1), encoder(pixels).tokens) <= 1e-5
    card = json.loads((tmp_path / "config.json").read_text())
    overlay = {"file": str(tmp_path / "model.safetensors")}
    other = timm.create_model(
        card["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **card["model_args"]
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_only_timms_models_go_out_to_timm(run: Path, tmp_path: Path) -> None:
    node = schema.check(composed("encoder=[hf]")).encoder["hf"]
    with pytest.raises(ValueError, match=r"^encoder hf is no model of timm: export it with --format native$"):
        convert.save_encoder("hf", node, make(node), tmp_path)
    assert list(tmp_path.iterdir()) == []


def pretrained_run(folder: Path, *overrides: str) -> Path:
    """A run whose encoders were pretrained by themselves, as `fit` leaves those stages; random weights."""
    config = schema.check(composed("bootstrap=[encoder]", *overrides))
    folder.mkdir(exist_ok=True)
    schema.dump(config, folder / "config.yaml")
    for name, stage in pretrained(config).items():
        model = parts.stage_model(config.model_copy(update={"seed": 5}), stage)
        (folder / "stages" / name).mkdir(parents=True)
        save_model(model, str(folder / "stages" / name / "model.safetensors"))
        train(["a large red circle", "two blue squares."], 1024).save_pretrained(folder / "stages" / name / "tokenizer")
    return folder


def test_open_clip_loads_both_towers_and_the_tokenizer(tmp_path: Path) -> None:
    """From a picture file's pixels and from texts, also one that is cut; SigLIP's tower is refused beside it."""
    open_clip = pytest.importorskip("open_clip")
    run = pretrained_run(tmp_path / "run", "encoder=[openvision,siglip]", "connector=concat")
    (refused,) = export.export(run, "open_clip", tmp_path / "out")
    assert refused.startswith("encoder siglip: open_clip's tower is a Vision Transformer with a class token")
    folder = f"local-dir:{tmp_path / 'out' / 'openvision'}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    eye = eye_of(run, schema.load(run / "config.yaml"), "pretrain_encoder.openvision")
    texts = ["A LARGE red circle", "two  blue squares. " * 9, "zebra"]
    picture, file = Image.effect_noise((90, 70), 60).convert("RGB"), tmp_path / "noise.png"
    picture.save(file)
    with torch.inference_mode():
        seen = model.eval().encode_image(preprocess(picture)[None], normalize=True)
        said = model.encode_text(open_clip.get_tokenizer(folder)(texts), normalize=True)
    assert max_difference(seen, eye.look([file])[1]) <= 1e-5
    assert max_difference(said, eye.read(texts)) <= 1e-5
    assert max_difference(said[:1], said[1:]) > 0.01
    assert not (tmp_path / "out" / "siglip").exists()


def test_what_open_clip_cannot_express_is_refused_in_one_line(tmp_path: Path) -> None:
    for number, (overrides, words) in enumerate(
        [
            (["encoder=[clip]"], "encoder clip: open_clip has exact GELU alone .* QuickGELU is used"),
            (["encoder=[dinov2]"], "encoder dinov2 was trained without a text tower"),
            (["encoder=[vit]"], r"encoder vit: open_clip's tower has no place for patch_embed\.proj\.bias"),
            (["encoder=[convnext]"], "encoder convnext: only timm's Vision Transformers have a name"),
            (["bootstrap=[]"], "pretrained no encoder by itself, so it has no text tower"),
        ]
    ):
        folder = tmp_path / str(number)
        with pytest.raises(ValueError, match=words) as error:
            export.export(pretrained_run(folder, *overrides), "open_clip", folder / "out")
        assert "\n" not in str(error.value)
        assert not (folder / "out").exists()


def test_crop_is_expressible(chat: Chat, tmp_path: Path) -> None:
    assert convert.save(parity.vlm(clip(), Crop(), "llama"), Crop(), chat, tmp_path) == []
