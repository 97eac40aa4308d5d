"""The typed root of every configuration, and `check`: the only door from Hydra into the rest of the package.

`check(DictConfig) -> Config` resolves, validates types, unknown keys, component arguments, module paths and files, and
refuses with one line that names the field. It imports neither torch nor lightning, so a typo costs under a second.
Every field carries its kind: IDENTITY decides the trained weights, PERFORMANCE only how fast, COSMETIC only the looks;
the stage store hashes the identity fields alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from vlm_lab.ablation import Ablation
from vlm_lab.checks import HF, check_paths, check_stage, check_tilings, shards
from vlm_lab.compat import check_parts
from vlm_lab.components import Node, bind
from vlm_lab.stages import COSMETIC, IDENTITY, PERFORMANCE, Rule, Stage, Strict, check_order, spelt_out

__all__ = ["COSMETIC", "HF", "IDENTITY", "PERFORMANCE", "Config", "Node", "Rule", "Stage", "Trainer"]
Strategy = Literal["auto", "ddp", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp"]


class Data(Strict):
    """Sources of records, how stages mix them, and the tasks they are evaluated on."""

    sources: Annotated[dict[str, Node], IDENTITY]
    mixtures: Annotated[dict[str, dict[str, float | None]], IDENTITY]  # weights; null: as many as it has records
    tasks: Annotated[dict[str, Node], COSMETIC]
    path: Annotated[str | None, COSMETIC] = None  # only ever used inside `sources`
    root: Annotated[str | None, COSMETIC] = None
    eval_path: Annotated[str | None, COSMETIC] = None
    holdout: Annotated[int, IDENTITY] = Field(0, ge=0)  # records per source, when no task has a file of its own
    shuffle_turns: Annotated[bool, IDENTITY] = False  # of multi-turn samples, anew at every draw
    max_bad: Annotated[int, COSMETIC] = Field(0, ge=0)


class Trainer(Strict):
    accelerator: Annotated[Literal["cpu", "gpu"], PERFORMANCE]
    devices: Annotated[int, PERFORMANCE] = Field(1, gt=0)
    strategy: Annotated[Strategy, PERFORMANCE] = "auto"
    precision: Annotated[Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"], IDENTITY]
    num_workers: Annotated[int, PERFORMANCE] = Field(0, ge=0)
    gradient_checkpointing: Annotated[bool, PERFORMANCE] = False
    compile: Annotated[bool, IDENTITY] = False  # blocks by torch.compile, which changes the order of sums
    checkpoint_every: Annotated[int, PERFORMANCE] = Field(500, gt=0)  # optimizer steps
    checkpoint_keep: Annotated[int, PERFORMANCE] = Field(2, gt=0)  # the newest ones
    checkpoint_async: Annotated[bool, PERFORMANCE] = False  # written while training goes on
    timeout_s: Annotated[int, PERFORMANCE] = Field(1800, gt=0)  # how long a process waits for another
    feature_cache: Annotated[Literal["off", "on", "auto"], PERFORMANCE] = "off"  # of frozen encoders; auto: if faster
    feature_dtype: Annotated[Literal["float16", "bfloat16"] | None, IDENTITY] = None  # rounded to, cache or not


class Eval(Strict):
    images: Annotated[list[Literal["real", "none", "shuffled"]], COSMETIC] = Field(min_length=1)
    limit: Annotated[int | None, COSMETIC] = Field(None, gt=0)  # questions per task
    batch: Annotated[int, PERFORMANCE] = Field(gt=0)
    max_new_tokens: Annotated[int, COSMETIC] = Field(gt=0)


class Config(Strict):
    name: Annotated[str, COSMETIC]
    seed: Annotated[int, IDENTITY] = Field(ge=0)
    output: Annotated[str, COSMETIC]
    init: Annotated[str | None, IDENTITY] = None  # what all weights start from: hf:<id or folder> (vlm_lab/convert)
    scale: Annotated[Literal["tiny", "full"], COSMETIC]  # its effects are all in the fields that it sets
    encoder: Annotated[dict[str, Node], IDENTITY]
    connector: Annotated[Node, IDENTITY]
    llm: Annotated[Node, IDENTITY]
    tiling: Annotated[Node, IDENTITY]
    data: Annotated[Data, IDENTITY]
    stages: Annotated[dict[str, Stage], IDENTITY] = Field(min_length=1)
    trainer: Annotated[Trainer, IDENTITY]
    logger: Annotated[Node, COSMETIC]
    eval: Annotated[Eval, COSMETIC]
    ablation: Annotated[Ablation | None, COSMETIC] = None  # the sweep that this run is an arm of


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
        added += [("views", stage.views, {"words", "side", "patches", "length", "queries"})]
        nodes += [(f"stages.{name}.{field}", node, given) for field, node, given in added if node is not None]
    for group in ("sources", "tasks"):
        nodes += [(f"data.{group}.{name}", node, set()) for name, node in getattr(config.data, group).items()]
    return nodes
