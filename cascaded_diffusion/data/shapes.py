"""Drawn colour images with classes: a stand-in for a photo data set, with no download."""

from collections.abc import Callable

import numpy as np

from cascaded_diffusion.data.splits import check_train_or_test

RESOLUTION = 64
# The number of images and the seed of each split.
_SPLITS = {"train": (1000, 0), "test": (200, 1)}
# The width in pixels of the rim of a striped shape, which has no stripes.
_RIM = 1.5


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    slanted = 0.75**0.5 * np.abs(u) + 0.5 * v
    return np.maximum(slanted, -v) - 0.5


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    longer, shorter = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(longer - 0.95, shorter - 0.3)


# Each takes coordinates in which the shape just fits a circle of radius 1, and returns the
# distance to the outline (near corners a lower bound of it), negative inside.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.5**0.5,
    "triangle": _triangle,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.77) - 0.23,
    "cross": _cross,
}
NUM_CLASSES = 2 * len(SHAPES)
CLASS_NAMES = (*SHAPES, *(f"striped {name}" for name in SHAPES))


def load_shapes(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of one shape each, on a background that fades between two colours.

    Label k < 5 is shape k of `SHAPES` in one colour, label k + 5 the same shape with
    stripes. Colours, position, size and rotation are random, and the same at each call.

    Returns uint8 images [n, 64, 64, 3] and int32 labels [n], the index modulo 10; n is 1000 for
    the split "train" and 200 for "test". Raises UserError for any other.
    """
    check_train_or_test(split, "shapes")
    n, seed = _SPLITS[split]
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % NUM_CLASSES
    images = np.empty((n, RESOLUTION, RESOLUTION, 3), np.uint8)
    for k, outline in enumerate(SHAPES.values()):
        chosen = labels % len(SHAPES) == k
        images[chosen] = _draw(rng, outline, striped=labels[chosen] >= len(SHAPES))
    return images, labels


def _draw(
    rng: np.random.Generator,
    outline: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    striped: np.ndarray,
) -> np.ndarray:
    """Draws one shape on n backgrounds; `striped` bool [n] -> uint8 [n, 64, 64, 3]."""
    n = len(striped)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    radius = uniform(14, 26, 1, 1)
    room = RESOLUTION / 2 - 1 - radius
    pixel = np.arange(RESOLUTION, dtype=np.float32) - (RESOLUTION - 1) / 2
    x = (pixel[None, None, :] - room * uniform(-1, 1, 1, 1)) / radius
    y = (pixel[None, :, None] - room * uniform(-1, 1, 1, 1)) / radius
    u, v = _turned(x, y, uniform(0, 2 * np.pi, 1, 1))
    distance = outline(u, v) * radius
    inside = _coverage(distance)
    # Stripes are as wide as their gaps, five to a diameter. A rim without stripes keeps the
    # outline visible where stripe and background look alike.
    period = 0.4
    to_stripe = np.abs((u + v) / 2**0.5 / period % 1 - 0.5) - 0.25
    stripe = _coverage(to_stripe * period * radius) * _coverage(distance + _RIM)
    stripe *= striped[:, None, None]

    # Shape and background never have the same brightness, nor do shape and stripe.
    colours = uniform(0, 0.4, 4, 3)
    light_shape = rng.random(n) < 0.5
    is_light = np.stack([light_shape, ~light_shape, ~light_shape, ~light_shape], axis=1)
    colours = np.where(is_light[:, :, None], 1 - colours, colours)
    shape_colour, stripe_colour, start, end = np.moveaxis(colours[:, None, None], 3, 0)
    along, _ = _turned(pixel[None, None, :], pixel[None, :, None], uniform(0, 2 * np.pi, 1, 1))
    fade = np.clip(along / RESOLUTION + 0.5, 0, 1)
    picture = _mix(start, end, fade)
    picture = _mix(picture, _mix(shape_colour, stripe_colour, stripe), inside)
    return np.rint(picture * 255).astype(np.uint8)


def _turned(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a frame rotated by `angle`; the three arrays broadcast."""
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _coverage(distance: np.ndarray) -> np.ndarray:
    """The share of a pixel that is inside, given its centre's distance in pixels to the edge."""
    return np.clip(0.5 - distance, 0, 1)


def _mix(below: np.ndarray, above: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Lays colours [n, ?, ?, 3] over others with the opacity `amount` [n, H, W]."""
    return below + (above - below) * amount[..., None]
