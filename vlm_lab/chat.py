"""Ask a trained run about an image.

    python -m vlm_lab.chat RUN image.png "What colour is the circle?"
    python -m vlm_lab.chat RUN "What is 2 + 3?"                          without an image
    python -m vlm_lab.chat RUN a.png b.png "Which one has a bar chart?"   several

One question, one answer, greedily; images are the arguments that are files, in their order. No memory of earlier turns.
"""

import argparse
import sys
from pathlib import Path

from vlm_lab import schema
from vlm_lab.data.sample import ImageSlot, Message, Sample
from vlm_lab.eval.runner import predict
from vlm_lab.evaluate import load_run


def answer(run: Path, question: str, images: list[Path]) -> str:
    """The model's answer to `question` about `images`. ValueError if one cannot be read."""
    config = schema.load(run / "config.yaml")
    vlm, processor = load_run(run, config)
    slots: list[str | ImageSlot] = [ImageSlot(index) for index in range(len(images))]
    asked = Message("user", (*slots, f"\n{question}" if images else question))
    sample = Sample("question", (asked, Message("assistant", ("",))), tuple(images), "command line")
    (record,) = predict(vlm, processor, [sample], 1, config.eval.max_new_tokens)
    if "error" in record:
        raise ValueError(record["error"])
    return record["prediction"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("words", nargs="+", metavar="[IMAGE ...] QUESTION")
    args = parser.parse_args()
    if not (args.run / "config.yaml").is_file():
        sys.exit(f"error: {args.run} is no run folder: it has no config.yaml")
    *images, question = args.words
    if missing := [name for name in images if not Path(name).is_file()]:
        sys.exit(f"error: {missing[0]}: no such image file; the question goes last, in quotes")
    try:
        print(answer(args.run, question, [Path(name) for name in images]))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
