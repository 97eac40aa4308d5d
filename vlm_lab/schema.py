"""`check`: the only door from Hydra into the rest of the package, and `load` and `dump` of what went through it.

`check(DictConfig) -> Config` resolves, validates types, unknown keys, component arguments, module paths and files, and
refuses with one line that names the field and the way out. It imports neither torch nor lightning, so a typo costs
under a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlm_lab.compat import check_parts, check_videos
from vlm_lab.components import Node, bind
from vlm_lab.config import Config, Trainer
from vlm_lab.stages import IMAGE_TEXT, OBJECTIVES, Objective, Stage, check_order, spelt_out

HF = "hf:"  # what `init` begins with: the checkpoint is one of transformers


def register_resolvers() -> None:
    """`${scale:A,B}`: A at scale=tiny, B at scale=full. `${unsharded:A,B}`: A, or B if ZeRO shards the model."""
    by_scale = lambda tiny, full, *, _root_: tiny if _root_.scale == "tiny" else full  # noqa: E731
    by_strategy = lambda whole, sharded, *, _root_: sharded if shards(_root_.trainer.strategy) else whole  # noqa: E731
    OmegaConf.register_new_resolver("scale", by_scale, replace=True)
    OmegaConf.register_new_resolver("unsharded", by_strategy, replace=True)


def check(cfg: DictConfig, choices: dict[str, Any] | None = None) -> Config:
    """Resolved, validated configuration. Raises ValueError with one line naming the field and the way out."""
    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    tree["name"] = tree.get("name") or label(tree, choices or {})
    config = Config.model_validate(tree)
    config.stages = spelt_out(config.stages, config.encoder, config.llm, config.init)
    check_order(config.stages)
    for field, node, runtime in components(config):
        bind(field, node, runtime)
    own = {f"stages.{name}.tiling": stage.tiling for name, stage in config.stages.items() if stage.tiling is not None}
    check_parts(config.encoder, config.connector, {"tiling": config.tiling, **own})
    for name, stage in config.stages.items():
        check_stage(name, stage, config)
    check_paths(config)
    check_tilings(config)
    return config


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run, from its config.yaml; `overrides` as on the command line (`eval.limit=100`)."""
    tree = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    return Config.model_validate(OmegaConf.to_container(tree))


def dump(config: Config, path: Path) -> None:
    OmegaConf.save(OmegaConf.create(config.model_dump()), path)


def label(tree: Node, choices: dict[str, Any]) -> str:
    if (sweep := tree.get("ablation")) and sweep.get("arm"):
        return f"{sweep['name']}-{sweep['arm']}-s{tree['seed']}"
    parts = ["+".join(tree["encoder"]), *(choices.get(group, "") for group in ("connector", "llm", "data"))]
    return "-".join(filter(None, parts))


def components(config: Config) -> list[tuple[str, Node, set[str]]]:
    """(field, node, arguments that code sets) of everything that build.py will construct."""
    nodes: list[tuple[str, Node, set[str]]] = [
        (f"encoder.{name}", node, set()) for name, node in config.encoder.items()
    ]
    nodes += [("connector", config.connector, {"dims", "out_dim"}), ("llm", config.llm, set())]
    nodes += [("tiling", config.tiling, set()), ("logger", config.logger, {"config", "run"})]
    nodes += [(f"stages.{name}.tiling", s.tiling, set()) for name, s in config.stages.items() if s.tiling is not None]
    for name, stage in config.stages.items():
        added = [("towers", stage.towers, {"dim", "normed", "contrastive"})]
        added += [("views", stage.views, {"words", "side", "patches", "length", "queries", "twice"})]
        nodes += [(f"stages.{name}.{field}", node, given) for field, node, given in added if node is not None]
    for group in ("sources", "tasks"):
        nodes += [(f"data.{group}.{name}", node, set()) for name, node in getattr(config.data, group).items()]
    return nodes


def check_stage(name: str, stage: Stage, config: Config) -> None:
    if stage.mixture not in config.data.mixtures:
        have = ", ".join(config.data.mixtures)
        raise ValueError(f"stages.{name}.mixture = {stage.mixture}: this data option offers {have}")
    check_objective(name, stage, config)
    parts = [part for part in OBJECTIVES[kind(stage)] if part != "encoder"]
    encoders = [] if kind(stage) == "next_token" else list(config.encoder) if stage.part is None else [stage.encoder]
    for path in stage.train:
        head, _, rest = path.partition(".")
        part = rest.split(".")[0]
        if head not in OBJECTIVES[kind(stage)] or (head == "encoder" and part and part not in encoders):
            options = [*parts, *(["encoder"] if encoders else []), *(f"encoder.{e}" for e in encoders)]
            raise ValueError(f"stages.{name}.train.{path}: no such module; there are {', '.join(options)}")
    if stage.turns is not None and not config.data.shuffle_turns:
        raise ValueError(f"stages.{name}.turns = {stage.turns} draws questions: it needs data.shuffle_turns=true")
    check_sharding(name, stage, config.trainer)
    processes = config.trainer.devices
    if stage.batch % processes:
        raise ValueError(f"stages.{name}.batch = {stage.batch} is not a multiple of trainer.devices = {processes}")


def kind(stage: Stage) -> Objective:
    """The objective of a stage that `spelt_out` has seen."""
    assert not isinstance(stage.objective, dict)
    return stage.objective


def check_objective(name: str, stage: Stage, config: Config) -> None:
    """A stage that pretrains an encoder names one, and what it needs besides; the others name nothing of that."""
    if stage.upscale is not None and kind(stage) != "vlm":
        raise ValueError(f"stages.{name}.upscale is for training the whole model, objective is {stage.objective}")
    added = {field: getattr(stage, field) for field in ("encoder", "towers", "views", "wordpieces", "image_size")}
    if "towers" not in OBJECTIVES[kind(stage)]:
        for field in (field for field, value in added.items() if value is not None):
            raise ValueError(f"stages.{name}.{field} is for pretraining encoders, objective is {stage.objective}")
        return
    if stage.encoder not in config.encoder:
        raise ValueError(f"stages.{name}.encoder = {stage.encoder}: there are {', '.join(config.encoder)}")
    if stage.views is None or (stage.towers is None and stage.objective in IMAGE_TEXT):
        missing = "views" if stage.views is None else "towers"
        raise ValueError(f"stages.{name}.{missing} must be given: objective {stage.objective} needs it")
    if stage.objective == "simmim" and (keep := stage.views.get("keep", 0)) >= 1:
        raise ValueError(f"stages.{name}.views.keep = {keep} hides nothing: simmim needs less than 1")


def check_sharding(name: str, stage: Stage, trainer: Trainer) -> None:
    """What shards, shards plain weights and the states of PyTorch's optimizers only."""
    if not shards(trainer.strategy):
        return
    sharder = "FSDP" if trainer.strategy == "fsdp" else "ZeRO"
    weights = sharder == "FSDP" or trainer.strategy.startswith("zero3")
    if trainer.feature_cache == "on" and weights:
        whole = f"under {sharder} all processes run the encoder together"
        raise ValueError(f"trainer.feature_cache = on: {whole}; say auto")
    if sharder == "FSDP" and "towers" in OBJECTIVES[kind(stage)]:
        raise ValueError(f"stages.{name} pretrains an encoder: FSDP cannot, use trainer=ddp or zero2, or bootstrap=[]")
    four_bit = [path for path, rule in stage.train.items() if rule is not None and rule.adapt == "qlora"]
    refused = {
        "trainer.compile = true": trainer.compile and weights,
        "trainer.checkpoint_async = true": trainer.checkpoint_async,
        "trainer.precision = 16-mixed": trainer.precision == "16-mixed" and sharder == "FSDP",
        f"stages.{name}.ema = {stage.ema}": stage.ema is not None,
        f"stages.{name}.train.{(four_bit or [''])[0]}.adapt = qlora": bool(four_bit),
        f"stages.{name}.optimizer = {stage.optimizer}": stage.optimizer != "adamw",
    }
    for what in (what for what, wanted in refused.items() if wanted):
        raise ValueError(f"{what} needs trainer=gpu, cpu or ddp, not {sharder}")


def shards(strategy: str) -> bool:
    """Whether it divides weights, gradients or states between processes."""
    return strategy.startswith("zero") or strategy == "fsdp"


def check_tilings(config: Config) -> None:
    """What a stage or a task reads, its tiling has a rule for."""
    for name, task in config.data.tasks.items():
        check_videos(f"data.tasks.{name}", task, config.tiling)
    for name, stage in config.stages.items():
        if stage.part is not None:
            continue
        tiling = stage.tiling or config.tiling
        for source in config.data.mixtures[stage.mixture]:
            check_videos(f"stages.{name}: data.sources.{source}", config.data.sources[source], tiling)


def check_paths(config: Config) -> None:
    unknown = [(m, s) for m, weights in config.data.mixtures.items() for s in weights if s not in config.data.sources]
    for mixture, source in unknown:
        raise ValueError(
            f"data.mixtures.{mixture}.{source}: no such source; there are {', '.join(config.data.sources)}"
        )
    for field in ("path", "root", "eval_path"):
        path = getattr(config.data, field)
        if path is not None and not Path(path).exists():
            raise ValueError(f"data.{field} = {path}: no such file or folder (from {Path.cwd()})")
    check_init(config.init)


def check_init(init: str | None) -> None:
    """Refuses what is neither `hf:<id>` nor `hf:<folder with a checkpoint>`; ids are looked up by the worker."""
    if init is None:
        return
    source = init.removeprefix(HF)
    if source == init or not source:
        raise ValueError(f"init = {init}: say {HF}ID or {HF}FOLDER")
    local = source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).exists()
    if local and not (Path(source) / "config.json").is_file():
        raise ValueError(f"init = {init}: no folder with a config.json (from {Path.cwd()})")
