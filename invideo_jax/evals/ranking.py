"""Ranks of right items among wrong ones: recall, median rank, dual softmax, re-ranking.

An item of the gallery is right for a query where both have an owner in common, which is the number of
their example; so a video may have several captions, and a text several videos. The rank of a query is
that of its best right item. The scores of all pairs are made block by block, one batch of queries against the whole
gallery, which lies spread over the devices: no device holds [queries, gallery].

Ties are neither luck nor success. Items of equal score count as if in random order, and what is given is
the expected value: a model that gives everything the same score has exactly the recall of chance.

Source: InternVideo2 (arXiv:2403.15377), multi_modality tasks/retrieval_utils.py; CAMoE (arXiv:2109.04290),
dual softmax.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax.evals.classification import to_host
from invideo_jax.sharding import constrain

Array = Any  # of NumPy or of JAX
TIE = 4e-6  # scores this close, relative to the right one, are equal: 32 roundings of float32
NOT_MATCHED = -100.0  # the score of what was no candidate for re-ranking, as published


class Standing(NamedTuple):
    """Where the right items of each query stand, whole numbers [Q].

    Attributes:
        above: wrong items with a higher score than the best right one.
        tied: wrong items with the same score.
        equal: right items with that score; 0 where a query has no right item.
        right: right items.
        items: items, right or wrong.
    """

    above: Array
    tied: Array
    equal: Array
    right: Array
    items: Array


class Rows(NamedTuple):
    """Embeddings by batches, spread over the devices along B.

    Attributes:
        embedding: float32 [n, B, P].
        owner: int32 [n, B, C] on the host, whose each row is: up to C numbers, the real ones first, then
            -1; a row without one does not count.
    """

    embedding: jax.Array
    owner: np.ndarray

    @property
    def real(self) -> np.ndarray:
        """Which rows count, bool [n, B]."""
        return self.owner[..., 0] >= 0


# ------------------------------------------------------------------------------ from scores to ranks


def standings(scores: Array, query_owner: Array, owner: Array, *, tie: float = TIE) -> Standing:
    """Compares the best right item of each query with the wrong ones.

    A score that is not a number is the lowest.

    Args:
        scores: [Q, ...gallery].
        query_owner: int [Q, C], or [Q].
        owner: int [...gallery, C], or [...gallery]; -1 first: no item.
        tie: largest difference of equal scores, relative to the right one.
    """
    xp = jnp if isinstance(scores, jax.Array) else np
    wide = (slice(None), *(None,) * (scores.ndim - 1))
    axes = tuple(range(1, scores.ndim))
    query_owner, owner = xp.asarray(query_owner), xp.asarray(owner)
    query_owner = query_owner if query_owner.ndim == 2 else query_owner[:, None]
    owner = owner if owner.ndim == scores.ndim else owner[..., None]
    item = (owner[..., 0] >= 0)[None]
    right = overlap(query_owner[wide], owner[None])
    scores = xp.where(xp.isnan(scores), -xp.inf, scores)
    best = xp.where(right, scores, -xp.inf).max(axes)
    slack = xp.where(xp.isfinite(best), tie * abs(best), 0)
    higher, same = scores > (best + slack)[wide], scores >= (best - slack)[wide]
    count = lambda which: xp.sum(which, axes, dtype=xp.int32)
    return Standing(
        above=count(~right & item & higher),
        tied=count(~right & item & same & ~higher),
        equal=count(right & same),
        right=count(right),
        items=count(xp.broadcast_to(item, scores.shape)),
    )


def overlap(a: Array, b: Array) -> Array:
    """Whether two rows have an owner in common: [..., C] and [..., C'] to bool [...]; -1 is none."""
    return ((a[..., :, None] == b[..., None, :]) & (a[..., :, None] >= 0)).any((-2, -1))


def rerank_standings(
    match: np.ndarray, right: np.ndarray, *, all_right: np.ndarray, items: int, tie: float = TIE
) -> Standing:
    """The same, of candidates with scores of their own; all other items have the score -100.

    Args:
        match: float [Q, k], scores of the candidates.
        right: bool [Q, k], which of them are right.
        all_right: int [Q], right items in the gallery.
        items: in the gallery.
    """
    left_right = all_right - right.sum(1)
    left_wrong = items - match.shape[1] - left_right
    # Two more columns stand for all that are no candidates.
    rest = np.full((len(match), 2), NOT_MATCHED)
    scores = np.concatenate([match, rest], axis=1, dtype=np.float64)
    many = np.column_stack([np.ones(match.shape), left_right, left_wrong])
    is_right = np.column_stack([right, left_right > 0, np.zeros(len(match), bool)])
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best = np.where(is_right, scores, -np.inf).max(1, keepdims=True)
    slack = np.where(np.isfinite(best), tie * abs(best), 0)
    higher, same = scores > best + slack, scores >= best - slack
    count = lambda which: np.sum(which * many, 1).astype(np.int64)
    return Standing(
        above=count(~is_right & higher),
        tied=count(~is_right & same & ~higher),
        equal=count(is_right & same),
        right=all_right,
        items=np.full(len(match), items),
    )


def recall(standing: Standing, k: int) -> np.ndarray:
    """Probability that a right item is among the first k, where ties are in random order, [Q]."""
    above, tied, equal = (np.asarray(x, np.float64) for x in standing[:3])
    missed = np.ones_like(above)
    for i in range(k):  # the places left behind those above, one after the other
        left = np.maximum(tied - i, 0) / np.maximum(tied + equal - i, 1)
        missed *= np.where(i < k - above, left, 1)
    return np.where(equal > 0, 1 - missed, 0)


def expected_rank(standing: Standing) -> np.ndarray:
    """Rank of the best right item, 1 for the first, where ties are in random order, [Q]."""
    above, tied, equal = (np.asarray(x, np.float64) for x in standing[:3])
    return 1 + above + tied / (equal + 1)


def chance(standing: Standing, k: int = 1) -> float:
    """Mean recall of scores that say nothing."""
    blind = standing._replace(
        above=np.zeros_like(standing.above),
        tied=standing.items - standing.right,
        equal=standing.right,
    )
    return float(np.mean(recall(blind, k)))


def measures(standing: Standing, ks: Iterable[int] = (1, 5, 10)) -> dict[str, float]:
    """'r<k>' (shares in 0..1), 'median_rank' and 'mean_rank' (the first is 1)."""
    ranks = expected_rank(standing)
    return {f"r{k}": float(np.mean(recall(standing, k))) for k in ks} | {
        "median_rank": float(np.median(ranks)),
        "mean_rank": float(np.mean(ranks)),
    }


# --------------------------------------------------------------------- from embeddings, block by block


def rank(queries: Rows, gallery: Rows, *, dual_softmax: float | None = None) -> Standing:
    """Standings of all queries that have a right item, in their order, on the host.

    Args:
        dual_softmax: None for cosines; else the temperature of the softmax over the queries that each
            cosine is multiplied with (as published: 1).
    """
    found = _rank(queries.embedding, queries.owner, *gallery, dual_softmax)
    found = Standing(*(to_host(x).reshape(-1) for x in found))
    kept = queries.real.reshape(-1) & (found.right > 0)
    return Standing(*(x[kept] for x in found))


def top(queries: Rows, gallery: Rows, k: int, *, dual_softmax: float | None = None) -> np.ndarray:
    """The k items of highest score for each query, int [n * B, k]: row n * B + b of the gallery.

    Args:
        k: at most the number of rows of the gallery that count.
        dual_softmax: as of `rank`.
    """
    found = _top(queries.embedding, queries.owner, *gallery, dual_softmax, k)
    return to_host(found).reshape(-1, k)


def _cosines(query: jax.Array, gallery: jax.Array) -> jax.Array:
    """[B, P] and [n, B', P] to [B, n, B'], the latter spread over the devices."""
    query = constrain(query, None, None)
    highest = jax.lax.Precision.HIGHEST
    return constrain(
        jnp.einsum("qp,nbp->qnb", query, gallery, precision=highest), None, None, "batch"
    )


def _log_sums(queries, query_owner, gallery, temperature) -> jax.Array:
    """Logarithm of the sum over the queries of exp(cosine / temperature), [n, B']."""

    def add(total, block):
        query, owner = block
        powers = _cosines(query, gallery) / temperature
        powers = jnp.where((owner[:, 0] >= 0)[:, None, None], powers, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(powers, axis=0)), None

    start = jnp.full(gallery.shape[:2], -jnp.inf, gallery.dtype)
    return jax.lax.scan(add, start, (queries, query_owner))[0]


def _map_scores(function, queries, query_owner, gallery, temperature):
    """function(scores [B, n, B'], owner [B, C]) for each block of queries."""
    sums = None if temperature is None else _log_sums(queries, query_owner, gallery, temperature)

    def block(args):
        query, owner = args
        scores = _cosines(query, gallery)
        if sums is not None:
            scores = scores * jnp.exp(scores / temperature - sums)
        return function(scores, owner)

    return jax.lax.map(block, (queries, jnp.asarray(query_owner)))


@functools.partial(jax.jit, static_argnums=4)
def _rank(queries, query_owner, gallery, owner, temperature):
    # What is rounded in a cosine is 1 / temperature larger in its power.
    tie = TIE / min(temperature or 1, 1)
    judge = functools.partial(standings, owner=owner, tie=tie)
    return _map_scores(judge, queries, query_owner, gallery, temperature)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _top(queries, query_owner, gallery, owner, temperature, k):
    def best(scores, _):
        known = jnp.where(jnp.isnan(scores), -jnp.finfo(scores.dtype).max, scores)
        known = jnp.where((owner[..., 0] >= 0)[None], known, -jnp.inf)
        return jax.lax.top_k(known.reshape(len(scores), -1), k)[1]

    return _map_scores(best, queries, query_owner, gallery, temperature)
