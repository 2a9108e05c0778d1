"""Draw cartoon cats and dogs, and more animals to pretrain on: labelled datasets that need no network.

An animal is drawn on a transparent canvas of 200 x 200 pixels and pasted at a random place, size and angle. All kinds
have the same coats, poses and backgrounds, so a model must learn their faces: neither the mean colour nor a coarse
thumbnail distinguishes cats from dogs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from catsdogs.progress import Progress, StageProgress, silent

Colour = tuple[int, ...]
Canvas = ImageDraw.ImageDraw

KINDS, SPLITS = ("cat", "dog"), ("train", "validation")
ANIMALS = ("bear", "cat", "dog", "rabbit")  # to pretrain on
_SIDE, _MIDDLE = 200, 100  # of the canvas; images are made smaller, which smooths the edges
_LINE = 3  # width of an outline
_FURS = ((232, 150, 70), (150, 150, 158), (74, 68, 72), (240, 228, 208), (148, 98, 62), (112, 122, 142))
_PLACES = ((186, 214, 234), (206, 226, 190), (238, 222, 190), (214, 200, 228), (96, 128, 150), (80, 84, 110))
_COLLARS = ((48, 96, 190), (40, 130, 150), (120, 80, 170), (70, 70, 90))
_EYES = ((130, 214, 40), (170, 224, 50), (220, 214, 40))
_INK, _WHITE, _PINK, _RED = (44, 34, 38), (255, 255, 252), (250, 160, 184), (228, 50, 76)


def _pick(rng: np.random.Generator, colours: Sequence[Colour], spread: int = 0) -> Colour:
    """Choose a colour and shift each of its channels by up to `spread`."""
    shifts = rng.integers(-spread, spread + 1, 3)
    return tuple(np.clip(np.array(colours)[rng.integers(len(colours))] + shifts, 0, 255).tolist())


def _draw_oval(canvas: Canvas, x: float, y: float, radii: tuple[float, float], colour: Colour, line: int = 0) -> None:
    """Draw an ellipse; `x` is measured from the middle of the canvas."""
    x += _MIDDLE
    canvas.ellipse((x - radii[0], y - radii[1], x + radii[0], y + radii[1]), colour, _INK, line)


def _draw_tail(canvas: Canvas, points: Sequence[tuple[float, float]], fur: Colour) -> None:
    """Draw a thick line with an outline and round ends."""
    for colour, width in ((_INK, 13 + 2 * _LINE), (fur, 13)):
        canvas.line([(x + _MIDDLE, y) for x, y in points], colour, width, joint="curve")
        for x, y in (points[0], points[-1]):
            _draw_oval(canvas, x, y, (width / 2, width / 2), colour)


def _draw_mouth(canvas: Canvas, y: float) -> None:
    """Draw two arcs that meet under the nose."""
    for x in (_MIDDLE - 10, _MIDDLE + 10):
        canvas.arc((x - 10, y - 10, x + 10, y + 10), 0, 180, _INK, _LINE)


def _draw_body(canvas: Canvas, fur: Colour, patch: Colour, rng: np.random.Generator) -> None:
    """Draw the sitting body with its paws, a chest patch or stripes, and perhaps a collar."""
    width = rng.uniform(40, 50)
    _draw_oval(canvas, 0, 149, (width, 46), fur, _LINE)
    if rng.random() < 0.5:
        _draw_oval(canvas, 0, 147, (23, 31), patch)
    else:
        for side in (-1, 1):
            for y in (142, 156):
                _draw_oval(canvas, side * (width - 16), y, (10, 3), patch)
    for x in (-19, 19):
        _draw_oval(canvas, x, 185, (16, 10), fur, _LINE)
    if rng.random() < 0.5:
        _draw_oval(canvas, 0, 112, (30, 12), _pick(rng, _COLLARS), _LINE)


def _draw_cat(canvas: Canvas, fur: Colour, patch: Colour, rng: np.random.Generator) -> None:
    """Draw a cat: pointed ears, eyes with slit pupils, a small nose, whiskers, a curled tail."""
    angles = np.linspace(1.6, rng.uniform(-1.4, -0.6), 9)
    _draw_tail(canvas, [(42 + 34 * np.cos(angle), 148 + 36 * np.sin(angle)) for angle in angles], fur)
    _draw_body(canvas, fur, patch, rng)
    for side in (-1, 1):
        for ear, colour, line in (
            ([(10, 32), (45, 7), (50, 62)], fur, _LINE),
            ([(25, 32), (40, 20), (43, 47)], _PINK, 0),
        ):
            canvas.polygon([(_MIDDLE + side * x, y) for x, y in ear], colour, _INK, line)
    _draw_oval(canvas, 0, 67, (55, 45), fur, _LINE)
    iris, look, whisker = _pick(rng, _EYES, spread=12), rng.uniform(-5, 5), _WHITE if sum(fur) < 300 else _INK
    for side in (-1, 1):
        _draw_oval(canvas, 25 * side, 60, (15, 12), iris, _LINE)
        _draw_oval(canvas, 25 * side + look, 60, (3, 10), _INK)
        for y, end in ((81, 73), (87, 90)):
            canvas.line([_MIDDLE + 27 * side, y, _MIDDLE + 82 * side, end], whisker, _LINE)
    _draw_oval(canvas, 0, 86, (23, 12), patch)
    canvas.polygon([(92, 77), (108, 77), (100, 87)], _PINK, _INK, _LINE)
    _draw_mouth(canvas, 88)


def _draw_dog(canvas: Canvas, fur: Colour, patch: Colour, rng: np.random.Generator) -> None:
    """Draw a dog: hanging ears, round eyes, a muzzle with a big nose, a tongue, a raised tail."""
    _draw_tail(canvas, [(33, 167), (59, 157), (rng.uniform(66, 90), 119)], fur)
    _draw_body(canvas, fur, patch, rng)
    _draw_oval(canvas, 0, 60, (48, 48), fur, _LINE)
    hang, look = rng.uniform(34, 44), rng.uniform(-4, 4)
    for side in (-1, 1):
        _draw_oval(canvas, 48 * side, 62, (16, hang), patch, _LINE)
        _draw_oval(canvas, 18 * side, 47, (11, 13), _WHITE, _LINE)
        _draw_oval(canvas, 18 * side + look, 49, (7, 9), _INK)
        _draw_oval(canvas, 18 * side + look + 3, 45, (3, 3), _WHITE)
    _draw_oval(canvas, 0, 106, (11, rng.uniform(13, 19)), _RED, _LINE)
    _draw_oval(canvas, 0, 85, (30, 23), patch, _LINE)
    _draw_oval(canvas, 0, 73, (14, 10), _INK)
    _draw_mouth(canvas, 89)


def _draw_bear(canvas: Canvas, fur: Colour, patch: Colour, rng: np.random.Generator) -> None:
    """Draw a bear: round ears, small eyes, a wide head with a short muzzle, a stub of a tail."""
    _draw_tail(canvas, [(36, 168), (rng.uniform(48, 58), 162)], fur)
    _draw_body(canvas, fur, patch, rng)
    for side in (-1, 1):
        _draw_oval(canvas, 41 * side, 29, (18, 18), fur, _LINE)
        _draw_oval(canvas, 41 * side, 29, (9, 9), patch)
    _draw_oval(canvas, 0, 66, (57, 48), fur, _LINE)
    for side in (-1, 1):
        _draw_oval(canvas, 22 * side, 54, (rng.uniform(5, 8), 7), _INK)
    _draw_oval(canvas, 0, 84, (26, 22), patch, _LINE)
    _draw_oval(canvas, 0, 75, (11, 8), _INK)
    _draw_mouth(canvas, 87)


def _draw_rabbit(canvas: Canvas, fur: Colour, patch: Colour, rng: np.random.Generator) -> None:
    """Draw a rabbit: long ears, dark eyes, whiskers, two teeth, a round tail."""
    _draw_oval(canvas, 48, 166, (15, 15), patch, _LINE)
    _draw_body(canvas, fur, patch, rng)
    lean = rng.uniform(14, 30)
    for side in (-1, 1):
        _draw_oval(canvas, side * lean, 32, (13, 31), fur, _LINE)
        _draw_oval(canvas, side * lean, 34, (6, 22), _PINK)
    _draw_oval(canvas, 0, 78, (46, 38), fur, _LINE)
    whisker = _WHITE if sum(fur) < 300 else _INK
    for side in (-1, 1):
        _draw_oval(canvas, 20 * side, 70, (9, 12), _INK)
        _draw_oval(canvas, 20 * side + 3, 66, (3, 4), _WHITE)
        canvas.line([_MIDDLE + 22 * side, 92, _MIDDLE + 66 * side, 86], whisker, _LINE)
    canvas.rectangle((94, 97, 106, 110), _WHITE, _INK, 2)
    _draw_oval(canvas, 0, 86, (7, 5), _PINK, _LINE)
    _draw_mouth(canvas, 91)


def _draw_background(rng: np.random.Generator) -> Image.Image:
    """Draw a gradient with a few large shapes in its colours."""
    low, high = (_pick(rng, _PLACES, spread=24) for _ in range(2))
    gradient = Image.linear_gradient("L").rotate(float(rng.uniform(0, 360)))
    image = ImageOps.colorize(gradient.crop((48, 48, 208, 208)).resize((_SIDE, _SIDE)), low, high)
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 6)):
        x, y, radius = _SIDE * rng.uniform((0, 0, 0.05), (1, 1, 0.25))
        colour, sides = _pick(rng, (low, high), spread=20), int(rng.integers(3, 9))
        canvas.regular_polygon((x, y, radius), sides, rotation=int(rng.integers(360)), fill=colour)
    return image


def _paste(animal: Image.Image, image: Image.Image, rng: np.random.Generator) -> None:
    """Paste an animal at a random place, size, angle and direction."""
    turned = ImageOps.mirror(animal) if rng.random() < 0.5 else animal
    turned = turned.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
    height = _SIDE * rng.uniform(0.7, 1.0)
    turned = turned.resize((round(height * rng.uniform(0.85, 1.15)), round(height)))
    x, y = (_SIDE * rng.uniform(0.35, 0.65, 2) - np.array(turned.size) / 2).round().astype(int).tolist()
    image.paste(turned, (x, y), turned)


def draw(kind: str, rng: np.random.Generator, size: int = 96) -> Image.Image:
    """Draw one animal as a square RGB image; the same state of `rng` gives the same pixels."""
    draw_animal = {"cat": _draw_cat, "dog": _draw_dog, "bear": _draw_bear, "rabbit": _draw_rabbit}[kind]
    image, animal = _draw_background(rng), Image.new("RGBA", (_SIDE, _SIDE))
    fur = _pick(rng, _FURS, spread=10)
    patch = tuple(np.add(np.multiply(fur, 0.6), rng.choice([10, 100])).astype(int).tolist())
    draw_animal(ImageDraw.Draw(animal), fur, patch, rng)
    _paste(animal, image, rng)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * float(rng.uniform(1, 6))
    exposed = pixels * float(rng.uniform(0.8, 1.1)) + float(rng.uniform(-15, 15)) + noise
    return Image.fromarray(exposed.clip(0, 255).astype(np.uint8))


def draw_dataset(
    folder: Path,
    *,
    num_train: int,
    num_validation: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
    progress: Progress = silent,
) -> None:
    """Write `num_train` and `num_validation` different images into `folder/{train,validation}/{cats,dogs}/`."""
    plan = [(split, index) for split, num in enumerate((num_train, num_validation)) for index in range(num)]
    for done, (split, index) in enumerate(plan, start=1):
        kind = kinds[index % len(kinds)]
        path = folder / SPLITS[split] / f"{kind}s" / f"{kind}.{index // len(kinds) + 1:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(kind, np.random.default_rng([seed, split, index])).save(path, quality=90)
        progress(StageProgress("draw", done, len(plan)))
