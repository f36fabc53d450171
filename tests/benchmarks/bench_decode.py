"""Decoding speed: our reader against decoding the same frames and doing nothing with them.

    python tests/benchmarks/bench_decode.py [--repeats=5] [FILES...]

Without FILES, writes H.264 clips of 568 x 320 with PyAV (3 s with one keyframe, 20 s with one each
second). For each clip and each plan (sparse8: one random frame in each of 8 segments; dense16: 16
frames at stride 4) it prints clips per CPU-second, which is per core, of

    needed    the limit: PyAV on one thread seeks to the keyframe of each needed group of pictures,
              decodes up to its last wanted frame, and converts nothing
    ffmpeg    `ffmpeg -threads 1 -f null` on a file with only the packets from the keyframe of each
              needed group to its last wanted frame, so that it neither lists nor seeks; 8 clips in
              one process, less the CPU time of starting it and decoding one frame; only where
              ffmpeg is installed
    reader    VideoReader: 224 x 224 RGB of the wanted frames
    load_clip the whole of it: sampling, multi-scale crop, flip

and the share that the reader and the whole of it reach of the limit, and of ffmpeg (target: 0.8).
Methods take turns; medians over repeats of the speeds, and of the shares within one repeat, which
other load on the machine and the choice of frames change less.
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


def copy_needed(path: str, groups: list[list[list[int]]], target: str) -> None:
    """Copies the packets that the groups of several clips need, keyframe to last wanted frame, to one file."""
    with av.open(path) as container, av.open(target, "w", format="matroska") as out:
        stream = container.streams.video[0]
        copy, shift, end = out.add_stream_from_template(stream), 0, 0
        for key, *times in (group for clip in groups for group in clip):
            wanted, started = set(times), False
            container.seek(key, stream=stream)
            for packet in container.demux(stream):
                if not started and packet.pts != key:
                    continue
                if not started:
                    started, shift = True, end - packet.dts
                wanted.discard(packet.pts)
                packet.stream = copy
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                end = max(end, packet.pts + packet.duration)
                out.mux(packet)
                if not wanted:
                    break


def decode_ffmpeg(path: str, *options: str) -> None:
    command = ["ffmpeg", "-nostdin", "-v", "fatal", "-threads", "1", "-i", path, *options]
    command += ["-fps_mode", "passthrough", "-f", "null", "-"]
    subprocess.run(command, check=True)


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


def measure(path: str, plan: str, repeats: int, packets: str) -> dict[str, np.ndarray]:
    """CPU seconds per clip of each method, each repeat with random frames of its own, equal for all methods.

    `packets` names a file to write.
    """
    with VideoReader(path) as reader:
        count = len(reader)
    spec = ClipSpec(8 if plan == "sparse8" else 16, 224, sampling=PLANS[plan])
    spent: dict[str, list[float]] = {}
    batch = 8  # clips a measurement, against the coarse clock
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
            copy_needed(path, groups, packets)
            methods["ffmpeg"] = lambda: decode_ffmpeg(packets)
            methods["start"] = lambda: decode_ffmpeg(packets, "-frames:v", "1")
        for name, work in methods.items():
            spent.setdefault(name, []).append(cpu_seconds(work) / batch)
    spent = {name: np.asarray(values[1:]) for name, values in spent.items()}  # first: warm-up
    if "ffmpeg" in spent:
        spent["ffmpeg"] = np.maximum(spent["ffmpeg"] - spent.pop("start"), 1e-4)
    return spent


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
                spent = measure(path, plan, given.repeats, f"{folder}/packets.mkv")
                names = ("needed", "ffmpeg", "reader", "load_clip")
                spent.setdefault("ffmpeg", np.full(given.repeats, np.nan))
                speeds = [1 / statistics.median(spent[name]) for name in names]
                shares = [
                    f"{statistics.median(spent[limit] / spent[name]):.2f}"
                    for limit in names[:2]
                    for name in names[2:]
                ]
                print(
                    f"{os.path.basename(path)[-24:]:24} {plan:8}",
                    "{:9.1f} {:9.1f} {:9.1f} {:8.1f}".format(*speeds),
                    "{:>15} {:>6} {:>8} {:>6}".format(*shares),
                    flush=True,
                )


if __name__ == "__main__":
    main()
