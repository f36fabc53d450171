"""Random access to raw examples: one file per kind of storage, one line in `SOURCES`.

A source spec is a folder, a manifest file, or `kind:rest`:

    /data/videos                     every video below a folder
    /data/train.csv                  a manifest: .csv .tsv .txt .json .jsonl
    synthetic:FOLDER                 the manifest that `python -m invideo_jax.data.synthetic` wrote there
    arrayrecord:FOLDER or GLOB       shards that `python -m invideo_jax.data.prepare` wrote
    tfds:NAME or tfds:NAME/SPLIT     a TFDS dataset of encoded videos, prepared as ArrayRecord;
                                     `?dir=PATH&video=FEATURE&caption=FEATURE` behind it says where it
                                     lies and which feature is what (put the spec in quotes)
    benchmark:NAME:FOLDER            a published benchmark, from its own annotation files

Several are joined by ';', each with its weight behind a comma: `a.csv,0.7;tfds:clips,0.3`.
"""

import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from invideo_jax.data.manifest import MANIFEST_SUFFIXES
from invideo_jax.data.sources.base import (
    ROOTS_OPTION,
    Example,
    NoSuchSplit,
    Source,
    SourceError,
    count_overlap,
)
from invideo_jax.registry import Registry, nearest

__all__ = [
    "SOURCES",
    "Example",
    "NoSuchSplit",
    "Source",
    "SourceError",
    "count_overlap",
    "open_source",
    "parse_mixture",
]

SOURCES = Registry(
    "data source",
    {
        "folder": "invideo_jax.data.sources.folder:open_source",
        "manifest": "invideo_jax.data.sources.listed:open_source",
        "synthetic": "invideo_jax.data.sources.listed:open_synthetic",
        "arrayrecord": "invideo_jax.data.sources.array_record:open_source",
        "tfds": "invideo_jax.data.sources.tfds:open_source",
        "benchmark": "invideo_jax.data.benchmarks:open_source",
    },
)


def open_source(
    spec: str,
    *,
    split: str | None = None,
    roots: Sequence[str] = (),
    roots_option: str = ROOTS_OPTION,
    classes: Sequence[str] = (),
    **options: Any,
) -> Source:
    """Opens one source by its spec (see the top of this file).

    Args:
        split: keep this split only; `val`, `valid`, `dev`, `eval` and `validation` are the same one. A source without
            splits serves whole, and its `notes` say so.
        roots: more folders that videos of a manifest may lie in; relative paths of a manifest are looked up below its
            own folder.
        roots_option: how the user sets `roots`, for messages.
        classes: class names by number, where labels are names: those of the training source for a separate list.
            Default: the source's own.
        options: what the kind of source takes; all manifests take `min_seconds`, `max_seconds`, `labelled` and
            `captioned`.

    Raises:
        NoSuchSplit: it tells splits apart, and lacks the one asked for.
        SourceError: nothing there, nothing left, or not what the spec says; the message holds the fix.
    """
    kind, rest = _split_kind(spec)
    known = dict(roots=tuple(roots), roots_option=roots_option, classes=tuple(classes))
    return SOURCES.get(kind)(rest, split=split, **known, **options)


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """'spec,weight;spec,weight' -> [(spec, weight)]; a weight left out is 1.

    Raises:
        SourceError: an empty part, or a weight that is not above zero.
    """
    parts = []
    for part in text.split(";"):
        spec, comma, tail = part.strip().rpartition(",")
        weight = _number(tail)
        if not comma or weight is None:
            spec, weight = part.strip(), 1.0
        if not spec:
            raise SourceError(
                f"A data mixture must be 'spec,weight;spec,weight'; got an empty part in {text!r}."
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise SourceError(
                f"A weight must be above 0; got {spec!r} with weight {weight:g}. Leave the source out instead."
            )
        parts.append((spec.strip(), weight))
    return parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _split_kind(spec: str) -> tuple[str, str]:
    """The registered kind and what it shall open."""
    if not spec or not spec.strip():
        raise SourceError(
            "A data source must be a folder of videos, a manifest file, or kind:rest; got nothing. "
            "Give e.g. --config.data.train=/data/videos."
        )
    if os.path.isdir(spec):
        return "folder", spec
    if os.path.exists(spec):
        return "manifest", spec
    kind, colon, rest = spec.partition(":")
    if colon and kind in SOURCES:
        if not rest:
            raise SourceError(
                f"A source {kind}: must say what to open behind the colon; got {spec!r}."
            )
        return kind, rest
    if colon and re.fullmatch(r"[A-Za-z_]+", kind) and not rest.startswith("//"):
        raise SourceError(
            f'Unknown kind of data source "{kind}" in {spec!r}.{nearest(kind, SOURCES)}'
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", spec):
        raise SourceError(
            f"A data source must be a local path; got {spec!r}. Mount the storage (gcsfuse, s3fs) or copy it."
        )
    raise SourceError(
        f"The path of a data source must exist; got {spec!r} (working directory {os.getcwd()})."
        + _near(spec)
    )


def _near(spec: str) -> str:
    """What lies near a missing path: the last folder that exists, and names in it like the wanted one."""
    path = pathlib.Path(spec).absolute()
    while not path.parent.is_dir():
        path = path.parent
    try:
        names = [
            p.name + ("/" if p.is_dir() else "")
            for p in path.parent.iterdir()
            if p.is_dir() or p.suffix.lower() in MANIFEST_SUFFIXES
        ]
    except OSError:
        names = []
    return f' "{path.name}" is not in {path.parent}.' + nearest(path.name, names[:200])
