"""Bad videos: which example stands in for one, and how many a run bears.

The stand-in is chosen where the clip is loaded (in a worker) and depends only on the example that was asked for. The ledger
lives in the training process: it lists each bad file once, counts, and stops the run past a share.
"""

import collections
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from invideo_jax.errors import UserError

log = logging.getLogger(__name__)

_USED = "used up to the cut"


class NoReplacement(UserError):
    """Every example that was tried in the place of a bad one was bad too."""


class TooManyBad(UserError):
    """More videos are bad than the run may bear."""


def stand_ins(seed: int, record: int, length: int) -> Iterator[int]:
    """Records of the same source to try in the place of `record`, each once, until all are used up.

    A pure function of its arguments. The draws repeat sooner or later; a drawn record that was tried is passed over.
    """
    tried = {record}
    attempt = 0
    while len(tried) < length:
        data = f"{seed}/{record}/{attempt}".encode()
        drawn = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % length
        attempt += 1
        if drawn not in tried:
            tried.add(drawn)
            yield drawn


class BadLedger:
    """Counts bad videos by reason, lists each once in a file, and stops the run when there are too many.

    Every process of a run keeps its own over the examples that it reads. The budget counts distinct bad files over distinct
    examples seen since this start: with several epochs the same bad file comes back each time and still counts once. Files
    listed by an earlier start of the run are not listed again, and don't count against the budget until they are met
    again: they may have been repaired meanwhile.

    A file cut short is used up to the cut. It is listed once, with the reason `truncated`, and is not counted as bad.

    An example that hung is not tried again while it is listed, also by a later start: whether a read hangs may change from
    one hour to the next, and the batches of a run that was stopped must stay those of one that was not.

    Args:
        file: list to append to, one JSON object a line; None: keep no list.
        others: lists that other processes of the run keep; examples that hung are taken from them too.
        max_share: share of bad examples above which the run stops.
        min_count: the run never stops for this many bad files or fewer.
        total: examples of all sources together; more than these can't be distinct.

    Attributes:
        seen: rows so far.
        counts: reason -> distinct bad files.
        notes: what is used all the same: `truncated` distinct files; `fallback` clips that had to be decoded from the
            start of their file; `padded` clips with repeated frames, of videos too short.
        hanging: '<fingerprint of the source>#<number of the example>' of what hung -> its path.
    """

    def __init__(
        self,
        file: str | os.PathLike | None,
        *,
        max_share: float = 0.01,
        min_count: int = 20,
        total: int | None = None,
        others: Sequence[str | os.PathLike] = (),
    ):
        if not 0 <= max_share <= 1 or min_count < 0:
            raise ValueError(
                f"max_share must be in [0, 1] and min_count 0 or more; got max_share={max_share}, "
                f"min_count={min_count}. max_share=1 never stops."
            )
        self.file = None if file is None else os.fspath(file)
        self.max_share, self.min_count, self.total = max_share, min_count, total
        self.seen = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()
        self._bad: dict[tuple[str, str], dict[str, str]] = {}
        self._cut: set[str] = set()
        self.hanging: dict[str, str] = {}
        self._listed = self._read() if self.file else set()
        for other in others:
            with open(other, "rb") as lines:
                self._parse(lines.read())

    def observe(self, info: Sequence[dict[str, Any]]) -> None:
        """Takes note of one batch.

        Args:
            info: as the loader gives it; `failed` lists what could not be loaded for the row, `truncated`, `fallback`
                and `padded` say how the clip was made.

        Raises:
            TooManyBad: over the budget.
        """
        self.seen += len(info)
        for failure in (failure for row in info for failure in row.get("failed", ())):
            key = (failure["path"], failure["id"])
            if key not in self._bad:
                self._bad[key] = failure
                self.counts[failure["reason"]] += 1
                if self.counts[failure["reason"]] <= 10:
                    log.warning(
                        "Bad video %s: %s (%s)", key[0], failure["reason"], failure["detail"]
                    )
                self._append(failure)
        for row in info:
            self._note(row)
        if len(self._bad) > self.min_count and self.share > self.max_share:
            raise TooManyBad(self._message())

    def apart(self) -> "BadLedger":
        """A ledger with the same list and a count of its own that never stops: for clips that aren't trained on."""
        other = BadLedger(None, max_share=1.0)
        other.file, other._listed, other.hanging = self.file, self._listed, self.hanging
        return other

    def found_hanging(self, example: str, failure: dict[str, str]) -> None:
        """Lists an example that hung, before any batch comes, so that a start after this one passes it over.

        Args:
            example: as in `hanging`.
            failure: path, id, reason and detail, as `observe` will see them.
        """
        self.hanging[example] = failure["path"]
        self._append(failure, example=example)

    def _note(self, row: dict[str, Any]) -> None:
        self.notes.update(name for name in ("fallback", "padded") if row.get(name))
        if row.get("truncated") and row["path"] not in self._cut:
            self._cut.add(row["path"])
            self.notes["truncated"] += 1
            cut = {"path": row["path"], "id": row["id"], "reason": "truncated", "detail": _USED}
            if self.notes["truncated"] <= 10:
                log.warning("Video %s is cut short: %s", row["path"], _USED)
            self._append(cut)

    @property
    def count(self) -> int:
        """Distinct bad files met since this start."""
        return len(self._bad)

    @property
    def share(self) -> float:
        """Distinct bad files over distinct examples seen since this start."""
        distinct = self.seen if self.total is None else min(self.seen, self.total)
        return len(self._bad) / max(distinct, 1)

    def _message(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.counts.most_common())
        first = "\n".join(
            f"  {failure['path']}: {failure['reason']} ({failure['detail']})"
            for failure in list(self._bad.values())[:10]
        )
        return (
            f"At most {self.max_share:.2%} of the videos may be bad; got {len(self._bad)} bad of {self.seen} examples "
            f"seen ({self.share:.2%}; {reasons}). The first:\n{first}\n"
            + (f"All are listed in {self.file}. " if self.file else "")
            + "Check the whole data set with `python -m invideo_jax.data.scan`, or raise data.bad_share."
        )

    def _read(self) -> set[tuple[str, str, str]]:
        """What an earlier start listed; a last line cut off by a kill is ended, so that the next starts anew."""
        if not os.path.exists(self.file):
            os.makedirs(os.path.dirname(self.file) or ".", exist_ok=True)
            return set()
        with open(self.file, "rb+") as file:
            text = file.read()
            if text and not text.endswith(b"\n"):
                file.write(b"\n")
        return self._parse(text)

    def _parse(self, text: bytes) -> set[tuple[str, str, str]]:
        """What a list names; notes the examples in it that hung."""
        listed = set()
        for line in text.splitlines():
            try:
                row = json.loads(line)
                listed.add((row["path"], row["id"], row["reason"]))
                if row["reason"] == "hanging":
                    self.hanging[row["example"]] = row["path"]
            except (ValueError, KeyError, TypeError):
                continue
        return listed

    def _append(self, failure: dict[str, str], **more: str) -> None:
        key = (failure["path"], failure["id"], failure["reason"])
        if self.file is None or key in self._listed:
            return
        self._listed.add(key)
        line = (json.dumps(failure | more) + "\n").encode()
        # One write with O_APPEND: lines of several processes don't mix, and a kill leaves whole lines.
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
