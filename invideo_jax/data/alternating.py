"""Batches of several media in one stage: each batch is of one kind, so that all its clips have one shape.

Which kind step n is of depends on the weights only: they are dealt out in exact proportion (`order.pick`), where the
published code shuffles them anew in each epoch. Source: InternVideo2 multi_modality (joint loading), one media type a step.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from invideo_jax.data.list_files import MEDIA
from invideo_jax.data.order import Turns, dealt, pick, whole_weights
from invideo_jax.data.pipeline import Batch, Loader, one_media
from invideo_jax.data.sources.base import Source


class Group(NamedTuple):
    """The sources of one kind of media.

    Attributes:
        media: 'video', 'image' or 'audio'.
        sources, weights: in their order among all.
        numbers: of the sources, among all.
        firsts: the number of the first example of each, over all sources.
    """

    media: str
    sources: list[Source]
    weights: list[float]
    numbers: list[int]
    firsts: list[int]


def by_media(sources: Sequence[Source], weights: Sequence[float]) -> list[Group]:
    """A group for each kind of media, in the order in which they first come."""
    groups: dict[str, Group] = {}
    firsts = itertools.accumulate(map(len, sources), initial=0)
    for row in zip(sources, weights, itertools.count(), firsts):
        media = one_media(row[:1])
        for column, value in zip(groups.setdefault(media, Group(media, [], [], [], []))[1:], row):
            column.append(value)
    return list(groups.values())


def in_turn(sources: Sequence[Source]) -> list[Group]:
    """The groups of an evaluation, one after the other: videos, then images, then sounds."""
    groups = by_media(sources, [1.0] * len(sources))
    return sorted(groups, key=lambda group: list(MEDIA).index(group.media))


class Alternating:
    """A loader whose batches come from several loaders in turn; used as one.

    Args:
        make: (which turns are the group's, its first step, its steps) -> its loader.
        weights: of the groups.
        start_step, steps: of all batches together.
    """

    def __init__(
        self,
        make: Callable[[Turns, int, int], Loader],
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
            group: make(Turns(group, self.parts), first[group], last[group] - first[group])
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
