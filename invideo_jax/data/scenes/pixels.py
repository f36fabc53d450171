"""Draws a scene: anti-aliased shapes with textures and outlines on a drifting backdrop, in NumPy.

Shapes and textures are tables of signed distances (negative inside), made once a process and looked
up for each pixel in the object's own coordinates; coverage is `0.5 - distance in pixels`, clipped.
Everything is float32 and elementwise, so that a clip has the same bytes in every process.
"""

import functools
import math

import numpy as np

from invideo_jax.data.scenes import vocabulary
from invideo_jax.data.scenes.scene import Actor, Look, Scene, shake, track

_GRID = 256  # entries a side of a table: at 224 px an entry is a third of a pixel
_EXTENT = 1.3  # tables reach from -_EXTENT to _EXTENT radii
_OUTLINE = 1.1  # pixels at 64 px


def render(scene: Scene, *, size: int, frames: int) -> np.ndarray:
    """Draws all frames of a scene.

    Returns:
        uint8 [T, size, size, 3], RGB.
    """
    u = np.arange(frames) / frames
    shaken = shake(scene, u)
    canvas = _backdrop(scene, u, shaken, size)
    for actor in sorted(scene.actors, key=lambda a: a.depth):
        _draw(canvas, actor, u, shaken)
    np.clip(canvas, 0, 255, out=canvas)
    canvas += 0.5
    return np.ascontiguousarray(np.moveaxis(canvas.astype(np.uint8), 0, -1))


def _backdrop(scene: Scene, u: np.ndarray, shaken: tuple, size: int) -> np.ndarray:
    """A muted pattern that drifts and shakes: float32 [3, T, size, size], 0..255.

    A pattern is a sum of plane waves sin(a x + b y + c), each an outer product of a row part and a
    column part, so that no trigonometric function is evaluated per pixel.
    """
    rng = scene.rng(0)
    waves, gain = _waves(rng, scene.pattern)
    grid = (np.arange(size) + 0.5) / size
    dx, dy = (d * u + s for d, s in zip(scene.drift, shaken))
    field = np.zeros((len(u), size, size), np.float32)
    part = np.empty_like(field)
    for strength, a, b, c in waves:
        rows = b * grid[None, :, None] + (c - a * dx - b * dy)[:, None, None]
        columns = a * grid[None, None, :]
        for f, g in ((np.sin, np.cos), (np.cos, np.sin)):
            row = (strength * f(rows)).astype(np.float32)
            field += np.multiply(row, g(columns).astype(np.float32), out=part)
    field *= gain
    np.clip(field, -1, 1, out=field)
    low, high = (
        np.array(c, np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
        for c in vocabulary.BACKDROPS[scene.backdrop]
    )
    middle, half = (low + high) / 2, (high - low) / 2
    return middle[:, None, None, None] + half[:, None, None, None] * field


def _waves(rng: np.random.Generator, pattern: str) -> tuple[list[tuple], float]:
    """The plane waves (strength, a, b, c) of a pattern and the gain before clipping to -1..1."""
    angle = rng.uniform(0, 2 * math.pi)
    if pattern == "clouds":
        waves = []
        for _ in range(5):
            k, direction = 2 * math.pi * rng.uniform(0.3, 1.2), rng.uniform(0, 2 * math.pi)
            waves.append((0.42, k * math.cos(direction), k * math.sin(direction)))
        gain = 1.0
    elif pattern == "waves":
        waves, gain = [], 1.0
        for turn in (-0.25, 0.0, 0.3):
            k = 2 * math.pi * rng.uniform(0.8, 1.6)
            waves.append((0.4, k * math.cos(angle + turn), k * math.sin(angle + turn)))
    elif pattern == "bands":
        k = 2 * math.pi * rng.uniform(0.6, 1.3)
        waves, gain = [(1.0, k * math.cos(angle), k * math.sin(angle))], 3.0
    else:  # tiles: sin p sin q = (cos(p - q) - cos(p + q)) / 2, turned by `angle`
        k = 2 * math.pi * rng.uniform(0.5, 1.0)
        diagonal = [(angle + q, k * math.sqrt(2)) for q in (math.pi / 4, -math.pi / 4)]
        waves, gain = [(0.5, r * math.cos(t), r * math.sin(t)) for t, r in diagonal], 3.0
    return [(*w, rng.uniform(0, 2 * math.pi)) for w in waves], gain


def _draw(canvas: np.ndarray, actor: Actor, u: np.ndarray, shaken: tuple) -> None:
    """Blends an actor into all frames, inside the box that its whole path covers."""
    size = canvas.shape[-1]
    t = track(actor, u)
    on = np.flatnonzero(t["seen"] > 0)
    if not len(on):
        return
    x, y = ((t[k][on] + s[on]) * size for k, s in zip("xy", shaken))
    radius = t["radius"][on] * size
    reach = radius * _EXTENT + 1
    x0, x1 = (int(v) for v in np.clip([(x - reach).min(), (x + reach).max() + 1], 0, size))
    y0, y1 = (int(v) for v in np.clip([(y - reach).min(), (y + reach).max() + 1], 0, size))
    if x0 >= x1 or y0 >= y1:
        return
    entry, inside = _entries(x, y, t["angle"][on], radius, (x0, x1, y0, y1))
    pixels = radius.astype(np.float32)[:, None, None]
    distance = _shape_table(actor.look.shape).take(entry) * pixels
    cover = np.clip(0.5 - distance, 0, 1) * inside
    core = np.clip(0.5 - _OUTLINE * size / 64 - distance, 0, 1)
    if actor.look.texture != "plain":
        ink = np.clip(0.5 - _texture_table(actor.look.texture).take(entry) * pixels, 0, 1)
    frames = slice(on[0], on[-1] + 1)  # an actor is seen in one run of frames
    for channel, (base, second, outline) in enumerate(zip(*_inks(actor.look))):
        colour = base if actor.look.texture == "plain" else base + (second - base) * ink
        colour = outline + (colour - outline) * core
        part = canvas[channel, frames, y0:y1, x0:x1]
        part += cover * (colour - part)


def _entries(x, y, angle, radius, box) -> tuple[np.ndarray, np.ndarray]:
    """Table entries of the pixels of a box in an object's own coordinates.

    Returns:
        int32 [T, h, w] into the flat tables, and float32 [T, h, w], 0 where outside the tables.
    """
    x0, x1, y0, y1 = box
    scale = _GRID / (2 * _EXTENT) / radius
    c, s = ((f(angle) * scale).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    dx = (np.arange(x0, x1) + 0.5 - x[:, None]).astype(np.float32)[:, None, :]
    dy = (np.arange(y0, y1) + 0.5 - y[:, None]).astype(np.float32)[:, :, None]
    middle = np.float32(_GRID / 2)
    column = c * dx + (s * dy + middle)
    row = c * dy + (middle - s * dx)
    # Distances from the middle decide what is outside, before anything is cut to an integer.
    inside = (np.abs(column - middle) < middle - 1) & (np.abs(row - middle) < middle - 1)
    entry = row.astype(np.int32)
    entry *= _GRID
    entry += column.astype(np.int32)
    return np.clip(entry, 0, _GRID * _GRID - 1, out=entry), inside.astype(np.float32)


def _inks(look: Look) -> tuple[tuple, tuple, tuple]:
    """Colours (base, second, outline) of a look, 0..255; the second keeps the colour's name true."""
    base = np.array(look.tint)
    light = base @ (0.299, 0.587, 0.114)
    toward, share = (20.0, 0.5) if light > 150 else (245.0, 0.62)
    second = base + (toward - base) * (0.42 if look.colour == "black" else share)
    outline = 235.0 + 0 * base if look.colour == "black" else base * 0.25
    return tuple(tuple(np.float32(v) for v in ink) for ink in (base, second, outline))


def _axes() -> tuple[np.ndarray, np.ndarray]:
    grid = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _EXTENT
    return np.meshgrid(grid, grid)


@functools.cache
def _texture_table(texture: str) -> np.ndarray:
    """Signed distance, in radii, to where the second colour is."""
    x, y = _axes()
    if texture == "striped":
        period = 0.62
        distance = (np.abs((y / period) % 1 - 0.5) - 0.25) * period
    elif texture == "dotted":
        period = 0.66
        u, v = ((w / period + 0.5) % 1 - 0.5 for w in (x + 0.12, y + 0.07))
        distance = np.hypot(u, v) * period - 0.2
    else:
        period = 0.9
        u, v = ((np.abs((w / period) % 1 - 0.5) - 0.25) * period for w in (x, y))
        distance = -np.sign(u * v) * np.minimum(np.abs(u), np.abs(v))
    return distance.astype(np.float32)


@functools.cache
def _shape_table(shape: str) -> np.ndarray:
    """Signed distance, in radii, to a shape of about unit radius."""
    x, y = _axes()
    if shape == "circle":
        distance = np.hypot(x, y) - 0.9
    elif shape == "moon":
        distance = np.maximum(np.hypot(x, y) - 1.0, 0.78 - np.hypot(x - 0.52, y))
    else:
        distance = _polygon(x, y, _corners(shape))
    return distance.astype(np.float32)


def _corners(shape: str) -> np.ndarray:
    """Corners of a shape, [n, 2], in radii, y down, about the centre of its area."""
    if shape == "square":
        return 0.8 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        turn = 2 * np.pi * np.arange(3) / 3 - np.pi / 2
        return 1.1 * np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "star":
        turn = 2 * np.pi * np.arange(10) / 10 - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.1, 0.5)
        return np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)
    if shape == "heart":
        s = 2 * np.pi * np.arange(36) / 36
        x = 16 * np.sin(s) ** 3
        y = -(13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s))
        return np.stack([x, y - 2], 1) / 16.5
    if shape == "cross":
        a, b = 0.34, 1.0
        arm = [(b, -a), (b, a), (a, a)]
        turns = [((1, 0), (0, 1)), ((0, -1), (1, 0)), ((-1, 0), (0, -1)), ((0, 1), (-1, 0))]
        return np.concatenate([np.array(arm) @ np.array(m).T for m in turns])
    arrow = [(1.05, 0), (0.1, 0.8), (0.1, 0.34), (-0.95, 0.34)]
    return np.array(arrow + [(x, -y) for x, y in arrow[:0:-1]])


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a simple polygon: nearest edge, with the sign by counting crossings."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        ex, ey = bx - ax, by - ay
        share = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - share * ex, y - ay - share * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)
