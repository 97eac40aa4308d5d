"""The composition root: the only file that turns configuration nodes into objects.

`sources` and `tasks` are torch-free and also serve the parent process; whatever needs torch is imported where it is
built.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_lab.components import Node, make
from vlm_lab.config import Config
from vlm_lab.schema import HF
from vlm_lab.stages import Stage

if TYPE_CHECKING:
    from lightning import Callback, Trainer
    from transformers import PreTrainedTokenizerFast

    from vlm_lab.callbacks import Features
    from vlm_lab.data.loader import Loader
    from vlm_lab.data.mixture import Mixture
    from vlm_lab.data.process import Processor, TextProcessor
    from vlm_lab.data.sample import Source
    from vlm_lab.model.vlm import VLM
    from vlm_lab.wandb_logger import WandbLogger


def sources(config: Config) -> dict[str, Source]:
    """The training sources by name, without the records that are held out for evaluation."""
    from vlm_lab.data.sources import Holdout

    built = {name: make(node) for name, node in config.data.sources.items()}
    if not held_out(config):
        return built
    return {name: Holdout(source, "train", config.data.holdout) for name, source in built.items()}


def tasks(config: Config) -> dict[str, Source]:
    """The evaluation sources by name, one question a record; held-out records if no task has a file of its own."""
    from vlm_lab.data.sources import Holdout, SingleTurn

    if not held_out(config):
        return {name: SingleTurn(make(node)) for name, node in given_tasks(config).items()}
    count, seed = config.data.holdout, 0
    built = {name: make(node) for name, node in config.data.sources.items()}
    return {name: SingleTurn(Holdout(source, "eval", count, seed)) for name, source in built.items()}


def given_tasks(config: Config) -> dict[str, dict]:
    """The task nodes that can be built: a task whose `path` was left null has no file."""
    return {name: node for name, node in config.data.tasks.items() if node.get("path", "") is not None}


def held_out(config: Config) -> bool:
    return config.data.holdout > 0 and not given_tasks(config)


def fingerprints(config: Config) -> dict[str, str]:
    return {name: source.fingerprint() for name, source in sources(config).items()}


def tokenizer(config: Config, trained: Path | None = None) -> PreTrainedTokenizerFast:
    """The LLM's tokenizer: saved in `trained`, that of `init`, the configured one, or made from the sources' text."""
    from vlm_lab.data.tokenizer import load_tokenizer, trained_tokenizer

    if trained is not None:
        return load_tokenizer(str(trained))
    if config.init is not None:
        return load_tokenizer(config.init.removeprefix(HF), config.llm["chat"])
    if config.llm["tokenizer"] is not None:
        return load_tokenizer(config.llm["tokenizer"], config.llm["chat"])
    cache, vocab = Path(config.output) / "cache", config.llm["shape"]["vocab_size"]
    return trained_tokenizer(sources(config).values(), config.llm["chat"], vocab, cache)


def vlm(config: Config, weights: bool = True) -> VLM:
    """The model, with pretrained weights where the configuration names them; random parts come from the seed alone.

    `weights=False` ignores those names: the same shapes, offline and on any device (`meta`, to count parameters).
    So does a configuration with `init`, whose checkpoint (see `start`) holds all weights.
    """
    import torch

    from vlm_lab.model.vlm import VLM

    torch.manual_seed(config.seed)
    weights = weights and config.init is None
    encoders = {name: make(node if weights else unloaded(node)) for name, node in config.encoder.items()}
    llm = make(config.llm if weights else unloaded(config.llm))
    dims = {name: encoder.dim for name, encoder in encoders.items()}
    connector = make(config.connector, dims=dims, out_dim=llm.get_input_embeddings().embedding_dim)
    return VLM(encoders, connector, llm, newline=make(config.tiling).newline)


def start(config: Config, model: VLM) -> None:
    """Load the checkpoint that the first stage starts from, if the configuration names one."""
    from vlm_lab.convert import start_from

    if config.init is not None:
        start_from(model, config.init.removeprefix(HF))


def unloaded(node: Node) -> Node:
    return {**node, "weights": None}


def processor(config: Config, model: VLM, tokens: PreTrainedTokenizerFast, stage: Stage | None = None) -> Processor:
    """What turns this model's samples into tensors: as `stage` asks for, or without it as evaluation does."""
    from vlm_lab.data.chat import Chat
    from vlm_lab.data.process import Eye, Processor

    encoders: dict[str, Any] = dict(model.encoder.items())
    eyes = {name: Eye(encoder.image_size, encoder.mean, encoder.stride) for name, encoder in encoders.items()}
    grid = model.connector.grid({name: encoder.grid for name, encoder in encoders.items()})
    template = (stage and stage.chat) or config.llm["chat"]
    tiling = (stage and stage.tiling) or config.tiling
    chat = Chat(tokens, template, config.llm["system"])
    return Processor(chat, make(tiling), eyes, grid, stage.max_tokens if stage else sys.maxsize)


def loader(config: Config, stage: Stage, process: Processor | TextProcessor, rank: int, world: int) -> Loader:
    """The training loader of one stage for one process."""
    from vlm_lab.data.loader import Loader, Records

    used, mixed = mixture(config, stage)
    records = Records(used, mixed, process, config.data.shuffle_turns, stage.turns, stage.upscale)
    workers = config.trainer.num_workers
    return Loader(records, steps(stage, used), stage.batch, stage.micro_batch, rank, world, workers)


def mixture(config: Config, stage: Stage) -> tuple[list[Source], Mixture]:
    """The sources that a stage draws from, and how."""
    from vlm_lab.data.mixture import Mixture
    from vlm_lab.data.sources import Capped

    built, weights = sources(config), config.data.mixtures[stage.mixture]
    used = [built[name] if stage.cap is None else Capped(built[name], stage.cap) for name in weights]
    sizes = [len(source) for source in used]
    shares = [size if weight is None else weight for size, weight in zip(sizes, weights.values(), strict=True)]
    return used, Mixture(sizes, shares, config.seed)


def steps(stage: Stage, used: list[Source]) -> int:
    """Optimizer steps: given, or so many that `epochs` passes over the sources are made."""
    return stage.steps or max(1, round((stage.epochs or 0) * sum(map(len, used)) / stage.batch))


def features(config: Config, data: Loader) -> Features:
    """What keeps the features of the stage's frozen encoders, beside the stage store: all runs share them."""
    from vlm_lab.callbacks import Features

    options, records = config.trainer, sum(map(len, data.records.sources))
    folder, shared = Path(config.output) / "cache" / "features", config.ablation is not None
    draws = data.steps * data.batch
    return Features(folder, options.feature_cache, options.feature_dtype, draws, records, shared)


def trainer(config: Config, stage: Stage, data: Loader, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer for one stage: one pass over `data`, whose length is steps x accumulated rows."""
    from lightning import Trainer

    from vlm_lab.callbacks import AtomicFiles, Background
    from vlm_lab.strategies import leave_inputs, strategy

    options = config.trainer
    files = Background(AtomicFiles(options.checkpoint_keep)) if options.checkpoint_async else AtomicFiles()
    built = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=strategy(options),
        plugins=[] if options.strategy.startswith("zero") else [files],
        precision=options.precision,
        max_steps=data.steps,
        accumulate_grad_batches=data.parts,
        gradient_clip_val=stage.clip,
        callbacks=callbacks,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    leave_inputs(built)
    return built


def logger(config: Config, run: Path) -> WandbLogger | None:
    """The experiment tracker beside the run folder's own files; None if there is none."""
    if config.logger.get("_target_") is None:
        return None
    return make(config.logger, config=config, run=run)
