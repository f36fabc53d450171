"""From sources to batches: each process reads its rows of every global batch, in workers if asked, and nothing has a cursor.

Global batch n is positions n*B to (n+1)*B of the order. What stands at a position, and every random choice about it, depends
only on (seed, stage, position). So the batches are the same for every number of processes, workers and threads; a run
resumes at step n by starting at step n; and any batch can be made alone.

    order -> load one example (decode, replace when bad) -> workers -> rows put into a batch -> a few batches ahead
"""

import dataclasses
import gc
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from invideo_jax.data.bad import BadLedger, NoReplacement, stand_ins
from invideo_jax.data.decode import BadVideo, Limits
from invideo_jax.data.hanging import GivenUp, Patience, call
from invideo_jax.data.images import load_image
from invideo_jax.data.modalities import Modalities
from invideo_jax.data.order import (
    ALL_TURNS,
    InTurn,
    Order,
    Place,
    Repeated,
    Turns,
    dealt,
    stage_number,
)
from invideo_jax.data.rows import LocalRows, WorkerDied, check_shared_memory, dataset, explain
from invideo_jax.data.sources.base import Example, Source, SourceError
from invideo_jax.data.transforms import ClipInfo, ClipSpec, load_clip
from invideo_jax.data.workers import Board, Busy, hang_report, kill

__all__ = ["Batch", "DataStalled", "LoadExample", "Loader", "WorkerDied", "one_media"]

MAX_POSITIONS = 2**32  # positions travel to the device as uint32
_READY = 2  # batches held ready
_TRIES = 16  # examples tried in the place of a bad one before the run stops
_CLOSE_SECONDS = 15.0  # how long close() waits for a clip in work before it ends workers by force

Batch = tuple[dict[str, np.ndarray], list[dict[str, Any]]]


class DataStalled(RuntimeError):
    """No batch came for too long."""


@dataclasses.dataclass(frozen=True)
class LoadExample:
    """Random access: position of the stage's order -> one loaded row. Pickles into workers.

    A bad video is replaced by another of its source, chosen by `stand_ins`, with the random numbers of the position; an
    evaluation (`replace=False`) gives an empty row instead, `valid` False.

    `hanging` holds the examples that are not tried, because they hung before: (source, record) -> path. `given_up` tells
    of one whether to stop waiting for it, where that is done in a thread of this process.
    """

    sources: tuple[Source, ...]
    order: Order | InTurn | Repeated
    clip: ClipSpec
    limits: Limits
    seed: int
    stage: str
    replace: bool = True
    board: Board | None = None
    hanging: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    given_up: Callable[[tuple[int, int]], bool] | None = None
    read_seconds: float = 60.0
    modalities: Modalities | None = None
    batch_size: int = 1
    turns: Turns = ALL_TURNS
    firsts: tuple[int, ...] = ()

    def __call__(self, own: int) -> dict[str, Any]:
        """One row: `video` uint8 [T, S, S, 3] or None, `position`, `label`, `valid`, `info`, `more` (see `Loader`).

        Args:
            own: position in the order of these sources; that in the stage follows from `turns`.

        Raises:
            NoReplacement: the example and all its stand-ins are bad.
        """
        place, position = self.order[own], self._in_stage(own)
        if place is None:
            nothing = {"id": "", "want": "", "source": "", "path": ""}
            return self._row(position, None, {}, None, nothing, [])
        source, failed, want = self.sources[place.source], [], None
        for record in self._candidates(place):
            name = source.identify(record)
            info = {"id": name, "want": want or name, "source": source.name, "path": name}
            which = (place.source, record)
            try:
                with self._busy(name, *which) as note:
                    example = self._wait(partial(source.__getitem__, record), which, name)
                    note(example["path"])
                    info |= {
                        "id": example["id"],
                        "want": want or example["id"],
                        "path": example["path"],
                    }
                    video, made, more = self._wait(
                        partial(self._decode, example, own), which, example["path"]
                    )
                if made is not None:
                    info |= {"truncated": made.truncated, "fallback": made.fallback}
                    info["padded"] = made.padded
                more |= {"example": self._number(place.source, record)} if more else {}
                return self._row(position, video, more, example, info, failed)
            except BadVideo as bad:
                if bad.reason == "hanging":  # the same whether the example was tried or not
                    info |= {"id": name, "want": want or name}
                info["path"] = bad.path or info["path"]
                failed.append(
                    {
                        "path": info["path"],
                        "id": info["id"],
                        "reason": bad.reason,
                        "detail": bad.detail,
                    }
                )
                want = info["want"]
        if not self.replace:
            return self._row(position, None, {}, None, info, failed)
        tried = "\n".join(f"  {f['path']}: {f['reason']} ({f['detail']})" for f in failed[:10])
        raise NoReplacement(
            f"A bad video must find a good one in its place; all {len(failed)} tried of the {len(source)} "
            f"in {source.name} are bad. The first:\n{tried}\n"
            "Check the data set with `python -m invideo_jax.data.scan`."
        )

    def _candidates(self, place: Place) -> Iterator[int]:
        """The record itself, then its stand-ins, drawn only when needed."""
        yield place.record
        if self.replace:
            others = stand_ins(self.seed, place.record, len(self.sources[place.source]))
            for _, record in zip(range(_TRIES), others):
                yield record

    def _wait(self, work: Callable[[], Any], which: tuple[int, int], path: str) -> Any:
        """What `work` gives, unless it hangs or hung before."""
        if which not in self.hanging:
            if self.given_up is None:
                return work()
            try:
                return call(work, lambda: self.given_up(which), path)
            except GivenUp:
                if which not in self.hanging:
                    raise RuntimeError("The loader was closed.") from None
        raise BadVideo("hanging", self.hanging[which], hang_detail(self.read_seconds))

    def _decode(
        self, example: Example, own: int
    ) -> tuple[np.ndarray, ClipInfo | None, dict[str, Any]]:
        """Pictures, how they were made (None: there are none, of a sound), and further entries of the row."""
        seeds = self.seed, stage_number(self.stage), self._in_stage(own)
        rng, spec = np.random.default_rng(seeds), self.clip.of(own)
        known = dict(flip_ok=example["flip"], limits=self.limits)
        if example["media"] == "image":
            video, made = load_image(example["video"], spec, rng, **known)
        elif example["media"] == "audio":
            video, made = np.zeros((1, spec.size, spec.size, 3), np.uint8), None
        else:
            known |= dict(start=example["start"], end=example["end"])
            video, made = load_clip(example["video"], spec, rng, **known)
        if self.modalities is None:
            return video, made, {}
        more = self.modalities.load(example, made, seeds, train=self.replace, limits=self.limits)
        return video, made, more

    def _in_stage(self, own: int) -> int:
        """The position in the stage: a batch of several loaders has the rows of its step."""
        step, row = divmod(own, self.batch_size)
        return self.turns.step(step) * self.batch_size + row

    def _number(self, source: int, record: int) -> int:
        """The example's number: over all sources of the run, or within its own."""
        return record if self.modalities.example == "corpus" else self.firsts[source] + record

    def _busy(self, name: str, source: int, record: int):
        idle = nullcontext(lambda path: None)
        return self.board.busy(name, source, record) if self.board else idle

    def _row(self, position, video, more, example, info, failed) -> dict[str, Any]:
        untouched = {"truncated": False, "fallback": False, "padded": 0}
        info = untouched | info | {"bad": failed[0]["reason"] if failed else None, "failed": failed}
        return {
            "video": video,
            "position": position,
            "label": example["label"] if example else -1,
            "valid": video is not None,
            "more": more,
            "info": info,
        }


def hang_detail(seconds: float) -> str:
    """What the list of bad videos says about one that hung."""
    return f"no end within {seconds:g} s"


class Loader:
    """Batches of one stage for one process. A context manager; iterate it for (arrays, info) pairs.

    arrays, for the R rows of this process:
        video     uint8 [R, T, S, S, 3]
        position  uint32 [R]: place in the stage's order
        label     int32 [R], -1 unknown
        valid     bool [R]: False where an evaluation has no clip (behind the end, or a bad file); video is 0 there
        and with `modalities` what `data.modalities` lists. T is 1 where all sources are of pictures or sounds.
    info, a dict for each row:
        id, source, path: what the clip is of; want: the id first asked for; bad: why that one was replaced, or None;
        failed: path, id, reason and detail of all that could not be loaded on the way;
        truncated, fallback, padded: how the clip was made, see `ClipInfo`

    Args:
        sources, weights: what to read and its share of the examples.
        clip: what is made of a video.
        batch_size: B, of all processes together.
        rows: the rows of the global batch that this process reads, in the order it wants them; two processes may read
            the same row. Default: all.
        seed, stage: of the order and of every random choice.
        start_step: the first batch to give.
        steps: how many batches; None: without end, in an evaluation to the last example.
        train: True shuffles, repeats and replaces bad videos. False reads every example once, in order; the last batch is
            filled up with rows that are not `valid`, and so is the row of a bad video.
        workers: processes that load; 0 loads in threads of this process. Each costs about 1.5 CPU seconds and 230 MB.
        threads: loading threads in each worker (or here).
        limits: what one video may cost.
        ledger: told of every batch when it is handed out.
        modalities: what is loaded besides pictures; None for nothing.
        turns: which steps of the stage these are, where loaders of other sources have the others.
        numbers: of the sources, among all of the run; default: 0, 1, ...
        firsts: the number of the first example of each source, over all of the run; default: counted on from 0.
        read_seconds: longest wait for one example, after which it is bad (see `data.hanging`).
        hang_seconds: longest wait for a batch.

    Attributes:
        wait_seconds: time that the consumer has waited for batches so far.

    Raises:
        SourceError: fewer examples than a batch, sounds without a place for them, or no shared memory for the workers;
            when constructed.
        DataStalled, WorkerDied, NoReplacement, TooManyBad, TooManyHang: while iterating.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        *,
        clip: ClipSpec,
        batch_size: int,
        seed: int,
        stage: str,
        rows: Sequence[int] | np.ndarray | None = None,
        start_step: int = 0,
        steps: int | None = None,
        train: bool = True,
        workers: int = 0,
        threads: int = 2,
        limits: Limits | None = None,
        ledger: BadLedger | None = None,
        read_seconds: float = 60.0,
        hang_seconds: float = 600.0,
        modalities: Modalities | None = None,
        turns: Turns = ALL_TURNS,
        numbers: Sequence[int] | None = None,
        firsts: Sequence[int] | None = None,
    ):
        self.rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
        _check_numbers(
            batch_size=(batch_size, 1),
            start_step=(start_step, 0),
            seed=(seed, 0),
            workers=(workers, 0),
            threads=(threads, 0),
        )
        _check_rows(self.rows, batch_size)
        if one_media(sources) != "video":
            clip = dataclasses.replace(clip, frames=1)
        if one_media(sources) == "audio" and not (modalities and modalities.audio):
            raise SourceError(
                f"Sounds need a batch that has a place for them; got {sources[0].name}, whose pictures would all be "
                "black. Give `modalities` with audio, or leave it out."
            )
        weights = [1.0] * len(sources) if weights is None else list(weights)
        lengths = [len(source) for source in sources]
        named = dict(seed=seed, stage=stage, numbers=numbers)
        order = Order(lengths, weights, **named) if train else InTurn(lengths)
        order = Repeated(order, clip.repeats) if clip.repeats > 1 else order
        if train and order.epoch < batch_size:
            raise SourceError(
                f"The sources must hold at least one batch; {', '.join(s.name for s in sources)} hold "
                f"{order.epoch} examples, batch_size={batch_size}. Lower the batch size or add videos."
            )
        self.steps = _count_steps(order.epoch, batch_size, start_step, steps, train, turns)
        self.wait_seconds = 0.0
        self.batch_size, self.start_step = batch_size, start_step
        self._workers, self._threads = workers, threads
        self._ledger, self._hang_seconds, self._clip = ledger, hang_seconds, clip
        self._hanging = _known_hanging(sources, ledger.hanging if ledger else {})
        self._board: Board | None = None
        if workers:
            check_shared_memory(workers, clip)
        self.load = LoadExample(
            sources=tuple(sources),
            order=order,
            clip=clip,
            limits=limits or Limits(),
            seed=seed,
            stage=stage,
            replace=train,
            read_seconds=read_seconds,
            modalities=modalities,
            batch_size=batch_size,
            turns=turns,
            firsts=tuple(itertools.accumulate([0, *lengths]) if firsts is None else firsts),
        )
        self._ready: queue.Queue = queue.Queue(maxsize=_READY)
        self._stop, self._killed, self._gone = (threading.Event() for _ in range(3))
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._fetch, name="batches", daemon=True)

    # ------------------------------------------------------------ the consumer's side

    def __enter__(self) -> "Loader":
        self._board = Board(self._workers, self._threads)
        self._patience = Patience(self._board, self.load.read_seconds)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._ended is not None:
            raise self._ended
        if self._board is None:
            raise RuntimeError(
                "A Loader must be entered before it is iterated. Use `with Loader(...) as batches:`."
            )
        begin = time.monotonic()
        try:
            item = self._wait(begin)
        finally:
            self.wait_seconds += time.monotonic() - begin
        if isinstance(item, BaseException):
            self._ended = item
            raise item
        if self._ledger is not None:
            self._ledger.observe(item[1])
        return item

    def _wait(self, begin: float) -> Batch | BaseException:
        while True:
            try:
                return self._ready.get(timeout=self._patience.interval)
            except queue.Empty:
                if self._stop.is_set():
                    raise RuntimeError("The loader is closed; make another one.") from None
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("The thread that gathers batches has ended.") from None
                if self._give_up_hanging():
                    begin = time.monotonic()
                waited = time.monotonic() - begin
                if waited > self._hang_seconds:
                    raise DataStalled(
                        f"A batch must come within {self._hang_seconds:g} s (data.hang_seconds); none came for "
                        f"{waited:.0f} s. " + hang_report(self._board)
                    ) from None

    def _give_up_hanging(self) -> bool:
        """Ends the reads that last too long; True if there were any."""
        if self._killed.is_set():  # what the board says is of workers that are no more
            return False
        found = [b for b in self._patience.overdue() if b.example not in self._hanging]
        for busy in found:
            self._note_hanging(busy)
        if found and self._workers:
            self._killed.set()
            # All of them: another one may read the same example for a later epoch, and Grain waits 25 s for each.
            kill(self._board.pids())
        return bool(found)

    def _note_hanging(self, busy: Busy) -> None:
        self._hanging[busy.example] = busy.path
        if self._ledger is not None:
            source = self.load.sources[busy.source]
            failure = {"path": busy.path, "id": source.identify(busy.record), "reason": "hanging"}
            failure["detail"] = hang_detail(self.load.read_seconds)
            self._ledger.found_hanging(f"{source.fingerprint()}#{busy.record}", failure)

    def close(self) -> None:
        """Ends the workers and frees what they hold; a second call does nothing."""
        if self._stop.is_set() or self._board is None:
            return
        self._stop.set()
        limit = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < limit:
            _drain(self._ready)
            self._thread.join(0.1)
        if self._thread.is_alive():
            kill(self._board.pids())
        self._gone.set()
        self._thread.join(_CLOSE_SECONDS)
        _drain(self._ready)
        if self._workers:
            # Grain's iterators are cycles that hold the last clip of each worker in /dev/shm until they are collected.
            gc.collect()
        self._board.close()

    # ------------------------------------------------------------ the fetching thread

    def _fetch(self) -> None:
        self._reading, self._taken = None, 0
        try:
            self._reading = self._read_from(0)
            for _ in range(self.steps):
                batch = self._gather()
                if batch is None:
                    return
                self._put(batch)
            self._put(StopIteration())
        except Exception as error:
            self._put(explain(error))
        finally:
            if self._reading is not None:
                self._reading.close()

    def _read_from(self, skip: int) -> Any:
        """Grain's iterator over the rows of this process, from its `skip`-th on."""
        here = lambda which: which in self._hanging or self._gone.is_set()
        load = dataclasses.replace(
            self.load,
            board=self._board,
            hanging=dict(self._hanging) if self._workers else self._hanging,
            given_up=None if self._workers else here,
        )
        local = LocalRows(load, self.rows, self.batch_size, self.start_step, self.steps, skip)
        return iter(dataset(local, self._workers, self._threads))

    def _next_row(self) -> dict[str, Any]:
        while True:
            try:
                row = next(self._reading)
            except Exception:
                if not self._killed.is_set() or self._stop.is_set():
                    raise
                self._restart()
                continue
            self._taken += 1
            return row

    def _restart(self) -> None:
        """Starts workers anew after `_give_up_hanging` killed them; the rows that they had ready are made again."""
        self._reading.close()
        gc.collect()  # frees what they hold in /dev/shm
        self._board.clear()
        self._reading = self._read_from(self._taken)
        self._killed.clear()

    def _gather(self) -> Batch | None:
        """The next batch; each row is copied once, out of the worker's shared memory. None: closed meanwhile."""
        count, clip = len(self.rows), self._clip
        arrays = {
            "video": np.zeros((count, clip.frames, clip.size, clip.size, 3), np.uint8),
            "position": np.zeros(count, np.uint32),
            "label": np.full(count, -1, np.int32),
            "valid": np.zeros(count, bool),
        }
        arrays |= self.load.modalities.blank(count) if self.load.modalities else {}
        info = []
        for number in range(count):
            if self._stop.is_set():
                return None
            row = self._next_row()
            for name in ("position", "label", "valid"):
                arrays[name][number] = row[name]
            if row["valid"]:
                arrays["video"][number] = row["video"]
            for name, value in row["more"].items():
                arrays[name][number] = value
            info.append(row["info"])
        return arrays, info

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue


def one_media(sources: Sequence[Source]) -> str:
    """What all sources are of: 'video', 'image' or 'audio'.

    Raises:
        SourceError: they are not of one kind.
    """
    kinds = {source.media: source.name for source in sources}
    if len(kinds) > 1:
        named = ", ".join(f"{name} of {kind}" for kind, name in kinds.items())
        raise SourceError(
            f"A batch must be of videos, of pictures or of sounds; got {named}. Give them as parts of a "
            "mixture: each batch is of one kind then."
        )
    return next(iter(kinds), "video")


def _known_hanging(
    sources: Sequence[Source], listed: Mapping[str, str]
) -> dict[tuple[int, int], str]:
    """(source, record) -> path of what hung in an earlier loader or start."""
    found = {}
    for number, source in enumerate(sources) if listed else ():
        for example, path in listed.items():
            fingerprint, _, record = example.rpartition("#")
            if fingerprint == source.fingerprint():
                found[number, int(record)] = path
    return found


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(
                f"{name} must be a whole number of at least {least}; got {name}={value!r}."
            )


def _check_rows(rows: np.ndarray, batch_size: int) -> None:
    if rows.ndim != 1 or not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(
            f"rows must be numbers of rows in [0, {batch_size}), at least one; got rows={rows.tolist()}."
        )


def _count_steps(
    epoch: int, batch_size: int, start: int, steps: int | None, train: bool, turns: Turns
) -> int:
    most = -(-epoch // batch_size)
    if train:  # whole steps of all loaders together, of which this one's
        most = dealt(MAX_POSITIONS // batch_size, turns.parts)[turns.number]
    left = max(most - start, 0)
    if train and steps is not None and steps > left:
        raise ValueError(
            f"A stage may hold at most 2^32 examples; got {steps} steps from step {start} with "
            f"batch_size={batch_size}. Split it in two stages."
        )
    return left if steps is None else min(steps, left)


def _drain(waiting: queue.Queue) -> None:
    while True:
        try:
            waiting.get_nowait()
        except queue.Empty:
            return
