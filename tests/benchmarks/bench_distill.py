"""Does distillation teach? A small teacher, a smaller student, the built-in dataset: minutes on a CPU.

    python tests/benchmarks/bench_distill.py --output=DIR [--clips=3000] [--teacher_steps=1500] [--student_steps=1500]

Makes the dataset, trains a classifier on its labels (motions) as the teacher, distils it into a student that sees
a fifth of the tokens and no label, and compares the student before and after: 2 - 2 cos to the teacher's
features, and a linear probe of its pooled feature. Prints a table, and keeps it in DIR/result.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from invideo_jax import build, programs, run, sharding, stored, teaching
from invideo_jax import config as config_lib

TEACHER = dict(
    size="Micro",
    recipe="configs/internvideo2/finetune_s.py:smoke",
    settings={
        "model.layer_scale": 1.0,
        "model.drop_path": 0.0,
        "model.scan": False,
        "stages.finetune.batch_size": 32,
        "stages.finetune.smoothing": 0.0,
        "stages.finetune.mix.probability": 0.0,
        "stages.finetune.clip.crop": "center",
        "stages.finetune.clip.flip": 0.0,
        "stages.finetune.clip.randaugment": "",
        "stages.finetune.clip.erase": 0.0,
        "stages.finetune.clip.repeats": 1,
        "stages.finetune.optimizer.layer_decay": 1.0,
        "stages.finetune.optimizer.clip_norm": 1.0,
        "stages.finetune.schedule.warmup": "10%",
        "evals.classification.every": "100%",
        "evals.classification.examples": 10_000,
        "log.every": "100 steps",
        "checkpoint.every": "100%",
    },
)


def train(recipe: str, workdir: pathlib.Path, settings: dict) -> float:
    """Runs the training command; returns its seconds of wall time."""
    values = [f"--config.{key}={value}" for key, value in settings.items()]
    start = time.time()
    command = [sys.executable, "-m", "invideo_jax.train", f"--config={recipe}", *values]
    subprocess.run([*command, f"--workdir={workdir}"], check=True)
    return time.time() - start


def make_data(folder: pathlib.Path, clips: int) -> None:
    """The built-in dataset at the size that the models see."""
    if not (folder / "manifest.jsonl").exists():
        command = [sys.executable, "-m", "invideo_jax.data.synthetic", f"--output={folder}"]
        subprocess.run([*command, f"--clips={clips}", "--size=32", "--workers=2"], check=True)


def judge(recipe: str, settings: dict, workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """What the evaluators say of the student before its first step, and after its last."""
    values = [f"{key}={value}" for key, value in settings.items()]
    config = config_lib.load(recipe, values).config
    config.evals.probe = dict(every="100%", examples=10_000, train_examples=100_000)
    mesh = sharding.make_mesh()
    sources, _ = build.train_sources(config)
    (stage,) = run.place_stages(config, sum(map(len, sources)))
    program = programs.program(config, stage)
    teach, _ = teaching.start(program, mesh)
    ready = build.evaluators(
        config,
        program,
        mesh=mesh,
        train=sources,
        held_out=build.held_out_sources(config, sources),
        folder=workdir,
        teach=teach,
    )
    state = sharding.create_sharded_state(program.init_params, program.make_state, mesh)
    last, _ = stored.read_params(workdir, None, "params")
    found = {}
    with sharding.use(mesh):
        for name, params in (("at the start", state.params), ("distilled", last)):
            params = jax.tree.map(jax.numpy.asarray, params)
            found[name] = {
                f"{which}/{key}": value
                for which, evaluator in ready.items()
                for key, value in evaluator.run(params, 0)
            }
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--teacher_steps", type=int, default=1500)
    parser.add_argument("--teacher_rate", type=float, default=3e-3)
    parser.add_argument("--student_steps", type=int, default=1500)
    given = parser.parse_args()
    data, teacher, student = (given.output / name for name in ("data", "teacher", "student"))
    make_data(data, given.clips)
    both = {"data.train": f"synthetic:{data}"}
    seconds = {}
    settings = both | TEACHER["settings"] | {"model.size": TEACHER["size"]}
    settings["stages.finetune.length"] = f"{given.teacher_steps} steps"
    settings["stages.finetune.optimizer.learning_rate"] = given.teacher_rate
    seconds["teacher"] = train(TEACHER["recipe"], teacher, settings)
    recipe = "configs/internvideo2/distill_small.py"
    settings = both | {
        "stages.aligned.length": f"{given.student_steps} steps",
        "stages.aligned.teachers.clip.source": str(teacher),
        "stages.aligned.teachers.clip.size": TEACHER["size"],
        "stages.aligned.teachers.clip.rename": "('^encoder/->',)",
        "stages.aligned.teachers.clip.leftover": "('^(?!encoder/)',)",
    }
    seconds["student"] = train(recipe, student, settings)
    found = judge(recipe, settings, student)
    found["seconds"] = seconds
    (given.output / "result.json").write_text(json.dumps(found, indent=1))
    rows = sorted(found["distilled"])
    print(f"{'':24}{'at the start':>14}{'distilled':>12}")
    for row in rows:
        print(f"{row:24}{found['at the start'][row]:14.4f}{found['distilled'][row]:12.4f}")
    print({name: np.round(value) for name, value in seconds.items()})


if __name__ == "__main__":
    main()
