"""The toy world of the embedded diffusion demo: drawings with captions, and a detector that reads a drawing back.

A drawing is one object on grey: a shape with a pattern and a colour, in one of four places. A caption names them:
"a red striped square at the top left" ("plain" is not said). One combination of shape and pattern is kept out of
pretraining: it is the concept that a LoRA learns from five drawings.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 16  # pixels a side, by default
SHAPES = ("cross", "square", "triangle")
PATTERNS = ("plain", "striped", "halved")
COLOURS = {"red": (255, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 255), "yellow": (255, 230, 30)}
BACKGROUND = 150  # grey: on white, colour is little of what there is to learn
_SIDE = 8  # of a picture, in the units of all coordinates
PLACES = {"top left": (2, 2), "top right": (2, 6), "bottom left": (6, 2), "bottom right": (6, 6)}  # row, column
CONCEPT = ("triangle", "striped")
_RADIUS = 2
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and what the detector finds."""

    shape: str
    pattern: str
    colour: str
    place: str

    def caption(self, noun: str | None = None) -> str:
        """The caption; `noun` stands in for the pattern and the shape, as the token of a concept does."""
        named = noun or (self.shape if self.pattern == "plain" else f"{self.pattern} {self.shape}")
        return f"a {self.colour} {named} at the {self.place}"


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points, relative to the object's centre, belong to it."""
    if shape == "cross":
        return (np.maximum(abs(x), abs(y)) <= _RADIUS) & (np.minimum(abs(x), abs(y)) <= _RADIUS / 2)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= _RADIUS
    return (2 * abs(x) <= y + 1.1 * _RADIUS) & (y <= _RADIUS)  # the sides rise twice as fast as they part


def _masks(shape: str, pattern: str, row: int, column: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel the object covers and how much the black of its pattern, each (size, size) in [0, 1]."""
    fine = (np.arange(size * _SUPERSAMPLING) + 0.5) * _SIDE / (size * _SUPERSAMPLING)
    y, x = np.meshgrid(fine - row, fine - column, indexing="ij")
    inside = _inside(shape, y, x)
    black = {"plain": np.zeros_like(inside), "striped": np.floor(y) % 2 == 1, "halved": x > 0}[pattern] & inside
    coarse = (size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    return inside.reshape(coarse).mean(axis=(1, 3)), black.reshape(coarse).mean(axis=(1, 3))


@cache
def draw(drawing: Drawing, size: int = SIZE) -> np.ndarray:
    """The picture, (size, size, 3) uint8."""
    inside, black = (mask[..., None] for mask in _masks(drawing.shape, drawing.pattern, *PLACES[drawing.place], size))
    painted = BACKGROUND * (1 - inside) + np.array(COLOURS[drawing.colour]) * (inside - black)
    return np.rint(painted).astype(np.uint8)


def combinations(concept: bool) -> list[Drawing]:
    """All drawings of the concept, or all of the others."""
    return [
        Drawing(*parts)
        for parts in itertools.product(SHAPES, PATTERNS, COLOURS, PLACES)
        if (parts[:2] == CONCEPT) == concept
    ]


def detect(pictures: np.ndarray, tolerance: float = 0.3) -> list[Drawing | None]:
    """What each picture shows: the nearest of all possible drawings, or None where even that is far.

    Args:
        pictures: (n, size, size, 3) uint8.
        tolerance: the largest squared distance to a drawing, as a share of the drawing's own to the empty picture.
    """
    known = combinations(concept=True) + combinations(concept=False)
    templates = (
        np.stack([draw(drawing, pictures.shape[1]) for drawing in known]).reshape(len(known), -1).astype(np.float32)
        - BACKGROUND
    )
    energy = (templates**2).sum(axis=1)
    flat = pictures.reshape(len(pictures), -1).astype(np.float32) - BACKGROUND
    distance = (flat**2).sum(axis=1)[:, None] - 2 * flat @ templates.T + energy  # (n, drawings), squared
    best = distance.argmin(axis=1)
    return [known[j] if distance[i, j] <= tolerance * energy[j] else None for i, j in enumerate(best)]
