"""The filter bank is Kaldi's, and a clip's features lie over its frames."""

import dataclasses
import math

import numpy as np
import pytest
from sound_files import clicks, tone, write_sound_file

from invideo_jax.data.audio import AudioSpec, filter_bank, load_audio, place_window
from invideo_jax.data.decode import VideoReader
from invideo_jax.data.open_video import BadVideo
from invideo_jax.errors import UserError

# The filter bank ----------------------------------------------------------------------------------


def slow_filter_bank(samples, rate: int, mels: int, window: float, shift: float) -> np.ndarray:
    """Kaldi's definition, one number after the other."""
    size, step, padded = round(window * rate), round(shift * rate), 1
    while padded < size:
        padded *= 2

    def mel(hertz):
        return 1127 * math.log(1 + hertz / 700)

    low, width = mel(20), (mel(rate / 2) - mel(20)) / (mels + 1)
    rows, k = [], np.arange(padded // 2)
    turn = np.exp(-2j * np.pi * k[:, None] * np.arange(size) / padded)
    for at in range(0, len(samples) - size + 1, step):
        frame = [float(x) * 32768 for x in samples[at : at + size]]
        mean = sum(frame) / size
        frame = [x - mean for x in frame]
        for i in range(size - 1, 0, -1):
            frame[i] -= 0.97 * frame[i - 1]
        frame[0] -= 0.97 * frame[0]
        for i in range(size):
            frame[i] *= (0.5 - 0.5 * math.cos(2 * math.pi * i / (size - 1))) ** 0.85
        power, row = np.abs(turn @ np.asarray(frame)) ** 2, []
        for band in range(mels):
            left, middle, right = (low + (band + i) * width for i in range(3))
            energy = 0.0
            for bin_, value in enumerate(power):
                m = mel(bin_ * rate / padded)
                if left < m <= middle:
                    energy += value * (m - left) / (middle - left)
                elif middle < m < right:
                    energy += value * (right - m) / (right - middle)
            row.append(math.log(max(energy, 2.0**-23)))
        rows.append(row)
    return np.asarray(rows)


@pytest.mark.parametrize(
    "rate, mels, window, shift",
    [(16000, 64, 0.025, 0.01), (16000, 128, 0.025, 0.01), (8000, 40, 0.032, 0.016)],
)
def test_filter_bank_is_its_definition(rate, mels, window, shift):
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.5, 0.5, rate // 8).astype(np.float32) + np.float32(0.1)
    found = filter_bank(samples, rate=rate, mels=mels, window=window, shift=shift)
    wanted = slow_filter_bank(samples, rate, mels, window, shift)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_filter_bank_gives_kaldis_numbers():
    """Written down from kaldi-native-fbank 1.23.0 with dither 0 and energy floor 0."""
    value, samples = 1, []
    for _ in range(800):
        value = (1103515245 * value + 12345) % 2**31
        samples.append(((value >> 16) - 2**14) / 2**15)
    found = filter_bank(np.asarray(samples, np.float32))
    assert found.shape == (3, 64)
    kaldi = [
        [16.8949, 16.5699, 17.4346, 22.0969, 23.8290, 27.2294],
        [17.0638, 16.8295, 18.0347, 22.5420, 24.8906, 26.8242],
    ]
    np.testing.assert_allclose(found[[0, 2]][:, [0, 1, 7, 20, 40, 63]], kaldi, atol=1e-4)


@pytest.mark.parametrize(
    "samples, frames", [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (160000, 998)]
)
def test_only_whole_windows_are_frames(samples, frames):
    assert filter_bank(np.zeros(samples, np.float32)).shape == (frames, 64)


def test_silence_is_the_floor_and_loudness_adds():
    assert filter_bank(np.zeros(400, np.float32)) == pytest.approx(math.log(2.0**-23))
    sound = np.random.default_rng(0).uniform(-0.4, 0.4, 4000).astype(np.float32)
    np.testing.assert_allclose(filter_bank(2 * sound) - filter_bank(sound), math.log(4), atol=1e-5)


def band_of(hertz: float, mels: int) -> float:
    """Number of the band that has its top at this frequency."""
    low, high = (1127 * math.log(1 + f / 700) for f in (20, 8000))
    return (1127 * math.log(1 + hertz / 700) - low) / ((high - low) / (mels + 1)) - 1


@pytest.mark.parametrize("mels", [64, 128])
@pytest.mark.parametrize("hertz", [300, 1000, 3000, 7000])
def test_a_tone_is_in_its_band(hertz, mels):
    bank = filter_bank(tone(0.5, hertz, 16000)[0], mels=mels)
    assert abs(np.argmax(bank.mean(0)) - band_of(hertz, mels)) < 1.1


def test_dither_is_drawn():
    quiet = np.zeros(8000, np.float32)
    first, again, other = (
        filter_bank(quiet, dither=1.0, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all() and first.min() > math.log(2.0**-23)
    with pytest.raises(UserError, match="dither must be 0 where nothing is drawn; got dither=1.0"):
        filter_bank(quiet, dither=1.0)


# The specification --------------------------------------------------------------------------------


def test_shapes():
    assert AudioSpec().shape == (998, 64) and AudioSpec().frames == 998
    assert AudioSpec(mels=128).shape == (998, 128)
    assert AudioSpec(seconds=1.0, rate=8000, mels=32).shape == (98, 32)


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("seconds", 0, "seconds must be above 0; got seconds=0"),
        ("seconds", 0.01, "seconds must be at least one window of 0.025 s; got seconds=0.01"),
        ("mels", 2.5, "mels must be a whole number; got mels=2.5"),
        ("mels", -1, "mels must be above 0"),
        ("rate", float("nan"), "rate must be above 0; got rate=nan"),
        ("shift", 0.0, "shift must be above 0"),
        ("shift", 1e-5, "shift must be at least one sample"),
        ("low", 8000.0, "low must be from 0 to below half the rate, 8000 Hz; got low=8000"),
        ("dither", -1.0, "dither must be at least 0"),
        ("deviation", 0.0, "deviation must be above 0"),
    ],
)
def test_a_wrong_specification_is_an_error(field, value, text):
    with pytest.raises(UserError, match=text):
        AudioSpec(**{field: value})


# Clips --------------------------------------------------------------------------------------------

SHORT = AudioSpec(seconds=2.0)


def loud_frames(features: np.ndarray, count: int) -> np.ndarray:
    """Frames in which a click is: louder than the middle of the quiet and the loudest."""
    level = features[:count].max(1)
    return np.flatnonzero(level > (level.min() + level.max()) / 2)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000])
@pytest.mark.parametrize("layout", ["mono", "3.0", "5.1"])
def test_a_click_is_in_the_frame_of_its_second(tmp_path, rate, layout):
    """Frame i is the sound from i to i + 2.5 hundredths of a second: the click at 1.25 s is in 123 to 124 or 125."""
    channels = {"mono": 1, "3.0": 3, "5.1": 6}[layout]
    path = write_sound_file(
        str(tmp_path / "x.mkv"), clicks(3.0, [1.2505], rate, channels), rate=rate, layout=layout
    )
    features, count = load_audio(path, SHORT, None, end=2.0)
    assert count == 198 and features.shape == (198, 64)
    assert set(loud_frames(features, count)) <= {123, 124, 125} and 124 in loud_frames(
        features, count
    )
    late, _ = load_audio(path, SHORT, None, start=0.5, end=2.5)
    assert 74 in loud_frames(late, 198)


@pytest.mark.parametrize("rate", [8000, 96000])
def test_a_tone_from_any_rate_is_in_its_band(tmp_path, rate):
    path = write_sound_file(
        str(tmp_path / "x.mkv"), tone(2.0, 1000, rate, 3), rate=rate, layout="3.0"
    )
    features, count = load_audio(path, SHORT, None)
    assert abs(np.argmax(features[:count].mean(0)) - band_of(1000, 64)) <= 1
    # A source of 8 kHz has nothing above 4 kHz.
    above = features[10 : count - 10, round(band_of(4600, 64)) :]
    assert above.max() < features[:count].max() - 1


def test_features_are_as_published(tmp_path):
    wave = np.round(np.random.default_rng(0).uniform(-0.3, 0.3, (1, 24000)) * 32768) / 32768
    path = write_sound_file(str(tmp_path / "x.mkv"), wave)
    features, count = load_audio(path, AudioSpec(), np.random.default_rng(0))
    assert features.shape == (998, 64) and features.dtype == np.float32 and count == 148
    wanted = (filter_bank(wave[0].astype(np.float32)) - 15.41663) / (2 * 6.55582)
    np.testing.assert_allclose(features[:148], wanted, atol=1e-6)
    assert not features[148:].any()  # zeros come after the normalisation, not before
    wide, count = load_audio(path, AudioSpec(mels=128), None)
    assert wide.shape == (998, 128) and count == 148 and wide[:148].any(0).all()


def test_dither_is_for_training(tmp_path):
    path = write_sound_file(str(tmp_path / "x.mkv"), tone(1.0, 440, 16000))
    noisy = dataclasses.replace(SHORT, dither=1.0)
    plain = load_audio(path, SHORT, None)[0]
    np.testing.assert_array_equal(load_audio(path, noisy, None)[0], plain)
    drawn = [load_audio(path, noisy, np.random.default_rng(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != plain).any() and (drawn[0] != drawn[2]).any()


def test_no_sound_is_no_frames(tmp_path):
    none = write_sound_file(str(tmp_path / "x.mp4"), None)
    muted = write_sound_file(str(tmp_path / "y.mkv"), np.zeros((1, 32000)))
    short = write_sound_file(str(tmp_path / "z.mkv"), tone(0.02, 440, 16000))
    ended = write_sound_file(str(tmp_path / "e.mkv"), tone(1.0, 440, 16000), seconds=8.0)
    late = write_sound_file(str(tmp_path / "l.mkv"), [(5.0, tone(1.0, 440, 16000))], seconds=8.0)
    for path, part in (
        (none, {}),
        (muted, {}),
        (short, {}),
        (ended, {"start": 2.0, "end": 4.0}),
        (ended, {"start": 2.0}),
        (ended, {"times": [5.0, 6.0]}),
        (late, {"start": 1.0, "end": 3.0}),
    ):
        for rng in (None, np.random.default_rng(0)):
            features, count = load_audio(path, SHORT, rng, **part)
            assert count == 0 and not features.any() and features.shape == (198, 64), (path, part)
    features, count = load_audio(muted, dataclasses.replace(SHORT, silence=True), None)
    assert count == 198
    assert features == pytest.approx((math.log(2.0**-23) - 15.41663) / (2 * 6.55582))


@pytest.mark.parametrize("seconds, frames", [(1.0, 98), (1.5, 148), (2.0, 198), (3.0, 198)])
def test_sound_shorter_or_longer_than_the_window_and_the_picture(tmp_path, seconds, frames):
    path = write_sound_file(str(tmp_path / "x.mkv"), tone(seconds, 440, 16000))
    features, count = load_audio(path, SHORT, np.random.default_rng(0), times=[0.0, 1.9])
    assert count == frames and features[:count].all(0).any() and not features[count:].any()


def test_nothing_outside_the_part_is_heard(tmp_path):
    """A clip of 1 s cut out of a file with clicks right before and behind it."""
    path = write_sound_file(
        str(tmp_path / "x.mkv"), clicks(6.0, [2.99, 3.5, 4.001], 16000), seconds=6.0
    )
    for rng in (None, *map(np.random.default_rng, range(5))):
        features, count = load_audio(path, SHORT, rng, start=3.0, end=4.0, times=[3.1, 3.9])
        assert count == 98 and set(loud_frames(features, count)) <= {48, 49, 50}


def test_damage_is_said(tmp_path):
    wave = tone(1.0, 440, 16000)
    wave[0, 100] = np.inf
    path = write_sound_file(str(tmp_path / "x.mkv"), wave, codec="pcm_f32le", sample_format="flt")
    with pytest.raises(BadVideo, match="bad_sound"):
        load_audio(path, SHORT, None)


# The window ---------------------------------------------------------------------------------------


def test_the_window_lies_over_the_frames():
    """Against every choice of part, sound and frames: what is promised holds."""
    draw = np.random.default_rng(0)
    for case in range(3000):
        low = draw.uniform(0, 20)
        high, end = low + draw.uniform(0, 40), low + draw.uniform(0.1, 40)
        high = min(high, end)
        times = np.sort(draw.uniform(low, end, draw.integers(1, 9)))
        rng = None if case % 3 == 0 else np.random.default_rng(case)
        begin = place_window(low, high, 10.0, times, rng)
        first, last = times[0], times[-1]
        assert begin >= low
        if last - low <= 10 and high - low <= 10:
            assert begin == low  # all there is
        elif last - first > 10:
            assert first <= begin <= last - 10 + 1e-9
        elif first >= low + 10 or last - 10 >= low:
            assert begin <= first and last <= begin + 10 + 1e-9  # holds all frames
        if rng is not None and high - 10 > max(first, last - 10):
            assert rng.bit_generator.state != np.random.default_rng(case).bit_generator.state


def test_the_window_without_frames():
    assert place_window(3.0, 8.0, 10.0, None, None) == 3.0
    assert place_window(3.0, 33.0, 10.0, None, None) == 13.0
    begins = [place_window(3.0, 33.0, 10.0, None, np.random.default_rng(i)) for i in range(200)]
    assert min(begins) < 4 and max(begins) > 22 and all(3 <= b <= 23 for b in begins)


def test_the_window_over_frames_moves_where_it_may():
    """Frames from 20 to 24 s in a minute of sound: it begins anywhere from 14 to 20."""
    begins = [
        place_window(0.0, 60.0, 10.0, [20, 22, 24], np.random.default_rng(i)) for i in range(200)
    ]
    assert all(14 <= b <= 20 for b in begins) and min(begins) < 14.2 and max(begins) > 19.8
    assert place_window(0.0, 60.0, 10.0, [20, 24], None) == 17.0
    assert place_window(0.0, 60.0, 10.0, [20, 50], None) == 30.0
    assert place_window(0.0, 27.0, 10.0, [20, 24], None) == 15.5  # of 14 to 17
    assert place_window(0.0, 21.0, 10.0, [20, 24], None) == 14.0  # the sound ends under the frames
    assert place_window(18.0, 60.0, 10.0, [20, 24], None) == 19.0  # not before the part


def test_the_drawn_window_is_what_is_read(tmp_path):
    path = write_sound_file(str(tmp_path / "x.mkv"), clicks(12.0, [6.0], 16000), seconds=12.0)
    for seed in range(4):
        begin = place_window(0.0, 12.0, 2.0, [5.5, 6.5], np.random.default_rng(seed))
        features, count = load_audio(path, SHORT, np.random.default_rng(seed), times=[5.5, 6.5])
        again, _ = load_audio(path, SHORT, np.random.default_rng(seed), times=[5.5, 6.5])
        np.testing.assert_array_equal(features, again)
        middle = loud_frames(features, count).mean() * 0.01 + 0.0125
        assert count == 198 and middle == pytest.approx(6.001 - begin, abs=0.011)


def test_real_clips(shared):
    """Sound under the frames of each clip that has any; published statistics put it near 0 with deviation near 1/2."""
    spec, heard = AudioSpec(), {}
    for path in sorted((shared / "data/clips").glob("*.m[pk][4v]")):
        with VideoReader(str(path)) as reader:
            times = reader.times()
        features, count = load_audio(str(path), spec, np.random.default_rng(0), times=times)
        assert not features[count:].any() and np.isfinite(features).all()
        if count:
            heard[path.stem] = count
            assert abs(features[:count].mean()) < 0.7 and 0.1 < features[:count].std() < 0.7
    assert heard == {
        "child_follows_dog": 998,
        "film_dialogue": 613,
        "flip_pancake": 998,
        "silent_film_two_men": 959,
        "technician_on_lift": 998,
        "tennis_serve": 998,
        "weightlifting": 998,
    }
