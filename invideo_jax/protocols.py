"""Protocols of benchmarks: what `python -m invideo_jax.evaluate --config=FILE` sets over the config of a run.

A protocol is a recipe whose `get_config` returns only what it sets:

    data       keys of the run's `data`
    stage      keys of the section of the stage that is judged, whatever its name
    evals      the evaluators; those of the run are not run
    training   whether the run's training videos are opened; without them classes are the benchmark's own
"""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from invideo_jax import config as config_lib
from invideo_jax import digests, handover, sharding
from invideo_jax.errors import UserError
from invideo_jax.programs import Program
from invideo_jax.registry import nearest

PyTree = Any
SECTIONS = ("data", "stage", "evals", "training")


def apply(
    config: ml_collections.ConfigDict, stage_name: str, protocol: ml_collections.ConfigDict
) -> bool:
    """Sets the values of a protocol in the locked config of a run.

    Args:
        config: of the run.
        stage_name: of the stage that is judged.
        protocol: sections as of the top of this file.

    Returns:
        Whether the run's training videos are opened.

    Raises:
        UserError: no protocol, or one that sets what this run does not have.
    """
    unknown = [name for name in protocol if name not in SECTIONS]
    if unknown or "evals" not in protocol:
        what = f"got {unknown[0]}.{nearest(unknown[0], SECTIONS)}" if unknown else "got no evals."
        raise UserError(
            f"A protocol must have the sections {', '.join(SECTIONS)} and no others; {what} Those of "
            "configs/benchmarks/ are protocols; recipes of runs are not."
        )
    for section, place in (("data", "data"), ("stage", f"stages.{stage_name}")):
        for key, value in config_lib.flatten(protocol.get(section, {})).items():
            _set(config, f"{place}.{key}", value)
    training = bool(protocol.get("training", False))
    if not training and not config.data.eval:
        raise UserError("A protocol that opens no training videos must set data.eval; got none.")
    with config.unlocked():
        config.evals = ml_collections.ConfigDict(protocol.evals.to_dict())
        config.checkpoint.keep_best = 0  # the result that chose the best may not be among these
    return training


def _set(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    known = config_lib.flatten(config)
    if path not in known:
        *above, key = path.split(".")
        section = ".".join(above)
        beside = [k for k in known if k.rpartition(".")[0] == section]
        why = (
            nearest(path, beside)
            if beside
            else f" There is no section {section}: the stage is of another kind."
        )
        raise UserError(f"The protocol sets {path}, which this run does not have.{why}")
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    try:
        section[key] = value
    except TypeError as error:
        raise UserError(
            f"The protocol must set {path} to a {type(known[path]).__name__}; got {value!r}."
        ) from error


def fit(params: PyTree, made: Program, before: Program, mesh: jax.sharding.Mesh) -> PyTree:
    """Parameters on the devices, those that depend on the size of clips interpolated to other clips.

    Args:
        params: of `before`, nested dictionaries of NumPy arrays.
        made: the program that takes them, with clips of other frames or another size.
        before: the program that they come from.

    Raises:
        UserError: something but the positions of the video encoder depends on it.
    """
    boxed = jax.eval_shape(made.init_params)
    places = sharding.param_shardings(boxed, mesh)
    if made.encoder.grid == before.encoder.grid:
        return jax.device_put(params, places)
    # The part that sees video: the text's tables have nothing to do with the grid.
    part = made.encoder_path.split("/")[0] if "/" in made.encoder_path else None
    target = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        sharding.unbox(boxed),
        places,
    )
    mine = lambda tree: tree if part is None else {part: tree[part]}
    source = digests.named_leaves(mine(params))
    table = handover.plan(
        mine(target),
        source,
        grid=made.encoder.grid,
        tubelet=made.encoder.tubelet,
        old_grid=before.encoder.grid,
        key=f"stages.{made.stage.name}.init",
    )
    changed = [row.path for row in table.rows if row.transform != "copy"]
    print(f"note: clips are of another size than in the run; interpolated: {', '.join(changed)}")
    with sharding.use(mesh):
        moved = handover.apply(table, source.__getitem__, made.init_params)
    rest: Mapping[str, Any] = {name: x for name, x in params.items() if name not in moved}
    return jax.device_put(rest, {name: places[name] for name in rest}) | moved
