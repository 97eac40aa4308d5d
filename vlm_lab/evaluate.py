"""Evaluate a trained run from its folder alone.

    python -m vlm_lab.evaluate RUN [eval.limit=100] [eval.images=[real]]

Writes RUN/eval/<task>.<images>.jsonl (one prediction per line) and RUN/evaluation.json (the scores), prints the tables.
`images` says what the model is shown: the real image, none, or another question's (shuffled).
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from safetensors.torch import load_model

from vlm_lab import build, schema
from vlm_lab.config import Config
from vlm_lab.console import console, show_scores
from vlm_lab.data.process import Processor
from vlm_lab.eval.metrics import score
from vlm_lab.eval.runner import predict, questions, show
from vlm_lab.explain import CONFIG_ERRORS, explain
from vlm_lab.model.vlm import VLM


def evaluate_run(run: Path, config: Config, logger: Any = None) -> dict[str, Any]:
    """Scores of every task and way of showing images: {task: {images: {group: {accuracy, n, majority}}}}."""
    vlm, processor = load_run(run, config)
    (run / "eval").mkdir(exist_ok=True)
    scores: dict[str, Any] = {}
    for task, source in build.tasks(config).items():
        samples, scores[task] = questions(source, config.eval.limit), {}
        for mode in config.eval.images:
            shown = show(samples, mode)
            records = predict(vlm, processor, shown, config.eval.batch, config.eval.max_new_tokens)
            write_jsonl(run / "eval" / f"{task}.{mode}.jsonl", records)
            scores[task][mode] = score(records)
            if logger is not None:
                logger.log_predictions(task, mode, shown, records)
        show_scores(task, scores[task])
    metrics = flat(scores)
    (run / "evaluation.json").write_text(json.dumps({"metrics": metrics, "scores": scores}, indent=1))
    if logger is not None:
        logger.log_summary(metrics)
    return scores


def load_run(run: Path, config: Config) -> tuple[VLM, Processor]:
    """The model after the run's last stage, on the configured device, and what prepares its prompts.

    `run` is a run folder, or what vlm_lab/export.py wrote: the last stage's files beside config.yaml.
    """
    exported, last = (run / "model.safetensors").is_file(), list(config.stages)[-1]
    if config.stages[last].part is not None:
        raise ValueError(f"{run} only pretrained parts: score its encoders with python -m vlm_lab.probe {run}")
    folder = run if exported else run / "stages" / last
    vlm = build.vlm(config)
    load_model(vlm, folder / "model.safetensors")
    processor = build.processor(config, vlm, build.tokenizer(config, folder / "tokenizer"))
    return vlm.to("cuda" if config.trainer.accelerator == "gpu" else "cpu"), processor


def flat(scores: dict[str, Any]) -> dict[str, float]:
    """{`eval/<task>/<group>`: accuracy}, with `.none` / `.shuffled` behind the task for other ways of showing images.

    `eval/<task>.words` is the mean length of the answers to its open questions, with the real image. `eval/avg` is
    the mean over tasks with the real image.
    """
    names = {"real": "", "none": ".none", "shuffled": ".shuffled"}
    out = {
        f"eval/{task}{names[mode]}/{group}": row["accuracy"]
        for task, modes in scores.items()
        for mode, table in modes.items()
        for group, row in table.items()
    }
    lengths = {task: modes["real"]["all"]["words"] for task, modes in scores.items() if modes.get("real")}
    out |= {f"eval/{task}.words": length for task, length in lengths.items() if length is not None}
    averages = [out[f"eval/{task}/all"] for task in scores if f"eval/{task}/all" in out]
    return {**out, "eval/avg": mean(averages) if averages else float("nan")}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    if not (run / "config.yaml").is_file():
        sys.exit(f"error: {run} is no run folder: it has no config.yaml")
    try:
        evaluate_run(run, schema.load(run / "config.yaml", sys.argv[2:]))
    except CONFIG_ERRORS as error:
        sys.exit(f"error: {explain(error)}")
    console.print(f"predictions: {run / 'eval'}", soft_wrap=True)


if __name__ == "__main__":
    main()
