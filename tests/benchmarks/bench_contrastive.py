"""Does the contrastive stage learn, does the masked stage help it, does sound? The quickstart's, over several seeds.

    python tests/benchmarks/bench_contrastive.py --data=FOLDER --masked=WORKDIR --output=DIR [--seeds=0,1,2] [--steps=240]

FOLDER is the built-in dataset (data/synthetic of the quickstart), WORKDIR a run of `configs/quickstart.py:masked`, or of the
whole quickstart. Each training is a run in DIR, which a second start continues or skips; several starts with other seeds
may run at once. The table is of all runs in DIR that are finished. A seed is that of the contrastive stage: fresh
parameters, order, masks, captions; the masked stage is one run for all.

Retrieval on the held-out clips by all captions; 'hear, see' finds clips by sound and picture together, among the clips that
have a sound of their own, by captions that name it; 'see' is the same with pictures alone.
"""

import argparse
import collections
import json
import pathlib
import statistics
import subprocess
import sys

from invideo_jax import tokenizer
from invideo_jax.metrics import read_jsonl

RECIPE = "configs/quickstart.py"
AT = "stages.contrastive"
MEASURES = ("r1", "r5", "r10", "median_rank")
FUSED = [f"{AT}.text.of.video=fused+video", "evals.retrieval.text=fused"]
# What is trained: name -> words after the recipe's colon, and settings.
RUNS = {
    "from masked": ("contrastive", []),
    "from scratch": ("contrastive", [f"{AT}.init.source=fresh"]),
    "hear, see": ("contrastive,sound", []),
    "see": ("contrastive", FUSED),
}


def with_sound(data: pathlib.Path, file: pathlib.Path) -> None:
    """A list of the held-out clips whose captions name a sound."""
    rows = map(json.loads, (data / "manifest.jsonl").read_text().splitlines())
    kept = [row for row in rows if row["split"] == "validation" and row.get("audio_captions")]
    for row in kept:
        row["path"] = str((data / row["path"]).resolve())
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))


def train(name: str, seed: int, given: argparse.Namespace) -> None:
    """Runs one training to its end; a finished one ends at once."""
    words, more = RUNS[name]
    settings = [
        f"seed={seed}",
        f"data.train=synthetic:{given.data}",
        f"{AT}.length={given.steps} steps",
        f"{AT}.text.tokenizer={given.output / 'captions.model'}",
        f"{AT}.init.source={given.masked.resolve()}",
        "checkpoint.every=100%",
        "evals.retrieval.every=100%",
        *more,
    ]
    if name in ("hear, see", "see"):
        settings += [f"data.eval={given.output / 'with_sound.jsonl'}", f"data.roots={given.data}"]
    command = [sys.executable, "-m", "invideo_jax.train", f"--config={RECIPE}:{words}"]
    command += [f"--config.{setting}" for setting in settings]
    subprocess.run([*command, f"--workdir={folder(given.output, name, seed)}"], check=True)


def folder(output: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """Where a run is."""
    return output / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"


def results(output: pathlib.Path, steps: int) -> dict[str, dict[int, dict[str, float]]]:
    """name -> seed -> measure -> value at the last step, of the finished runs."""
    found: dict = collections.defaultdict(dict)
    for name in RUNS:
        for run in sorted(output.glob(folder(output, name, 0).name.removesuffix("0") + "*")):
            metrics = run / "metrics.jsonl"
            for record in read_jsonl(metrics) if metrics.is_file() else ():
                values = {k.rpartition("/")[2]: v for k, v in record.items() if "retrieval/" in k}
                if record["step"] == steps and values:
                    found[name][int(run.name.rpartition("_")[2])] = values
    return found


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """Text to video: a line for each run, then mean, standard deviation, and highest less lowest."""
    row = lambda name, what, values: f"{name:14}{what:>10}" + "".join(f"{v:>13}" for v in values)
    number = lambda values: [f"{v:.4f}" for v in values]
    lines = [row("", "seed", (*MEASURES, "chance r1"))]
    for name, seeds in found.items():
        of = "text_audio_video" if name == "hear, see" else "text_video"
        rows = {s: [v[f"{of}_{m}"] for m in MEASURES] for s, v in sorted(seeds.items())}
        chance = next(iter(seeds.values()))["chance_r1"]
        lines += [row(name, str(seed), number((*values, chance))) for seed, values in rows.items()]
        columns = list(zip(*rows.values()))
        lines.append(row(name, "mean", number(map(statistics.mean, columns))))
        if len(rows) > 1:
            lines.append(row(name, "deviation", number(map(statistics.stdev, columns))))
            lines.append(row(name, "range", number(max(c) - min(c) for c in columns)))
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--masked", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--only", default="", help="names of runs, by ';'; all of them by default")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    words = given.output / "captions.model"
    if not words.is_file():
        data = f"--data=synthetic:{given.data}"
        tokenizer.main([data, f"--output={words}", "--vocabulary=500"])
        with_sound(given.data, given.output / "with_sound.jsonl")
    for seed in filter(None, given.seeds.split(",")):
        for name in filter(None, given.only.split(";")) if given.only else RUNS:
            train(name, int(seed), given)
    print(table(results(given.output, given.steps)))


if __name__ == "__main__":
    main()
