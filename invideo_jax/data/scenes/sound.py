"""The sound of a scene: 16 kHz mono, a room tone and what the event sounds like."""

import numpy as np

from invideo_jax.data.scenes.scene import Scene, track

RATE = 16_000


def render(scene: Scene, *, seconds: float) -> np.ndarray:
    """Makes the sound of a scene.

    Returns:
        int16 [round(seconds * 16000)].
    """
    count = round(seconds * RATE)
    time = np.arange(count, dtype=np.float32) / RATE
    rng = scene.rng(1)
    level, pitch = rng.uniform(0.15, 0.45), rng.uniform(0, 1)
    # The room: a low hum and the least noise there is, so that no clip is digitally silent; noise
    # can't be compressed, and each bit more of it would cost 4 kB a clip.
    room = 0.004 * np.sin(2 * np.pi * np.float32(rng.uniform(50, 90)) * time)
    room += rng.integers(-1, 2, count, dtype=np.int8).astype(np.float32) / 32768
    if scene.sound != "none":
        room += np.float32(level) * _SOUNDS[scene.sound](scene, time, seconds, pitch, rng)
    return (np.clip(room, -1, 1) * 32767).astype(np.int16)


def _hum(scene, time, seconds, pitch, rng):
    base = 2 * np.pi * np.float32(160 * 2**pitch) * time
    swell = 0.75 + 0.25 * np.sin(2 * np.pi * 3 * time)
    return swell * (0.7 * np.sin(base) + 0.25 * np.sin(2 * base))


def _glide(scene, time, seconds, pitch, rng):
    """The pitch follows the phase: up with what rises or shrinks, down with what sinks or grows."""
    sign = 1 if scene.sound == "rising tone" else -1
    actor = scene.actors[0]
    # One value in 10 ms is enough for a pitch; between them it is straight.
    coarse = np.linspace(0, 1, 1 + round(seconds * 100))
    climbed = np.abs(track(actor, coarse)["phase"] - actor.path["phase"])
    octaves = np.interp(time / seconds, coarse, sign * 1.6 * (climbed - climbed[-1] / 2))
    turns = np.cumsum(2 * np.pi / RATE * 420 * 2**pitch * 2.0**octaves)
    return 0.8 * np.sin(turns).astype(np.float32)


def _ticking(scene, time, seconds, pitch, rng):
    """A tick at each twelfth of a turn, either way."""
    actor = scene.actors[0]
    start = actor.path["phase"] * 12 % 1
    count = int(start + actor.path["cycles"] * 12)
    moments = (np.arange(1, count + 1) - start) / (actor.path["cycles"] * 12)
    out = np.zeros_like(time)
    for moment in moments:
        _add(out, moment * seconds, _struck((1900 * 2**pitch,), 0.006, 0.04))
    return out


def _whirr(scene, time, seconds, pitch, rng):
    """A tone that wavers once a round, the same either way."""
    actor = scene.actors[0]
    rate = actor.path["cycles"] / seconds
    waver = 0.9 / rate * np.sin(2 * np.pi * rate * time + np.float32(2 * np.pi * pitch))
    turns = 2 * np.pi * (np.float32(230 * 2**pitch) * time + 10 * waver)
    return 0.6 * np.sin(turns) + 0.2 * np.sin(3 * turns)


def _at_events(make):
    def sound(scene, time, seconds, pitch, rng):
        out = np.zeros_like(time)
        for moment, _ in scene.events:
            _add(out, moment * seconds, make(pitch, rng))
        return out

    return sound


def _thud(pitch, rng):
    hit = _struck((95 * 2**pitch, 160 * 2**pitch), 0.05, 0.2)
    hit[:160] += 0.5 * rng.uniform(-1, 1, 160).astype(np.float32)
    return hit


def _chime(pitch, rng):
    base = 780 * 2**pitch
    return _struck((base, 2.76 * base, 4.1 * base), 0.22, 0.8)


def _knock(pitch, rng):
    hit = _struck((330 * 2**pitch, 740 * 2**pitch, 1240 * 2**pitch), 0.03, 0.15)
    hit[:240] += 0.7 * rng.uniform(-1, 1, 240).astype(np.float32)
    return hit


def _whoosh(scene, time, seconds, pitch, rng):
    """Noise that swells until the two are level and fades after."""
    moment = scene.events[0][0] * seconds
    width = 0.09 * seconds
    noise = rng.uniform(-1, 1, len(time)).astype(np.float32)
    # Twice a running mean: air, not hiss; and white noise would double the size of the file.
    taps = int(10 + 8 * pitch)
    for _ in range(2):
        noise = np.convolve(noise, np.full(taps, taps**-0.75, np.float32), mode="same")
    return noise * np.exp(-0.5 * ((time - np.float32(moment)) / np.float32(width)) ** 2)


def _struck(pitches, decay: float, length: float) -> np.ndarray:
    """Something struck: partials, weaker with height, that die away in `decay` seconds."""
    time = np.arange(int(length * RATE), dtype=np.float32) / RATE
    partials = sum(
        np.sin(2 * np.pi * np.float32(p) * time) / (i + 1) for i, p in enumerate(pitches)
    )
    return partials * np.exp(-time / np.float32(decay)) / len(pitches) ** 0.5


def _add(out: np.ndarray, moment: float, sound: np.ndarray) -> None:
    start = round(moment * RATE)
    end = min(start + len(sound), len(out))
    if start < end:
        out[start:end] += sound[: end - start]


_SOUNDS = {
    "hum": _hum,
    "rising tone": _glide,
    "falling tone": _glide,
    "ticking": _ticking,
    "whirr": _whirr,
    "thud": _at_events(_thud),
    "chime": _at_events(_chime),
    "knock": _at_events(_knock),
    "whoosh": _whoosh,
}
