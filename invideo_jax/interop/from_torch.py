"""PyTorch weights to a folder of ours: `python -m invideo_jax.interop.from_torch --layout=NAME
--input=FILE_OR_FOLDER --output=DIR`. The model is told from the arrays' shapes, and printed.

Arrays go one by one, so that a file of any size converts in little memory; their dtypes stay.
"""

import argparse
import ast
import dataclasses
import fnmatch
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from invideo_jax import command_line, sharding
from invideo_jax.errors import UserError
from invideo_jax.interop import (
    folder,
    hf_config,
    infer,
    infer_sound,
    mapping,
    models,
    names,
    reading,
    safetensors_io,
)
from invideo_jax.interop.leaves import Leaf, cast, deferred, leaf
from invideo_jax.models import positions

PyTree = Any
DTYPES = ("keep", "float32", "bfloat16", "float16")


def to_params(state: Mapping[str, Any], *, layout: str, expected: PyTree) -> PyTree:
    """The parameter tree of a PyTorch state dict.

    Args:
        state: key -> array or `Leaf`.
        layout: name in `names.LAYOUTS`.
        expected: (abstract) parameter tree of the model, without boxes: what shapes must come out.

    Returns:
        Nested dictionary of arrays in the dtypes of `state`, contiguous.

    Raises:
        UserError: keys that are missing or not used, or arrays of another shape than the model's.
    """
    shapes = {path: tuple(x.shape) for path, x in flatten_dict(expected, sep="/").items()}
    leaves = mapping.to_leaves(state, layout=layout, expected=shapes)
    arrays = {path: np.asarray(value.read(), order="C") for path, value in leaves.items()}
    return unflatten_dict(arrays, sep="/")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What shall be other than in the file.

    Attributes:
        frames, image_size: of the new model; 0 as the file's. Position tables are interpolated.
        classes: rows of the head to keep, in this order; None for all.
        drop: patterns of the file's keys to leave out.
        fresh: patterns of our paths that get new values.
        dtype: of the floating-point arrays; 'keep' as they are.
    """

    frames: int = 0
    image_size: int = 0
    classes: Sequence[int] | None = None
    drop: Sequence[str] = ()
    fresh: Sequence[str] = ()
    dtype: str = "keep"


def convert(
    path: str | pathlib.Path,
    *,
    layout: str,
    given: infer.Given | None = None,
    wanted: Wanted | None = None,
    entry: str = "",
) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """Parameters of ours from a file of PyTorch weights; nothing is read of its arrays yet.

    Args:
        path, entry: see `reading.open_weights`.
        layout: name in `names.LAYOUTS`.
        given: what the user says of the file's model.

    Returns:
        Path -> leaf; the text for model.json.

    Raises:
        UserError: keys that are missing or not used, shapes that do not fit; the option that helps.
    """
    given, wanted = given or infer.Given(), wanted or Wanted()
    weights, table = reading.open_weights(path, entry=entry), names.get(layout)
    state, stripped = reading.without_prefixes(weights.state, layout)
    state = {mapping.spelled(key, table): value for key, value in state.items()}
    state, flat = reading.with_time(state, layout)
    notes = [*weights.notes, *stripped, *flat]
    given, own = _with_own_config(given, weights.files[0], layout)
    given = hf_config.read(given, weights.files[0], layout)
    given = infer_sound.read(given, weights.files[0], layout)
    notes += ["built from the file's own settings, 'cfg'"] * bool(given.config)
    state = _without(state, [*table.unused], "of no use here", notes, regular=True)
    state = _without(state, wanted.drop, "dropped", notes)
    text = own or infer.model_text({key: x.shape for key, x in state.items()}, layout, given)
    model = models.make(text)
    models.check(model)
    expected = models.shapes(model)
    kept, table = _without_fresh(expected, table, wanted.fresh)
    known = {key for _, key, _ in mapping.keys_of(names.get(layout), expected)}
    new = known - {key for _, key, _ in mapping.keys_of(table, kept)}
    state = _without(state, sorted(new), "not used, made fresh", notes)
    leaves = mapping.to_leaves(state, layout=layout, expected=kept, table=table)
    model, leaves = _resized(model, leaves, wanted, notes)
    model, leaves = _reclassed(model, leaves, wanted.classes, notes)
    leaves |= _fresh(model, set(expected) - set(kept))
    shapes = models.shapes(model)
    for path_, value in leaves.items():
        mapping.check_shape(value.shape, shapes[path_], path_, path_)
    if wanted.dtype != "keep":
        leaves = {p: cast(x, jax.numpy.dtype(wanted.dtype)) for p, x in leaves.items()}
    source = {file.name: safetensors_io.sha256(file) for file in weights.files}
    meta = models.describe(model) | {"layout": layout, "source": source, "notes": notes}
    return {path_: leaves[path_] for path_ in expected}, meta


def _without(state, patterns: Sequence[str], why: str, notes: list[str], *, regular: bool = False):
    regexes = [re.compile(p if regular else fnmatch.translate(p)) for p in patterns]
    gone = [key for key in state if any(r.search(key) for r in regexes)]
    if not regular:
        idle = [p for p, r in zip(patterns, regexes) if not any(r.search(key) for key in state)]
        if idle and why == "dropped":
            raise UserError(f"--drop must name keys of the file; {', '.join(idle)} names none.")
    if gone:
        more = f" and {len(gone) - 4} more" if len(gone) > 4 else ""
        notes.append(f"{why}: {', '.join(gone[:4])}{more}")
    return {key: value for key, value in state.items() if key not in set(gone)}


def _without_fresh(expected: mapping.Shapes, table: names.Layout, patterns: Sequence[str]):
    """Shapes and rows of what comes from the file."""
    fits = lambda path: any(fnmatch.fnmatchcase(path, p) for p in patterns)
    idle = [p for p in patterns if not any(fnmatch.fnmatchcase(path, p) for path in expected)]
    if idle:
        raise UserError(f"--fresh must name parameters; {', '.join(idle)} names none.")
    rows = tuple(row for row in table.rows if not fits(row.ours[0]))
    kept = {path: shape for path, shape in expected.items() if not fits(path)}
    return kept, dataclasses.replace(table, rows=rows)


def _fresh(model, paths: set[str]) -> dict[str, Leaf]:
    if not paths:
        return {}
    pick = lambda tree: {p: x for p, x in flatten_dict(tree, sep="/").items() if p in paths}
    make = jax.jit(lambda: pick(sharding.unbox(models.init(model, jax.random.key(0)))))
    return {path: leaf(np.asarray(value)) for path, value in make().items()}


def _resized(model, leaves: dict[str, Leaf], wanted: Wanted, notes: list[str]):
    """The model for other clips; its position tables interpolated."""
    if not (wanted.frames or wanted.image_size):
        return model, leaves
    old, _ = models.encoder_of(model)
    frames, size = wanted.frames or old.frames, wanted.image_size or old.image_size
    if (frames, size) == (old.frames, old.image_size):
        return model, leaves
    model = models.with_encoder(model, frames=frames, image_size=size)
    models.check(model)
    new, shapes = models.encoder_of(model)[0], models.shapes(model)
    leaves = dict(leaves)
    for path, value in leaves.items():
        if path in shapes and value.shape != shapes[path] and "position" in path:
            made = lambda path=path, value=value: resized_table(
                path, value.read(), old.grid, new.grid
            )
            leaves[path] = deferred(shapes[path], value.dtype, made)
            notes.append(f"interpolated: {path} {value.shape} -> {shapes[path]}")
    return model, leaves


def resized_table(
    path: str, table: np.ndarray, old: positions.Grid, new: positions.Grid
) -> np.ndarray:
    """A learned position table for another grid; the kind of table is told from its path."""
    (t, h, w), (_, high, wide) = old, new
    kind = path.rpartition("/")[2]
    if kind.endswith("temporal"):
        options = dict(old_times=t, grid=(new[0], 1, 1), old_space=(1, 1), prefix=0)
    elif kind.endswith("spatial"):
        options = dict(old_times=1, grid=(1, high, wide), old_space=(h, w), prefix=0)
    elif "image_" in kind:
        options = dict(
            old_times=1, grid=(1, high, wide), old_space=(h, w), prefix=len(table) - h * w
        )
    else:
        options = dict(old_times=t, grid=new, old_space=(h, w), prefix=len(table) - t * h * w)
    return positions.interpolate(table.astype(np.float32), **options).astype(table.dtype)


def _reclassed(model, leaves: dict[str, Leaf], rows: Sequence[int] | None, notes: list[str]):
    """The model with some of its classes."""
    if rows is None:
        return model, leaves
    if not hasattr(model, "classes"):
        raise UserError("--first_classes and --label_map belong to layouts of classification.")
    if not rows or min(rows) < 0 or max(rows) >= model.classes:
        raise UserError(
            f"The classes to keep must be of 0..{model.classes - 1}; got {len(rows)} from "
            f"{min(rows, default=0)} to {max(rows, default=0)}."
        )
    index = np.asarray(rows)
    notes.append(f"classes: {len(rows)} of {model.classes}")
    for path in ("head/kernel", "head/bias"):
        if path in leaves:
            old = leaves[path]
            take = lambda old=old: old.read()[..., index]
            leaves = leaves | {path: deferred((*old.shape[:-1], len(index)), old.dtype, take)}
    return model.clone(classes=len(rows)), leaves


_OWN_CONFIG = ("heads", "pool_heads", "decoder_heads")  # what shapes do not tell


def _with_own_config(
    given: infer.Given, file: pathlib.Path, layout: str
) -> tuple[infer.Given, dict[str, Any] | None]:
    """What the config.json of a folder that `to_torch` wrote says, where the user says nothing.

    Returns:
        The user's words and what is known beside them; the whole model, where it is of this layout.
    """
    try:
        config = json.loads(file.with_name("config.json").read_text())
        text, of = {name: config[name] for name in ("model", "arguments")}, config["layout"]
        model = models.make(text)
        if of == layout and given == infer.Given():
            return given, text
        encoder = models.encoder_of(model)[0]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return given, None  # none, another program's, or of a model of text
    values = {
        n: getattr(part, n) for part in (model, encoder) for n in _OWN_CONFIG if hasattr(part, n)
    }
    known = infer.Given(
        given.frames or encoder.frames,
        given.image_size or encoder.image_size,
        given.size,
        values | dict(given.values),
    )
    return known, None


# ---- command line -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(
        prog="python -m invideo_jax.interop.from_torch",
        description="Converts PyTorch weights to a folder that training, evaluation and features read.",
        epilog="Any argument of the model that shapes do not tell: --model.heads=12.",
    )
    add = parser.add_argument
    add("--layout", required=True, metavar="NAME", help=f"one of {', '.join(infer.READERS)}")
    add("--input", required=True, metavar="FILE_OR_FOLDER", help="the PyTorch weights")
    add("--output", required=True, metavar="DIR", help="the folder to write")
    add("--entry", default="", metavar="NAME", help="entry of a torch file that holds the weights")
    add(
        "--size", default="", metavar="NAME", help="a known size, for heads that shapes do not tell"
    )
    add("--frames", type=int, default=0, metavar="T", help="of the new model's clips")
    add("--image_size", type=int, default=0, metavar="PIXELS", help="of the new model's clips")
    add("--old_frames", type=int, default=0, metavar="T", help="that the file's model was made for")
    add("--old_image_size", type=int, default=0, metavar="PIXELS", help="the same")
    add(
        "--first_classes",
        type=int,
        metavar="K",
        help="keep the first K rows of the head (K710 to K400)",
    )
    add("--label_map", metavar="FILE", help="json: list of the head's rows to keep, in this order")
    add(
        "--drop",
        default="",
        metavar="PATTERNS",
        help="keys of the file to leave out: 'text_encoder.*'",
    )
    add("--fresh", default="", metavar="PATTERNS", help="parameters to make anew: 'head/*'")
    add("--dtype", default="keep", choices=DTYPES, help="of the written arrays")
    return parser


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    values, rest = {}, []
    for word in argv:
        match = re.fullmatch(r"--model\.(\w+)=(.*)", word, re.DOTALL)
        if not match:
            rest.append(word)
            continue
        try:
            values[match[1]] = ast.literal_eval(match[2])
        except (ValueError, SyntaxError):
            values[match[1]] = match[2]
    return _parser().parse_args(rest), values


def _rows(first: int | None, label_map: str | None) -> list[int] | None:
    if label_map is None:
        return None if first is None else list(range(first))
    try:
        rows = json.loads(pathlib.Path(label_map).read_text())
        if not isinstance(rows, list) or not all(type(x) is int for x in rows):
            raise ValueError("it must be a list of whole numbers")
    except (OSError, ValueError) as error:
        raise UserError(f"--label_map={label_map} cannot be used: {error}.") from error
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0."""
    with command_line.errors_for_people(OSError):
        arguments, values = _arguments(sys.argv[1:] if argv is None else argv)
        output = pathlib.Path(arguments.output)
        if folder.is_folder(output):
            raise UserError(f"--output={output} holds a model already. Give another folder.")
        split = lambda text: [x.strip() for x in text.split(",") if x.strip()]
        leaves, meta = convert(
            arguments.input,
            layout=arguments.layout,
            entry=arguments.entry,
            given=infer.Given(
                arguments.old_frames, arguments.old_image_size, arguments.size, values
            ),
            wanted=Wanted(
                arguments.frames,
                arguments.image_size,
                _rows(arguments.first_classes, arguments.label_map),
                split(arguments.drop),
                split(arguments.fresh),
                arguments.dtype,
            ),
        )
        for note in meta["notes"]:
            print(note)
        _show(meta)
        folder.save_params(output, leaves, meta)
        numbers = sum(int(np.prod(x.shape, dtype=np.int64)) for x in leaves.values())
        kinds = ", ".join(sorted({str(x.dtype) for x in leaves.values()}))
        print(f"wrote {output}: {numbers:,} parameters ({kinds})")
    return 0


def _show(meta: Mapping[str, Any], indent: str = "") -> None:
    print(f"{indent}model {meta['model']}")
    for name, value in meta["arguments"].items():
        if isinstance(value, dict):
            print(f"{indent}  {name}:")
            _show(value, indent + "    ")
        else:
            print(f"{indent}  {name} = {value}")


if __name__ == "__main__":
    sys.exit(main())
