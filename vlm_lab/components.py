"""A component is a YAML node: `_target_` names a class or function below `vlm_lab.`, the other keys are its arguments.

`bind` checks a node against the constructor without importing it (the source is read, so torch stays out of the parent
process); `make` constructs it. Nothing outside `vlm_lab.` can be named, so a configuration never calls arbitrary code.
"""

import ast
import difflib
import importlib
from functools import cache
from pathlib import Path
from typing import Any

Node = dict[str, Any]  # `_target_` and its constructor's arguments
ROOT = Path(__file__).parent


def make(node: dict[str, Any], **runtime: Any) -> Any:
    """Build one component: YAML keys are constructor arguments, `runtime` holds what only its neighbours know."""
    module, _, name = node["_target_"].rpartition(".")
    if not module.startswith("vlm_lab"):
        raise ValueError(f"_target_ = {node['_target_']} is outside vlm_lab")
    if clash := node.keys() & runtime.keys():
        raise ValueError(f"{node['_target_']}: set by code, remove from the YAML: {', '.join(sorted(clash))}")
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    return getattr(importlib.import_module(module), name)(**arguments, **runtime)


def bind(field: str, node: dict[str, Any], runtime: set[str]) -> None:
    """Raise ValueError if `node`'s keys are not arguments of its `_target_`; `runtime` names those set by code."""
    if (target := node.get("_target_")) is None:
        return
    accepted, required = signature(target, field)
    for key in (key for key in node if key != "_target_"):
        if key in runtime:
            raise ValueError(f"{field}.{key} is set by code, from the neighbouring parts: remove it")
        if key not in accepted:
            close = difflib.get_close_matches(key, accepted - runtime, n=1)
            hint = f"did you mean {close[0]}?" if close else f"{target} takes {', '.join(sorted(accepted - runtime))}"
            raise ValueError(f"{field}.{key}: no such setting; {hint}")
    if missing := sorted(required - runtime - node.keys()):
        raise ValueError(f"{field}.{missing[0]} must be given: {target} needs it")


@cache
def signature(target: str, field: str) -> tuple[set[str], set[str]]:
    """(all argument names, those without a default) of the class or function at the dotted path `target`."""
    definition, module = find(target)
    if definition is None:
        raise ValueError(f"{field}._target_ = {target}: no such class or function below vlm_lab")
    if isinstance(definition, ast.ClassDef):
        definition = constructor(definition, module)
    if definition is None:
        return set(), set()
    args = definition.args
    names = [a.arg for a in args.args if a.arg != "self"]
    required = names[: len(names) - len(args.defaults)]
    keyword = [a.arg for a in args.kwonlyargs]
    required += [a for a, default in zip(keyword, args.kw_defaults, strict=True) if default is None]
    return {*names, *keyword}, set(required)


def constructor(definition: ast.ClassDef, module: str) -> ast.FunctionDef | None:
    """The class's `__init__`, or the nearest base class's; None if there is none."""
    for item in definition.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return item
    bases = (find(f"{module}.{base.id}") for base in definition.bases if isinstance(base, ast.Name))
    found = (constructor(base, its_module) for base, its_module in bases if isinstance(base, ast.ClassDef))
    return next(filter(None, found), None)


def short_name(node: Node) -> str:
    return node["_target_"].rpartition(".")[2]


def attribute(node: Node, name: str) -> Any:
    """The literal value of a class attribute of `node`'s class or its nearest base; None if there is none."""
    return class_attribute(node["_target_"], name)


@cache
def class_attribute(target: str, name: str) -> Any:
    definition, module = find(target)
    if not isinstance(definition, ast.ClassDef):
        return None
    for item in definition.body:
        if isinstance(item, ast.Assign | ast.AnnAssign) and item.value is not None:
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return ast.literal_eval(item.value)
    bases = [base.id for base in definition.bases if isinstance(base, ast.Name)]
    values = (class_attribute(f"{module}.{base}", name) for base in bases)
    return next((value for value in values if value is not None), None)


@cache
def find(target: str) -> tuple[ast.ClassDef | ast.FunctionDef | None, str]:
    """The definition's syntax tree and the module it stands in; follows re-exports (`from vlm_lab.x import name`)."""
    module, _, name = target.rpartition(".")
    path = module_path(module)
    if path is None:
        return None, module
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, module
        if isinstance(node, ast.ImportFrom) and any(a.name == name for a in node.names) and node.module:
            return find(f"{node.module}.{name}")
    return None, module


def module_path(module: str) -> Path | None:
    if module.split(".", maxsplit=1)[0] != "vlm_lab":
        return None
    base = ROOT.joinpath(*module.split(".")[1:])
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return path if path.is_file() else None
