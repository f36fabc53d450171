"""Frame sampling and masks for `tests.golden`: input -> output examples of the published loaders.

An example belongs to one rule. Either ours must give the same numbers from the same draws, or the rule
says why it does not: a defect of the published code (numbered as in that file's README) that we do not
copy, or something not offered here. The latter are counted by name; none is passed over silently.
"""

import collections
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import masking
from invideo_jax.data import sampling
from tests.golden import Outcome, Tensors

Example = Mapping[str, Any]


class NumpyDraws:
    """The published loaders draw from np.random."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)

    def integers(self, low, high, size=None):
        return self.state.randint(low, high, size=size)

    def permutation(self, n):
        return self.state.permutation(n)


class PythonDraws(NumpyDraws):
    """kinetics_sparse draws with random.randint, multi_modality with random.choice."""

    def __init__(self, seed, choice=False):
        super().__init__(seed)
        self.random, self.choice = random.Random(seed), choice

    def integers(self, low, high, size=None):
        if self.choice:
            return self.random.choice(range(low, high))
        return self.random.randint(low, high - 1)


# Our numbers for an example --------------------------------------------------------------------------


def pretraining(e: Example) -> np.ndarray:
    """One window, or one frame of each part."""
    draws = NumpyDraws(e["np_seed"])
    if e["mode"].startswith("dense"):
        return sampling.dense(e["video_len"], e["new_length"], e["new_step"], draws)
    return sampling.tsn_segments(e["video_len"], e["num_segments"], draws)


def fine_tuning_dense(e: Example) -> np.ndarray:
    """A random or fixed window; MCG's test lists the strided frames of the whole video."""
    n, t, s = e["video_len"], e["clip_len"], e["frame_sample_rate"]
    if e["mode"].startswith("test("):
        return sampling.dense_view(n, max(t, -(-n // s)), s, 0, 2)
    if e["mode"] == "test":
        return sampling.dense_view(n, t, s, e["chunk_nb"], e["test_num_segment"])
    return sampling.window(n, t, s, NumpyDraws(e["np_seed"]) if e["mode"] == "train" else None)


def fine_tuning_sparse(e: Example) -> np.ndarray:
    """A random frame of each part, or a fixed clip."""
    n, t = e["video_len"], e["num_frames"]
    if e["mode"] == "train":
        return sampling.segments_inclusive(n, t, PythonDraws(e["py_random_seed"]))
    views = 1 if e["mode"] == "validation" else e["test_num_segment"]
    return sampling.segments_inclusive_view(n, t, e["clip_idx"], views)


def multi_modal(e: Example) -> np.ndarray:
    """A random or the middle frame of each interval."""
    if e["sample"] == "rand":
        return sampling.rand(e["vlen"], e["num_frames"], PythonDraws(e["seed"], choice=True))
    return sampling.middle(e["vlen"], e["num_frames"])


def something(e: Example) -> np.ndarray:
    """TSN segments; the test lists the frames of both clips."""
    n, t = e["video_len"], e["num_segment"]
    if e["mode"] == "train":
        return sampling.tsn_segments(n, t, NumpyDraws(e["np_seed"]))
    if e["mode"] == "validation":
        return sampling.tsn_middle(n, t)
    return np.sort(np.concatenate([sampling.tsn_view(n, t, v) for v in (0, 1)]))


def drawn_mask(e: Example) -> np.ndarray:
    """Hidden ids, of a tube in the first frame, from the published shuffle as the noise of ours."""
    (t, h, w), tube, draws = e["window"], "Tube" in e["impl"], np.random.RandomState(e["np_seed"])
    places = h * w if tube else t * h * w
    rows = []
    for _ in range(e.get("batch", 1)):
        row = np.repeat([0.0, 1.0], [places - int(e["ratio"] * places), int(e["ratio"] * places)])
        draws.shuffle(row)
        rows.append(row)
    with mock.patch.object(masking, "_noise", lambda keys, size: jnp.asarray(np.stack(rows))):
        keys = jax.random.split(jax.random.key(0), len(rows))
        make = masking.tube if tube else masking.random
        hidden = np.asarray(make(keys, grid=(t, h, w), ratio=e["ratio"])[1])
    if tube:  # the rest must repeat the first frame
        hidden = hidden.reshape(len(rows), t, -1)
        assert (hidden == hidden[:, :1] + h * w * np.arange(t)[:, None]).all()
        hidden = hidden[:, 0]
    return hidden if "batch" in e else hidden[0]


def attention_mask(e: Example) -> np.ndarray:
    """The mask of each frame, from the order in which the published draw took the places."""
    weights, order = np.asarray(e["attn"]), np.asarray(e["multinomial_order"])
    frames, places = weights.shape
    score = np.empty_like(weights)
    np.put_along_axis(score, order, -np.arange(places, dtype=float)[None], axis=1)
    with mock.patch.object(jax.random, "gumbel", lambda *_: jnp.asarray(score - np.log(weights))):
        hidden = masking.attention(
            jax.random.split(jax.random.key(0), 1),
            grid=(frames, 1, places),
            ratio=1 - e["n_visible"] / places,
            weights=jnp.asarray(weights).reshape(1, -1),
        )[1]
    return np.asarray(masking.mask_of(hidden, frames * places)).reshape(frames, places)


# Which rule an example belongs to --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """Examples that ours equals, or does not for a reason.

    Attributes:
        name: of the group of the file that it is of.
        holds: tells which examples of the group; the first rule that holds counts.
        ours: their numbers here; None where there are none.
        reason: why ours differ; '' where they must be equal.
        key: of the published numbers.
    """

    name: str
    holds: Callable[[Example], bool]
    ours: Callable[[Example], np.ndarray] | None
    reason: str = ""
    key: str = "frame_ids"


_ALL = lambda e: True
_JITTER = "not offered: jitter within the stride, which no published recipe uses"
_DEFECT_6 = (
    "differs on purpose (defect 6): the loader raises for segments with a sampling rate above 1"
)
_MCG, _MAE = "VideoMAE.kinetics.VideoMAE (MCG-NJU)", "IV2.datasets.mae.VideoMAE"
_MULTI, _DENSE = (
    "IV2.datasets.mae_multi.VideoMAE_multi",
    "kinetics.VideoClsDataset.loadvideo_decord",
)
_SPARSE, _SOMETHING = "IV2.kinetics_sparse._get_seq_frames", "ssv2 (TSN segments)"
_MODAL = "IV2.multi_modality.get_frame_indices"
_longer = lambda e: e["video_len"] > e["clip_len"] * e["frame_sample_rate"]
_raw = lambda e: e["impl"] == "IV2.SSRawFrameClsDataset.load_frame"

RULES = (
    *(Rule(name, lambda e: "error" in e, None, _DEFECT_6) for name in (_MCG, _MAE, _MULTI)),
    *(Rule(name, lambda e: e["temporal_jitter"], None, _JITTER) for name in (_MCG, _MAE, _MULTI)),
    Rule(_MCG, _ALL, pretraining),
    Rule(_MAE, _ALL, pretraining),
    Rule(
        _MULTI,
        lambda e: e["video_len"] > e["new_length"] * e["new_step"] or e["mode"][0] == "s",
        lambda e: pretraining(e) - 1,
        "differs on purpose (defect 4): each frame there is one too early, -1 at the start; ours less one equal them",
    ),
    Rule(
        _MULTI,
        _ALL,
        None,
        "differs on purpose (defect 4): as above; short videos also end one step later",
    ),
    Rule(
        _DENSE,
        lambda e: e["mode"] == "validation" and e["impl"] == "IV2" and _longer(e),
        None,
        "differs on purpose (defect 5): the middle start is taken for the end; ours is the middle window",
    ),
    Rule(
        _DENSE,
        lambda e: e["mode"] == "validation" and _longer(e),
        None,
        "differs on purpose: validation there draws a window at random; ours is the middle window",
    ),
    Rule(_DENSE, _ALL, fine_tuning_dense),
    Rule(_SPARSE, _ALL, fine_tuning_sparse),
    Rule(
        _MODAL,
        lambda e: "fix_start" in e,
        None,
        "not offered: fix_start (defect 6: it can pass the end of the video)",
    ),
    Rule(
        _MODAL,
        lambda e: e["sample"].startswith("fps"),
        None,
        "not offered: fps sampling of as many frames as the video has; ours takes T frames by their times",
    ),
    Rule(_MODAL, _ALL, multi_modal),
    Rule(
        _SOMETHING,
        lambda e: e["mode"] == "test" and e["test_num_segment"] != 2,
        None,
        "not offered: more than the two published test clips",
    ),
    Rule(
        _SOMETHING,
        lambda e: e["impl"].startswith("MCG") and e["mode"] == "validation",
        None,
        "differs on purpose: validation there draws at random; ours takes the middle of each part",
    ),
    Rule(
        _SOMETHING,
        lambda e: _raw(e) and e["mode"] != "test",
        None,
        "differs on purpose: raw frames pad short videos at the front, and their middle is one frame off",
    ),
    Rule(_SOMETHING, _ALL, something),
    Rule(
        "masks",
        lambda e: e["ratio"] in (0.0, 1.0),
        None,
        "refused here: a mask that hides nothing or everything",
    ),
    Rule("masks", _ALL, drawn_mask, key="masked"),
    Rule("attention mask", _ALL, attention_mask, key="mask"),
)


def rule_of(group: str, example: Example) -> Rule:
    """The rule of an example; ValueError for a group that none knows."""
    for rule in RULES:
        if rule.name == group and rule.holds(example):
            return rule
    raise ValueError(f"no rule knows the group {group!r}")


def run(meta: Mapping[str, Any], state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Our numbers for every example that has some, and a note for each rule that differs."""
    ours, theirs = {}, {}
    apart: collections.Counter[tuple[str, str]] = collections.Counter()
    for group, content in meta.items():
        if group == "file":
            continue
        for number, example in enumerate(content["examples"]):
            rule = rule_of(group, example)
            if rule.reason:
                apart[group, rule.reason] += 1
            if rule.ours is not None:
                name = f"{group.replace('/', '-')}/{number}"
                theirs[name], ours[name] = example[rule.key], rule.ours(example)
    notes = [f"{count} examples of {group}: {reason}" for (group, reason), count in apart.items()]
    return Outcome(ours, wanted=theirs, notes=tuple(notes))


def _claims(meta: Mapping[str, Any], tensors: Tensors) -> bool:
    known = {rule.name for rule in RULES}
    return not tensors and bool(known & meta.keys())


FAMILIES = [(_claims, run)]
