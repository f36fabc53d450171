"""Does distillation teach? The quickstart's encoder, a smaller student, the built-in dataset: minutes on a CPU.

    python tests/benchmarks/bench_distill.py --teacher=WORKDIR --data=FOLDER --output=DIR [--steps=800]

WORKDIR and FOLDER are what the quickstart leaves (workdir, data/synthetic). The student sees a fifth of the tokens and
no label. Prints, for the student before its first step and after its last one: 2 - 2 cos to
the teacher's features on held-out clips, and linear probes of the mean of its patch tokens. Kept in DIR/result.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import jax

from invideo_jax import build, programs, run, sharding, stored, teaching
from invideo_jax import config as config_lib

RECIPE = "configs/internvideo2/distill_small.py"
# What is probed, of the object that a clip is about: attributes of the built-in dataset, and their number.
PROBES = ("colour", "texture", "shape", "motion")


def relabelled(data: pathlib.Path, attribute: str, file: pathlib.Path) -> str:
    """A manifest of the same clips whose labels are the values of an attribute."""
    rows = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    values = sorted({row["attributes"][attribute] for row in rows})
    kept = [
        {
            "path": str((data / row["path"]).resolve()),
            "split": row["split"],
            "label": values.index(row["attributes"][attribute]),
        }
        for row in rows
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return str(file)


def judge(settings: list[str], workdir: pathlib.Path, output: pathlib.Path) -> dict[str, dict]:
    """Distance to the teacher, and probes, of the student before and after training."""
    found: dict[str, dict[str, float]] = {"at the start": {}, "distilled": {}}
    for attribute in (None, *PROBES):
        config = config_lib.load(RECIPE, settings).config
        if attribute is not None:
            file = output / f"{attribute}.jsonl"
            data = pathlib.Path(config.data.train.removeprefix("synthetic:"))
            config.data.train = relabelled(data, attribute, file)
            config.data.roots = (str(data.resolve()),)
            with config.unlocked():
                config.evals = dict(probe=dict(every="100%", examples=10**6, train_examples=10**6))
        sources, _ = build.train_sources(config)
        (stage,) = run.place_stages(config, sum(map(len, sources)))
        program, mesh = programs.program(config, stage), sharding.make_mesh()
        held_out = build.held_out_sources(config, sources)
        folder = dict(train=sources, held_out=held_out, folder=output)
        teach, _ = teaching.start(program, mesh)
        ready = build.evaluators(config, program, mesh=mesh, teach=teach, **folder)
        state = sharding.create_sharded_state(program.init_params, program.make_state, mesh)
        last, _ = stored.read_params(workdir, None, "params")
        with sharding.use(mesh):
            for name, params in (("at the start", state.params), ("distilled", last)):
                params = jax.tree.map(jax.numpy.asarray, params)
                for evaluator in ready.values():
                    values = dict(evaluator.run(params, 0))
                    found[name] |= _named(values, attribute)
    return found


def _named(values: dict[str, float], attribute: str | None) -> dict[str, float]:
    if attribute is None:
        return {"distance to the teacher": values["mae"]}
    return {f"probe of {attribute}": values["top1"]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    student = given.output / "student"
    settings = [
        f"data.train=synthetic:{given.data}",
        f"stages.aligned.length={given.steps} steps",
        f"stages.aligned.teachers.mae.source={given.teacher}",
    ]
    start = time.time()
    command = [sys.executable, "-m", "invideo_jax.train", f"--config={RECIPE}"]
    command += [f"--config.{setting}" for setting in settings]
    subprocess.run([*command, f"--workdir={student}"], check=True)
    seconds = time.time() - start
    found = judge(settings, student, given.output)
    found["seconds"] = seconds
    (given.output / "result.json").write_text(json.dumps(found, indent=1))
    print(f"{'':28}{'at the start':>14}{'distilled':>12}")
    for row in found["distilled"]:
        print(f"{row:28}{found['at the start'][row]:14.3f}{found['distilled'][row]:12.3f}")
    print(f"{given.steps} steps, {seconds:.0f} s with compilation")


if __name__ == "__main__":
    main()
