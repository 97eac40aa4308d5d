"""What the stage store and the feature cache save: a sweep over 12 choices of the second stage, and one frozen tower.

    python benchmarks/sweep_reuse.py                    both parts; the first takes about 25 CPU-minutes
    python benchmarks/sweep_reuse.py --only epochs      the second alone, a minute

Sweep: 12 arms as 12 commands, (a) each with a store of its own and no feature cache, (b) with one store and the cache.
Drawn pictures and the tokenizer are shared in both, so that only what is claimed differs. All scores and all weights
must be bit-equal. CPU seconds are those of the commands with all their children. Epochs: one stage with a frozen
encoder, CPU seconds per epoch with the cache off and on, bit-equal losses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FROZEN = "stages.instruct.train.encoder=null"
RATES = ("5.0e-4", "1.0e-3", "2.0e-3")
HOW = (
    [FROZEN],
    [FROZEN, "stages.instruct.neftune=5.0"],
    [FROZEN, "stages.instruct.schedule=constant"],
    [],  # the encoder trains on
)
ARMS = [[*how, f"stages.instruct.train.connector={rate}"] for rate, how in product(RATES, HOW)]
RECORDS, BATCH = 96, 8
CONNECTORS = ("mlp", "pixel_shuffle")  # all 144 tokens of a view go into the LLM, or a quarter of them
SHAPE = {"image_size": 96, "patch_size": 8, "width": 192, "depth": 6, "heads": 3}
SETTINGS = [
    "bootstrap=[]",
    *(f"encoder.siglip.{key}={value}" for key, value in SHAPE.items()),
    *(f"data.sources.{name}.size={RECORDS}" for name in ("captions", "questions", "text")),
    "data.tasks.scenes.size=8",
    "data.mixtures.instruct={questions:1.0}",
    *(f"stages.{stage}.{key}={BATCH}" for stage in ("align", "instruct") for key in ("batch", "micro_batch")),
    "trainer.num_workers=0",
    "eval.images=[real]",
    "eval.max_new_tokens=4",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["sweep", "epochs"])
    parser.add_argument("--align", type=int, default=160, help="steps of the stage that all arms share")
    parser.add_argument("--instruct", type=int, default=24, help="steps of the stage that differs: two epochs")
    parser.add_argument("--arms", type=int, default=len(ARMS))
    parser.add_argument(
        "--cache", choices=["auto", "off"], default="auto", help="of (b); off: what the store alone saves"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "epochs"):
            for connector in CONNECTORS:
                epochs(Path(folder) / connector, connector)
        if args.only in (None, "sweep"):
            steps = [f"stages.align.steps={args.align}", f"stages.instruct.steps={args.instruct}"]
            sweep(Path(folder), ARMS[: args.arms], steps, args.cache)


def sweep(folder: Path, arms: list[list[str]], steps: list[str], cache: str) -> None:
    shared = folder / "shared"
    train(shared, [*steps, "stages.align.steps=1", "stages.instruct.steps=1", "trainer.feature_cache=off"])  # pictures
    cost = {"independent": 0.0, "store and cache": 0.0}
    for number, arm in enumerate(arms):
        alone = folder / f"arm{number}"
        alone.mkdir()
        (alone / "cache").symlink_to(shared / "cache")
        cost["independent"] += train(alone, [*steps, *arm, "trainer.feature_cache=off"])
        cost["store and cache"] += train(shared, [*steps, *arm, f"trainer.feature_cache={cache}"])
        same(only_run(alone), newest_run(shared))
        print(f"arm {number + 1} of {len(arms)}: equal; CPU seconds so far {rounded(cost)}", flush=True)
    ratio = cost["independent"] / cost["store and cache"]
    print(f"{len(arms)} arms: {rounded(cost)} CPU seconds; independent / shared = {ratio:.2f}")


def rounded(cost: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds, 1) for name, seconds in cost.items()}


def train(output: Path, overrides: list[str]) -> float:
    """CPU seconds of one command and everything that it started."""
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"output={output}", *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = os.times()
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def only_run(output: Path) -> Path:
    (run,) = (output / "runs").iterdir()
    return run


def newest_run(output: Path) -> Path:
    return max((output / "runs").iterdir(), key=lambda run: (run / "result.json").stat().st_mtime)


def same(one: Path, other: Path) -> None:
    """Scores, losses and weights of both stages are bit-equal."""
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]
    keys = [[stage["key"] for stage in result["stages"].values()] for result in results]
    assert keys[0] == keys[1]
    for stage in results[0]["stages"]:
        files = [run / "stages" / stage / "model.safetensors" for run in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), stage
        losses = [losses_of(run / "stages" / stage / "metrics.jsonl") for run in (one, other)]
        assert losses[0] == losses[1], stage


def losses_of(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def epochs(output: Path, connector: str, count: int = 4) -> None:
    """Seconds of CPU per epoch of a stage with a frozen encoder, in this process; the first epoch fills the cache."""
    import torch
    from hydra import compose, initialize_config_dir

    from vlm_lab import build, schema

    torch.set_num_threads(1)
    schema.register_resolvers()
    steps = RECORDS // BATCH
    length = f"stages.instruct.steps={count * steps}"
    options = [*SETTINGS, f"connector={connector}", "stage=[instruct]", length, FROZEN, f"output={output}"]
    options = [option for option in options if not option.startswith("stages.align")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        modes = {mode: schema.check(compose("train", [*options, f"trainer.feature_cache={mode}"])) for mode in MODES}
    build.tokenizer(modes["off"])
    found = {mode: epoch_seconds(config, output, steps) for mode, config in modes.items()}
    equal = found["off"][1] == found["auto"][1]
    for mode, (seconds, _) in found.items():
        print(f"cache {mode}: CPU seconds per epoch {[round(s, 2) for s in seconds]}")
    later = [sum(found[mode][0][1:]) for mode in MODES]
    gap = max(abs(a - b) for a, b in zip(found["off"][1], found["auto"][1], strict=True))
    ratio = later[0] / later[1]
    print(f"{connector}: from the second epoch on, off / auto = {ratio:.2f}; losses equal: {equal} (within {gap:.1e})")


MODES = ("off", "auto")


def epoch_seconds(config: object, output: Path, steps: int) -> tuple[list[float], list[float]]:
    import torch
    from lightning import Callback, seed_everything

    from vlm_lab import build, parts
    from vlm_lab.callbacks import Contract, Meter

    seed_everything(0, verbose=False)
    made = parts.stage_parts(config, config.stages["instruct"])
    loader = made.loader(0, 1)
    module = made.training(made.model, config.stages["instruct"], loader.steps, None)
    output.mkdir(exist_ok=True)
    meter, stamps = Meter("instruct", output / "metrics.jsonl"), [time.process_time()]

    class Clock(Callback):
        def on_train_start(self, trainer: object, pl_module: object) -> None:
            stamps[0] = time.process_time()

        def on_train_batch_end(self, *_: object) -> None:
            stamps.append(time.process_time())

    torch.manual_seed(0)
    callbacks = [meter, build.features(config, loader), Contract(), Clock()]
    build.trainer(config, module.stage, loader, callbacks).fit(module, loader)
    marks = stamps[::steps]
    return [b - a for a, b in pairwise(marks)], losses_of(meter.path)


if __name__ == "__main__":
    main()
