"""Write a trained run as a checkpoint that stands on its own.

    python -m vlm_lab.export RUN                              our own format: `python -m vlm_lab.evaluate DIR` reads it
    python -m vlm_lab.export RUN --format hf                  a folder that stock transformers loads, with equal logits
    python -m vlm_lab.export RUN --format timm                every encoder as a timm model, in DIR/<encoder>
    ... --into DIR                                            default: RUN/export/<format>

All weights are safetensors. What no class of transformers can express is refused with one line that says why
(vlm_lab/convert); nothing is approximated.
"""

import argparse
import shutil
import sys
from pathlib import Path

from vlm_lab import schema
from vlm_lab.console import console
from vlm_lab.evaluate import load_run
from vlm_lab.explain import CONFIG_ERRORS, explain
from vlm_lab.schema import Config

FORMATS = ("native", "hf", "timm")


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
    from vlm_lab import convert

    vlm, processor = load_run(run, config)
    vlm.to("cpu")
    if kind == "hf":
        return convert.save(vlm, processor.tiling, processor.chat, into)
    for name, encoder in vlm.encoder.items():
        convert.save_encoder(name, config.encoder[name], encoder, into / name)
    return []


def copy_native(run: Path, config: Config, into: Path) -> None:
    """The last stage's weights and tokenizer, and the configuration, as files instead of links into the store."""
    into.mkdir(parents=True, exist_ok=True)
    last = run / "stages" / list(config.stages)[-1]
    shutil.copyfile(last / "model.safetensors", into / "model.safetensors")
    shutil.copytree(last / "tokenizer", into / "tokenizer", dirs_exist_ok=True)
    schema.dump(config, into / "config.yaml")


if __name__ == "__main__":
    main()
