"""Contrastive pretraining beside open_clip: the same two towers, weights, batch and loss, pairs per second.

    python benchmarks/encoder_pretraining.py [--rounds 3] [--steps 10] [--batch 64] [--threads 1]

Both run whole training steps (forward, InfoNCE, backward, AdamW) on pictures and token ids that lie ready; ours gets
uint8 and normalises, open_clip's are normalised floats. The contenders take turns, and the order alternates between
rounds, so that a busy machine is busy for both. The first line checks that they compute the same loss.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import open_clip
import torch
from torch import Tensor

from vlm_lab.batch import IGNORE, CaptionBatch
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.pretrain import DualEncoder, Towers
from vlm_lab.model.pretrain.naming import write_open_clip

Step = Callable[[], Tensor]
WIDTH, DEPTH, HEADS, SIDE, PATCH, WORDS, LENGTH = 128, 3, 4, 64, 8, 1024, 24


def model() -> DualEncoder:
    torch.manual_seed(0)
    encoder = TimmEncoder("openvision_vit_tiny_patch16_224", None, [-1], SIDE, PATCH, WIDTH, DEPTH, HEADS)
    towers = Towers(encoder.dim, WIDTH, 2, HEADS, 4 * WIDTH, WIDTH, WORDS, LENGTH, synthetic=False, caption=0.0)
    return DualEncoder("eye", encoder, towers)


def pairs(count: int) -> CaptionBatch:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    texts = torch.randint(3, WORDS, (count, LENGTH), generator=draw)
    valid, ids = torch.ones(count, dtype=torch.bool), [str(number) for number in range(count)]
    return CaptionBatch(pixels, texts, texts, torch.full((count, 1), IGNORE), valid, ids)


def contenders(batch: CaptionBatch) -> dict[str, Step]:
    ours = model()
    with tempfile.TemporaryDirectory() as folder:
        write_open_clip(ours, Path(folder))
        theirs = open_clip.create_model(f"local-dir:{folder}").train()
    images, loss = ours.encoder["eye"].normalised(batch.pixels), open_clip.ClipLoss()
    mine, other = (torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (ours, theirs))

    def own() -> Tensor:
        return ours(batch).total

    def clip() -> Tensor:
        image, text, scale = theirs(images, batch.raw)
        return loss(image, text, scale)

    return {"here": stepped(own, mine), "open_clip": stepped(clip, other)}


def stepped(forward: Step, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> Tensor:
        optimizer.zero_grad()
        value = forward()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def measure(step: Step, steps: int) -> tuple[float, float]:
    """(wall, processor) seconds of a step."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("steps", 10), ("batch", 64), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = contenders(pairs(args.batch))
    first = {name: float(step()) for name, step in steps.items()}
    print("loss of the first step:", ", ".join(f"{name} {value:.5f}" for name, value in first.items()))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(args.rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            seconds[name].append(measure(steps[name], args.steps))
    for kind, place in (("wall", 0), ("processor", 1)):
        rates = {name: args.batch / median(pair[place] for pair in each) for name, each in seconds.items()}
        ratio = rates["here"] / rates["open_clip"]
        text = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        print(f"pairs per {kind} second: {text}; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
