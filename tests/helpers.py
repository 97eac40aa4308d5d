"""Building blocks of the tests: a toy source, a tiny VLM made of the real classes, and composed configurations."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from vlm_lab import schema
from vlm_lab.data.sample import ImageSlot, Message, Sample
from vlm_lab.model.connectors.mlp import MLP
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.llms import build_llm
from vlm_lab.model.vlm import VLM

ROOT = Path(__file__).parent.parent
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Plain:
    """A one-colour picture, made on demand."""

    def __init__(self, colour: str, size: tuple[int, int] = (20, 12)) -> None:
        self.colour, self.size = colour, size

    def draw(self) -> Image.Image:
        return Image.new("RGB", self.size, COLOURS[self.colour])


class ColourSource:
    """Records of every kind: one image, several images, none; one turn or two; answers of different lengths."""

    def __init__(self, size: int = 24) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        colour, other = list(COLOURS)[index % 4], list(COLOURS)[(index // 4) % 4]
        ask = Message("user", (ImageSlot(0), "\nWhat colour is it?"))
        answer = Message("assistant", (colour,))
        if index % 3 == 0:
            messages, images = (ask, answer), (Plain(colour),)
        elif index % 3 == 1:
            both = Message("user", ("First ", ImageSlot(0), " second ", ImageSlot(1), " which colours?"))
            messages, images = (
                (both, Message("assistant", (f"{colour} and then {other}",))),
                (Plain(colour), Plain(other)),
            )
        else:
            follow = (Message("user", ("Name a colour.",)), Message("assistant", (f"{other} is one",)))
            messages, images = (Message("user", (f"Say {colour}.",)), answer, *follow), ()
        return Sample(f"c{index}", messages, images, "colours", "colour")

    def fingerprint(self) -> str:
        return f"colours-{self.size}"


def tiny_vlm(llm: str = "qwen2", dtype: torch.dtype = torch.float32) -> VLM:
    """SigLIP 16 px / patch 8 (4 tokens) -> MLP -> a two-layer LLM; random weights from torch's current seed."""
    eye = TimmEncoder("vit_base_patch16_siglip_224", None, -1, image_size=16, patch_size=8, width=16, depth=2, heads=2)
    model = VLM({"eye": eye}, MLP({"eye": 16}, 32), build_llm(llm, None, SHAPE, None, "chatml", ""))
    return model.to(dtype)


def composed(*overrides: str) -> DictConfig:
    """A configuration without the pretraining of what has no weights, unless `bootstrap` is among the overrides."""
    schema.register_resolvers()
    start = [] if any(o.startswith("bootstrap=") for o in overrides) else ["bootstrap=[]"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=[*start, *overrides])


def small(questions: int = 16) -> list[str]:
    """Overrides of the default configuration: a model of two narrow layers, little data, batches of four."""
    return [
        *("encoder.siglip.width=32", "encoder.siglip.depth=2", "encoder.siglip.image_size=32"),
        *("llm.shape.hidden_size=32", "llm.shape.intermediate_size=64", "llm.shape.num_hidden_layers=2"),
        *("data.sources.captions.size=40", "data.sources.questions.size=40", f"data.tasks.scenes.size={questions}"),
        *("stages.align.batch=4", "stages.align.micro_batch=4"),
        *("stages.instruct.batch=4", "stages.instruct.micro_batch=2", "eval.max_new_tokens=2"),
    ]


def max_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
