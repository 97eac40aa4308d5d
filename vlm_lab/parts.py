"""What a stage trains, made from the configuration: its model, its loader, its tokenizer, its LightningModule.

One function per kind of objective (vlm_lab/stages.py has the list); part of the composition root (build.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model
from torch import nn

from vlm_lab import build
from vlm_lab.components import make
from vlm_lab.config import Config
from vlm_lab.data.chat import Chat
from vlm_lab.data.loader import Loader
from vlm_lab.data.pretrain import PairLoader, PairRecords
from vlm_lab.data.process import TextProcessor
from vlm_lab.data.sample import Source
from vlm_lab.data.wordpiece import Wordpiece, load_wordpiece, trained_wordpiece
from vlm_lab.encoder_module import EncoderTraining
from vlm_lab.model.pretrain import DualEncoder, MaskedEncoder, TwoViews
from vlm_lab.model.pretrain.resolution import take_over
from vlm_lab.model.text import TextModel
from vlm_lab.model.vlm import VLM
from vlm_lab.module import VLMTraining
from vlm_lab.stages import OBJECTIVES, Stage

LOSSES = {"contrastive": "infonce", "sigmoid": "sigmoid", "caption": None}  # objective -> `contrastive` of the towers

SELF_SUPERVISED: dict[str, tuple[type, dict[str, float]]] = {  # objective -> model, what its views are by default
    "simmim": (MaskedEncoder, {"keep": 0.4}),  # it hides 60 % of the patches
    "simclr": (TwoViews, {"crop": 0.5, "jitter": 0.5}),
}


@dataclass
class Parts:
    """`training` makes the LightningModule of `model`; `tokenizer` has `save_pretrained`."""

    model: Any
    tokenizer: Any
    loader: Callable[[int, int], Loader]  # of (rank, world)
    training: type[VLMTraining] = VLMTraining


def stage_parts(config: Config, stage: Stage) -> Parts:
    if stage.objective == "vlm":
        return vlm_parts(config, stage)
    return text_parts(config, stage) if stage.objective == "next_token" else encoder_parts(config, stage)


def vlm_parts(config: Config, stage: Stage) -> Parts:
    vlm, tokenizer = build.vlm(config), build.tokenizer(config)
    process = build.processor(config, vlm, tokenizer, stage)
    return Parts(vlm, tokenizer, lambda rank, world: build.loader(config, stage, process, rank, world))


def text_parts(config: Config, stage: Stage) -> Parts:
    """The LLM alone. Its random weights do not depend on the parts beside it."""
    tokenizer = build.tokenizer(config)
    process = TextProcessor(Chat(tokenizer, stage.chat or config.llm["chat"]), stage.max_tokens)
    return Parts(stage_model(config, stage), tokenizer, lambda r, w: build.loader(config, stage, process, r, w))


def encoder_parts(config: Config, stage: Stage) -> Parts:
    """One encoder, with what its objective adds."""
    sources, mixture = build.mixture(config, stage)
    words = wordpieces(config, stage, sources)
    model = stage_model(config, stage)
    eye = model.encoder[model.name]
    views, text = dict(stage.views or {}), {"length": 4, "queries": 2}  # the shortest there are, if nobody reads them
    if isinstance(model, DualEncoder):
        text = {"length": model.towers.length, "queries": model.towers.queries}
    else:
        views = {**SELF_SUPERVISED[str(stage.objective)][1], **views}
    twice = stage.objective == "simclr"
    process = make(views, words=words, side=eye.image_size, patches=eye.grid[0] * eye.grid[1], twice=twice, **text)

    def loader(rank: int, world: int) -> Loader:
        steps = build.steps(stage, sources)
        workers = config.trainer.num_workers
        return PairLoader(PairRecords(sources, mixture, process), steps, stage.batch, rank, world, workers)

    return Parts(model, words, loader, EncoderTraining)


def wordpieces(config: Config, stage: Stage, sources: list[Source]) -> Wordpiece:
    if stage.wordpieces is not None:
        return load_wordpiece(stage.wordpieces)
    return trained_wordpiece(sources, (stage.towers or {}).get("vocab", 32000), Path(config.output) / "cache")


def empty_model(config: Config) -> VLM:
    """The model of `config` on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return build.vlm(config, weights=False)


class Misfit(ValueError):
    """Parts or tilings that do not go together: what the user asked for is wrong, not the code that says so."""


def check_together(config: Config) -> None:
    """Raises Misfit where parts and tilings do not fit each other. Builds the model without its weights."""
    try:
        vlm, tokenizer = empty_model(config), build.tokenizer(config)
        for stage in (stage for stage in config.stages.values() if stage.part is None):
            build.processor(config, vlm, tokenizer, stage)
    except ValueError as error:
        raise Misfit(error) from error


def stage_model(config: Config, stage: Stage, weights: bool = True) -> Any:
    """The model that a stage trains; `weights=False` as in `build.vlm`."""
    if stage.part is None:
        return build.vlm(config, weights)
    torch.manual_seed(config.seed)
    if stage.objective == "next_token":
        return TextModel(make(config.llm if weights else build.unloaded(config.llm)))
    name = str(stage.encoder)
    node = config.encoder[name] if weights else build.unloaded(config.encoder[name])
    if isinstance(node.get("layer"), int) and node["layer"] != -1:
        node = {**node, "layer": [-1]}  # the whole network learns, also blocks that the VLM has no use for
    if stage.image_size is not None:
        node = {**node, "image_size": stage.image_size}
    encoder = make(node)
    if stage.towers is None:
        return SELF_SUPERVISED[str(stage.objective)][0](name, encoder)
    normed = getattr(encoder, "norm", False) is True
    towers = make(stage.towers, dim=encoder.dim, normed=normed, contrastive=LOSSES[str(stage.objective)])
    return DualEncoder(name, encoder, towers)


def start(config: Config, stage: Stage, model: nn.Module, before: dict[Path, Stage]) -> None:
    """Load what `model` starts from: the weights of earlier stages {folder: stage}, or what `init` names."""
    for folder, earlier in before.items():
        path = folder / "model.safetensors"
        if isinstance(model, VLM) and earlier.part is None:
            load_model(model, path)
        else:
            shared = (earlier.part,) if stage.part is None else OBJECTIVES[str(stage.objective)]  # type: ignore[index]
            take_over(model, load_file(path), tuple(str(part) for part in shared))
    if not before and isinstance(model, VLM):
        build.start(config, model)
