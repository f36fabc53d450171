"""What a linear classifier finds in frozen features: multinomial logistic regression.

Deterministic: features of the same clips, standardised by the training ones, and a fixed number of
steps of L-BFGS from zero on the whole training set.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invideo_jax.errors import UserError
from invideo_jax.evals import Given
from invideo_jax.evals.classification import to_host


class Labelled(NamedTuple):
    """Features of clips with known labels: float32 [n, P] and int [n]."""

    features: np.ndarray
    labels: np.ndarray


def collect(given: Given, params: Any, *, examples: int, of: str) -> Labelled:
    """Pooled features of the first `examples` clips that can be read and have a label.

    Args:
        of: 'train' or 'held_out'.

    Raises:
        UserError: none has a label.
    """
    features, labels = [], []
    for batch in given.batches(examples, of=of, taught=False):
        found = to_host(given.encode(params, batch).astype(jnp.float32))
        label, valid = to_host(batch["label"]), to_host(batch["valid"])
        known = valid & (label >= 0) & to_host(batch.get("has_video", valid))
        features.append(found[known])
        labels.append(label[known])
    if not sum(map(len, labels)):
        raise UserError(
            f"A probe needs labels; got none among the {of} videos. Give them in the manifest, or "
            "take probe and knn out of the recipe's evals."
        )
    return Labelled(np.concatenate(features), np.concatenate(labels))


class Evaluator:
    """Linear probe of the encoder.

    `run` gives `top1` and `top5` on the held-out clips, `train_top1`, and `majority`, what always
    saying the commonest class of training would get: shares in 0..1.

    Args:
        examples, train_examples: how many clips are judged, and learned from.
        l2: weight of the squared length of the coefficients, beside the mean cross-entropy.
        iterations: of L-BFGS.
    """

    def __init__(
        self, given: Given, *, examples: int, train_examples: int, l2: float, iterations: int
    ):
        self.given, self.examples, self.train_examples = given, examples, train_examples
        self.options = dict(l2=l2, iterations=iterations)

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        train = collect(self.given, params, examples=self.train_examples, of="train")
        held_out = collect(self.given, params, examples=self.examples, of="held_out")
        classes = int(max(train.labels.max(), held_out.labels.max())) + 1
        score = fit(train, classes, **self.options)
        for name, part, k in (
            ("top1", held_out, 1),
            ("top5", held_out, 5),
            ("train_top1", train, 1),
        ):
            yield name, share_right(score(part.features), part.labels, k)
        commonest = np.bincount(train.labels).argmax()
        yield "majority", float(np.mean(held_out.labels == commonest))


def make(
    given: Given,
    *,
    examples: int,
    train_examples: int,
    l2: float = 1e-3,
    iterations: int = 100,
) -> Evaluator:
    """The evaluator; arguments as of `Evaluator`."""
    return Evaluator(
        given, examples=examples, train_examples=train_examples, l2=l2, iterations=iterations
    )


def fit(train: Labelled, classes: int, *, l2: float, iterations: int):
    """Logistic regression; gives the function from features [n, P] to scores [n, classes]."""
    middle = train.features.mean(0)
    spread = train.features.std(0)
    spread = np.where(spread > 1e-6 * max(float(spread.max()), 1e-30), spread, 1)  # constants stay
    normal = lambda x: (x - middle) / spread
    kernel, bias = _fit(
        jnp.asarray(normal(train.features)),
        jnp.asarray(train.labels),
        l2,
        classes=classes,
        iterations=iterations,
    )
    kernel, bias = np.asarray(kernel), np.asarray(bias)
    return lambda features: normal(features) @ kernel + bias


@functools.partial(jax.jit, static_argnames=("classes", "iterations"))
def _fit(x, labels, l2, *, classes, iterations):
    def loss(weights):
        kernel, bias = weights
        logits = x @ kernel + bias
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.mean() + l2 * jnp.square(kernel).sum() / 2

    solver = optax.lbfgs()
    both = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        weights, state = carry
        value, grad = both(weights, state=state)
        updates, state = solver.update(grad, state, weights, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(weights, updates), state), None

    start = jnp.zeros((x.shape[1], classes)), jnp.zeros(classes)
    (weights, _), _ = jax.lax.scan(step, (start, solver.init(start)), None, length=iterations)
    return weights


def share_right(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the k highest scores; of equal ones the first counts."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1])[None] < labels[:, None]
    rank = ((scores > own) | ((scores == own) & before)).sum(1)
    return float(np.mean(rank < k))
