"""One stored step of a run: what its folder holds, how it is read and checked.

1200/state/            the arrays, as nested dictionaries named like the training state
1200/meta/data.json    the caller's entries; ours under 'checkpoint' (per leaf shape, dtype, digest); a digest of all
1200/_CHECKPOINT_METADATA, commit_success.txt   Orbax's own
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator

from invideo_jax import digests

PyTree = Any

FORMAT = 1
PARTS = ("_CHECKPOINT_METADATA", "meta/data.json", "state")
SAVE_SECONDS = 600  # Orbax gives an asynchronous save up after this; its default is 1200


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used here.

    Attributes:
        path: folder concerned.
        step: step concerned, or None.
        cause: what went wrong.
        fix: what to do.
        exit_code: 74 for storage and damage, 2 when the caller asked for something else than what is stored.
    """

    def __init__(self, path, step: int | None, cause: str, fix: str, exit_code: int = 74):
        self.path, self.step, self.cause, self.fix = str(path), step, cause, fix
        self.exit_code = exit_code
        where = f"checkpoint {path}" + ("" if step is None else f", step {step}")
        super().__init__(f"{where}: {cause} {fix}")


class Damaged(Exception):
    """This one step cannot be used; an older one may."""


def context_options() -> ocp.Context:
    """Orbax options: `meta` is JSON, no compression (5 x faster to write, 8 % more bytes), partial reads allowed."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.use_compression = False
    context.asynchronous.timeout_secs = SAVE_SECONDS
    context.pytree.loading.partial_load = True
    return context


def everywhere(ok: bool) -> bool:
    """Whether `ok` holds on all processes; they must call it together."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array([ok]))))


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint-{name}")


def align_operations() -> None:
    """Brings Orbax's count of operations to the same number on all processes; they must call it together.

    The count names the barriers of a save. A process whose read failed early has counted one less, and the next save
    would wait for the others for ever (seen with two processes). Orbax has no public way to say it.
    """
    if jax.process_count() == 1:
        return
    mine = int(OperationIdGenerator.get_current_operation_id())
    most = np.max(multihost_utils.process_allgather(np.array([mine], np.int32)))
    for _ in range(int(most) - mine):
        OperationIdGenerator.next_operation_id()


def root_cause(error: BaseException | None) -> str:
    """First line of the innermost cause: Orbax's own outer errors list registries for a thousand characters."""
    seen = set()
    while error is not None and error.__cause__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:400] if lines else ''}."


def learned(names: Iterable[str]) -> list[str]:
    """Leaves that must be finite: parameters and their average (an optimiser may hold an infinity on purpose)."""
    names = list(names)
    return [n for n in names if n.split("/", 1)[0] in ("params", "ema")] or names


def record(step: int, state: PyTree, metric: float | None) -> tuple[dict, list[str]]:
    """Our own entries of the meta file, and the learned leaves that are not finite; digests run on the devices."""
    named = digests.named_leaves(state)
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"a saved state holds jax arrays of numbers; got {name}={type(leaf).__name__} "
                f"{getattr(leaf, 'dtype', '')}. Convert it (jnp.asarray, jax.random.key_data)."
            )
    found, not_finite = digests.tree_digests(named)
    leaves = {n: (*_shape_dtype(x), found[n]) for n, x in named.items()}
    mesh = next(
        (x.sharding.mesh for x in named.values() if isinstance(x.sharding, NamedSharding)), None
    )
    bad = [n for n in not_finite if n in set(learned(found))]
    return dict(
        format=FORMAT,
        step=step,
        metric=None if metric is None else float(metric),
        saved_at=time.time(),
        bytes=sum(x.nbytes for x in named.values()),
        leaves=leaves,
        digests=digests.by_group(leaves),
        mesh=None if mesh is None else {k: int(v) for k, v in mesh.shape.items()},
        devices=jax.device_count(),
        processes=jax.process_count(),
        finite=not bad,
    ), bad


def _shape_dtype(x) -> tuple[list[int], str]:
    shape, dtype = digests.specification(x)
    return list(shape), dtype


def meta_digest(meta: dict) -> str:
    """Digest of everything in `meta` but the digest itself."""
    rest = {k: v for k, v in meta.items() if k != "meta_digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def with_digest(meta: dict) -> dict:
    """`meta` as JSON will give it back (tuples become lists, keys text), with its digest.

    Raises:
        TypeError: an entry is not JSON-able.
    """
    meta = json.loads(json.dumps(meta))
    return meta | {"meta_digest": meta_digest(meta)}


def read_meta(folder) -> dict:
    """The meta file of one step, checked against its own digest.

    Raises:
        Damaged: says what is wrong.
    """
    folder = epath.Path(folder)
    for part in PARTS:
        if not (folder / part).exists():
            raise Damaged(f"{part} is missing")
    try:
        meta = json.loads((folder / "meta" / "data.json").read_text())
        good = meta["meta_digest"] == meta_digest(meta)
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise Damaged(f"meta/data.json is unreadable ({type(error).__name__}: {error})") from error
    if not good:
        raise Damaged("meta/data.json differs from what was saved")
    if meta["checkpoint"]["format"] > FORMAT:
        raise CheckpointError(
            folder,
            None,
            f"written by a newer version (format {meta['checkpoint']['format']} > {FORMAT}).",
            "Update invideo_jax.",
            exit_code=2,
        )
    return meta


def meta_of(directory, step: int) -> dict:
    """`read_meta` of one step of a checkpoints folder.

    Raises:
        CheckpointError: missing, unreadable, or damaged.
    """
    try:
        return read_meta(epath.Path(directory) / str(step))
    except Damaged as error:
        there = [s for s in numbered(directory) if looks(directory, s) == "good"]
        raise CheckpointError(
            directory, step, f"{error}.", f"Use one of the steps {sorted(there)}."
        ) from error


def numbered(directory) -> list[int]:
    """Numbers of all numbered folders in a checkpoints folder, newest first."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    names = [p.name for p in directory.iterdir()]
    is_step = lambda name: name.isascii() and name.isdecimal() and str(int(name)) == name
    return sorted((int(name) for name in names if is_step(name)), reverse=True)


def looks(directory, step: int) -> str:
    """'good' when all parts of the step are there, 'damaged' when some are, 'stray' when it is no checkpoint."""
    there = [(epath.Path(directory) / str(step) / part).exists() for part in PARTS]
    return "good" if all(there) else "damaged" if any(there) else "stray"


def compare(stored: dict[str, list], wanted: dict[str, Any]) -> list[str]:
    """Differences between a stored state and the one asked for, one line each.

    Args:
        stored: name -> [shape, dtype name, ...].
        wanted: name -> array or abstract array.
    """
    lines = []
    for name in [*stored, *(n for n in wanted if n not in stored)]:
        if name not in wanted:
            lines.append(f"{name}: stored {_text(stored[name])}, not asked for")
        elif name not in stored:
            lines.append(f"{name}: asked for {_text(_shape_dtype(wanted[name]))}, not stored")
        elif list(stored[name][:2]) != list(_shape_dtype(wanted[name])):
            asked = _text(_shape_dtype(wanted[name]))
            lines.append(f"{name}: stored {_text(stored[name])}, asked for {asked}")
    return lines


def _text(row) -> str:
    return f"{row[1]}{list(row[0])}"


def structure_error(folder, step: int, differences: list[str]) -> CheckpointError:
    shown = "\n  ".join(differences[:10])
    more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
    return CheckpointError(
        folder,
        step,
        f"the stored state is not the one this run would train:\n  {shown}{more}\n",
        "Set model, optimizer and ema as they were when it was saved (its config is in its meta), or choose "
        "a new workdir.",
        exit_code=2,
    )


def check_divisible(directory, wanted: dict[str, Any]) -> None:
    """An uneven layout fails in Orbax with a message about missing entries: say it before."""
    for name, leaf in wanted.items():
        try:
            if leaf.sharding is not None:
                leaf.sharding.shard_shape(tuple(leaf.shape))
        except ValueError as error:
            raise CheckpointError(
                directory,
                None,
                f"{name} {list(leaf.shape)} does not divide over the devices as "
                f"{getattr(leaf.sharding, 'spec', leaf.sharding)} on {leaf.sharding.num_devices} devices.",
                "Choose mesh sizes that divide it.",
                exit_code=2,
            ) from error


def read_onto(folder, wanted: dict[str, Any]) -> dict[str, Any]:
    """Reads the leaves named in `wanted` (abstract arrays with shardings, or NumPy arrays) by name.

    Orbax's barriers are switched off for reading: a process whose part is damaged would leave the others waiting in
    one; `everywhere` brings them together afterwards.
    """
    context = context_options()
    if jax.process_count() > 1:
        me = jax.process_index()
        context.multiprocessing.active_processes = {me}
        context.multiprocessing.primary_host = me
        context.multiprocessing.barrier_sync_key_prefix = f"read-{me}"
    tree = digests.unflatten({n: x for n, x in wanted.items() if math.prod(x.shape)})
    with context:
        loaded = ocp.load_checkpointables(folder, {"state": tree})["state"]
    found = digests.named_leaves(loaded)
    for name, leaf in wanted.items():
        if not math.prod(leaf.shape):  # Orbax cannot store arrays without elements
            empty = np.zeros(leaf.shape, leaf.dtype)
            found[name] = jax.device_put(empty, getattr(leaf, "sharding", None))
        elif isinstance(found.get(name), jax.ShapeDtypeStruct) or name not in found:
            raise Damaged(f"{name} is not in the data")
        elif digests.specification(found[name]) != digests.specification(leaf):
            raise Damaged(f"{name} came back as {_text(_shape_dtype(found[name]))}")
    return found


def read_arrays(
    directory, step: int, *, under: str = "", verify: bool = True
) -> dict[str, np.ndarray]:
    """Leaves of one step as NumPy arrays by name, without knowing the model; for one process.

    Args:
        directory: the checkpoints folder.
        step: which step.
        under: only leaves whose name starts with this, e.g. 'params/'.
        verify: compare with the stored digests (on the CPU device).

    Raises:
        CheckpointError: unreadable or damaged.
    """
    folder = epath.Path(directory).resolve() / str(step)
    fix = "Use another step."
    try:
        stored = read_meta(folder)["checkpoint"]["leaves"]
        rows = {n: row for n, row in stored.items() if n.startswith(under)}
        if not rows:
            return {}
        as_numpy = lambda row: np.broadcast_to(np.zeros((), jnp.dtype(row[1])), row[0])
        arrays = read_onto(folder, {n: as_numpy(row) for n, row in rows.items()})
        arrays = {n: np.asarray(x) for n, x in arrays.items() if n in rows}
        if verify:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                found, _ = digests.tree_digests(arrays)
            wrong = [n for n, row in rows.items() if found[n] != row[2]]
            if wrong:
                raise Damaged(f"data of {', '.join(wrong[:3])} differ from what was saved")
    except CheckpointError:
        raise
    except Exception as error:
        cause = str(error) + "." if isinstance(error, Damaged) else root_cause(error)
        raise CheckpointError(folder, step, cause, fix) from error
    return arrays


def read_params(directory, step: int | None = None, which: str = "params") -> tuple[dict, dict]:
    """Parameters of a checkpoint as nested dictionaries of NumPy arrays, verified, and its meta.

    Args:
        directory: a workdir or its checkpoints folder.
        step: which step; the newest good one by default.
        which: 'params' or 'ema'.

    Raises:
        CheckpointError: no step, no such part, or damaged.
    """
    if which not in ("params", "ema"):
        raise ValueError(f"which must be 'params' or 'ema'; got which={which!r}.")
    folder = find(directory)
    if step is None:
        step = max((s for s in numbered(folder) if looks(folder, s) == "good"), default=None)
    if step is None:
        raise CheckpointError(folder, None, "no checkpoint here.", "Give the workdir of a run.", 2)
    meta = meta_of(folder, step)
    arrays = read_arrays(folder, step, under=f"{which}/")
    if not arrays:
        groups = ", ".join(g for g in meta["checkpoint"]["digests"] if g != "all")
        raise CheckpointError(folder, step, f"holds no {which!r}.", f"It holds: {groups}.", 2)
    return digests.unflatten(arrays)[which], meta


def find(directory) -> epath.Path:
    """The checkpoints folder of a workdir, or the folder itself when it is one."""
    path = epath.Path(directory)
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def ago(seconds: float) -> str:
    """'3.2 h' and the like."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"


class _QuietOrbax(logging.Filter):
    """Drops Orbax's six copies of the trace of a failed background write: the cause is reported here, once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in str(record.msg)


logging.getLogger("absl").addFilter(_QuietOrbax())
