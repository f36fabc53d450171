"""Published benchmarks, read from their own annotation files: one file per benchmark, one line in `BENCHMARKS`.

    benchmark:NAME:FOLDER

FOLDER holds the annotation files as they are published (in it or in folders below it) and the videos, anywhere
below it. Videos are found by name, whatever their ending and folder. docs/benchmark_protocols.md says which files
are read, where they come from and what the protocol does with them.
"""

import os
from collections.abc import Sequence

from invideo_jax.data.benchmarks.base import Benchmark, open_benchmark
from invideo_jax.data.sources.base import ROOTS_OPTION, SourceError, existing_folder
from invideo_jax.data.sources.listed import ManifestSource
from invideo_jax.registry import Registry, nearest

__all__ = ["BENCHMARKS", "Benchmark", "open_source"]

_HERE = "invideo_jax.data.benchmarks"

BENCHMARKS = Registry(
    "benchmark",
    {
        "msrvtt_1k": f"{_HERE}.msrvtt:ONE_THOUSAND",
        "msrvtt_full": f"{_HERE}.msrvtt:FULL",
        "msrvtt_mc": f"{_HERE}.multiple_choice:MSRVTT",
        "didemo": f"{_HERE}.didemo:DIDEMO",
        "lsmdc": f"{_HERE}.lsmdc:LSMDC",
        "activitynet": f"{_HERE}.activitynet:ACTIVITYNET",
        "vatex": f"{_HERE}.vatex:ENGLISH",
        "vatex_zh": f"{_HERE}.vatex:CHINESE",
        "msvd": f"{_HERE}.msvd:MSVD",
        "k400": f"{_HERE}.kinetics:K400",
        "k600": f"{_HERE}.kinetics:K600",
        "k700": f"{_HERE}.kinetics:K700",
        "ssv2": f"{_HERE}.something:SSV2",
        "ucf101": f"{_HERE}.ucf101:UCF101",
        "hmdb51": f"{_HERE}.hmdb51:HMDB51",
    },
)


def open_source(
    rest: str,
    *,
    split: str | None = None,
    roots: Sequence[str] = (),
    roots_option: str = ROOTS_OPTION,
    classes: Sequence[str] = (),
) -> ManifestSource:
    """The annotated videos of one split that are there.

    Args:
        rest: 'NAME:FOLDER'.
        split: of the benchmark; None: the one that its protocol uses.
        roots: further folders that videos may lie in.
        roots_option: how the user sets `roots`, for messages.
        classes: class names by number, where those of a training source count; case, spaces and underscores
            of a name do not.

    Raises:
        NoSuchSplit: the benchmark has no such split.
        SourceError: unknown name, no folder, no annotation file, one that can't be read, or most videos absent;
            the message says what was looked for.
    """
    name, colon, folder = rest.partition(":")
    if name not in BENCHMARKS:
        hint = nearest(name, BENCHMARKS)
        raise SourceError(f'Unknown benchmark "{name}" in benchmark:{rest}.{hint}')
    if not colon or not folder:
        raise SourceError(
            f"A benchmark must say which folder holds its files; got benchmark:{rest}. Write "
            f"benchmark:{name}:FOLDER."
        )
    found = existing_folder(folder, f"The folder of benchmark:{name}")
    return open_benchmark(
        name,
        BENCHMARKS.get(name),
        os.fspath(found),
        split=split,
        roots=roots,
        roots_option=roots_option,
        classes=tuple(classes),
    )
