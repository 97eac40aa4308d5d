"""Import direction, read from the source: what may import what (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "vlm_lab"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "lightning", "transformers", "timm", "wandb", "deepspeed"}
TORCH_FREE = [
    "schema",
    "stages",
    "compat",
    "config",
    "components",
    "explain",
    "launch",
    "store/__init__",
    "store/keys",
    "store/__main__",
    "files",
    "pulses",
    "console",
    "build",
    "ablation",
    "sweep",
    "stats",
    "verdict",
    "report",
    "reporting/study",
    "reporting/analysis",
    "reporting/samples",
]
CALLBACK_FILES = {"feature_store", "files", "pulses"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports; `if TYPE_CHECKING` blocks do not count."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    typing_only = {
        id(child)
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
        for child in ast.walk(n)
    }
    found: set[str] = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    """`data`, `model`, `eval`, or the module's own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_direction(path: Path) -> None:
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("vlm_lab.")}
    below = {
        "data": {"data", "batch"},
        "model": {"model", "batch"},
        "eval": {"eval", "data", "model", "batch"},
        "batch": set(),
        "convert": {"convert", "components", "data", "model", "batch"},
        "module": {"model", "batch", "stages", "components", "optimizers"},
        "optimizers": {"stages"},
        "strategies": {"config", "files"},
        "feature_store": {"files"},
        "callbacks": {"callbacks", "module", "model", "data", "batch", "strategies"}
        | {"feature_store", "files", "pulses"},
        "schema": {"compat", "components", "config", "stages"},
        "config": {"ablation", "components", "stages"},
        "stages": {"components"},
        "encoder_module": {"module", "batch"},
        "ablation": set(),
        "stats": set(),
        "verdict": {"stats"},
        "compat": {"components"},
        "components": set(),
        "explain": set(),
        "console": set(),
        "store": {"store", "config", "schema", "stages", "console", "files"},
        "files": set(),
        "pulses": set(),
    }
    if part(path) in below:
        assert inside <= below[part(path)]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_the_parent_imports_no_torch(name: str) -> None:
    tops = {name.split(".")[0] for name in imports(PACKAGE / f"{name}.py", top_level_only=True)}
    assert not tops & HEAVY


def test_hydra_stops_at_the_edge() -> None:
    users = {part(path) for path in FILES if {n.split(".")[0] for n in imports(path)} & {"hydra", "omegaconf"}}
    assert users <= {"schema", "explain", "plan"}  # plan is a command: it composes as train.py does


def test_wandb_lives_in_the_logger() -> None:
    users = {part(path) for path in FILES if "wandb" in {n.split(".")[0] for n in imports(path)}}
    assert users <= {"wandb_logger", "dashboard"}


def test_only_freeze_touches_requires_grad() -> None:
    assert [path.name for path in FILES if "requires_grad_(" in path.read_text()] == ["freeze.py"]


def test_nothing_is_unpickled_and_no_remote_code_is_run() -> None:
    banned = ("trust_remote_code", "import pickle", "weights_only=False")
    assert [(path.name, word) for path in FILES for word in banned if word in path.read_text()] == []
