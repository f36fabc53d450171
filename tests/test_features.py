"""Features of videos: the right frames, the right numbers, and the same file however often it was stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import REPOSITORY
from data.video_files import flip_bits, write

from invideo_jax import config as config_lib
from invideo_jax import features, handover, programs, sharding
from invideo_jax import run as run_lib
from invideo_jax.checkpoint import Checkpoints
from invideo_jax.data.sources import open_source
from invideo_jax.data.transforms import ClipSpec, load_clip
from invideo_jax.errors import UserError
from invideo_jax.features import __main__ as command
from invideo_jax.features import encoder as encoders
from invideo_jax.features import extract, reading, store, windows
from invideo_jax.interop import folder, models
from invideo_jax.models import positions, uniformer_v2, video_encoder, video_mae

SPEC = ClipSpec(frames=4, size=32, sampling="middle", views=1, crop="center", flip=0.0)
STRIDE = 0.2
FRAMES = {"a": 40, "b": 9, "c": 75, "d": 3, "e": 31}


@pytest.fixture(scope="module", autouse=True)
def one_commit():
    """Bytes are compared: a commit made meanwhile must not count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract.runtime, "git_state", lambda: "0123abc")
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos of 25 frames a second, of other lengths and formats."""
    place = tmp_path_factory.mktemp("videos")
    for (name, count), suffix in zip(FRAMES.items(), ("mp4", "mkv", "avi", "mp4", "ts")):
        write(str(place / f"{name}.{suffix}"), frames=count)
    return place


def save_model(place, model, seed=0):
    shapes = models.abstract(model)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    folder.save_params(place, params, models.describe(model))
    return params


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a small InternVideo2 encoder, the encoder and its parameters."""
    place = tmp_path_factory.mktemp("models") / "internvideo2"
    made = video_encoder.build("Micro", depth=2, frames=4, image_size=32)
    return place, made, save_model(place, made)


@pytest.fixture(scope="module")
def opened(model):
    mesh = sharding.make_mesh()
    return encoders.open_encoder(str(model[0]), mesh), mesh


def run(opened, videos, output, **options):
    """Extracts all kinds of features of windows of half a second."""
    encoder, mesh = opened
    given = dict(rule=windows.Rule(seconds=0.5, stride_seconds=STRIDE), kinds=encoders.KINDS)
    given |= {k: options.pop(k) for k in list(options) if k in extract.Request.__dataclass_fields__}
    source = open_source(str(videos))
    return extract.extract(
        encoder, source, output, extract.Request(**given), mesh=mesh, **(dict(say=str) | options)
    )


@pytest.fixture(scope="module")
def made(opened, videos, tmp_path_factory):
    """The output of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("made") / "all.safetensors"
    layers = encoders.parse_layers("final,-2", 2)
    return output, run(opened, videos, output, layers=layers)


# ---------------------------------------------------------------------------------------------- windows


def spans(times, **rule):
    made = windows.cut(np.asarray(times, float), windows.Rule(**rule), SPEC)
    return [(round(w.start, 6), round(w.end, 6), w.indices.tolist()) for w in made]


def test_a_whole_video_is_one_window():
    assert spans(np.arange(8) / 4) == [(0.0, 2.0, [0, 2, 4, 6])]
    assert spans([0.0, 0.5]) == [(0.0, 1.0, [0, 1, 1, 1])]
    assert spans([3.0]) == [(3.0, 3.04, [0, 0, 0, 0])]


def test_windows_of_seconds_cover_the_video():
    times = np.arange(10) / 4  # 2.5 s
    assert spans(times, seconds=1.0) == [
        (0.0, 1.0, [0, 1, 2, 3]),
        (1.0, 2.0, [4, 5, 6, 7]),
        (2.0, 2.5, [8, 9, 9, 9]),
    ]
    assert [s[:2] for s in spans(times, seconds=1.0, stride_seconds=0.5)] == [
        (0.0, 1.0),
        (0.5, 1.5),
        (1.0, 2.0),
        (1.5, 2.5),
    ]
    assert spans(times, seconds=9.0) == [(0.0, 2.5, [0, 3, 5, 8])]
    # A stride longer than a window leaves frames out, and nothing is invented behind the end.
    assert [s[:2] for s in spans(times, seconds=0.5, stride_seconds=2.0)] == [
        (0.0, 0.5),
        (2.0, 2.5),
    ]
    assert len(spans(np.arange(3600) / 24, seconds=2.0)) == 75


def test_a_pause_shows_the_frame_before_it():
    assert spans([0.0, 0.1, 3.0, 3.1], seconds=1.0) == [
        (0.0, 1.0, [0, 1, 1, 1]),
        (1.0, 2.0, [1, 1, 1, 1]),
        (2.0, 3.0, [1, 1, 1, 1]),
        (3.0, 3.2, [2, 3, 3, 3]),
    ]


def test_windows_of_frames():
    times = np.arange(10) / 4
    assert spans(times, frames=4, stride_frames=3) == [
        (0.0, 1.0, [0, 1, 2, 3]),
        (0.75, 1.75, [3, 4, 5, 6]),
        (1.5, 2.5, [6, 7, 8, 9]),
    ]
    assert [s[:2] for s in spans(times, frames=4)] == [(0.0, 1.0), (1.0, 2.0), (2.0, 2.5)]
    assert spans(times, frames=40) == [(0.0, 2.5, [0, 3, 5, 8])]


@pytest.mark.parametrize(
    "rule, message",
    [
        (dict(seconds=1.0, frames=4), "counted in seconds or in frames"),
        (dict(stride_seconds=1.0), "stride_seconds needs window_seconds"),
        (dict(seconds=-1.0), "must not be negative"),
        (dict(seconds=float("nan")), "must not be negative"),
    ],
)
def test_rules_that_make_no_sense(rule, message):
    with pytest.raises(UserError, match=message):
        windows.Rule(**rule)


def test_windows_are_the_clips_of_their_seconds(videos):
    """A window of a long video is the clip that `load_clip` cuts at these seconds, to the last bit."""
    source, seen = open_source(str(videos)), 0
    with reading.Reading(source, windows.Rule(0.6, 0.4), SPEC, threads=2) as items:
        for item in items:
            clip, info = load_clip(
                source[item.video]["video"],
                SPEC,
                np.random.default_rng(0),
                start=item.window.start,
                end=item.window.end,
            )
            assert np.array_equal(item.clip, clip) and item.bad is None
            assert np.allclose(item.window.times, info.times)
            seen += 1
    assert seen == 4 + 1 + 7 + 1 + 3


def test_reading_can_begin_anywhere(videos):
    source, rule = open_source(str(videos)), windows.Rule(0.6, 0.4)

    def places(first):
        with reading.Reading(source, rule, SPEC, first=first, threads=3, ahead=1) as items:
            return [(item.video, item.number) for item in items]

    whole = places((0, 0))
    assert whole == sorted(whole)
    for first in ((0, 2), (2, 7), (2, 8), (3, 0), (5, 0)):
        assert places(first) == [place for place in whole if place >= first]


def test_a_mistake_of_ours_is_not_a_bad_video(videos, monkeypatch):
    monkeypatch.setattr(reading, "cut", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        with reading.Reading(open_source(str(videos)), windows.Rule(), SPEC) as items:
            list(items)


# ------------------------------------------------------------------------------------------ the numbers


def test_features_are_those_of_the_model(made, model, videos):
    """Every row against the encoder applied to the clip of its seconds."""
    output, summary = made
    rows, source = safetensors.numpy.load_file(output), open_source(str(videos))
    _, module, params = model

    def direct(video):
        tokens, out = module.apply({"params": params}, video, features=[0])
        pooled = module.apply({"params": params}, tokens, method="pooled")
        return pooled, tokens[:, 1:], out["block0"][:, 1:]

    clips = [
        load_clip(source[v]["video"], SPEC, np.random.default_rng(0), start=start, end=end)
        for v, start, end in zip(rows["video"], rows["start"], rows["end"])
    ]
    pooled, tokens, block = jax.jit(direct)(np.stack([clip for clip, _ in clips]))
    slots = lambda x: np.asarray(x).reshape(len(x), 4, 16, 48).mean(2)
    wanted = dict(
        clip=pooled,
        frame=slots(tokens),
        token=tokens,
        clip_block0=np.asarray(block).mean(1),
        frame_block0=slots(block),
        token_block0=block,
    )
    for name, value in wanted.items():
        assert rows[name].shape == value.shape and rows[name].dtype == np.float32
        assert np.abs(rows[name] - value).max() < 1e-5, name
    assert np.allclose(rows["frame_times"], [info.times for _, info in clips])
    assert summary.rows == len(clips) and summary.videos == 5 and not summary.bad
    assert summary.padded == sum(info.padded > 0 for _, info in clips)
    assert np.abs(rows["clip"][:-1] - rows["clip"][1:]).max(1).min() > 1e-4  # no row is another's


def test_rows_say_where_they_are_from(made, model):
    output, _ = made
    rows, told = safetensors.numpy.load_file(output), store.read_metadata(output)
    ids = json.loads(told["ids"])
    assert ids == ["a.mp4", "b.mkv", "c.avi", "d.mp4", "e.ts"]
    assert [os.path.basename(path) for path in json.loads(told["paths"])] == ids
    assert rows["video"].tolist() == sorted(rows["video"].tolist())
    for video, count in enumerate(FRAMES.values()):
        mine = rows["video"] == video
        assert rows["window"][mine].tolist() == list(range(mine.sum()))
        assert np.allclose(rows["start"][mine], STRIDE * np.arange(mine.sum()))
        assert rows["end"][mine][-1] == pytest.approx(count / 25)
    about = json.loads(told["model"])
    assert about["model"] == "VideoEncoder" and about["arguments"]["frames"] == 4
    assert about["digest"] == json.loads((model[0] / "model.json").read_text())["files"]
    assert json.loads(told["layers"]) == ["final", 0] and told["frames"] == "4"
    assert told["normalisation"] == "imagenet" and "jax" in json.loads(told["code"])["packages"]


def test_parquet_holds_the_same(made, opened, videos, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "all.parquet"
    run(opened, videos, output, layers=encoders.parse_layers("final,-2", 2))
    table, rows = pyarrow.read_table(output), safetensors.numpy.load_file(made[0])
    assert set(table.column_names) == {"id", "path", *rows}
    assert table["id"].to_pylist() == [
        list(FRAMES)[v] + s for v, s in zip(rows["video"], suffixes(rows))
    ]
    shapes = {
        k.decode(): json.loads(v) for k, v in table.schema.metadata.items() if k[:6] == b"shape."
    }
    for name, value in rows.items():
        column = np.array(table[name].to_pylist(), value.dtype)
        assert np.array_equal(column.reshape(-1, *shapes[f"shape.{name}"]), value), name


def suffixes(rows):
    return [[".mp4", ".mkv", ".avi", ".mp4", ".ts"][v] for v in rows["video"]]


def test_parquet_in_several_row_groups(opened, videos, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    for name, size in (("one", store.GROUP_BYTES), ("many", 1600)):
        monkeypatch.setattr(store, "GROUP_BYTES", size)
        run(opened, videos, tmp_path / f"{name}.parquet", kinds=("clip",))
    one, many = (pyarrow.ParquetFile(tmp_path / f"{name}.parquet") for name in ("one", "many"))
    assert one.num_row_groups == 1 and many.num_row_groups > 2
    assert one.read().equals(many.read())


def test_one_program_is_compiled(opened, videos, tmp_path, monkeypatch):
    traced = []
    real = extract.make_features

    def counted(*args, **kwargs):
        run = real(*args, **kwargs)
        return lambda *inputs: traced.append(inputs[1].shape) or run(*inputs)

    monkeypatch.setattr(extract, "make_features", counted)
    run(opened, videos, tmp_path / "x.safetensors", kinds=("clip",))
    assert traced == [(8, 4, 32, 32, 3)] * 2  # one for the shapes, one for the program


def test_other_frames_take_interpolated_positions(model):
    place, module, params = model
    encoder = encoders.open_encoder(str(place), sharding.make_mesh(), frames=8, size=48)
    assert encoder.module.grid == (8, 6, 6) and "1 interpolated" in encoder.note
    wanted = positions.interpolate(params["position_embedding"], old_times=4, grid=(8, 6, 6))
    assert np.array_equal(encoder.params["position_embedding"], wanted)
    assert encoder.about["arguments"]["frames"] == 8
    with pytest.raises(UserError, match="image_size=50"):
        encoders.open_encoder(str(place), sharding.make_mesh(), size=50)


@pytest.mark.parametrize("whole", [False, True])
def test_the_encoder_is_found_in_other_models(whole, tmp_path):
    """VideoMAE's whole pretraining model, and its encoder alone, give the same features."""
    made = video_mae.build("Micro", frames=4, image_size=32)
    params = save_model(tmp_path / "whole", made)
    folder.save_params(tmp_path / "part", params["encoder"], models.describe(made.encoder))
    opened = encoders.open_encoder(
        str(tmp_path / ("whole" if whole else "part")), sharding.make_mesh()
    )
    assert type(opened.module) is video_mae.VideoMAEEncoder
    got = handover.from_tree(opened.params, "").shapes
    want = handover.from_tree(params["encoder"], "").shapes
    assert all(np.array_equal(got[path], want[path]) for path in want) and got.keys() == want.keys()
    video = np.random.default_rng(0).integers(0, 255, (2, 4, 32, 32, 3)).astype(np.uint8)
    run = encoders.make_features(opened.module, kinds=("clip", "frame"), layers=(None,))
    made_of = jax.jit(run)(opened.params, video)
    tokens, _ = jax.jit(made.encoder.apply)({"params": params["encoder"]}, video)
    assert np.abs(made_of["clip"] - tokens.mean(1)).max() < 1e-5
    assert np.abs(made_of["frame"] - tokens.reshape(2, 2, 16, -1).mean(2)).max() < 1e-5


def test_an_encoder_around_another_takes_other_clips_too(tmp_path):
    """UniFormerV2: its backbone has the frames, its blocks one class token less than its result."""
    made = uniformer_v2.build("Micro", frames=4, image_size=16, depth=5)
    save_model(tmp_path / "u", made)
    opened = encoders.open_encoder(str(tmp_path / "u"), sharding.make_mesh(), frames=2, size=32)
    assert opened.module.grid == (2, 4, 4)
    backbone = opened.about["arguments"]["backbone"]
    assert (backbone["frames"], backbone["image_size"]) == (2, 32)
    video = np.random.default_rng(0).integers(0, 255, (1, 2, 32, 32, 3)).astype(np.uint8)
    run = encoders.make_features(opened.module, kinds=("token", "frame"), layers=(None, 4))
    got = jax.jit(run)(opened.params, video)
    _, out = jax.jit(lambda p, v: opened.module.apply({"params": p}, v, features=(4,)))(
        opened.params, video
    )
    assert np.abs(got["token_block4"] - out["block4"][:, 2:]).max() < 1e-5  # behind one a frame
    assert np.abs(got["token"] - got["token_block4"]).max() < 1e-5  # the last block's patches
    assert np.abs(got["frame"] - got["token"].reshape(1, 2, 16, -1).mean(2)).max() < 1e-5


def test_the_newest_checkpoint_of_a_run(tmp_path, monkeypatch):
    """A workdir: the encoder of its stage, with the average where asked for."""
    monkeypatch.chdir(REPOSITORY)
    override = "stages.masked.ema_decay=0.9"
    config = config_lib.load("configs/quickstart.py:masked,smoke", [override]).config
    stage = run_lib.place_stages(config, 100)[0]
    program = programs.program(config, stage)
    mesh, rng = sharding.make_mesh(), np.random.default_rng(0)
    shapes = sharding.unbox(jax.eval_shape(program.init_params))
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    state = dict(params=jax.tree.map(draw, shapes), ema=jax.tree.map(draw, shapes))
    meta = dict(config=config.to_dict(), stage="masked", epoch_examples=100)
    with Checkpoints(tmp_path / "checkpoints") as kept:
        kept.save(3, state, meta, wait=True)
    for ema in (True, False):
        encoder = encoders.open_encoder(str(tmp_path), mesh, ema=ema)
        wanted = state["ema" if ema else "params"]["encoder"]
        same = jax.tree.map(np.array_equal, encoder.params, wanted)
        assert all(jax.tree.leaves(same))
        assert encoder.about["weights"] == ("ema" if ema else "params")
        assert encoder.about["step"] == 3 and encoder.module.frames == 8
        assert "19 copied" in encoder.note


def test_devices_can_share_the_parameters(model, made, videos, tmp_path):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    encoder = encoders.open_encoder(str(model[0]), mesh)
    kernel = encoder.params["patch_embed"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    run((encoder, mesh), videos, tmp_path / "x.safetensors", kinds=("clip",))
    rows, exact = (
        safetensors.numpy.load_file(f)["clip"] for f in (tmp_path / "x.safetensors", made[0])
    )
    assert np.abs(rows - exact).max() < 1e-5


def test_half_precision(opened, model, videos, made, tmp_path):
    encoder = encoders.open_encoder(str(model[0]), opened[1], dtype=jnp.bfloat16)
    run((encoder, opened[1]), videos, tmp_path / "x.safetensors", stored="float16", kinds=("clip",))
    rows = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    exact = safetensors.numpy.load_file(made[0])["clip"]
    assert rows["clip"].dtype == np.float16
    cosine = (rows["clip"] * exact).sum(1) / np.linalg.norm(rows["clip"].astype(np.float32), axis=1)
    assert (cosine / np.linalg.norm(exact, axis=1)).min() > 0.99
    assert not np.array_equal(rows["clip"].astype(np.float32), exact)


def test_layers_and_kinds_by_name():
    assert encoders.parse_layers("final,-7,0", 12) == (None, 5, 0)
    assert encoders.parse_kinds("token, clip") == ("clip", "token")
    for text in ("", "12", "-13", "x", "0,-12", "final,final"):
        with pytest.raises(UserError, match="--layer must"):
            encoders.parse_layers(text, 12)
    for text in ("", "clips"):
        with pytest.raises(UserError, match="--kind must name some of clip, frame, token"):
            encoders.parse_kinds(text)


# -------------------------------------------------------------------------------- stopped and continued


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_stopped_run_gives_the_same_bytes(made, opened, videos, tmp_path, monkeypatch):
    """Stopped after a part and before the next one in turn, until it comes to its end."""
    output, real, starts = tmp_path / "all.safetensors", store.Parts.add, []

    def add(parts, *given):
        if len(starts) % 3:
            real(parts, *given)
        raise Stopped

    monkeypatch.setattr(store.Parts, "add", add)
    layers = encoders.parse_layers("final,-2", 2)
    while not output.exists():
        starts.append(1)
        assert len(starts) < 20
        with contextlib.suppress(Stopped):
            run(opened, videos, output, layers=layers, save_seconds=0)
    assert len(starts) == 6  # 28 rows are 4 parts; the third start loses its work
    assert output.read_bytes() == made[0].read_bytes()
    assert not store.parts_folder(output).exists()


def test_rows_are_read_in_pieces_of_any_size(tmp_path):
    parts, rng = store.Parts(tmp_path / "x.parquet", {}), np.random.default_rng(0)
    whole = rng.normal(size=(9, 2))
    for low, high in ((0, 3), (3, 3), (3, 8), (8, 9)):
        parts.add({"x": whole[low:high]}, (high, 0), [], {})
    again = store.Parts(tmp_path / "x.parquet", {})
    assert again.rows == 9 and again.cursor == (9, 0)
    for rows in range(1, 11):
        pieces = list(again.read("x", rows))
        assert [len(x) for x in pieces] == [rows] * (9 // rows) + [9 % rows] * bool(9 % rows)
        assert np.array_equal(np.concatenate(pieces), whole)


def arguments(model, videos, output, *more):
    return [
        f"--checkpoint={model[0]}",
        f"--videos={videos}",
        f"--output={output}",
        "--window_seconds=0.5",
        "--stride_seconds=0.1",
        "--batch_size=8",
        "--threads=2",
        *more,
    ]


def test_a_killed_process_is_continued(model, videos, tmp_path):
    """kill -9 at the first part; the same command goes on, and ends with the bytes of a run never killed."""
    output = tmp_path / "killed.safetensors"
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "invideo_jax.features",
            *arguments(model, videos, output, "--save_seconds=0"),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"},
    )
    parts = store.parts_folder(output)
    limit = time.monotonic() + 120
    while not list(parts.glob("0*.safetensors")) and child.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not output.exists()
    assert command.main(arguments(model, videos, output)) == 0
    assert command.main(arguments(model, videos, tmp_path / "whole.safetensors")) == 0
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert len(safetensors.numpy.load_file(output)["clip"]) > 40


def test_another_question_is_refused(opened, videos, tmp_path, monkeypatch):
    output = tmp_path / "x.safetensors"
    monkeypatch.setattr(store, "write_safetensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(opened, videos, output, kinds=("clip",))
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"kinds: \['clip'\] then, \['frame'\] now.*Give another --output"
    ):
        run(opened, videos, output, kinds=("frame",))
    run(opened, videos, output, kinds=("clip",))
    before = output.read_bytes()
    said = []
    again = run(opened, videos, output, kinds=("clip",), say=said.append)
    assert "there already" in said[0] and again.rows > 5 and output.read_bytes() == before
    with pytest.raises(UserError, match="holds something else"):
        run(opened, videos, output, kinds=("frame",))


def test_a_damaged_part_is_refused(opened, videos, tmp_path):
    parts = store.parts_folder(tmp_path / "x.safetensors")
    parts.mkdir()
    (parts / "000000.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="000000.safetensors must be a whole part"):
        run(opened, videos, tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------- bad videos


@pytest.fixture(scope="module")
def some_bad(tmp_path_factory):
    """Two whole videos; one of no video, one that ends early, one damaged in the middle."""
    place = tmp_path_factory.mktemp("some_bad")
    write(str(place / "a.mp4"), frames=30)
    write(str(place / "z.mp4"), frames=50)
    (place / "b.mp4").write_text("no video")
    (place / "c.mp4").write_bytes((place / "a.mp4").read_bytes()[:500])
    write(str(place / "d.mkv"), frames=150)
    (place / "d.mkv").write_bytes(flip_bits((place / "d.mkv").read_bytes(), 3, start=0.8))
    return place


def test_bad_videos_are_listed_and_the_others_go_on(model, some_bad, tmp_path, capsys):
    output = tmp_path / "x.safetensors"
    given = arguments(model, some_bad, output)
    assert command.main(given) == 0
    assert "videos could not be read" in capsys.readouterr().out
    bad = {row["id"]: row for row in store.read_bad(output)}
    assert bad.keys() >= {"b.mp4", "c.mp4"} and not bad.keys() & {"a.mp4", "z.mp4"}
    assert bad["b.mp4"]["reason"] == "not_video" and bad["b.mp4"]["path"].endswith("b.mp4")
    rows = safetensors.numpy.load_file(output)
    ids = json.loads(store.read_metadata(output)["ids"])
    count = lambda name: int((rows["video"] == ids.index(name)).sum())
    assert count("b.mp4") == count("c.mp4") == 0 and count("a.mp4") == 8 and count("z.mp4") == 16
    # Of the damaged one what is whole is there, and what is not is counted: together all windows.
    assert "d.mkv" in bad and count("d.mkv") > 30
    assert count("d.mkv") + bad["d.mkv"]["windows"] == 56
    assert command.main([*given, "--strict"]) == 1
    assert command.main([*arguments(model, some_bad, tmp_path / "y.parquet"), "--strict"]) == 1


def test_no_good_video_at_all(model, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "b.mp4").write_text("no video")
    for name in ("x.safetensors", "x.parquet"):
        assert command.main(arguments(model, tmp_path / "videos", tmp_path / name)) == 0
    rows = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert rows["clip"].shape == (0, 32) and rows["video"].shape == (0,)


# --------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "change, message",
    [
        ("--output=x.npz", "--output must end in .safetensors or .parquet"),
        ("--output=nowhere/x.parquet", "must lie in a folder that is there"),
        ("--kind=clips", "--kind must name some of"),
        ("--layer=-9", "--layer must be 'final'"),
        ("--checkpoint=nowhere", "--checkpoint must be the workdir"),
        ("--videos=nowhere", "must exist"),
        ("--checkpoint=a={model};b={model}", "--checkpoint must name one workdir"),
        ("--batch_size=0", "--batch_size must be at least 1"),
        ("--window_frames=3", "in seconds or in frames"),
        ("--window_second=3", 'Did you mean "--window_seconds"'),
    ],
)
def test_mistakes_are_told_without_a_traceback(change, message, model, videos, tmp_path, capsys):
    given = arguments(model, videos, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit) as caught:
        command.main([*given, change.format(model=model[0])])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and message in told and "Traceback" not in told
    assert not (tmp_path / "x.safetensors").exists()


def test_parquet_without_pyarrow_names_the_line_to_install(
    model, videos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit):
        command.main(arguments(model, videos, tmp_path / "x.parquet"))
    assert "pip install 'invideo_jax[parquet]'" in capsys.readouterr().err


@pytest.mark.slow
def test_real_clips(model, shared, tmp_path):
    """Real files of other people: every one of them gives one row."""
    output = tmp_path / "clips.safetensors"
    given = [f"--checkpoint={model[0]}", f"--videos={shared / 'data' / 'clips' / 'clips.jsonl'}"]
    assert command.main([*given, f"--output={output}"]) == 0
    rows = safetensors.numpy.load_file(output)
    assert rows["video"].tolist() == list(range(35)) and np.isfinite(rows["clip"]).all()


def test_the_package_says_what_its_parts_are_for():
    assert all(
        f"{name}.py" in features.__doc__ for name in ("windows", "reading", "encoder", "store")
    )
