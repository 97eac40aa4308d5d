"""Files and folders that are there whole or not at all. No torch in here."""

import os
import shutil
from pathlib import Path


def in_place(partial: Path, path: Path) -> None:
    """Give `partial` (a file or folder, complete) the name `path`, whatever was there before."""
    if partial.is_dir():
        remove(path)
    os.replace(partial, path)


def remove(path: Path) -> None:
    """Delete a file or a folder; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
