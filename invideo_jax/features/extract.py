"""From videos to one file of features, batch by batch; the same call goes on where a killed one stopped.

Batches are a pure function of the list of videos: windows in order, always the same number, also across
videos. So a row is computed with the same neighbours whether or not the run was interrupted, and the
output is the same to the last bit.
"""

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import runtime, sharding
from invideo_jax.data.decode import Limits
from invideo_jax.data.sources import Source
from invideo_jax.data.transforms import ClipSpec
from invideo_jax.errors import UserError
from invideo_jax.features import store
from invideo_jax.features.encoder import Encoder, make_features
from invideo_jax.features.reading import Item, Reading
from invideo_jax.features.windows import Rule

FORMAT = "invideo_jax features 1"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted of every video.

    Attributes:
        kinds, layers: see `encoder.make_features`.
        rule: windows.
        crop, interpolation: see `ClipSpec`; of the crops those that draw nothing.
        batch_size: windows computed together.
        stored: dtype name of the features on disk.
    """

    kinds: tuple[str, ...] = ("clip",)
    layers: tuple[int | None, ...] = (None,)
    rule: Rule = Rule()
    crop: str = "center"
    interpolation: str = "bilinear"
    batch_size: int = 8
    stored: str = "float32"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came out.

    Attributes:
        videos, rows: of the source; in the output.
        bad: videos with at least one window that could not be read.
        reasons: reason -> windows (or whole videos).
        padded: rows of windows with fewer frames than a clip, in this start.
        truncated: videos that end before their declared length, in this start.
    """

    videos: int
    rows: int
    bad: int
    reasons: Mapping[str, int]
    padded: int = 0
    truncated: int = 0


def clip_spec(encoder: Encoder, request: Request) -> ClipSpec:
    """How the frames of a window become a clip: the middles of T equal parts, nothing drawn."""
    module = encoder.module
    return ClipSpec(
        frames=module.frames,
        size=module.image_size,
        sampling="middle",
        views=1,
        crop=request.crop,
        flip=0.0,
        interpolation=request.interpolation,
    )


def extract(
    encoder: Encoder,
    source: Source,
    output: pathlib.Path,
    request: Request,
    *,
    mesh: jax.sharding.Mesh,
    limits: Limits | None = None,
    threads: int = 2,
    save_seconds: float = 30.0,
    hang_seconds: float = 600.0,
    say: Callable[[str], None] = print,
) -> Summary:
    """Computes what is missing of `output`, and writes it.

    Args:
        encoder: on `mesh`.
        source: videos.
        output: a .safetensors or .parquet file.
        request: what is wanted.
        limits: what one video may cost.
        threads: videos decoded at a time.
        save_seconds: longest time between two parts.
        hang_seconds: longest wait for one window.
        say: told how it goes.

    Raises:
        UserError: the output belongs to other features, or the batch does not fit the devices.
    """
    sharding.check_batch(mesh, request.batch_size)
    ids = [source.identify(number) for number in range(len(source))]
    store.check_output(output, ids)
    question = _question(encoder, source, request)
    if output.exists():
        return _already_there(output, question, len(ids), say)
    parts = store.Parts(output, question)
    if parts.rows or parts.cursor != (0, 0):
        say(f"going on after {parts.rows:,} rows, at video {parts.cursor[0] + 1} of {len(ids):,}")
    job = _Job(encoder, request, mesh, parts, len(ids), save_seconds, say)
    with Reading(
        source,
        request.rule,
        clip_spec(encoder, request),
        first=parts.cursor,
        limits=limits,
        threads=threads,
        ahead=2 * max(request.batch_size, threads),
        hang_seconds=hang_seconds,
    ) as reading:
        for item in reading:
            job.take(item)
        job.finish()
    bad = store.write_bad(output, _with_ids(parts.failures, ids))
    table = output.suffix == ".parquet"
    metadata = _metadata(encoder, question, ids, parts, names=not table)
    if table:
        store.write_parquet(output, parts, job.arrays, metadata, ids)
    else:
        store.write_safetensors(output, parts, job.arrays, metadata)
    summary = Summary(
        videos=len(ids),
        rows=parts.rows,
        bad=bad,
        reasons=collections.Counter(failure["reason"] for failure in parts.failures),
        padded=job.padded,
        truncated=len(job.truncated),
    )
    parts.remove()
    return summary


class _Job:
    """Fills batches, runs them, and hands finished rows to the parts.

    One batch is on the devices while the next is decoded. `_closed` remembers, for each batch, where
    reading stood when it was full: that, and not where it stands now, is what a part may promise.
    """

    def __init__(self, encoder, request, mesh, parts, videos, save_seconds, say):
        self._encoder, self._mesh, self._parts = encoder, mesh, parts
        self._batch, self._videos, self._say = request.batch_size, videos, say
        self._save_seconds = save_seconds
        run = make_features(
            encoder.module,
            kinds=request.kinds,
            layers=request.layers,
            dtype=jnp.dtype(request.stored),
        )
        module = encoder.module
        side = module.image_size
        self._shape = (module.frames, side, side, module.channels)
        batch = sharding.batch_sharding(mesh)
        self._run = jax.jit(run, out_shardings=batch)
        video = jax.ShapeDtypeStruct((self._batch, *self._shape), jnp.uint8)
        made = jax.eval_shape(run, encoder.params, video)
        self.arrays = {
            "video": ((), "int32"),
            "window": ((), "int32"),
            "label": ((), "int32"),
            "start": ((), "float64"),
            "end": ((), "float64"),
            "frame_times": ((module.grid[0],), "float64"),
        } | {name: (x.shape[1:], np.dtype(x.dtype).name) for name, x in made.items()}
        self.padded, self.truncated = 0, set()
        self._items: list[Item] = []
        self._failures: list[dict[str, Any]] = []
        self._paths: dict[int, str] = {}
        self._running: tuple | None = None
        self._done: list[dict[str, np.ndarray]] = []
        self._done_until: tuple | None = None
        self._saved = self._told = self._began = time.monotonic()
        self._first_rows = parts.rows

    def take(self, item: Item) -> None:
        """The next window, or the next failure."""
        if item.truncated:
            self.truncated.add(item.video)
        if item.bad is not None:
            self._failures.append(_failure(item))
            return
        self.padded += bool(item.window.padded)
        self._paths[item.video] = item.path
        self._items.append(item)
        if len(self._items) == self._batch:
            self._submit((item.video, item.number + 1))

    def finish(self) -> None:
        """Runs what is left, and keeps everything."""
        end = (self._videos, 0)
        if self._items:
            self._submit(end)
        self._fetch()
        if self._failures or self._done:
            failures = self._failures
            if self._done_until:
                failures, paths = self._done_until[1] + failures, self._done_until[2]
            else:
                paths = {}
            self._done_until = (end, failures, paths)
            self._save()

    def _submit(self, cursor: tuple[int, int]) -> None:
        """Starts a batch, filled up with zeros, and takes the one before from the devices."""
        host = np.zeros((self._batch, *self._shape), np.uint8)
        for row, item in enumerate(self._items):
            host[row] = item.clip
        video = sharding.global_batch({"video": host}, self._mesh)["video"]
        with sharding.use(self._mesh):
            made = self._run(self._encoder.params, video)
        self._fetch()
        rows = [dataclasses.replace(item, clip=None) for item in self._items]
        self._running = (made, rows, (cursor, self._failures, self._paths))
        self._items, self._failures, self._paths = [], [], {}

    def _fetch(self) -> None:
        if self._running is None:
            return
        (made, items, until), self._running = self._running, None
        slots = self.arrays["frame_times"][0][0]
        columns = dict(
            video=[item.video for item in items],
            window=[item.number for item in items],
            label=[item.label for item in items],
            start=[item.window.start for item in items],
            end=[item.window.end for item in items],
            frame_times=[item.window.times.reshape(slots, -1).mean(1) for item in items],
        )
        rows = {k: np.asarray(v, self.arrays[k][1]) for k, v in columns.items()}
        rows |= {name: np.asarray(x)[: len(items)] for name, x in made.items()}
        self._done.append(rows)
        if self._done_until:
            _, failures, paths = self._done_until
            until = (until[0], failures + until[1], paths | until[2])
        self._done_until = until
        now = time.monotonic()
        size = sum(x.nbytes for rows in self._done for x in rows.values())
        if now - self._saved >= self._save_seconds or size >= store.GROUP_BYTES:
            self._save()
        if now - self._told > 10:
            self._told = now
            self._progress(until[0], now)

    def _save(self) -> None:
        cursor, failures, paths = self._done_until
        none = lambda name: np.zeros((0, *self.arrays[name][0]), self.arrays[name][1])
        joined = {
            name: np.concatenate([rows[name] for rows in self._done]) if self._done else none(name)
            for name in self.arrays
        }
        self._parts.add(joined, cursor, failures, paths)
        self._done, self._done_until, self._saved = [], None, time.monotonic()

    def _progress(self, cursor: tuple[int, int], now: float) -> None:
        rows = self._parts.rows + sum(len(rows["video"]) for rows in self._done)
        rate = (rows - self._first_rows) / max(now - self._began, 1e-9)
        self._say(
            f"{rows:,} rows, video {min(cursor[0] + 1, self._videos):,} of {self._videos:,}, {rate:.1f} rows/s"
        )


def _failure(item: Item) -> dict[str, Any]:
    when = {} if item.window is None else dict(start=item.window.start, end=item.window.end)
    bad = item.bad
    path = item.path or bad.path
    return dict(video=item.video, path=path, reason=bad.reason, detail=bad.detail, **when)


def _with_ids(failures: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> list[dict[str, Any]]:
    return [{"id": ids[failure["video"]], **failure} for failure in failures]


def _question(encoder: Encoder, source: Source, request: Request) -> dict[str, Any]:
    """What every row depends on; a run that asks otherwise may not go on with the parts of this one."""
    spec = dataclasses.asdict(clip_spec(encoder, request))
    packages = runtime.environment()["packages"]
    return dict(
        format=FORMAT,
        videos=source.fingerprint(),
        encoder=dict(encoder.about),
        kinds=list(request.kinds),
        layers=["final" if layer is None else layer for layer in request.layers],
        windows=dataclasses.asdict(request.rule),
        clip={k: spec[k] for k in ("frames", "size", "sampling", "crop", "interpolation")},
        batch_size=request.batch_size,
        stored=request.stored,
        devices=f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        packages={
            name: packages[name]
            for name in sorted(packages)
            if name in ("jax", "invideo_jax", "av")
        },
    )


def _metadata(encoder, question, ids, parts, *, names: bool) -> dict[str, str]:
    """Text by name, in the output's header; nothing in it tells when or how often the run was started.

    Args:
        names: whether the videos are named there, for a format without columns of text.
    """
    clip = question["clip"]
    told = dict(
        model=encoder.about,
        layers=question["layers"],
        frames=clip["frames"],
        size=clip["size"],
        normalisation=encoder.module.normalisation,
        grid=list(encoder.module.grid),
        windows=question["windows"],
        request=question,
        code=dict(packages=question["packages"], git=runtime.git_state()),
        rows=parts.rows,
    )
    if names:
        told["ids"] = ids
        told["paths"] = [parts.paths.get(number, "") for number in range(len(ids))]
    text = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in told.items()}
    return dict(format=FORMAT) | text


def _already_there(output, question, videos: int, say) -> Summary:
    """A second call after the end: nothing to do, if the file is what is asked for."""
    found = store.read_metadata(output)
    if found.get("request") != json.dumps(question, sort_keys=True):
        raise UserError(
            f"--output must be a new file, or the one that this command made; {output} holds something "
            "else. Remove it, or give another."
        )
    folder = store.parts_folder(output)
    if folder.is_dir():  # killed between the last two steps
        store.Parts(output, question).remove()
    bad = store.read_bad(output)
    reasons = collections.Counter()
    for row in bad:
        reasons[row["reason"]] += row["windows"]
    say(f"{output} is there already, and is what was asked for")
    return Summary(videos, int(found["rows"]), len(bad), reasons)
