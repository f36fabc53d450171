"""Frame numbers of clips: closed forms, plain loops, invariances, and the published code's own examples."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invideo_jax.data import sampling
from invideo_jax.errors import UserError
from tests import golden, golden_data


class Fixed:
    """A generator whose draws are given; `integers` checks their range."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def integers(self, low, high, size=None):
        draw = np.asarray(self.draws.pop(0))
        assert np.all(draw >= low) and np.all(draw < high)
        assert size is None or draw.shape == (size,)
        return draw


# Closed forms -------------------------------------------------------------------------------------


def test_dense_is_a_window_at_the_drawn_offset():
    got = sampling.dense(100, 16, 4, Fixed(12))
    assert got.tolist() == [12 + 4 * i for i in range(16)]
    # 65 frames leave offsets 0 and 1.
    assert sampling.dense(65, 16, 4, Fixed(1)).tolist() == [1 + 4 * i for i in range(16)]


def test_dense_of_a_short_video_repeats_its_last_frame():
    assert sampling.dense(15, 8, 4, Fixed()).tolist() == [0, 4, 8, 12, 12, 12, 12, 12]
    # As published: the step to frame 12 of 13 is not taken.
    assert sampling.dense(13, 5, 4, Fixed()).tolist() == [0, 4, 8, 8, 8]
    assert sampling.dense(1, 4, 4, Fixed()).tolist() == [0, 0, 0, 0]


def test_dense_view_covers_the_ends():
    assert sampling.dense_view(100, 8, 4, 0, 3).tolist() == list(range(0, 32, 4))
    assert sampling.dense_view(100, 8, 4, 2, 3).tolist() == list(range(68, 100, 4))
    assert sampling.dense_view(100, 8, 4, 0, 1).tolist() == list(range(34, 66, 4))
    assert sampling.dense_view(5, 4, 2, 1, 2).tolist() == [0, 2, 4, 4]


def test_window_middle():
    assert sampling.window(20, 8, 2).tolist() == [2, 4, 6, 8, 11, 13, 15, 17]
    assert sampling.window(100, 4, 10, Fixed(60)).tolist() == [20, 33, 46, 59]


def test_segments_closed_forms():
    assert sampling.segments(16, 4).tolist() == [2, 6, 10, 14]
    assert sampling.segments(4, 4, np.random.default_rng(0)).tolist() == [0, 1, 2, 3]
    assert sampling.segments(2, 4, np.random.default_rng(0)).tolist() == [0, 0, 1, 1]
    assert sampling.segments(1, 3).tolist() == [0, 0, 0]
    assert sampling.segments(10, 4, Fixed([2, 1, 2, 1])).tolist() == [
        2,
        4,
        7,
        9,
    ]  # parts 0-2 3-4 5-7 8-9


def test_segments_inclusive_shares_the_ends():
    # 9 frames, 4 parts: edges 0 2 4 6 8
    assert sampling.segments_inclusive(9, 4, Fixed(2, 2, 6, 8)).tolist() == [2, 2, 6, 8]
    assert sampling.segments_inclusive_view(9, 4, 0, 1).tolist() == [1, 3, 5, 7]
    assert sampling.segments_inclusive_view(41, 4, 2, 3).tolist() == [7, 17, 27, 37]


def test_rand_never_takes_the_last_of_an_interval():
    assert sampling.middle(12, 4).tolist() == [1, 4, 7, 10]
    assert sampling.middle(3, 4).tolist() == [0, 1, 2, 2]
    seen = {tuple(sampling.rand(12, 4, np.random.default_rng(s))) for s in range(200)}
    assert {i for clip in seen for i in clip} == {0, 1, 3, 4, 6, 7, 9, 10}


def test_tsn_views():
    assert sampling.tsn_segments(17, 4, Fixed([3, 0, 1, 2])).tolist() == [3, 4, 9, 14]
    assert sampling.tsn_middle(8, 4).tolist() == [1, 3, 5, 7]
    assert sampling.tsn_view(8, 4, 0).tolist() == [0, 2, 4, 6]
    assert sampling.tsn_view(8, 4, 1).tolist() == [1, 3, 5, 7]


def test_tsn_padded_begins_with_copies_of_the_first_frame():
    assert sampling.tsn_padded(17, 4, Fixed([3, 0, 1, 2])).tolist() == [3, 4, 9, 14]
    assert sampling.tsn_padded(3, 5, Fixed()).tolist() == [0, 0, 0, 1, 2]
    assert sampling.tsn_padded(5, 5, Fixed([0] * 5)).tolist() == [0, 1, 2, 3, 4]
    assert sampling.tsn_padded_view(20, 4, 0, 1).tolist() == [0, 5, 10, 15]
    assert sampling.tsn_padded_view(20, 4, 1, 2).tolist() == [2, 7, 12, 17]
    assert sampling.tsn_padded_view(20, 4, 3, 4).tolist() == [3, 8, 13, 18]
    with pytest.raises(ValueError, match=r"view must be in \[0, 5\); got view=5"):
        sampling.tsn_padded_view(20, 4, 5, 5)


@pytest.mark.parametrize("views", [1, 2, 4, 5])
@pytest.mark.parametrize("frames", [8, 16])
def test_tsn_padded_views_equal_a_plain_loop(views, frames):
    """All frames of all views are put in order, and each view takes every `views`-th of them, as published."""
    for n in range(1, 90):
        tick, every = n / float(frames), []
        for s in range(views):
            for k in range(frames):
                every.append(int(s * tick / views + tick * k))
        every.sort()
        for view in range(views):
            assert sampling.tsn_padded_view(n, frames, view, views).tolist() == every[view::views]


def test_by_time_of_a_constant_rate_is_strided():
    times = np.arange(100) / 30
    got = sampling.by_time(times, 8, 10.0, 1, Fixed(0))
    assert got.tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    middle = sampling.by_time(times, 8, 10.0, 1)
    assert np.diff(middle).tolist() == [3] * 7 and abs(middle[0] - 38) <= 1


def test_by_time_takes_the_nearest_shown_frame():
    times = np.array([0.0, 0.1, 0.2, 1.0, 1.1, 2.0])
    got = sampling.by_time(times, 5, 2.0, 1, Fixed(0))  # 0 0.5 1 1.5 2
    assert got.tolist() == [0, 2, 3, 4, 5]
    assert sampling.by_time(times, 8, 2.0, 1).tolist() == [0, 2, 3, 4, 5, 5, 5, 5]
    assert sampling.by_time([3.0], 4, 2.0, 1).tolist() == [0, 0, 0, 0]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="stride must be at least 1; got stride=0"):
        sampling.dense(10, 4, 0, Fixed())
    with pytest.raises(ValueError, match="n must be at least 1; got n=0"):
        sampling.segments(0, 4)
    with pytest.raises(ValueError, match=r"view must be in \[0, 3\); got view=3"):
        sampling.dense_view(10, 4, 1, 3, 3)
    with pytest.raises(ValueError, match="fps must be above 0"):
        sampling.by_time([0.0, 1.0], 4, 0.0, 1)


# Plain loops and invariances ----------------------------------------------------------------------

RULES = {
    "dense": lambda n, t, s, rng: sampling.dense(n, t, s, rng),
    "dense_view": lambda n, t, s, rng: sampling.dense_view(n, t, s, 1, 3),
    "window": lambda n, t, s, rng: sampling.window(n, t, s, rng),
    "window_middle": lambda n, t, s, rng: sampling.window(n, t, s),
    "segments": lambda n, t, s, rng: sampling.segments(n, t, rng),
    "segments_middle": lambda n, t, s, rng: sampling.segments(n, t),
    "tsn": lambda n, t, s, rng: sampling.tsn_segments(n, t, rng),
    "tsn_view": lambda n, t, s, rng: sampling.tsn_view(n, t, 1),
    "tsn_padded": lambda n, t, s, rng: sampling.tsn_padded(n, t, rng),
    "tsn_padded_view": lambda n, t, s, rng: sampling.tsn_padded_view(n, t, 2, 5),
    "inclusive": lambda n, t, s, rng: sampling.segments_inclusive(n, t, rng),
    "inclusive_view": lambda n, t, s, rng: sampling.segments_inclusive_view(n, t, 1, 3),
    "rand": lambda n, t, s, rng: sampling.rand(n, t, rng),
    "middle": lambda n, t, s, rng: sampling.middle(n, t),
    "by_time": lambda n, t, s, rng: sampling.by_time(np.arange(n) / 24, t, 8.0, s, rng),
}


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(sorted(RULES)),
    n=st.integers(1, 400),
    frames=st.integers(1, 40),
    stride=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_every_rule_gives_t_frames_of_the_video_in_order(rule, n, frames, stride, seed):
    got = RULES[rule](n, frames, stride, np.random.default_rng(seed))
    assert got.shape == (frames,) and got.dtype == np.int64
    assert got.min() >= 0 and got.max() < n and np.all(np.diff(got) >= 0)
    again = RULES[rule](n, frames, stride, np.random.default_rng(seed))
    np.testing.assert_array_equal(got, again)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), frames=st.integers(1, 20), seed=st.integers(0, 20))
def test_segments_equals_a_plain_loop(n, frames, seed):
    """Frame k lies in part k, parts are a partition, and every frame of the part can come."""
    got = sampling.segments(n, frames, np.random.default_rng(seed))
    for k, index in enumerate(got):
        part = [i for i in range(n) if k * n <= i * frames < (k + 1) * n]
        if n >= frames:
            assert index in part
        else:
            assert index == (2 * k + 1) * n // (2 * frames)


def test_segments_reach_every_frame():
    seen = {int(i) for s in range(400) for i in sampling.segments(21, 4, np.random.default_rng(s))}
    assert seen == set(range(21))
    dense = {int(sampling.dense(40, 4, 4, np.random.default_rng(s))[0]) for s in range(400)}
    assert dense == set(range(25))  # offsets 0 to 40 - 16


# The published code's examples --------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(shared):
    """(group, example, its rule) of every published example."""
    groups = json.loads((shared / "golden/f_data_functions.json").read_text())
    return [
        (name, e, golden_data.rule_of(name, e))
        for name, group in groups.items()
        for e in group["examples"]
    ]


def test_published_examples(examples, shared, capsys):
    assert golden.main([str(shared / "golden/f_data_functions.json")]) == 0
    equal = [rule for _, _, rule in examples if not rule.reason]
    differ = [rule for _, _, rule in examples if rule.reason]
    assert (len(examples), len(equal), len(differ)) == (2249, 1503, 746)
    said = capsys.readouterr().out
    assert all(rule.reason in said for rule in differ)


def test_examples_that_differ_on_purpose_do_differ(examples):
    """Each reason is true of the published numbers."""
    of = lambda word, group: [
        e for name, e, rule in examples if word in rule.reason and group in name
    ]
    window = of("defect 5", "kinetics") + of("draws a window", "kinetics")
    ours = [golden_data.fine_tuning_dense(e).tolist() for e in window]
    assert len(window) == 58 and sum(o != e["frame_ids"] for o, e in zip(ours, window)) == 54
    assert any(min(e["frame_ids"]) < 0 for e in window)
    early = of("defect 4", "mae_multi")
    assert len(early) == 210 and sum(min(e["frame_ids"]) < 0 for e in early) > 100
    assert all(e["frame_ids"][0] == golden_data.pretraining(e)[0] - 1 for e in early)
    assert all("error" in e for e in of("loader raises", ""))
    for e in of("hides nothing", "masks"):
        with pytest.raises(UserError):
            golden_data.drawn_mask(e)
    assert sum(max(e["frame_ids"]) >= e["vlen"] for e in of("fix_start", "")) == 31


def test_a_group_that_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="no rule knows the group 'other'"):
        golden_data.rule_of("other", {})
