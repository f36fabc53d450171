"""Sound arrives on the clock of the pictures whatever its kind; damage is an error, absence is None."""

import io

import av
import numpy as np
import pytest
from sound_files import clicks, tone, write_sound_file
from video_files import KINDS, write, write_sound

from invideo_jax.data.decode import VideoReader
from invideo_jax.data.open_video import BadVideo, Limits
from invideo_jax.data.sound import SoundReader, read_sound
from invideo_jax.errors import UserError

AT = (0.5, 1.0, 3.25)  # seconds of the clicks

# container, codec, sample format, rate, layout: what users have, and what is odd
TRACKS = {
    "pcm_16k.mkv": ("pcm_s16le", "s16", 16000, "mono"),
    "pcm_8k.mkv": ("pcm_s16le", "s16", 8000, "stereo"),
    "pcm_96k.mov": ("pcm_s16le", "s16", 96000, "mono"),
    "three_channels.mkv": ("pcm_s16le", "s16", 44100, "3.0"),
    "with_bass.mkv": ("pcm_s16le", "s16", 44100, "2.1"),
    "u8.mkv": ("pcm_u8", "u8", 11025, "mono"),
    "s32_5.1.mkv": ("pcm_s32le", "s32", 48000, "5.1"),
    "float.mkv": ("pcm_f32le", "flt", 22050, "stereo"),
    "double.mkv": ("pcm_f64le", "dbl", 48000, "mono"),
    "16_channels.mkv": ("pcm_s16le", "s16", 48000, "16 channels"),
    "pcm_in.avi": ("pcm_s16le", "s16", 16000, "mono"),
    "aac.mp4": ("aac", "fltp", 44100, "stereo"),
    "aac_8k.mp4": ("aac", "fltp", 8000, "mono"),
    "aac_96k_three.mp4": ("aac", "fltp", 96000, "3.0"),
    "aac_5.1.mkv": ("aac", "fltp", 48000, "5.1"),
    "aac.ts": ("aac", "fltp", 48000, "stereo"),
    "flac_96k.mp4": ("flac", "s32", 96000, "3.0"),
    "mp3.mp4": ("libmp3lame", "fltp", 44100, "stereo"),
    "mp2.ts": ("mp2", "s16", 48000, "stereo"),
    "ac3.mkv": ("ac3", "fltp", 48000, "5.1"),
    "opus.mkv": ("libopus", "flt", 48000, "stereo"),
    "opus_8_planes.mkv": ("libopus", "flt", 48000, "7.1"),  # PyAV cannot list 8 planes
}


def write_track(folder, name: str, wave, **more) -> str:
    """Writes `wave(rate, channels)` as the track `name`."""
    codec, sample_format, rate, layout = TRACKS[name]
    channels = av.AudioLayout(layout).nb_channels
    more = {"seconds": 4.0, **more}
    return write_sound_file(
        str(folder / name),
        wave(rate, channels),
        rate=rate,
        layout=layout,
        codec=codec,
        sample_format=sample_format,
        **more,
    )


def starts(sound, quiet: float = 0.1) -> np.ndarray:
    """Seconds on the clock of the pictures where loud samples begin after 50 ms of quiet."""
    loud = np.flatnonzero(np.abs(sound.samples) > 0.2)
    first = np.r_[True, np.diff(loud) > 0.05 * sound.rate] if len(loud) else []
    return sound.start + loud[first] / sound.rate


@pytest.mark.parametrize("name", TRACKS)
def test_clicks_are_heard_when_they_are_shown(tmp_path, name):
    path = write_track(tmp_path, name, lambda r, c: clicks(4.0, AT, r, c))
    whole = read_sound(path)
    np.testing.assert_allclose(starts(whole), AT, atol=5e-4)
    assert whole.rate == 16000 and whole.samples.dtype == np.float32
    assert abs(len(whole.samples) - 64000) < 2000 and whole.real == len(whole.samples)
    # Matroska rounds the time at which a part begins to 1 ms.
    part = read_sound(path, start=3.0, end=3.5)
    np.testing.assert_allclose(starts(part), [3.25], atol=1.1e-3)
    assert len(part.samples) == 8000 and part.start == 3.0


@pytest.mark.parametrize("name", TRACKS)
def test_loudness_and_pitch_survive(tmp_path, name):
    path = write_track(tmp_path, name, lambda r, c: tone(2.0, 440, r, c), seconds=2.0)
    samples = read_sound(path, start=0.5, end=1.5).samples
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert np.argmax(spectrum) == 440
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.06)


def test_samples_are_exact_where_nothing_is_converted(tmp_path):
    wave = np.round(np.random.default_rng(0).uniform(-1, 1, (1, 32000)) * 32767) / 32768
    path = write_sound_file(str(tmp_path / "x.mkv"), wave)
    np.testing.assert_array_equal(read_sound(path).samples, wave[0].astype(np.float32))
    np.testing.assert_array_equal(read_sound(open(path, "rb").read()).samples, wave[0])


def test_a_part_is_the_same_as_cut_out_of_the_whole(tmp_path):
    """Also behind seeks; FLAC and PCM at the wanted rate come back bit for bit."""
    wave = np.round(np.random.default_rng(1).uniform(-1, 1, (1, 160000)) * 32767) / 32768
    for name, codec in (("x.mp4", "flac"), ("x.mkv", "pcm_s16le"), ("y.mkv", "flac")):
        path = write_sound_file(str(tmp_path / name), wave, codec=codec, seconds=10.0)
        for start, end in ((0.0, 1.0), (0.31, 0.5), (2.0, 4.0), (4.5678, 7.1), (9.5, 30.0)):
            part = read_sound(path, start=start, end=end)
            first = round(start * 16000)
            wanted = wave[0, first : first + round((end - start) * 16000)]
            # Matroska's clock of 1 ms: up to 8 samples beside.
            beside = [wave[0, first + i : first + i + len(wanted)] for i in range(-8, 9)]
            same = [
                len(b) == len(part.samples) and (b == part.samples).all()
                for b in (beside if "mkv" in name else [wanted])
            ]
            assert any(same), (name, start, end)


@pytest.mark.parametrize(
    "layout, heard", [("3.0", (0, 1, 2)), ("2.1", (0, 1)), ("5.1", (0, 1, 2, 4, 5))]
)
def test_channels_are_averaged_without_the_bass_channel(tmp_path, layout, heard):
    channels = av.AudioLayout(layout).nb_channels
    wave = np.stack([np.full(16000, (i + 1) / 16) for i in range(channels)])
    path = write_sound_file(str(tmp_path / "x.wav"), wave, layout=layout, seconds=0)
    np.testing.assert_allclose(
        read_sound(path).samples, np.mean([(i + 1) / 16 for i in heard]), atol=1e-6
    )


def test_samples_stay_within_one(tmp_path):
    path = write_sound_file(
        str(tmp_path / "x.mkv"), 3 * tone(1.0, 440, 16000), codec="pcm_f32le", sample_format="flt"
    )
    samples = read_sound(path).samples
    assert samples.max() == 1.0 and samples.min() == -1.0


# The clock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.mkv", "x.mp4", "x.ts"])
def test_sound_that_starts_late_has_silence_before(tmp_path, name):
    codec, form = ("aac", "fltp") if name == "x.ts" else ("flac", "s16")
    path = write_sound_file(
        str(tmp_path / name), [(0.75, clicks(1.0, [0.25], 16000))], codec=codec, sample_format=form
    )
    sound = read_sound(path)
    np.testing.assert_allclose(starts(sound), [1.0], atol=1.1e-3)
    with SoundReader(path) as reader:  # Matroska tells when it ends, not how long it is
        begin, end = reader.extent()
        assert begin == pytest.approx(0.75, abs=0.07) and 1.74 < end < (
            2.01 if "mkv" in name else 1.85
        )
    if codec == "flac":
        assert len(sound.samples) == 28000 and sound.real == 16000
        assert not sound.samples[:12000].any()
    assert read_sound(path, end=0.5).real == 0 and len(read_sound(path, end=0.5).samples) == 0


def test_sound_before_the_first_picture_is_cut(tmp_path):
    path = write_sound_file(
        str(tmp_path / "x.mkv"), clicks(3.0, [0.3, 1.5], 16000), picture_from=1.0, seconds=2.0
    )
    with VideoReader(path) as reader:
        assert reader.times()[0] == 0.0
    sound = read_sound(path)
    np.testing.assert_allclose(starts(sound), [0.5], atol=1e-3)
    assert len(sound.samples) == sound.real == 32000


def test_jumps_of_the_clock_are_pauses(tmp_path):
    """Also a jump back: what is said later holds."""
    pieces = [(0.0, tone(0.5, 440, 16000)), (1.5, clicks(0.5, [0.25], 16000))]
    sound = read_sound(write_sound_file(str(tmp_path / "x.mkv"), pieces))
    np.testing.assert_allclose(starts(sound)[-1], 1.75, atol=1e-3)
    assert not sound.samples[8001:24000].any() and sound.samples[:8000].any()
    assert len(sound.samples) == 32000 and sound.real == 16000


def test_jitter_of_time_stamps_leaves_no_holes(tmp_path):
    """Pieces of 23.2 ms in a container that counts whole milliseconds."""
    path = write_sound_file(str(tmp_path / "x.mkv"), tone(2.0, 440, 44100), rate=44100)
    samples = read_sound(path).samples[800:-800]
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(800, 32000 - 800) / 16000)
    np.testing.assert_allclose(samples, wanted, atol=2e-3)


@pytest.mark.parametrize("sound_seconds", [1.0, 3.0])
def test_sound_shorter_or_longer_than_the_picture(tmp_path, sound_seconds):
    """It ends where it ends: neither filled up nor cut."""
    path = write_sound_file(str(tmp_path / "x.mkv"), tone(sound_seconds, 440, 16000))
    sound = read_sound(path)
    assert len(sound.samples) == sound.real == 16000 * sound_seconds
    part = read_sound(path, start=0.5, end=2.0)
    assert len(part.samples) == 16000 * min(1.5, sound_seconds - 0.5)
    with SoundReader(path) as reader:
        np.testing.assert_allclose(reader.extent(), (0.0, sound_seconds), atol=1e-3)


CLOCKS = (
    "h264.mp4",
    "h264.mkv",
    "h264.ts",
    "h264_in.avi",
    "open_gop.mp4",
    "fragmented.mp4",
    "late_start.mkv",
)


@pytest.mark.parametrize("name", CLOCKS)
def test_second_zero_is_that_of_the_frames(tmp_path, name):
    path = str(tmp_path / name)
    write(path, **{"frames": 30, "audio": "first", **KINDS[name]})
    with VideoReader(path) as video, SoundReader(path) as sound:
        origin = float(video._origin * video._stream.time_base)
        assert sound._origin == pytest.approx(origin, abs=1e-9)
    with VideoReader(path, start=0.5) as video:
        assert float(video._origin * video._stream.time_base) == pytest.approx(origin, abs=1e-9)


def test_second_zero_of_a_trimmed_file(tmp_path):
    """An edit list hides the first pictures, the keyframe among them."""
    path = str(tmp_path / "x.mp4")
    write(path, frames=30, first=-200, audio="first")
    with VideoReader(path) as video, SoundReader(path) as sound:
        assert len(video) == 25 and video._origin == 0 and sound._origin == 0.0


def test_second_zero_of_a_broadcast_cut_out(tmp_path):
    """Pictures before the first keyframe are not shown, and so do not start the clock."""
    write(str(tmp_path / "x.ts"), frames=40, audio="first", options={"bf": "2"})
    data = (tmp_path / "x.ts").read_bytes()
    data = data[188 * (len(data) // 188 // 3) :]
    with VideoReader(data) as video, SoundReader(data) as sound:
        origin = float(video._origin * video._stream.time_base)
        assert sound._origin == pytest.approx(origin, abs=1e-9)
    with av.open(io.BytesIO(data)) as container:
        first = min(p.pts * p.time_base for p in container.demux(video=0) if p.pts is not None)
    assert float(first) < origin - 0.02


class LandsLate:
    """A container whose seeks end two seconds behind where they should."""

    def __init__(self, container):
        self.container = container

    def seek(self, target, stream):
        self.container.seek(target + round(2 / stream.time_base), stream=stream)

    def __getattr__(self, name):
        return getattr(self.container, name)


def test_a_seek_that_lands_late_is_not_trusted(tmp_path):
    path = write_sound_file(
        str(tmp_path / "x.mp4"), tone(8.0, 440, 16000), codec="flac", seconds=8.0
    )
    with SoundReader(path) as reader:
        wanted = reader.read(3.0, 6.0, 16000).samples
        reader._container = LandsLate(reader._container)
        found = reader.read(3.0, 6.0, 16000)
    np.testing.assert_array_equal(found.samples, wanted)
    assert found.real == 48000


@pytest.mark.parametrize(
    "name, codec",
    [("x.wav", "pcm_s16le"), ("x.flac", "flac"), ("x.mka", "pcm_s16le"), ("x.mp4", "flac")],
)
def test_of_a_file_without_picture_the_sound_is_the_clock(tmp_path, name, codec):
    wave = clicks(4.0, AT, 16000)
    path = write_sound_file(str(tmp_path / name), wave, codec=codec, seconds=0)
    np.testing.assert_allclose(starts(read_sound(path)), AT, atol=1e-3)
    np.testing.assert_allclose(starts(read_sound(path, start=3.0, end=3.5)), [3.25], atol=1e-3)
    late = write_sound_file(str(tmp_path / "late.mka"), [(5.0, wave)], seconds=0)
    np.testing.assert_allclose(starts(read_sound(late)), AT, atol=1e-3)


def test_a_cover_picture_is_no_picture(tmp_path):
    path = str(tmp_path / "x.mp4")
    write_sound(path, cover=True)
    assert read_sound(path).real == pytest.approx(16000, abs=1100)


# What there is not, and damage --------------------------------------------------------------------


def test_no_track_is_none(tmp_path):
    assert read_sound(write_sound_file(str(tmp_path / "x.mp4"), None)) is None


def test_silence_is_told_from_sound(tmp_path):
    quiet = write_sound_file(str(tmp_path / "x.mkv"), np.zeros((1, 16000)))
    sound = read_sound(quiet)
    assert sound.silent and sound.real == 16000
    soft = np.tile([[0.0, 1 / 32768]], 8000)
    assert not read_sound(write_sound_file(str(tmp_path / "y.mkv"), soft)).silent


def test_the_default_track_is_read(tmp_path):
    path = str(tmp_path / "x.mkv")
    with av.open(path, "w") as out:
        for number in range(2):
            stream = out.add_stream("pcm_s16le", rate=16000, layout="mono")
            stream.disposition = (
                av.stream.Disposition.default if number else av.stream.Disposition(0)
            )
        for stream, value in zip(out.streams, (0.25, 0.5)):
            wave = np.full((1, 16000), round(value * 32768), np.int16)
            frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
            frame.sample_rate, frame.pts = 16000, 0
            out.mux(stream.encode(frame))
    np.testing.assert_array_equal(read_sound(path).samples, 0.5)


def damaged(path: str, seconds: float, count: int = 400, behind: int = 8) -> bytes:
    """The file with noise over `count` bytes, `behind` bytes after the first sound packet at or after `seconds`."""
    data = bytearray(open(path, "rb").read())
    with av.open(path) as container:
        packets = [p for p in container.demux(audio=0) if p.size]
    hit = next(p for p in packets if float(p.pts * p.time_base) >= seconds)
    noise = np.random.default_rng(0).integers(0, 256, count, np.uint8).tobytes()
    data[hit.pos + behind : hit.pos + behind + count] = noise
    return bytes(data)


def test_damage_is_an_error_where_it_is_and_nowhere_else(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 160000))
    path = write_sound_file(str(tmp_path / "x.mp4"), wave, codec="flac", seconds=10.0)
    data = damaged(path, 5.0)
    with pytest.raises(BadVideo, match="bad_sound.*damaged before 5.") as caught:
        read_sound(data)
    assert caught.value.reason == "bad_sound"
    assert len(read_sound(data, end=4.5).samples) == 72000
    assert len(read_sound(data, start=6.0, end=8.0).samples) == 32000
    assert len(read_sound(data, start=5.3, end=8.0).samples) == 43200  # only the lead is damaged
    for end in (5.05, 5.2):
        with pytest.raises(BadVideo, match="bad_sound"):
            read_sound(data, start=4.8, end=end)
    with VideoReader(data) as reader:  # the pictures are as good as ever
        assert reader.frames([0, 99]).any()


def test_a_single_flipped_bit_of_flac_is_found(tmp_path):
    """Noise of full loudness is stored as it is: only the checksum tells."""
    wave = np.random.default_rng(0).uniform(-1, 1, (1, 16000))
    path = write_sound_file(str(tmp_path / "x.mp4"), wave, codec="flac", seconds=1.0)
    data = bytearray(open(path, "rb").read())
    data[len(data) // 2] ^= 1
    with pytest.raises(BadVideo, match="bad_sound"):
        read_sound(bytes(data))


def test_damage_at_the_beginning_is_no_pause(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 16000))
    path = write_sound_file(str(tmp_path / "x.mp4"), wave, codec="flac", seconds=1.0)
    with pytest.raises(BadVideo, match="bad_sound.*damaged before 0.07 s"):
        read_sound(damaged(path, 0.0))
    short = write_sound_file(str(tmp_path / "y.mp4"), wave[:, :1000], codec="flac", seconds=1.0)
    with pytest.raises(BadVideo, match="bad_sound.*1 damaged packets"):
        read_sound(damaged(short, 0.0))


def test_a_broadcast_cut_out_begins_with_half_a_packet(tmp_path):
    """AC-3 in a transport stream: damage before the first good packet is passed over, behind it is not."""
    wave = tone(4.0, 440, 48000, 2)
    path = write_sound_file(
        str(tmp_path / "x.ts"),
        wave,
        codec="ac3",
        sample_format="fltp",
        rate=48000,
        layout="stereo",
        seconds=4.0,
    )
    whole = read_sound(path).real
    half = {"count": 150, "behind": 200}  # within the load of its second block of 188 bytes
    cut = read_sound(damaged(path, 0.0, **half))
    assert whole - 3 * 1536 / 3 - 10 <= cut.real < whole
    with pytest.raises(BadVideo, match="bad_sound"):
        read_sound(damaged(path, 3.0, **half))


def test_a_file_cut_short_has_less_sound(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 160000))
    path = write_sound_file(str(tmp_path / "x.mkv"), wave, codec="flac", seconds=10.0)
    data = open(path, "rb").read()
    whole, cut = read_sound(data), read_sound(data[: len(data) * 6 // 10])
    assert 5 < len(cut.samples) / 16000 < 7
    np.testing.assert_array_equal(cut.samples, whole.samples[: len(cut.samples)])


def test_half_a_packet_at_the_end_is_a_cut(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 16128))  # 14 packets
    path = write_sound_file(str(tmp_path / "x.mp4"), wave, codec="flac")
    assert len(read_sound(damaged(path, 0.9)).samples) == 13 * 1152
    with pytest.raises(BadVideo, match="bad_sound.*2 damaged packets"):
        read_sound(damaged(path, 0.9 - 0.072, 3000))


def test_numbers_that_are_none_are_an_error(tmp_path):
    wave = tone(1.0, 440, 16000)
    wave[0, 5000] = np.nan
    path = write_sound_file(str(tmp_path / "x.mkv"), wave, codec="pcm_f32le", sample_format="flt")
    with pytest.raises(BadVideo, match="bad_sound.*no numbers"):
        read_sound(path)


@pytest.mark.parametrize("rate", [10, 2_000_000_000])
def test_absurd_rates_are_an_error(tmp_path, rate):
    path = write_sound_file(str(tmp_path / "x.wav"), tone(0.1, 440, 16000), seconds=0)
    data = bytearray(open(path, "rb").read())
    data[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(BadVideo, match=f"bad_sound.*{rate} samples a second"):
        read_sound(bytes(data), end=1.0)


def test_limits(tmp_path):
    path = write_sound_file(str(tmp_path / "x.mkv"), tone(3.0, 440, 16000))
    with pytest.raises(BadVideo, match="timeout"):
        read_sound(path, limits=Limits(decode_seconds=1e-9))
    with pytest.raises(BadVideo, match="too_long.*3 s of sound, limit 2.5 s"):
        read_sound(path, limits=Limits(max_seconds=2.5))


def test_arguments(tmp_path):
    path = write_sound_file(str(tmp_path / "x.mkv"), tone(1.0, 440, 16000))
    for bad in ({"start": -1.0}, {"start": 2.0, "end": 2.0}, {"rate": 0}, {"start": float("nan")}):
        with pytest.raises(UserError, match="start must be at least 0, end above it, rate above 0"):
            read_sound(path, **bad)
    with pytest.raises(BadVideo, match="missing"):
        read_sound(str(tmp_path / "none.mkv"))
    (tmp_path / "text.wav").write_text("no sound at all")
    with pytest.raises(BadVideo, match="not_video"):
        read_sound(str(tmp_path / "text.wav"))


def test_real_clips(shared):
    """Length, silence and absence as the list of the clips says."""
    import json

    for line in (shared / "data/clips/clips.jsonl").read_text().splitlines():
        row = json.loads(line)
        sound = read_sound(str(shared / "data/clips" / row["file"]))
        assert (sound is not None) == row["has_audio"], row["file"]
        if sound is not None:
            assert sound.silent == row["audio_silent"], row["file"]
            assert abs(len(sound.samples) / 16000 - row["seconds"]) < 0.3, row["file"]


def test_real_broken_files(shared):
    found = {}
    for path in sorted((shared / "data/broken").iterdir()):
        if path.suffix in (".mp4", ".mkv"):
            try:
                sound = read_sound(str(path))
                found[path.name] = None if sound is None else round(sound.real / 16000)
            except BadVideo as error:
                found[path.name] = error.reason
    assert found == {
        "audio_only.mp4": 3,
        "empty.mp4": "empty",
        "flipped_60_bits.mkv": None,
        "header_zeroed.mp4": "not_video",
        "hole_4k.mkv": None,
        "text.mp4": "not_video",
        "truncated_40.mp4": "cannot_open",
        "truncated_70.mkv": None,
    }
