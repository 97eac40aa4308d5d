"""What a stage is: its fields, the objectives that it may have, and which stage starts from which. No torch in here.

`objective` says what is trained, and for what; every kind is in OBJECTIVES. All but `vlm` pretrain one part by itself,
an encoder or the LLM, with what only that part depends on; the VLM stages behind them start from those parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from vlm_lab.components import Node

IDENTITY, PERFORMANCE, COSMETIC = "identity", "performance", "cosmetic"
Objective = Literal["vlm", "contrastive", "sigmoid", "caption", "simmim", "simclr", "next_token"]
OBJECTIVES: dict[Objective, tuple[str, ...]] = {  # what a stage trains for -> the modules of its model
    "vlm": ("encoder", "connector", "llm"),  # answers: the whole model
    "contrastive": ("encoder", "towers"),  # CLIP's InfoNCE; OpenVision with towers.caption
    "sigmoid": ("encoder", "towers"),  # SigLIP's loss, otherwise the same
    "caption": ("encoder", "towers"),  # OpenVision 2: the caption decoder alone
    "simmim": ("encoder", "towers"),  # hidden patches of pictures, no text
    "simclr": ("encoder", "towers"),  # two views of a picture, no text
    "next_token": ("llm",),  # text
}
IMAGE_TEXT = ("contrastive", "sigmoid", "caption")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Rule(Strict):
    """How everything below one module path trains; a bare number stands for {lr: number}."""

    lr: Annotated[float, IDENTITY] = Field(gt=0)  # peak learning rate
    adapt: Annotated[Literal["full", "lora", "dora", "qlora"], IDENTITY] = "full"
    last: Annotated[int | None, IDENTITY] = Field(None, gt=0)  # only the last n blocks
    rank: Annotated[int, IDENTITY] = Field(64, gt=0)
    alpha: Annotated[float | None, IDENTITY] = Field(None, gt=0)  # adapters are scaled by alpha / rank; null: 2 * rank
    dropout: Annotated[float, IDENTITY] = Field(0.0, ge=0, lt=1)  # before the adapters
    weight_decay: Annotated[float | None, IDENTITY] = Field(None, ge=0)  # null: the stage's
    warmup: Annotated[float | None, IDENTITY] = Field(None, ge=0, lt=1)  # null: the stage's

    @model_validator(mode="before")
    @classmethod
    def from_number(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | dict | Rule):
            raise PydanticCustomError("rule", "must be a learning rate, null, or {lr: RATE, adapt: lora, ...}")
        return {"lr": float(value)} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def adapter_settings(self) -> Rule:
        if self.adapt == "full" and (idle := self.model_fields_set & {"rank", "alpha", "dropout"}):
            raise ValueError(f"{sorted(idle)[0]} has no effect with adapt=full; choose lora, dora or qlora")
        return self

    @model_serializer(mode="wrap")
    def to_number(self, dump: SerializerFunctionWrapHandler) -> Any:
        given = {name: value for name, value in dump(self).items() if name in self.model_fields_set}
        return self.lr if given.keys() == {"lr"} else given


class Stage(Strict):
    """One training stage. `train` maps module paths to how they train; what it does not name is frozen.

    A stage that pretrains encoders (`objective`: one for all, or by the encoder's name, `default` for the others)
    becomes one stage per encoder (`spelt_out`). With `bootstrap` it is left out for a part that has weights already.
    """

    mixture: Annotated[str, IDENTITY]
    train: Annotated[dict[str, Rule | None], IDENTITY]
    turns: Annotated[int | None, IDENTITY] = Field(None, gt=0)  # questions of a conversation, drawn anew; null: all
    upscale: Annotated[float | None, IDENTITY] = Field(None, gt=0, le=1)  # share of the images that are enlarged
    cap: Annotated[int | None, IDENTITY] = Field(None, gt=0)  # records of each source, at most (Cambrian-1's t)
    objective: Annotated[Objective | dict[str, Objective], IDENTITY] = "vlm"
    bootstrap: Annotated[bool, IDENTITY] = False
    encoder: Annotated[str | None, IDENTITY] = None  # that is pretrained; null: each by itself
    towers: Annotated[Node | None, IDENTITY] = None  # what pretraining with texts adds to an encoder
    views: Annotated[Node | None, IDENTITY] = None  # how pretraining sees pictures and texts
    wordpieces: Annotated[str | None, IDENTITY] = None  # a hub id or folder; null: made of the data's text
    image_size: Annotated[int | None, IDENTITY] = Field(None, gt=0)  # of this stage, where it is not the encoder's
    steps: Annotated[int | None, IDENTITY] = Field(None, gt=0)  # optimizer steps; give this or `epochs`
    epochs: Annotated[float | None, IDENTITY] = Field(None, gt=0)
    batch: Annotated[int, IDENTITY] = Field(gt=0)  # samples per optimizer step, over all processes
    micro_batch: Annotated[int, PERFORMANCE] = Field(gt=0)  # samples per forward pass of one process
    schedule: Annotated[Literal["cosine", "constant"], IDENTITY] = "cosine"
    warmup: Annotated[float, IDENTITY] = Field(0.0, ge=0, lt=1)  # fraction of the steps
    weight_decay: Annotated[float, IDENTITY] = Field(0.0, ge=0)
    optimizer: Annotated[Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "muon"], IDENTITY] = "adamw"
    beta2: Annotated[float, IDENTITY] = Field(0.999, gt=0, lt=1)  # AdamW's
    neftune: Annotated[float | None, IDENTITY] = Field(None, gt=0)  # alpha of the noise on the LLM's input
    clip: Annotated[float | None, IDENTITY] = Field(None, gt=0)  # gradient norm
    ema: Annotated[float | None, IDENTITY] = Field(None, gt=0, lt=1)  # decay of the weights' average that it hands on
    max_tokens: Annotated[int, IDENTITY] = Field(2048, gt=0)  # per sample
    tiling: Annotated[Node | None, IDENTITY] = None  # of this stage, where it is not the run's
    chat: Annotated[str | None, IDENTITY] = None  # template of this stage, where it is not the LLM's

    @model_validator(mode="after")
    def one_length(self) -> Stage:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs, got steps={self.steps} and epochs={self.epochs}")
        if all(rule is None for rule in self.train.values()):
            raise ValueError("train names nothing to train: every rate is null")
        return self

    @property
    def part(self) -> str | None:
        """The part that is pretrained by itself (`encoder.<name>`, `llm`); None: the whole model trains."""
        if self.objective == "vlm":
            return None
        return "llm" if self.objective == "next_token" else f"encoder.{self.encoder}"


def spelt_out(stages: dict[str, Stage], encoders: dict[str, Node], llm: Node, init: str | None) -> dict[str, Stage]:
    """`stages` with one pretraining stage per encoder, called `<stage>.<encoder>`, where a stage names none.

    A bootstrap stage stays only for a part that has no weights and that no other stage pretrains.
    """
    each = [pair for name, stage in stages.items() for pair in per_encoder(name, stage, list(encoders))]
    nodes = {**{f"encoder.{name}": node for name, node in encoders.items()}, "llm": llm}
    ready = {part for part, node in nodes.items() if init is not None or node.get("weights") is not None}
    ready |= {stage.part for _, stage in each if stage.part is not None and not stage.bootstrap}
    return {name: stage for name, stage in each if not (stage.bootstrap and stage.part in ready)}


def per_encoder(name: str, stage: Stage, encoders: list[str]) -> Iterator[tuple[str, Stage]]:
    if stage.objective in ("vlm", "next_token"):
        yield name, stage
        return
    chosen = encoders if stage.encoder is None else [stage.encoder]
    for encoder in chosen:
        objective = objective_of(name, stage, encoder)
        foreign = [path for path in stage.train if path.split(".")[1:2] not in ([], [encoder]) and "encoder." in path]
        table = {path: rule for path, rule in stage.train.items() if path not in foreign}
        change: dict[str, Any] = {"objective": objective, "encoder": encoder, "train": table}
        if objective not in IMAGE_TEXT:
            change |= {"towers": None, "wordpieces": None}
        yield name if stage.encoder else f"{name}.{encoder}", stage.model_copy(update=change)


def objective_of(name: str, stage: Stage, encoder: str) -> Objective:
    if not isinstance(stage.objective, dict):
        return stage.objective
    found = stage.objective.get(encoder, stage.objective.get("default"))
    if found is None or "towers" not in OBJECTIVES[found]:
        kinds = ", ".join(kind for kind, parts in OBJECTIVES.items() if "towers" in parts)
        raise ValueError(f"stages.{name}.objective.{encoder} = {found}: by encoder it is one of {kinds}")
    return found


def parents(stages: dict[str, Stage], name: str) -> list[str]:
    """The stages whose weights `name` starts from: the one before it, or what pretrained the parts of a VLM."""
    names = list(stages)
    before = names[: names.index(name)]
    if stages[name].part is not None:
        return [other for other in before if stages[other].part == stages[name].part][-1:]
    whole = [other for other in before if stages[other].part is None]
    last = {stages[other].part: other for other in before}
    return whole[-1:] or list(last.values())


def check_order(stages: dict[str, Stage]) -> None:
    """ValueError if a part is pretrained after the whole model has been trained."""
    whole = None
    for name, stage in stages.items():
        if stage.part is None:
            whole = name
        elif whole is not None:
            raise ValueError(f"stages.{name} pretrains {stage.part} after {whole} trained the model: put it first")
