"""A TFDS dataset of encoded videos, through its data source: no TensorFlow is loaded.

    tfds:NAME[/SPLIT][?dir=PATH&video=FEATURE&caption=FEATURE&label=FEATURE...]

`dir` is where it lies (default: $TFDS_DATA_DIR, ~/tensorflow_datasets); the others say which feature a field is, where its
name tells it not. Characters that mean something in a query are written as %26 and the like.
"""

import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from invideo_jax.data.decode import BadVideo
from invideo_jax.data.manifest import FIELDS, split_name
from invideo_jax.data.sources.array_record import from_record
from invideo_jax.data.sources.base import (
    ROOTS_OPTION,
    Example,
    NoSuchSplit,
    Source,
    SourceError,
    digest,
    find_split,
    renumber,
)
from invideo_jax.registry import nearest

_WANTED = {"video": ("video", "clip", "bytes", "encoded", "mp4")}  # field -> feature names
_WANTED |= {field: aliases for field, aliases in FIELDS.items() if field != "path"}
_PREPARE = "builder.download_and_prepare(file_format='array_record')"


class TfdsSource(Source):
    """One split of a prepared dataset.

    Args:
        name: 'dataset', 'dataset/config' or 'dataset:version', as TFDS writes it.
        split: a split of it.
        data_dir: where it lies; None: TFDS's own default.
        features: our field -> its feature name, where neither the field nor an alias of it is the name.
        classes: class names by number, as they are wanted; default: its own.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None,
        features: Mapping[str, str],
        classes: Sequence[str],
    ):
        builder = _builder(name, data_dir)
        split = find_split(f"tfds:{name}", split, builder.info.splits)
        info = builder.info.splits[split]
        self.name = f"tfds:{builder.info.full_name}/{split}"
        self._feature_of = _map_features(self.name, list(builder.info.features), features)
        # A ClassLabel knows its names.
        label = dict(builder.info.features).get(self._feature_of.get("label"))
        own = tuple(getattr(label, "names", None) or ())
        self.classes, self._numbers = tuple(classes) or own, renumber(self.name, own, classes)
        counts = (info.num_examples, info.num_bytes, *info.shard_lengths)
        self._known = digest([self.name, *counts, *sorted(self._feature_of.items()), *self.classes])
        try:
            self._records = builder.as_data_source(split)
        except (NotImplementedError, ValueError) as error:
            raise SourceError(
                f"{self.name} must be stored as ArrayRecord to be read by index; it is stored as "
                f"{builder.info.file_format}. Prepare it again with {_PREPARE}."
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        where = self.identify(index)
        try:
            raw = self._records[index]
        except RuntimeError as error:
            raise BadVideo("corrupt_record", where, str(error)[:300]) from error
        record = {field: _plain(field, raw[feature]) for field, feature in self._feature_of.items()}
        return from_record(record, where, self.classes, self._numbers)

    def fingerprint(self) -> str:
        return self._known


def open_source(
    name: str,
    *,
    split: str | None = None,
    roots: Sequence[str] = (),
    roots_option: str = ROOTS_OPTION,
    classes: Sequence[str] = (),
) -> TfdsSource:
    """What stands behind `tfds:`, see the top of this file; a split in the name is the only one it gives."""
    del roots, roots_option  # records hold bytes, no paths
    name, _, query = name.partition("?")
    data_dir, features = _read_query(name, query)
    head, slash, tail = name.rpartition("/")
    if slash and tail in _builder(head, data_dir, missing_ok=True).info.splits:
        if split is not None and split_name(split) != split_name(tail):
            raise NoSuchSplit(
                f'tfds:{name} is the split "{tail}"; the split asked for is "{split}". '
                f"Ask for {tail}, or write tfds:{head}."
            )
        name, split = head, tail
    return TfdsSource(name, split or "train", data_dir, features, classes)


def _read_query(name: str, query: str) -> tuple[str | None, dict[str, str]]:
    """'dir=PATH&caption=FEATURE' -> (PATH, {'captions': FEATURE})."""
    try:
        given = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
    except ValueError as error:
        raise SourceError(
            f"Behind the ? of a tfds: source must stand KEY=VALUE, joined by &; got {query!r}."
        ) from error
    data_dir, features = given.pop("dir", None), {}
    known = {alias: field for field, aliases in _WANTED.items() for alias in aliases}
    for key, feature in given.items():
        field = key if key in _WANTED else known.get(key)
        if field is None:
            keys = ["dir", *_WANTED, *known]
            raise SourceError(f'tfds:{name} takes no key "{key}".{nearest(key, keys)}')
        features[field] = feature
    return data_dir, features


class _Nothing:
    """Stands for a dataset that isn't there while a name is taken apart."""

    class info:
        splits = ()


def _builder(name: str, data_dir: str | None, missing_ok: bool = False) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SourceError(
            f"Reading tfds:{name} needs: pip install tensorflow-datasets importlib_resources ({error})."
        ) from error
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        if missing_ok:
            return _Nothing
        raise SourceError(
            f"A TFDS dataset must be known by name or lie prepared in its folder; got tfds:{name}, "
            f"data_dir={data_dir or 'the default'}. {str(error)[:300]}"
        ) from error
    if not builder.info.splits and not missing_ok:
        raise SourceError(
            f"tfds:{name} must be prepared first; nothing in {builder.data_path}. Run: {_PREPARE}"
        )
    return builder


def _map_features(name: str, held: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """Our field -> the dataset's feature; `video` must be among them."""
    for feature in given.values():
        if feature not in held:
            raise SourceError(f'{name} has no feature "{feature}".{nearest(feature, held)}')
    found = {
        field: next((alias for alias in aliases if alias in held), None)
        for field, aliases in _WANTED.items()
    }
    found = {field: feature for field, feature in found.items() if feature} | dict(given)
    if "video" not in found:
        raise SourceError(
            f"{name} must have a feature with the encoded video bytes; it has {', '.join(held)}. "
            f"Say which: {name.split('/')[0]}?video=FEATURE."
        )
    return found


def _plain(field: str, value: Any) -> Any:
    """NumPy values and bytes as the plain Python that a record holds."""
    if isinstance(value, np.ndarray):
        if field == "video" and value.ndim:
            raise SourceError(
                "The feature of the video must hold encoded bytes; it holds decoded frames "
                f"(shape {value.shape}). Store the encoded file in a tfds.features.Text or Tensor of bytes."
            )
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if field == "video":
        return value
    if isinstance(value, list):
        return [_plain(field, v) for v in value]
    if isinstance(value, Mapping):
        return {key: _plain(field, v) for key, v in value.items()}
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
