"""How long a train step waits for data: the real loop on real mp4 files, with 0, 1 and 2 decoding workers.

    python tests/benchmarks/bench_data_wait.py [--steps=60] [--only=ViT-S]

Trains the quickstart's model on generated 64 px videos, and ViT-S at 112 px on 320 px videos, each in its own
process; prints the share of the training time that the loop waited for the next batch (target: below 2 % with two
workers), and clips per second. Without workers two threads of the training process decode.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from data.video_files import write  # noqa: E402

from invideo_jax import metrics  # noqa: E402

COMMON = ["--config.evals.reconstruction.every=0", "--config.checkpoint.every=100000"]
SETTINGS = {
    "quickstart model, 64 px videos": ((64, 64), 16, []),
    "ViT-S 8x112x112 batch 8, 320x240 videos of 3 s": (
        (320, 240),
        75,
        [
            "--config.model.size=S",
            "--config.stages.masked.clip.frames=8",
            "--config.stages.masked.clip.size=112",
            "--config.stages.masked.clip.stride=4",
            "--config.stages.masked.clip.crop=multi_scale",
            "--config.stages.masked.batch_size=8",
            "--config.stages.masked.optimizer.name=adamw",
            "--config.stages.masked.optimizer.learning_rate=1e-3",
        ],
    ),
}


def measure(folder: pathlib.Path, videos: pathlib.Path, workers: int, steps: int, options) -> tuple:
    """(share of time waiting, clips a second) over all windows but the first, which fills the queues."""
    words = [sys.executable, "-m", "invideo_jax.train"]
    words += [
        f"--config={REPOSITORY}/configs/quickstart.py:masked",
        f"--config.data.train={videos}",
    ]
    words += [f"--workdir={folder}", f"--config.stages.masked.length={steps}", *COMMON]
    words += ["--config.log.every=10", f"--config.data.workers={workers}", *options]
    subprocess.run(words, cwd=REPOSITORY, check=True, capture_output=True)
    perf = [r["perf"] for r in metrics.read_jsonl(folder / "metrics.jsonl") if "perf" in r][1:]
    seconds = np.array([p["seconds"] for p in perf])
    waited = sum(p["data_wait"] * p["seconds"] for p in perf)
    return waited / seconds.sum(), sum(p["clips"] for p in perf) / seconds.sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    options = parser.parse_args()
    steps = options.steps
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        chosen = {name: s for name, s in SETTINGS.items() if options.only in name}
        for number, (name, (size, frames, overrides)) in enumerate(chosen.items()):
            videos = scratch / f"videos{number}"
            videos.mkdir()
            for i in range(48):
                write(str(videos / f"{i:02d}.mp4"), frames=frames, size=size)
            for workers in (0, 1, 2):
                folder = scratch / f"run{number}-{workers}"
                share, rate = measure(folder, videos, workers, steps, overrides)
                print(
                    f"{name}: {workers} workers: waits {share:6.2%}, {rate:7.1f} clips/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
