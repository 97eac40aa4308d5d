"""Which parts go together: refuses a composition that cannot work, before any of its classes is imported.

Classes say what they are in class attributes (`multi`, `spatial`, `stitches`, ...), which are read from the source as
constructor arguments are (vlm_lab/components.py). What depends on sizes (does a stride divide a grid?) is checked where
the sizes are known, when the worker builds the parts.
"""

from collections.abc import Iterator

from vlm_lab.components import Node, attribute, short_name

NO_POSITIONS = ("convnext", "eva02", "dinov3", "samvit")  # in timm's names: no learned positions to spread over a shape


def check_parts(encoders: dict[str, Node], connector: Node, tilings: dict[str, Node]) -> None:
    """ValueError with the first reason why these parts do not fit; `tilings` maps fields to nodes."""
    for problem in (*connector_problems(encoders, connector), *tiling_problems(encoders, connector, tilings)):
        raise ValueError(problem)


def check_videos(field: str, source: Node, tiling: Node) -> None:
    """ValueError if `source`, at `field`, has videos, and `tiling` no rule for them."""
    if attribute(source, "videos") and not attribute(tiling, "videos"):
        raise ValueError(f"{field} has videos, for which {short_name(tiling)} has no rule: choose tiling=anyres_max")


def connector_problems(encoders: dict[str, Node], connector: Node) -> Iterator[str]:
    name, names = short_name(connector), ", ".join(encoders)
    if len(encoders) > 1 and not attribute(connector, "multi"):
        yield f"connector {name} takes one encoder, got {len(encoders)}: {names}; choose concat, sva or perceiver"
    needed = attribute(connector, "encoders")
    if needed is not None and len(encoders) != needed:
        yield f"connector {name} takes {needed} encoders, got {len(encoders)}: {names}"
    if "windows" in connector and len(encoders) == 1 and keys(encoders, connector) == 1:
        way_out = "set connector.windows=2 (each query then sees 2 x 2 patches)"
        yield f"connector {name} with one encoder and windows of 1: a query has nothing to choose from; {way_out}"


def keys(encoders: dict[str, Node], connector: Node) -> int:
    """How many positions of a single encoder's map one query of SVA sees, per side."""
    windows = connector["windows"]
    return windows if isinstance(windows, int) else windows.get(next(iter(encoders)), 1)


def tiling_problems(encoders: dict[str, Node], connector: Node, tilings: dict[str, Node]) -> Iterator[str]:
    name, spatial = short_name(connector), attribute(connector, "spatial")
    for field, tiling in tilings.items():
        kind = f"{field} {short_name(tiling)}"
        if attribute(tiling, "newline") and not attribute(tilings["tiling"], "newline"):
            yield f"{kind} needs newline embeddings, which the run's tiling decides: choose tiling=anyres or anyres_max"
        if attribute(tiling, "single_encoder") and len(encoders) > 1:
            yield f"{kind} takes one encoder, got {len(encoders)}: {', '.join(encoders)}; choose squash, pad or anyres"
        if attribute(tiling, "stitches") and not spatial:
            yield f"{kind} stitches maps of tokens, but connector {name} gives none; choose squash, pad, hd or split4"
        for encoder, node in encoders.items() if attribute(tiling, "any_shape") else ():
            if attribute(node, "square") or any(word in str(node.get("name")) for word in NO_POSITIONS):
                yield f"{kind} needs learned positions, encoder {encoder} has none; choose siglip, clip or dinov2"
        if attribute(tiling, "any_shape") and spatial and not attribute(connector, "per_patch"):
            reason = f"needs one token per patch or a resampler, connector {name} mixes neighbouring patches"
            yield f"{kind} {reason}; choose mlp, perceiver or qformer"
        if attribute(tiling, "rescales") and connector.get("blocks", 0) and attribute(connector, "on_cells"):
            reason = f"rescales tokens, but the blocks of connector {name} inside the LLM need each on its cell"
            yield f"{kind} {reason}; set connector.blocks=0, or choose anyres"
