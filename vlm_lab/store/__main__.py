"""The store's command line: python -m vlm_lab.store ls | why RUN STAGE | gc --older-than 30d

`--store PATH` names a store (default outputs/store; `why` takes the run's own). `gc` keeps what a run beside the store
links to. "Age" is the time since an entry was last trained or reused.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.table import Table

from vlm_lab.console import console
from vlm_lab.files import remove
from vlm_lab.store import INPUTS, RECORD, Store

UNITS = {"m": 60, "h": 3600, "d": 86400}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlm_lab.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, default=Path("outputs/store"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="what is there")
    why = commands.add_parser("why", help="what a stage's key is made of, beside the closest other entry")
    why.add_argument("run", type=Path)
    why.add_argument("stage")
    gc = commands.add_parser("gc", help="remove old entries that no run links to, and unfinished ones")
    gc.add_argument("--older-than", required=True, type=seconds, help="for example 30d, 12h or 90m")
    args = parser.parse_args()
    try:
        if args.command == "ls":
            list_entries(Store(args.store))
        elif args.command == "why":
            explain_key(args.run, args.stage)
        else:
            collect(Store(args.store), args.older_than)
    except ValueError as error:
        sys.exit(f"error: {error}")


def seconds(text: str) -> float:
    if not (match := re.fullmatch(r"(\d+)([mhd])", text)):
        raise argparse.ArgumentTypeError(f"{text}: give a number and m, h or d, for example 30d")
    return int(match[1]) * UNITS[match[2]]


def entries(store: Store) -> list[str]:
    """Keys of the finished stages, oldest first."""
    return [path.parent.name for path in sorted(store.root.glob(f"*/{RECORD}"), key=age, reverse=True)]


def age(path: Path) -> float:
    """Seconds since a record was last used, or anything in an unfinished stage's folder was written."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return time.time() - max(file.stat().st_mtime for file in files)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def list_entries(store: Store) -> None:
    table = Table(title=f"{store.root}: finished stages", title_justify="left")
    for heading in ("key", "stage", "steps", "samples", "MiB", "age in h", "links"):
        table.add_column(heading, justify="left" if heading in ("key", "stage") else "right", no_wrap=True)
    links = linked(store)
    for key in entries(store):
        record, folder = store.record(key), store.path(key)
        counts = [f"{record.get(name, 0):,}" for name in ("steps", "samples")]
        hours = f"{age(folder / RECORD) / 3600:.1f}"
        table.add_row(
            key, record.get("stage", "?"), *counts, f"{size(folder) / 2**20:.1f}", hours, str(links.get(key, 0))
        )
    console.print(table)
    for folder in sorted(store.root.glob("*.partial")):
        console.print(f"unfinished: {folder} ({size(folder) / 2**20:.1f} MiB, {age(folder) / 3600:.1f} h)")


def linked(store: Store) -> dict[str, int]:
    """{key: number of runs that link to it}, for runs beside the store."""
    counts: dict[str, int] = {}
    for link in store.root.parent.glob("runs/*/stages/*"):
        key = link.resolve().name
        counts[key] = counts.get(key, 0) + 1
    return counts


def explain_key(run: Path, stage: str) -> None:
    """Print whether `stage` of `run` is in the store, and in what it differs from the closest other entry."""
    if not (run / INPUTS).is_file():
        raise ValueError(f"{run} is no run folder: it has no {INPUTS}")
    keys: dict[str, str] = json.loads((run / "stages.json").read_text())
    if stage not in keys:
        raise ValueError(f"{run} has no stage {stage}; there are {', '.join(keys)}")
    mine = flat(json.loads((run / INPUTS).read_text())[stage])
    store = Store(run.parent.parent / "store")
    state = "in the store" if store.has(keys[stage]) else "not in the store"
    console.print(f"{stage} of {run} has the key {keys[stage]}, which is {state}")
    others = {key: flat(json.loads((store.path(key) / INPUTS).read_text())) for key in entries(store)}
    changed = {key: differences(mine, other) for key, other in others.items() if key != keys[stage]}
    if not changed:
        console.print("there is no other entry to compare it with")
        return
    closest = min(changed, key=lambda key: len(changed[key]))
    name = store.record(closest).get("stage", "?")
    console.print(f"the closest other entry is {closest} (stage {name}), which differs in:")
    for field in changed[closest]:
        console.print(f"  {field}: here {mine.get(field, 'absent')}, there {others[closest].get(field, 'absent')}")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of a nested dict."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out


def differences(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    absent = object()
    return [field for field in {**mine, **other} if mine.get(field, absent) != other.get(field, absent)]


def collect(store: Store, older_than: float) -> None:
    """Remove what is older, unless a run links to it or a process has its lock."""
    kept, freed, links = 0, 0, linked(store)
    finished = [store.path(key) for key in entries(store)]
    for folder in [*finished, *store.root.glob("*.partial")]:
        used = age(folder / RECORD if folder in finished else folder)
        if used <= older_than:
            continue
        if folder.name in links or not removed_under_lock(store, folder):
            kept += 1
            continue
        freed += 1
    console.print(f"removed {freed} entries; kept {kept} that are older, but linked to by a run or in use")


def removed_under_lock(store: Store, folder: Path) -> bool:
    """Remove `folder` while nobody else has its key; False if somebody has."""
    try:
        with FileLock(store.root / f"{folder.stem}.lock", timeout=0):
            remove(folder)
    except Timeout:
        return False
    return True


if __name__ == "__main__":
    main()
