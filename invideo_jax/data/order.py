"""Which example stands at which position: a pure function of (seed, stage, position), with no state and no tables.

Each source is shuffled anew every epoch with Grain's index shuffle (a keyed permutation, so that one index costs the same
as any other, whatever the length), and sources are joined in exact proportion to their weights. The result is what
`grain.MapDataset.range(n).shuffle(seed).repeat()` and `MapDataset.mix` give where Grain's own weights are exact; Grain
scales weights so that the smallest is 100 and cuts the rest to whole numbers, which turns 3:10 into 100:333.
"""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from grain.experimental import index_shuffle


class Place(NamedTuple):
    """Where an example lies: source number, record in the source, and how often that source was gone through before."""

    source: int
    record: int
    epoch: int


def stage_number(stage: str) -> int:
    """The stage's name as a number for seeding; the same in every process, unlike hash()."""
    return zlib.crc32(stage.encode())


class Order:
    """The endless order of training examples: `order[position] -> Place`.

    Args:
        lengths: records of each source.
        weights: share of the examples from each source, any positive numbers.
        seed, stage: another seed or another stage's name is another order.
        numbers: of the sources among all of the run, each of which is shuffled in its own way; default: 0, 1, ...

    Raises:
        ValueError: an empty source, or a weight that is not above zero.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        stage: str,
        numbers: Sequence[int] | None = None,
    ):
        if not lengths or any(not 0 < n < 2**31 for n in lengths):
            raise ValueError(
                f"Every source must hold 1 to 2^31 records; got lengths={list(lengths)}. Leave out empty ones."
            )
        if len(weights) != len(lengths):
            raise ValueError(
                f"Each source must have a weight; got {len(weights)} weights for {len(lengths)} sources."
            )
        self.lengths = tuple(lengths)
        self.parts = whole_weights(weights)
        numbers = range(len(lengths)) if numbers is None else numbers
        self._seeds = tuple(_source_seed(seed, stage, number) for number in numbers)

    @property
    def epoch(self) -> int:
        """Examples of one epoch: as many as all sources hold. With one source each stands in it once."""
        return sum(self.lengths)

    def __getitem__(self, position: int) -> Place:
        if position < 0:
            raise IndexError(f"position must be 0 or more; got position={position}.")
        source, turn = pick(position, self.parts)
        length = self.lengths[source]
        epoch, index = divmod(turn, length)
        # The seed of an epoch as in grain.MapDataset.shuffle.
        seed = (self._seeds[source] + epoch) % 2**32
        return Place(source, index_shuffle(index, max_index=length - 1, seed=seed, rounds=4), epoch)


class InTurn:
    """The order of an evaluation: every record of every source once, as they lie; `None` after the last."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = tuple(lengths)

    @property
    def epoch(self) -> int:
        """Number of examples."""
        return sum(self.lengths)

    def __getitem__(self, position: int) -> Place | None:
        for source, length in enumerate(self.lengths):
            if position < length:
                return Place(source, position, 0)
            position -= length
        return None


class Repeated:
    """An order in which every place stands `times` times, one after the other."""

    def __init__(self, order: Order | InTurn, times: int):
        self.order, self.times = order, times

    @property
    def epoch(self) -> int:
        """Number of places in one epoch."""
        return self.order.epoch * self.times

    def __getitem__(self, position: int) -> Place | None:
        return self.order[position // self.times]


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers without a common factor, in exactly the proportion of their decimals.

    >>> whole_weights([0.7, 0.3])
    (7, 3)
    """
    if any(not (weight > 0 and math.isfinite(weight)) for weight in weights):
        raise ValueError(f"Every weight must be above 0; got weights={list(weights)}.")
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    return tuple(number // math.gcd(*whole) for number in whole)


def pick(position: int, parts: Sequence[int]) -> tuple[int, int]:
    """The source of a position, and how many positions before it were that source's.

    The first source gets ceil(k * share) of the first k positions; what is left is dealt out to the others in the same
    way. So after each multiple of sum(parts) positions every source has had its exact share.
    """
    rest = sum(parts)
    before, after = position, position + 1  # positions not taken by the sources so far
    for source, part in enumerate(parts):
        left_before = before * (rest - part) // rest
        left_after = after * (rest - part) // rest
        if before - left_before != after - left_after:
            return source, before - left_before
        before, after, rest = left_before, left_after, rest - part
    raise AssertionError("unreachable: the last source takes what is left")


def unpick(source: int, turn: int, parts: Sequence[int]) -> int:
    """The position at which a source has its turn number `turn`: the inverse of `pick`."""
    rest = sum(parts[source:])
    position = turn * rest // parts[source]
    for part in reversed(parts[:source]):
        left, rest = rest, rest + part
        position = -(-(position + 1) * rest // left) - 1
    return position


@dataclasses.dataclass(frozen=True)
class Turns:
    """Which steps of a stage are a loader's, where several take turns (`pick`); by default all.

    Attributes:
        number: of the loader.
        parts: of all loaders.
    """

    number: int = 0
    parts: tuple[int, ...] = (1,)

    def step(self, own: int) -> int:
        """The step of the stage that is the loader's own step number `own`."""
        return unpick(self.number, own, self.parts)


ALL_TURNS = Turns()


def dealt(positions: int, parts: Sequence[int]) -> list[int]:
    """How many of the first `positions` positions each source has; see `pick`."""
    counts, left, rest = [], positions, sum(parts)
    for part in parts:
        after = left * (rest - part) // rest
        counts.append(left - after)
        left, rest = after, rest - part
    return counts


def _source_seed(seed: int, stage: str, source: int) -> int:
    data = f"{seed}/{stage_number(stage)}/{source}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")
