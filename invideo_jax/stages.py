"""The stage scheduler: how long each stage lasts, and which stage a global step is in. Pure Python.

A run is an ordered list of stages; each has its own train step, data and optimiser. Steps are counted
globally over all stages (`step`, what checkpoints are named by) and inside a stage (`stage_step`, what
schedules and the data order depend on).
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

UNITS = ("steps", "examples", "epochs", "percent")
_DURATION = re.compile(
    r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([a-z%]*)\s*"
)


@dataclasses.dataclass(frozen=True)
class Duration:
    """An amount of training: `amount` of `unit` (one of `UNITS`)."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str | int, *, name: str = "duration") -> "Duration":
        """Reads '800 epochs', '20_000 steps', '1e6 examples', '40%' or a bare number of steps.

        Raises:
            UserError: not of that form; the message names `name`.
        """
        match = _DURATION.fullmatch(str(text).lower())
        if not match:
            raise UserError(
                f"{name} must be an amount and a unit, like '800 epochs', '20000 steps', '1e6 examples' "
                f"or '40%'; got {name}={text!r}."
            )
        amount, unit = float(match[1].replace("_", "")), match[2]
        unit = {"": "steps", "%": "percent"}.get(unit, unit)
        unit = unit if unit in UNITS else unit + "s"
        if unit not in UNITS:
            raise UserError(
                f"{name} must be in one of {', '.join(UNITS)}; got {name}={text!r}.{nearest(unit, UNITS)}"
            )
        if unit == "percent" and amount > 100:
            raise UserError(f"{name} must be at most 100 %; got {name}={text!r}.")
        return cls(amount, unit)

    def steps(self, *, batch_size: int, epoch_examples: int | None, whole: int | None) -> int:
        """Converts to train steps, rounded down but at least 1 for a positive amount.

        Args:
            batch_size: examples a step.
            epoch_examples: examples in the training set; None when unknown.
            whole: steps that 100 % stands for; None when there is nothing to take a share of.

        Raises:
            UserError: the unit needs a number that is not known.
        """
        if self.amount == 0:
            return 0
        if self.unit == "epochs" and not epoch_examples:
            raise UserError(f"{self} needs the size of the training set, which is unknown here.")
        if self.unit == "percent" and whole is None:
            raise UserError(
                f"{self} needs a whole to be a share of; give steps, examples or epochs."
            )
        scale = {
            "steps": lambda: 1.0,
            "examples": lambda: 1.0 / batch_size,
            "epochs": lambda: epoch_examples / batch_size,
            "percent": lambda: whole / 100.0,
        }[self.unit]()
        return max(1, int(self.amount * scale + 1e-9))

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, placed in the run.

    Attributes:
        name: its name in the recipe; also what its random numbers are keyed by.
        first: global step before its first update.
        steps: number of updates.
        batch_size: examples of the global batch.
        epoch_examples: examples in its training set.
    """

    name: str
    first: int
    steps: int
    batch_size: int
    epoch_examples: int | None = None

    @property
    def last(self) -> int:
        """Global step after its last update."""
        return self.first + self.steps

    @property
    def key(self) -> int:
        """31-bit number that the stage's random streams are folded with; depends on the name alone."""
        return zlib.crc32(self.name.encode()) & 0x7FFFFFFF

    def to_steps(self, duration: str | int, *, name: str = "duration") -> int:
        """Converts a duration inside this stage (warm-up, evaluation interval, ...) to steps."""
        return Duration.parse(duration, name=name).steps(
            batch_size=self.batch_size, epoch_examples=self.epoch_examples, whole=self.steps
        )


def plan(
    order: Sequence[str],
    lengths: Mapping[str, str | int],
    *,
    batch_sizes: Mapping[str, int],
    epoch_examples: Mapping[str, int | None],
    total_steps: int | None = None,
) -> tuple[Stage, ...]:
    """Places the stages one after the other.

    Args:
        order: stage names in running order.
        lengths: stage name -> duration ('800 epochs', '40%', ...).
        batch_sizes: stage name -> examples a step.
        epoch_examples: stage name -> training examples, None when unknown.
        total_steps: what the percentages in `lengths` are a share of.

    Raises:
        UserError: no stage, a repeated or unknown name, or a length of no steps.
    """
    if not order:
        raise UserError("stage_order must name at least one stage; got stage_order=().")
    if len(set(order)) != len(order):
        raise UserError(f"stage_order must name each stage once; got stage_order={tuple(order)}.")
    stages, first = [], 0
    for name in order:
        if name not in lengths:
            raise UserError(
                f'stage_order names "{name}", which is not under config.stages.{nearest(name, lengths)}'
            )
        duration = Duration.parse(lengths[name], name=f"stages.{name}.length")
        steps = duration.steps(
            batch_size=batch_sizes[name], epoch_examples=epoch_examples[name], whole=total_steps
        )
        if steps < 1:
            raise UserError(
                f"stages.{name}.length must be at least one step; got {lengths[name]!r}."
            )
        stages.append(Stage(name, first, steps, batch_sizes[name], epoch_examples[name]))
        first += steps
    return tuple(stages)


def stage_at(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
    """The stage that does the update after global step `step`, and the stage's own step count then.

    At a boundary this is the next stage; after the last update it is the last stage, complete.
    """
    if step < 0:
        raise ValueError(f"step must not be negative; got step={step}.")
    for stage in stages:
        if step < stage.last:
            return stage, step - stage.first
    return stages[-1], stages[-1].steps
