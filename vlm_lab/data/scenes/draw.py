"""Draws a `Scene` with Pillow: `render(scene) -> RGB image`.

Shapes are drawn at twice the size and averaged down (smooth edges); text is set afterwards at its final size in fonts
that ship inside packages: Pillow's own and matplotlib's DejaVu (matplotlib itself is not imported, that takes long).
Letters may differ by a few gray levels between Pillow builds; nothing else does. Only fonts are cached here.
"""

from functools import cache
from importlib.util import find_spec
from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm_lab.data.scenes.vocabulary import BACKGROUNDS, COLORS, LIGHT_BACKGROUNDS, Rgb
from vlm_lab.data.scenes.world import TOP_VALUE, Bar, Chart, Scene, Shape, Sign

Points = list[tuple[float, float]]


def _star() -> Points:
    spokes = [(1.08 if i % 2 == 0 else 0.5, i * pi / 5) for i in range(10)]
    return [(r * sin(a), 0.06 - r * cos(a)) for r, a in spokes]


def _heart() -> Points:
    angles = [i * pi / 16 for i in range(32)]
    return [(sin(a) ** 3, -(13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a)) / 16 - 0.1) for a in angles]


def _cross(arm: float = 0.36) -> Points:
    corner = [(arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    turns = [corner, [(-y, x) for x, y in corner], [(-x, -y) for x, y in corner], [(y, -x) for x, y in corner]]
    return [point for turn in turns for point in turn[1:]]


# Outlines in radii around the center; y points down. The circle is an ellipse call.
OUTLINES: dict[str, Points] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1.05, 0.85), (-1.05, 0.85)],
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}


def render(scene: Scene) -> Image.Image:
    width, height = scene.size
    canvas = Image.new("RGB", (2 * width, 2 * height), BACKGROUNDS[scene.background])
    pen, ink = ImageDraw.Draw(canvas), _ink(scene)
    for shape in scene.shapes:
        _draw_shape(pen, shape, ink)
    for sign in scene.signs:
        _draw_plate(pen, sign, ink)
    if scene.chart:
        _draw_bars(pen, scene, scene.chart, ink)
    image = canvas.reduce(2)
    _write(ImageDraw.Draw(image), scene, ink)
    return image


def _ink(scene: Scene) -> Rgb:
    """The color of outlines and of text on the bare background."""
    return (40, 40, 40) if scene.background in LIGHT_BACKGROUNDS else (236, 236, 236)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, ink: Rgb) -> None:
    """The outline is a shape behind the shape: Pillow's own polygon outlines leave gaps at sharp corners."""
    for radius, color in ((2 * shape.r, ink), (2 * shape.r - 3, COLORS[shape.color])):
        x, y = 2 * shape.x, 2 * shape.y
        if shape.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        else:
            pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[shape.shape]], fill=color)


def _draw_plate(pen: ImageDraw.ImageDraw, sign: Sign, ink: Rgb) -> None:
    half_width, half_height = sign.half_size
    box = (sign.x - half_width, sign.y - half_height, sign.x + half_width, sign.y + half_height)
    pen.rounded_rectangle([2 * side for side in box], radius=sign.px / 2, fill=COLORS[sign.color], outline=ink, width=2)


def plot_area(scene: Scene, chart: Chart) -> tuple[float, float, float, float]:
    """(left, top, right, foot) of the bars' field in pixels; a value of 9 reaches from the foot to the top."""
    left, top = (4.0, 1.4 * chart.px) if chart.printed else (1.2 * chart.px, 0.6 * chart.px)
    return left, top, scene.size[0] - 4, scene.size[1] - 1.4 * chart.px


def bar_boxes(scene: Scene, chart: Chart) -> list[tuple[Bar, tuple[float, float, float, float]]]:
    """Each bar with its box (x0, top, x1, foot) in pixels."""
    left, top, right, foot = plot_area(scene, chart)
    unit, slot = (foot - top) / TOP_VALUE, (right - left) / len(chart.bars)
    starts = [left + slot * (i + 0.18) for i in range(len(chart.bars))]
    bars = zip(chart.bars, starts, strict=True)
    return [(bar, (x, foot - unit * bar.value, x + 0.64 * slot, foot)) for bar, x in bars]


def grid_lines(scene: Scene, chart: Chart) -> list[tuple[int, float]]:
    """(value, y) of the lines behind the bars: one per value, so that a bar's height can be counted."""
    _, top, _, foot = plot_area(scene, chart)
    return [(value, foot - (foot - top) * value / TOP_VALUE) for value in range(TOP_VALUE + 1)]


def _draw_bars(pen: ImageDraw.ImageDraw, scene: Scene, chart: Chart, ink: Rgb) -> None:
    left, _, right, foot = (2 * side for side in plot_area(scene, chart))
    pale = tuple((3 * paper + line) // 4 for paper, line in zip(BACKGROUNDS[scene.background], ink, strict=True))
    for value, y in [] if chart.printed else grid_lines(scene, chart):
        pen.line((left, 2 * y, right, 2 * y), fill=ink if value % 3 == 0 else pale, width=1)
    for bar, box in bar_boxes(scene, chart):
        pen.rectangle([2 * side for side in box], fill=COLORS[bar.color], outline=ink, width=2)
    pen.line((left, foot, right, foot), fill=ink, width=2)


def _write(pen: ImageDraw.ImageDraw, scene: Scene, ink: Rgb) -> None:
    for sign in scene.signs:
        pen.text((sign.x, sign.y), sign.text, _on(COLORS[sign.color]), load_font(sign.font, sign.px), anchor="mm")
    if not scene.chart:
        return
    chart, font = scene.chart, load_font("DejaVuSans-Bold", scene.chart.px)
    for bar, (x0, top, x1, foot) in bar_boxes(scene, chart):
        pen.text(((x0 + x1) / 2, foot + 0.7 * chart.px), bar.label, ink, font, anchor="mm")
        if chart.printed:
            pen.text(((x0 + x1) / 2, top - 0.65 * chart.px), str(bar.value), ink, font, anchor="mm")
    if not chart.printed:
        small = load_font("DejaVuSans", max(9, round(0.8 * chart.px)))
        for value, y in grid_lines(scene, chart)[::3]:
            pen.text((0.55 * chart.px, y), str(value), ink, small, anchor="mm")


def _on(plate: Rgb) -> Rgb:
    """Black or white, whichever is easier to read on the plate."""
    red, green, blue = plate
    return (0, 0, 0) if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else (255, 255, 255)


@cache
def load_font(name: str, px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """One of `world.FONTS`. Basic layout is in every Pillow; Raqm is not, and would place letters differently."""
    if name == "Pillow":
        return ImageFont.load_default(px)
    return ImageFont.truetype(_font_folder() / f"{name}.ttf", px, layout_engine=ImageFont.Layout.BASIC)


@cache
def _font_folder() -> Path:
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ValueError("data=scenes draws with the DejaVu fonts inside matplotlib: pip install matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
