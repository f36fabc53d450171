"""Runs the evaluators of a trained workdir once: `python -m invideo_jax.evaluate --workdir=DIR`.

Any value of the run's config can be set for the evaluation, the held-out videos among them:
`--config.data.eval=FOLDER --config.evals.reconstruction.examples=1000`. The protocol of a published benchmark sets
them all: `--config=configs/benchmarks/msrvtt_1k.py:FOLDER`.
"""

import functools
import json
import pathlib
import sys

import jax

from invideo_jax import (
    build,
    checks,
    command_line,
    metrics,
    programs,
    protocols,
    run,
    runtime,
    sharding,
    stage_words,
    stored,
    teaching,
)
from invideo_jax import config as config_lib
from invideo_jax.checkpoint import Checkpoints
from invideo_jax.data.bad import BadLedger
from invideo_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """The command line; returns an exit code of `runtime`."""
    with command_line.errors_for_people():
        arguments, overrides = _arguments(sys.argv[1:] if argv is None else argv)
        folder = pathlib.Path(arguments.workdir)
        if not folder.is_dir():
            raise UserError(f"--workdir must be the folder of a run; there is no {folder}.")
        params, meta, which = _parameters(folder, arguments.step, arguments.weights)
        config = config_lib.from_saved(meta["config"])
        stage_words.use_kept(config, folder)
        training, out = True, f"evaluation_{meta['step']:08d}"
        if arguments.config:
            recipe = config_lib.load(arguments.config)
            training = protocols.apply(config, meta["stage"], recipe.config)
            out += f"_{pathlib.Path(arguments.config.partition(':')[0]).stem}"
        for override in overrides:
            config_lib.apply_override(config, override)
        checks.check(config)
        with command_line.errors_for_people(ValueError):
            results = evaluate(config, params, meta, folder / out, training=training)
    file = folder / f"{out}.json"
    metrics.replace_file(file, json.dumps(results, indent=1).encode())
    print(f"step {meta['step']} of {folder} ({which}):")
    for name, value in results.items():
        print(f"  {name:<32} {value:.6g}")
    print(f"kept in {file}")
    return runtime.FINISHED


def evaluate(
    config, params, meta: dict, folder: pathlib.Path, *, training: bool = True
) -> dict[str, float]:
    """'<evaluator>/<value>' -> number, for every evaluator of the config.

    Args:
        config: checked.
        params: nested dictionaries of NumPy arrays.
        meta: of the checkpoint they come from.
        folder: where pictures and the list of bad videos go.
        training: whether the training videos are opened; without them classes are those of `data.eval`.
    """
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    stages = {s.name: s for s in run.place_stages(config, meta["epoch_examples"])}
    stage = stages[meta["stage"]]
    program = programs.program(config, stage)
    train_sources = _train_sources(config) if training else []
    sources = build.held_out_sources(config, train_sources)
    if not sources:
        print("note: no video is held out (data.eval): evaluating on training videos")
        sources = train_sources
    for note in dict.fromkeys(note for source in sources for note in source.notes):
        print(f"note: {note}")
    params = protocols.fit(params, program, _as_trained(config, meta, program), mesh)
    ledger = BadLedger(folder / "bad_examples.jsonl", max_share=1.0)
    ready = build.evaluators(
        config,
        program,
        mesh=mesh,
        train=train_sources if training else sources,
        held_out=sources,
        folder=folder,
        teach=_teach(program, mesh, meta["teacher"]),
        ledger=ledger,
        only_due=False,
    )
    with sharding.use(mesh):
        return {
            f"{name}/{key}": value
            for name, evaluator in ready.items()
            for key, value in evaluator.run(params, meta["step"])
        }


def _as_trained(config, meta: dict, program: programs.Program) -> programs.Program:
    """The program that the parameters come from: the same, but where clips are of another size now."""
    saved, name = config_lib.from_saved(meta["config"]), meta["stage"]
    shape = lambda c: (c.stages[name].clip.frames, c.stages[name].clip.size)
    return program if shape(saved) == shape(config) else programs.program(saved, program.stage)


def _train_sources(config):
    """The training sources; none where they are elsewhere now and the evaluation has its own."""
    try:
        return build.train_sources(config)[0]
    except ValueError:
        if not config.data.eval:
            raise
        print(
            "note: the training videos are not here (data.train); labels count as data.eval has them"
        )
        return []


def _teach(program: programs.Program, mesh: jax.sharding.Mesh, digest: str):
    """What adds the teacher's entries to a batch; UserError for another teacher than the run's.

    It is loaded when the first batch comes: most evaluations ask for none.
    """

    @functools.cache
    def loaded():
        teach, found = teaching.start(program, mesh)
        if found != digest:
            raise UserError(f"The run's teacher must be there (digest {digest}); got {found}.")
        return teach

    return lambda batch: loaded()(batch)


def _parameters(folder: pathlib.Path, step: int | None, which: str | None):
    """Parameters to judge, the meta of their checkpoint, and which they are."""
    if which is None:
        kept = Checkpoints(folder / "checkpoints", trainer=False)
        newest = kept.latest() if step is None else step
        leaves = kept.meta(newest)["checkpoint"]["leaves"] if newest is not None else {}
        which = "ema" if any(name.startswith("ema/") for name in leaves) else "params"
    return *stored.read_params(folder, step, which), which


def _arguments(argv):
    rest, overrides = command_line.split_overrides(argv)
    parser = command_line.Parser(
        prog="python -m invideo_jax.evaluate", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a run")
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="a protocol, as configs/benchmarks/msrvtt_1k.py:FOLDER; the run's own evaluators by default",
    )
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument(
        "--weights",
        choices=("params", "ema"),
        help="by default the moving average where the run keeps one, as during training",
    )
    return parser.parse_args(rest), overrides


if __name__ == "__main__":
    sys.exit(main())
