"""Batches with texts, sound and images: what stands in them, whatever is absent, and the same for every start."""

import dataclasses
import json
from fractions import Fraction

import av
import numpy as np
import pytest
import sound_files
from small_videos import write_video

from invideo_jax.data.alternating import Alternating, by_media
from invideo_jax.data.audio import AudioSpec
from invideo_jax.data.bad import NoReplacement
from invideo_jax.data.captions import CaptionRule
from invideo_jax.data.images import load_image
from invideo_jax.data.modalities import Modalities, TextSpec
from invideo_jax.data.open_video import BadVideo, Limits
from invideo_jax.data.order import Turns, dealt, pick, unpick
from invideo_jax.data.pipeline import Loader
from invideo_jax.data.sources import Source, SourceError, open_source
from invideo_jax.data.transforms import ClipSpec
from invideo_jax.errors import UserError

CLIP = ClipSpec(frames=4, size=16, sampling="middle", crop="resize", flip=0.0)
RULES = (("video", CaptionRule("video")), ("speech", CaptionRule("speech")))
BOTH = Modalities(TextSpec("bytes", 12, RULES), AudioSpec(seconds=1.0, mels=16))


def picture(path, colour=(200, 30, 30), kind="mjpeg", size=(48, 32)):
    """Writes one image; returns its path."""
    codec, pixels = {"mjpeg": ("mjpeg", "yuvj444p"), "png": ("png", "rgb24")}[kind]
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = *size, pixels
    context.time_base = Fraction(1, 25)
    array = np.full((size[1], size[0], 3), colour, np.uint8)
    array[:, size[0] // 2 :] = 255 - array[:, size[0] // 2 :]
    frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pixels)
    path.write_bytes(b"".join(bytes(p) for p in [*context.encode(frame), *context.encode(None)]))
    return str(path)


def manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(path))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three lists: videos with and without sound and words, images, sounds."""
    folder = tmp_path_factory.mktemp("mixed")
    tone = sound_files.tone(2.0, 440.0, 16000)
    sound_files.write_sound_file(str(folder / "heard.mov"), tone)
    sound_files.write_sound_file(str(folder / "alone.wav"), tone, seconds=0)
    write_video(folder / "mute.mp4")
    picture(folder / "red.jpg")
    spoken = [[0.0, 0.4, "one"], [1.8, 2.0, "two"]]
    rows = [
        {"path": "heard.mov", "captions": ["red", "rot"], "speech": spoken},
        {"path": "mute.mp4", "captions": []},
    ]
    return (
        manifest(folder / "videos.jsonl", rows),
        manifest(folder / "images.jsonl", [{"path": "red.jpg", "captions": "a red half"}] * 2),
        manifest(folder / "sounds.jsonl", [{"path": "alone.wav", "audio_captions": "hum"}] * 2),
    )


def read(sources, *, steps=1, **options):
    options = dict(clip=CLIP, batch_size=2, seed=3, stage="s", threads=0, steps=steps) | options
    with Loader(sources, **dict(modalities=BOTH) | options) as batches:
        return [arrays for arrays, _ in batches]


def test_a_row_holds_what_its_example_has_and_nothing_in_the_place_of_what_it_has_not(mixed):
    (batch,) = read([mixed[0]], train=False)
    tokenizer = BOTH.text.open()
    assert tokenizer.decode(batch["text_video"][0]) == "red"  # the first in an evaluation
    assert tokenizer.decode(batch["text_speech"][0]) == "one two"
    assert batch["text_video_valid"].sum(1).tolist() == [5, 0]
    assert batch["text_speech_valid"].sum(1).tolist() == [9, 0]
    assert batch["audio_frames"].tolist() == [98, 0]
    assert np.abs(batch["audio"][0]).min(axis=1).all() and not batch["audio"][1].any()
    assert batch["example"].tolist() == [0, 1] and batch["has_video"].all()
    assert batch["video"].shape == (2, 4, 16, 16, 3)


def test_speech_is_what_is_said_while_the_frames_are_shown(mixed):
    early = ClipSpec(
        frames=4, size=16, sampling="dense", stride=1, crop="resize", flip=0.0, views=2
    )
    (batch,) = read([mixed[0]], train=False, clip=early)
    assert BOTH.text.open().decode(batch["text_speech"][0]) == "one"


def test_training_draws_texts_from_the_position_alone(mixed):
    batches = read([mixed[0]], steps=40)
    texts = {BOTH.text.open().decode(row) for b in batches for row in b["text_video"]}
    assert texts == {"red", "rot", ""}
    again = read([mixed[0]], steps=3, start_step=37)
    for one, other in zip(batches[37:], again):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_number_of_an_example_goes_on_over_the_sources(mixed):
    batches = read([mixed[0], mixed[0]], train=False, steps=2)
    assert [b["example"].tolist() for b in batches] == [[0, 1], [2, 3]]


def test_images_are_clips_of_one_frame_and_sounds_have_no_picture(mixed):
    (image,) = read([mixed[1]], train=False)
    assert image["video"].shape == (2, 1, 16, 16, 3)
    assert np.allclose(image["video"][0, 0, 8, 2], (200, 30, 30), atol=6)
    assert image["audio_frames"].tolist() == [0, 0] and image["has_video"].all()
    (sound,) = read([mixed[2]], train=False)
    assert not sound["has_video"].any() and not sound["video"].any() and sound["valid"].all()
    assert sound["audio_frames"].tolist() == [98, 98]


def test_a_batch_is_of_one_kind_of_media(mixed):
    with pytest.raises(
        SourceError, match="of videos, of pictures or of sounds; got .*images.jsonl"
    ):
        read(mixed, train=False)


def test_mixed_files_in_one_list_are_refused(tmp_path):
    picture(tmp_path / "a.jpg")
    write_video(tmp_path / "b.mp4")
    with pytest.raises(SourceError, match=r"of one kind; .*image \(a.jpg\), video \(b.mp4\)"):
        manifest(tmp_path / "all.jsonl", [{"path": "a.jpg"}, {"path": "b.mp4"}])


def alternating(sources, weights, **span):
    groups = by_media(sources, weights)

    def make(turns, start, steps):
        options = dict(clip=CLIP, batch_size=2, seed=3, stage="s", threads=0, modalities=BOTH)
        group = groups[turns.number]
        options |= dict(turns=turns, numbers=group.numbers, firsts=group.firsts)
        return Loader(group.sources, group.weights, **options, start_step=start, steps=steps)

    return Alternating(make, [sum(group.weights) for group in groups], **span)


def test_batches_of_several_media_come_in_proportion_and_go_on_anywhere(mixed):
    with alternating(mixed, (2, 1, 1), start_step=0, steps=12) as batches:
        whole = [arrays for arrays, _ in batches]
    kinds = [(b["video"].shape[1], bool(b["has_video"][0])) for b in whole]
    assert (kinds.count((4, True)), kinds.count((1, True)), kinds.count((1, False))) == (6, 3, 3)
    with alternating(mixed, (2, 1, 1), start_step=7, steps=5) as batches:
        for one, (other, _) in zip(whole[7:], batches, strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in one)


def test_media_share_no_position_and_no_number_of_an_example(mixed):
    with alternating(mixed, (2, 1, 1), start_step=0, steps=8) as batches:
        loaders, whole = batches._loaders, [arrays for arrays, _ in batches]
    assert np.array_equal([b["position"] for b in whole], np.arange(16).reshape(8, 2))
    named = [set(b["example"].tolist()) for b in whole]
    kinds = [(b["video"].shape[1], bool(b["has_video"][0])) for b in whole]
    for kind, numbers in (((4, True), {0, 1}), ((1, True), {2, 3}), ((1, False), {4, 5})):
        assert {n for k, its in zip(kinds, named) if k == kind for n in its} == numbers
    # Each kind is shuffled in its own way, though all lists are of the same length.
    orders = [[loader.load.order[i].record for i in range(100)] for loader in loaders.values()]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_examples_are_numbered_within_each_source_where_that_is_asked_for(mixed):
    (batch,) = read([mixed[0], mixed[0]], train=False, batch_size=4)
    assert batch["example"].tolist() == [0, 1, 2, 3]
    within = dataclasses.replace(BOTH, example="corpus")
    (batch,) = read([mixed[0], mixed[0]], train=False, batch_size=4, modalities=within)
    assert batch["example"].tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match="positives must be one of global, corpus; got .*'row'"):
        Modalities(example="row")


def test_sounds_without_a_place_in_the_batch_are_refused(mixed):
    for modalities in (None, Modalities(BOTH.text)):
        with pytest.raises(
            SourceError, match="got .*sounds.jsonl, whose pictures would all be black"
        ):
            read([mixed[2]], modalities=modalities)


def test_all_loaders_together_hold_at_most_2_to_the_32_positions(mixed):
    options = dict(clip=CLIP, batch_size=2, seed=3, stage="s", modalities=BOTH, steps=2)
    for parts, number, most in (((1,), 0, 2**31), ((1, 1), 1, 2**30), ((3, 1), 0, 3 * 2**29)):
        its = options | dict(turns=Turns(number, parts))
        last = Loader([mixed[0]], **its, start_step=most - 2)
        assert last.load._in_stage(2 * most - 1) < 2**32 <= last.load._in_stage(2 * most)
        with pytest.raises(ValueError, match="at most 2\\^32 examples"):
            Loader([mixed[0]], **its, start_step=most - 1)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_of_one_loader_closes_all(mixed, tmp_path, workers):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    bad = manifest(tmp_path / "bad.jsonl", [{"path": "bad.jpg"}] * 2)
    made = []

    def make(turns, start, steps):
        options = dict(clip=CLIP, batch_size=2, seed=3, stage="s", workers=workers, steps=steps)
        made.append(Loader([(mixed[0], bad)[turns.number]], **options, start_step=start))
        return made[-1]

    with (
        pytest.raises(NoReplacement, match="all 2 tried"),
        Alternating(make, (1, 1), start_step=0, steps=100) as batches,
    ):
        list(batches)
    for loader in made:
        assert not loader._thread.is_alive()
        with pytest.raises((RuntimeError, NoReplacement)):
            next(loader)


def test_texts_are_read_without_the_video(tmp_path):
    write_video(tmp_path / "a.mp4")
    said = [[0.0, 0.4, "one"], [1.8, 2.0, "two"]]
    source = manifest(tmp_path / "a.jsonl", [{"path": "a.mp4", "captions": "red", "speech": said}])
    found = source.texts(0)
    assert found == Source.texts(source, 0)  # what the example says
    assert found["captions"] == ("red",) and found["transcript"] == "one two"
    (tmp_path / "a.mp4").unlink()
    assert source.texts(0) == found
    with pytest.raises(BadVideo):
        source[0]


@pytest.mark.parametrize("parts", [(7, 3), (1, 1, 1), (5, 2, 9, 1), (1,)])
def test_dealt_counts_what_pick_gives(parts):
    counts = [0] * len(parts)
    for position in range(100):
        assert dealt(position, parts) == counts
        source, turn = pick(position, parts)
        assert unpick(source, turn, parts) == position
        assert turn == counts[source]
        counts[source] += 1


@pytest.mark.parametrize("kind", ["mjpeg", "png"])
def test_an_image_is_cut_and_mirrored_like_a_frame(tmp_path, kind):
    path = picture(tmp_path / "any.name", kind=kind)
    half = ClipSpec(frames=8, size=32, crop="center", flip=1.0)
    image, info = load_image(path, half, np.random.default_rng(0))
    assert image.shape == (1, 32, 32, 3) and info.box == (8, 0, 32, 32) and info.flipped
    assert np.allclose(image[0, 16, 28], (200, 30, 30), atol=6)
    assert np.allclose(image[0, 16, 4], (55, 225, 225), atol=6)
    image, info = load_image(path, half, np.random.default_rng(0), flip_ok=False)
    assert not info.flipped and np.allclose(image[0, 16, 4], (200, 30, 30), atol=6)


def test_bad_images_say_what_is_wrong(tmp_path):
    good = picture(tmp_path / "good.jpg", size=(64, 64))
    data = open(good, "rb").read()
    cases = {
        "empty": b"",
        "not_video": b"#EXTM3U\nfile:///etc/hostname",
        "corrupt_frame": data[:300],
    }
    for reason, content in cases.items():
        with pytest.raises(BadVideo) as caught:
            load_image(content, CLIP, np.random.default_rng(0))
        assert caught.value.reason == reason
    for path, limits, reason in (
        (good, Limits(max_pixels=4095), "too_large"),
        ("none", None, "missing"),
    ):
        with pytest.raises(BadVideo) as caught:
            load_image(path, CLIP, np.random.default_rng(0), limits=limits)
        assert caught.value.reason == reason
