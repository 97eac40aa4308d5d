"""Every two options of different kinds work together; the full grid is `make test-grid` (tests/grid.py)."""

from pathlib import Path

import grid
import pytest

CELLS = grid.cells()
SAMPLE = grid.sample(CELLS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> grid.Bench:
    return grid.Bench(tmp_path_factory.mktemp("grid"))


@pytest.mark.parametrize("cell", SAMPLE, ids="-".join)
def test_cell(bench: grid.Bench, cell: grid.Cell) -> None:
    bench.run(cell)


def test_coverage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every option is in some cell that works, and every refusal says why and what to choose."""
    working = [cell for cell in CELLS if grid.refused(cell) is None]
    assert all(len({cell[kind] for cell in working}) == len({cell[kind] for cell in CELLS}) for kind in range(4))
    assert all("choose" in (grid.refused(cell) or "choose") or "set" in (grid.refused(cell) or "") for cell in CELLS)
    with capsys.disabled():
        print(f"\ngrid: {len(CELLS)} cells, {len(CELLS) - len(working)} refused with a reason, {len(SAMPLE)} run here")


def test_the_page_shows_the_grid_as_it_is() -> None:
    assert grid.coverage() in (grid.ROOT / "docs/grid.md").read_text()
