"""Pairs over the whole global batch: contrastive losses, hard negatives, rows by number.

Three forms of the same numbers. 'dense' holds all scores [B, B]. 'chunked' holds those of a device's
rows and `chunk` columns, and all embeddings of one side. 'ring' passes blocks of embeddings round the
devices: nothing on a device grows with their number. Products are of full float32 precision (TPUs
would round to bfloat16, which at temperature 0.01 shifts a score by up to 0.4).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from invideo_jax import losses, negatives, ring
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.registry import nearest
from invideo_jax.sharding import constrain

FORMS = ("dense", "chunked", "ring")
KINDS = ("softmax", "sigmoid")


class Side(NamedTuple):
    """Rows of one side: unit embeddings [n, P], ids [n], valid [n]."""

    x: jax.Array
    ids: jax.Array
    valid: jax.Array


class _Options(NamedTuple):
    kind: str
    form: str
    chunk: int
    split: ring.Split


def contrastive(
    a: jax.Array,
    b: jax.Array,
    *,
    temperature: jax.Array | float,
    ids: jax.Array,
    valid: jax.Array,
    kind: str = "softmax",
    bias: jax.Array | float | None = None,
    form: str = "dense",
    chunk: int = 1024,
) -> Mean:
    """Row i of `a` belongs to row i of `b` (and to those of equal ids), and to no other of the batch.

    Args:
        a, b: embeddings of any length, [B, P].
        temperature: cosines are divided by it.
        ids: int [B]; rows with equal ones are positives of each other, all with the same share.
        valid: bool [B]; a row that lacks a side is neither scored nor anybody's negative.
        kind: 'softmax': cross-entropy with soft targets, both ways, halved. 'sigmoid': every pair on
            its own, belonging or not.
        bias: of 'sigmoid', added to the scores; None is 0.
        form: 'dense', 'chunked' or 'ring'; see the head of this file.
        chunk: columns whose scores are held at a time, in the last two.

    Returns:
        A mean over valid rows, in float32 at least; gradients are exact in every form.

    Raises:
        UserError: an unknown kind or form, a bias without use, rows that the mesh does not divide.

    Source: InternVideo2 multi_modality/models/criterions.py (softmax); SigLIP, arXiv:2303.15343,
        algorithm 1 (sigmoid).
    """
    _check("kind", kind, KINDS)
    _check("form", form, FORMS)
    if bias is not None and kind != "sigmoid":
        raise UserError(f"bias is of kind='sigmoid'; got kind={kind!r}. Leave bias out.")
    a, b, valid, temperature = _ready(a, b, valid, temperature)
    bias = jnp.asarray(0 if bias is None else bias, a.dtype)
    if form == "dense":
        each = losses.contrastive if kind == "softmax" else losses.sigmoid_contrastive
        return each(_scores(a, b, temperature, bias), ids, valid)
    options = _Options(kind, form, _checked(chunk), ring.split_of(len(a)))
    total = _blockwise(options, a, b, temperature, bias, ids, valid)
    return Mean(total, valid.sum().astype(a.dtype))


def hard_negatives(
    keys: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    temperature: jax.Array | float,
    ids: jax.Array,
    valid: jax.Array,
    floor: float = 0.0,
    form: str = "dense",
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """For each row of `a` one row of `b` that is like it and has another id.

    Drawn with probability proportional to `negatives.weights`, as the highest of log(weight) + Gumbel
    noise. The noise is a function of the row's key and the column's number: every form draws the
    same. Without a floor the score stands for the logarithm: weights that vanish in float32 still
    have their order, and no row runs dry.

    Args:
        keys: one random key for each row, [B].
        a, b, temperature, ids, valid, form, chunk: as in `contrastive`; the temperature inf draws
            all candidates alike.
        floor: as in `negatives.weights`.

    Returns:
        Columns, int32 [B]; and bool [B], False (column 0) for a row that is not valid or has no
        candidate. No gradient flows.
    """
    _check("form", form, FORMS)
    a, b, valid, temperature = jax.lax.stop_gradient(_ready(a, b, valid, temperature))
    words = jax.random.key_data(keys)[:, :2]
    if form == "dense":
        scores = _scores(a, b, temperature)
        if floor:
            scores = jnp.log(negatives.weights(scores, ids, valid, floor=floor))
        noise = gumbel(words, jnp.arange(len(a)), a.dtype)
        allowed = negatives.candidates(ids, valid) & valid[:, None]
        return negatives.highest(scores + noise, allowed)
    split = ring.split_of(len(a))
    run = functools.partial(_draw, _Options("softmax", form, _checked(chunk), split), floor)
    return split.run(run, Side(a, ids, valid), Side(b, ids, valid), words, whole=temperature)[0]


def take_rows(x: jax.Array, index: jax.Array, *, form: str = "dense") -> jax.Array:
    """`x[index]`, rows of the whole global batch by number, with the exact gradient.

    Args:
        x: [B, ...].
        index: int [B], from 0 to B-1.
        form: 'dense' or 'ring' ('chunked' is 'dense').
    """
    _check("form", form, FORMS)
    x = jnp.asarray(x)
    if form != "ring":
        return constrain(x[index], "batch", *(None for _ in x.shape[1:]))
    return ring.take(ring.split_of(len(x)), x, index)


# -------------------------------------------------------------------------------------- what is shared


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"{name} must be one of {known}; got {name}={value!r}.{nearest(value, known)}"
        )


def _checked(chunk: int) -> int:
    if chunk < 1:
        raise UserError(f"chunk must be at least 1 column; got chunk={chunk}.")
    return chunk


def _ready(a, b, valid, temperature):
    """Unit embeddings of one type (0 where not valid, whatever was there), valid, temperature."""
    a, b, valid = jnp.asarray(a), jnp.asarray(b), jnp.asarray(valid).astype(bool)
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    a, b = (losses.unit(jnp.where(valid[:, None], x, 0).astype(dtype)) for x in (a, b))
    return a, b, valid, jnp.asarray(temperature, dtype)


def _dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


def _scores(a: jax.Array, b: jax.Array, temperature: jax.Array, bias=0) -> jax.Array:
    return _dot("ip,jp->ij", a, b) / temperature + bias


def _relations(rows: Side, columns: Side) -> tuple[jax.Array, jax.Array]:
    """Which pairs count, and which of them are positives, bool [n, m]."""
    both = rows.valid[:, None] & columns.valid[None, :]
    return both, both & (rows.ids[:, None] == columns.ids[None, :])


def _low(dtype) -> jax.Array:
    return jnp.finfo(dtype).min


# --------------------------------------------------------------------------------- losses, block by block


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(options: _Options, a, b, temperature, bias, ids, valid) -> jax.Array:
    """Sum of the losses of all rows; unit embeddings."""
    return _forward(options, a, b, temperature, bias, ids, valid)[0]


def _forward(options: _Options, a, b, temperature, bias, ids, valid):
    measure = _softmax if options.kind == "softmax" else _sigmoid
    run = functools.partial(measure, options)
    rows = Side(a, ids, valid), Side(b, ids, valid)
    known, total = options.split.run(run, *rows, whole=(temperature, bias))
    return total, (a, b, temperature, bias, ids, valid, known)


def _softmax(options: _Options, rows: Side, columns: Side, whole):
    """Log-sum-exps of rows and columns and each row's number of positives; the loss."""
    zeros = jnp.zeros(len(rows.x), rows.x.dtype)

    def start(columns):
        zeros = jnp.zeros(len(columns.x), rows.x.dtype)
        return zeros + _low(zeros.dtype), zeros

    def meet(sums, columns, of_columns):
        largest, total, linked, count = sums
        scores = _scores(rows.x, columns.x, *whole)
        both, same = _relations(rows, columns)
        linked += jnp.where(same, scores, 0).sum(1)
        count += same.sum(1, dtype=count.dtype)
        scores = jnp.where(both, scores, _low(scores.dtype))
        by_row = _add_exps(largest, total, scores, both, 1)
        return (*by_row, linked, count), _add_exps(*of_columns, scores, both, 0)

    def merge(of_columns):
        largest, total = of_columns
        over_all, here = options.split.block_of_max(largest)
        return here, options.split.scatter_sum(total * jnp.exp(largest - over_all))

    begin = (*start(rows), zeros, zeros)
    (*by_row, linked, count), by_column = ring.walk(
        options.split, options.form, options.chunk, meet, begin, columns, start, merge
    )
    ends = [jnp.where(rows.valid, _log_sum(*x), 0) for x in (by_row, by_column)]
    count = jnp.maximum(count, 1)
    total = ((ends[0] + ends[1]) / 2 - linked / count).sum()
    return (*ends, count), options.split.sum(total)


def _add_exps(largest, total, scores, both, axis: int):
    """Running maximum and sum of exps along `axis`, with more scores in it."""
    above = jnp.maximum(largest, scores.max(axis))
    exps = jnp.where(both, jnp.exp(scores - jnp.expand_dims(above, axis)), 0)
    return above, total * jnp.exp(largest - above) + exps.sum(axis)


def _log_sum(largest, total):
    return largest + jnp.log(jnp.maximum(total, jnp.finfo(total.dtype).tiny))


def _sigmoid(options: _Options, rows: Side, columns: Side, whole):
    """Nothing that the gradient needs; the loss."""

    def meet(total, columns, _):
        scores = _scores(rows.x, columns.x, *whole)
        both, same = _relations(rows, columns)
        terms = jax.nn.softplus(jnp.where(same, -scores, scores))
        return total + jnp.where(both, terms, 0).sum(1), ()

    begin = jnp.zeros(len(rows.x), rows.x.dtype)
    total, _ = ring.walk(
        options.split, options.form, options.chunk, meet, begin, columns, _nothing, _nothing
    )
    return (), options.split.sum(total.sum())


def _nothing(_):
    return ()


def _slope(kind: str, scores, both, same, of_rows, of_columns) -> jax.Array:
    """Gradient of the sum of losses by each score."""
    if kind == "sigmoid":
        return jnp.where(both, jax.nn.sigmoid(scores) - same, 0)
    by_row, _, count = (x[:, None] for x in of_rows)
    by_column = of_columns[1][None, :]
    shares = (jnp.exp(scores - by_row) + jnp.exp(scores - by_column)) / 2
    return jnp.where(both, shares - same / count, 0)


def _gradients(options: _Options, rows: Side, columns: Side, known, whole):
    """Gradients by the embeddings, then by temperature and bias."""
    temperature, bias, factor = whole

    def start(columns):
        return jnp.zeros_like(columns[0].x)

    def meet(sums, columns, by_b):
        by_a, by_inverse, by_bias = sums
        columns, of_columns = columns
        scores = _scores(rows.x, columns.x, temperature, bias)
        relations = _relations(rows, columns)
        slope = _slope(options.kind, scores, *relations, known, of_columns)
        by_a += _dot("ij,jp->ip", slope, columns.x)
        by_inverse += (slope * (scores - bias)).sum(1)
        return (by_a, by_inverse, by_bias + slope.sum(1)), by_b + _dot("ij,ip->jp", slope, rows.x)

    none = jnp.zeros(len(rows.x), rows.x.dtype)
    begin = jnp.zeros_like(rows.x), none, none
    (by_a, by_inverse, by_bias), by_b = ring.walk(
        options.split,
        options.form,
        options.chunk,
        meet,
        begin,
        (columns, known),
        start,
        options.split.scatter_sum,
    )
    once = options.split.sum((-by_inverse.sum() / temperature, by_bias.sum()))
    scaled = by_a * (factor / temperature), by_b * (factor / temperature)
    return scaled, tuple(x * factor for x in once)


def _backward(options: _Options, saved, factor):
    a, b, temperature, bias, ids, valid, known = saved
    run = functools.partial(_gradients, options)
    sides = Side(a, ids, valid), Side(b, ids, valid)
    by_row, once = options.split.run(run, *sides, known, whole=(temperature, bias, factor))
    return *by_row, *once, None, None


_blockwise.defvjp(_forward, _backward)


# ----------------------------------------------------------------------------------------- negatives


def gumbel(words: jax.Array, columns: jax.Array, dtype) -> jax.Array:
    """Gumbel noise of each row and column: a function of these two only.

    Args:
        words: uint32 [n, 2], the key of each row.
        columns: int [m], numbers of columns.

    Returns:
        [n, m]. All 32 random bits are used, and the high end, which wins, is the fine one: among
        a million columns two hardly ever tie.
    """
    counts = columns.astype(jnp.uint32)
    counts = jnp.concatenate([counts, jnp.zeros_like(counts)])
    bits = jax.vmap(lambda key: threefry_2x32((key[0], key[1]), counts)[: len(columns)])(words)
    uniform = (bits.astype(dtype) + 0.5) * 2.0**-32
    uniform = jnp.minimum(uniform, 1 - jnp.finfo(dtype).epsneg)
    return -jnp.log(-jnp.log1p(-uniform))


def _draw(options: _Options, floor: float, rows: Side, columns: Side, words, temperature):
    """Columns and whether there is one; nothing for all."""
    split, size = options.split, len(rows.x)
    if floor:
        (by_row, *_), _ = _softmax(options, rows, columns, (temperature, 0))

    def meet(best, columns, _):
        columns, numbers = columns
        scores = _scores(rows.x, columns.x, temperature)
        if floor:
            scores = jnp.log(jnp.exp(scores - by_row[:, None]) + floor)
        both, same = _relations(rows, columns)
        scores = jnp.where(both & ~same, scores + gumbel(words, numbers, scores.dtype), -jnp.inf)
        place = jnp.argmax(scores, axis=1)
        value, column = jnp.take_along_axis(scores, place[:, None], 1)[:, 0], numbers[place]
        # Blocks come in another order on each device: of equal values the first column counts.
        better = (value > best[0]) | ((value == best[0]) & (column < best[1]))
        return tuple(jnp.where(better, new, old) for new, old in zip((value, column), best)), ()

    begin = jnp.full(size, -jnp.inf, rows.x.dtype), jnp.zeros(size, jnp.int32)
    numbered = columns, split.rows(size)
    (value, column), _ = ring.walk(
        split, options.form, options.chunk, meet, begin, numbered, _nothing, _nothing
    )
    return (column, value > -jnp.inf), ()
