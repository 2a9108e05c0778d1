"""Draw cartoon cats and dogs: a labelled dataset that needs no network.

Shapes are lists of (x, y) in the animal's units: x right, y down, the animal within [-1, 1]. Both kinds share
coats, poses and backgrounds: neither the mean colour nor a coarse thumbnail tells them apart, the faces do.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

Colour = tuple[int, ...]
Point = tuple[float, float]
Points = Sequence[Point]
Array = NDArray[np.float64]
Progress = Callable[[int, int], None]

KINDS, SPLITS = ("cat", "dog"), ("train", "validation")
_LINE = 0.028  # width of an outline in the animal's units
_OVERSAMPLING = 2  # drawn so much larger, then averaged down: smooth edges
_FURS = ((232, 150, 70), (150, 150, 158), (74, 68, 72), (240, 228, 208), (148, 98, 62), (112, 122, 142))
_PLACES = ((186, 214, 234), (206, 226, 190), (238, 222, 190), (214, 200, 228), (96, 128, 150), (80, 84, 110))
_COLLARS = ((48, 96, 190), (40, 130, 150), (120, 80, 170), (70, 70, 90))
_EYES = ((130, 214, 40), (170, 224, 50), (220, 214, 40))
_INK, _WHITE, _PINK, _RED = (44, 34, 38), (255, 255, 252), (250, 160, 184), (228, 50, 76)
_MARKS = (  # ovals on the body: x, y and the half axes
    ((0, 0.38, 0.18, 0.34), (-0.17, 0.9, 0.13, 0.09), (0.17, 0.9, 0.13, 0.09)),
    ((-0.34, 0.62, 0.09, 0.08), (0.36, 0.5, 0.09, 0.08), (0.33, 0.74, 0.1, 0.08), (0, 0.36, 0.08, 0.07)),
    tuple((side * 0.36, y, 0.1, 0.025) for side in (-1, 1) for y in (0.5, 0.62, 0.74)),
)
_CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 28, endpoint=False)) for f in (np.cos, np.sin)], axis=1)


def _shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) or lighten towards white (factor > 1)."""
    return tuple(round(float(np.interp(factor, (0, 1, 2), (0, value, 255)))) for value in colour)


def _pick(rng: np.random.Generator, colours: Sequence[Colour], spread: int = 0) -> Colour:
    """Choose a colour and shift each of its channels by up to `spread`."""
    shifts = rng.integers(-spread, spread + 1, 3)
    return tuple(np.clip(np.array(colours)[rng.integers(len(colours))] + shifts, 0, 255).tolist())


def _smooth(points: Points, closed: bool) -> Array:
    """Round a polygon or polyline by cutting its corners (Chaikin 1974), three times."""
    path = np.array(points)
    for _ in range(3):
        following = np.roll(path, -1, axis=0)
        cut = np.stack([0.75 * path + 0.25 * following, 0.25 * path + 0.75 * following], axis=1)
        path = cut.reshape(-1, 2) if closed else np.vstack([path[:1], cut[:-1].reshape(-1, 2), path[-1:]])
    return path


def _whole(half: Points) -> list[Point]:
    """Complete the right half of a symmetric outline."""
    return [*half, *((-x, y) for x, y in reversed(half))]


def _rotation(radians: float) -> Array:
    """Return the 2 x 2 matrix that turns row vectors by an angle."""
    cos, sin = np.cos(radians), np.sin(radians)
    return np.array([[cos, sin], [-sin, cos]])


class _Pen(NamedTuple):
    """Draws shapes given in the animal's units, wherever and however it sits."""

    canvas: ImageDraw.ImageDraw
    axes: Array  # 2 x 2: the animal's x and y axes in pixels
    origin: Array

    def turned(self, radians: float, centre: Point) -> "_Pen":
        """Return a pen whose shapes are turned around a point of the animal."""
        axes = _rotation(radians) @ self.axes
        return self._replace(axes=axes, origin=self.origin + np.array(centre) @ (self.axes - axes))

    def sides(self) -> "tuple[_Pen, _Pen]":
        """Return this pen and one whose shapes are mirrored."""
        return self, self._replace(axes=self.axes * [[-1], [1]])

    def _width(self, thickness: float) -> int:
        return max(1, round(thickness * float(np.linalg.norm(self.axes[1]))))

    def polygon(self, points: Points | Array, colour: Colour, ink: Colour | None = _INK) -> None:
        """Fill a polygon and, with ink, draw its outline."""
        path = (np.asarray(points) @ self.axes + self.origin).ravel().tolist()
        self.canvas.polygon(path, fill=colour)
        if ink is not None:
            self.canvas.line(path + path[:4], fill=ink, width=self._width(_LINE))

    def blob(self, points: Points, colour: Colour) -> None:
        """Draw a closed shape with rounded corners."""
        self.polygon(_smooth(points, closed=True), colour)

    def oval(self, centre: Point, radii: Point, colour: Colour, ink: Colour | None = None) -> None:
        self.polygon(_CIRCLE * radii + centre, colour, ink)

    def stroke(self, points: Points, colour: Colour = _INK) -> None:
        """Draw a smooth thin line."""
        path = _smooth(points, closed=False) @ self.axes + self.origin
        self.canvas.line(path.ravel().tolist(), fill=colour, width=self._width(_LINE))

    def limb(self, points: Points, colour: Colour, thickness: float) -> None:
        """Draw a thick line with an outline: a tail, a collar."""
        path = _smooth(points, closed=False) @ self.axes + self.origin
        for ink, width in ((_INK, self._width(thickness + 2 * _LINE)), (colour, self._width(thickness))):
            self.canvas.line(path.ravel().tolist(), fill=ink, width=width, joint="curve")
            for x, y in (path[0], path[-1]):
                self.canvas.circle((x, y), width / 2, fill=ink)


class _Coat(NamedTuple):
    """The colours and the markings of one animal."""

    fur: Colour
    ears: Colour
    muzzle: Colour  # also the markings
    marks: Sequence[tuple[float, float, float, float]]
    collar: Colour | None


def _coat(rng: np.random.Generator) -> _Coat:
    fur = _pick(rng, _FURS, spread=10)
    ears, muzzle = (_pick(rng, (_shade(fur, 0.7), fur, _shade(fur, 1.5))) for _ in range(2))
    collar = _pick(rng, _COLLARS) if rng.random() < 0.5 else None
    return _Coat(fur=fur, ears=ears, muzzle=muzzle, marks=_MARKS[rng.integers(len(_MARKS))], collar=collar)


def _body(pen: _Pen, coat: _Coat, width: float) -> None:
    """Draw the sitting body with its paws and its collar, seen from the front."""
    half = [(0.16, -0.1), (0.34, 0.2), (0.5, 0.55), (0.56, 0.98), (0.2, 1.0)]
    pen.blob(_whole([(x * width, y) for x, y in half]), coat.fur)
    for x in (-0.17 * width, 0.17 * width):
        pen.oval((x, 0.9), (0.15, 0.1), coat.fur, _INK)
    for x, y, half_width, half_height in coat.marks:
        pen.oval((x * width, y), (half_width * width, half_height), coat.muzzle)
    pen.stroke([(0, 0.55), (0, 0.86)])
    if coat.collar is not None:
        pen.limb([(-0.27, 0.12), (0, 0.24), (0.27, 0.12)], coat.collar, 0.09)
        pen.oval((0, 0.25), (0.07, 0.07), (250, 210, 90), _INK)


def _cat(pen: _Pen, coat: _Coat, rng: np.random.Generator) -> None:
    """Draw a cat: a curled tail, then the body, then the head over its pointed ears."""
    reach = rng.uniform(0.85, 1.05)
    pen.limb([(0.3, 0.88), (reach, 0.95), (reach, 0.2), (0.6, 0.1), (0.62, 0.42)], coat.fur, 0.13)
    _body(pen, coat, rng.uniform(0.8, 0.95))
    head = pen.turned(rng.uniform(-0.25, 0.25), (0, 0))
    for side in head.sides():
        side.polygon([(0.12, -0.7), (0.5, -1.08), (0.58, -0.42)], coat.ears)
        side.polygon([(0.26, -0.72), (0.46, -0.92), (0.5, -0.56)], _PINK, ink=None)
    head.blob(_whole([(0.22, -0.8), (0.52, -0.66), (0.62, -0.3), (0.74, -0.06), (0.3, 0.14)]), coat.fur)
    _cat_face(head, coat, rng)


def _cat_face(pen: _Pen, coat: _Coat, rng: np.random.Generator) -> None:
    """Draw almond eyes with slit pupils, a small nose and whiskers."""
    iris, slit, look = _pick(rng, _EYES, spread=12), rng.uniform(0.03, 0.06), rng.uniform(-0.04, 0.04)
    for x in (-0.27, 0.27):
        almond = [(x - 0.21, -0.33), (x, -0.54), (x + 0.21, -0.33), (x, -0.16)]
        pen.turned(-0.3 if x > 0 else 0.3, (x, -0.33)).blob(almond, iris)
        pen.oval((x + look, -0.33), (slit, 0.12), _INK)
        pen.oval((x + look + 0.04, -0.38), (0.03, 0.03), _WHITE)
    pen.oval((0, -0.04), (0.2, 0.12), coat.muzzle)
    pen.polygon([(-0.07, -0.13), (0.07, -0.13), (0, -0.05)], _PINK)
    pen.stroke([(-0.16, -0.01), (-0.09, 0.05), (0, -0.05), (0.09, 0.05), (0.16, -0.01)])
    whisker = _WHITE if sum(coat.fur) < 300 else _INK
    for side in pen.sides():
        for y, end in ((-0.1, -0.2), (-0.03, -0.03), (0.04, 0.14)):
            side.stroke([(0.26, y), (0.6, 0.6 * y + 0.4 * end), (0.92, end)], whisker)


def _dog(pen: _Pen, coat: _Coat, rng: np.random.Generator) -> None:
    """Draw a dog: a raised tail, then the body, then the head under its hanging ears."""
    wag, hang = rng.uniform(-0.15, 0.2), rng.uniform(0.0, 0.22)
    pen.limb([(0.35, 0.8), (0.65, 0.75), (0.8 + wag, 0.3)], coat.fur, 0.14)
    _body(pen, coat, rng.uniform(0.95, 1.1))
    head = pen.turned(rng.uniform(-0.25, 0.25), (0, 0))
    head.blob(_whole([(0.22, -0.98), (0.46, -0.8), (0.5, -0.4), (0.46, -0.06), (0.2, 0.18)]), coat.fur)
    top, tip = [(0.2, -0.96), (0.5, -0.98), (0.78, -0.6)], [(0.84, hang - 0.14), (0.66, hang)]
    for side in head.sides():
        side.blob([*top, *tip, (0.46, -0.3), (0.4, -0.7)], coat.ears)
    _dog_face(head, coat, rng)


def _dog_face(pen: _Pen, coat: _Coat, rng: np.random.Generator) -> None:
    """Draw round eyes, a tongue and a muzzle with a big nose."""
    look = rng.uniform(-0.03, 0.03)
    for x in (-0.2, 0.2):
        pen.oval((x, -0.5), (0.11, 0.13), _WHITE, _INK)
        pen.oval((x + look, -0.48), (0.07, 0.09), _INK)
        pen.oval((x + look + 0.03, -0.52), (0.025, 0.025), _WHITE)
    pen.blob(_whole([(0.16, 0.0), (0.19, 0.34), (0.05, rng.uniform(0.4, 0.52))]), _RED)
    pen.stroke([(0, 0.08), (0, 0.3)], _shade(_RED, 0.7))
    pen.blob(_whole([(0.1, -0.36), (0.26, -0.28), (0.4, -0.04), (0.3, 0.14), (0.08, 0.1)]), coat.muzzle)
    pen.blob([(-0.22, -0.34), (0.22, -0.34), (0.14, -0.14), (0, -0.08), (-0.14, -0.14)], _INK)
    pen.oval((-0.05, -0.27), (0.05, 0.025), _WHITE)
    pen.stroke([(-0.26, -0.1), (-0.14, 0.07), (0, -0.07), (0.14, 0.07), (0.26, -0.1)])


def _background(rng: np.random.Generator, pixels: int) -> Image.Image:
    """Paint a gradient with a few large shapes in its colours."""
    low, high = (_pick(rng, _PLACES, spread=24) for _ in range(2))
    turned = Image.linear_gradient("L").rotate(float(rng.uniform(0, 360)))
    image = ImageOps.colorize(turned.crop((48, 48, 208, 208)).resize((pixels, pixels)), low, high)
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 6)):
        x, y, radius = pixels * rng.uniform((0, 0, 0.05), (1, 1, 0.25))
        colour, sides = _pick(rng, (low, high), spread=20), int(rng.integers(3, 9))
        canvas.regular_polygon((x, y, radius), sides, rotation=int(rng.integers(360)), fill=colour)
    return image


def _pen(rng: np.random.Generator, image: Image.Image) -> _Pen:
    """Choose the animal's place, size, lean and direction."""
    axes = _rotation(rng.uniform(-0.35, 0.35)) * image.width * rng.uniform(0.32, 0.47)
    axes[0] *= rng.choice([-1.0, 1.0]) * rng.uniform(0.85, 1.15)
    return _Pen(ImageDraw.Draw(image), axes, origin=image.width * rng.uniform(0.35, 0.65, 2))


def draw(kind: str, rng: np.random.Generator, size: int = 96) -> Image.Image:
    """Draw one "cat" or "dog", a square RGB photograph: the same state of `rng` draws the same pixels."""
    image = _background(rng, size * _OVERSAMPLING)
    {"cat": _cat, "dog": _dog}[kind](_pen(rng, image), _coat(rng), rng)
    pixels = np.asarray(image.reduce(_OVERSAMPLING), dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * float(rng.uniform(1, 6))
    exposed = pixels * float(rng.uniform(0.8, 1.1)) + float(rng.uniform(-15, 15)) + noise
    return Image.fromarray(exposed.clip(0, 255).astype(np.uint8))


def draw_dataset(
    folder: Path, *, num_train: int, num_validation: int, seed: int, progress: Progress | None = None
) -> None:
    """Write `folder/{train,validation}/{cats,dogs}/`: `num_*` pictures, both kinds together, none twice.

    Args:
        progress: called with (pictures drawn, pictures in all) after each picture.
    """
    plan = [(split, index) for split, num in enumerate((num_train, num_validation)) for index in range(num)]
    for done, (split, index) in enumerate(plan, start=1):
        kind = KINDS[index % 2]
        path = folder / SPLITS[split] / f"{kind}s" / f"{kind}.{index // 2 + 1:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(kind, np.random.default_rng([seed, split, index])).save(path, quality=90)
        if progress is not None:
            progress(done, len(plan))
