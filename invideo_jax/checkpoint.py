"""Checkpoints of a run: one directory a step, written asynchronously by Orbax, checked before use.

    workdir/checkpoints/1200/          one atomic unit: Orbax writes 1200.orbax-checkpoint-tmp and renames it
        state/                         the arrays, as nested dictionaries, not compressed
        meta/data.json                 what the caller gave, and per leaf shape, dtype, digest; its own digest
    workdir/checkpoints/1100.corrupt/  was damaged; set aside, never deleted

Only this module touches Orbax. Measured with Orbax 0.12.8: a flipped byte in array data is restored without an error,
dtypes are cast without a word (float32 -> int8), a save in flight is lost at the end of the process with exit code 0.
Therefore: digests are compared, names, shapes and dtypes are compared, and `Checkpoints` saves only inside `with`.

`python -m invideo_jax.checkpoint WORKDIR` lists the steps and their digests.
"""

import contextlib
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from invideo_jax import digests, stored
from invideo_jax.stored import CheckpointError, Damaged, read_params

PyTree = Any

__all__ = ["CheckpointError", "Checkpoints", "kept", "read_params"]

CRASH_SECONDS = 60.0  # how long an exception waits for the save in flight
RETRY_SECONDS = (5.0, 15.0, 45.0)  # pauses before each retry of a failed save
MISSED_INTERVALS = 2  # intervals without a save before the run stops
TEMPORARY, DELETING, CORRUPT = ".orbax-checkpoint-tmp", ".deleting", ".corrupt"


class _Running:
    """A save in flight; a thread of ours waits for it, so that asking for its end never blocks.

    Args:
        step: its step.
        size: bytes of the state.
        response: Orbax's handle, or the error if the save did not even begin.
    """

    def __init__(self, step: int, size: int, response: ocp.AsyncResponse | Exception):
        self.step, self.size, self._response = step, size, response
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, name=f"save-{step}", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            if isinstance(self._response, Exception):
                raise self._response
            self._response.result()
        except BaseException as error:  # reported by whoever joins
            self.error = error

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the end; False when it has not come after `seconds`."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


def kept(
    metrics: dict[int, float | None],
    *,
    keep_last: int,
    keep_best: int = 0,
    keep_every: int | None = None,
    best_mode: str = "min",
) -> set[int]:
    """Which steps to keep.

    Args:
        metrics: step -> its metric, None (or NaN) where there is none.
        keep_last: this many newest ones, at least 1.
        keep_best: this many with the best metric; of equal ones the newer.
        keep_every: all steps divisible by it.
        best_mode: 'min' or 'max'.
    """
    sign = {"min": 1.0, "max": -1.0}[best_mode]
    rated = [(sign * m, -s) for s, m in metrics.items() if m is not None and not math.isnan(m)]
    best = {-s for _, s in sorted(rated)[:keep_best]}
    every = {s for s in metrics if keep_every and s % keep_every == 0}
    return set(sorted(metrics)[-keep_last:]) | best | every


class Checkpoints:
    """The checkpoints of one run: the only owner of their folder. Saves only inside `with`.

    Args:
        directory: folder of the steps; made when missing (by the trainer).
        keep_last, keep_best, keep_every, best_mode: see `kept`.
        trainer: whether this process belongs to the run that writes here. A reader never changes anything: cleaning up
            after a live trainer would delete its save in flight.
        retry_seconds: pauses before the retries of a failed save.
    """

    def __init__(
        self,
        directory,
        *,
        keep_last: int = 3,
        keep_best: int = 0,
        keep_every: int | None = None,
        best_mode: str = "min",
        trainer: bool = True,
        retry_seconds: tuple[float, ...] = RETRY_SECONDS,
    ):
        if keep_last < 1 or keep_best < 0 or best_mode not in ("min", "max"):
            raise ValueError(
                "keep_last must be at least 1, keep_best at least 0, best_mode 'min' or 'max'; got "
                f"keep_last={keep_last}, keep_best={keep_best}, best_mode={best_mode!r}."
            )
        self.directory = epath.Path(directory)
        if "://" not in str(directory):
            self.directory = epath.Path(self.directory).resolve()
        self.trainer = trainer
        self._keep = dict(
            keep_last=keep_last, keep_best=keep_best, keep_every=keep_every, best_mode=best_mode
        )
        self._retry_seconds = retry_seconds
        self._running: _Running | None = None
        self._open = False
        self._metrics: dict[int, float | None] = {}
        self._failure: Exception | None = None
        self._failed_intervals, self._retries, self._retry_at = 0, 0, math.inf
        self._retrying = False
        if trainer and jax.process_index() == 0:
            self._clean_up()

    # ---- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Checkpoints":
        self._open = True
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
            return
        # An exception is on its way: let the save in flight end, but don't hold up the other processes for long.
        running = self._running
        if running and not running.join(CRASH_SECONDS):
            print(f"checkpoint: save of step {running.step} did not end in {CRASH_SECONDS} s")
        elif running and running.error:
            print(
                f"checkpoint: save of step {running.step} failed: {stored.root_cause(running.error)}"
            )
        self._open = False

    def close(self) -> None:
        """Waits for the last save and lets go of the folder; raises if that save failed."""
        try:
            self.wait()
        finally:
            self._open = False

    def wait(self) -> None:
        """Waits until nothing is being written. All processes must call it together.

        Raises:
            CheckpointError: the last save failed.
        """
        self._finish()
        if self._failure is not None:
            raise self._storage_error() from self._failure

    def last_words(self) -> None:
        """For the end of a crashing process: gives the save in flight a moment; starts nothing."""
        if self._running:
            self._running.join(CRASH_SECONDS)

    def _clean_up(self) -> None:
        """Removes what a killed run of ours left half written or half deleted."""
        with storage_errors(self.directory, None, "make the folder"):
            self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            if path.name.endswith((TEMPORARY, DELETING)):
                path.rmtree(missing_ok=True)

    # ---- what is there ------------------------------------------------------------------------------------------

    def _listing(self) -> dict[int, str]:
        """Numbered folders, newest first, and how each `looks`: process 0's view, on all processes.

        On a network file system another process may not see a folder yet, and all must try the same ones.
        """
        kinds = ("good", "damaged", "stray")
        rows = np.full((4096, 2), -1, np.int64)
        if jax.process_index() == 0:
            found = stored.numbered(self.directory)[:4096]
            for row, step in zip(rows, found):
                row[:] = step, kinds.index(stored.looks(self.directory, step))
        if jax.process_count() > 1:
            # As int32 halves: JAX without x64 would cut int64.
            halves = multihost_utils.broadcast_one_to_all(rows.view(np.int32))
            rows = np.asarray(halves).view(np.int64)
        return {int(step): kinds[kind] for step, kind in rows if step >= 0}

    def steps(self) -> list[int]:
        """Committed steps with all their parts, ascending; their content is checked only by `restore`."""
        found = stored.numbered(self.directory)
        return sorted(s for s in found if stored.looks(self.directory, s) == "good")

    def latest(self) -> int | None:
        """The newest of `steps`."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict:
        """What was saved beside the arrays of `step`: the caller's entries, and ours under 'checkpoint'.

        Raises:
            CheckpointError: missing, unreadable, or damaged.
        """
        return stored.meta_of(self.directory, step)

    # ---- saving -------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: PyTree,
        meta: dict,
        *,
        metric: float | None = None,
        wait: bool = False,
    ) -> bool:
        """Starts to save; all processes must call it together, with the same arguments.

        It first waits for the save before it. A save that fails (disk full) is reported, its remains are removed, and
        training goes on; the run stops only when `MISSED_INTERVALS` intervals went by without one.

        Args:
            step: global step over all stages.
            state: tree of jax arrays; may be donated as soon as this returns.
            meta: JSON-able; returned by `restore`.
            metric: what `keep_best` compares.
            wait: return only when it is on disk; a failed save is then retried and raised.

        Returns:
            whether a save was started; False if `step` is there already, or if a parameter is not finite.

        Raises:
            CheckpointError: too many intervals missed; `wait` and it failed; `step` holds another state.
        """
        if not (self._open and self.trainer):
            raise RuntimeError(
                "save() needs `with Checkpoints(..., trainer=True) as checkpoints:`; without it a save in "
                "flight is lost when the process ends."
            )
        self._finish()
        entry, bad = stored.record(step, state, metric)
        if bad:
            print(f"checkpoint: step {step} NOT saved: {bad[0]} is not finite", flush=True)
            return False
        looks = self._listing().get(step)
        if looks == "good":
            self._same_as_stored(step, entry)
            return False
        if looks is not None:
            self._move_away(step, looks)
        whole = stored.with_digest({**meta, "checkpoint": entry})
        for pause in (*self._retry_seconds, None) if wait else (None,):
            self._begin(step, state, whole)
            if not wait:
                return True
            self._finish()
            if self._failure is None:
                return True
            if pause is not None:
                time.sleep(pause)
        raise self._storage_error() from self._failure

    def retry_due(self) -> bool:
        """Whether a save failed and its pause is over: then call `save` now, between the intervals.

        Always False with several processes, which could not agree on the moment; they retry at the next interval.
        """
        if jax.process_count() > 1:
            return False
        if self._running and self._running.join(0):
            self._finish()
        due = time.monotonic() >= self._retry_at
        self._retrying = self._retrying or due
        return due

    def _begin(self, step: int, state: PyTree, meta: dict) -> None:
        """Hands the state to Orbax, which copies it and writes in the background."""
        named = digests.named_leaves(state)
        arrays = digests.unflatten({n: x for n, x in named.items() if x.size})
        size = meta["checkpoint"]["bytes"]
        try:
            free = self._free_bytes()
            if free is not None and free < size:
                raise OSError(28, f"No space left: {size:,} bytes needed, {free:,} free")
            with stored.context_options():
                response = ocp.save_checkpointables_async(
                    self.directory / str(step), dict(state=arrays, meta=meta)
                )
        except Exception as error:
            # Told by `_finish`, where all processes meet: the others may have begun theirs.
            response = error
        self._metrics[step] = meta["checkpoint"]["metric"]
        self._running = _Running(step, size, response)
        if isinstance(response, Exception) and jax.process_count() == 1:
            self._finish()

    def _finish(self) -> None:
        """Waits for the save in flight; on success forgets old failures and deletes what need not be kept."""
        running, self._running = self._running, None
        if running is None:
            return
        running.join()
        if stored.everywhere(running.error is None):
            self._failure, self._failed_intervals, self._retries = None, 0, 0
            self._retry_at, self._retrying = math.inf, False
            self._prune()
        else:
            error = running.error or RuntimeError("another process could not write its part")
            self._failed(running.step, running.size, error)

    def _failed(self, step: int, size: int, error: Exception) -> None:
        """Reports a failed save, removes its remains, plans the retry; stops the run after too many."""
        self._failure = error
        self._metrics.pop(step, None)
        if not self._retrying:
            self._failed_intervals += 1
            self._retries = 0
        self._retrying = False
        pauses = self._retry_seconds
        self._retry_at = math.inf
        if self._retries < len(pauses):
            self._retry_at = time.monotonic() + pauses[self._retries]
            self._retries += 1
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # its remains keep a full disk full
                (self.directory / f"{step}{TEMPORARY}").rmtree(missing_ok=True)
            print(
                f"checkpoint: ALARM: step {step} could not be saved ({self._failed_intervals} interval(s) "
                f"missed): {stored.root_cause(error)} {self._space(size)}",
                flush=True,
            )
        self._needed = size
        if self._failed_intervals > MISSED_INTERVALS:
            raise self._storage_error() from error

    def _storage_error(self) -> CheckpointError:
        return CheckpointError(
            self.directory,
            None,
            f"saving failed: {stored.root_cause(self._failure)} {self._space(self._needed)}",
            "Free space or fix the storage, then start the same command again.",
        )

    def _free_bytes(self) -> int | None:
        """Free bytes where the checkpoints lie, as process 0 sees it; None where nobody can say."""
        if "://" in str(self.directory):
            return None
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError:  # the others wait for the number below
            free = -1
        if jax.process_count() > 1:
            halves = np.array([free], np.int64).view(np.int32)
            free = int(np.asarray(multihost_utils.broadcast_one_to_all(halves)).view(np.int64)[0])
        return None if free < 0 else free

    def _space(self, size: int) -> str:
        """Bytes needed and free, for messages; never raises and never communicates."""
        try:
            free = f"{shutil.disk_usage(self.directory).free:,}"
        except OSError:
            free = "unknown"
        return f"One checkpoint needs {size:,} bytes; free: {free}."

    def _same_as_stored(self, step: int, entry: dict) -> None:
        """A step that is there already must hold this very state."""
        if self.meta(step)["checkpoint"]["digests"] != entry["digests"]:
            raise CheckpointError(
                self.directory,
                step,
                "is there already and holds another state.",
                "Training went on from an older step: move the newer ones away, or use a new workdir.",
                exit_code=2,
            )

    def _move_away(self, step: int, looks: str) -> None:
        """Makes room for a step where a folder of that name lies that is no checkpoint."""
        if jax.process_index() == 0:
            aside = self._set_aside(step)
            print(f"checkpoint: {self.directory / str(step)} was {looks}; renamed to {aside.name}")
        stored.barrier("make-room")

    def _prune(self) -> None:
        """Deletes the steps that `kept` does not name; folders that are no checkpoints are left alone."""
        if jax.process_index() != 0:
            return
        found = stored.numbered(self.directory)
        good = [s for s in found if stored.looks(self.directory, s) == "good"]
        for step in good:
            if step not in self._metrics:
                with contextlib.suppress(Damaged):
                    self._metrics[step] = stored.read_meta(self.directory / str(step))[
                        "checkpoint"
                    ]["metric"]
        known = {s: self._metrics.get(s) for s in good}
        for step in sorted(set(good) - kept(known, **self._keep)):
            try:
                self._delete(step)
            except OSError as error:
                print(f"checkpoint: step {step} could not be deleted: {error}")

    def _delete(self, step: int) -> None:
        """Deletes a step; renamed first, so that a kill half way leaves nothing that looks like a step."""
        path = self.directory / str(step)
        if "://" not in str(self.directory):
            path = path.rename(self.directory / f"{step}{DELETING}")
        path.rmtree()
        self._metrics.pop(step, None)

    def _set_aside(self, step: int) -> epath.Path:
        """Renames N to N.corrupt (N.corrupt.2, ...)."""
        for number in range(1, 1000):
            target = self.directory / f"{step}{CORRUPT}{'' if number == 1 else f'.{number}'}"
            if not target.exists():
                return (self.directory / str(step)).rename(target)
        raise CheckpointError(self.directory, step, "too many damaged copies.", "Delete some.")

    # ---- restoring ----------------------------------------------------------------------------------------------

    def restore(
        self,
        abstract_state: PyTree | Callable[[dict], PyTree],
        *,
        step: int | None = None,
        log: Callable[[str], Any] = print,
    ) -> tuple[PyTree, dict] | None:
        """The newest good checkpoint, on the devices and layout that `abstract_state` says.

        Every leaf is compared with its stored digest. A damaged step is reported and the next older one used; the
        trainer then renames the damaged one to N.corrupt. All processes must call it together.

        Args:
            abstract_state: tree of `jax.ShapeDtypeStruct` with shardings; any mesh, not only that of the save. Or a
                function that gives it for a step's meta, where the state depends on the stage that was saved; what
                it raises ends the search.
            step: exactly this step, no other.
            log: gets one line for each thing worth knowing.

        Returns:
            (state, meta as `meta()` gives it), or None when nothing was ever saved here.

        Raises:
            CheckpointError: none is good though some exist; or the state asked for differs from the one stored in
                names, shapes or dtypes (nothing is ever cast); or does not divide over the devices.
        """
        abstract_of = abstract_state if callable(abstract_state) else lambda meta: abstract_state
        bad: list[tuple[int, str]] = []
        for candidate in self._candidates(step, log):
            try:
                meta = self._read_meta(candidate)
                abstract = abstract_of(meta)
                named = self._load(candidate, meta, digests.named_leaves(abstract))
            except Damaged as error:
                log(f"checkpoint: step {candidate} is damaged and is not used: {error}")
                bad.append((candidate, str(error)))
                continue
            self._set_bad_aside(bad, log)
            age = time.time() - meta["checkpoint"]["saved_at"]
            skipped = f"; skipped as damaged: {[s for s, _ in bad]}" if bad else ""
            log(f"checkpoint: restored step {candidate}, saved {stored.ago(age)} ago{skipped}")
            return jax.tree.unflatten(jax.tree.structure(abstract), list(named.values())), meta
        return self._nothing_good(step, bad)

    def _candidates(self, step: int | None, log) -> Iterable[int]:
        """Steps to try, newest first; folders that hold nothing of a checkpoint are left out with a word."""
        found = self._listing()
        for stray in (s for s, looks in found.items() if looks == "stray"):
            log(f"checkpoint: {self.directory / str(stray)} is no checkpoint; ignored")
        return [s for s, looks in found.items() if looks != "stray" and step in (None, s)]

    def _nothing_good(self, step: int | None, bad: list[tuple[int, str]]) -> None:
        """None for a fresh start; an error if there was something to restore."""
        if step is not None and not bad:
            raise CheckpointError(
                self.directory, step, "no such step.", f"Steps here: {self.steps()}.", exit_code=2
            )
        corrupt = []
        if self.directory.exists():
            corrupt = sorted(p.name for p in self.directory.iterdir() if CORRUPT in p.name)
        if bad or not stored.everywhere(not corrupt):
            causes = "; ".join(f"step {s}: {why}" for s, why in bad) or f"only {corrupt} are left"
            raise CheckpointError(
                self.directory,
                step,
                f"no good checkpoint though some exist: {causes}.",
                "Nothing was changed. Give another step, copy a good checkpoint here, or choose a new "
                "workdir to start from the beginning.",
            )

    def _read_meta(self, step: int) -> dict:
        """The meta of one step; the same outcome on all processes."""
        problem, meta = None, None
        try:
            meta = stored.read_meta(self.directory / str(step))
        except Damaged as error:
            problem = str(error)
        if not stored.everywhere(problem is None):
            raise Damaged(problem or "another process could not read it")
        return meta

    def _load(self, step: int, meta: dict, wanted: dict[str, Any]) -> dict[str, Any]:
        """Reads and checks the arrays of one step; the same outcome on all processes."""
        stored.check_divisible(self.directory, wanted)
        folder, problem, named = self.directory / str(step), None, None
        rows = meta["checkpoint"]["leaves"]
        differences = stored.compare(rows, wanted)
        if differences:
            raise stored.structure_error(folder, step, differences)
        try:
            named = stored.read_onto(folder, wanted)
        except (
            Exception
        ) as error:  # Orbax wraps every cause in a NoEntryError that does not tell it
            problem = stored.root_cause(error)
        stored.align_operations()
        if not stored.everywhere(problem is None):
            raise Damaged(problem or "another process could not read its part")
        found, not_finite = digests.tree_digests(named)
        wrong = [name for name in wanted if found[name] != rows[name][2]]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise Damaged(f"data of {', '.join(wrong[:3])}{more} differ from what was saved")
        if set(not_finite) & set(stored.learned(found)):
            raise Damaged(f"{not_finite[0]} is not finite")
        return {name: named[name] for name in wanted}

    def _set_bad_aside(self, bad: list[tuple[int, str]], log) -> None:
        """Renames damaged steps, only now that reading works at all: a broken mount must not rename everything."""
        if not (self.trainer and bad):
            return
        if jax.process_index() == 0:
            for step, _ in bad:
                log(f"checkpoint: step {step} renamed to {self._set_aside(step).name}")
        stored.barrier("set-aside")


@contextlib.contextmanager
def storage_errors(path, step, what: str):
    """Turns an OSError into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            path, step, f"could not {what}: {error}.", "Check the path, its rights and its space."
        ) from error


if __name__ == "__main__":
    from invideo_jax import checkpoint_list

    checkpoint_list.main()
