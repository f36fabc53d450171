"""A TFDS dataset of encoded videos, through its data source: no TensorFlow is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from invideo_jax.data.decode import BadVideo
from invideo_jax.data.manifest import FIELDS
from invideo_jax.data.sources.array_record import from_record
from invideo_jax.data.sources.base import Example, Source, SourceError, digest, no_such_split
from invideo_jax.registry import nearest

_PREPARE = "builder.download_and_prepare(file_format='array_record')"


class TfdsSource(Source):
    """One split of a prepared dataset.

    Args:
        name: 'dataset', 'dataset/config' or 'dataset:version', as TFDS writes it.
        split: a split of it.
        data_dir: where it lies; None: TFDS's own default ($TFDS_DATA_DIR, ~/tensorflow_datasets).
        features: our field -> its feature name, where neither the field nor an alias of it is the name.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None = None,
        features: Mapping[str, str] | None = None,
    ):
        builder = _builder(name, data_dir)
        if split not in builder.info.splits:
            raise no_such_split(f"tfds:{name}", split, builder.info.splits)
        info = builder.info.splits[split]
        self.name = f"tfds:{builder.info.full_name}/{split}"
        self._feature_of = _map_features(self.name, list(builder.info.features), features or {})
        if "label" in self._feature_of:  # a ClassLabel knows its names
            label = builder.info.features[self._feature_of["label"]]
            self.classes = tuple(getattr(label, "names", None) or ())
        self._known = digest([self.name, info.num_examples, *info.shard_lengths])
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
        return from_record(record, where, self.classes)

    def fingerprint(self) -> str:
        return self._known


def open_source(
    name: str,
    *,
    split: str | None = None,
    roots: Sequence[str] = (),
    data_dir: str | None = None,
    features: Mapping[str, str] | None = None,
) -> TfdsSource:
    """`NAME` or `NAME/SPLIT`; a split in the name is the split to read."""
    del roots  # records hold bytes, no paths
    head, slash, tail = name.rpartition("/")
    if slash and tail in _builder(head, data_dir, missing_ok=True).info.splits:
        name, split = head, tail
    return TfdsSource(name, split or "train", data_dir, features)


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
    wanted = {"video": ("video", "clip", "bytes", "encoded", "mp4")}
    wanted |= {field: aliases for field, aliases in FIELDS.items() if field != "path"}
    for field, feature in given.items():
        if field not in wanted:
            raise SourceError(f'Unknown field "{field}" in features.{nearest(field, wanted)}')
        if feature not in held:
            raise SourceError(f'{name} has no feature "{feature}".{nearest(feature, held)}')
    found = {
        field: next((alias for alias in aliases if alias in held), None)
        for field, aliases in wanted.items()
    }
    found = {field: feature for field, feature in found.items() if feature} | dict(given)
    if "video" not in found:
        raise SourceError(
            f"{name} must have a feature with the encoded video bytes; it has {', '.join(held)}. "
            'Say which: features=dict(video="...").'
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
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
