"""Pictures with a class: any folder of class folders, for zero-shot classification and linear probes.

LabelledFolder("images/")      images/<class>/<any>.png, to any depth below the class; also .jpg, .jpeg, .webp
"""

from pathlib import Path

from vlm_lab.data.sample import ImageRef

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}


class LabelledFolder:
    """`classes` are the folders' names in order; an item is (path, class number). ValueError if there are none."""

    def __init__(self, path: str) -> None:
        root = Path(path)
        self.classes = tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir()))
        self.files = [
            (file, number)
            for number, name in enumerate(self.classes)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in EXTENSIONS
        ]
        if not self.files:
            raise ValueError(f"{path}: no pictures in folders named after their classes")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[ImageRef, int]:
        return self.files[index]
