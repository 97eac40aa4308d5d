"""Training throughput on one GPU beside transformers' Trainer: tokens/s, MFU and peak memory at published sizes.

    python benchmarks/gpu.py                                       both shapes, full and LoRA, about ten minutes
    python benchmarks/gpu.py --shapes 0.5b --tunings full --steps 8

SigLIP SO400M/14 at 384 px (729 tokens), an MLP and Qwen2 at its 0.5B or 7B size, random weights, bf16 (weights, too),
AdamW, packed rows of image samples against padded ones of the same records; ours also with `trainer.compile`. `full`
trains everything, `lora` the connector and adapters of rank 64 in the LLM. Nobody checkpoints activations. Contenders
run in turn, each in a process of its own. MFU: `vlm_lab/model/flops.py`; the peer's is ours per token of its samples,
padding not counted. Needs a CUDA device; nothing is downloaded. The trainability contract, which works once per stage,
is left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import llava, llava_collator, parts  # noqa: E402
from benchmarks.train_throughput import write_records  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
THEIR_VISION = {  # SigLIP SO400M/14 at 384 px in transformers' words
    "image_size": 384,
    "patch_size": 14,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
TRAIN = {
    "full": "{encoder: 2.0e-6, connector: 1.0e-5, llm: 1.0e-5}",
    "lora": "{connector: 1.0e-5, llm: {lr: 1.0e-4, adapt: lora, rank: 64}}",
}
ROWS = {"0.5b": (16, 8), "7b": (8, 4)}  # samples of a step, of a row
WARMUP = 3  # steps that are not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tunings", nargs="+", choices=TRAIN, default=list(TRAIN))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        contender, shape, tuning, folder = args.child
        print(json.dumps(CONTENDERS[contender](Path(folder), shape, tuning, args.steps)))
        return
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks/gpu.py needs a CUDA device; benchmarks/train_throughput.py runs on a CPU")
    with tempfile.TemporaryDirectory() as name:
        write_records(Path(name) / "records", 20, 400)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.steps} steps after {WARMUP}")
        for shape in args.shapes:
            for tuning in args.tunings:
                compare(args, shape, tuning, Path(name) / "records")


def compare(args: argparse.Namespace, shape: str, tuning: str, folder: Path) -> None:
    per_token = None
    for contender in args.contenders:
        child = ["--child", contender, shape, tuning, str(folder), "--steps", str(args.steps)]
        result = subprocess.run([sys.executable, __file__, *child], capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"{shape} {tuning} {contender}: failed: {result.stderr.strip()[-1500:]}", flush=True)
            continue
        r = json.loads(result.stdout.splitlines()[-1])
        per_token = r.get("flops_per_token", per_token)
        mfu = "?" if per_token is None else f"{r['tokens_per_s'] * per_token / r['peak_flops']:.1%}"
        print(
            f"{shape} {tuning} {contender:14} {r['tokens_per_s']:8.0f} tokens/s  MFU {mfu}  "
            f"peak {r['gib']:.1f} GiB  {r['step_s']:.3f} s/step  padding {r['padding']:.0%}",
            flush=True,
        )


def config(folder: Path, shape: str, tuning: str, *more: str) -> Any:
    from hydra import compose, initialize_config_dir

    from vlm_lab import schema

    schema.register_resolvers()
    batch, row = ROWS[shape]
    overrides = [
        "scale=full",
        "trainer=gpu",
        "trainer.precision=bf16-true",
        "trainer.num_workers=4",
        "encoder.siglip.weights=null",
        "encoder.siglip.layer=-1",
        "llm.weights=null",
        "llm.tokenizer=null",
        "llm.system=''",
        *(f"llm.shape.{key}={value}" for key, value in SHAPES[shape].items()),
        "connector=mlp",
        "data=llava_json",
        f"data.path={folder}/records.json",
        "data.holdout=0",
        f"output={folder}",
        "stage=[instruct]",
        "bootstrap=[]",
        f"stages.instruct.train={TRAIN[tuning]}",
        f"stages.instruct.batch={batch}",
        f"stages.instruct.micro_batch={row}",
        "stages.instruct.max_tokens=4096",
        *more,
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return schema.check(compose("train", overrides=overrides))


def ours(folder: Path, shape: str, tuning: str, steps: int, *more: str) -> dict[str, float]:
    """Loader, LightningModule, Trainer and callbacks as `python train.py` makes them."""
    from vlm_lab import build
    from vlm_lab.callbacks import BadRecords, Meter
    from vlm_lab.model.compiled import compile_blocks
    from vlm_lab.model.flops import mfu_counter

    cfg = config(folder, shape, tuning, *more)
    module, loader = parts(cfg, "instruct", steps + WARMUP, device="cuda")
    module, vlm = module.to(torch.bfloat16), module.vlm
    torch.cuda.reset_peak_memory_stats()
    counter = mfu_counter(vlm, torch.cuda.get_device_name(), True)
    assert counter is not None, "no figure for this card in vlm_lab/model/flops.py"
    if cfg.trainer.compile:
        compile_blocks(vlm)
    meter = Meter("bench", folder / "metrics.jsonl", window=steps, mfu=counter)
    trainer = build.trainer(cfg, module.stage, loader, [meter, BadRecords(0, folder / "bad.jsonl")])
    trainer.fit(module, loader)
    (since, _, tokens, flops), (now, _, tokens_now, flops_now) = meter.marks[0], meter.marks[-1]
    return {
        **speed(now - since, steps, tokens_now - tokens, 0.0),
        "flops_per_token": (flops_now - flops) / (tokens_now - tokens),
    }


def speed(seconds: float, steps: int, tokens: int, padding: float) -> dict[str, float]:
    from vlm_lab.model.flops import peak

    return {
        "tokens_per_s": tokens / seconds,
        "step_s": seconds / steps,
        "padding": padding,
        "gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_flops": peak(torch.cuda.get_device_name()) or float("nan"),
    }


def peer(folder: Path, shape: str, tuning: str, steps: int) -> dict[str, float]:
    """Stock transformers on the same files: Trainer, LlavaForConditionalGeneration, sdpa attention, padded batches."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from vlm_lab import build

    tokenizer = build.tokenizer(config(folder, shape, tuning))
    collate = llava_collator(tokenizer, folder, side=384, patch=14)
    counts: list[torch.Tensor] = []  # (tokens, tokens with padding) of every row
    stamps: list[float] = []

    class Counting(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs["attention_mask"]
            counts.append(torch.stack([mask.sum(), mask.new_tensor(mask.numel()).to(mask.device)]))
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    batch, row = ROWS[shape]
    arguments = TrainingArguments(
        output_dir=str(folder / "peer"),
        per_device_train_batch_size=row,
        gradient_accumulation_steps=batch // row,
        max_steps=steps + WARMUP,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        bf16=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=4,
    )
    records = json.loads((folder / "records.json").read_text())
    with torch.device("cuda"):
        model = llava(tokenizer, THEIR_VISION, SHAPES[shape]).to(torch.bfloat16)
    model = adapted(model) if tuning == "lora" else model
    torch.cuda.reset_peak_memory_stats()
    Counting(model, arguments, collate, records, callbacks=[Clock()]).train()
    real, padded = torch.stack(counts[WARMUP * batch // row :]).sum(0).tolist()
    return speed(stamps[-1] - stamps[WARMUP - 1], steps, real, 1 - real / padded)


def adapted(model: Any) -> Any:
    """LoRA of rank 64 on the linear maps of the language model's layers; the projector trains, the encoder does not."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=64, lora_alpha=128, target_modules=r".*language_model.*_proj")
    wrapped = get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    return wrapped


def compiled(folder: Path, shape: str, tuning: str, steps: int) -> dict[str, float]:
    return ours(folder, shape, tuning, steps, "trainer.compile=true")


CONTENDERS: dict[str, Callable[..., dict[str, float]]] = {"ours": ours, "compiled": compiled, "transformers": peer}

if __name__ == "__main__":
    main()
