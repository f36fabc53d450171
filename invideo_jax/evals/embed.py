"""Embeddings of videos and texts for evaluators, spread over the devices as they are made."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.evals import Batch, Given
from invideo_jax.evals.classification import to_host
from invideo_jax.evals.ranking import Rows
from invideo_jax.registry import nearest
from invideo_jax.towers import Towers

MODALITIES = ("video", "audio", "audio_video")


def towers_of(given: Given, evaluator: str, *, modality: str = "video", match: bool = False):
    """The towers, where the model has all that is asked for.

    Raises:
        UserError: no towers, none of this modality, or nothing that judges pairs; names the evaluator.
    """
    if modality not in MODALITIES:
        raise UserError(
            f"What is looked for must be one of {', '.join(MODALITIES)}; got {modality!r}."
            f"{nearest(modality, MODALITIES)}"
        )
    wanted = f"The evaluator {evaluator!r} needs a model"
    out = "Take it out of the recipe's evals, or judge a stage that has it."
    if given.towers is None:
        raise UserError(
            f"{wanted} of video and text, which this stage's is not. Take it out of the recipe's evals; "
            "'probe' and 'knn' judge the features of any encoder."
        )
    if getattr(given.towers, modality) is None:
        raise UserError(f"{wanted} that embeds {modality}, which this stage's does not. {out}")
    if match and given.towers.match is None:
        raise UserError(
            f"{wanted} that judges pairs of video and text (fusion layers and the loss vtm), which this "
            f"stage's does not. {out} Without re-ranking it measures the embeddings."
        )
    return given.towers


def texts_of(given: Given, evaluator: str, **which: Any) -> Sequence[tuple[str, ...]]:
    """The texts of each example, empty ones left out.

    Args:
        which: arguments of `Given.texts`.

    Raises:
        UserError: no example has one of that kind.
    """
    found = [] if given.texts is None else given.texts(**which)
    found = [tuple(text for text in texts if text.strip()) for texts in found]
    if not any(found):
        raise UserError(
            f"The evaluator {evaluator!r} needs texts of the kind {which['kind']!r}; got none among the "
            f"{which['of']} videos. Give them in the manifest, ask for another kind "
            "(evals.<evaluator>.text), or take it out of the recipe's evals."
        )
    return found


def place(host: dict[str, Callable[[np.ndarray], np.ndarray]], rows: int) -> dict[str, jax.Array]:
    """Arrays [rows, ...] on the devices of the mesh that is set, row by row as a batch lies.

    Args:
        host: name -> function of row numbers that gives these rows; called with those of this process.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return {name: jnp.asarray(make(np.arange(rows))) for name, make in host.items()}
    mine = sharding.rows_of_process(mesh, rows)
    return sharding.global_batch({name: make(mine) for name, make in host.items()}, mesh)


def whole_rows(rows: int) -> int:
    """The least number of rows, at least `rows`, that the mesh that is set divides."""
    mesh = jax.sharding.get_mesh()
    unit = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-max(rows, 1) // unit) * unit


class Embedder:
    """Jitted towers.

    Args:
        modality: what `videos` embeds.
        text_batch: texts that are embedded at once.
    """

    def __init__(self, towers: Towers, *, modality: str = "video", text_batch: int = 256):
        if text_batch < 1:
            raise UserError(f"text_batch must be at least 1; got text_batch={text_batch}.")
        self.towers, self.text_batch = towers, text_batch
        other = getattr(towers, modality)

        def video(params, batch):
            made = other(params, batch)
            real = batch["valid"]
            if "valid" in made:
                real &= made["valid"]
            if modality != "audio" and "has_video" in batch:
                real &= batch["has_video"]
            return made["embedding"].astype(jnp.float32), real

        self._video = jax.jit(video)
        self._text = jax.jit(lambda *args: towers.text(*args)["embedding"].astype(jnp.float32))

    def batches(self, params: Any, batches: Iterator[Batch]):
        """(batch, embedding [B, P], which rows count: bool [B] on the host), one after the other."""
        for batch in batches:
            embedding, real = self._video(params, batch)
            yield batch, embedding, to_host(real)

    def videos(self, params: Any, batches: Iterator[Batch]) -> Rows:
        """Clips with one view; the owner is their position."""
        made, owners = [], []
        for batch, embedding, real in self.batches(params, batches):
            made.append(embedding)
            owners.append(np.where(real, to_host(batch["position"]).astype(np.int64), -1))
        return Rows(_stack(made), np.stack(owners).astype(np.int32)[..., None])

    def texts(self, params: Any, texts: Sequence[str]) -> Rows:
        """Texts; the owner is their place in the list. There must be one."""
        rows = whole_rows(min(self.text_batch, len(texts)))
        made = []
        for start in range(0, len(texts), rows):
            made.append(self._text(params, *self.tokens(texts[start : start + rows], rows)))
        owner = np.arange(len(made) * rows, dtype=np.int32).reshape(-1, rows, 1)
        return Rows(_stack(made), np.where(owner < len(texts), owner, -1))

    def tokens(self, texts: Sequence[str], rows: int) -> tuple[jax.Array, jax.Array]:
        """Ids [rows, L] and valid [rows, L] on the devices; rows beyond the texts are of an empty one."""
        words = {}

        def own(mine: np.ndarray, which: int) -> np.ndarray:
            if not words:
                chosen = [texts[i] if i < len(texts) else "" for i in mine]
                words.update(enumerate(self.towers.tokenize(chosen)))
            return words[which]

        placed = place({"ids": lambda m: own(m, 0), "valid": lambda m: own(m, 1)}, rows)
        return placed["ids"], placed["valid"]


_MOST = 64  # operands of one compiled call; the time to trace one grows faster than their number
_stack_some = jax.jit(lambda *blocks: jnp.stack(blocks))
_join_some = jax.jit(lambda *blocks: jnp.concatenate(blocks))


def _stack(blocks: Sequence[jax.Array]) -> jax.Array:
    """[n, ...] of n arrays, a few at a time."""
    some = lambda join, parts: [join(*parts[i : i + _MOST]) for i in range(0, len(parts), _MOST)]
    parts = some(_stack_some, blocks)
    while len(parts) > 1:
        parts = some(_join_some, parts)
    return parts[0]


def on_host(rows: Rows) -> np.ndarray:
    """The embeddings of the rows that count, in their order, float32 [rows, P]."""
    return to_host(rows.embedding)[rows.real]
