"""What of an example is loaded besides its pictures: texts, sound, and which example it is.

Entries of a batch of R rows (L tokens of a text, F frames of sound):

    example              uint32 [R]: number of the example; equal ones count as the same
    has_video            bool [R]: False for an example that is sound only; its pictures are 0
    text_SLOT            int32 [R, L], for each slot
    text_SLOT_valid      bool [R, L]: all False where the example has no such text
    audio                float32 [R, F, mels], 0 behind the end of the sound
    audio_frames         int32 [R]: how many are real; 0 without sound
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from invideo_jax.data.audio import AudioSpec, load_audio
from invideo_jax.data.captions import CaptionRule, choose, written
from invideo_jax.data.decode import Limits
from invideo_jax.data.sources.base import Example
from invideo_jax.data.speech import speech_in
from invideo_jax.data.text import Tokenizer, open_tokenizer
from invideo_jax.data.transforms import ClipInfo
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

NUMBERED = ("global", "corpus")
_TEXT, _AUDIO = 1, 2  # what the generator of an example is keyed with, for each use


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """How texts of an example become tokens.

    Attributes:
        tokenizer: spec of `text.open_tokenizer`.
        length: L.
        slots: (slot, rule) pairs.
        prefix: stands before every text.
        normalise: how texts that are asked for are written, as those of the slots are; see `CaptionRule`.
    """

    tokenizer: str
    length: int
    slots: tuple[tuple[str, CaptionRule], ...]
    prefix: str = ""
    normalise: str = ""

    def open(self) -> Tokenizer:
        """The tokenizer, read once in each process."""
        return _tokenizer(self.tokenizer, self.prefix)

    def reopen(self) -> Tokenizer:
        """The tokenizer, read anew: a process may start several runs, and its file change between them."""
        _tokenizer.cache_clear()
        return self.open()

    def tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n, L] and validity bool [n, L] of texts as they are; '' gives none."""
        return self.open()(texts, self.length)

    def written(self, text: str) -> str:
        """A text that an evaluation or a search asks for, as those of training are written."""
        return written(text, self.normalise)

    def asked(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`tokens` of texts that an evaluation or a search asks for."""
        return self.tokens([self.written(text) for text in texts])


@dataclasses.dataclass(frozen=True)
class Modalities:
    """What is loaded besides pictures; pickles into workers.

    Attributes:
        text: None for no texts.
        audio: None for no sound.
        example: 'global': examples are numbered over all sources of the run. 'corpus': each within its source, by which
            those of several sources collide, as in the published code (ids are rows of an annotation file).
    """

    text: TextSpec | None = None
    audio: AudioSpec | None = None
    example: str = "global"

    def __post_init__(self):
        if self.example not in NUMBERED:
            raise UserError(
                f"positives must be one of {', '.join(NUMBERED)}; got positives={self.example!r}."
                f"{nearest(self.example, NUMBERED)}"
            )

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape of one row and type of each entry."""
        found: dict[str, tuple[tuple[int, ...], type]] = {
            "example": ((), np.uint32),
            "has_video": ((), np.bool_),
        }
        for slot, _ in self.text.slots if self.text else ():
            found[f"text_{slot}"] = ((self.text.length,), np.int32)
            found[f"text_{slot}_valid"] = ((self.text.length,), np.bool_)
        if self.audio:
            found["audio"] = (self.audio.shape, np.float32)
            found["audio_frames"] = ((), np.int32)
        return found

    def blank(self, rows: int) -> dict[str, np.ndarray]:
        """Entries of a batch without examples."""
        return {name: np.zeros((rows, *shape), kind) for name, (shape, kind) in self.shapes.items()}

    def load(
        self,
        example: Example,
        clip: ClipInfo | None,
        seeds: tuple[int, ...],
        *,
        train: bool,
        limits: Limits,
    ) -> dict[str, Any]:
        """One row, without `example`.

        Args:
            clip: of the pictures; None for sound only.
            seeds: of every random choice for this row.
            train: False takes the first text of a kind, and the middle of the sound.

        Raises:
            BadVideo: the file cannot be used.
        """
        row: dict[str, Any] = {"has_video": clip is not None}
        draw = lambda use: np.random.default_rng([*seeds, use]) if train else None
        times = clip.times if clip is not None else None
        if self.text:
            row |= self._texts(example, times, draw(_TEXT))
        if self.audio:
            where = dict(start=example["start"], end=example["end"], times=times, limits=limits)
            silent = example["media"] == "image"
            made = (
                (None, 0)
                if silent
                else load_audio(example["video"], self.audio, draw(_AUDIO), **where)
            )
            row["audio_frames"] = made[1]
            if made[1]:
                row["audio"] = made[0]
        return row

    def _texts(self, example: Example, times: tuple[float, ...] | None, rng) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if times and example["speech"]:
            between = (times[-1] - times[0]) / max(len(times) - 1, 1)
            span = times[0] - between / 2, times[-1] + between / 2
            example = {**example, "transcript": speech_in(example, *span)}
        for slot, rule in self.text.slots:
            ids, valid = self.text.tokens([choose(example, rule, rng)])
            row |= {f"text_{slot}": ids[0], f"text_{slot}_valid": valid[0]}
        return row


@functools.lru_cache(maxsize=8)
def _tokenizer(spec: str, prefix: str) -> Tokenizer:
    return open_tokenizer(spec, {"prefix": prefix} if prefix else None)
