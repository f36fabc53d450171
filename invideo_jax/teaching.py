"""The weights of teachers: where they come from, on which devices they lie, and what tells them apart.

Teachers stand beside the train state and are saved with no checkpoint: a run only keeps their digest.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from invideo_jax import digests, handover, sharding
from invideo_jax.errors import UserError
from invideo_jax.programs import Frozen, Teacher

PyTree = Any
Batch = Mapping[str, jax.Array]
Teach = Callable[[Batch], Batch]
RANDOM = "random:"


def place(teacher: Teacher, mesh: Mesh, *, key: str = "stages.NAME.teachers") -> dict[str, PyTree]:
    """The parameters of all models of a teacher, by name, each array on its devices.

    They come in the dtype that `init_params` gives. No process ever holds a whole model.

    Args:
        mesh: devices; parameters lie on it as those of the student.
        key: config key that messages name.

    Raises:
        UserError: no such source, or one that does not fit the model.
    """
    with sharding.use(mesh):
        return {name: _place(f"{key}.{name}", m, mesh) for name, m in teacher.models.items()}


def _place(key: str, model: Frozen, mesh: Mesh) -> PyTree:
    boxed = jax.eval_shape(model.init_params)
    wanted = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        sharding.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )
    if model.source.startswith(RANDOM):
        where = jax.tree.map(lambda x: x.sharding, wanted)
        return jax.jit(lambda: sharding.unbox(model.init_params()), out_shardings=where)()
    if not model.source:
        raise UserError(
            f"{key}.source must say where the teacher's weights are; got an empty one. Give a folder that "
            "python -m invideo_jax.interop.from_torch wrote, a workdir, or 'random:0' to try things out."
        )
    found = handover.open_source(model.source, key=key)
    table = handover.plan(wanted, found.shapes, about=found.about, key=key, **model.options)
    return handover.apply(table, found.get, model.init_params)


def digest(params: PyTree) -> str:
    """16 hex digits of the weights themselves, whatever devices they lie on.

    Raises:
        UserError: NaN or infinity among them.
    """
    found, bad = digests.tree_digests(params)
    if bad:
        raise UserError(
            f"The weights of a teacher must be finite; {len(bad)} arrays are not, the first is {bad[0]}. "
            "Convert the file again."
        )
    leaves = digests.named_leaves(params)
    return digests.combined(
        {name: (*digests.specification(leaf), found[name]) for name, leaf in leaves.items()}
    )


def start(
    teacher: Teacher | None, mesh: Mesh, *, key: str = "stages.NAME.teachers"
) -> tuple[Teach, str]:
    """Loads a stage's teacher.

    Args:
        teacher: of the stage's program; None for none.
        mesh: devices.
        key: config key that messages name.

    Returns:
        What adds the teacher's entries to a device batch (call it under `sharding.use(mesh)`), and the
        digest of its weights ('' for none).
    """
    if teacher is None:
        return lambda batch: batch, ""
    params, apply = place(teacher, mesh, key=key), jax.jit(teacher.apply)
    return lambda batch: dict(batch) | apply(params, batch), digest(params)
