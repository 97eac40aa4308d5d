"""Write a trained run as a checkpoint that stands on its own.

    python -m vlm_lab.export RUN                              our own format: `python -m vlm_lab.evaluate DIR` reads it
    python -m vlm_lab.export RUN --format hf                  a folder that stock transformers loads, with equal logits
    python -m vlm_lab.export RUN --format timm                every encoder as a timm model, in DIR/<encoder>
    python -m vlm_lab.export RUN --format open_clip           every encoder that RUN pretrained with texts, the text
                                                              tower and tokenizer: open_clip's "local-dir:DIR/<encoder>"
    ... --into DIR                                            default: RUN/export/<format>

All weights are safetensors. What the other library cannot express is refused with one line that says why
(vlm_lab/convert); nothing is approximated. Towers for open_clip are those at the end of the encoder's own pretraining:
later stages may have trained the encoder on, without them.
"""

import argparse
import shutil
import sys
from pathlib import Path

from vlm_lab import schema
from vlm_lab.config import Config
from vlm_lab.console import console
from vlm_lab.evaluate import load_run
from vlm_lab.explain import CONFIG_ERRORS, explain

FORMATS = ("native", "hf", "timm", "open_clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="native")
    parser.add_argument("--into", type=Path, help="the folder to write")
    args = parser.parse_args()
    if not (args.run / "config.yaml").is_file():
        sys.exit(f"error: {args.run} is no run folder: it has no config.yaml")
    into = args.into or args.run / "export" / args.format
    try:
        notes = export(args.run, args.format, into)
    except CONFIG_ERRORS as error:
        sys.exit(f"error: {explain(error)}")
    for note in notes:
        console.print(note)
    console.print(f"{args.format}: {into}")


def export(run: Path, kind: str, into: Path) -> list[str]:
    """Write `run` in one of FORMATS to the folder `into`; returns what could not be written, in words."""
    config = schema.load(run / "config.yaml")
    if kind == "native":
        copy_native(run, config, into)
        return []
    if kind == "open_clip":
        return export_towers(run, config, into)
    from vlm_lab import convert

    vlm, processor = load_run(run, config)
    vlm.to("cpu")
    if kind == "hf":
        return convert.save(vlm, processor.tiling, processor.chat, into)
    for name, encoder in vlm.encoder.items():
        convert.save_encoder(name, config.encoder[name], encoder, into / name)
    return []


def export_towers(run: Path, config: Config, into: Path) -> list[str]:
    """Both towers of every encoder that `run` pretrained, in open_clip's names. ValueError if it can express none."""
    from vlm_lab.model.pretrain.naming import write_open_clip
    from vlm_lab.probe import eye_of, pretrained

    stages, refused = pretrained(config), []
    if not stages:
        raise ValueError(f"{run} pretrained no encoder by itself, so it has no text tower for open_clip")
    for name, stage in stages.items():
        eye, folder = eye_of(run, config, name), into / str(stage.encoder)
        try:
            write_open_clip(eye.model, folder)
        except ValueError as error:
            refused.append(str(error))
        else:
            eye.words.save_for_transformers(folder)
    if len(refused) == len(stages):
        raise ValueError("; ".join(refused))
    return refused


def copy_native(run: Path, config: Config, into: Path) -> None:
    """The last stage's weights and tokenizer, and the configuration, as files instead of links into the store."""
    into.mkdir(parents=True, exist_ok=True)
    last = run / "stages" / list(config.stages)[-1]
    shutil.copyfile(last / "model.safetensors", into / "model.safetensors")
    shutil.copytree(last / "tokenizer", into / "tokenizer", dirs_exist_ok=True)
    schema.dump(config, into / "config.yaml")


if __name__ == "__main__":
    main()
