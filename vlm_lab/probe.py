"""Score the encoders that a run pretrained, each by itself: zero-shot, retrieval, linear probe.

    python -m vlm_lab.probe RUN                                  on the made-up world
    python -m vlm_lab.probe RUN --train FOLDER --test FOLDER     on pictures in class folders (no retrieval)

Zero-shot and retrieval need an encoder that was trained with texts. `chance` stands beside every score. Writes
RUN/encoders.json. The linear probe reads the mean of the patch tokens, the rest the space shared with the texts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import load_model
from torch import Tensor

from vlm_lab import schema
from vlm_lab.config import Config
from vlm_lab.console import console
from vlm_lab.data.images import load_image
from vlm_lab.data.labelled import LabelledFolder
from vlm_lab.data.sample import ImageRef
from vlm_lab.data.scenes.pairs import TEMPLATES, SceneLooks, ScenePairs
from vlm_lab.data.tiling.whole import squash
from vlm_lab.data.wordpiece import Wordpiece, load_wordpiece
from vlm_lab.eval.encoders import KS, class_embeddings, linear_probe, retrieval, zero_shot
from vlm_lab.explain import CONFIG_ERRORS, explain
from vlm_lab.model.pretrain import DualEncoder
from vlm_lab.parts import stage_model
from vlm_lab.stages import Stage

BATCH = 64
PHOTO = ("{}", "a photo of a {}", "an image of a {}", "a picture of the {}")  # templates for other pictures
Labelled = Any  # len, [i] -> (picture, class number), `classes`


class Eye:
    """A pretrained encoder with what it needs to look and to read."""

    def __init__(self, model: Any, words: Wordpiece) -> None:
        self.model, self.words = model.eval(), words
        self.side = model.encoder[model.name].image_size

    @property
    def reads(self) -> bool:
        return isinstance(self.model, DualEncoder) and self.model.towers.text is not None

    @torch.inference_mode()
    def look(self, images: Sequence[ImageRef]) -> tuple[Tensor, Tensor | None]:
        """(mean patch tokens [N, C], image features [N, E] or None)"""
        pooled, shared = [], []
        for start in range(0, len(images), BATCH):
            views = [squash(load_image(i, "probe", str(start)), self.side) for i in images[start : start + BATCH]]
            pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2)
            pooled.append(self.model.encoder[self.model.name](pixels).tokens.mean(1))
            if self.reads:
                shared.append(self.model.image_features(pixels))
        return torch.cat(pooled), torch.cat(shared) if shared else None

    @torch.inference_mode()
    def read(self, texts: list[str]) -> Tensor:
        length = self.model.towers.length
        ids = np.stack([self.words.text(self.words.words(text), length) for text in texts])
        return self.model.text_features(torch.from_numpy(ids))


def scores(eye: Eye, train: Labelled, test: Labelled, templates: Sequence[str]) -> dict[str, tuple[float, float]]:
    """{score: (value, chance)} of classification."""
    chance = 1 / len(test.classes)
    (seen, truth), (new, answer) = (labelled(eye, each) for each in (train, test))
    out = {"linear_probe": (linear_probe((seen[0], truth), (new[0], answer)), chance)}
    if new[1] is not None:
        out["zero_shot"] = (zero_shot(new[1], answer, class_embeddings(eye.read, test.classes, templates)), chance)
    return out


def labelled(eye: Eye, pictures: Labelled) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    items = [pictures[index] for index in range(len(pictures))]
    return eye.look([image for image, _ in items]), torch.tensor([label for _, label in items])


def pair_scores(eye: Eye, pairs: ScenePairs) -> dict[str, tuple[float, float]]:
    """Retrieval of the synthetic captions, and by them."""
    samples = [pairs[index] for index in range(len(pairs))]
    images = eye.look([sample.images[0] for sample in samples])[1]  # type: ignore[misc]
    assert images is not None
    texts = torch.cat([eye.read([sample.meta["synthetic"]]) for sample in samples])
    return {
        name: (score, int(name.rpartition("r")[2]) / len(pairs)) for name, score in retrieval(images, texts).items()
    }


def pretrained(config: Config) -> dict[str, Stage]:
    """{stage: settings} of the last stage that pretrained each encoder by itself."""
    last = {s.part: name for name, s in config.stages.items() if s.part not in (None, "llm")}
    return {name: config.stages[name] for name in last.values()}


def eye_of(run: Path, config: Config, name: str) -> Eye:
    folder = run / "stages" / name
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{run} holds no stages/{name}, which pretrained the encoder: give the run's own folder")
    model = stage_model(config, config.stages[name], weights=False)
    load_model(model, folder / "model.safetensors")
    return Eye(model, load_wordpiece(str(folder / "tokenizer")))


def probe(run: Path, config: Config, train: str | None = None, test: str | None = None) -> dict[str, Any]:
    """{encoder: {score: {value, chance}}}, written to RUN/encoders.json and shown."""
    found = {}
    for name, stage in pretrained(config).items():
        eye = eye_of(run, config, name)
        if train is not None and test is not None:
            measured = scores(eye, LabelledFolder(train), LabelledFolder(test), PHOTO)
        else:
            measured = scores(eye, SceneLooks("train", 2000), SceneLooks("val", 400), TEMPLATES)
            synthetic = config.data.sources.get("pairs", {}).get("synthetic", "long")
            measured |= pair_scores(eye, ScenePairs("val", 400, synthetic=synthetic)) if eye.reads else {}
        found[str(stage.encoder)] = {key: {"value": v, "chance": c} for key, (v, c) in measured.items()}
    (run / "encoders.json").write_text(json.dumps(found, indent=1))
    if found:
        show(found)
    return found


def show(found: dict[str, Any]) -> None:
    names = ["zero_shot", "linear_probe", *(f"{way}_r{k}" for way in ("text", "image") for k in KS)]
    table = Table("score", *found, title="pretrained encoders: scores in %, chance in brackets", title_justify="left")
    for name in names:
        cells = [row.get(name) for row in found.values()]
        texts = [f"{100 * cell['value']:.1f} ({100 * cell['chance']:.1f})" if cell else "-" for cell in cells]
        table.add_row(name, *texts)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--train", help="pictures for the linear probe, in class folders")
    parser.add_argument("--test", help="pictures to classify, in the same class folders")
    args = parser.parse_args()
    try:
        if (args.train is None) != (args.test is None):
            raise ValueError("--train and --test go together")
        config = schema.load(args.run / "config.yaml")
        if not pretrained(config):
            raise ValueError(f"{args.run} pretrained no encoder by itself")
        probe(args.run, config, args.train, args.test)
    except CONFIG_ERRORS as error:
        sys.exit(f"error: {explain(error)}")


if __name__ == "__main__":
    main()
