"""Parameters <-> PyTorch state dicts by the tables of `names`, leaf by leaf, both ways."""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.interop import names
from invideo_jax.interop.leaves import Leaf, deferred, leaf
from invideo_jax.interop.turns import BUFFERS, TURNS
from invideo_jax.registry import nearest

Shapes = Mapping[str, tuple[int, ...]]


def spelled(key: str, table: names.Layout) -> str:
    """A key in the layout's own spelling."""
    for pattern, spelling in table.aliases:
        key = re.sub(pattern, spelling, key)
    return key


def groups(rows: Sequence[names.Row]) -> list[list[names.Row]]:
    """Rows of one stack together, since a state dict lists block after block."""
    found: list[list[names.Row]] = []
    last = None
    for row in rows:
        stack = (row.theirs.split("{i}")[0], row.after) if "{i}" in row.theirs else None
        if stack is None or stack != last:
            found.append([])
        found[-1].append(row)
        last = stack
    return found


def keys_of(table: names.Layout, shapes: Shapes) -> Iterator[tuple[names.Row, str, int | None]]:
    """Every key of a model's state dict in published order.

    Args:
        shapes: path -> shape of the model's parameters.

    Yields:
        Its row, the key, and the place of its block in our stack (None outside stacks).
    """
    rows = [row for row in table.rows if row.fits(shapes)]
    for group in groups(rows):
        if "{i}" not in group[0].theirs:
            yield from ((row, row.theirs, None) for row in group)
            continue
        first = _first_block(group[0], table, shapes)
        own = next(row for row in group if not row.tied)
        for i in range(_depth(own.ours[0], shapes)):
            yield from ((row, row.theirs.format(i=first + i), i) for row in group)


def _depth(path: str, shapes: Shapes) -> int:
    return shapes[path][0] if path in shapes else 0


def _first_block(row: names.Row, table: names.Layout, shapes: Shapes) -> int:
    if not row.after:
        return 0
    before = next(r for r in table.rows if row.after in r.ours and "{i}" in r.theirs)
    return _first_block(before, table, shapes) + _depth(row.after, shapes)


# ---- theirs -> ours ---------------------------------------------------------------------------------


def to_leaves(
    state: Mapping[str, Any], *, layout: str, expected: Shapes, table: names.Layout | None = None
) -> dict[str, Leaf]:
    """Path -> leaf of our parameters, from key -> array (or leaf) of a state dict.

    Args:
        layout: name in `names.LAYOUTS`.
        expected: path -> shape of the model's parameters.
        table: to use instead of that layout's.

    Raises:
        UserError: keys that are missing or not used, or arrays of another shape than the model's.
    """
    table = table or names.get(layout)
    have = {spelled(key, table): leaf(value) for key, value in state.items()}
    if len(have) != len(state):
        raise UserError(f"A file must not hold one key in two spellings of layout {layout!r}.")
    used: list[str] = []
    sources: dict[str, list[tuple[names.Row, str]]] = collections.defaultdict(list)
    for row, key, _ in keys_of(table, expected):
        if key not in have and (row.tied or row.buffer):
            continue
        used.append(key)
        if key not in have:
            continue
        if row.buffer:
            _check_buffer(have[key], key, row, expected)
        elif row.tied and row.ours[0] in sources:
            _check_tied(have[key], have[sources[row.ours[0]][0][1]], key)
        else:
            for path in row.ours:
                sources[path].append((row, key))
    check_keys(used, list(have), layout)
    check_paths(set(sources), set(expected), layout)
    return {path: _assembled(path, sources[path], have, expected[path]) for path in expected}


def _assembled(path: str, found: list, have: Mapping[str, Leaf], want: tuple[int, ...]) -> Leaf:
    row = found[0][0]
    part, parts, stacked = row.ours.index(path), len(row.ours), "{i}" in row.theirs and not row.tied
    for _, key in found:
        shape = _turned_shape(have[key], row, key)
        check_shape((len(found), *shape) if stacked else shape, want, path, key)

    def one(key: str) -> np.ndarray:
        size = have[key].shape[0] // parts if have[key].shape else 1
        return TURNS[row.turn].ours(have[key].rows(part * size, (part + 1) * size))

    dtype = TURNS[row.turn].dtypes[0] or np.result_type(*{have[key].dtype for _, key in found})
    if not stacked:
        return deferred(want, dtype, lambda: one(found[0][1]))

    def rows(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *want[1:]), dtype)
        for to, (_, key) in zip(out, found[start:stop]):
            to[...] = one(key)
        return out

    return Leaf(tuple(want), dtype, rows)


def _turned_shape(value: Leaf, row: names.Row, key: str) -> tuple[int, ...]:
    axes = TURNS[row.turn].axes
    if axes is not None and len(value.shape) != axes:
        raise UserError(f"{key} must have {axes} dimensions; got shape {value.shape}.")
    if len(row.ours) == 1:
        shape = value.shape
    elif not value.shape or value.shape[0] % len(row.ours):
        raise UserError(
            f"{key} holds {len(row.ours)} equal arrays one after the other; got shape {value.shape}."
        )
    else:
        shape = (value.shape[0] // len(row.ours), *value.shape[1:])
    # Numbers without memory, only to see where the axes go.
    return TURNS[row.turn].ours(np.broadcast_to(np.zeros((), bool), shape)).shape


def _check_buffer(value: Leaf, key: str, row: names.Row, expected: Shapes) -> None:
    buffer = BUFFERS[row.buffer]
    want = buffer.make(expected[row.ours[0]])
    if buffer.fixed and not np.array_equal(value.read(), want):
        raise UserError(f"{key} must be the fixed array of shape {want.shape}; it is another.")


def _check_tied(value: Leaf, other: Leaf, key: str) -> None:
    if value.shape != other.shape or not np.array_equal(value.read(), other.read()):
        raise UserError(
            f"{key} must hold the same numbers as the array it is tied to; it does not. The file is "
            "of a model with two arrays there, which this one has not."
        )


# What a shape that differs says about the model, by our path and the axis that differs; and the option.
_HINTS: tuple[tuple[str, str], ...] = (
    (r"position|_pos", "--old_frames and --old_image_size say what the file's model was made for; "
     "--frames and --image_size what the new one is for, whose table is then interpolated."),
    (r"(^|/)(head|classifier)/(kernel|bias)$", "The last axis is the number of classes (or of pixels in "
     "a cube: patch, tubelet): --first_classes=K or --label_map=FILE keep some classes, "
     "--fresh='head/*' starts a new head."),
    (r"patch_embed", "Check patch, tubelet and channels: --model.patch, --model.tubelet."),
    (r"/blocks/|stack", "Check the model's size: width, heads, MLP width: --size or --model.width, "
     "--model.mlp_width."),
)  # fmt: skip


def check_shape(shape: tuple[int, ...], want: Sequence[int], path: str, key: str) -> None:
    """UserError that explains a shape that the model does not have."""
    if tuple(shape) == tuple(want):
        return
    hint = next((text for pattern, text in _HINTS if re.search(pattern, path)), _HINTS[-1][1])
    raise UserError(
        f"The file and the model must have equal shapes; {key} gives {path} {tuple(shape)}, the model "
        f"has {tuple(want)} ({math.prod(want)} numbers). {hint}"
    )


def check_keys(used: Sequence[str], have: Sequence[str], layout: str) -> None:
    """UserError unless both name the same keys."""
    missing, left = sorted(set(used) - set(have)), sorted(set(have) - set(used))
    if not missing and not left:
        return
    lines = [f"Every key must be used, and none be missing, of layout {layout!r}."]
    for what, keys in (("Missing", missing), ("Not used", left)):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            lines.append(f"{what}: {', '.join(keys[:5])}{more}.")
    hint = nearest(left[0], used) if left and missing else ""
    lines.append(f"Check layout, number of blocks, biases and last norm of the model.{hint}")
    raise UserError(" ".join(lines))


def check_paths(found: set[str], want: set[str], layout: str) -> None:
    """UserError unless every parameter has a value."""
    if found != want:
        lacking = ", ".join(sorted(want - found)[:5])
        raise UserError(f"Layout {layout!r} gives no value for parameters {lacking}. Use another.")


# ---- ours -> theirs ---------------------------------------------------------------------------------


def to_state(
    params: Mapping[str, Any], *, layout: str, cube: tuple[int, int, int]
) -> dict[str, Leaf]:
    """Key -> leaf of a state dict, in published order, from path -> array (or leaf).

    Raises:
        UserError: a parameter that the layout has no key for.
    """
    table, flat = names.get(layout), {path: leaf(value) for path, value in params.items()}
    named = _named(table, flat)
    if named != set(flat):
        odd = ", ".join(sorted(named ^ set(flat))[:5])
        fitting = [n for n, other in names.LAYOUTS.items() if _named(other, flat) == set(flat)]
        raise UserError(
            f"Layout {layout!r} and the parameters must match; they differ in {odd}. Layouts of this "
            f"model: {', '.join(sorted(fitting)) or 'none'}."
        )
    shapes = {path: value.shape for path, value in flat.items()}
    return {key: _one(row, block, flat, cube) for row, key, block in keys_of(table, shapes)}


def _named(table: names.Layout, flat: Mapping[str, Leaf]) -> set[str]:
    """The parameters that a layout has keys for, of optional ones those that are there."""
    rows = [row for row in table.rows if row.fits(flat)]
    return {path for row in rows for path in row.ours}


def _one(row: names.Row, block: int | None, flat: Mapping[str, Leaf], cube) -> Leaf:
    inside = [flat[path] for path in row.ours]
    if row.buffer:
        made = BUFFERS[row.buffer].make(inside[0].shape)
        return leaf(made)

    def whole() -> np.ndarray:
        stacked = block is not None and not row.tied
        arrays = [x.rows(block, block + 1)[0] if stacked else x.read() for x in inside]
        turned = [TURNS[row.turn].theirs(x, cube) for x in arrays]
        return turned[0] if len(turned) == 1 else np.concatenate(turned)

    shape = inside[0].shape if block is None or row.tied else inside[0].shape[1:]
    shape = TURNS[row.turn].theirs(np.broadcast_to(np.zeros((), bool), shape), cube).shape
    if len(inside) > 1:
        shape = (shape[0] * len(inside), *shape[1:])
    return deferred(shape, TURNS[row.turn].dtypes[1] or inside[0].dtype, whole)
