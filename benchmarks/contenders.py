"""The three contenders of train_throughput.py: `fn(folder, steps)` trains, and returns when each step ended.

`bare` is the reference: the same network and optimizer in a plain loop over prebuilt batches: no data loading, no
Lightning, no callbacks. `transformers` is what users of the peer write: Trainer, LlavaForConditionalGeneration,
LlavaProcessor and a padding collator.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm_lab import build, schema
from vlm_lab.config import Config
from vlm_lab.data.loader import Loader
from vlm_lab.model import freeze
from vlm_lab.module import VLMTraining

BATCH = 16
LLM = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
VISION = {"image_size": 112, "patch_size": 16, "width": 192, "depth": 6, "heads": 3}
THEIR_VISION = {  # the same in transformers' words
    "image_size": 112,
    "patch_size": 16,
    "hidden_size": 192,
    "intermediate_size": 4 * 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
}


def config(folder: Path) -> Config:
    """The composition under test, as `train.py` would make it from the command line."""
    from hydra import compose, initialize_config_dir

    schema.register_resolvers()
    overrides = [f"encoder.siglip.{key}={value}" for key, value in VISION.items()]
    overrides += [f"++llm.shape.{key}={value}" for key, value in LLM.items()]
    overrides += [
        "data=llava_json",
        f"data.path={folder}/records.json",
        "data.holdout=0",
        f"output={folder}",
        "stage=[align]",
        "bootstrap=[]",
        "stages.align.optimizer=adamw",
        "stages.align.train={encoder: 1.0e-3, connector: 1.0e-3, llm: 1.0e-3}",  # everything, as the peer does
        "connector=mlp",
        "trainer.num_workers=0",
    ]
    overrides += [f"stages.align.{key}={BATCH}" for key in ("batch", "micro_batch")]
    with initialize_config_dir(str(Path(__file__).resolve().parent.parent / "conf"), version_base="1.3"):
        return schema.check(compose("train", overrides=overrides))


def parts(cfg: Config, name: str, steps: int, device: str = "cpu") -> tuple[VLMTraining, Loader]:
    """The module and the loader of stage `name`, cut to `steps`; random weights are drawn on `device`."""
    stage = cfg.stages[name]
    stage.steps, stage.epochs = steps, None
    with torch.device(device):
        vlm = build.vlm(cfg)
    processor = build.processor(cfg, vlm, build.tokenizer(cfg), stage)
    return VLMTraining(vlm, stage, steps), build.loader(cfg, stage, processor, rank=0, world=1)


def ours(folder: Path, steps: int) -> list[float]:
    """What `python train.py` runs: loader, Lightning Trainer, progress, metrics, contract."""
    from vlm_lab.callbacks import BadRecords, Contract, Meter

    cfg = config(folder)
    module, loader = parts(cfg, "align", steps)
    meter = Meter("bench", folder / "metrics.jsonl", window=steps)
    callbacks = [meter, BadRecords(0, folder / "bad.jsonl"), Contract()]
    build.trainer(cfg, module.stage, loader, callbacks).fit(module, loader)
    return [stamp for stamp, *_ in meter.marks[1:]]


def bare(folder: Path, steps: int) -> list[float]:
    """The same network, the same optimizer, the same batches in memory; nothing else."""
    module, loader = parts(config(folder), "align", steps)
    batches, vlm = list(loader), module.vlm
    freeze.train_mode(vlm)
    groups = freeze.param_groups(vlm, module.table)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, module.stage.beta2), fused=True)
    stamps = []
    for batch in batches:
        optimizer.zero_grad()
        (vlm(batch) / batch.num_answers).backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), module.stage.clip)
        optimizer.step()
        stamps.append(time.perf_counter())
    return stamps


def transformers_trainer(folder: Path, steps: int) -> list[float]:
    """Stock transformers on the same files, with the same tokenizer and chat text, padded to the longest of a batch."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    cfg = config(folder)
    stage, tokenizer = cfg.stages["align"], build.tokenizer(cfg)
    records = json.loads((folder / "records.json").read_text())
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(folder / "peer"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-3,
        max_grad_norm=stage.clip,
        optim="adamw_torch_fused",
        adam_beta2=stage.beta2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    collate = llava_collator(tokenizer, folder)
    model = llava(tokenizer, THEIR_VISION, {**LLM, "vocab_size": LLM["vocab_size"] + 1})
    Trainer(model, arguments, collate, records, callbacks=[Clock()]).train()
    return stamps


def llava(tokenizer: Any, vision: dict[str, int], text: dict[str, Any]) -> Any:
    """transformers' LLaVA with random weights, from the arguments of its SigLIP's and of Qwen2's config classes."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
            text_config=Qwen2Config(**text),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )


def llava_collator(
    tokenizer: Any, folder: Path, side: int = 112, patch: int = 16
) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    from transformers import LlavaProcessor, SiglipImageProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side = "right"
    images = SiglipImageProcessor(size={"height": side, "width": side})
    processor = LlavaProcessor(images, tokenizer, patch_size=patch, vision_feature_select_strategy="full")
    start, end = "<|im_start|>", "<|im_end|>"

    def collate(records: list[dict]) -> dict[str, torch.Tensor]:
        turns = [(r["conversations"][0]["value"], r["conversations"][1]["value"]) for r in records]
        prompts = [f"{start}user\n{question}{end}\n{start}assistant\n" for question, _ in turns]
        texts = [f"{prompt}{answer}{end}\n" for prompt, (_, answer) in zip(prompts, turns, strict=True)]
        pictures = [Image.open(folder / r["image"]).convert("RGB") for r in records]
        batch = processor(images=pictures, text=texts, padding=True, truncation=False, return_tensors="pt")
        answers = tokenizer([answer + end for _, answer in turns])["input_ids"]
        batch["labels"] = labels_of(batch["input_ids"], batch["attention_mask"], [len(a) for a in answers])
        return batch

    return collate


def labels_of(input_ids: torch.Tensor, mask: torch.Tensor, answers: list[int]) -> torch.Tensor:
    """The answer and its stop token; the last token of a text is the newline after them."""
    labels = torch.full_like(input_ids, -100)
    for row, (length, answer) in enumerate(zip(mask.sum(1).tolist(), answers, strict=True)):
        labels[row, length - 1 - answer : length - 1] = input_ids[row, length - 1 - answer : length - 1]
    return labels


CONTENDERS: dict[str, Callable[[Path, int], list[float]]] = {
    "ours": ours,
    "bare": bare,
    "transformers": transformers_trainer,
}
