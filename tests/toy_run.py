"""A small training run around checkpoint.py, runtime.py and workdir.py, started as a process by the tests.

It prints what it does ('restored 7', 'step 8', 'saving 8', 'final DIGEST'), so that a test can hurt it at that moment.
"""

import argparse
import contextlib
import functools
import sys
import threading
import time

from invideo_jax import runtime


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--keep", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--at", type=int, default=-1)
    parser.add_argument(
        "--do",
        default="",
        help="at that step: raise, thread, exit, hang, handler, differ, unreadable",
    )
    parser.add_argument("--on", type=int, default=0, help="process that does it")
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    return parser.parse_args()


def say(*words):
    print(*words, flush=True)


def shapes(rows):
    """Shape and axes of each leaf of the toy state."""
    return dict(
        step=((), ()),
        params=dict(w=((rows, 32), ("data", None)), b=((32,), ())),
        opt_state=dict(w=((rows, 32), (None, None)), b=((32,), ())),
        ema=dict(w=((rows, 32), (None, "data")), b=((32,), ())),
    )


def abstract_state(mesh, rows):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    def leaf(path, row):
        dtype = jnp.int32 if path[0].key == "step" else jnp.float32
        sharding = NamedSharding(mesh, PartitionSpec(*row[1]))
        return jax.ShapeDtypeStruct(row[0], dtype, sharding=sharding)

    is_row = lambda x: isinstance(x, tuple)
    return jax.tree_util.tree_map_with_path(leaf, shapes(rows), is_leaf=is_row)


def make_step(abstract):
    """A step of integer-valued arithmetic: exact, so equal on every mesh."""
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
    def init():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)

    @functools.partial(
        jax.jit, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, abstract)
    )
    def step(state):
        key = jax.random.fold_in(jax.random.key(7), state["step"])
        noise = lambda x: jax.random.randint(key, x.shape, -9, 9).astype(jnp.float32)
        clip = lambda x: jnp.clip(x, -1000.0, 1000.0)
        moment = jax.tree.map(lambda m: clip(m + noise(m)), state["opt_state"])
        params = jax.tree.map(lambda p, m: clip(p + m), state["params"], moment)
        ema = jax.tree.map(lambda e, p: clip(e + p), state["ema"], params)
        return dict(step=state["step"] + 1, params=params, opt_state=moment, ema=ema)

    return init, step


def misbehave(what):
    import signal

    if what == "raise":
        raise FloatingPointError("planned")
    if what == "thread":
        threading.Thread(target=lambda: 1 / 0).start()
        time.sleep(60)
    if what == "exit":
        sys.exit(0)
    if what == "hang":
        say("hanging")
        time.sleep(600)
    if what == "handler":
        signal.signal(signal.SIGTERM, lambda *_: None)


def refuse_to_read(step):
    """Reading this step fails in this process only."""
    from invideo_jax import stored

    real = stored.read_onto

    def read_onto(folder, wanted):
        if folder.name == str(step):
            raise OSError("planned")
        return real(folder, wanted)

    stored.read_onto = read_onto


def main() -> int:
    args, stop = arguments(), False
    runtime.start(
        args.coordinator_address,
        args.num_processes,
        args.process_id,
        heartbeat_seconds=10,
        shutdown_seconds=15,
        initialization_seconds=60,
    )
    import jax

    from invideo_jax import checkpoint, digests, workdir

    say("processes", jax.process_count(), "devices", jax.device_count())
    odd = args.do == "differ" and jax.process_index() == args.on
    runtime.same_everywhere(dict(config="b" if odd else "a", jax=jax.__version__))
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(workdir.Lock(args.workdir))
            except runtime.RunError as held:
                error = held
        runtime.fail_together(error)
        dog = stack.enter_context(
            runtime.Watchdog(args.workdir, dict(startup=60, step=args.limit, save=60, eval=60))
        )
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(f"{args.workdir}/checkpoints", keep_last=args.keep)
        )
        runtime.before_exit(checkpoints.last_words)
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
        abstract = abstract_state(mesh, args.rows)
        init, train_step = make_step(abstract)
        if args.do == "unreadable" and jax.process_index() == args.on:
            refuse_to_read(4)
        restored = checkpoints.restore(abstract, log=say)
        if restored is None:
            state, first = init(), 0
            say("fresh")
        else:
            state, meta = restored
            first = meta["n"]
            say("restored", first)
        for n in range(first + 1, args.steps + 1):
            state = train_step(state)
            if n == args.at and jax.process_index() == args.on:
                misbehave(args.do)
            jax.block_until_ready(state)
            dog.beat("step")
            say("step", n)
            stop = runtime.preempted()
            if n % args.every == 0 or n == args.steps or stop or checkpoints.retry_due():
                say("saving", n)
                checkpoints.save(n, state, dict(n=n), wait=stop)
            if stop:
                say("stopping", n)
                break
            time.sleep(args.pause)
        checkpoints.wait()
        found, _ = digests.tree_digests(state)
        rows = {name: ((), "", digest) for name, digest in found.items()}
        say("final", digests.combined(rows))
    return runtime.stop_code() if stop else 0


if __name__ == "__main__":
    sys.exit(main())
