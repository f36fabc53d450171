"""The built-in dataset: short h264 files with sound, each named by a motion, made from a seed.

    python -m invideo_jax.data.synthetic --output=FOLDER --clips=3000

One or more objects (shape, colour, texture) on a drifting backdrop, filmed by a shaking camera; one
of them (or two together) does one of 15 motions, which is the label. No single frame, colour or
backdrop tells it (`scenes.scene` says why, and what remains), the sound only in part: opposite
motions sound alike. Captions of what is seen, of what is heard and of both, spoken words with their times and all attributes
stand in `manifest.jsonl`. A combination
of (shape, colour, texture, motion) is in one split only (`scenes.splits`).

Clip i is a pure function of (seed, i, size, frames, fps, splits): the same bytes for any number of
clips and workers, with the same versions of NumPy and PyAV on the same kind of processor.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from invideo_jax.data.scenes import pixels, scene, sound, splits, vocabulary, words

SPLITS = splits.SPLITS
VERSION = 3  # raise when a clip's pixels, sound or text change
_CHUNK = 32  # clips a task: about half a second of work


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a dataset is a function of. Sizes in pixels, fps in frames a second."""

    seed: int = 0
    clips: int = 3000
    size: int = 64
    frames: int = 16
    fps: int = 8
    splits: tuple[float, float, float] = (0.8, 0.1, 0.1)

    def __post_init__(self):
        rules = (
            ("seed", self.seed >= 0, "a whole number >= 0"),
            ("clips", self.clips >= 1, "at least 1"),
            ("size", 16 <= self.size <= 1024 and self.size % 2 == 0, "even, 16..1024 pixels"),
            ("frames", 8 <= self.frames <= 512, "8..512, for the motion to be seen"),
            ("fps", 1 <= self.fps <= 60, "1..60 frames a second"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}; got {name}={getattr(self, name)}.")
        object.__setattr__(self, "splits", splits.check_fractions(self.splits))

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def make(
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    clips: int = 3000,
    size: int = 64,
    frames: int = 16,
    fps: int = 8,
    splits: tuple[float, float, float] = (0.8, 0.1, 0.1),
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> pathlib.Path:
    """Writes the dataset, or finds it already there.

    Files are made in `FOLDER.partial` and renamed at the end, so a folder is whole or absent. A
    stopped run goes on where it was; another run with the same arguments changes nothing.

    Args:
        clips: how many in all three splits together.
        splits: shares of train, validation, test.
        workers: processes; 1 works in this one.
        progress: called with (clips done, clips in all); once, with equal numbers, when the
            dataset was already there.

    Returns:
        Path of `manifest.jsonl`.

    Raises:
        ValueError: an argument breaks its rule.
        FileExistsError: the folder holds something else, or was made with other arguments.
        RuntimeError: files of the finished dataset are missing, or another process makes it.
    """
    settings = Settings(seed, clips, size, frames, fps, tuple(splits))
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got workers={workers}.")
    folder = pathlib.Path(folder).absolute()
    manifest = folder / "manifest.jsonl"
    if _finished(folder, settings):
        if progress:
            progress(clips, clips)
        return manifest
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        if _finished(folder, settings):  # by another process, just before this one got the lock
            shutil.rmtree(partial)
            return manifest
        _check_partial(partial, settings)
        _write_all(partial, settings, workers, progress)
        os.replace(partial, folder)
    return manifest


def describe(folder: str | os.PathLike) -> dict | None:
    """Reads `dataset.json` of a finished dataset, or None where there is none."""
    path = pathlib.Path(folder) / "dataset.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def clip_row(settings: Settings, index: int) -> dict:
    """The manifest row of clip `index`, without rendering it."""
    s = scene.sample(settings.seed, index, settings.splits)
    texts = words.captions(s)
    spoken, times = words.transcript(s, settings.seconds)
    look = s.actors[0].look
    return {
        "id": f"{index:06d}",
        "path": f"{s.split}/{index:06d}.mp4",
        "captions": texts["video"],
        "audio_captions": texts["audio"],
        "fused_captions": texts["fused"],
        "label": s.label,
        "label_name": s.motion,
        "split": s.split,
        "transcript": spoken,
        "speech": [[*span, word] for span, word in zip(times, spoken.split())],
        "flip": False,
        "attributes": {
            "shape": look.shape,
            "colour": look.colour,
            "texture": look.texture,
            "motion": s.motion,
            "sound": s.sound,
            "events": [{"time": round(u * settings.seconds, 4), "kind": k} for u, k in s.events],
            "partner": _names(s.actors[1].look) if s.pair else None,
            "bystanders": [_names(a.look) for a in s.actors if a.action == vocabulary.STILL],
            "backdrop": f"{s.backdrop} {s.pattern}",
        },
    }


def clip_video(settings: Settings, index: int) -> bytes:
    """Renders and encodes clip `index`: an mp4 file's bytes (h264 video, flac sound)."""
    s = scene.sample(settings.seed, index, settings.splits)
    video = pixels.render(s, size=settings.size, frames=settings.frames)
    return encode(video, sound.render(s, seconds=settings.seconds), settings.fps)


def encode(video: np.ndarray, samples: np.ndarray, fps: int) -> bytes:
    """Encodes frames and sound into mp4.

    Args:
        video: uint8 [T, H, W, 3], RGB.
        samples: int16 [n], 16 kHz, mono.

    Returns:
        The file's bytes.
    """
    # flac is lossless, keeps the number of samples exact and costs a fifth of aac's time.
    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # One thread, because workers are processes and x264's bytes depend on its thread number.
        # Its macroblock tree reads memory that it never wrote (with B-frames, in PyAV 18.1's
        # x264): without mbtree=0, 47 of 60 clips change with what malloc returns.
        options = {"preset": "veryfast", "crf": "20", "threads": "1", "x264-params": "mbtree=0"}
        picture = container.add_stream("libx264", rate=fps, options=options)
        picture.height, picture.width = video.shape[1:3]
        picture.pix_fmt, picture.gop_size = "yuv420p", max(fps, 2)  # a keyframe each second
        picture.thread_count = 1
        tone = container.add_stream("flac", rate=sound.RATE, layout="mono")
        # A converter for each frame would cost more than the encoding.
        convert = VideoReformatter()
        for i, pixels_rgb in enumerate(video):
            frame = av.VideoFrame.from_ndarray(pixels_rgb, format="rgb24")
            frame = convert.reformat(frame, format="yuv420p", threads=1)
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        audio = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        audio.sample_rate, audio.pts = sound.RATE, 0
        container.mux(tone.encode(audio))
        container.mux(tone.encode(None))
    return target.getvalue()


def _names(look: scene.Look) -> list[str]:
    return [look.shape, look.colour, look.texture]


def _parameters(settings: Settings) -> dict:
    return {"version": VERSION} | dataclasses.asdict(settings) | {"splits": list(settings.splits)}


def _finished(folder: pathlib.Path, settings: Settings) -> bool:
    """Whether the folder is this dataset, whole; anything else in it is an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = describe(folder) if folder.is_dir() else None
    if found is None:
        raise FileExistsError(
            f"the output folder must be new, empty or a dataset made by this command; got "
            f"output={folder}, which holds something else. Give another folder."
        )
    _compare(folder, found["parameters"], settings)
    rows = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    missing = [p for p in (json.loads(r)["path"] for r in rows) if not (folder / p).is_file()]
    if missing or len(rows) != settings.clips:
        raise RuntimeError(
            f"a finished dataset must have all its files; {folder} misses {len(missing)} of "
            f"{settings.clips} clips (first: {missing[:1]}). Delete the folder and make it again."
        )
    return True


def _compare(folder: pathlib.Path, found: dict, settings: Settings) -> None:
    wanted = _parameters(settings)
    other = [f"{k}={found.get(k)} (asked: {k}={v})" for k, v in wanted.items() if found.get(k) != v]
    if other:
        raise FileExistsError(
            f"a folder must be used with the arguments it was made with; {folder} has "
            f"{', '.join(other)}. Give another folder, the same arguments, or delete it."
        )


def _check_partial(partial: pathlib.Path, settings: Settings) -> None:
    """A stopped run may go on only with its own arguments."""
    path = partial / "parameters.json"
    if path.is_file():
        _compare(partial, json.loads(path.read_text(encoding="utf-8")), settings)
        return
    if any(p.name != ".lock" for p in partial.iterdir()):
        raise FileExistsError(
            f"{partial} must be absent or left by a stopped run; it holds something else. "
            f"Move it away or give another folder."
        )
    _write(path, json.dumps(_parameters(settings)).encode())


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
    """Holds a folder for this process alone, until the process ends at the latest."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"only one process may make a dataset; another one is at {folder}. "
                f"Wait for it or give another folder."
            ) from None
        yield


def _write_all(partial: pathlib.Path, settings: Settings, workers: int, progress) -> None:
    """Makes what is missing in `partial`, then the manifest and dataset.json."""
    for split in SPLITS:
        (partial / split).mkdir(exist_ok=True)
    chunks = [
        (str(partial), settings, start, min(start + _CHUNK, settings.clips))
        for start in range(0, settings.clips, _CHUNK)
    ]
    rows = []
    for part in _map(_make_chunk, chunks, workers):
        rows += part
        if progress:
            progress(len(rows), settings.clips)
    lines = "".join(json.dumps(row) + "\n" for row, _ in rows)
    _write(partial / "manifest.jsonl", lines.encode())
    digest = hashlib.sha256(lines.encode())
    for _, (_, clip_digest) in rows:
        digest.update(clip_digest)
    summary = {
        "name": "invideo_jax built-in dataset",
        "parameters": _parameters(settings),
        "labels": list(vocabulary.LABELS),
        "counts": {s: sum(row["split"] == s for row, _ in rows) for s in SPLITS},
        "bytes": sum(size for _, (size, _) in rows),
        "digest": digest.hexdigest(),
        "made_with": {"av": av.__version__, "numpy": np.__version__},
    }
    _write(partial / "dataset.json", json.dumps(summary, indent=2).encode())
    for name in ("parameters.json", ".lock"):
        (partial / name).unlink()


def _make_chunk(task: tuple) -> list[tuple[dict, tuple[int, bytes]]]:
    """Makes the clips start..end; returns each one's row, size in bytes and digest."""
    partial, settings, start, end = task
    made = []
    for index in range(start, end):
        row = clip_row(settings, index)
        path = pathlib.Path(partial, row["path"])
        # A file with its final name is whole: it got the name after the last byte.
        if path.is_file():
            data = path.read_bytes()
        else:
            data = clip_video(settings, index)
            _write(path, data)
        made.append((row, (len(data), hashlib.sha256(data).digest())))
    return made


def _write(path: pathlib.Path, data: bytes) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def _map(function, tasks, workers: int):
    """Yields results in order, from this process or from `workers` spawned ones."""
    if workers == 1 or len(tasks) == 1:
        yield from map(function, tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield from pool.map(function, tasks)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's business; a worker whose parent is gone ends at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class _ProgressLine:
    """Prints 'clips done, clips/s, time left' over itself, at most twice a second."""

    def __init__(self):
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < 0.5 and done < total:
            return
        self.last = now
        rate = done / max(now - self.start, 1e-3)
        left = (total - done) / rate
        end = "\n" if done == total else ""
        text = f"\rmaking clips: {done}/{total}  {rate:.0f} clips/s  {left:.0f} s left   "
        print(text, end=end, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m invideo_jax.data.synthetic",
        description="Makes the built-in dataset: short mp4 files of moving objects, with sound, "
        "captions and labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    defaults = Settings()
    parser.add_argument("--output", required=True, help="the folder to make")
    parser.add_argument("--clips", type=int, default=defaults.clips, help="clips in all splits")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="another seed, other clips")
    parser.add_argument("--size", type=int, default=defaults.size, help="height and width, pixels")
    parser.add_argument("--frames", type=int, default=defaults.frames, help="frames a clip")
    parser.add_argument("--fps", type=int, default=defaults.fps, help="frames a second")
    parser.add_argument("--splits", default="0.8,0.1,0.1", help="shares of train,validation,test")
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes"
    )
    args = vars(parser.parse_args(argv))
    folder = args.pop("output")
    before = describe(folder)
    try:
        args["splits"] = tuple(float(s) for s in args["splits"].split(","))
        make(folder, progress=None if before else _ProgressLine(), **args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = describe(folder)
    counts = ", ".join(f"{n} {split}" for split, n in summary["counts"].items())
    print(
        f"{'already made' if before else 'made'}: {folder} ({counts}; "
        f"{summary['bytes'] / 1e6:.1f} MB; digest {summary['digest'][:12]})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
