"""How a stage starts: with fresh parameters, or with those that are handed over to it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from invideo_jax import handover, sharding
from invideo_jax.errors import UserError
from invideo_jax.handover.matching import Grid
from invideo_jax.interop import models
from invideo_jax.programs import Program
from invideo_jax.state import TrainState

FRESH = "fresh"  # as `init.source`: from nothing, whatever else `init` says


@dataclasses.dataclass(frozen=True)
class Start:
    """What was decided before anything is compiled.

    Attributes:
        program: of the stage.
        mesh: devices.
        table: where each parameter comes from; None where all are fresh.
        source: spec of where they are; '' for the stage before.
        ema: whether the moving average is taken, where there is one.
    """

    program: Program
    mesh: jax.sharding.Mesh
    table: handover.Table | None
    source: str = ""
    ema: bool = True

    def state(self, before: TrainState | None = None) -> TrainState:
        """The state at the first step of the stage; all processes must call it together.

        Args:
            before: the state at the end of the stage before, if there is one.
        """
        make = self.program.make_state, self.mesh
        if self.table is None:
            return sharding.create_sharded_state(self.program.init_params, *make)
        found = _open(self.source, self.ema, before, self.key)
        wanted = sharding.abstract_sharded_state(self.program.init_params, *make)
        shardings = jax.tree.map(lambda x: x.sharding, wanted)
        with sharding.use(self.mesh):
            params = handover.apply(self.table, found.get, self.program.init_params)
            return jax.jit(self.program.make_state, out_shardings=shardings)(params)

    @property
    def key(self) -> str:
        """The config section that messages name."""
        return f"stages.{self.program.stage.name}.init"


def plan(
    config: ml_collections.ConfigDict,
    program: Program,
    mesh: jax.sharding.Mesh,
    *,
    before: Program | None = None,
) -> Start:
    """Decides where the parameters of a stage come from; reads shapes only.

    Args:
        before: program of the stage before, None for the first stage.

    Raises:
        UserError: parameters without a source, or a source without use, that the recipe does not name.
    """
    options = config.stages[program.stage.name].init.to_dict()
    source, ema = options.pop("source"), options.pop("ema")
    if source == FRESH:
        return Start(program, mesh, None)
    if not source and before is None:
        set_in_vain = [name for name, value in options.items() if value]
        if set_in_vain:
            raise UserError(
                f"stages.{program.stage.name}.init.{set_in_vain[0]} needs something that is handed over; the "
                f"first stage has no stage before it. Set init.source (to '{FRESH}' for a start without it)."
            )
        return Start(program, mesh, None)
    start = Start(program, mesh, None, source, ema)
    wanted = sharding.abstract_sharded_state(program.init_params, program.make_state, mesh)
    last = None
    if before is not None:
        last = sharding.abstract_sharded_state(before.init_params, before.make_state, mesh)
    found = _open(source, ema, last, start.key)
    options["label_map"] = handover.read_label_map(options["label_map"])
    table = handover.plan(
        wanted.params,
        found.shapes,
        grid=program.encoder.grid,
        tubelet=program.encoder.tubelet,
        old_grid=_grid(found.meta) if source else before.encoder.grid,
        about=found.about,
        key=start.key,
        **options,
    )
    return dataclasses.replace(start, table=table)


def _open(spec: str, ema: bool, before: TrainState | None, key: str) -> handover.Source:
    if spec:
        return handover.open_source(spec, ema=ema, key=key)
    return handover.from_state(before, "before", ema=ema)


def _grid(meta: Mapping[str, Any]) -> Grid | None:
    """Tokens (t, h, w) of the encoder that the parameters were made for, where that is known."""
    # Of a run, its model and never its recipe: students see fewer frames than the clips that are read.
    text = meta.get("model") if "config" in meta else meta
    if not text or "arguments" not in text:
        return None
    try:
        return models.encoder_of(models.make(text))[0].grid
    except UserError:  # a tower without pictures
        return None
