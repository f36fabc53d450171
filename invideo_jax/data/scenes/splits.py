"""Which looks may be seen doing what in which split, and which clip index belongs to which split.

The rule: for each of the 15 motions, and for standing still, and for each of the 10 colours, the 31
pairs (shape, texture) are shuffled by the seed and cut once at the split fractions. So

- a combination (shape, colour, texture, motion) lies in exactly one split, bystanders included;
- each motion has the same share of every colour in every split, so colours tell nothing of motions;
- every single shape, colour, texture and motion is seen in training.
"""

import functools

import numpy as np

from invideo_jax.data.scenes import vocabulary

SPLITS = ("train", "validation", "test")

# A plain circle looks the same however it is turned, so it is left out, for every motion alike.
PAIRS = tuple(
    (shape, texture)
    for shape in vocabulary.SHAPES
    for texture in vocabulary.TEXTURES
    if (shape, texture) != ("circle", "plain")
)
ACTIONS = (*vocabulary.LABELS, vocabulary.STILL)


def check_fractions(fractions: tuple[float, ...]) -> tuple[float, float, float]:
    """Returns the (train, validation, test) fractions as floats.

    Raises:
        ValueError: not three, negative, not summing to 1, or a part too small to hold one pair.
    """
    fractions = tuple(float(f) for f in fractions)
    if len(fractions) != len(SPLITS) or abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        raise ValueError(
            f"splits must be 3 fractions (train, validation, test) >= 0 that sum to 1; got "
            f"splits={fractions}. Use for example 0.8,0.1,0.1."
        )
    small = [f for f in fractions if 0 < f < 1 / len(PAIRS)]
    if small:
        raise ValueError(
            f"each split must hold at least 1/{len(PAIRS)} = {1 / len(PAIRS):.3f} of the "
            f"combinations, or none; got splits={fractions}. Enlarge {small[0]} or set it to 0."
        )
    return fractions


@functools.lru_cache(maxsize=4)
def looks(seed: int, fractions: tuple[float, ...]) -> dict[tuple[str, str, str], tuple]:
    """Says which (shape, texture) pairs each split may use.

    Returns:
        (split, action, colour) -> tuple of (shape, texture); action is a label or 'stays still'.
    """
    cuts = [round(len(PAIRS) * sum(fractions[:i])) for i in range(len(SPLITS) + 1)]
    table = {}
    for a, action in enumerate(ACTIONS):
        for c, colour in enumerate(vocabulary.COLOURS):
            order = np.random.default_rng([seed, 1, a, c]).permutation(len(PAIRS))
            for s, split in enumerate(SPLITS):
                table[split, action, colour] = tuple(PAIRS[i] for i in order[cuts[s] : cuts[s + 1]])
    return table


@functools.lru_cache(maxsize=4)
def _blocks(count: int, fractions: tuple[float, ...]) -> tuple[int, ...]:
    """The split numbers of the first `count` blocks; each split stays within a block of its due."""
    splits, counts = [], [0] * len(SPLITS)
    for block in range(count):
        # A bonus of half a block puts validation and test early, so that small sets have them too.
        due = [
            f * (block + 1) + (0.55 if i and f else 0) - counts[i] for i, f in enumerate(fractions)
        ]
        split = int(np.argmax(due))
        counts[split] += 1
        splits.append(split)
    return tuple(splits)


def place(seed: int, index: int, fractions: tuple[float, ...]) -> tuple[str, int]:
    """Gives clip `index` its split and its label, whatever the number of clips in the set.

    Blocks of 15 consecutive indices hold each label once and belong to one split, so every split
    is balanced over the labels.

    Returns:
        (split name, label).
    """
    block, offset = divmod(index, len(vocabulary.LABELS))
    # A power of two, so that the cache serves all the clips of a set.
    split = _blocks(1 << (block + 1).bit_length(), fractions)[block]
    labels = np.random.default_rng([seed, 2, block]).permutation(len(vocabulary.LABELS))
    return SPLITS[split], int(labels[offset])
