"""What limits the train step on a CPU: CPU seconds of the step, of its parts, and of the step without some of them.

    python tests/benchmarks/bench_step_parts.py --size=S --image_size=112 --ratio=0.8 --batch_size=8

    step       the whole public step
    gradient   loss and gradients: the step without optimiser, finite guard and metrics
    forward    the loss alone
    matmuls    every matrix product of `gradient`, by its shapes, on random numbers and nothing else
    no gelu, no softmax, no norm
               `gradient` with that function left out, forward and backward

CPU time of the process, not wall time: on a machine that does other things too, that is what can be compared (not with PyTorch,
whose threads spend it waiting). The parts take turns; medians, and GFLOP/s of the matrix products for one core.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import bench_step  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.extend import core  # noqa: E402

from invideo_jax import sharding  # noqa: E402
from invideo_jax.models import layers, video_mae  # noqa: E402
from invideo_jax.steps import masked  # noqa: E402
from invideo_jax.steps.update import gradients  # noqa: E402

WITHOUT = {
    "no gelu": (layers.ACTIVATIONS, "gelu", lambda x: x),
    "no softmax": (jax.nn, "softmax", lambda x, axis: x),
    "no norm": (layers.LayerNorm, "__call__", lambda self, x: x),
}


def products(jaxpr) -> list:
    """The matrix products of a traced function, those of inner functions too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)
        ):
            if isinstance(inner, core.ClosedJaxpr):
                found += products(inner.jaxpr)
    return found


def flops(equation) -> int:
    """Multiplications and additions of one matrix product."""
    (contract, _), _ = equation.params["dimension_numbers"]
    depth = np.prod([equation.invars[0].aval.shape[i] for i in contract])
    return int(2 * depth * np.prod(equation.outvars[0].aval.shape))


def make_parts(options, video) -> tuple[dict[str, Callable[[], object]], float]:
    """Part -> a function that does it once and waits; and the GFLOP of the matrix products."""
    made = video_mae.build(
        options.size, image_size=options.image_size, frames=options.frames, scan=False
    )
    params = jax.jit(lambda: sharding.unbox(video_mae.init(made, jax.random.key(0))))()
    count = len(video)
    batch = dict(
        video=jnp.asarray(video),
        position=jnp.arange(count, dtype=jnp.uint32),
        label=jnp.full(count, -1),
        valid=jnp.ones(count, bool),
    )
    mask = dict(name="tube", ratio=options.ratio)
    loss_fn = masked.make_loss(model=made, stage_key=jax.random.key(1), mask=mask)
    everything = jax.tree.map(lambda _: True, params)
    gradient = lambda p, b: gradients(loss_fn, p, b, trainable=everything)
    ready = lambda fn, *args: lambda: jax.block_until_ready(fn(*args))
    parts = {
        "step": bench_step.ours(options, video),
        "gradient": ready(jax.jit(gradient), params, batch),
        "forward": ready(jax.jit(lambda p, b: loss_fn(p, b)[0].value), params, batch),
    }
    dots = products(jax.make_jaxpr(gradient)(params, batch).jaxpr)
    inputs = [[jnp.ones(v.aval.shape, v.aval.dtype) for v in dot.invars] for dot in dots]
    alone = jax.jit(lambda many: [d.primitive.bind(*xs, **d.params) for d, xs in zip(dots, many)])
    parts["matmuls"] = ready(alone, inputs)
    for name, (place, key, instead) in WITHOUT.items():
        patch = (
            mock.patch.dict(place, {key: instead})
            if isinstance(place, dict)
            else mock.patch.object(place, key, instead)
        )
        with patch:
            compiled = jax.jit(lambda p, b: gradient(p, b)).lower(params, batch).compile()
        parts[name] = ready(compiled, params, batch)
    return parts, sum(map(flops, dots)) / 1e9


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="S")
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    options.scan, options.remat = False, "none"
    shape = (options.batch_size, options.frames, options.image_size, options.image_size, 3)
    video = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    parts, gflop = make_parts(options, video)
    spent = {name: [] for name in parts}
    for _ in range(options.repeats + 2):
        for name, part in parts.items():
            begin = time.process_time()
            part()
            spent[name].append(1e3 * (time.process_time() - begin))
    medians = {name: statistics.median(values[2:]) for name, values in spent.items()}  # two warm up
    for name, value in medians.items():
        share = f"{value / medians['step']:6.0%} of the step"
        least = f"least {min(spent[name][2:]):7.1f}"
        print(f"{name:10} {value:8.1f} ms of CPU time  {least}  {share}")
    for name in WITHOUT:
        print(
            f"{name.removeprefix('no '):8} costs {1 - medians[name] / medians['gradient']:6.1%} of the gradient"
        )
    rate = gflop / medians["matmuls"] * 1e3
    print(
        f"matrix products: {gflop:.1f} GFLOP, {rate:.0f} GFLOP/s a core alone, {gflop / medians['step'] * 1e3:.0f} in the step"
    )


if __name__ == "__main__":
    main()
