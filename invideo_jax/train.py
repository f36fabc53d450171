"""Trains a recipe, from its files to its report: `python -m invideo_jax.train --config=FILE --workdir=DIR`.

The same command goes on where a run stopped, after any kind of end. This file decides, in the order of
the run; what it calls computes. A batch goes from `build.loader` (files to NumPy) through
`sharding.global_batch` (to the devices) into the stage's train step (`steps/`).
"""

import contextlib
import json
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax

from invideo_jax import (
    build,
    checks,
    command_line,
    explain,
    metrics,
    progress,
    report,
    runtime,
    sharding,
    stages,
    workdir,
)
from invideo_jax import config as config_lib
from invideo_jax.checkpoint import Checkpoints
from invideo_jax.data.bad import BadLedger
from invideo_jax.errors import UserError
from invideo_jax.scale import flops
from invideo_jax.state import TrainState
from invideo_jax.steps.update import name_of_leaf

# Keys that may change from one start of a run to the next without being allowed by name: the training
# does not depend on them (on `mesh` only by the order of floating-point sums).
FREE_KEYS = (
    "checkpoint",
    "data.decode_seconds",
    "data.threads",
    "data.workers",
    "evals",
    "guard",
    "log",
    "mesh",
)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns an exit code of `runtime`."""
    with command_line.errors_for_people():
        arguments, overrides = command_line.training_arguments(
            sys.argv[1:] if argv is None else argv
        )
        recipe = config_lib.load(arguments.config, overrides)
        checks.check(recipe.config)
        if arguments.explain:
            return explain_recipe(recipe)
        runtime.start(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
        with Run(recipe, pathlib.Path(arguments.workdir), allow=arguments.allow_change) as run:
            return run.all_stages()


def place_stages(config, epoch_examples: int | None) -> tuple[stages.Stage, ...]:
    """The recipe's stages in order, with their lengths in steps."""
    names = config.stage_order
    return stages.plan(
        names,
        {name: config.stages[name].length for name in config.stages},
        batch_sizes={name: config.stages[name].batch_size for name in names},
        epoch_examples={name: epoch_examples for name in names},
        total_steps=config.total_steps or None,
    )


def explain_recipe(recipe: config_lib.Recipe) -> int:
    """Prints where every config value comes from, and every parameter with its place on the devices."""
    config = recipe.config
    rows = [("key", "value", "set by")]
    for key, value in config_lib.flatten(config).items():
        rows.append((key, repr(value), recipe.source[key]))
    print(explain.columns(rows))
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    for stage in place_stages(config, epoch_examples=10**6):  # the data need not be here
        program = build.program(config, stage)
        state = sharding.abstract_sharded_state(program.init_params, program.make_state, mesh)
        boxed = jax.eval_shape(program.init_params)
        print(
            f"\nStage {stage.name}: {config.stages[stage.name].length}, {stage.batch_size} clips a step"
        )
        print(explain.table(boxed, state, mesh))
    return runtime.FINISHED


class Run:
    """One start of a run: what all stages share, open from `with` to its end.

    Args:
        recipe: the checked recipe.
        folder: the workdir.
        allow: config keys that may differ from those the workdir was made with.
    """

    def __init__(self, recipe: config_lib.Recipe, folder: pathlib.Path, *, allow=()):
        self.recipe, self.config, self.folder = recipe, recipe.config, folder
        self.allow = list(allow)
        self.first = jax.process_index() == 0
        self.step = 0  # updates done, over all stages
        self.state: TrainState | None = None
        self.window: dict[str, Any] | None = None  # metrics of a log window that a checkpoint cut
        self.pending: list[str] = []  # evaluations due at this step and not done yet
        self.results: dict[str, float] = {}  # of evaluations at this step
        self.clock = progress.Clock()

    # ------------------------------------------------------------------------------ before the first step

    def __enter__(self) -> "Run":
        config, keep = self.config, self.config.checkpoint
        with contextlib.ExitStack() as stack, command_line.errors_for_people(ValueError):
            _on_all(self._look)
            runtime.same_everywhere(
                {"config": config_lib.to_json(config), "data": json.dumps(self.data)}
            )
            if self.first:
                lock = workdir.Lock(self.folder)
                _on_all(lambda: stack.enter_context(lock))
            else:
                _on_all(lambda: None)
            self.checkpoints = stack.enter_context(
                Checkpoints(
                    self.folder / "checkpoints", keep_last=keep.keep_last, keep_best=keep.keep_best
                )
            )
            runtime.before_exit(self.checkpoints.last_words)
            self._refuse_other_config()
            use_compilation_cache(self.folder)
            self.watchdog = stack.enter_context(
                runtime.Watchdog(self.folder, {"step": config.guard.hang_seconds})
            )
            self._restore()
            self._write_facts()
            self.writer = metrics.open_writers(
                self.folder, steps_done=self.step or None, tensorboard=config.log.tensorboard
            )
            stack.callback(self.writer.close)
            number = (
                "" if self.first else f"-{jax.process_index()}"
            )  # each process lists what it read
            self.ledger = BadLedger(
                self.folder / f"bad_examples{number}.jsonl",
                max_share=config.data.bad_share,
                min_count=config.data.bad_count,
                total=sum(map(len, self.sources)),
            )
            self._close = stack.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._close.__exit__(*error)

    def _look(self) -> None:
        """Everything that can be wrong with config, machine and data, before anything is written."""
        config = self.config
        self.mesh = sharding.make_mesh(**config.mesh.to_dict())
        self.sources, self.weights = build.train_sources(config)
        self.held_out = build.held_out_sources(config, self.sources)
        self.plan = place_stages(config, sum(map(len, self.sources)))
        self.programs = {stage.name: self._program(stage) for stage in self.plan}
        self.data = {source.name: source.fingerprint() for source in self.sources}

    def say(self, text: str) -> None:
        """Prints on the first process."""
        if self.first:
            print(text, flush=True)

    def _program(self, stage: stages.Stage) -> build.Program:
        """The stage's program, checked against mesh and data before anything is compiled."""
        options, videos = self.config.stages[stage.name], sum(map(len, self.sources))
        if videos < stage.batch_size:
            raise UserError(
                f"The training set must hold at least one batch; got {videos} videos, "
                f"stages.{stage.name}.batch_size={stage.batch_size}. Lower the batch size or add videos."
            )
        sharding.check_batch(self.mesh, stage.batch_size, accumulation=options.accumulation)
        program = build.program(self.config, stage)
        sharding.check_heads(self.mesh, program.model.heads)
        sharding.check_heads(self.mesh, program.model.decoder_heads, name="decoder_heads")
        return program

    def _refuse_other_config(self) -> None:
        """A workdir belongs to one config and one set of data; changes must be allowed by name."""
        latest = self.checkpoints.latest()
        if latest is None:
            return
        meta = self.checkpoints.meta(latest)
        now = self.config.to_dict() | {"data_found": self.data}
        saved = meta["config"] | {"data_found": meta["data"]}
        changed = config_lib.require_unchanged(saved, now, free=FREE_KEYS, allowed=self.allow)
        for key, (old, new) in changed.items():
            self.say(f"changed since the last checkpoint: {key}: {old!r} -> {new!r}")

    def _restore(self) -> None:
        """Takes up the newest good checkpoint, or makes fresh parameters."""
        latest = self.checkpoints.latest()
        name = self.checkpoints.meta(latest)["stage"] if latest is not None else self.plan[0].name
        program = self.programs[name]
        abstract = sharding.abstract_sharded_state(
            program.init_params, program.make_state, self.mesh
        )
        _on_all(lambda: self._check_space(abstract))
        found = self.checkpoints.restore(abstract, log=self.say)
        if found is None:
            self.state = sharding.create_sharded_state(
                program.init_params, program.make_state, self.mesh
            )
            return
        self.state, meta = found
        self.step, self.window, self.pending = meta["step"], meta["window"], meta["pending"]

    def _check_space(self, state: TrainState) -> None:
        """Raises unless the checkpoints that this run keeps will fit; only the first process looks."""
        if self.first:
            keep = self.config.checkpoint
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
            there = len(self.checkpoints.steps())
            workdir.check_space(self.folder, size, keep.keep_last + keep.keep_best, existing=there)

    def _write_facts(self) -> None:
        """Keeps the resolved config and the environment in the workdir; prints what will run."""
        self.environment = environment = runtime.environment()
        command = shlex.join(["python", "-m", "invideo_jax.train", *sys.argv[1:]])
        if self.first:
            boxed = jax.eval_shape(self.programs[self.plan[0].name].init_params)
            table = metrics.parameter_table(sharding.unbox(boxed))
            for name, text in {
                "config.json": config_lib.to_json(self.config),
                "config_sources.json": json.dumps(self.recipe.source, indent=1),
                "environment.json": json.dumps(environment | {"command": command}, indent=1),
                "parameters.txt": table,
            }.items():
                metrics.replace_file(self.folder / name, text.encode())
        videos = " + ".join(f"{len(s):,} videos of {s.name}" for s in self.sources)
        held_out = sum(map(len, self.held_out))
        if not self.held_out:
            self.held_out = self.sources
            self.say("note: no video is held out (data.eval): evaluations look at training videos")
        self.say(f"{self.recipe.spec} in {self.folder}, on {environment['devices']}")
        self.say(f"{videos}; {held_out:,} held out" if held_out else f"{videos}; none held out")
        for note in (note for source in self.sources for note in source.notes):
            self.say(f"note: {note}")

    # ------------------------------------------------------------------------------ the stages

    def all_stages(self) -> int:
        """Runs what is not done yet; returns the exit code."""
        if self.step >= self.plan[-1].last:
            self.say(f"This run is done: all {self.step} steps.")
        for stage in self.plan:
            if self.step < stage.last:
                if self.step == stage.first > 0:
                    self._hand_over(stage)
                code = self._train(self.programs[stage.name])
                if code != runtime.FINISHED:
                    return code
        self.checkpoints.wait()
        if self.first:
            self.writer.flush()
            page = report.build(self.folder)
            self.say(f"\nThe report: {page}")
        return runtime.FINISHED

    def _hand_over(self, stage: stages.Stage) -> None:
        """The next stage starts with the parameters of the last one, and with a fresh optimiser."""
        program, params = self.programs[stage.name], self.state.params
        wanted = sharding.unbox(jax.eval_shape(program.init_params))
        if jax.tree.map(lambda x: x.shape, params) != jax.tree.map(lambda x: x.shape, wanted):
            raise UserError(
                f"Stage {stage.name} must have the parameters of the stage before it; some differ "
                "in name or shape. Give both the same model."
            )
        abstract = sharding.abstract_sharded_state(
            program.init_params, program.make_state, self.mesh
        )
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        with sharding.use(self.mesh):
            self.state = jax.jit(program.make_state, out_shardings=shardings)(params)
        self.say(
            f"Stage {stage.name} starts with the parameters of the last one, at step {self.step}."
        )

    def _train(self, program: build.Program) -> int:
        """Trains one stage to its end, or until the run must stop; returns the exit code."""
        config, stage = self.config, program.stage
        log_every = stage.to_steps(config.log.every, name="log.every")
        save_every = stage.to_steps(config.checkpoint.every, name="checkpoint.every")
        self._open_stage(program, log_every)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        train_step = jax.jit(program.train_step, donate_argnums=0, out_shardings=(shardings, None))
        batches = build.loader(
            config,
            stage,
            self.sources,
            weights=self.weights,
            batch_size=stage.batch_size,
            rows=sharding.rows_of_process(self.mesh, stage.batch_size),
            start_step=self.step - stage.first,
            steps=stage.last - self.step,
            ledger=self.ledger,
        )
        with sharding.use(self.mesh), batches:
            stop = (
                not self._evaluate_pending()
            )  # a run that was stopped before an evaluation was due
            stream, compiling = iter(batches), True
            while self.step < stage.last and not stop:
                with self.clock.waiting():
                    host_batch, _ = next(stream)
                batch = sharding.global_batch(host_batch, self.mesh)
                with self.clock.pause() if compiling else contextlib.nullcontext():
                    self.state, out = train_step(self.state, batch)
                compiling = False
                self.step += 1
                self.watchdog.beat("step")
                self._log(self.buffer.add(self.step, out))
                self._stop_on_bad_numbers()
                stop = runtime.preempted()

                inside = self.step - stage.first
                self.pending = [n for n, every in self.eval_every.items() if inside % every == 0]
                stop = stop or not self._evaluate_pending()
                if stop or inside % save_every == 0 or inside == stage.steps:
                    self._save(wait=stop or inside == stage.steps)
                elif self.checkpoints.retry_due():
                    self._save()
        if stop:
            self.say(f"Stopped and saved at step {self.step}; the same command goes on from here.")
            return runtime.stop_code()
        return runtime.FINISHED

    def _open_stage(self, program: build.Program, log_every: int) -> None:
        """What lasts as long as the stage: metrics, progress lines, evaluators."""
        stage, peak = program.stage, flops.device_peak_flops()
        self.program = program
        self.buffer = metrics.MetricsBuffer(every=log_every, state=self.window)
        self.window = None
        self.progress = progress.Progress(
            stage=stage.name,
            total_steps=stage.steps,
            clips_per_step=stage.batch_size,
            tokens_per_clip=program.visible_tokens,
            flops_per_clip=program.flops_per_clip,
            peak_flops=peak and peak * self.mesh.size,
            stream=sys.stdout if self.first else None,
        )
        self.evaluators = build.evaluators(
            self.config,
            program,
            mesh=self.mesh,
            sources=self.held_out,
            folder=self.folder,
            on_batch=lambda: self.watchdog.beat("eval"),
        )
        self.eval_every = {
            name: stage.to_steps(self.config.evals[name].every, name=f"evals.{name}.every")
            for name in self.evaluators
        }
        self.clock.lap()

    def _log(self, windows: list[metrics.Window]) -> None:
        stage = self.program.stage
        for window in windows:
            perf = self.progress.update(window, self.clock.lap(), step=window.step - stage.first)
            named = {f"{stage.name}/{name}": value for name, value in window.values.items()}
            self.writer.write_scalars(window.step, named | perf)

    def _stop_on_bad_numbers(self) -> None:
        """Ends the run when too many updates in a row were not finite; nothing of them was applied."""
        step, values = self.buffer.latest or (0, {})
        limit = self.config.guard.nonfinite_in_a_row
        if values.get("skipped_in_a_row", 0) < limit:
            return
        params, trainable = self.state.params, self.program.trainable
        name = name_of_leaf(int(values["first_nonfinite"]), params, trainable)
        raise runtime.RunError(
            f"{limit} updates in a row were not finite, the last at step {step}; the first such number "
            f"was in: {name}. None of them was applied, and nothing was saved since. Lower the learning "
            "rate, clip gradients (optimizer.clip_norm), or look at the data of these steps; then start "
            "the same command again.",
            runtime.NUMBERS,
        )

    def _evaluate_pending(self) -> bool:
        """Does the evaluations that are due; False when the run must stop before all were done."""
        while self.pending:
            if runtime.preempted():
                return False
            name = self.pending[0]
            self._log(self.buffer.drain())
            with self.clock.pause():
                params = self.state.ema or self.state.params
                found = dict(self.evaluators[name].run(params, self.step))
                self.results |= {f"{name}/{key}": value for key, value in found.items()}
                self.writer.write_scalars(
                    self.step, {f"eval/{name}/{key}": value for key, value in found.items()}
                )
            shown = "  ".join(f"{key} {value:.4f}" for key, value in sorted(found.items()))
            self.progress.say(f"{name} of held-out clips at step {self.step}:  {shown}")
            self.watchdog.beat("step")
            del self.pending[0]
        return True

    def _save(self, *, wait: bool) -> None:
        """Saves everything that the rest of the run depends on, under the number of the step."""
        ended = self.step == self.program.stage.last
        self._log(self.buffer.finish() if ended else self.buffer.drain())
        with self.clock.pause():
            self.watchdog.beat("save")
            self.writer.flush()
            meta = dict(
                step=self.step,
                stage=self.program.stage.name,
                stage_step=self.step - self.program.stage.first,
                window=self.buffer.state(),
                pending=self.pending,
                config=self.config.to_dict(),
                data=self.data,
                epoch_examples=sum(map(len, self.sources)),
                environment=self.environment,
            )
            best = None if self.pending else self.results.get(self.config.checkpoint.best)
            self.checkpoints.save(self.step, self.state, meta, metric=best, wait=wait)
            self.results = {}
            self.watchdog.beat("step")


def _on_all(action: Callable[[], Any]) -> None:
    """Does it on every process; an error of any process is raised on all, so that none waits for it."""
    error = None
    try:
        action()
    except Exception as caught:
        error = caught
    runtime.fail_together(error)


def use_compilation_cache(folder: pathlib.Path) -> None:
    """Keeps compiled programs in the workdir, so that a resumed run need not compile again."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "compilation_cache"))


if __name__ == "__main__":
    sys.exit(main())
