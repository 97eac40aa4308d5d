"""The typed root of every configuration: what there is to set below conf/train.yaml, stages excepted (stages.py).

Every field carries its kind: IDENTITY decides the trained weights, PERFORMANCE only how fast, COSMETIC only the looks;
the stage store hashes the identity fields alone. Made and checked by `schema.check`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlm_lab.ablation import Ablation
from vlm_lab.components import Node
from vlm_lab.stages import COSMETIC, IDENTITY, PERFORMANCE, Stage, Strict

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
