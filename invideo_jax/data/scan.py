"""Looks at every video of a folder or manifest once, and writes a manifest that knows which are usable.

    python -m invideo_jax.data.scan FOLDER_OR_MANIFEST --output=manifest.jsonl

One JSON row a clip: its path, the columns of the manifest it came from, what the file holds
(seconds, frames, fps, width, height, codec, pix_fmt, rotation, keyframes, has_audio, audio_rate,
audio_channels, bytes), `truncated` and a `note` for a file cut short but usable up to the cut, and
`error` for an unusable one. Training leaves out rows with an `error`. Of images and files of sound only
that they are there is looked at.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from invideo_jax.data.decode import BadVideo, Limits, VideoReader, View, check_path
from invideo_jax.data.list_files import media_of
from invideo_jax.data.manifest import ManifestError, list_videos, read_manifest
from invideo_jax.data.sources.base import Roots, SourceError

_SMALL = View(size=(16, 16))  # the pixels are thrown away: only the decoder's verdict counts
_CHUNK = 4096
_FEW = 32  # below this many files, starting worker processes costs more than it gives


def scan_file(path: str, *, sample: int = 8, limits: Limits | None = None) -> dict[str, Any]:
    """What one file holds, or why it is unusable.

    Args:
        path: a local file.
        sample: frames decoded, spread from the first to the last; 0 for all.
        limits: see `Limits`.

    Returns:
        The columns named above; for an unusable file only `error`, and `bytes` where it exists.
    """
    found: dict[str, Any] = {}
    try:
        found["bytes"] = os.path.getsize(path)
    except (OSError, ValueError):
        pass  # the reader says why
    try:
        if media_of(path) in ("image", "audio"):
            check_path(path)
            return found
        with VideoReader(path, limits=limits) as reader:
            count = len(reader)
            indices = np.arange(count)
            if sample:
                indices = np.unique(
                    np.linspace(0, count - 1, min(sample, count)).round().astype(int)
                )
            for begin in range(0, len(indices), _CHUNK):
                reader.frames(indices[begin : begin + _CHUNK], view=_SMALL)
            info = reader.info
    except BadVideo as bad:
        return {**found, "error": f"{bad.reason}: {bad.detail}" if bad.detail else bad.reason}
    columns = dataclasses.asdict(info)
    declared, truncated = columns.pop("declared_seconds"), columns.pop("truncated")
    found.update({k: round(v, 6) if isinstance(v, float) else v for k, v in columns.items()})
    if truncated:
        found["truncated"] = True
        found["note"] = (
            f"cut short: {info.seconds:.2f} s of the declared {declared:.2f} s are there"
        )
    return found


def _scan_task(task: tuple[str, int, Limits]) -> dict[str, Any]:
    path, sample, limits = task
    return scan_file(path, sample=sample, limits=limits)


def scan_files(
    paths: Sequence[str],
    *,
    sample: int = 8,
    limits: Limits | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, bad: None,
) -> dict[str, dict[str, Any]]:
    """`scan_file` of each distinct path, in worker processes when `workers` is above 0.

    A file that kills its worker process is an unusable file; the others go on.

    Args:
        progress: called with the numbers of files done and found bad.
    """
    tasks = {path: (path, sample, limits or Limits()) for path in paths}
    results: dict[str, dict[str, Any]] = {}
    bad = 0
    for path, found in _run(tasks, workers):
        results[path] = found
        bad += "error" in found
        progress(len(results), bad)
    return results


def _run(tasks: dict[str, tuple], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if not workers:
        yield from ((path, _scan_task(task)) for path, task in tasks.items())
        return
    waiting, left = iter(tasks.items()), dict(tasks)
    try:
        with _pool(workers) as pool:
            running = {}
            while left:
                for path, task in itertools.islice(waiting, 4 * workers - len(running)):
                    running[pool.submit(_scan_task, task)] = path
                done, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    path, found = running.pop(future), future.result()
                    del left[path]
                    yield path, found
    except concurrent.futures.process.BrokenProcessPool:
        # One of the files in flight crashed the decoder: each file left gets a process of its own.
        for path, task in left.items():
            try:
                with _pool(1) as pool:
                    yield path, pool.submit(_scan_task, task).result()
            except concurrent.futures.process.BrokenProcessPool:
                yield path, {"error": "decode_error: the decoder crashed"}


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    )


def read_input(source: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a manifest, or one row for each video of a folder, and the folder that paths start from.

    Raises:
        ManifestError: nothing there, or nothing in it.
    """
    if os.path.isdir(source):
        rows, folder = [{"path": path} for path in list_videos(source)], os.path.abspath(source)
    elif not os.path.exists(source):
        raise ManifestError(
            f"What to scan must be a folder or a manifest; nothing at {source} (working directory "
            f"{os.getcwd()})."
        )
    else:
        rows, folder = read_manifest(source), str(pathlib.Path(source).absolute().parent)
    if not rows:
        raise ManifestError(f"There must be at least one video to scan; {source} lists 0.")
    return rows, folder


def scan(
    source: str,
    output: str,
    *,
    roots: Sequence[str] = (),
    sample: int = 8,
    workers: int | None = None,
    limits: Limits | None = None,
    progress: Callable[[int, int, int], None] = lambda done, bad, total: None,
) -> list[dict[str, Any]]:
    """Scans a folder or manifest and writes the manifest `output`, which appears only when it is complete.

    Args:
        source: a folder of videos, or a manifest.
        output: a .jsonl file. Paths in it are relative to its folder where the videos lie below
            that, else absolute.
        roots: folders besides the source's own that the paths of a manifest may lead to.
        sample, limits: see `scan_file`.
        workers: processes; None chooses by the number of files and cores.
        progress: called with the numbers of files done, found bad, and in all.

    Returns:
        The rows written.

    Raises:
        ManifestError, SourceError: the source or the output can't be used, or more than half of the rows lead out
            of the allowed folders.
    """
    if not output.endswith(".jsonl"):
        raise ManifestError(f"--output must end in .jsonl; got --output={output}.")
    if os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source):
        raise ManifestError(
            f"--output must be another file than the manifest scanned; got --output={output}."
        )
    target = pathlib.Path(output).absolute()
    _make_folder(target.parent)
    rows, folder = read_input(source)
    allowed, refused, full_paths = Roots(folder, roots, "--roots"), {}, {}
    outside = allowed.outside([row["path"] for row in rows])
    if 2 * len(outside) > len(rows):
        raise allowed.refusal(source, outside, len(rows))
    for row in rows:
        try:
            full_paths[row["path"]] = allowed.check(row["path"])
        except BadVideo as bad:
            refused[row["path"]] = {"error": f"{bad.reason}: {bad.detail}".rstrip(": ")}
    files = list(dict.fromkeys(full_paths.values()))
    if workers is None:
        workers = min(os.cpu_count() or 1, 8) if len(files) > _FEW else 0
    found = scan_files(
        files,
        sample=sample,
        limits=limits,
        workers=workers,
        progress=lambda done, bad: progress(done, bad, len(files)),
    )
    for row in rows:
        if isinstance(row.get("speech"), str):
            row["speech"] = _seen_from(target.parent, allowed.locate(row["speech"])[0])
    located = (allowed.locate(row["path"])[0] for row in rows)
    written = [
        _row(row, full, refused.get(row["path"]) or found[full], target.parent)
        for row, full in zip(rows, located)
    ]
    _write(target, written)
    return written


def _make_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ManifestError(
            f"--output must lie in a folder that can be written; {error}."
        ) from None
    if not os.access(folder, os.W_OK):
        raise ManifestError(f"--output must lie in a folder that can be written; got {folder}.")


def _row(row: dict, full: str, found: dict, folder: pathlib.Path) -> dict[str, Any]:
    """The manifest's columns, the file's, and its path as seen from the new manifest."""
    path = _seen_from(folder, full)
    kept = {k: v for k, v in row.items() if k not in ("path", "line", "error", "seconds")}
    out = {"path": path, **kept, **found}
    if "error" not in out and row.get("start", 0.0) >= out.get("seconds", math.inf):
        out["error"] = f"no_frames: starts at {row['start']:g} s of {out['seconds']:g} s"
    return out


def _seen_from(folder: pathlib.Path, full: str) -> str:
    """A path relative to the folder of the new manifest where it lies below it, else absolute."""
    inside = os.path.commonpath([full, folder]) == str(folder)
    return os.path.relpath(full, folder).replace(os.sep, "/") if inside else full


def _write(target: pathlib.Path, rows: list[dict]) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


class _Progress:
    """One line on stderr: rewritten on a terminal, a new one every 10 s elsewhere."""

    def __init__(self):
        self.begin = self.last = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, done: int, bad: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < (0.2 if self.live else 10.0) and done < total:
            return
        self.last, rate = now, done / max(now - self.begin, 1e-9)
        line = f"scan {done}/{total} files, {bad} unusable, {rate:.1f} files/s, {(total - done) / rate:.0f} s left"
        end = "\n" if done == total or not self.live else ""
        print(f"\r{line:<72}" if self.live else line, end=end, file=sys.stderr, flush=True)


def _summary(rows: list[dict], output: str) -> str:
    bad = [row for row in rows if "error" in row]
    cut = sum("truncated" in row for row in rows)
    lines = [
        f"{len(rows)} rows: {len(rows) - len(bad)} usable, {len(bad)} not"
        + f", {cut} cut short" * bool(cut)
    ]
    reasons = collections.Counter(row["error"].split(":")[0] for row in bad)
    for reason, number in reasons.most_common():
        first = next(row["path"] for row in bad if row["error"].startswith(reason))
        lines.append(f"  {reason}: {number} (first: {first})")
    lines.append(f"Written: {output}")
    outside = [row["path"] for row in rows if os.path.isabs(row["path"])]
    if outside:
        lines.append(
            "The videos lie outside the manifest's folder. "
            + Roots(os.path.dirname(os.path.abspath(output))).allow(outside)
        )
    # Names that are not UTF-8 can be written to a terminal only so.
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 scanned, 1 with --strict and unusable videos, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m invideo_jax.data.scan", description=__doc__.split("\n")[0]
    )
    parser.add_argument("source", metavar="FOLDER_OR_MANIFEST")
    parser.add_argument("--output", required=True, help="the manifest to write, .jsonl")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any is unusable")
    parser.add_argument(
        "--workers", type=int, help="processes; 0: none. Default: by files and cores"
    )
    parser.add_argument("--sample", type=int, default=8, help="frames decoded of each file; 0: all")
    parser.add_argument(
        "--roots", default="", help="more folders that paths may lead to, by commas"
    )
    for field in dataclasses.fields(Limits):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=field.type, default=field.default, help="limit of one video")
    given = parser.parse_args(arguments)
    try:
        for name in ("workers", "sample"):
            if (getattr(given, name) or 0) < 0:
                raise ValueError(
                    f"--{name} must be 0 or more; got --{name}={getattr(given, name)}."
                )
        limits = Limits(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Limits)})
        rows = scan(
            given.source,
            given.output,
            roots=[root for root in given.roots.split(",") if root],
            sample=given.sample,
            workers=given.workers,
            limits=limits,
            progress=_Progress(),
        )
    except (ManifestError, SourceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_summary(rows, given.output))
    return int(given.strict and any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
