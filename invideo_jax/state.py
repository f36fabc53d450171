"""TrainState: the only learned state of a run, and its shapes and shardings."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

PyTree = Any


@flax.struct.dataclass
class Counters:
    """What the run has counted; part of the state, so that a resumed run counts on.

    Attributes:
        skipped: int32 [], updates not applied because something was not finite.
        skipped_in_a_row: int32 [], the same since the last applied update.
    """

    skipped: jax.Array
    skipped_in_a_row: jax.Array


@flax.struct.dataclass
class TrainState:
    """Everything a train step reads and writes.

    Attributes:
        step: int32 [], train steps done in this stage (also those whose update was skipped).
        params: all float32 parameters of the model, frozen ones too, as the model's `init` gives.
        opt_state: optax state of the trainable parameters.
        ema: moving average of `params` (same tree), or `{}` when the stage keeps none.
        counters: see `Counters`.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    counters: Counters


def create(params: PyTree, tx: optax.GradientTransformation, *, keep_ema: bool) -> TrainState:
    """A fresh state around `params`; pure, so it can be jitted or `eval_shape`d.

    Args:
        params: unboxed parameter tree.
        tx: the optimiser; it sees the whole tree (frozen leaves are its business).
        keep_ema: whether `ema` starts as a copy of `params` or stays `{}`.
    """
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero(),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if keep_ema else {},
        counters=Counters(skipped=zero(), skipped_in_a_row=zero()),
    )
