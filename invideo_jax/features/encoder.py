"""The encoder of a workdir or of a folder of imported weights, ready to compute features."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import config as config_lib
from invideo_jax import handover, programs, run, sharding
from invideo_jax.errors import UserError
from invideo_jax.interop import models as imported
from invideo_jax.models import pixels

PyTree = Any
KINDS = ("clip", "frame", "token")
FINAL = "final"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A module and its parameters on the devices.

    Attributes:
        module: `VideoEncoder` or `VideoMAEEncoder`, with the shapes that are asked for.
        params: unboxed, placed on the mesh.
        about: what tells these features from others: model, arguments, weights and their digest; JSON-able.
        note: how the weights were fitted to the shapes, one line.
    """

    module: nn.Module
    params: PyTree
    about: Mapping[str, Any]
    note: str


def open_encoder(
    checkpoint: str,
    mesh: jax.sharding.Mesh,
    *,
    ema: bool = True,
    frames: int = 0,
    size: int = 0,
    dtype: jnp.dtype = jnp.float32,
) -> Encoder:
    """Opens the encoder in a checkpoint; learned positions are interpolated to other frames or sizes.

    Args:
        checkpoint: a workdir ('WORKDIR@STEP' for an older step), or a folder that
            `python -m invideo_jax.interop.from_torch` wrote.
        mesh: where parameters go.
        ema: take the moving average where the run keeps one.
        frames, size: of the clips; 0 as the model was made for.
        dtype: what the encoder computes in.

    Raises:
        UserError: nothing there, no encoder in it, or shapes that it cannot take.
    """
    source = handover.open_source(checkpoint, ema=ema, key="--checkpoint")
    old, path = _module(source)
    module = imported.with_encoder(
        old, frames=frames or old.frames, image_size=size or old.image_size, dtype=dtype
    )
    module.check()
    prefix = f"{path}/" if path else ""
    shapes = {
        name.removeprefix(prefix): x for name, x in source.shapes.items() if name.startswith(prefix)
    }
    init = functools.partial(_init, module)
    boxed = jax.eval_shape(init)
    target = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        sharding.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )
    try:
        table = handover.plan(
            target,
            shapes,
            grid=module.grid,
            tubelet=module.tubelet,
            old_grid=old.grid,
            about=source.about,
        )
    except UserError as error:
        what = str(error).partition(" To ")[0]  # the rest is for recipes
        raise UserError(
            f"{checkpoint} must hold the encoder that it says it is of. {what}"
        ) from None
    with sharding.use(mesh):
        params = handover.apply(table, lambda name: source.get(prefix + name), init)
    return Encoder(module, params, _about(module, source), table.summary())


def _module(source: handover.Source) -> tuple[nn.Module, str]:
    """The encoder as it was trained, and where its parameters are."""
    meta = source.meta
    # What a checkpoint says of its model needs no recipe, which another version may read otherwise.
    if text := meta if "arguments" in meta else meta.get("model"):
        return imported.encoder_of(imported.make(text))
    if "config" not in meta:  # parts of several models, 'PART=SPEC;PART=SPEC'
        raise UserError(
            "--checkpoint must name one workdir or one folder of imported weights; got parts of a "
            f"model from {source.about['name']}. Give one of these."
        )
    config = config_lib.from_saved(meta["config"])
    stages = {s.name: s for s in run.place_stages(config, meta["epoch_examples"])}
    program = programs.program(config, stages[meta["stage"]])
    return program.encoder, program.encoder_path


def _init(module: nn.Module) -> PyTree:
    def whole(model, video):
        tokens, _ = model(video)
        return model.pooled(tokens) if _has_pool(model) else tokens

    return module.init(jax.random.key(0), pixels.blank_video(module), method=whole)["params"]


def _has_pool(module: nn.Module) -> bool:
    return getattr(module, "pool_width", 1) > 0


def _about(module: nn.Module, source: handover.Source) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    skip = ("parent", "name", "scan", "remat")
    fields = [f.name for f in dataclasses.fields(module) if f.name not in skip]
    arguments = {f: getattr(module, f) for f in fields if isinstance(getattr(module, f), plain)}
    inner = {f: getattr(module, f) for f in fields if isinstance(getattr(module, f), nn.Module)}
    arguments |= {f: imported.describe(x)["arguments"] for f, x in inner.items()}
    arguments |= {"dtype": np.dtype(module.dtype).name}
    keep = {k: source.about[k] for k in ("weights", "step", "digest") if k in source.about}
    return dict(model=type(module).__name__, arguments=arguments, **keep)


def parse_layers(text: str, depth: int) -> tuple[int | None, ...]:
    """'final,-7' as (None, depth - 7): block numbers from 0, None for what the encoder gives.

    Raises:
        UserError: no such block, or one named twice.
    """
    layers: list[int | None] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if part == FINAL:
            layers.append(None)
            continue
        try:
            number = int(part)
        except ValueError:
            number = depth
        if not -depth <= number < depth:
            raise UserError(
                f"--layer must be 'final' or the number of a block, 0 to {depth - 1} or -1 (the last) "
                f"to -{depth}; got {part!r}."
            )
        layers.append(number % depth)
    if not layers or len(set(layers)) != len(layers):
        raise UserError(f"--layer must name at least one layer, each once; got --layer={text}.")
    return tuple(layers)


def parse_kinds(text: str) -> tuple[str, ...]:
    """'clip,frame' as a tuple in the order of `KINDS`.

    Raises:
        UserError: another kind, or none.
    """
    given = [part.strip() for part in text.split(",") if part.strip()]
    if not given or set(given) - set(KINDS):
        raise UserError(f"--kind must name some of {', '.join(KINDS)}; got --kind={text}.")
    return tuple(kind for kind in KINDS if kind in given)


def array_name(kind: str, layer: int | None) -> str:
    """'clip' for the encoder's result, 'clip_block33' for a block's."""
    return kind if layer is None else f"{kind}_block{layer}"


@functools.lru_cache(maxsize=8)  # one function for equal questions: JAX compiles it once
def make_features(
    module: nn.Module,
    *,
    kinds: tuple[str, ...],
    layers: tuple[int | None, ...],
    dtype: jnp.dtype = jnp.float32,
) -> Callable[[PyTree, jax.Array], dict[str, jax.Array]]:
    """A pure function (params, video uint8 [B, T, S, S, 3]) -> name -> features [B, ...] in `dtype`.

    clip   [B, P]     the encoder's pooled vector; of a block, or without a pool, the mean of the patches
    frame  [B, t, D]  the mean over the patches of each time slot
    token  [B, N, D]  every patch, t-major; class tokens are left out
    """
    t = module.grid[0]

    def features(model: nn.Module, video: jax.Array) -> dict[str, jax.Array]:
        tokens, out = model(video, features=[i for i in layers if i is not None])
        found = {}
        for layer in layers:
            x = tokens if layer is None else out[f"block{layer}"]
            # Behind all class tokens, of which a block may have fewer than the result.
            patches = x[:, -module.tokens :].astype(jnp.float32)
            if "clip" in kinds:
                whole = layer is None and _has_pool(model)
                found[array_name("clip", layer)] = model.pooled(x) if whole else patches.mean(1)
            if "frame" in kinds:
                slots = patches.reshape(len(patches), t, -1, patches.shape[-1])
                found[array_name("frame", layer)] = slots.mean(2)
            if "token" in kinds:
                found[array_name("token", layer)] = patches
        return {name: x.astype(dtype) for name, x in found.items()}

    return lambda params, video: module.apply({"params": params}, video, method=features)
