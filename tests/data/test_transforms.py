"""Clips: what the specification asks for, the same for all frames, nothing but the generator decides."""

import dataclasses
import math
import pathlib
import sys

import av
import numpy as np
import pytest

from invideo_jax.data import augment, transforms
from invideo_jax.data.decode import BadVideo
from invideo_jax.data.transforms import ClipSpec, load_clip, multi_scale_box, random_resized_box

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import video_files as files  # noqa: E402

av.logging.set_level(None)
POLICY = "rand-m7-n4-mstd0.5-inc1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def video(folder):
    return files.write_kind(folder, "h264.mp4")


def spec_of(**changes) -> ClipSpec:
    return ClipSpec(**{"frames": 8, "size": 32, "stride": 2, **changes})


# Clips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling": "segments", "crop": "center", "flip": 0.0},
        {
            "sampling": "segments_inclusive",
            "crop": "random_resized",
            "randaugment": POLICY,
            "erase": 1.0,
        },
        {"sampling": "rand", "crop": "resize", "interpolation": "bicubic"},
        {"sampling": "tsn", "crop": "three_crop", "crop_index": 2, "views": 2, "view": 1},
        {"sampling": "tsn_padded", "views": 5, "view": 4},
        {"sampling": "tsn_padded"},
        {"fps": 10.0, "stride": 1},
    ],
)
def test_equal_generator_gives_equal_bytes(video, changes):
    spec = spec_of(**changes)
    clip, info = load_clip(video, spec, np.random.default_rng(5))
    again, same = load_clip(pathlib.Path(video).read_bytes(), spec, np.random.default_rng(5))
    assert clip.shape == (8, 32, 32, 3) and clip.dtype == np.uint8 and clip.flags.c_contiguous
    np.testing.assert_array_equal(clip, again)
    assert info == same and len(info.indices) == 8 and not info.fallback
    if not spec.views and spec.crop != "center":
        others = [load_clip(video, spec, np.random.default_rng(s))[0] for s in range(3)]
        assert any(not np.array_equal(clip, other) for other in others)


def test_a_clip_is_the_box_of_the_frames_it_names(folder):
    """Independent of the decoder: a crop of the size of the clip is cut, not scaled."""
    images = [files.picture(i, 96, 64) for i in range(20)]
    path = str(folder / "exact.mkv")
    files.write(path, frames=20, codec="ffv1", pix_fmt="bgra", images=images)
    spec = ClipSpec(4, 64, sampling="segments", crop="multi_scale", scales=(1.0,), flip=0.5)
    flips = set()
    for seed in range(12):
        clip, info = load_clip(path, spec, np.random.default_rng(seed))
        x, y, w, h = info.box
        wanted = np.array([images[i][y : y + h, x : x + w] for i in info.indices])
        np.testing.assert_array_equal(clip, wanted[:, :, ::-1] if info.flipped else wanted)
        flips.add(info.flipped)
    assert flips == {False, True}


def test_flip_not_allowed_changes_nothing_else(video):
    spec = spec_of(flip=1.0, erase=1.0)
    a, plain = load_clip(video, spec, np.random.default_rng(1), flip_ok=False)
    b, flipped = load_clip(video, spec, np.random.default_rng(1))
    assert (plain.flipped, flipped.flipped) == (False, True)
    assert dataclasses.replace(flipped, flipped=False) == plain
    whole = dataclasses.replace(spec, erase=0.0)
    plain_a, _ = load_clip(video, whole, np.random.default_rng(1), flip_ok=False)
    plain_b, _ = load_clip(video, whole, np.random.default_rng(1))
    np.testing.assert_array_equal(plain_a, plain_b[:, :, ::-1])
    box_a, box_b = ((x != y).any((0, 3)) for x, y in ((a, plain_a), (b, plain_b)))
    np.testing.assert_array_equal(box_a, box_b)  # the erased box stays in its place
    assert 0 < box_a.mean() < 0.5


def test_short_video_is_padded_and_says_so(folder):
    path = files.write_kind(folder, "one_frame.mp4")
    for sampling in transforms.SAMPLINGS:
        clip, info = load_clip(path, spec_of(sampling=sampling), np.random.default_rng(0))
        assert info.indices == (0,) * 8 and info.padded == 7
        assert (clip == clip[:1]).all()
    _, info = load_clip(
        files.write_kind(folder, "two_frames.mkv"),
        spec_of(sampling="middle"),
        np.random.default_rng(0),
    )
    assert info.indices == (0, 1, 1, 1, 1, 1, 1, 1) and info.padded == 6


def test_part_of_a_video(video):
    spec = spec_of(sampling="segments", views=1)
    _, info = load_clip(video, spec, np.random.default_rng(0), start=0.8, end=1.2)
    assert info.times[0] >= 0.8 and info.times[-1] < 1.2 and info.indices[-1] < 10
    with pytest.raises(BadVideo, match="no_frames"):
        load_clip(video, spec, np.random.default_rng(0), start=7)


def test_variable_rate_is_sampled_by_time(folder):
    """At 5 per second, the shown frames nearest to every 0.2 s, though the file's frames are 20 to 500 ms apart."""
    path = files.write_kind(folder, "variable_rate.mp4")
    spec = spec_of(fps=5.0, stride=1, views=1)
    _, info = load_clip(path, spec, np.random.default_rng(0))
    gaps = np.diff(info.times)
    assert abs(gaps.mean() - 0.2) < 0.06 and len(set(np.diff(info.indices))) > 1
    wanted = np.array(info.times[0]) + 0.2 * np.arange(8)
    assert np.abs(np.array(info.times) - wanted).max() <= 0.5


def test_turned_video_has_an_upright_box(folder):
    _, info = load_clip(
        files.write_kind(folder, "turned_90.mp4"),
        spec_of(crop="three_crop", crop_index=2),
        np.random.default_rng(0),
    )
    assert info.box == (0, 32, 64, 64)  # 64 x 96 upright: crops go along the height


def test_cut_file_is_said(folder):
    data = pathlib.Path(files.write_kind(folder, "h264.mkv")).read_bytes()
    _, info = load_clip(data[: int(0.6 * len(data))], spec_of(), np.random.default_rng(0))
    assert info.truncated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames must be a whole number above 0; got frames=0"),
        ({"size": 22.5}, "size must be a whole number above 0; got size=22.5"),
        (
            {"sampling": "denze"},
            "sampling must be one of dense.*got sampling='denze'. Did you mean \"dense\"",
        ),
        ({"crop": "multiscale"}, 'crop must be one of .*Did you mean "multi_scale"'),
        ({"interpolation": "nearest"}, "interpolation must be one of bilinear, bicubic"),
        ({"flip": 1.5}, "flip must be a probability; got flip=1.5"),
        (
            {"sampling": "segments", "fps": 8.0},
            "fps must be 0, or a rate with sampling='dense'; got fps=8.0",
        ),
        ({"sampling": "rand", "views": 1}, "views must be 0 with sampling='rand'; got views=1"),
        ({"sampling": "tsn", "views": 3}, "views must be 0 to 2 with sampling='tsn'; got views=3"),
        ({"views": 4, "view": 4}, r"view must be in \[0, 4\); got view=4"),
        ({"crop_index": 3}, "crop_index must be 0, 1 or 2"),
        ({"scales": ()}, "scales must be shares"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale must be .low, high. with 0 < low <= high <= 1"),
        ({"crop_ratio": (0, 1)}, "crop_ratio must be"),
        ({"randaugment": "auto"}, "randaugment must look like 'rand-m7-n4-mstd0.5-inc1'"),
        ({"randaugment": "rand-m7-n4"}, "only the increasing set"),
        ({"randaugment": "rand-m17-n4-inc1"}, "m of 0 to 10"),
    ],
)
def test_wrong_specification(changes, message):
    with pytest.raises(ValueError, match=message):
        spec_of(**changes)


def test_lists_of_a_config_are_taken():
    assert spec_of(scales=[1.0, 0.5]) == spec_of(scales=(1.0, 0.5))
    hash(spec_of(scales=[1.0]))


# Boxes --------------------------------------------------------------------------------------------


def test_multi_scale_boxes_are_the_published_set():
    """Sides from the shares, at most one step apart; 13 places; all of them come."""
    width, height, size = 340, 256, 224
    sides = [256, 224, 192, 168]
    seen = {
        multi_scale_box(width, height, size, (1, 0.875, 0.75, 0.66), np.random.default_rng(s))
        for s in range(4000)
    }
    wanted = set()
    for i, h in enumerate(sides):
        for w in sides[max(0, i - 1) : i + 2]:
            dx, dy = (width - w) // 4, (height - h) // 4
            places = [(a, b) for a in (0, 2, 4) for b in (0, 2, 4)] + [
                (1, 1),
                (3, 1),
                (1, 3),
                (3, 3),
            ]
            wanted |= {(a * dx, b * dy, w, h) for a, b in places}
    assert seen == wanted


def test_multi_scale_side_near_the_size_is_not_resized():
    box = multi_scale_box(300, 226, 224, (1.0,), np.random.default_rng(0))
    assert box[2:] == (224, 224)
    x, y, w, h = multi_scale_box(300, 223, 224, (1.0,), np.random.default_rng(0))
    assert (w, h) == (223, 223) and y == 0 <= x


def test_random_resized_boxes():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [random_resized_box(340, 256, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(3000)]
    )
    x, y, w, h = boxes.T
    assert (x >= 0).all() and (y >= 0).all() and (x + w <= 340).all() and (y + h <= 256).all()
    share, ratio = w * h / (340 * 256), w / h
    assert share.min() >= 0.079 and ratio.min() > 0.74 and ratio.max() < 1.35
    square = [random_resized_box(256, 256, (0.08, 0.5), (3 / 4, 4 / 3), rng) for _ in range(3000)]
    assert abs(np.mean([math.log(b[2] / b[3]) for b in square])) < 0.02  # as often wide as high
    assert share.min() < 0.1 and share.max() > 0.9


def test_random_resized_that_never_fits_takes_the_middle():
    assert random_resized_box(1000, 10, (0.9, 1.0), (0.9, 1.1), np.random.default_rng(0)) == (
        494,
        0,
        11,
        10,
    )


def test_centre_and_three_crops():
    rng = np.random.default_rng(0)
    box = lambda w, h, **kw: transforms.pick_box(spec_of(**kw), w, h, rng)
    assert box(100, 60, crop="center") == (20, 0, 60, 60)
    assert [box(100, 60, crop="three_crop", crop_index=i)[0] for i in range(3)] == [0, 20, 40]
    assert [box(60, 100, crop="three_crop", crop_index=i)[1] for i in range(3)] == [0, 20, 40]
    assert box(100, 60, crop="resize") == (0, 0, 100, 60)


# RandAugment --------------------------------------------------------------------------------------


def sample_clip(frames=2, height=40, width=56, seed=0):
    rng = np.random.default_rng(seed)
    smooth = np.stack([files.picture(i, width, height) for i in range(frames)]).astype(int)
    return (smooth + rng.integers(-9, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


def pillow(name, image, level, sign):
    """The operation in Pillow's own functions: the oracle."""
    image_ops = pytest.importorskip("PIL.ImageOps")
    from PIL import Image, ImageEnhance

    picture, size = Image.fromarray(image), image.shape[1::-1]
    factor = max(0.1, 1 + sign * 0.9 * level)
    move = lambda m: picture.transform(
        size, Image.Transform.AFFINE, m, resample=Image.Resampling.BILINEAR, fillcolor=(128,) * 3
    )
    operations = {
        "auto_contrast": lambda: image_ops.autocontrast(picture),
        "equalize": lambda: image_ops.equalize(picture),
        "invert": lambda: image_ops.invert(picture),
        "rotate": lambda: picture.rotate(
            sign * level * 30, resample=Image.Resampling.BILINEAR, fillcolor=(128,) * 3
        ),
        "posterize": lambda: image_ops.posterize(picture, 4 - int(level * 4)),
        "solarize": lambda: image_ops.solarize(picture, 256 - int(level * 256)),
        "solarize_add": lambda: picture.point(
            [min(255, i + int(level * 110)) if i < 128 else i for i in range(256)] * 3
        ),
        "color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "shear_x": lambda: move((1, sign * level * 0.3, 0, 0, 1, 0)),
        "shear_y": lambda: move((1, 0, 0, sign * level * 0.3, 1, 0)),
        "translate_x": lambda: move((1, 0, sign * level * 0.45 * size[0], 0, 1, 0)),
        "translate_y": lambda: move((1, 0, 0, 0, 1, sign * level * 0.45 * size[1])),
    }
    return np.asarray(operations[name]())


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_equal_pillow(name):
    clip = sample_clip()
    top = 0.9 if name == "posterize" else 1.0  # Pillow refuses to keep 0 bits
    for level, sign in ((0.3, 1.0), (0.7, -1.0), (top, 1.0)):
        got = augment.OPERATIONS[name](clip, level, sign).astype(int)
        assert got.shape == clip.shape
        for frame, out in zip(clip, got):
            difference = np.abs(out - pillow(name, frame, level, sign))
            geometric = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
            # One grey level of rounding; at the rim of a moved picture, whether a pixel is inside.
            assert np.mean(difference > 1) < (0.02 if geometric else 1e-9), (name, level, sign)


def test_operations_closed_forms():
    clip = np.array([0, 100, 127, 128, 200, 255], np.uint8).reshape(1, 1, 6, 1) * np.ones(
        (1, 1, 1, 3), np.uint8
    )
    flat = lambda name, level, sign=1.0: augment.OPERATIONS[name](clip, level, sign)[
        0, 0, :, 0
    ].tolist()
    assert flat("invert", 0) == [255, 155, 128, 127, 55, 0]
    assert flat("posterize", 0) == [0, 96, 112, 128, 192, 240]
    assert flat("posterize", 1) == [0] * 6
    assert flat("solarize", 0.5) == [0, 100, 127, 127, 55, 0]
    assert flat("solarize_add", 1) == [110, 210, 237, 128, 200, 255]
    assert flat("brightness", 1, -1.0) == [0, 10, 12, 12, 20, 25]
    moved = augment.warp(clip, (1, 0, 2, 0, 1, 0))[0, 0, :, 0].tolist()
    assert moved == [127, 128, 200, 255, 128, 128]  # two pixels from the right, grey behind them


def test_augmentation_is_the_same_for_all_frames():
    clip = np.repeat(sample_clip(1), 3, axis=0)
    changed = 0
    for seed in range(20):
        out = augment.rand_augment(clip, augment.parse_policy(POLICY), np.random.default_rng(seed))
        assert (out == out[:1]).all() and out.dtype == np.uint8
        changed += not np.array_equal(out, clip)
    assert changed >= 17  # 4 operations, each carried out every second time: unchanged in 1 of 16


def test_magnitude_zero_of_the_enhancements_does_nothing():
    clip = sample_clip()
    for name in (
        "color",
        "contrast",
        "brightness",
        "sharpness",
        "rotate",
        "shear_x",
        "translate_y",
        "solarize",
    ):
        assert np.abs(augment.OPERATIONS[name](clip, 0.0, 1.0).astype(int) - clip).max() <= 1, name


def test_policy():
    assert augment.parse_policy(POLICY) == augment.Policy(7.0, 4, 0.5)
    assert augment.parse_policy("rand-m9-n2-inc1") == augment.Policy(9.0, 2, 0.0)


def test_random_erasing():
    clip = np.full((4, 48, 64, 3), 7, np.uint8)
    shares = []
    for seed in range(60):
        out = augment.random_erase(clip, 1.0, np.random.default_rng(seed))
        hit = (out != 7).any((0, 3))
        rows, columns = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
        box = out[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box != 7).any(-1).mean() > 0.98  # one box, the same in all frames
        assert not np.array_equal(box[0], box[1])  # filled with noise of each frame
        shares.append(hit.mean())
    assert min(shares) > 0.015 and max(shares) < 0.36 and (clip == 7).all()
    noise = augment.random_erase(np.zeros((64, 64, 64, 3), np.uint8), 1.0, np.random.default_rng(2))
    erased = noise[(noise != 0).all(-1)].astype(float)
    assert np.abs(erased.mean(0) - [123.7, 116.3, 103.5]).max() < 6
    assert (augment.random_erase(clip, 0.0, np.random.default_rng(0)) == clip).all()
    kept = sum(
        augment.random_erase(clip, 0.25, np.random.default_rng(s)) is clip for s in range(200)
    )
    assert math.isclose(kept / 200, 0.75, abs_tol=0.1)
