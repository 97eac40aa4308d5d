"""The grid of parts: every encoder x connector x {qwen2, llama} x tiling at tiny size, and what each cell must do.

    python tests/grid.py            all cells, with a table of what was refused and why (`make test-grid`)
    python tests/grid.py --table    which go together, as docs/grid.md shows it; runs nothing
    pytest tests/test_grid.py       a sample in which every two options of different kinds meet at least once

A cell is composed from conf/ as a user would, built, trained for one step, packed and unpacked, generated from, saved
and loaded again. Cells that check() refuses are counted with their reason.
"""

import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT, ColourSource, composed, max_difference
from omegaconf import OmegaConf
from safetensors.torch import load_model, save_model
from torch import nn

from vlm_lab import build
from vlm_lab.batch import IGNORE
from vlm_lab.compat import check_parts
from vlm_lab.config import Config
from vlm_lab.data.loader import pack
from vlm_lab.data.process import Processor
from vlm_lab.data.tokenizer import trained_tokenizer
from vlm_lab.eval.runner import pad_left
from vlm_lab.model.vlm import VLM

Cell = tuple[str, str, str, str]  # encoder, connector, llm, tiling
LLMS = ["qwen2", "llama"]
# One score per query shifts by q * bias of the keys, whatever the key: softmax takes it away again, but for rounding.
NO_GRADIENT = ("k_proj.bias", "key.0.bias", "key.1.bias", "attn.k.bias")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def cells() -> list[Cell]:
    return list(itertools.product(options("encoder"), options("connector"), LLMS, options("tiling")))


def sample(all_cells: list[Cell], seed: int = 0) -> list[Cell]:
    """Few cells in which every two options of different kinds that fit meet: first those with most of what is new."""
    shuffled = random.Random(seed).sample(all_cells, len(all_cells))
    order = [(cell, set(pairs(cell))) for cell in shuffled if refused(cell) is None]
    todo = set().union(*(met for _, met in order))
    chosen = []
    for least in range(6, 0, -1):  # a cell, four options, has six pairs
        for cell, met in order:
            if len(met & todo) >= least:
                chosen.append(cell)
                todo -= met
    return chosen


def pairs(cell: Cell) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    return list(itertools.combinations(enumerate(cell), 2))


@cache
def node(group: str, option: str) -> Any:
    """One option of conf/, resolved."""
    value = f"[{option}]" if group == "encoder" else option
    needs = ["connector=concat"] if group == "encoder" else []
    tree: Any = OmegaConf.to_container(composed(f"{group}={value}", *needs), resolve=True)
    return tree[group]


@cache
def base() -> Any:
    return OmegaConf.to_container(composed(), resolve=True)


def tree(cell: Cell) -> dict[str, Any]:
    encoder, connector, llm, tiling = cell
    eyes = [encoder]
    if connector == "mining":  # the second encoder is the sharper one
        eyes = ["clip", "convnext"] if encoder == "convnext" else [encoder, "convnext"]
    encoders = {name: part for eye in eyes for name, part in node("encoder", eye).items()}
    parts = {"connector": node("connector", connector), "llm": node("llm", llm), "tiling": node("tiling", tiling)}
    return {**base(), "encoder": encoders, **parts}


@cache
def refused(cell: Cell) -> str | None:
    """Why check() refuses this cell (by the part of it that looks at how parts fit); None if it does not."""
    parts = tree(cell)
    try:
        check_parts(parts["encoder"], parts["connector"], {"tiling": parts["tiling"]})
    except ValueError as error:
        return str(error)
    return None


def coverage() -> str:
    """A Markdown table: of so many encoders, how many work with a connector (rows) and a tiling (columns)."""
    working = Counter((connector, tiling) for _, connector, llm, tiling in filter(allowed, cells()) if llm == LLMS[0])
    lines = [f"| connector | {' | '.join(options('tiling'))} |", "|---" * (1 + len(options("tiling"))) + "|"]
    for connector in options("connector"):
        counts = [str(working[connector, tiling]) for tiling in options("tiling")]
        lines.append(f"| {connector} | {' | '.join(counts)} |")
    return "\n".join(lines)


def allowed(cell: Cell) -> bool:
    return refused(cell) is None


class Bench:
    """Runs cells; holds what they share: tokenizers and a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def built(self, cell: Cell, seed: int = 0) -> tuple[VLM, Processor]:
        config = Config.model_validate({**tree(cell), "name": "cell", "seed": seed})
        vlm = build.vlm(config)
        tokens = trained_tokenizer([ColourSource()], config.llm["chat"], 400, self.folder)
        for name, parameter in vlm.named_parameters():
            if name.startswith("connector") and "alpha" in name:
                nn.init.constant_(parameter, 0.7)  # gates start shut: nothing behind them would get a gradient
        return vlm.train(), build.processor(config, vlm, tokens)

    def run(self, cell: Cell) -> None:
        """AssertionError names what a cell fails to do."""
        torch.manual_seed(0)
        vlm, process = self.built(cell)
        vlm.eval()  # no stochastic depth: rows are compared
        examples = [process.example(ColourSource()[index]) for index in range(3)]  # one image, two, none
        together, loss = gradients(vlm, [pack(examples, process)])
        apart, losses = gradients(vlm, [pack([example], process) for example in examples])
        answers = sum(int((example.targets != IGNORE).sum()) for example in examples)
        silent = [n for n in together if not together[n].any() and not n.endswith(NO_GRADIENT)]
        assert together.keys() == dict(vlm.named_parameters()).keys(), "parameters outside the graph"
        assert not silent, f"no gradient: {silent[:3]}"
        assert abs(loss - losses) / answers <= 1e-4, f"packed loss {loss}, unpacked {losses}"
        worst = max(together, key=lambda n: max_difference(together[n], apart[n]) / scale(apart[n]))
        off = max_difference(together[worst], apart[worst]) / scale(apart[worst])
        assert off <= 1e-3, f"packed gradient off by {off} of its largest entry: {worst}"
        self.generates(vlm, process)
        self.reloads(cell, vlm, process)

    def generates(self, vlm: VLM, process: Processor) -> None:
        prompts = [process.prompt(ColourSource()[index]) for index in (0, 2)]
        both = vlm.generate(pad_left(prompts, process), 3, [10_000])
        alone = [vlm.generate(pad_left([prompt], process), 3, [10_000])[0] for prompt in prompts]
        assert torch.equal(both, torch.stack(alone)), "batched generation differs from one by one"

    def reloads(self, cell: Cell, vlm: VLM, process: Processor) -> None:
        save_model(vlm, str(self.folder / "cell.safetensors"))
        other, _ = self.built(cell, seed=1)
        load_model(other, self.folder / "cell.safetensors")
        row = pack([process.example(ColourSource()[0])], process)
        with torch.no_grad():
            assert torch.equal(vlm(row), other.eval()(row)), "the reloaded model differs"


def gradients(vlm: VLM, rows: list[Any]) -> tuple[dict[str, torch.Tensor], float]:
    vlm.zero_grad()
    losses = [vlm(row) for row in rows]
    sum(losses).backward()
    return {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}, sum(
        loss.item() for loss in losses
    )


def scale(gradient: torch.Tensor) -> float:
    return max(float(gradient.abs().max()), 1e-3)


def main() -> None:
    """Every cell; exit code 1 if one fails."""
    if sys.argv[1:] == ["--table"]:
        sys.exit(print(coverage()))
    reasons: Counter[str] = Counter()
    failures, passed, start = [], 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for cell in cells():
            if (reason := refused(cell)) is not None:
                reasons[reason.partition(";")[0]] += 1
                continue
            try:
                bench.run(cell)
                passed += 1
            except Exception as error:
                failures.append(cell)
                print("FAILED", " ".join(cell), "-", type(error).__name__, error, flush=True)
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"{count:5} refused: {reason}")
    minutes = (time.perf_counter() - start) / 60
    print(
        f"{passed + len(failures) + sum(reasons.values())} cells in {minutes:.0f} minutes: {passed} work,"
        f" {sum(reasons.values())} refused, {len(failures)} failed"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
