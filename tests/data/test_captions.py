"""Which text of an example is used: rules, chance from the example's own draws, and how it is written."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invideo_jax.data.captions import (
    KEYS,
    KINDS,
    CaptionRule,
    all_texts,
    choose,
    normalise_caption,
    parse_rule,
    texts_of,
)
from invideo_jax.data.sources.base import make_example
from invideo_jax.errors import UserError

FULL = make_example(
    id="x",
    captions=("v0", "v1", "v2"),
    audio_captions=("a0", "a1"),
    audio_video_captions=("b0",),
    fused_captions=("f0",),
    transcript="s0",
)
BARE = make_example(id="y", captions=("v0",))


def drawn(example, rule, count=600, **options):
    return collections.Counter(
        choose(example, rule, np.random.default_rng([3, n]), **options) for n in range(count)
    )


def test_texts_by_kind():
    assert texts_of(FULL) == {
        "video": ("v0", "v1", "v2"),
        "audio": ("a0", "a1"),
        "audio_video": ("b0",),
        "fused": ("f0",),
        "speech": ("s0",),
    }
    assert texts_of(make_example(id="z", captions=("", " ", "x"))) == dict.fromkeys(KINDS, ()) | {
        "video": ("x",)
    }
    assert set(KEYS.values()) <= FULL.keys()


@pytest.mark.parametrize(
    "rule,groups",
    [
        ("video", (("video",),)),
        ("fused|video", (("fused",), ("video",))),
        ("video+audio", (("video", "audio"),)),
        (" fused | video + audio |speech", (("fused",), ("video", "audio"), ("speech",))),
    ],
)
def test_rules_are_read(rule, groups):
    assert parse_rule(rule) == groups


@pytest.mark.parametrize(
    "rule,words",
    [
        ("vidio", 'Unknown kind of text "vidio".*Did you mean "video"'),
        ("", "with an empty part"),
        ("video|", "with an empty part"),
        ("video++audio", "with an empty part"),
        ("video|audio+video", "must stand once.*video twice"),
        ("captions", 'Unknown kind of text "captions".*Known: audio, audio_video, fused'),
    ],
)
def test_wrong_rules_say_what_is_wrong(rule, words):
    with pytest.raises(UserError, match=words):
        choose(FULL, rule)


def test_the_first_kind_there_is():
    assert choose(FULL, "fused|video") == "f0"
    assert choose(BARE, "fused|video") == "v0"
    assert choose(BARE, "fused|audio|speech") == ""
    assert choose(make_example(id="z"), "video+audio|speech") == ""


def test_several_captions_one_at_random_in_training_and_the_asked_one_in_evaluation():
    counts = drawn(FULL, "video")
    assert counts.keys() == {"v0", "v1", "v2"} and min(counts.values()) > 150
    assert [choose(FULL, "video", index=i) for i in range(4)] == ["v0", "v1", "v2", ""]
    assert all_texts(FULL, "video") == ("v0", "v1", "v2")


def test_a_joined_rule_draws_the_kind_first_then_the_text():
    counts = drawn(FULL, "video+fused", 1200)
    assert abs(counts["f0"] - 600) < 90, "half of all, though video has three texts"
    assert counts.keys() == {"f0", "v0", "v1", "v2"}
    assert drawn(BARE, "video+fused", 20) == {"v0": 20}
    assert choose(FULL, "audio+video") == "a0" and all_texts(FULL, "audio+video") == ("a0", "a1")


def test_the_same_draws_give_the_same_text():
    rule = CaptionRule("video+audio", templates=("{}", "see {}"))
    pick = lambda n: choose(FULL, rule, np.random.default_rng([7, n]))
    assert [pick(n) for n in range(50)] == [pick(n) for n in range(50)]
    assert len({pick(n) for n in range(50)}) == 10


@pytest.mark.parametrize(
    "text,wanted",
    [
        ("A Dog, running!", "a dog running"),
        ('it\'s 5-a-side/football: "yes" (no)?', "its 5 a side football yes no"),
        ("<PERSON> waves * ~ # ;", "person waves"),
        ("  two \t spaces\n", "two spaces"),
        ("...", ""),
        ("\u7ea2\u7403 CAF\u00c9", "\u7ea2\u7403 caf\u00e9"),
    ],
)
def test_published_normalisation(text, wanted):
    assert normalise_caption(text) == wanted
    example = make_example(id="x", captions=(text,))
    assert choose(example, CaptionRule(normalise="internvideo2")) == wanted
    assert choose(example, "video") == text


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60))
def test_normalised_text_stays_as_it_is(text):
    once = normalise_caption(text)
    assert not set(once) & set(",.'!?\"()*#:;~-/\n\t") and "  " not in once
    assert normalise_caption(once) == once or "<" in once


def test_short_captions_are_as_good_as_absent():
    example = make_example(id="x", captions=("dog", "a dog", "!! !!"), fused_captions=("bark",))
    rule = CaptionRule("fused|video", min_words=2, normalise="internvideo2")
    assert all_texts(example, rule) == ("a dog",)
    assert drawn(example, rule, 10) == {"a dog": 10}
    assert choose(example, CaptionRule("fused", min_words=2)) == ""


def test_captions_of_a_kind_joined_to_a_paragraph():
    rule = CaptionRule(join=True, min_words=3)
    assert choose(FULL, rule, np.random.default_rng(0)) == "v0 v1 v2"
    assert all_texts(FULL, rule) == ("v0 v1 v2",)


def test_templates():
    rule = CaptionRule(templates=("a video of {}.", "{}, filmed"))
    assert choose(BARE, rule) == "a video of v0."
    assert drawn(BARE, rule).keys() == {"a video of v0.", "v0, filmed"}
    assert choose(make_example(id="z"), rule) == "", "no text: no template either"
    braces = make_example(id="z", captions=("{0} {x} {",))
    assert choose(braces, rule) == "a video of {0} {x} {."
    with pytest.raises(UserError, match="must hold {} once.*got 'a video'"):
        CaptionRule(templates=("a video",))


def test_wrong_options_are_said():
    with pytest.raises(UserError, match='normalise=.internvideo.*Did you mean "internvideo2"'):
        CaptionRule(normalise="internvideo")
    with pytest.raises(UserError, match="min_words must be 0 or more"):
        CaptionRule(min_words=-1)
    with pytest.raises(UserError, match="Unknown kind"):
        CaptionRule("videos")
