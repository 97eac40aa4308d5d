"""Training throughput beside transformers' Trainer and a bare loop, on the same model shape and the same records.

    make bench                                            everything below, about fifteen minutes on two cores
    python benchmarks/train_throughput.py --rounds 1      a quick look
    python benchmarks/train_throughput.py --only start    the time from command to first step alone

The shape is a tiny LLaVA: SigLIP 6 x 192 at 112 px, patch 16; an MLP; Qwen2 6 x 256. Contenders run in turn, each in a
process of its own; ratios are taken within a round, so that a machine that drifts does not decide. Loss: mean
cross-entropy over the step's answer tokens, for all. Record sets: `equal` (answers of 24 words), `skewed` (1 to 600).
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import BATCH, CONTENDERS  # noqa: E402

SETS = {"equal": (24, 24), "skewed": (1, 600)}
RECORDS, STEPS = 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[*SETS, "start"])
    parser.add_argument("--child", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], Path(args.child[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, lengths in SETS.items():
            if args.only in (None, name):
                write_records(Path(folder) / name, *lengths)
                compare(name, Path(folder) / name, args.rounds)
    if args.only in (None, "start"):
        time_to_first_step()


def measure(contender: str, folder: Path) -> dict[str, float]:
    """Samples/s over STEPS steps after two of warm-up, and the peak resident memory of this process."""
    stamps = CONTENDERS[contender](folder, STEPS + 2)  # the time at the end of every step
    seconds = stamps[-1] - stamps[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"samples_per_s": STEPS * BATCH / seconds, "peak_gib": peak}


def compare(name: str, folder: Path, rounds: int) -> None:
    results = [{contender: child(contender, folder) for contender in CONTENDERS} for _ in range(rounds)]
    print(f"\n{name} lengths, batch {BATCH}, {STEPS} steps, {rounds} rounds: medians (minimum to maximum)")
    for contender in CONTENDERS:
        rate = [r[contender]["samples_per_s"] for r in results]
        ratio = [r["ours"]["samples_per_s"] / r[contender]["samples_per_s"] for r in results]
        peak = statistics.median(r[contender]["peak_gib"] for r in results)
        print(f"  {contender:12} {spread(rate)} samples/s   ours / this {spread(ratio, 2)}   peak {peak:.2f} GiB")


def child(contender: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", contender, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def write_records(folder: Path, shortest: int, longest: int) -> None:
    """A LLaVA JSON with RECORDS images of the made-up world and answers of `shortest` to `longest` words."""
    from vlm_lab.data.scenes import SceneCaptions

    folder.mkdir(parents=True)
    rng, source = random.Random(0), SceneCaptions("train", RECORDS)
    words = [
        "the",
        "red",
        "circle",
        "stands",
        "left",
        "of",
        "a",
        "small",
        "blue",
        "square",
        "and",
        "above",
        "two",
        "green",
        "stars",
    ]
    records = []
    for index in range(RECORDS):
        source[index].images[0].draw().save(folder / f"{index}.png")
        answer = " ".join(rng.choices(words, k=rng.randint(shortest, longest)))
        turns = [{"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": answer}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))


def time_to_first_step() -> None:
    """From `python train.py` to the first line of metrics.jsonl, and how long importing what it uses takes."""
    imports = "import torch, lightning, timm, transformers.models.qwen2.modeling_qwen2, hydra, PIL, pyarrow"
    with tempfile.TemporaryDirectory() as folder:
        only = ["stages.align.steps=1", "stage=[align]", "bootstrap=[]", "eval.limit=1"]
        command = [sys.executable, str(ROOT / "train.py"), f"output={folder}", *only]
        run(command)  # draws and caches the pictures
        bare = [timed([sys.executable, "-c", imports]) for _ in range(3)]
        ours = [first_step([*command, f"seed={seed}"], Path(folder)) for seed in (1, 2, 3)]
    print(f"\nfrom command to first step {spread(ours)} s; importing the libraries alone {spread(bare)} s")


def first_step(command: list[str], output: Path) -> float:
    before, started = set(output.glob("runs/*/metrics.jsonl")), time.time()
    run(command)
    (new,) = set(output.glob("runs/*/metrics.jsonl")) - before
    (record,) = new.parent.glob("stages/align/stage.json")
    return json.loads(record.read_text())["first_step_at"] - started


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    run(command)
    return time.perf_counter() - started


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
