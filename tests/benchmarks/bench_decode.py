"""Decoding speed: our reader against decoding the same frames and doing nothing with them.

    python tests/benchmarks/bench_decode.py [--repeats=5] [FILES...]

Without FILES, writes H.264 clips of 568 x 320 with PyAV (3 s with one keyframe, 20 s with one each
second). For each clip and each plan (sparse8: one random frame in each of 8 segments; dense16: 16
frames at stride 4) it prints clips per CPU-second, which is per core, of

    needed    the limit: PyAV on one thread seeks to the keyframe of each needed group of pictures,
              decodes up to its last wanted frame, and converts nothing
    ffmpeg    the same frames by `ffmpeg -threads 1 -f null`, less the CPU time of starting it and
              decoding one frame; only where ffmpeg is installed
    reader    VideoReader: 224 x 224 RGB of the wanted frames
    load_clip the whole of it: sampling, multi-scale crop, flip

and the share that the reader and the whole of it reach of the limit, and of ffmpeg (target: 0.8).
Methods take turns in one process; medians.
"""

import argparse
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile

import av
import numpy as np

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/data")]

from video_files import write  # noqa: E402

from invideo_jax.data import sampling  # noqa: E402
from invideo_jax.data.decode import VideoReader, View  # noqa: E402
from invideo_jax.data.transforms import ClipSpec, load_clip  # noqa: E402

PLANS = {"sparse8": "segments", "dense16": "dense"}


def make_clips(folder: str) -> list[str]:
    """Textures that drift at different speeds, with film grain: about the bits per pixel of real video."""
    rng, paths = np.random.default_rng(0), []
    coarse = rng.random((2, 24, 40, 3))
    large = [np.kron(layer, np.ones((40, 40, 1))) for layer in coarse]
    for name, seconds, gop in (("3s_g250.mp4", 3, 250), ("20s_g30.mp4", 20, 30)):
        images = []
        for i in range(30 * seconds):
            back = np.roll(large[0], (i, 2 * i), (0, 1))[:320, :568]
            front = np.roll(large[1], (-2 * i, i), (0, 1))[:320, :568]
            image = 255 * np.where(front[..., :1] > 0.6, front, back) + rng.normal(
                0, 2, (320, 568, 1)
            )
            images.append(image.clip(0, 255).astype(np.uint8))
        paths.append(os.path.join(folder, name))
        options = {"preset": "medium", "crf": "23"}
        write(
            paths[-1],
            frames=len(images),
            size=(568, 320),
            gop=gop,
            options=options,
            images=images,
            steps=[33, 33, 34],
        )
    return paths


def plan_frames(plan: str, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (
        sampling.segments(count, 8, rng) if plan == "sparse8" else sampling.dense(count, 16, 4, rng)
    )


def group_by_keyframe(path: str, wanted: np.ndarray) -> list[list[int]]:
    """Times of the wanted frames, grouped by the keyframe they start from (known in advance to the limit)."""
    with av.open(path) as container:
        packets = [(p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size]
    shown, keys = sorted(p for p, _ in packets), sorted(p for p, key in packets if key)
    groups: dict[int, list[int]] = {}
    for i in sorted(set(wanted.tolist())):
        groups.setdefault(max(k for k in keys if k <= shown[i]), []).append(shown[i])
    return [[key, *times] for key, times in groups.items()]


def decode_needed(path: str, groups: list[list[int]]) -> None:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for key, *times in groups:
            container.seek(key, stream=stream)
            for frame in container.decode(stream):
                if frame.pts >= times[-1]:
                    break


def decode_ffmpeg(path: str, groups: list[list[int]], scale: float) -> None:
    for key, *times in groups:
        length = max((times[-1] - key) * scale, 0.0) + 1e-3
        command = [
            "ffmpeg",
            "-nostdin",
            "-v",
            "error",
            "-threads",
            "1",
            "-ss",
            f"{key * scale:.4f}",
            "-i",
            path,
        ]
        subprocess.run([*command, "-t", f"{length:.4f}", "-an", "-f", "null", "-"], check=True)


def cpu_seconds(work) -> float:
    def now() -> float:
        usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usages)

    begin = now()
    work()
    return now() - begin


def read_with_reader(path: str, wanted: np.ndarray) -> None:
    with VideoReader(path) as reader:
        reader.frames(wanted, view=lambda w, h: View(((w - h) // 2, 0, h, h), (224, 224)))


def measure(path: str, plan: str, repeats: int) -> dict[str, float]:
    """Clips per CPU-second of each method; the median over clips of their own random frames."""
    with VideoReader(path) as reader:
        count, scale = len(reader), float(reader._stream.time_base)
    spec = ClipSpec(8 if plan == "sparse8" else 16, 224, sampling=PLANS[plan])
    spent: dict[str, list[float]] = {}
    batch = 4  # clips a measurement, against the coarse clock
    for repeat in range(repeats + 1):
        seeds = [repeat * batch + i for i in range(batch)]
        frames = [plan_frames(plan, count, s) for s in seeds]
        groups = [group_by_keyframe(path, f) for f in frames]
        methods = {
            "needed": lambda g=groups: [decode_needed(path, x) for x in g],
            "reader": lambda f=frames: [read_with_reader(path, x) for x in f],
            "load_clip": lambda s=seeds: [
                load_clip(path, spec, np.random.default_rng(x)) for x in s
            ],
        }
        if shutil.which("ffmpeg"):
            methods["ffmpeg"] = lambda g=groups: [decode_ffmpeg(path, x, scale) for x in g]
            methods["start"] = lambda g=groups: [
                decode_ffmpeg(path, [y[:1] * 2 for y in x], scale) for x in g
            ]
        for name, work in methods.items():
            spent.setdefault(name, []).append(cpu_seconds(work) / batch)
    seconds = {
        name: statistics.median(values[1:]) for name, values in spent.items()
    }  # first: warm-up
    if "ffmpeg" in seconds:
        seconds["ffmpeg"] = max(seconds["ffmpeg"] - seconds.pop("start"), 1e-4)
    return {name: 1 / value for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = given.files or make_clips(folder)
        print(
            f"{'clip':24} {'plan':8} {'needed/s':>9} {'ffmpeg/s':>9} {'reader/s':>9} {'load/s':>8}"
            "   reader, load of needed   of ffmpeg"
        )
        for path in files:
            for plan in PLANS:
                speed = measure(path, plan, given.repeats)
                ours = [speed[name] for name in ("reader", "load_clip")]
                limits = [speed["needed"], speed.get("ffmpeg", float("nan"))]
                shares = [f"{x / limit:.2f}" for limit in limits for x in ours]
                print(
                    f"{os.path.basename(path)[-24:]:24} {plan:8} {limits[0]:9.1f} {limits[1]:9.1f} {ours[0]:9.1f} "
                    f"{ours[1]:8.1f} {shares[0]:>15} {shares[1]:>6} {shares[2]:>8} {shares[3]:>6}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
