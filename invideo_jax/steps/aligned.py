"""Unmasked-token alignment: a student that sees few tokens predicts what frozen teachers make of the whole clip.

Three pure functions, one after the other, of which only the last is differentiated:

    Teachers.features   (teacher parameters, batch) -> features of whole clips, and an attention
    entries             (features, keys) -> which tokens the student sees, and the features at these places
    align_objective     (parameters, batch) -> loss

The first may equally be a look-up in a cache on disk, which holds just its result: a batch that comes with
features of whole clips goes through `entries` inside the loss.

Source: InternVideo2 (arXiv:2403.15377) 3.1, engine_for_pretraining.py; UMT (arXiv:2303.16058).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import losses, masking
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.models.attention import fold
from invideo_jax.models.teachers import Features, Teacher
from invideo_jax.sharding import constrain
from invideo_jax.steps.masked import (
    DROP_PATH,
    Objective,
    draw_mask,
    example_keys,
    host_key,
)
from invideo_jax.steps.update import Batch

PyTree = Any

PARTS = ("clip_middle", "clip_final", "mae")


@dataclasses.dataclass(frozen=True)
class Teachers:
    """The teachers of a stage.

    Attributes:
        clip: gives the class token, patches, a pooled feature and the attention; None for none.
        mae: gives patches; None for none.
        stride: `clip` and the student see every stride-th frame, from the first on; `mae` sees all.
    """

    clip: Teacher | None = None
    mae: Teacher | None = None
    stride: int = 1

    def named(self) -> dict[str, Teacher]:
        """Those that there are, by name."""
        return {k: v for k, v in (("clip", self.clip), ("mae", self.mae)) if v is not None}

    @property
    def prefix(self) -> int:
        """Class tokens of the clip teacher."""
        return self.clip.prefix if self.clip is not None else 0

    def check(self, grid: masking.Grid) -> None:
        """Raises UserError unless every teacher gives one feature for each token of the student.

        Args:
            grid: (t, h, w) of the student.
        """
        if not self.named():
            raise UserError("Alignment needs a teacher; got none. Name clip, mae or both.")
        for name, teacher in self.named().items():
            teacher.encoder.check()
            if teacher.grid != tuple(grid):
                raise UserError(
                    f"Teacher and student must cut a clip into the same grid of tokens (t, h, w); got "
                    f"teacher {name}={teacher.grid}, student={tuple(grid)}. Change the patch, the tubelet or "
                    "the size of the picture of one of them, or the stride of frames."
                )

    def init(self, key: jax.Array) -> PyTree:
        """Fresh parameters of all teachers, boxed: random teachers, for tests and small runs."""
        keys = dict(zip(("clip", "mae"), jax.random.split(key)))
        return {name: teacher.init(keys[name]) for name, teacher in self.named().items()}

    def features(self, params: PyTree, batch: Batch) -> Features:
        """What the teachers make of whole clips; no gradient goes into them.

        Returns:
            `clip_middle` [B, K, prefix+N, C], `clip_final` [B, P], `attention` [B, N], `mae` [B, K, N, C].
        """
        params, found = jax.lax.stop_gradient(params), {}
        if self.clip is not None:
            made = self.clip(params["clip"], batch["video"][:, :: self.stride])
            names = {"middle": "clip_middle", "final": "clip_final", "attention": "attention"}
            found |= {names[k]: v for k, v in made.items()}
        if self.mae is not None:
            found["mae"] = self.mae(params["mae"], batch["video"])["middle"]
        return jax.lax.stop_gradient(found)


def choose(features: Features, visible: jax.Array, *, prefix: int = 1) -> dict[str, jax.Array]:
    """The entries of a batch that `align_objective` reads: features at the visible places only.

    Args:
        features: as `Teachers.features` gives them.
        visible: int32 [B, V].
        prefix: class tokens in front of `clip_middle`, which are always kept.

    Returns:
        `visible`; `clip_middle` [B, K, prefix+V, C], `clip_final` [B, P], `mae` [B, K, V, C] where given.
    """
    entries = {"visible": visible}
    take = jax.vmap(lambda f, i: jnp.take(f, i, axis=1, mode="clip"))
    if "clip_middle" in features:
        first = jnp.broadcast_to(jnp.arange(prefix, dtype=visible.dtype), (len(visible), prefix))
        ids = jnp.concatenate([first, visible + prefix], axis=1)
        entries["clip_middle"] = take(features["clip_middle"], ids)
    if "mae" in features:
        entries["mae"] = take(features["mae"], visible)
    if "clip_final" in features:
        entries["clip_final"] = features["clip_final"]
    return {k: constrain(x, "batch", *(None,) * (x.ndim - 1)) for k, x in entries.items()}


def entries(
    features: Features,
    keys: jax.Array,
    *,
    grid: masking.Grid,
    mask: Mapping[str, Any],
    prefix: int = 1,
) -> dict[str, jax.Array]:
    """Draws the mask, and keeps the features at the places that it leaves.

    Args:
        features: as `Teachers.features` gives them; others of the batch may be among them.
        keys: one random key for each example, [B], from `masked.example_keys`.
        grid: (t, h, w) of the student.
        mask: a name and its options. 'attention' draws in proportion to the teacher's attention, for each
            frame alone (InternVideo2, stage 1), or with per_frame=False over the clip (distillation).
        prefix: class tokens of the clip teacher.

    Returns:
        As `choose`.

    Raises:
        UserError: a mask by attention without attention.
    """
    more = {}
    if mask["name"] == "attention":
        if "attention" not in features:
            raise UserError(
                "mask.name='attention' needs a teacher that gives an attention; got none. "
                "Use a clip teacher, or the mask tube, random or block."
            )
        more["weights"] = features["attention"].astype(jnp.float32)
    visible, _ = draw_mask(grid, keys, mask, **more)
    return choose(features, visible, prefix=prefix)


def make_teach(
    teachers: Teachers, *, stage_key: jax.Array, grid: masking.Grid, mask: Mapping[str, Any]
) -> Callable[[PyTree, Batch], dict[str, jax.Array]]:
    """(teacher parameters, batch) -> the entries of the batch that the objective reads."""
    key = host_key(stage_key)

    def teach(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        keys = example_keys(key(), batch["position"])
        features = teachers.features(params, batch)
        return entries(features, keys, grid=grid, mask=mask, prefix=teachers.prefix)

    return teach


def align_objective(
    model: nn.Module,
    *,
    mask: Mapping[str, Any],
    ratios: Mapping[str, float],
    stride: int = 1,
    prefix: int = 1,
) -> Objective:
    """The weighted sum of the alignments of `PARTS`, each averaged over the vectors of an example.

    All parts have the weight of the valid examples, so that their sum is one `Mean`, and the gradient is
    exact under accumulation and padding.

    Args:
        model: `AlignedEncoder`, whose outputs have the names of the teachers' features.
        mask, prefix: as of `entries`; used where a batch comes with the features of whole clips.
        ratios: factor of each part; a part of factor 0 is left out, and its teacher need not be there.
        stride: the student sees every stride-th frame, from the first on.

    Raises:
        UserError: no part, or an unknown one.
    """
    wanted = {name: ratio for name, ratio in ratios.items() if ratio}
    if not wanted or set(wanted) - set(PARTS):
        raise UserError(
            f"ratios must weigh at least one of {', '.join(PARTS)}, and nothing else; got {dict(ratios)}."
        )
    grid = model.encoder.grid

    def loss(params, batch, keys, train):
        if "visible" not in batch:
            chosen = entries(batch, keys, grid=grid, mask=mask, prefix=prefix)
            batch = dict(batch) | jax.lax.stop_gradient(chosen)
        drop = fold(keys, DROP_PATH) if train and model.encoder.drop_path else None
        video = batch["video"][:, ::stride]
        out = model.apply({"params": params}, video, batch["visible"], keys=drop)
        parts = {
            name: losses.cosine_distance(out[name], batch[name], batch["valid"]) for name in wanted
        }
        total = sum(ratio * parts[name].total for name, ratio in wanted.items())
        return Mean(total, parts[next(iter(wanted))].weight), parts

    return loss
