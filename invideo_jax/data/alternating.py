"""Batches of several media in one stage: each batch is of one kind, so that all its clips have one shape.

Which kind step n is of depends on the weights only: they are dealt out in exact proportion (`order.pick`), where the
published code shuffles them anew in each epoch. Source: InternVideo2 multi_modality (joint loading), one media type a step.
"""

import contextlib
from collections.abc import Callable, Sequence

from invideo_jax.data.order import dealt, pick, whole_weights
from invideo_jax.data.pipeline import Batch, Loader, one_media
from invideo_jax.data.sources.base import Source


def by_media(
    sources: Sequence[Source], weights: Sequence[float]
) -> list[tuple[str, list[Source], list[float]]]:
    """(media, sources, their weights) for each kind of media, in the order in which they first come."""
    groups: dict[str, tuple[list[Source], list[float]]] = {}
    for source, weight in zip(sources, weights):
        of, its = groups.setdefault(one_media([source]), ([], []))
        of.append(source)
        its.append(weight)
    return [(media, *group) for media, group in groups.items()]


class Alternating:
    """A loader whose batches come from several loaders in turn; used as one.

    Args:
        make: (number of the group, its first step, its steps) -> its loader.
        weights: of the groups.
        start_step, steps: of all batches together.
    """

    def __init__(
        self,
        make: Callable[[int, int, int], Loader],
        weights: Sequence[float],
        *,
        start_step: int,
        steps: int,
    ):
        self.parts = whole_weights(weights)
        self.step, self.end = start_step, start_step + steps
        first, last = (dealt(step, self.parts) for step in (start_step, self.end))
        # A group that has no turn left needs no loader.
        self._loaders = {
            group: make(group, first[group], last[group] - first[group])
            for group in range(len(self.parts))
            if last[group] > first[group]
        }

    def group(self, step: int) -> int:
        """The number of the group that a step is of."""
        return pick(step, self.parts)[0]

    @property
    def wait_seconds(self) -> float:
        """Time that the consumer has waited for batches so far."""
        return sum(loader.wait_seconds for loader in self._loaders.values())

    def __enter__(self) -> "Alternating":
        with contextlib.ExitStack() as stack:
            for loader in self._loaders.values():
                stack.enter_context(loader)
            self._close = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._close.__exit__(*error)

    def __iter__(self) -> "Alternating":
        return self

    def __next__(self) -> Batch:
        if self.step >= self.end:
            raise StopIteration
        batch = next(self._loaders[self.group(self.step)])
        self.step += 1
        return batch
