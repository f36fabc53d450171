"""The encoder as a serialised StableHLO program with any batch size: `python -m
invideo_jax.interop.stablehlo --checkpoint=DIR --output=FILE`.

    exported = jax.export.deserialize(open(FILE, "rb").read())
    tokens, pooled = exported.call(video)      # uint8 [B, T, H, W, C]

The weights are in the file, so that it needs JAX and nothing else.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import export

from invideo_jax import command_line
from invideo_jax.errors import UserError
from invideo_jax.interop import models, to_torch
from invideo_jax.interop.leaves import Leaf

PyTree = Any
PLATFORMS = ("cpu", "tpu", "cuda")
MAX_BYTES = 2_000_000_000  # a serialised program (a protocol buffer) cannot be larger


def serialise(
    model: nn.Module,
    params: Mapping[str, Leaf],
    *,
    platforms: Sequence[str] = PLATFORMS,
    dtype: str = "float32",
) -> bytes:
    """The encoder within a model as a program: uint8 [B, T, H, W, C] to (tokens, pooled).

    Args:
        params: path -> leaf, of the whole model.
        platforms: that it shall run on, of `PLATFORMS`.
        dtype: that it computes in; results are float32.

    Raises:
        UserError: weights too large for one file.
    """
    encoder, path = models.encoder_of(models.with_encoder(model, dtype=jnp.dtype(dtype)))
    prefix = f"{path}/" if path else ""
    inside = {k.removeprefix(prefix): x for k, x in params.items() if k.startswith(prefix)}
    size = sum(x.nbytes for x in inside.values())
    if size > MAX_BYTES:
        raise UserError(
            f"The encoder's weights must take at most {MAX_BYTES:,} bytes to go into one program; they "
            f"take {size:,}. Convert them with --dtype=bfloat16 first, or export with to_torch."
        )
    weights = unflatten_dict({k: np.asarray(x.read()) for k, x in inside.items()}, sep="/")

    def features(video: jax.Array) -> tuple[jax.Array, ...]:
        tokens, _ = encoder.apply({"params": weights}, video)
        wide = lambda x: x.astype(jnp.float32)
        if not getattr(encoder, "pool_width", 1):
            return (wide(tokens),)
        pooled = encoder.apply({"params": weights}, tokens, method="pooled")
        return wide(tokens), wide(pooled)

    (batch,) = export.symbolic_shape("batch")
    shape = (batch, encoder.frames, encoder.image_size, encoder.image_size, encoder.channels)
    made = export.export(jax.jit(features), platforms=tuple(platforms))(
        jax.ShapeDtypeStruct(shape, jnp.uint8)
    )
    return bytes(made.serialize())


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="python -m invideo_jax.interop.stablehlo",
        description="Writes the encoder as a StableHLO program that takes any batch size.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a workdir, or a folder of from_torch")
    add("--output", required=True, metavar="FILE", help="the file to write")
    add("--ema", action="store_true", help="the moving average, where the run kept one")
    add("--step", type=int, metavar="N", help="of this step; by default the newest good one")
    add("--platforms", default=",".join(PLATFORMS), metavar="NAMES", help="that it shall run on")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="that it computes in")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0."""
    with command_line.errors_for_people(OSError):
        arguments = _arguments(sys.argv[1:] if argv is None else argv)
        platforms = [x.strip() for x in arguments.platforms.split(",") if x.strip()]
        if not platforms or set(platforms) - set(PLATFORMS):
            raise UserError(
                f"--platforms must name some of {', '.join(PLATFORMS)}; got {arguments.platforms}."
            )
        params, meta = to_torch.open_workdir(
            arguments.checkpoint, ema=arguments.ema, step=arguments.step, key="--checkpoint"
        )
        model = models.make(meta)
        program = serialise(model, params, platforms=platforms, dtype=arguments.dtype)
        pathlib.Path(arguments.output).write_bytes(program)
        encoder, _ = models.encoder_of(model)
        print(
            f"wrote {arguments.output}: {len(program):,} bytes; uint8 [B, {encoder.frames}, "
            f"{encoder.image_size}, {encoder.image_size}, {encoder.channels}] to features, for "
            f"{', '.join(platforms)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
