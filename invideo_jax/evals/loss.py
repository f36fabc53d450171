"""The stage's own loss, and the averages beside it, on held-out clips."""

from collections.abc import Iterator
from typing import Any

from invideo_jax.evals import Given
from invideo_jax.metrics import merge_means


class Evaluator:
    """Averages of `eval_loss` over the first `examples` held-out clips."""

    def __init__(self, given: Given, examples: int):
        self.given, self.examples = given, examples

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        batches = self.given.batches(self.examples)
        yield from sorted(merge_means(self.given.eval_loss(params, b) for b in batches).items())


def make(given: Given, *, examples: int) -> Evaluator:
    """The evaluator on the first `examples` held-out clips."""
    return Evaluator(given, examples)
