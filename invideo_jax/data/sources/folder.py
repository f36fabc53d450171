"""Every video below a folder."""

import os
from collections.abc import Iterator, Sequence

from invideo_jax.data.manifest import VIDEO_SUFFIXES, list_videos
from invideo_jax.data.sources.base import (
    Example,
    Roots,
    Source,
    SourceError,
    check_sample,
    digest,
    existing_folder,
    make_example,
)


class FolderSource(Source):
    """Videos below `folder` in the order of their names, without captions or labels."""

    def __init__(self, folder: str, roots: Sequence[str] = ()):
        self.name = folder
        self._roots = Roots(existing_folder(folder, "A folder of videos"), roots)
        self._paths = list_videos(folder)
        if not self._paths:
            held = sum(len(files) for _, _, files in os.walk(folder))
            raise SourceError(
                f"A folder of videos must hold at least one; {os.path.abspath(folder)} holds {held} files, "
                f"0 of them with a known ending ({' '.join(sorted(VIDEO_SUFFIXES))})."
            )
        check_sample(folder, self._roots, self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        full = self._roots.check(self._paths[index])
        return make_example(id=self._paths[index], video=full, path=full)

    def identify(self, index: int) -> str:
        return self._paths[index]

    def keys(self) -> Iterator[str]:
        return (self._roots.locate(path)[0] for path in self._paths)

    def fingerprint(self) -> str:
        return digest([len(self._paths), *self._paths])


def open_source(
    folder: str, *, split: str | None = None, roots: Sequence[str] = ()
) -> FolderSource:
    """A folder of videos. It has no splits: all of it serves whatever split is asked for, and `notes` say so."""
    source = FolderSource(folder, roots)
    if split not in (None, "train"):
        source.notes = (f"{folder} is a plain folder: all {len(source)} files serve as {split}",)
    return source
