"""The training loader: draws of a mixture, processed by workers, packed into rows.

One item of the underlying DataLoader is a whole optimizer step of this process, so that the number of answer tokens is
known before its first backward pass. The loader then yields the step's rows one by one. Its state is one integer.
"""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm_lab.batch import IGNORE, Batch
from vlm_lab.data.mixture import Mixture, generator
from vlm_lab.data.process import Example, Processor, TextProcessor
from vlm_lab.data.sample import BadRecord, Source
from vlm_lab.data.turns import shuffled_turns
from vlm_lab.data.upscale import upscaled


class Records(Dataset):
    """Draw number -> processed example, or the BadRecord that says why there is none.

    With `shuffle_turns` the questions on an image come in a new order at every draw, so that no kind of question is
    tied to a place in the conversation (Idefics2 does the same); `turns`: so many of them at most. `upscale`: the
    share of images that are enlarged.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture,
        processor: Processor | TextProcessor,
        shuffle_turns: bool = False,
        turns: int | None = None,
        upscale: float | None = None,
    ) -> None:
        self.sources, self.mixture, self.processor = sources, mixture, processor
        self.shuffle_turns, self.turns, self.upscale = shuffle_turns, turns, upscale

    def __getitem__(self, draw: int) -> Example | BadRecord:
        source, index = self.mixture[draw]
        try:
            sample = self.sources[source][index]
            if self.shuffle_turns:
                sample = shuffled_turns(sample, generator(self.mixture.seed, draw), self.turns)
            if self.upscale is not None and sample.images:
                limit = 2 * max(eye.side for eye in self.processor.eyes.values())
                sample = upscaled(sample, self.upscale, limit, generator(self.mixture.seed, draw, 0, 1))
            return self.processor.example(sample)
        except BadRecord as bad:
            return bad


class Loader:
    """Yields `steps * parts` rows: each step's share of this process, in `parts` rows of `micro_batch` samples.

    A step draws `batch` samples over all `world` processes. `state_dict` counts finished steps, is the same on every
    rank, and may be loaded under another `world` or `workers`.
    """

    def __init__(
        self,
        records: Records,
        steps: int,
        batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self.records, self.steps, self.batch = records, steps, batch
        self.rank, self.world, self.workers = rank, world, workers
        self.parts = -(-batch // (world * micro_batch))
        self.start = self.done = 0  # steps to skip on the next pass; steps finished in this one

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[Batch]:
        first, self.start = self.start, 0  # a resumed start is used once
        self.done = first
        draws: Any = [self.draws(step) for step in range(first, self.steps)]
        loader = DataLoader(
            self.records,
            batch_sampler=draws,
            collate_fn=self.collate,
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            worker_init_fn=ignore_sigterm,
        )
        for step, rows in enumerate(loader, start=first + 1):
            for row in rows:
                if row.part == self.parts - 1:
                    self.done = step
                yield row

    def draws(self, step: int) -> range:
        """Draw numbers of this process in `step`: every `world`-th of the step's `batch`."""
        return range(step * self.batch + self.rank, (step + 1) * self.batch, self.world)

    def collate(self, examples: Sequence[Example | BadRecord]) -> list[Batch]:
        """One step's examples to `parts` rows."""
        chunks = np.array_split(np.arange(len(examples)), self.parts)
        rows = [self.row([examples[i] for i in chunk]) for chunk in chunks]
        total = sum(int(row.targets.ne(IGNORE).sum()) for row in rows)
        for part, row in enumerate(rows):
            row.num_answers, row.part, row.parts = total, part, self.parts
        return rows

    def row(self, examples: Sequence[Example | BadRecord]) -> Batch:
        good = [e for e in examples if isinstance(e, Example)]
        row = pack(good or [self.empty()], self.records.processor)
        row.bad = [e for e in examples if isinstance(e, BadRecord)]
        return row

    def empty(self) -> Example:
        """Stands in when every record of a row is bad: two tokens, nothing to learn."""
        return Example("", np.zeros(2, dtype=np.int64), np.full(2, IGNORE), {})

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.done = state["steps"]


def ignore_sigterm(worker: int) -> None:
    """A signal to the whole process group must not take the data away: the step is finished, then saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def pack(examples: Sequence[Example], processor: Processor | TextProcessor) -> Batch:
    """Whole examples one after the other in one row; position ids start anew with each."""
    lengths = [len(e.ids) for e in examples]
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([e.ids for e in examples]))[None],
        targets=torch.from_numpy(np.concatenate([e.targets for e in examples]))[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=[0, *np.cumsum(lengths).tolist()],
        pixels=stack_views(examples, processor),
        layouts=[layout for e in examples for layout in e.layouts],
        sizes=view_sizes(examples, processor),
        ids=[e.id for e in examples if e.id],
    )


def stack_views(examples: Sequence[Example], processor: Processor | TextProcessor) -> dict[str, Tensor]:
    """{encoder: uint8 [V, 3, H, W]} of all views in order; one blank view if there is none."""
    views = {name: [v for e in examples for v in e.views.get(name, ())] for name in processor.eyes}
    if not any(views.values()):
        views = processor.blank()
    return {name: torch.from_numpy(padded(arrays)).permute(0, 3, 1, 2).contiguous() for name, arrays in views.items()}


def padded(views: Sequence[np.ndarray]) -> np.ndarray:
    """Views [h, w, 3] in one array [V, H, W, 3], the smaller ones filled up at the bottom and the right."""
    if len({view.shape for view in views}) == 1:
        return np.stack(views)
    height, width = (max(view.shape[axis] for view in views) for axis in (0, 1))
    out = np.zeros((len(views), height, width, 3), dtype=np.uint8)
    for place, view in zip(out, views, strict=True):
        place[: view.shape[0], : view.shape[1]] = view
    return out


def view_sizes(examples: Sequence[Example], processor: Processor | TextProcessor) -> dict[str, Tensor]:
    """{encoder: (height, width) of each view [V, 2]} of the encoders that get another view than their own square."""
    sizes = {name: [v.shape[:2] for e in examples for v in e.views.get(name, ())] for name in processor.eyes}
    uneven = {name for name, shapes in sizes.items() if set(shapes) - {(processor.eyes[name].side,) * 2}}
    return {name: torch.tensor(sizes[name]) for name in sorted(uneven)}
