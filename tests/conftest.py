"""Shared fixtures: tiny real parts, a toy source of coloured squares, no network, one CPU."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: more threads than cores wait for each other

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from helpers import ColourSource, tiny_vlm

from vlm_lab.data.chat import Chat
from vlm_lab.data.process import Eye, Processor
from vlm_lab.data.tiling import Squash
from vlm_lab.data.tokenizer import trained_tokenizer
from vlm_lab.model.vlm import VLM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes go first: workers get whole files, and a long one must not be the last."""
    items.sort(key=lambda item: is_quick(item.path))


@lru_cache
def is_quick(file: Path) -> bool:
    text = file.read_text()
    return "subprocess" not in text and "from processes" not in text


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def chat(cache: Path) -> Chat:
    return Chat(trained_tokenizer([ColourSource()], "chatml", 400, cache), "chatml")


@pytest.fixture(scope="session")
def processor(chat: Chat) -> Processor:
    return Processor(chat, Squash(), {"eye": Eye(16, (0.5, 0.5, 0.5))}, (2, 2), max_tokens=200)


@pytest.fixture
def make_vlm() -> Callable[..., VLM]:
    torch.manual_seed(0)
    return tiny_vlm
