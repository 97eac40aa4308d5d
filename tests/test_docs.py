"""The worked examples of docs/adding_a_part.md: written as they stand into a copy of the project, and trained."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT
from test_launch import SMALL

FILE = re.compile(r"`([\w/.]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", re.DOTALL)


def test_the_worked_examples_train(tmp_path: Path) -> None:
    for name in ("vlm_lab", "conf", "sweeps", "hydra_plugins", "train.py"):
        place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        place(ROOT / name, tmp_path / name)
    files = FILE.findall((ROOT / "docs/adding_a_part.md").read_text())
    assert len(files) == 6  # encoder, connector and its class, tiling and its class, LLM
    for path, content in files:
        assert not (ROOT / path).exists(), path
        (tmp_path / path).write_text(content)
    choice = ["encoder=deit", "connector=gated", "tiling=halves", "llm=olmo2"]
    small = [*(item.replace("siglip", "deit") for item in SMALL), "llm.shape.num_key_value_heads=4"]
    command = [sys.executable, "train.py", *choice, *small, "output=out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "out/runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert run.name.startswith("deit-gated-olmo2") and result["status"] == "ok"
    assert {row["module"]: row["lr"] for row in result["stages"]["align"]["trainable"]}["connector"] is not None
