"""Packs the videos of a folder or manifest into ArrayRecord shards; the encoded bytes stay as they are.

    python -m invideo_jax.data.prepare FOLDER_OR_MANIFEST --output=DIR [--shards=N] [--split=train]

A few large files instead of a million small ones: what network storage wants. Read them with `arrayrecord:DIR`, which gives
the same examples in the same order as the manifest. Every example holds its whole file, also when it is a part of it (start,
end): cut long videos into clips first. Beside the shards stands `index.json`: splits, counts, classes, fingerprint.

All is written to `DIR.partial` and becomes DIR by one rename at the end. After a kill the same command starts anew.
"""

import argparse
import fcntl
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import msgpack

from invideo_jax.data.decode import BadVideo
from invideo_jax.data.sources import open_source
from invideo_jax.data.sources.array_record import INDEX, SUFFIX
from invideo_jax.data.sources.base import Example, Source, SourceError
from invideo_jax.errors import UserError

SHARD_BYTES = 512 * 2**20
RECORD_BYTES = 2**30  # one record is read as a whole; longer videos must be cut
_NOT_STORED = ("path", "label_name")  # where it came from, and what the index's classes say


def prepare(
    spec: str,
    output: str | os.PathLike,
    *,
    shards: int | None = None,
    split: str | None = None,
    roots: Sequence[str] = (),
    skip_bad: bool = False,
) -> dict:
    """Writes the shards; returns what `index.json` holds.

    Args:
        spec: folder, manifest, or any other source spec.
        output: folder to make. One that was made from the same examples is left as it is.
        shards: files for each split; default: as many as keep them below 512 MiB.
        split: pack only this one; default: all, each in shards of its own.
        roots: see `open_source`.
        skip_bad: leave out files that can't be read instead of stopping at them.

    Raises:
        SourceError: nothing to pack, or the output is taken.
        UserError: files that can't be read.
    """
    if shards is not None and shards < 1:
        raise UserError(f"shards must be 1 or more; got shards={shards}.")
    source, output = _open(spec, split, roots), pathlib.Path(output)
    done = _finished(output, source)
    if done is not None:
        return done
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        for left in partial.glob("*" + SUFFIX):
            left.unlink()
        index = _write_all(source, partial, shards, skip_bad)
        index["source"] = source.fingerprint()
        with open(partial / INDEX, "w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        (partial / _LOCK).unlink()
        os.rename(partial, output)  # onto nothing, or an empty folder
    return index


def _open(spec: str, split: str | None, roots: Sequence[str]) -> Source:
    return open_source(spec, split=split, roots=roots, roots_option="--roots")


_LOCK = "lock"


class _locked:
    """Holds the partial folder; a second process on it stops at once. The lock ends with the process, however it ends."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __enter__(self):
        self.file = open(self.folder / _LOCK, "w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise SourceError(
                f"Only one process may write a folder; another one is writing {self.folder}. Wait for it, or end it."
            ) from None

    def __exit__(self, *exc):
        self.file.close()


def _finished(output: pathlib.Path, source: Source) -> dict | None:
    """The index of an output that holds these very examples; None when the output is free."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if (output / INDEX).is_file():
        index = json.loads((output / INDEX).read_text(encoding="utf-8"))
        if index.get("source") == source.fingerprint():
            return index
    raise SourceError(
        f"The output must be a new folder; {output} exists and was not made from these examples. "
        "Give another --output, or delete it."
    )


def _write_all(source: Source, folder: pathlib.Path, shards: int | None, skip_bad: bool) -> dict:
    by_split: dict[str, list[int]] = {}
    sizes, bad = {}, []
    for number in range(len(source)):
        try:
            example = source[number]
        except BadVideo as error:
            bad.append(error)
            continue
        video = example["video"]
        sizes[number] = len(video) if isinstance(video, bytes) else os.path.getsize(video)
        if sizes[number] > RECORD_BYTES:
            bad.append(BadVideo("too_large", example["path"], "over 1 GiB; cut it into clips"))
            continue
        by_split.setdefault(example["split"], []).append(number)
    if bad and (not skip_bad or not by_split):
        first = "\n".join(f"  {error}" for error in bad[:10])
        raise UserError(
            f"Every file must be readable to be packed; {len(bad)} of {len(source)} are not. The first:\n{first}\n"
            "Leave them out with --skip_bad, or correct the list."
        )
    entries = []
    for split, numbers in sorted(by_split.items()):
        count = shards or max(1, -(-sum(sizes[n] for n in numbers) // SHARD_BYTES))
        entries += _write_split(source, folder, split, numbers, min(count, len(numbers)))
    return {
        "format": 1,
        "count": sum(entry["count"] for entry in entries),
        "classes": list(source.classes),
        "media": source.media,
        "shards": entries,
        "skipped": [[error.path, error.reason] for error in bad],
        "fingerprint": source.fingerprint(),
    }


def _write_split(source, folder, split: str, numbers: list[int], count: int) -> list[dict]:
    """Writes one split in `count` shards of nearly equal length, in the order of the source."""
    from array_record.python.array_record_module import ArrayRecordWriter

    entries = []
    for shard in range(count):
        part = numbers[len(numbers) * shard // count : len(numbers) * (shard + 1) // count]
        name = f"{split or 'clips'}-{shard:05d}-of-{count:05d}{SUFFIX}"
        # One record a group: read by index without its neighbours. Video is compressed already.
        writer = ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
        for record in _records(source, part):
            writer.write(record)
        writer.close()
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        entries.append({"file": name, "split": split, "count": len(part)})
        print(f"{name}: {len(part)} clips", flush=True)
    return entries


def _records(source: Source, numbers: Sequence[int]) -> Iterator[bytes]:
    for number in numbers:
        yield msgpack.packb(encode(source[number]), unicode_errors="surrogateescape")


def encode(example: Example) -> dict:
    """An example as the map that a record holds: the file's bytes, and all that is known besides."""
    record = {
        key: value
        for key, value in example.items()
        if key not in _NOT_STORED and value not in (None, "", ())
    }
    if isinstance(record["video"], str):
        record["video"] = pathlib.Path(record["video"]).read_bytes()
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m invideo_jax.data.prepare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("source", help="folder of videos, manifest, or another source spec")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--shards", type=int, help="files for each split (default: 512 MiB each)")
    parser.add_argument("--split", help="pack only this split")
    parser.add_argument(
        "--roots",
        type=lambda text: [root for root in text.split(",") if root],
        default=(),
        help="more folders that the paths of a manifest may lie in, by commas",
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="leave out files that can't be read"
    )
    given = vars(parser.parse_args(arguments))
    output = given.pop("output")
    try:
        index = prepare(given.pop("source"), output, **given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Writing failed: {error}. The same command starts anew.", file=sys.stderr)
        return 74
    skipped = f", {len(index['skipped'])} left out" if index["skipped"] else ""
    print(
        f"{index['count']} clips in {len(index['shards'])} shards{skipped}. Train on arrayrecord:{output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
