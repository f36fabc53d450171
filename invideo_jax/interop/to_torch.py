"""Weights of ours to a PyTorch folder: `python -m invideo_jax.interop.to_torch --workdir=DIR
--layout=NAME --output=DIR`.

The folder holds the weights with their published names, config.json, README.md, a certificate, and
model.py, with which `from model import load; load('.')` gives an nn.Module.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from invideo_jax import command_line, stored
from invideo_jax.errors import UserError
from invideo_jax.interop import (
    card,
    certificate,
    folder,
    hf_config,
    mapping,
    models,
    names,
    safetensors_io,
    torch_zip,
)
from invideo_jax.interop.leaves import Leaf, cast, leaf
from invideo_jax.models import pixels

PyTree = Any
FORMATS = ("safetensors", "pth")
DTYPES = ("keep", "float32", "bfloat16", "float16")


def to_state_dict(
    params: PyTree, *, layout: str, cube: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree, keys in the published order.

    Args:
        params: nested dictionary of arrays, without boxes.
        layout: name in `names.LAYOUTS`.
        cube: (frames, rows, columns) of one cube, which the patch kernel does not tell.

    Raises:
        UserError: a parameter that the layout has no key for.
    """
    leaves = mapping.to_state(flatten_dict(params, sep="/"), layout=layout, cube=cube)
    return {key: np.asarray(value.read(), order="C") for key, value in leaves.items()}


def export(
    output: str | pathlib.Path,
    params: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    layout: str,
    file_format: str = "safetensors",
    dtype: str = "keep",
) -> dict[str, Any]:
    """Writes a folder for PyTorch.

    Args:
        output: made when missing; must be empty.
        params: path -> array or leaf.
        meta: 'model' and 'arguments' at least; what else is known of the weights goes to the card.
        layout: name in `names.LAYOUTS`.
        file_format: of `FORMATS`.
        dtype: of floating-point arrays; 'keep' as they are.

    Returns:
        What certificate.json holds.

    Raises:
        UserError: the layout is not one of this model's, or the folder is not empty.
    """
    output = pathlib.Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"The folder to write must be new or empty; got {output}. Give another.")
    model, params = _part(models.make(meta), params, layout)
    shapes = models.shapes(model)
    mapping.check_paths(set(params), set(shapes), layout)
    for path, value in params.items():
        mapping.check_shape(value.shape, shapes[path], path, path)
    state = mapping.to_state(params, layout=layout, cube=models.cube_of(model))
    if dtype != "keep":
        state = {key: cast(x, np.dtype(dtype)) for key, x in state.items()}
    text = dict(models.describe(model), layout=layout)
    config = text
    if models.sees_video(model):
        constants = pixels.NORMALISATION[models.encoder_of(model)[0].normalisation]
        config = dict(text, mean=list(constants[0]), std=list(constants[1]))
    if layout.startswith("videomae_hf"):
        config = hf_config.config(model, layout)
    elif layout in hf_config.TEXT:
        # Both programs read the file, and leave alone what is not theirs.
        config = hf_config.text_config(model, layout) | config
    output.mkdir(parents=True, exist_ok=True)
    if file_format == "pth":
        torch_zip.write(output / "model.pth", state)
    else:
        safetensors_io.write_shards(output, "model", state)
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if layout.startswith("videomae_hf"):
        processor = json.dumps(hf_config.processor(model), indent=1)
        (output / "preprocessor_config.json").write_text(processor + "\n")
    elif certificate.compared(text):
        shutil.copyfile(pathlib.Path(__file__).with_name("torch_model.py"), output / "model.py")
    found = certificate.issue(output, model, params, dtype=dtype, text=text)
    (output / "README.md").write_text(card.text(model, meta, found, state))
    return found


def _part(model: nn.Module, params: Mapping[str, Any], layout: str):
    """The model and its leaves; or of the model in it that the layout is of: an encoder, a tower."""
    known = {path for row in names.get(layout).rows for path in row.ours}
    parts, tower = models.parts_of(model), models.text_tower(model)
    # A BERT with fusion blocks is no model of its own.
    if tower not in (None, model) and getattr(tower, "fusion_from", tower.depth) == tower.depth:
        parts = [*parts, (tower, "text")]
    if getattr(model, "audio", None) is not None:
        parts = [*parts, (model.audio, "audio")]
    for part, path in parts:
        if set(models.shapes(part)) <= known:
            prefix = f"{path}/" if path else ""
            inside = {k.removeprefix(prefix): x for k, x in params.items() if k.startswith(prefix)}
            return part, {k: leaf(x) for k, x in inside.items()}
    return model, {path: leaf(x) for path, x in params.items()}


def open_workdir(
    workdir: str | pathlib.Path,
    *,
    ema: bool = False,
    step: int | None = None,
    key: str = "--workdir",
) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """Parameters of a run's newest good checkpoint, or of a folder that from_torch wrote.

    Args:
        ema: the moving average.
        step: None for the newest.
        key: flag that messages name.

    Returns:
        Path -> leaf; 'model', 'arguments', and where they come from.

    Raises:
        UserError: nothing there, or a model that has no PyTorch counterpart.
    """
    if folder.is_folder(workdir):
        if ema or step is not None:
            raise UserError(f"{workdir} holds imported weights: no moving average, and no steps.")
        meta, lazy = folder.open_params(workdir)
        return lazy.leaves, meta
    if not pathlib.Path(workdir).is_dir():
        raise UserError(
            f"{key} must be the folder of a run, or of weights that from_torch wrote; got {workdir}."
        )
    params, meta = stored.read_params(workdir, step, "ema" if ema else "params")
    if not meta.get("model"):
        raise UserError(
            f"The checkpoints of {workdir} do not say what model they are of, or PyTorch has none like it."
        )
    about = {k: meta[k] for k in ("step", "stage", "config") if k in meta}
    leaves = {path: leaf(x) for path, x in flatten_dict(params, sep="/").items()}
    return leaves, {**meta["model"], **about, "weights": "moving average" if ema else "trained"}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="python -m invideo_jax.interop.to_torch",
        description="Writes weights for PyTorch, with a certificate that both give the same numbers.",
    )
    add = parser.add_argument
    add(
        "--workdir",
        required=True,
        metavar="DIR",
        help="of a run, or a folder that from_torch wrote",
    )
    add(
        "--layout", required=True, metavar="NAME", help=f"one of {', '.join(sorted(names.LAYOUTS))}"
    )
    add("--output", required=True, metavar="DIR", help="the folder to write")
    add("--format", default="safetensors", choices=FORMATS, help="of the weights")
    add("--dtype", default="keep", choices=DTYPES, help="of the weights")
    add("--ema", action="store_true", help="the moving average, where the run kept one")
    add("--step", type=int, metavar="N", help="of this step; by default the newest good one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 where PyTorch gives other numbers than JAX."""
    with command_line.errors_for_people(OSError):
        arguments = _arguments(sys.argv[1:] if argv is None else argv)
        names.get(arguments.layout)
        params, meta = open_workdir(arguments.workdir, ema=arguments.ema, step=arguments.step)
        found = export(
            arguments.output,
            params,
            meta,
            layout=arguments.layout,
            file_format=arguments.format,
            dtype=arguments.dtype,
        )
        print(f"wrote {arguments.output}: {', '.join(found['files'])}")
        checked = found["checked"]
        if "not" in checked:
            print(
                f"not checked: {checked['not']}. Check later: python -m "
                f"invideo_jax.interop.verify {arguments.output}"
            )
            return 0
        for name, gap in checked["differences"].items():
            print(f"{name}: largest difference between JAX and PyTorch {gap:.2e}")
        if max(checked["shares"].values()) > found["bound"]:
            print(f"FAIL: beyond the bound of {found['bound']:.0e}; do not use these weights")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
