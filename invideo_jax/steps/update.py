"""What every train step shares: gradients of sums, accumulation, clipping, the finite guard, EMA."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.sharding import constrain, path_of
from invideo_jax.state import Counters, TrainState

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]
# (params, batch) -> (the loss, more averages by name); every term depends on its own example only.
LossFn = Callable[[PyTree, Batch], tuple[Mean, dict[str, Mean]]]
Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Split:
    """A loss over the whole batch at once, in two parts; what stands for `loss_fn` with `two_pass`.

    Attributes:
        encode: (params, batch) -> arrays [B, ...] by name, floating point; those of a row depend on this row
            only.
        join: (params, these arrays, batch) -> as a `LossFn`; terms may depend on all rows.
    """

    encode: Callable[[PyTree, Batch], dict[str, jax.Array]]
    join: Callable[[PyTree, Mapping[str, jax.Array], Batch], tuple[Mean, dict[str, Mean]]]

    def __call__(self, params: PyTree, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        """The loss, in one pass."""
        return self.join(params, self.encode(params, batch), batch)


_STACK = "blocks"  # a part of a parameter's path under which leaves are stacked over layers


def update(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn | Split,
    tx: optax.GradientTransformation,
    accumulation: int = 1,
    clip_norm: float | None = None,
    schedule: Schedule | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    trainable: PyTree | None = None,
    find_gradients: Callable[..., tuple[Mean, dict[str, Mean], PyTree]] | None = None,
    within_bounds: Callable[[PyTree], PyTree] | None = None,
) -> tuple[TrainState, Metrics]:
    """One train step; pure, so it can be jitted with the state donated.

    Where the loss, a gradient or an update is not finite, parameters, optimiser state and moving
    average stay bitwise what they were; the step counts all the same, and so does `counters`.

    Args:
        state, batch: arrays of the batch are [B, ...].
        loss_fn: gives sums and weights, so that the mean over the whole batch is exact.
        tx: optimiser over the whole parameter tree.
        accumulation: microbatches the batch is cut into; it changes memory and time, no value.
        clip_norm: largest global norm of the gradient; None does not clip.
        schedule: learning rate of the n-th update, for the metrics.
        ema_decay: of the moving average of the parameters; None keeps none.
        ema_warmup: the n-th update uses min(ema_decay, (1 + n) / (10 + n)).
        trainable: bool for each parameter; no gradient is computed where False. None: all True.
        find_gradients: `gradients`, or `two_pass` for a loss that is a `Split`. None: the former.
        within_bounds: puts updated parameters back to where they are allowed to be; None: anywhere.

    Returns:
        The next state, and metrics: `loss` and what `loss_fn` names (`Mean`s); `grad_norm` (before
        clipping); `learning_rate`; `update_ratio/<group>` (norm of the update over that of the
        parameters: one number a block in stacks); `skipped` (so far), `skipped_in_a_row`;
        `first_nonfinite` (-1, or an index that `name_of_leaf` names).

    Raises:
        UserError: a batch that `accumulation` does not divide, or no `ema` to average into.
    """
    if trainable is None:
        trainable = jax.tree.map(lambda _: True, state.params)
    loss, averages, grads = (find_gradients or gradients)(
        loss_fn, state.params, batch, trainable=trainable, accumulation=accumulation
    )
    squares = _squares(grads)
    grad_norm = jnp.sqrt(sum(jnp.sum(x) for x in squares.values()))
    if clip_norm is not None:
        shrink = clip_norm / jnp.maximum(grad_norm, clip_norm)
        grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)
    updates, opt_state = tx.update(_fill(grads, state.params), state.opt_state, state.params)
    moved = _squares(_select(updates, trainable))

    # A sum of squares is finite where all terms are (and below 1e19): one pass finds norm and fault.
    sums = [loss.value, *squares.values(), *moved.values()]
    finite = jnp.stack([jnp.isfinite(x).all() for x in sums])
    # `finite.all()` would say the same, but XLA writes it as a tree of `and`s and copies the tree into
    # every fusion that asks for it: 210,000 of the 240,000 instructions of a small stage 2.
    first = jnp.argmin(finite)
    ok = finite[first]
    applied = state.step - state.counters.skipped
    metrics = {"loss": loss} | averages
    metrics |= {
        "grad_norm": grad_norm,
        "first_nonfinite": jnp.where(ok, -1, first).astype(jnp.int32),
    }
    if schedule is not None:
        metrics["learning_rate"] = schedule(applied)
    metrics |= _update_ratios(moved, _squares(_select(state.params, trainable)))

    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
    params = optax.apply_updates(state.params, updates)
    params = within_bounds(params) if within_bounds is not None else params
    ema = state.ema
    if ema_decay is not None:
        ema = keep(_average(state.ema, params, ema_decay, ema_warmup, applied), state.ema)
    counters = Counters(
        skipped=state.counters.skipped + ~ok,
        skipped_in_a_row=jnp.where(ok, 0, state.counters.skipped_in_a_row + 1),
    )
    metrics |= {"skipped": counters.skipped, "skipped_in_a_row": counters.skipped_in_a_row}
    new = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        ema=ema,
        counters=counters,
    )
    return new, metrics


def named_averages(loss_fn: LossFn) -> Callable[[PyTree, Batch], dict[str, Mean]]:
    """(params, batch) -> averages by name, `loss` among them: what evaluations take."""

    def evaluate(params: PyTree, batch: Batch) -> dict[str, Mean]:
        loss, averages = loss_fn(params, batch)
        return {"loss": loss} | averages

    return evaluate


def gradients(
    loss_fn: LossFn, params: PyTree, batch: Batch, *, trainable: PyTree, accumulation: int = 1
) -> tuple[Mean, dict[str, Mean], PyTree]:
    """The loss over the whole batch, more averages, and the gradient of the loss's mean.

    Sums over microbatches are made in float32 (float64 stays float64) and divided once, by the
    weight of the whole batch; so the result does not depend on how the batch was cut.

    Returns:
        Loss, averages, and a gradient for each trainable parameter (None in place of the others).
    """
    free, frozen = _select(params, trainable), _select(params, trainable, invert=True)

    def total(free, batch):
        loss, averages = loss_fn(_merge(free, frozen), batch)
        return loss.total, (jax.lax.stop_gradient(loss), averages)

    grad = jax.grad(total, has_aux=True)
    if accumulation == 1:
        sums, (loss, averages) = grad(free, batch)
    else:
        sums, (loss, averages) = _accumulate(grad, free, batch, accumulation)
    return loss, averages, _per_weight(sums, loss)


def two_pass(
    split: Split, params: PyTree, batch: Batch, *, trainable: PyTree, accumulation: int = 1
) -> tuple[Mean, dict[str, Mean], PyTree]:
    """As `gradients`, of a loss that looks at the whole batch at once; just as exact.

    The first pass encodes all microbatches and keeps only what `join` reads; `join` gives the loss, and
    its gradient by that; the second pass encodes each microbatch again and takes this gradient back to the
    parameters. So activations are held for one microbatch.

    Source: GradCache (arXiv:2101.06983).
    """
    if accumulation == 1:
        return gradients(split, params, batch, trainable=trainable)
    free, frozen = _select(params, trainable), _select(params, trainable, invert=True)
    rows = _check_parts(batch, accumulation) // accumulation
    encoded = in_parts(split.encode, rows)(params, batch)

    def total(free, encoded):
        loss, averages = split.join(_merge(free, frozen), encoded, batch)
        return loss.total, (jax.lax.stop_gradient(loss), averages)

    grad = jax.grad(total, (0, 1), has_aux=True)
    (sums, cotangents), (loss, averages) = grad(free, encoded)

    def pull(free, rows):
        batch, cotangents = rows
        _, back = jax.vjp(lambda free: split.encode(_merge(free, frozen), batch), free)
        return back(cotangents)[0]

    more = _accumulate(pull, free, (batch, cotangents), accumulation)
    return loss, averages, _per_weight(jax.tree.map(jnp.add, sums, more), loss)


def _per_weight(sums: PyTree, loss: Mean) -> PyTree:
    weight = jnp.maximum(loss.weight, jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(lambda g: (g / weight).astype(g.dtype), sums)


def _check_parts(batch: PyTree, parts: int) -> int:
    rows = {x.shape[0] for x in jax.tree.leaves(batch)}
    if any(n % parts for n in rows):
        raise UserError(
            f"The batch must be a multiple of accumulation; got batch={max(rows)}, "
            f"accumulation={parts}. Change either."
        )
    return max(rows)


def _accumulate(grad: Callable, params: PyTree, batch: PyTree, parts: int):
    _check_parts(batch, parts)
    micro = _microbatches(batch, parts)
    widen = lambda x: jnp.promote_types(x.dtype, jnp.float32)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, widen(x)), shapes)

    def body(sums, rows):
        found = grad(params, on_rows(rows))
        return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, found), None

    return jax.lax.scan(body, zeros, micro)[0]


def parts_of(size: int, rows: int) -> int:
    """The fewest equal parts of `size` rows that have at most `rows` rows each."""
    return next(n for n in range(1, size + 1) if size % n == 0 and size // n <= rows)


def in_parts(apply: Callable[[PyTree, Batch], dict[str, jax.Array]], rows: int):
    """`apply` on at most `rows` rows of the batch at a time, so that what it holds for all of them is small.

    Args:
        apply: (parameters, batch) -> entries [B, ...]; those of a row depend on this row only.
        rows: of a microbatch of the train step, say. A batch that it does not divide is cut into the fewest
            equal parts that are as small.

    Returns:
        The same function.
    """

    def run(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        whole = next(iter(batch.values())).shape[0]
        parts = parts_of(whole, rows)
        if parts == 1:
            return apply(params, batch)
        body = lambda _, micro: (None, on_rows(apply(params, on_rows(micro))))
        _, made = jax.lax.scan(body, None, _microbatches(batch, parts))
        join = lambda x: x.swapaxes(0, 1).reshape(whole, *x.shape[2:])
        return on_rows({name: join(x) for name, x in made.items()})

    return run


def _microbatches(batch: PyTree, parts: int) -> PyTree:
    """Arrays [parts, B / parts, ...]; microbatch m has rows m, m + parts, ... of the batch.

    So every device keeps working on rows it holds.
    """
    cut = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(cut, batch)


def on_rows(batch: PyTree) -> PyTree:
    """Says of arrays [B, ...] that their rows lie over the devices as those of a batch."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), batch)


def name_of_leaf(index: int, params: PyTree, trainable: PyTree | None = None) -> str:
    """What the metric `first_nonfinite` points at: 'loss', 'gradient of a/b', 'update of a/b'.

    Args:
        index: at least 0.
        params, trainable: trees that the step was given.
    """
    if trainable is not None:
        params = _select(params, trainable)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = ["loss", *(f"gradient of {p}" for p in paths), *(f"update of {p}" for p in paths)]
    return names[int(index)]


def _squares(tree: PyTree) -> dict[str, jax.Array]:
    """Sum of squares of each leaf by path; one number a layer, [layers], in stacks of blocks."""

    def one(path: str, x: jax.Array) -> jax.Array:
        x = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return x.sum(tuple(range(1, x.ndim)) if _STACK in path.split("/") else None)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): one(path_of(path), x) for path, x in leaves}


def _is_none(x: Any) -> bool:
    return x is None


def _select(tree: PyTree, mask: PyTree, *, invert: bool = False) -> PyTree:
    """`tree` with None (which JAX takes for an absent leaf) where the mask is False."""
    return jax.tree.map(lambda x, take: x if bool(take) != invert else None, tree, mask)


def _merge(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=_is_none)


def _fill(grads: PyTree, params: PyTree) -> PyTree:
    """Zero gradients where there is none; the optimiser of a frozen parameter drops them."""
    fill = lambda g, p: jnp.zeros_like(p) if g is None else g
    return jax.tree.map(fill, grads, params, is_leaf=_is_none)


def _average(ema: PyTree, params: PyTree, decay: float, warmup: bool, applied: jax.Array) -> PyTree:
    if not jax.tree.leaves(ema):
        raise UserError(
            f"ema_decay={decay} needs a moving average in the state; got an empty one. "
            "Create the state with keep_ema=True."
        )
    if warmup:
        decay = jnp.minimum(decay, (1.0 + applied) / (10.0 + applied))
    one = lambda e, p: (decay * e + (1.0 - decay) * p).astype(e.dtype)
    return jax.tree.map(one, ema, params)


def _update_ratios(moved: dict[str, jax.Array], sizes: dict[str, jax.Array]) -> Metrics:
    """Norm of the update over norm of the parameters: of each block, and of each top-level rest."""
    groups: dict[str, list[str]] = {}
    for path in moved:
        parts = path.split("/")
        stack = parts.index(_STACK) + 1 if _STACK in parts else 1
        groups.setdefault("/".join(parts[:stack]), []).append(path)
    ratios = {}
    for group, paths in groups.items():
        up, size = (jnp.sqrt(sum(x[p] for p in paths)) for x in (moved, sizes))
        ratios[f"update_ratio/{group}"] = up / jnp.maximum(size, 1e-12)
    return ratios
