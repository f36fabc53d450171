"""Writes what the teachers of a recipe make of each clip, so that training need not run them.

    python -m invideo_jax.teacher_cache --config=configs/internvideo2/distill_b.py --output=DIR \\
        --config.data.train=FOLDER_OR_MANIFEST --config.stages.aligned.teachers.clip.source=DIR_OF_1B \\
        --config.stages.aligned.clip.sampling=middle --config.stages.aligned.clip.crop=center \\
        --config.stages.aligned.clip.flip=0

and then the training with the same options and --config.stages.aligned.teachers.cache=DIR. Every clip must always be cut in
the same way, hence the last three options. The same command goes on where it was stopped; --part=0/4 to --part=3/4 share the
work among four machines that see one folder. The training examples are written, and the held-out ones of the evaluations.
"""

import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from invideo_jax import build, checks, command_line, run, runtime, sharding, teaching
from invideo_jax import config as config_lib
from invideo_jax.data.sources import Source
from invideo_jax.errors import UserError
from invideo_jax.feature_store import Writer
from invideo_jax.programs import Teacher, aligned
from invideo_jax.stages import Stage


def main(argv: list[str] | None = None) -> int:
    """The command line; returns an exit code of `runtime`."""
    with command_line.errors_for_people(ValueError):
        arguments, overrides = _arguments(sys.argv[1:] if argv is None else argv)
        config = config_lib.load(arguments.config, overrides).config
        checks.check(config)
        name = _stage_name(config, arguments.stage)
        aligned.require_fixed_clips(config.stages[name].clip.to_dict(), key=f"stages.{name}")
        folder = pathlib.Path(arguments.output)
        count = write(config, name, folder, batch_size=arguments.batch_size, part=arguments.part)
    print(f"{count:,} examples in {folder}")
    return runtime.FINISHED


def write(
    config: Any,
    stage_name: str,
    folder: pathlib.Path,
    *,
    batch_size: int = 8,
    part: tuple[int, int] = (0, 1),
) -> int:
    """Runs the teachers over all clips that `folder` lacks; returns the number of examples there.

    Args:
        config: checked; its clips are fixed.
        batch_size: clips at a time.
        part: (i, n): every n-th batch, from the i-th on.
    """
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    sharding.check_batch(mesh, batch_size, name="--batch_size")
    sources, _ = build.train_sources(config)
    stages = run.place_stages(config, sum(map(len, sources)))
    stage = next(stage for stage in stages if stage.name == stage_name)
    of = aligned.frozen_models(config, stage_name)
    teacher = Teacher(aligned.teacher_models(config, stage_name), of.features)
    params = teaching.place(teacher, mesh, key=f"stages.{stage_name}.teachers")
    facts = aligned.cache_facts(config, stage_name) | {"weights": teaching.digest(params)}
    features = jax.jit(teacher.apply, out_shardings=sharding.batch_sharding(mesh))
    every = [*sources, *build.held_out_sources(config, sources)]
    name = f"{part[0]}of{part[1]}"
    with Writer(folder, facts, name=name) as writer, sharding.use(mesh):
        _fill(writer, config, stage, every, mesh, lambda b: features(params, b), batch_size, part)
    return len(writer.done)


def _fill(writer, config, stage: Stage, sources: list[Source], mesh, features, rows, part) -> None:
    order = [[s.name, s.fingerprint()] for s in sources] + [rows, *part]
    order = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]
    start = writer.reached.get("steps", 0) if writer.reached.get("order") == order else 0
    steps = -(-sum(map(len, sources)) // (rows * part[1]))
    mine = np.arange(rows) + part[0] * rows
    options = dict(batch_size=rows * part[1], rows=mine, start_step=start, train=False)
    with build.loader(config, stage, sources, **options) as batches:
        for step, (host, info) in enumerate(batches, start=start + 1):
            wanted = host["valid"] & np.array([row["id"] not in writer.done for row in info])
            if wanted.any():
                made = jax.device_get(features(sharding.global_batch(host, mesh)))
                for i in np.flatnonzero(wanted):
                    writer.add(info[i]["id"], {name: x[i] for name, x in made.items()})
            writer.reached = dict(order=order, steps=step)
            if step % 20 == 0 or step == steps:
                print(f"batch {step} of {steps}, {len(writer.done):,} examples", flush=True)


def _stage_name(config: Any, name: str) -> str:
    able = [n for n in config.stage_order if "teachers" in config.stages[n]]
    if name in able or not name and len(able) == 1:
        return name or able[0]
    raise UserError(
        f"--stage must name a stage with teachers, of which this recipe has {able}; got {name!r}."
    )


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise UserError(f"--part must be I/N with I from 0 to N-1; got {text!r}.")
    return int(number), int(of)


def _arguments(argv):
    rest, overrides = command_line.split_overrides(argv)
    parser = command_line.Parser(
        prog="python -m invideo_jax.teacher_cache", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]", help="the recipe")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the features")
    parser.add_argument("--stage", default="", help="which stage, where several have teachers")
    parser.add_argument("--batch_size", type=int, default=8, help="clips at a time")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="this machine's share")
    arguments = parser.parse_args(rest)
    arguments.part = _part(arguments.part)
    return arguments, overrides


if __name__ == "__main__":
    sys.exit(main())
