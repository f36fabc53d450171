"""Speed of reading the sound of clips: ours against decoding the same sound and doing nothing with it.

    python tests/benchmarks/bench_audio.py [--repeats=9] [FILES...]

Without FILES, writes files of 60 s with a small picture and sound that is noise under slow swells: AAC, MP3 and FLAC in MP4, Opus in
Matroska. From each, 10 s are taken at random places. Prints seconds of sound per CPU-second, which is per core, of

    plain     PyAV opens the file, seeks, and decodes up to the end of the part
    ffmpeg    `ffmpeg -ss -t -vn -ac 1 -ar 16000 -f null`, 4 parts in 4 processes, less as many starts that read 10 ms; only where
              it is installed
    read      read_sound: mono, 16 kHz, on the clock of the pictures
    load      load_audio: the whole of it, to the normalised filter bank
    bank      the filter bank alone

and the shares of the limits. Methods take turns on the same parts; medians over repeats of the speeds, and of the shares within one
repeat, which other load on the machine changes less.
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

from sound_files import write_sound_file  # noqa: E402

from invideo_jax.data.audio import AudioSpec, filter_bank, load_audio  # noqa: E402
from invideo_jax.data.sound import read_sound  # noqa: E402

PART = 10.0
BATCH = 4  # parts a measurement, against the coarse clock
TRACKS = {
    "aac.mp4": ("aac", "fltp", 44100),
    "mp3.mp4": ("libmp3lame", "fltp", 44100),
    "flac.mp4": ("flac", "s16", 44100),
    "opus.mkv": ("libopus", "flt", 48000),
}


def make_files(folder: str) -> list[str]:
    paths = []
    for name, (codec, sample_format, rate) in TRACKS.items():
        rng, times = np.random.default_rng(0), np.arange(60 * rate) / rate
        wave = rng.standard_normal((2, len(times))) * 0.1 * (1 + np.sin(times))
        paths.append(
            write_sound_file(
                os.path.join(folder, name),
                wave,
                rate=rate,
                layout="stereo",
                codec=codec,
                sample_format=sample_format,
                seconds=60.0,
            )
        )
    return paths


def decode_plainly(path: str, begin: float) -> None:
    with av.open(path) as container:
        stream = container.streams.audio[0]
        stream.thread_count = 1
        container.seek(round(begin / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= begin + PART:
                break


def decode_by_ffmpeg(path: str, begin: float, seconds: float = PART) -> None:
    command = ["ffmpeg", "-nostdin", "-v", "fatal", "-threads", "1", "-ss", str(begin)]
    command += [
        "-t",
        str(seconds),
        "-i",
        path,
        "-vn",
        "-ac",
        "1",
        "-ar",
        "16000",
        "-f",
        "null",
        "-",
    ]
    subprocess.run(command, check=True)


def cpu_seconds(work) -> float:
    def now() -> float:
        usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usages)

    begin = now()
    work()
    return now() - begin


def measure(path: str, repeats: int) -> dict[str, np.ndarray]:
    """CPU seconds a part of each method, each repeat with random parts of its own, equal for all methods."""
    spec, samples = AudioSpec(), np.random.default_rng(0).standard_normal(160000) * 0.1
    with av.open(path) as container:
        length = container.duration / av.time_base
    spent: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        begins = np.random.default_rng(repeat).uniform(0, max(length - PART, 0), BATCH)
        methods = {
            "plain": lambda b: decode_plainly(path, b),
            "read": lambda b: read_sound(path, start=b, end=b + PART),
            "load": lambda b: load_audio(path, spec, None, start=b, end=b + PART),
            "bank": lambda b: filter_bank(samples),
        }
        if shutil.which("ffmpeg"):
            methods["ffmpeg"] = lambda b: decode_by_ffmpeg(path, b)
            methods["start"] = lambda b: decode_by_ffmpeg(path, b, 0.01)
        for name, work in methods.items():
            seconds = cpu_seconds(lambda w=work, at=begins: [w(b) for b in at])
            spent.setdefault(name, []).append(seconds / BATCH)
    spent = {name: np.asarray(values[1:]) for name, values in spent.items()}  # first: warm-up
    if "ffmpeg" in spent:
        spent["ffmpeg"] = np.maximum(spent["ffmpeg"] - spent.pop("start"), 1e-4)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    names = ("plain", "ffmpeg", "read", "load", "bank")
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'file':20}" + "".join(f"{name:>9}" for name in names), end="")
        print("   read, load of plain   of ffmpeg")
        for path in given.files or make_files(folder):
            spent = measure(path, given.repeats)
            spent.setdefault("ffmpeg", np.full(given.repeats, np.nan))
            speeds = [PART / statistics.median(spent[name]) for name in names]
            shares = [
                statistics.median(spent[limit] / spent[name])
                for limit in ("plain", "ffmpeg")
                for name in ("read", "load")
            ]
            print(
                f"{os.path.basename(path)[-20:]:20}" + "".join(f"{speed:9.0f}" for speed in speeds),
                "{:14.2f} {:7.2f} {:9.2f} {:6.2f}".format(*shares),
                flush=True,
            )


if __name__ == "__main__":
    main()
