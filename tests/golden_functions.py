"""Functions for `tests.golden`: learning-rate schedule, initial values, position tables, inflation."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import optim, sharding
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import classifier, positions, video_encoder
from invideo_jax.models.classifier import Classifier
from tests.golden import Outcome, Tensors


def run_schedule(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """`cosine_scheduler`: each named case has its arguments and the value of every step."""
    made, theirs = {}, {}
    for name, case in meta.items():
        if name == "file":
            continue
        said = dict(case["args"])
        each = said.pop("niter_per_ep")
        steps = said.pop("epochs") * each
        warmup = said.pop("warmup_epochs", 0) * each
        given = said.pop("warmup_steps", -1)
        schedule = optim.make_schedule(
            "cosine",
            peak=said.pop("base_value"),
            end=said.pop("final_value"),
            warmup_start=said.pop("start_warmup_value", 0.0),
            steps=steps,
            warmup_steps=given if given > 0 else warmup,
        )
        if said:
            raise ValueError(f"arguments {', '.join(said)} are not known here")
        made[f"{name}/values"] = jax.vmap(schedule)(jnp.arange(steps))
        theirs[f"{name}/values"] = np.asarray(case["values"])
    # Rates are small: a bound of their own, relative to the highest.
    bounds = {k: 1e-6 * float(np.abs(v).max()) for k, v in theirs.items()}
    return Outcome(made, wanted=theirs, bounds=bounds)


def _tiny(depth: int) -> Classifier:
    """The classifier whose initial values the file of statistics describes."""
    encoder = video_encoder.VideoEncoder(
        width=64, depth=depth, heads=2, mlp_width=279, frames=4, image_size=56, pool_heads=4,
        pool_width=80,
    )  # fmt: skip
    return Classifier(encoder, classes=11, init_scale=0.001)


def run_initial_values(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Mean, deviation and largest size of every initial array, within what chance allows."""
    stats = meta["stats"]
    model = _tiny(1 + max(int(m.group(1)) for k in stats if (m := re.match(r"blocks\.(\d+)", k))))
    params = sharding.unbox(jax.jit(lambda: classifier.init(model, jax.random.key(0)))())
    ours = to_state_dict(
        jax.device_get(params), layout="internvideo2_classification", cube=(1, 14, 14)
    )
    if set(ours) != set(stats):
        raise ValueError(f"parameters differ: {sorted(set(ours) ^ set(stats))[:5]}")
    made, theirs, bounds = {}, {}, {}
    for name, (mean, deviation, largest) in stats.items():
        x = np.asarray(ours[name], np.float64)
        fixed = "pos_embed" in name or deviation == 0
        # Five standard errors of a mean, of a deviation; the largest of n normal numbers is within
        # a deviation and a half of another draw's.
        chance = np.array([x.size**-0.5, (2 * x.size) ** -0.5, 0.3]) * 5 * deviation
        made[f"stats/{name}"] = np.array([x.mean(), x.std(ddof=1), np.abs(x).max()])
        theirs[f"stats/{name}"] = np.array([mean, deviation, largest])
        made[f"stats/{name}"] /= np.maximum(chance, 1e-6) if not fixed else 1
        theirs[f"stats/{name}"] /= np.maximum(chance, 1e-6) if not fixed else 1
        bounds[f"stats/{name}"] = 1e-6 if fixed else 2**0.5
    return Outcome(made, wanted=theirs, bounds=bounds)


def run_positions(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Sine tables, interpolation of learned ones, inflation of patch kernels, by the tensors' names."""
    made = {name: _table(name.removeprefix("t/"), inputs) for name in wanted}
    given = {name for name, value in made.items() if value is None}
    made = {name: value for name, value in made.items() if value is not None}
    return Outcome(made, given=frozenset(given), bounds={name: 1e-6 for name in made})


def _table(name: str, inputs: Tensors) -> np.ndarray | None:
    """What the name says; None for a source, ValueError for a name of no known form."""
    number = lambda pattern: [int(n) for n in re.fullmatch(pattern, name).groups() if n]
    if name.startswith(("interp_src", "inflate_src")):
        return None
    if name.startswith("plain"):
        t, h, w, width = number(r"plain_(\d+)x(\d+)x(\d+)_d(\d+)")
        return positions.sinusoid(t * h * w, width)[None]
    if name.startswith("interp_224"):  # every 97th row of a table that needs no interpolation
        width, rows = number(r"interp_224_f8_d(\d+)\(pre=(\d+);8x14x14\)")
        return positions.sinusoid(rows, width)[None, ::97]
    if name.startswith("sincos1d"):
        width, length = number(r"sincos1d_d(\d+)_t(\d+)")
        return positions.sincos_1d(length, width)
    if name.startswith("sincos2d"):
        width, side = number(r"sincos2d_d(\d+)_grid(\d+)")
        return positions.sincos_2d(side, side, width)
    if name.startswith("sincos3d"):
        what, _, rows = name.partition("_rows_")
        width, side, t = (int(n) for n in re.findall(r"_[a-z]+(\d+)", what))
        table = positions.sincos_3d((t, side, side), width, prefix=int("_cls" in what))
        return table[[int(row) for row in rows.split("_")]] if rows else table
    if name.startswith("interp_T"):
        source = next(k for k in inputs if k.startswith("t/interp_src_T"))
        old = int(re.search(r"_T(\d+)_", source).group(1))
        t, h, w = number(r"interp_T(\d+)_(\d+)x(\d+)")
        return positions.interpolate(inputs[source][0], old_times=old, grid=(t, h, w))[None]
    if name.startswith("inflate_"):
        how, tubelet = re.fullmatch(r"inflate_(center|mean)_t(\d+)", name).groups()
        source = inputs["t/inflate_src"]
        flat = source.transpose(2, 3, 1, 0).reshape(-1, len(source))
        cube = positions.inflate(flat, int(tubelet), centre=how == "center")
        rows, columns, channels = *source.shape[2:], source.shape[1]
        return cube.reshape(int(tubelet), rows, columns, channels, -1).transpose(4, 3, 0, 1, 2)
    raise ValueError(f"no function here makes {name}")


def _is_schedule(meta: Mapping[str, Any], tensors: Tensors) -> bool:
    cases = [v for k, v in meta.items() if k != "file"]
    return not tensors and all(
        isinstance(v, dict) and "niter_per_ep" in v.get("args", {}) for v in cases
    )


FAMILIES = [
    (_is_schedule, run_schedule),
    (lambda meta, tensors: not tensors and "stats" in meta, run_initial_values),
    (lambda meta, tensors: any(k.startswith("t/sincos") for k in tensors), run_positions),
]
