"""Every video below a folder."""

import os
from collections.abc import Sequence

from invideo_jax.data.list_files import MEDIA
from invideo_jax.data.manifest import list_videos
from invideo_jax.data.sources.base import (
    ROOTS_OPTION,
    Roots,
    SourceError,
    check_sample,
    existing_folder,
)
from invideo_jax.data.sources.listed import ManifestSource
from invideo_jax.registry import nearest


def open_source(
    folder: str,
    *,
    split: str | None = None,
    roots: Sequence[str] = (),
    roots_option: str = ROOTS_OPTION,
    classes: Sequence[str] = (),
    media: str = "video",
) -> ManifestSource:
    """The videos below `folder` in the order of their names, without captions or labels.

    A folder has no splits: all of it serves whatever split is asked for, and `notes` say so.

    Args:
        media: what is looked for: 'video', 'image', 'audio'.
    """
    if media not in MEDIA:
        raise SourceError(f'Unknown kind of files "{media}".{nearest(media, MEDIA)}')
    located = Roots(existing_folder(folder, "A folder of videos"), roots, roots_option)
    paths = list_videos(folder, media)
    if not paths:
        held = sum(len(files) for _, _, files in os.walk(folder))
        raise SourceError(
            f"A folder of videos must hold at least one; {os.path.abspath(folder)} holds {held} files, "
            f"0 of them with a known ending ({' '.join(sorted(MEDIA[media]))})."
        )
    check_sample(folder, located, paths)
    rows = [{"id": path, "path": path} for path in paths]
    source = ManifestSource(folder, rows, located, tuple(classes))
    if split not in (None, "train"):
        source.notes = (f"{folder} is a plain folder: all {len(source)} files serve as {split}",)
    return source
