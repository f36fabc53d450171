"""What contrastive losses need on a TPU chip, said by the TPU compiler; no TPU is needed, but libtpu is.

    pip install -e ".[aot]"
    python tests/benchmarks/bench_contrastive_memory.py [--only=ring] [--topology=v5p:8x8x16] [--width=768]

Compiles loss and gradients (embeddings, temperature; float32), the draw of hard negatives, and taking rows
by number for 65,536 and 1,048,576 pairs over all chips of a TPU that is not there. Runs nothing. Prints
memory per chip (arguments, results, temporaries, and the most at one time) and what a chip's collectives give, each with the
trips of its loop. Ends with status 1 where the ring at the larger size needs more than 256 MB.
"""

import argparse
import collections
import functools
import importlib.util
import os
import re
import sys
import time

# The compiler asks for no device; the topology that is compiled for is named below, not here.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from invideo_jax import pairs, sharding  # noqa: E402

MOST = 256e6  # bytes a chip at LARGE pairs, the aim
SMALL, LARGE = 65_536, 1_048_576
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_OPERATION = re.compile(rf"= (\(?)(.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def array_bytes(text: str) -> list[int]:
    """Bytes of each array whose type stands in a piece of HLO."""
    found = []
    for kind, shape in _ARRAY.findall(re.sub(r"\{.*?\}", "", text)):
        size = _SIZES.get(kind, 0)
        for n in filter(None, shape.split(",")):
            size *= int(n)
        found.append(size)
    return found


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """Kind -> (how often it runs, bytes of its results), trips of loops counted."""
    bodies, name = collections.defaultdict(list), None
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "ENTRY" if start[1] else start[2]
        elif name:
            bodies[name].append(line)
    found = collections.defaultdict(lambda: [0, 0.0])

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            if made := _OPERATION.search(line):
                sizes = array_bytes(made[2])
                # A start gives what goes in, what comes out, and flags; others give what comes out.
                size = sizes[1] if made[4] and made[3] == "collective-permute" else sum(sizes)
                found[made[3]][0] += times
                found[made[3]][1] += times * size
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                ends = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[loop[1]]))
                visit(loop[2], times * max(map(int, ends), default=1))

    visit("ENTRY", 1)
    return {kind: tuple(value) for kind, value in found.items()}


def programs(form: str, kind: str, chunk: int) -> dict:
    """What is compiled, by name: functions of (a, b, temperature, ids, valid, keys, index)."""
    options = dict(form=form, chunk=chunk)

    def loss(a, b, temperature, ids, valid, *_):
        said = dict(temperature=temperature, ids=ids, valid=valid, kind=kind, **options)
        return pairs.contrastive(a, b, **said).value

    def draw(a, b, temperature, ids, valid, keys, _):
        keys = jax.random.wrap_key_data(keys)
        said = dict(temperature=temperature, ids=ids, valid=valid, **options)
        return pairs.hard_negatives(keys, a, b, **said)

    def take(a, *rest):
        return jnp.square(pairs.take_rows(a, rest[-1], form=form)).sum()

    return {"loss": jax.value_and_grad(loss, (0, 1, 2)), "draw": draw, "take": jax.grad(take)}


def compiled(f, mesh, size: int, width: int):
    """The program of `f` on the mesh."""
    rows, whole = sharding.batch_sharding(mesh), jax.NamedSharding(mesh, jax.P())

    def array(shape, dtype, where=rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    side = array((size, width), jnp.float32)
    more = ((size,), jnp.uint32), ((size,), bool), ((size, 2), jnp.uint32), ((size,), jnp.int32)
    given = side, side, array((), jnp.float32, whole), *(array(*x) for x in more)
    with sharding.use(mesh):
        results = jax.tree.map(lambda x: rows if x.ndim else whole, jax.eval_shape(f, *given))
        return jax.jit(f, out_shardings=results).lower(*given).compile()


def report(label: str, make, chips: int) -> float:
    """Prints a line of the table; returns the most bytes a chip holds at one time."""
    start = time.perf_counter()
    try:
        program = make()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm", str(error))
        print(f"| {label} | does not fit: {needs[0] if needs else 'RESOURCE_EXHAUSTED'} | | | | |")
        return float("inf")
    memory = program.memory_analysis()
    sizes = [
        getattr(memory, f"{part}_in_bytes")
        for part in ("argument_size", "output_size", "temp_size", "peak_memory")
    ]
    total = max(sum(sizes[:3]), sizes[3])
    seen = ", ".join(
        f"{count} {kind} {size / 1e6:.1f} MB"
        for kind, (count, size) in sorted(collectives(program.as_text()).items())
    )
    cells = " | ".join(f"{size / 1e6:.1f}" for size in (*sizes[:3], total))
    print(f"| {label} | {cells} | {seen} |", flush=True)
    print(f"{label}: {time.perf_counter() - start:.0f} s on {chips} chips", file=sys.stderr)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5p:8x8x16", help="name of a TPU topology")
    parser.add_argument("--fsdp", type=int, default=64, help="size of the mesh axis fsdp")
    parser.add_argument("--width", type=int, default=768, help="width of the embeddings")
    parser.add_argument("--chunk", type=int, default=1024, help="columns scored at a time")
    parser.add_argument("--only", default="", help="part of the names of the rows that are wanted")
    given = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print('Skipped: the TPU compiler is absent. pip install -e ".[aot]" brings it (libtpu).')
        return
    wrap = (True,) * (given.topology.count("x") + 1)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=given.topology, wrap=wrap)
    chips = len(topology.devices)
    mesh = sharding.make_mesh(fsdp=given.fsdp, devices=topology.devices)
    print(
        f"{given.topology}, {chips} chips, width {given.width}, chunk {given.chunk}; MB = 10^6 bytes\n"
    )
    print("| | arguments | results | temporaries | in all | collectives of a step |")
    print("|---|---|---|---|---|---|")
    most = 0.0
    for name, form, kind, size in (
        ("loss", "dense", "softmax", SMALL),
        ("loss", "chunked", "softmax", SMALL),
        ("loss", "ring", "softmax", SMALL),
        ("loss", "ring", "sigmoid", SMALL),
        ("loss", "dense", "softmax", LARGE),
        ("loss", "chunked", "softmax", LARGE),
        ("loss", "ring", "softmax", LARGE),
        ("loss", "ring", "sigmoid", LARGE),
        ("draw", "ring", "softmax", LARGE),
        ("take", "ring", "softmax", LARGE),
    ):
        f = programs(form, kind, given.chunk)[name]
        what = f"{name}, {kind}" if name == "loss" else name
        label = f"{what}, {form}, {size:,} pairs"
        if given.only not in label:
            continue
        needs = report(label, functools.partial(compiled, f, mesh, size, given.width), chips)
        most = max(most, needs if (form, size) == ("ring", LARGE) else 0)
    print(f"\nThe most of the ring at {LARGE:,} pairs: {most / 1e6:.1f} MB a chip.")
    sys.exit(most > MOST)


if __name__ == "__main__":
    main()
