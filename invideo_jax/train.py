"""Trains a recipe, from its files to its report: `python -m invideo_jax.train --config=FILE --workdir=DIR`.

The same command goes on where a run stopped, after any kind of end. `run.py` opens and restores a run; what happens
then is here. A batch goes from `build.loader` (files to NumPy) through `sharding.global_batch` (to the
devices) into the stage's train step (`steps/`).
"""

import contextlib
import pathlib
import sys

import jax

from invideo_jax import (
    build,
    checks,
    command_line,
    explain,
    metrics,
    programs,
    progress,
    report,
    runtime,
    sharding,
    stages,
)
from invideo_jax import config as config_lib
from invideo_jax.errors import UserError
from invideo_jax.interop import models
from invideo_jax.registry import nearest
from invideo_jax.run import Run, place_stages
from invideo_jax.scale import flops
from invideo_jax.steps.update import name_of_leaf

AFTER_THE_RUN = """
Done. Look at the report:          {page}
List and check the checkpoints:    python -m invideo_jax.checkpoint {folder}
Evaluate on other videos:          python -m invideo_jax.evaluate --workdir={folder} --config.data.eval=FOLDER
Train on your own videos:          python -m invideo_jax.train --config=configs/internvideo1/mae_vit_s.py \\
                                       --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR"""
FIND_BY_WORDS = (
    "\nFind videos by words:              python -m invideo_jax.search --checkpoint={folder} "
    '--videos=FOLDER "WORDS"'
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
        with Trainer(recipe, pathlib.Path(arguments.workdir), allow=arguments.allow_change) as run:
            return run.all_stages()


def explain_recipe(recipe: config_lib.Recipe) -> int:
    """Prints where every config value comes from, and every parameter with its place on the devices."""
    config = recipe.config
    rows = [("key", "value", "set by")]
    for key, value in config_lib.flatten(config).items():
        rows.append((key, repr(value), recipe.source[key]))
    print(explain.columns(rows))
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    for stage in place_stages(config, epoch_examples=10**6):  # the data need not be here
        program = programs.program(config, stage)
        state = sharding.abstract_sharded_state(program.init_params, program.make_state, mesh)
        boxed = jax.eval_shape(program.init_params)
        print(
            f"\nStage {stage.name}: {config.stages[stage.name].length}, {stage.batch_size} clips a step"
        )
        print(explain.table(boxed, state, mesh))
        rows = [("parameter", "updated by", "weight decay", "factor on the rate")]
        for leaf in program.optimizer_table:
            factors = leaf.rate if isinstance(leaf.rate, tuple) else (leaf.rate,)
            shown = ", ".join(f"{factor:g}" for factor in dict.fromkeys(factors))
            rows.append((leaf.path, leaf.rule, f"{leaf.weight_decay:g}", shown))
        print(f"\n{explain.columns(rows)}")
    return runtime.FINISHED


class Trainer(Run):
    """A run that is open, and its loop over stages and steps."""

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
            last = self.programs[self.plan[-1].name]
            more = FIND_BY_WORDS if last.towers else ""
            print((AFTER_THE_RUN + more).format(page=page, folder=self.folder), flush=True)
        return runtime.FINISHED

    def _next_stage(self) -> stages.Stage | None:
        """The stage to go on with, `state` made ready for it; None when the run is complete."""
        if self.pending:  # a run was stopped before the last evaluations of its stage
            return next(stage for stage in self.plan if stage.name == self.stage_name)
        stage, inside = stages.stage_at(self.plan, self.step)
        if inside == stage.steps:
            return None
        if stage.name != self.stage_name:
            self.start(stage)
        return stage

    def _train(self, program: programs.Program) -> int:
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

    def _steps(self, program: programs.Program, save_every: int) -> bool:
        """The loop over steps; True when the run must stop before the stage's end."""
        stage, keep = program.stage, self.config.checkpoint
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        train_step = jax.jit(program.train_step, donate_argnums=0, out_shardings=(shardings, None))
        batches = build.train_loader(
            self.config,
            program,
            self.sources,
            self.weights,
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
                    host_batch, info = next(batches)
                batch = sharding.global_batch(program.with_read(host_batch, info), self.mesh)
                with self.clock.pause() if compiling else contextlib.nullcontext():
                    self.state, out = train_step(self.state, self.teach(batch))
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

    def _open_stage(self, program: programs.Program, log_every: int) -> None:
        """What lasts as long as the stage: metrics, progress lines, evaluators."""
        stage, peak = program.stage, flops.device_peak_flops()
        # Of images and sounds it is not known what a step costs: they count as none.
        counted = build.video_share(program, self.sources, self.weights)
        self.program = program
        self.teach = self.teacher_of(stage)
        self.buffer = metrics.MetricsBuffer(every=log_every, state=self.window)
        self.window = None
        self.progress = progress.Progress(
            stage=stage.name,
            total_steps=stage.steps,
            clips_per_step=stage.batch_size,
            tokens_per_clip=program.visible_tokens * counted,
            flops_per_clip=program.flops_per_clip * counted,
            peak_flops=peak and peak * self.mesh.size,
            stream=sys.stdout if self.first else None,
        )
        self.evaluators = build.evaluators(
            self.config,
            program,
            mesh=self.mesh,
            train=self.sources,
            held_out=self.held_out,
            folder=self.folder,
            teach=self.teach,
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
            perf |= {"perf/videos_bad": self.ledger.count}
            perf |= {f"perf/videos_{what}": n for what, n in self.ledger.notes.items()}
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
            self.progress.say(f"evaluation, {name} at step {self.step}:  {shown}")
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
                model=models.text_of(self.program.model),
                data=self.data,
                teacher=self.teacher_digest,
                epoch_examples=sum(map(len, self.sources)),
                environment=self.environment,
            )
            best = self.results.get(self.config.checkpoint.best)
            self.checkpoints.save(self.step, self.state, meta, metric=best, wait=wait)
            self.watchdog.beat("step")


class _Stopped(Exception):
    """The run must stop in the middle of an evaluation, which will be done again."""


if __name__ == "__main__":
    sys.exit(main())
