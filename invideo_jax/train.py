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
from invideo_jax.data.pipeline import MAX_POSITIONS
from invideo_jax.data.sources import count_overlap
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest
from invideo_jax.scale import flops
from invideo_jax.state import TrainState
from invideo_jax.steps.update import name_of_leaf

# Keys that may change from one start of a run to the next without being allowed by name: the training
# does not depend on them (on `mesh` only by the order of floating-point sums).
FREE_KEYS = (
    "checkpoint",
    "data.bad_count",
    "data.bad_share",
    "data.eval",
    "data.eval_split",
    "data.threads",
    "data.workers",
    "evals",
    "guard",
    "log",
    "mesh",
)

AFTER_THE_RUN = """
Done. Look at the report:          {page}
List and check the checkpoints:    python -m invideo_jax.checkpoint {folder}
Evaluate on other videos:          python -m invideo_jax.evaluate --workdir={folder} --config.data.eval=FOLDER
Train on your own videos:          python -m invideo_jax.train --config=configs/internvideo1/mae_vit_s.py \\
                                       --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR"""


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
        self.stage_name = ""  # of the stage that `state` belongs to
        self.pending: list[str] = []  # evaluations due at this step and not done yet
        self.results: dict[str, float] = {}  # of evaluations at this step
        self.clock = progress.Clock()

    # ------------------------------------------------------------------------------ before the first step

    def __enter__(self) -> "Run":
        config, keep = self.config, self.config.checkpoint
        with contextlib.ExitStack() as stack, command_line.errors_for_people(ValueError):
            _on_all(self._look)
            runtime.same_everywhere(self._identity())
            if self.first:
                lock = workdir.Lock(self.folder)
                _on_all(lambda: stack.enter_context(lock))
            else:
                _on_all(lambda: None)
            self.checkpoints = stack.enter_context(
                Checkpoints(
                    self.folder / "checkpoints",
                    keep_last=keep.keep_last,
                    keep_every=keep.keep_every or None,
                    keep_best=keep.keep_best,
                    best_mode=keep.best_mode,
                )
            )
            runtime.before_exit(self.checkpoints.last_words)
            use_compilation_cache(self.folder)
            limits = {"step": config.guard.hang_seconds, "eval": config.guard.hang_seconds}
            self.watchdog = stack.enter_context(runtime.Watchdog(self.folder, limits))
            self._restore()
            _on_all(lambda: self._open_files(stack))
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
        self._check_hand_overs()
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
        if stage.steps * stage.batch_size > MAX_POSITIONS:
            raise UserError(
                f"A stage may take at most 2^32 clips; stages.{stage.name}.length comes to {stage.steps} "
                f"steps of {stage.batch_size}. Split it in two stages."
            )
        sharding.check_batch(self.mesh, stage.batch_size, accumulation=options.accumulation)
        program = build.program(self.config, stage)
        sharding.check_heads(self.mesh, program.model.heads)
        sharding.check_heads(self.mesh, program.model.decoder_heads, name="decoder_heads")
        return program

    def _check_hand_overs(self) -> None:
        """Every stage takes over all parameters of the one before it."""
        shapes = lambda stage: jax.tree.map(
            lambda x: x.shape,
            sharding.unbox(jax.eval_shape(self.programs[stage.name].init_params)),
        )
        for before, stage in zip(self.plan, self.plan[1:]):
            if shapes(before) != shapes(stage):
                raise UserError(
                    f"Stage {stage.name} must have the parameters of stage {before.name}; some differ in "
                    "name or shape. Give both the same model."
                )

    def _identity(self) -> dict[str, str]:
        """What all processes must have in common."""
        self.environment = runtime.environment()
        parts = {key: self.environment[key] for key in ("packages", "flags", "git", "python")}
        parts |= {"config": self.config.to_dict(), "data": self.data}
        return {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}

    def _refuse_other_config(self, meta: dict[str, Any]) -> None:
        """A workdir belongs to one config and one set of data; changes must be allowed by name."""
        now = self.config.to_dict() | {"data_found": self.data}
        saved = meta["config"] | {"data_found": meta["data"]}
        changed = config_lib.require_unchanged(saved, now, free=FREE_KEYS, allowed=self.allow)
        for key, (old, new) in changed.items():
            self.say(f"changed since the last checkpoint: {key}: {old!r} -> {new!r}")

    def _abstract_state(self, stage_name: str) -> TrainState:
        """Shapes and places of the state of a stage."""
        if stage_name not in self.programs:
            raise UserError(
                f"The checkpoint is of stage {stage_name}, which stage_order lacks. Put it back."
            )
        program = self.programs[stage_name]
        return sharding.abstract_sharded_state(program.init_params, program.make_state, self.mesh)

    def _restore(self) -> None:
        """Takes up the newest good checkpoint of this config, or makes fresh parameters."""

        def wanted(meta: dict[str, Any]) -> TrainState:
            self._refuse_other_config(meta)
            return self._abstract_state(meta["stage"])

        first = self.plan[0].name
        _on_all(lambda: self._check_space(self._abstract_state(first)))
        found = self.checkpoints.restore(wanted, log=self.say)
        if found is None:
            program = self.programs[first]
            self.stage_name = first
            self.state = sharding.create_sharded_state(
                program.init_params, program.make_state, self.mesh
            )
            return
        self.state, meta = found
        self.step, self.stage_name = meta["step"], meta["stage"]
        self.window, self.pending = meta["window"], meta["pending"]

    def _check_space(self, state: TrainState) -> None:
        """Raises unless the checkpoints that this run keeps will fit; only the first process looks."""
        if self.first:
            keep = self.config.checkpoint
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
            there = len(self.checkpoints.steps())
            workdir.check_space(self.folder, size, keep.keep_last + keep.keep_best, existing=there)

    def _open_files(self, stack: contextlib.ExitStack) -> None:
        """Keeps config and environment in the workdir, opens its lists, says what will run."""
        config, videos = self.config, sum(map(len, self.sources))
        if self.first:
            self._write_facts()
        self.writer = metrics.open_writers(
            self.folder, steps_done=self.step or None, tensorboard=config.log.tensorboard
        )
        stack.callback(self.writer.close)
        self.writer.write_hparams(config_lib.flatten(config))
        number = "" if self.first else f"-{jax.process_index()}"  # each process lists what it read
        bad = self.folder / f"bad_examples{number}.jsonl"
        share, count = config.data.bad_share, config.data.bad_count
        self.ledger = BadLedger(bad, max_share=share, min_count=count, total=videos)
        self.held_out_ledger = BadLedger(bad, max_share=1.0)
        self._introduce()

    def _write_facts(self) -> None:
        boxed = jax.eval_shape(self.programs[self.plan[0].name].init_params)
        command = shlex.join(["python", "-m", "invideo_jax.train", *sys.argv[1:]])
        for name, text in {
            "config.json": config_lib.to_json(self.config),
            "config_sources.json": json.dumps(self.recipe.source, indent=1),
            "environment.json": json.dumps(self.environment | {"command": command}, indent=1),
            "parameters.txt": metrics.parameter_table(sharding.unbox(boxed)),
        }.items():
            metrics.replace_file(self.folder / name, text.encode())

    def _introduce(self) -> None:
        """Says what runs on what."""
        self.say(f"{self.recipe.spec} in {self.folder}, on {self.environment['devices']}")
        videos = " + ".join(f"{len(s):,} videos of {s.name}" for s in self.sources)
        held_out = sum(map(len, self.held_out))
        self.say(f"{videos}; {held_out:,} held out" if held_out else f"{videos}; none held out")
        for note in (note for source in (*self.sources, *self.held_out) for note in source.notes):
            self.say(f"note: {note}")
        for train in self.sources:
            for other in self.held_out:
                if shared := count_overlap(train, other):
                    self.say(f"note: {shared} held-out clips are also trained on")
        if not self.held_out:
            self.held_out = self.sources
            self.say("note: no video is held out (data.eval): evaluations look at training videos")

    # ------------------------------------------------------------------------------ the stages

    def all_stages(self) -> int:
        """Runs what is not done yet; returns the exit code."""
        stage = self._next_stage()
        if stage is None:
            self.say(f"This run is done: all {self.step} steps.")
        while stage is not None:
            code = self._train(self.programs[stage.name])
            if code != runtime.FINISHED:
                return code
            stage = self._next_stage()
        self.checkpoints.wait()
        if self.first:
            self.writer.flush()
            page = report.build(self.folder)
            print(AFTER_THE_RUN.format(page=page, folder=self.folder), flush=True)
        return runtime.FINISHED

    def _next_stage(self) -> stages.Stage | None:
        """The stage to go on with, `state` made ready for it; None when the run is complete."""
        if self.pending:  # a run was stopped before the last evaluations of its stage
            return next(stage for stage in self.plan if stage.name == self.stage_name)
        stage, inside = stages.stage_at(self.plan, self.step)
        if inside == stage.steps:
            return None
        if stage.name != self.stage_name:
            self._hand_over(stage)
        return stage

    def _hand_over(self, stage: stages.Stage) -> None:
        """The next stage starts with the parameters of the last one, and with a fresh optimiser."""
        shardings = jax.tree.map(lambda x: x.sharding, self._abstract_state(stage.name))
        make_state = self.programs[stage.name].make_state
        with sharding.use(self.mesh):
            self.state = jax.jit(make_state, out_shardings=shardings)(self.state.params)
        self.stage_name = stage.name
        self.say(
            f"Stage {stage.name} starts with the parameters of the last one, at step {self.step}."
        )

    def _train(self, program: build.Program) -> int:
        """Trains one stage to its end, or until the run must stop; returns the exit code."""
        config, stage = self.config, program.stage
        log_every = stage.to_steps(config.log.every, name="log.every")
        save_every = stage.to_steps(config.checkpoint.every, name="checkpoint.every")
        self._open_stage(program, log_every)
        with sharding.use(self.mesh):
            stop = not self._evaluate_pending()  # the run was stopped before an evaluation
            if not stop and self.step < stage.last:
                stop = self._steps(program, save_every)
        if stop:
            self.say(f"Stopped at step {self.step}; the same command goes on from here.")
            return runtime.stop_code()
        return runtime.FINISHED

    def _steps(self, program: build.Program, save_every: int) -> bool:
        """The loop over steps; True when the run must stop before the stage's end."""
        stage, keep = program.stage, self.config.checkpoint
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        train_step = jax.jit(program.train_step, donate_argnums=0, out_shardings=(shardings, None))
        batches = build.loader(
            self.config,
            stage,
            self.sources,
            weights=self.weights,
            batch_size=stage.batch_size,
            rows=sharding.rows_of_process(self.mesh, stage.batch_size),
            start_step=self.step - stage.first,
            steps=stage.last - self.step,
            ledger=self.ledger,
        )
        with batches:
            compiling = True
            while True:
                with self.clock.waiting():
                    host_batch, _ = next(batches)
                batch = sharding.global_batch(host_batch, self.mesh)
                with self.clock.pause() if compiling else contextlib.nullcontext():
                    self.state, out = train_step(self.state, batch)
                compiling = False
                self.step += 1
                self.watchdog.beat("step")
                self._log(self.buffer.add(self.step, out))
                self._stop_on_bad_numbers()

                inside = self.step - stage.first
                ended = inside == stage.steps
                self.results = {}
                self.pending = [n for n, every in self.eval_every.items() if inside % every == 0]
                stop = runtime.preempted() or not self._evaluate_pending()
                rated = keep.keep_best and keep.best in self.results
                if stop or ended or rated or inside % save_every == 0:
                    self._save(wait=stop or ended)
                elif self.checkpoints.retry_due():
                    self._save(wait=False)
                if stop or ended:
                    return stop

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
            ledger=self.held_out_ledger,
            on_batch=self._between_eval_batches,
        )
        self.pending = [name for name in self.pending if name in self.evaluators]
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
        limit = min(self.config.guard.nonfinite_in_a_row, self.program.stage.steps)
        if values.get("skipped_in_a_row", 0) < limit:
            return
        params, trainable = self.state.params, self.program.trainable
        name = name_of_leaf(int(values["first_nonfinite"]), params, trainable)
        raise runtime.RunError(
            f"{limit} updates in a row were not finite, the last at step {step}; the first such number "
            f"was in: {name}. None of them was applied. Lower the learning rate, clip gradients "
            "(optimizer.clip_norm), or look at the data of these steps; then start the same command again.",
            runtime.NUMBERS,
        )

    def _between_eval_batches(self) -> None:
        self.watchdog.beat("eval")
        if runtime.preempted():
            raise _Stopped

    def _evaluate_pending(self) -> bool:
        """Does the evaluations that are due; False when the run must stop before all were done."""
        while self.pending:
            name = self.pending[0]
            self._log(self.buffer.drain())
            params = self.state.ema or self.state.params
            try:
                with self.clock.pause():
                    found = dict(self.evaluators[name].run(params, self.step))
            except _Stopped:
                return False
            finally:
                self.watchdog.beat("step")
            self.results |= {f"{name}/{key}": value for key, value in found.items()}
            self._check_best(name)
            named = {f"eval/{name}/{key}": value for key, value in found.items()}
            self.writer.write_scalars(self.step, named)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in sorted(found.items()))
            self.progress.say(f"{name} of held-out clips at step {self.step}:  {shown}")
            del self.pending[0]
        return True

    def _check_best(self, evaluator: str) -> None:
        best = self.config.checkpoint.best
        if best.startswith(f"{evaluator}/") and best not in self.results:
            raise UserError(
                f"checkpoint.best must be a result of an evaluator; got checkpoint.best={best!r}."
                + nearest(best, self.results)
            )

    def _save(self, *, wait: bool) -> None:
        """Saves everything that the rest of the run depends on, under the number of the step."""
        stage = self.program.stage
        self._log(self.buffer.finish() if self.step == stage.last else self.buffer.drain())
        self._stop_on_bad_numbers()
        with self.clock.pause():
            self.watchdog.beat("save")
            self.writer.flush()
            meta = dict(
                step=self.step,
                stage=stage.name,
                stage_step=self.step - stage.first,
                window=self.buffer.state(),
                pending=self.pending,
                config=self.config.to_dict(),
                data=self.data,
                epoch_examples=sum(map(len, self.sources)),
                environment=self.environment,
            )
            best = self.results.get(self.config.checkpoint.best)
            self.checkpoints.save(self.step, self.state, meta, metric=best, wait=wait)
            self.watchdog.beat("step")


class _Stopped(Exception):
    """The run must stop in the middle of an evaluation, which will be done again."""


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
