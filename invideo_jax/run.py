"""One start of a run: looked at, opened and restored, up to the first step.

Everything that can be wrong is found here, in this order: machine and mesh, data, programs of all stages, agreement of all
processes, the workdir's lock, its config, its checkpoints, its files.
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
    command_line,
    metrics,
    programs,
    progress,
    runtime,
    sharding,
    stage_start,
    stage_words,
    stages,
    teaching,
    workdir,
)
from invideo_jax import config as config_lib
from invideo_jax.checkpoint import Checkpoints
from invideo_jax.data.bad import BadLedger
from invideo_jax.data.pipeline import MAX_POSITIONS
from invideo_jax.data.sources import count_overlap
from invideo_jax.errors import UserError
from invideo_jax.state import TrainState

Batch = dict[str, jax.Array]

# Keys that may change from one start of a run to the next without being allowed by name: the training
# does not depend on them (on `mesh` only by the order of floating-point sums). What `data.train` and `text.tokenizer` of a
# stage name is compared by its content (`Run.data`): one folder may be spelled in several ways, and move.
FREE_KEYS = (
    "checkpoint",
    "data.bad_count",
    "data.bad_share",
    "data.eval",
    "data.eval_split",
    "data.threads",
    "data.train",
    "data.workers",
    "evals",
    "guard",
    "log",
    "mesh",
)


def place_stages(config, epoch_examples: int | None) -> tuple[stages.Stage, ...]:
    """The recipe's stages in order, with their lengths in steps."""
    names = config.stage_order
    clips = {name: config.stages[name].clip.get("repeats", 1) for name in names}  # of each video
    return stages.plan(
        names,
        {name: config.stages[name].length for name in config.stages},
        batch_sizes={name: config.stages[name].batch_size for name in names},
        epoch_examples={name: epoch_examples and epoch_examples * clips[name] for name in names},
        total_steps=config.total_steps or None,
    )


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
        self.teacher_digest = ""  # of the stage's teacher, if it has one
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
        self.there = stage_words.at_start(config, self.folder)
        self.programs = {stage.name: self._program(stage) for stage in self.plan}
        self.starts = self._plan_starts()
        self._look_at_teachers()
        self.data = {
            f"source{number}": {"fingerprint": source.fingerprint(), "weight": weight}
            for number, (source, weight) in enumerate(zip(self.sources, self.weights))
        }
        self.tokenizers = stage_words.open_all(config, self.programs)
        stage_words.check_handed_over(self.starts, self.tokenizers)
        self.data |= {f"tokenizer/{k}": {"digest": t.digest} for k, t in self.tokenizers.items()}

    def say(self, text: str) -> None:
        """Prints on the first process."""
        if self.first:
            print(text, flush=True)

    def _program(self, stage: stages.Stage) -> programs.Program:
        """The stage's program, checked against mesh and data before anything is compiled."""
        options, videos = self.config.stages[stage.name], sum(map(len, self.sources))
        each = options.clip.get("repeats", 1)
        if videos * each < stage.batch_size:
            raise UserError(
                f"The training set must hold at least one batch; got {videos} videos with {each} clips of each, "
                f"stages.{stage.name}.batch_size={stage.batch_size}. Lower the batch size or add videos."
            )
        if stage.steps * stage.batch_size > MAX_POSITIONS:
            raise UserError(
                f"A stage may take at most 2^32 clips; stages.{stage.name}.length comes to {stage.steps} "
                f"steps of {stage.batch_size}. Split it in two stages."
            )
        sharding.check_batch(self.mesh, stage.batch_size, accumulation=options.accumulation)
        program = programs.program(self.there, stage)
        build.check_media(program, [*self.sources, *self.held_out])
        for name, heads in sharding.heads_of(program.model):
            sharding.check_heads(self.mesh, heads, name=name)
        for teacher, frozen in program.teacher.models.items() if program.teacher else ():
            for name, heads in sharding.heads_of(frozen.model) if frozen.model else ():
                sharding.check_heads(self.mesh, heads, name=f"teachers.{teacher}.{name}")
        return program

    def _plan_starts(self) -> dict[str, stage_start.Start]:
        """Where the parameters of each stage come from."""
        starts, before = {}, None
        for stage in self.plan:
            program = self.programs[stage.name]
            starts[stage.name] = stage_start.plan(self.config, program, self.mesh, before=before)
            before = program
        return starts

    def _look_at_teachers(self) -> None:
        """Looks whether the teachers of all stages are there."""
        data, ids = self.config.data, []
        if any(program.kept for program in self.programs.values()):
            asked = self.held_out if "loss" in self.config.evals else []
            ids = teaching.known_ids([*self.sources, *asked])
        spare = max(data.bad_count, data.bad_share * len(ids))
        for name, program in self.programs.items():
            key = f"stages.{name}.teachers"
            teaching.check(program, self.mesh, key=key, examples=ids, spare=spare)

    def _identity(self) -> dict[str, str]:
        """What all processes must have in common."""
        self.environment = runtime.environment()
        parts = {key: self.environment[key] for key in ("packages", "flags", "git", "python")}
        parts |= {"config": self.config.to_dict(), "data": self.data}
        return {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}

    def _refuse_other_config(self, meta: dict[str, Any]) -> None:
        """A workdir belongs to one config and one set of data; changes must be allowed by name."""
        stage_words.refuse_others(self.tokenizers, meta["data"], self.folder, self.allow)
        now = self.config.to_dict() | {"data_found": self.data}
        saved = meta["config"] | {"data_found": meta["data"]}
        free = (*FREE_KEYS, *(f"stages.{name}.text.tokenizer" for name in self.tokenizers))
        changed = config_lib.require_unchanged(saved, now, free=free, allowed=self.allow)
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

        first = self.plan[0]
        _on_all(lambda: self._check_space(self._abstract_state(first.name)))
        found = self.checkpoints.restore(wanted, log=self.say)
        if found is None:
            self.start(first)
            return
        self.state, meta = found
        self.step, self.stage_name = meta["step"], meta["stage"]
        self.window, self.pending = meta["window"], meta["pending"]
        self.teacher_digest = meta["teacher"]

    def start(self, stage: stages.Stage) -> None:
        """Makes the state of the first step of a stage; what was trained before is handed over to it."""
        start = self.starts[stage.name]
        self.state = start.state(self.state)
        self.stage_name = stage.name
        if start.table is not None:
            if self.first:
                start.table.save(self.folder, stage.name)
            where = self.folder / f"handover_{stage.name}.txt"
            self.say(f"Stage {stage.name}: {start.table.summary()} (table: {where})")

    def teacher_of(self, stage: stages.Stage) -> Callable[[Batch], Batch]:
        """What adds the teacher's entries to a batch of the stage; loads the teacher.

        Raises:
            UserError: another teacher than the one this stage was trained with before.
        """
        program, before = self.programs[stage.name], self.teacher_digest
        teach, self.teacher_digest = teaching.start(
            program, self.mesh, key=f"stages.{stage.name}.teachers", together=_on_all
        )
        if line := teaching.about(program, self.teacher_digest):
            self.say(line)
        if self.step > stage.first and before != self.teacher_digest:
            raise UserError(
                f"Stage {stage.name} must go on with the teacher it was trained with, of digest {before}; "
                f"got {self.teacher_digest}. Put those weights back, or use another workdir."
            )
        return teach

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
        lists = sorted(self.folder.glob("bad_examples*.jsonl"))
        self.ledger = BadLedger(bad, max_share=share, min_count=count, total=videos, others=lists)
        self.held_out_ledger = self.ledger.apart()
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
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save(stage_words.folder(self.folder, name))

    def _introduce(self) -> None:
        """Says what runs on what."""
        self.say(f"{self.recipe.spec} in {self.folder}, on {self.environment['devices']}")
        videos = " + ".join(f"{len(s):,} videos of {s.name}" for s in self.sources)
        held_out = sum(map(len, self.held_out))
        self.say(f"{videos}; {held_out:,} held out" if held_out else f"{videos}; none held out")
        for source in (*self.sources, *self.held_out):
            for note in source.notes:
                if "left out: split" not in note:  # rows of other splits are no news
                    self.say(f"note: {note}")
        for train in self.sources:
            for other in self.held_out:
                if shared := count_overlap(train, other):
                    self.say(f"note: {shared} held-out clips are also trained on")
        if not self.held_out:
            self.held_out = self.sources
            self.say("note: no video is held out (data.eval): evaluations look at training videos")


def _on_all(action: Callable[[], Any]) -> Any:
    """Does it on every process; an error of any process is raised on all, so that none waits for it."""
    error = found = None
    try:
        found = action()
    except Exception as caught:
        error = caught
    runtime.fail_together(error)
    return found


def use_compilation_cache(folder: pathlib.Path) -> None:
    """Keeps compiled programs in the workdir, so that a resumed run need not compile again."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "compilation_cache"))
