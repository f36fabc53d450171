"""What must not tell the motion of a synthetic clip (one frame, colours, sound alone), and what does.

Simple classifiers are fitted on training clips and scored on validation clips, which show other
combinations. Chance is 1/15 = 0.067.
"""

import functools
import io

import av
import numpy as np
import pytest

from invideo_jax.data import synthetic
from invideo_jax.data.scenes import pixels, scene, sound, vocabulary

CHANCE = 1 / len(vocabulary.LABELS)
HALVES = (0.65, 0.35, 0.0)
SIZE, FRAMES = 48, 16


@functools.lru_cache(maxsize=2)
def clips(count: int) -> tuple[list[scene.Scene], np.ndarray, np.ndarray, np.ndarray]:
    """Scenes, pictures uint8 [n, T, H, W, 3], labels [n], and whether each is a training clip [n]."""
    scenes = [scene.sample(11, i, HALVES) for i in range(count)]
    video = np.stack([pixels.render(s, size=SIZE, frames=FRAMES) for s in scenes])
    labels = np.array([s.label for s in scenes])
    return scenes, video, labels, np.array([s.split == "train" for s in scenes])


def ridge(features: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    """Best validation accuracy of ridge regression to one-hot labels, over strengths.

    Taking the best strength on the validation clips favours the probe: a shortcut is not missed.
    """
    x = features.reshape(len(features), -1).astype(np.float64)
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    targets = np.eye(len(vocabulary.LABELS))[labels]
    # Solved in whichever of the two spaces is the smaller.
    kernel = x[train] @ x[train].T
    scores = []
    for strength in (1.0, 30.0, 1000.0, 30000.0):
        weights = np.linalg.solve(kernel + strength * np.eye(train.sum()), targets[train])
        guess = (x[~train] @ x[train].T @ weights).argmax(1)
        scores.append((guess == labels[~train]).mean())
    return float(max(scores))


def neighbours(features: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    """Best validation accuracy of k nearest neighbours, over k."""
    x = features.reshape(len(features), -1).astype(np.float64)
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    distance = (x[train] ** 2).sum(1)[None] - 2 * x[~train] @ x[train].T
    order = distance.argsort(1)
    votes = np.eye(len(vocabulary.LABELS))[labels[train]][order]
    return float(
        max((votes[:, :k].sum(1).argmax(1) == labels[~train]).mean() for k in (1, 5, 15, 40))
    )


def shrink(frames: np.ndarray, side: int = 12) -> np.ndarray:
    """Frames [n, H, W, 3] averaged down to [n, side, side, 3]."""
    n, height = frames.shape[:2]
    step = height // side
    return frames.reshape(n, side, step, side, step, 3).mean((2, 4))


# --- pixels ---


def in_parts(measure):
    """Measures 50 clips at a time: the gradients of all at once would take gigabytes."""

    def measured(video):
        return np.concatenate([measure(video[i : i + 50]) for i in range(0, len(video), 50)])

    return measured


@in_parts
def foreground(video: np.ndarray) -> np.ndarray:
    """How far each pixel's colour is from the frame's median colour, [n, T, H, W], 0..1."""
    median = np.median(video, axis=(2, 3), keepdims=True)
    return np.clip(np.abs(video - median).max(-1) / 60 - 0.6, 0, 1).astype(np.float32)


@in_parts
def motion_features(video: np.ndarray) -> np.ndarray:
    """Hand-made motion measures of clips, [n, F]: no tracking, no knowledge of the scene.

    From the change of the foreground between frames: shift, turning and spreading about the place
    of change (all by gradient matching), how the area changes, and how the shifts follow each other.
    """
    f = foreground(video)
    change = np.diff(f, axis=1)
    middle = (f[:, 1:] + f[:, :-1]) / 2
    gy, gx = np.gradient(middle, axis=(2, 3))
    ys, xs = np.mgrid[: f.shape[2], : f.shape[3]].astype(np.float32)
    amount = np.abs(change)
    total = amount.sum((2, 3)) + 1e-3
    cx, cy = ((amount * g).sum((2, 3)) / total for g in (xs, ys))
    rx, ry = xs - cx[..., None, None], ys - cy[..., None, None]
    inside = np.exp(-(rx**2 + ry**2) / (2 * (f.shape[2] / 6) ** 2))
    # Least squares for change = -(vx gx + vy gy + w (x gy - y gx) + s (x gx + y gy) / 8).
    basis = np.stack([gx, gy, (rx * gy - ry * gx) / 8, (rx * gx + ry * gy) / 8], -1)
    weighted = basis * inside[..., None]
    gram = np.einsum("nthwi,nthwj->ntij", weighted, basis) + 0.05 * np.eye(4)
    right = -np.einsum("nthwi,nthw->nti", weighted, change)
    flow = np.clip(np.linalg.solve(gram, right[..., None])[..., 0], -4, 4)
    area = np.diff(f.sum((2, 3)), axis=1)
    vx, vy = flow[..., 0], flow[..., 1]
    cross = vx[:, :-1] * vy[:, 1:] - vy[:, :-1] * vx[:, 1:]
    shift = np.stack([np.diff(cx), np.diff(cy)], -1)
    parts = [
        np.median(flow, 1),
        np.abs(flow).mean(1),
        np.quantile(flow, (0.2, 0.8), axis=1).transpose(1, 0, 2).reshape(len(f), -1),
        np.median(cross, 1)[:, None],
        np.sign(cross).mean(1)[:, None],
        np.median(shift, 1),
        np.sort(area, 1)[:, [0, 1, 7, -2, -1]] / 30,
        np.sort(total, 1)[:, [0, 4, 7, 11, 14]] / 30,
        area.sum(1)[:, None] / 30,
        (vy[:, 2:] * vy[:, :-2]).mean(1)[:, None],
        (np.stack([vx, vy]).std(2).T),
    ]
    return np.concatenate(parts, 1)


def with_products(features: np.ndarray) -> np.ndarray:
    """Adds all products of two features, so that a linear classifier can use sizes and signs."""
    scaled = np.clip((features - features.mean(0)) / (features.std(0) + 1e-6), -3, 3)
    i, j = np.triu_indices(scaled.shape[1])
    return np.concatenate([scaled, scaled[:, i] * scaled[:, j]], 1)


def report(name, *scores):
    print(f"{name}: " + ", ".join(f"{s:.3f}" for s in scores))
    return max(scores)


def check_one_frame(count: int, margin: float) -> float:
    """No single frame, whichever, tells the label; returns the best score."""
    _, video, labels, train = clips(count)
    any_frame = np.random.default_rng(0).integers(FRAMES, size=count)
    best = 0.0
    for name, which in (("first", 0), ("last", FRAMES - 1), ("random", any_frame)):
        frames = video[np.arange(count), which]
        shown = shrink(foreground(frames[:, None])[:, 0, ..., None].repeat(3, -1))[..., 0]
        for kind, features in (("colours", shrink(frames)), ("objects", shown)):
            scores = ridge(features, labels, train), neighbours(features, labels, train)
            best = max(best, report(f"{name} frame, {kind}", *scores))
    assert best < CHANCE + margin
    return best


OPPOSITES = [
    ("moves left", "moves right"),
    ("moves up", "moves down"),
    ("turns clockwise", "turns anticlockwise"),
    ("circles clockwise", "circles anticlockwise"),
    ("grows", "shrinks"),
]


def states(scenes: list[scene.Scene], u: np.ndarray) -> np.ndarray:
    """All there is to know of one frame but colours: places, sizes, angles of what is in view.

    Each object becomes 300 random cosines of (x, y, log size, angle), which are summed over the
    objects, so that their order (the one the label speaks of is first) is lost; and their number.

    Args:
        u: [n], the moment of each scene's frame, as a share of the clip.
    """
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, 300)) * np.array([5, 5, 8, 1, 1])[:, None]
    offsets = rng.uniform(0, 2 * np.pi, 300)
    out = np.zeros((len(scenes), 304))
    for row, s, moment in zip(out, scenes, u):
        seen = 0
        for actor in s.actors:
            t = {k: float(v) for k, v in scene.track(actor, np.float64(moment)).items()}
            if t["seen"] and all(-t["radius"] < t[k] < 1 + t["radius"] for k in "xy"):
                state = t["x"], t["y"], np.log(t["radius"]), np.cos(t["angle"]), np.sin(t["angle"])
                row[:300] += np.cos(np.array(state) @ weights + offsets)
                seen += 1
        row[300 + seen] = 1
    return out


def check_states(count: int, margin: float) -> None:
    """The exact state of one frame says little of the label and nothing of the direction."""
    scenes = [scene.sample(12, i, HALVES) for i in range(count)]
    labels = np.array([s.label for s in scenes])
    train = np.array([s.split == "train" for s in scenes])
    any_frame = np.random.default_rng(1).integers(FRAMES, size=count) / FRAMES
    for name, u in (("first", 0 * any_frame), ("last", 0 * any_frame + 0.99), ("any", any_frame)):
        features = states(scenes, u)
        best = report(f"{name} frame, exact state", ridge(features, labels, train))
        assert best < CHANCE + margin, name
        right = []
        for pair in OPPOSITES:
            own = np.isin(labels, [vocabulary.LABELS.index(motion) for motion in pair])
            right.append(ridge(features[own], labels[own], train[own]))
        # The mean of five bests of four strengths: about 0.5 + one standard deviation of one.
        one = 0.5 / np.sqrt((~train).sum() * 2 / 15)
        assert report(f"{name} frame, which of two opposites", np.mean(right)) < 0.5 + 2 * one, name


def check_colours(count: int, margin: float) -> None:
    """Neither mean colour nor its spread nor the colour histogram of a clip tells the label."""
    _, video, labels, train = clips(count)
    mean, spread = video.mean((1, 2, 3)), video.std((1, 2, 3))
    coarse = (video // 64).astype(int) @ (16, 4, 1)
    histogram = np.stack([np.bincount(c.ravel(), minlength=64) for c in coarse]) ** 0.5
    for name, features in (("mean", mean), ("mean and spread", np.hstack([mean, spread]))):
        best = report(name, *(f(features, labels, train) for f in (ridge, neighbours)))
        assert best < CHANCE + margin, name
    assert report("histogram", ridge(histogram, labels, train)) < CHANCE + margin


def spectra(scenes: list[scene.Scene]) -> np.ndarray:
    """Log energy in 24 bands x 16 times of each clip's sound, and of the same sorted over time."""
    samples = np.stack([sound.render(s, seconds=2.0) for s in scenes]).astype(np.float32) / 32768
    pieces = samples.reshape(len(samples), 16, 2000) * np.hanning(2000).astype(np.float32)
    power = np.abs(np.fft.rfft(pieces)) ** 2
    edges = np.unique(np.geomspace(5, 1000, 25).astype(int))
    bands = np.log(np.add.reduceat(power, edges, axis=2)[:, :, :-1] + 1e-4)
    return np.concatenate([bands, np.sort(bands, 1)], 1)


def check_sound(count: int) -> None:
    """Sound tells what it should (which pair of opposites), not the label."""
    scenes, _, labels, train = clips(count)
    features = spectra(scenes)
    best = report("sound", ridge(features, labels, train), neighbours(features, labels, train))
    assert 0.2 < best < 0.6
    names = sorted(set(vocabulary.SOUNDS.values()))
    kind = np.array([names.index(vocabulary.SOUNDS[s.motion]) for s in scenes])
    heard = np.array([s.sound != vocabulary.SILENT for s in scenes])
    of_sound = ridge(features[heard], kind[heard], train[heard])
    assert report("which sound, where there is one", of_sound) > 0.8
    silent = ridge(features[~heard], labels[~heard], train[~heard])
    assert report("silent clips", silent) < CHANCE + 0.08


def check_motion(count: int, least: float) -> float:
    """Motion measures tell the label; returns the score."""
    _, video, labels, train = clips(count)
    moving = report("motion", ridge(with_products(motion_features(video)), labels, train))
    assert moving > least
    return moving


def test_one_frame_does_not_tell_the_motion():
    check_one_frame(1000, margin=0.08)


def test_exact_places_in_one_frame_hardly_tell_the_motion():
    check_states(2400, margin=0.08)


def test_colours_do_not_tell_the_motion():
    check_colours(1000, margin=0.06)


def test_sound_tells_only_what_belongs_to_the_event():
    check_sound(1000)


def test_motion_tells_the_label():
    check_motion(1000, least=0.7)


@pytest.mark.slow
def test_shortcuts_with_many_clips():
    count = 4000
    best = check_one_frame(count, margin=0.09)
    check_states(6000, margin=0.09)
    check_colours(count, margin=0.04)
    check_sound(count)
    moving = check_motion(count, least=0.85)
    assert moving > 5 * best
    # The same pictures out of order: what the set of frames tells (moved, or only turned) stays,
    # which way does not.
    _, video, labels, train = clips(count)
    rng = np.random.default_rng(0)
    mixed = np.stack([v[rng.permutation(FRAMES)] for v in video])
    shuffled = ridge(with_products(motion_features(mixed)), labels, train)
    assert report("motion, frames shuffled", shuffled) < 0.65


@pytest.mark.slow
def test_the_number_of_bytes_of_the_pictures_hardly_tells_the_motion():
    # Of the pictures alone: how long the sound is in flac belongs to the event, as the sound does.
    settings = synthetic.Settings(splits=HALVES)
    rows = [synthetic.clip_row(settings, i) for i in range(1500)]
    sizes = []
    for i in range(len(rows)):
        with av.open(io.BytesIO(synthetic.clip_video(settings, i))) as container:
            sizes.append([np.log(sum(packet.size for packet in container.demux(video=0)))])
    labels = np.array([r["label"] for r in rows])
    train = np.array([r["split"] == "train" for r in rows])
    best = report("bytes of pictures", neighbours(np.array(sizes), labels, train))
    assert best < CHANCE + 0.06
