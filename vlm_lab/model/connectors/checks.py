"""One-line answers to wrong connector settings: each names `connector.<field>` and both numbers."""

from vlm_lab.model.connectors import Grid


def at_least(minimum: int, **fields: int) -> None:
    """Every field is `minimum` or more."""
    for name, value in fields.items():
        if value < minimum:
            raise ValueError(f"connector.{name} = {value}: at least {minimum} is needed")


def divides(name: str, value: int, whole: int, what: str) -> None:
    """`value` parts of equal size fit `whole`."""
    at_least(1, **{name: value})
    if whole % value:
        raise ValueError(f"connector.{name} = {value} does not divide {what} = {whole}")


def pooled_grid(side: int, grid: Grid) -> Grid:
    """The (side, side) grid that pooling makes of `grid`; pooling cannot make tokens."""
    if side > min(grid):
        raise ValueError(f"connector.side = {side} exceeds the encoder's {grid[0]} x {grid[1]} grid of patches")
    return side, side
