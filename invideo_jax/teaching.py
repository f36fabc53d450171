"""The weights of teachers: where they come from, on which devices they lie, and what tells them apart.

Teachers stand beside the train state and are saved with no checkpoint: a run only keeps their digest.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from invideo_jax import digests, handover, sharding
from invideo_jax.data.sources import Source
from invideo_jax.data.sources.listed import ManifestSource
from invideo_jax.errors import UserError
from invideo_jax.programs import Frozen, Program, Teacher

PyTree = Any
Batch = Mapping[str, jax.Array]
Teach = Callable[[Batch], Batch]
RANDOM = "random:"


def check(
    program: Program,
    mesh: Mesh,
    *,
    key: str = "stages.NAME.teachers",
    examples: Collection[str] = (),
    spare: float = 0,
) -> None:
    """Looks, by shapes only, whether a stage's teacher is there and fits, so that no later stage fails for it.

    Args:
        program: of the stage.
        mesh: devices.
        key: config key that messages name.
        examples: ids that features from disk must be there of, but for `spare` of them (videos that cannot
            be read have none).

    Raises:
        UserError: no such source, or one that does not fit the model; no such folder of features.
    """
    if program.kept is not None:
        program.kept.check(examples, spare=spare)
    if program.teacher is not None:
        for name, model in program.teacher.models.items():
            _plan(f"{key}.{name}", model, mesh)


def known_ids(sources: Iterable[Source]) -> list[str]:
    """Ids of the examples, of sources that know them without reading."""
    known = [source for source in sources if isinstance(source, ManifestSource)]
    return [source.identify(i) for source in known for i in range(len(source))]


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
    planned = _plan(key, model, mesh)
    if planned is None:
        where = jax.tree.map(lambda x: x.sharding, _wanted(model, mesh))
        return jax.jit(lambda: sharding.unbox(model.init_params()), out_shardings=where)()
    table, found = planned
    return handover.apply(table, found.get, model.init_params)


def _wanted(model: Frozen, mesh: Mesh) -> PyTree:
    """Shapes and places of the parameters."""
    boxed = jax.eval_shape(model.init_params)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        sharding.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )


def _plan(key: str, model: Frozen, mesh: Mesh) -> tuple[handover.Table, handover.Source] | None:
    """Where each parameter comes from, and the open source; None for random ones."""
    if model.source.startswith(RANDOM):
        return None
    if not model.source:
        raise UserError(
            f"{key}.source must say where the teacher's weights are; got an empty one. Give a folder that "
            "python -m invideo_jax.interop.from_torch wrote, a workdir, or 'random:0' to try things out."
        )
    found = handover.open_source(model.source, key=key)
    wanted, about = _wanted(model, mesh), found.about
    return handover.plan(wanted, found.shapes, about=about, key=key, **model.options), found


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
    program: Program,
    mesh: Mesh,
    *,
    key: str = "stages.NAME.teachers",
    together: Callable[[Callable[[], PyTree]], PyTree] = lambda action: action(),
) -> tuple[Teach, str]:
    """Loads a stage's teacher, or opens what is kept of it.

    Args:
        program: of the stage.
        mesh: devices.
        key: config key that messages name.
        together: runs what may fail on one process alone, and raises its error on all.

    Returns:
        What adds the teacher's entries to a device batch (call it under `sharding.use(mesh)`), and the
        digest of its weights ('' for none).
    """
    teacher, kept = program.teacher, program.kept
    if kept is not None:
        return lambda batch: batch, together(lambda: kept.reader.weights)
    if teacher is None:
        return lambda batch: batch, ""
    params = together(lambda: place(teacher, mesh, key=key))
    apply = jax.jit(teacher.apply)
    return lambda batch: dict(batch) | apply(params, batch), digest(params)


def about(program: Program, digest: str) -> str:
    """One line on the teacher of a stage, '' for none."""
    if program.kept is not None:
        return f"Teacher: features of {digest} from {program.kept.folder}"
    if program.teacher is None:
        return ""
    models = program.teacher.models.items()
    return f"Teacher: {', '.join(f'{k} of {m.source}' for k, m in models)} (digest {digest})"
