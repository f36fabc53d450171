"""Search: the right clips at the right seconds, and an index that follows the videos."""

import dataclasses
import html.parser
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from data.sound_files import tone, write_sound_file
from search import coloured
from search.coloured import COLOURS, colour_towers, film, make_run, save_weights

from invideo_jax import handover, sharding, workdir
from invideo_jax.data.modalities import TextSpec
from invideo_jax.data.sources import open_source
from invideo_jax.data.transforms import ClipSpec, load_clip
from invideo_jax.errors import UserError
from invideo_jax.features.reading import Reading
from invideo_jax.features.windows import Rule
from invideo_jax.search import __main__ as command
from invideo_jax.search import clips, gallery, indexing, opening
from invideo_jax.search.index import Entry, Index

HEARING = [
    f"stages.contrastive.{change}"
    for change in (
        "audio.name=audio_vit",
        "audio.size=Micro",
        "audio.seconds=2.0",
        "shared.fusion_width=16",
    )
]


@pytest.fixture(scope="module", autouse=True)
def _at_the_recipes():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of imported weights of a model that sees, hears and reads."""
    place = tmp_path_factory.mktemp("weights") / "model"
    save_weights(place, HEARING)
    return place


@pytest.fixture
def colours(monkeypatch):
    """Towers that know colours alone, so that the right answer is known; they need no parameters."""
    know_colours(monkeypatch)


def know_colours(monkeypatch):
    monkeypatch.setattr(opening, "make_towers", colour_towers)
    monkeypatch.setattr(opening.Opened, "params", {})
    monkeypatch.setattr(opening.Opened, "text_params", {})
    monkeypatch.setattr(opening.Opened, "filled", lambda self, params: params)


@pytest.fixture
def videos(tmp_path):
    place = tmp_path / "videos"
    place.mkdir()
    film(place / "a.mp4", "rgb")
    film(place / "b.mp4", "yb")
    return place


@pytest.fixture
def ask(model, videos, tmp_path, capsys):
    """Runs the command; gives the hits of each query as (file, start), and all that was printed."""

    def run(*given, seconds="1", code=0):
        arguments = [f"--checkpoint={model}", f"--videos={videos}", f"--seconds={seconds}"]
        arguments += ["--tokenizer=bytes", f"--index={tmp_path / 'index'}"]
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as caught:
                command.main([*arguments, *given])
            assert caught.value.code == code
            told = capsys.readouterr().err
            assert "Traceback" not in told
            return told
        assert command.main([*arguments, *given]) == 0
        told = capsys.readouterr().out
        return hits_in(told), told

    return run


def hits_in(told: str) -> list[tuple[str, float]]:
    row = re.compile(r"^ +\d+ .*?(\d+):([\d.]+) – \S+ +(\S.*)$", re.MULTILINE)
    return [(m[3], int(m[1]) * 60 + float(m[2])) for m in row.finditer(told)]


# ------------------------------------------------------------------------------------------------ answers


def test_the_clip_and_the_seconds_that_the_words_name(ask, colours):
    found, told = ask("red", "--top=2")
    assert found == [("a.mp4", 0.0), ("b.mp4", 0.0)]  # yellow is next to red
    assert "5 clips of 2 videos" in told and "2 new" in told
    found, told = ask("green", "blue sky", "--top=2")
    # Equal scores in the order of the videos; each query for itself; nothing is embedded again.
    assert found == [("a.mp4", 1.0), ("b.mp4", 0.0), ("a.mp4", 2.0), ("b.mp4", 1.0)]
    assert "indexing" not in told and "new" not in told


def test_whole_videos(ask, colours):
    found, told = ask("blue", seconds="0")
    assert found == [("b.mp4", 0.0), ("a.mp4", 0.0)] and "2 clips of 2 videos" in told


def test_queries_of_a_file(ask, colours, tmp_path):
    (tmp_path / "q.txt").write_text("# colours\nred\n\nblue\n")
    found, told = ask(f"--query_file={tmp_path / 'q.txt'}", "--top=1", "green")
    assert found == [("a.mp4", 1.0), ("a.mp4", 0.0), ("a.mp4", 2.0)]


def test_the_match_score_orders_the_best_anew(ask, colours):
    """It prefers blue, which is far from yellow; what is not judged stays behind."""
    found, told = ask("yellow", "--top=3", "--rerank=1")
    assert found[0] == ("b.mp4", 0.0) and told.count(" – ") == 5
    found, told = ask("yellow", "--top=3", "--rerank=5")
    assert found[:2] == [("a.mp4", 2.0), ("b.mp4", 1.0)] and "match" in told


def test_like_a_video(ask, colours, tmp_path):
    example = film(tmp_path / "green.mp4", "g")
    found, told = ask(f"--like={example}", "--top=1")
    assert found == [("a.mp4", 1.0)] and "like green.mp4" in told


def test_by_sound(ask, colours, videos):
    """Of loud, quiet and none: the loud one is as red as it gets, and what has no sound is not there."""
    for name, loud in (("loud", 0.9), ("quiet", 0.01)):
        sound = tone(2.0, 440, 16000, loud=loud)
        write_sound_file(str(videos / f"{name}.mkv"), sound)
    found, told = ask("red", "--by=audio", seconds="0")
    assert found == [("loud.mkv", 0.0), ("quiet.mkv", 0.0)]
    assert "2 videos cannot be found (no_sound 2)" in told
    found, _ = ask(f"--like={videos / 'quiet.mkv'}", "--by=audio", "--top=1", seconds="0")
    assert found == [("quiet.mkv", 0.0)]
    told = ask(f"--like={videos / 'a.mp4'}", "--by=audio", seconds="0", code=2)
    assert "must have sound" in told


@pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_real_towers_of_a_run(stored, tmp_path, videos, capsys, monkeypatch):
    """A workdir: cosines are those of the model applied to whole clips, and of the run's own way with texts.

    Without a stored checkpoint, whose reading others test and which takes long to compile, its parts are given.
    """
    made, params, source = make_run(tmp_path / "run", stored)
    if not stored:
        monkeypatch.setattr(opening.handover, "open_source", lambda spec, **_: source)
    given = [f"--checkpoint={tmp_path / 'run'}", f"--videos={videos}", "--seconds=0"]
    assert command.main([*given, "A red, ball!", f"--output={tmp_path / 'x.html'}"]) == 0
    printed = capsys.readouterr().out
    opened = opening.open_model(str(tmp_path / "run"), sharding.make_mesh())
    assert opened.about["step"] == 3 and (tmp_path / "run" / "search").is_dir()
    apply = lambda name, *x: made.apply({"params": params}, *x, method=name)["embedding"]
    run = jax.jit(apply, static_argnums=0)
    rng = np.random.default_rng(0)
    frames = [load_clip(str(videos / f"{n}.mp4"), opened.clip, rng)[0] for n in "ab"]
    video = run("encode_video", jnp.asarray(np.stack(frames)))
    text = "".join(map(chr, [1, *(b + 4 for b in b"a red ball"), 2]))
    ids = np.zeros((1, 24), np.int32)
    ids[0, : len(text)] = [ord(c) for c in text]
    words = run("encode_text", jnp.asarray(ids), jnp.arange(24)[None] < len(text))
    unit = lambda x: np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)
    scores = unit(video) @ unit(words)[0]
    lines = [re.search(rf"^ +\d +(-?[\d.]+) .*{n}.mp4$", printed, re.M)[1] for n in "ab"]
    assert np.abs(np.array(lines, float) - scores).max() < 1.1e-3


# ------------------------------------------------------------------------------------------------ index


def index_files(tmp_path):
    return sorted((tmp_path / "index").glob("*/part_*"))


def test_only_what_is_new_or_changed_is_embedded(ask, colours, videos, tmp_path):
    ask("red")
    first = index_files(tmp_path)
    before = [p.read_bytes() for p in first]
    film(videos / "c.mp4", "gr")
    film(videos / "b.mp4", "r")
    os.utime(videos / "b.mp4", (1, 1))
    found, told = ask("red", "--top=3")
    assert "1 new, 1 changed, 0 gone; 3 clips" in told
    assert found == [("a.mp4", 0.0), ("b.mp4", 0.0), ("c.mp4", 1.0)]
    (videos / "a.mp4").unlink()
    found, told = ask("red")
    assert "0 new, 0 changed, 1 gone; 0 clips" in told
    assert found == [("b.mp4", 0.0), ("c.mp4", 1.0), ("c.mp4", 0.0)]
    # Most of the first part is out of date: one part is left, of what there is.
    left = index_files(tmp_path)
    assert len(left) == 1 and before and "3 clips of 2 videos" in told


def test_a_killed_indexing_goes_on(ask, colours, videos, monkeypatch):
    film(videos / "c.mp4", "g")
    iterate = Reading.__iter__

    def killed(self):
        for item in iterate(self):
            if item.video == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(Reading, "__iter__", killed)
    with pytest.raises(AssertionError):  # of `ask`: the code is 130
        ask("red", "--save_seconds=0")
    monkeypatch.undo()
    know_colours(monkeypatch)
    found, told = ask("green", "--top=2")
    # The first was kept when the second began; of the second it was not known that it is whole.
    assert "indexing 2 videos" in told and found == [("a.mp4", 1.0), ("c.mp4", 0.0)]


def test_another_model_or_other_windows_are_another_index(ask, colours, videos, tmp_path):
    ask("red")
    for change in ("--size=16", "--crop=center"):
        assert "2 new" in ask("red", change)[1]
    assert "2 new" in ask("red", seconds="2")[1]
    assert len(list((tmp_path / "index").glob("*/index.json"))) == 4
    save_weights(tmp_path / "other", HEARING, seed=1)
    assert "2 new" in ask("red", f"--checkpoint={tmp_path / 'other'}")[1]


def test_a_damaged_part_is_made_again(ask, colours, tmp_path):
    ask("red")
    [part] = index_files(tmp_path)
    part.write_bytes(part.read_bytes()[:-40])
    found, told = ask("red", "--top=1")
    assert "1 parts of the index are damaged" in told and found == [("a.mp4", 0.0)]
    assert "are damaged" not in ask("red")[1]


def rows_of(numbers):
    count = len(numbers)
    x = np.eye(8, dtype=np.float32)[np.array(numbers) % 8]
    places = np.arange(count)
    return dict(embedding=x, video=places, window=places * 0, start=places * 0.0, end=places + 1.0)


def test_parts_become_one_and_a_kill_between_loses_nothing(tmp_path):
    index = Index(tmp_path, {"model": 1})
    for number in range(20):
        index.add({f"v{number}": Entry("s")}, rows_of([number]))
    index.add({"v3": Entry("t")}, rows_of([6]))
    keys = [f"v{number}" for number in range(19)]
    wanted = index.rows(keys)
    assert wanted.embedding[3, 6] == 1 and len(wanted) == 19
    kept = {p.name: p.read_bytes() for p in index.folder.glob("part_*")}
    assert index.tidy(keys) and len(list(index.folder.glob("part_*"))) == 1
    for name, content in kept.items():  # as if killed before the old ones were removed
        (index.folder / name).write_bytes(content)
    again = Index(tmp_path, {"model": 1})
    assert "v19" not in again.entries and again.entries["v3"].stamp == "t"
    for name in ("embedding", "video", "window", "start", "end"):
        assert np.array_equal(getattr(again.rows(keys), name), getattr(wanted, name))
    assert not Index(tmp_path, {"model": 2}).entries
    assert list(again.rows(["v5", "nowhere", "v3"]).video) == [0, 2]


def test_records_are_hashed_once(tmp_path):
    """Bytes are read to be known, but not while the source says that it is the same."""

    class Records:
        read, known, data = [], "one", {"x": b"1", "y": b"2"}

        def keys(self):
            return iter(self.data)

        def fingerprint(self):
            return self.known

        def __getitem__(self, number):
            self.read.append(number)
            return {"video": self.data["xy"[number]]}

    source, index = Records(), Index(tmp_path, {})
    listing = indexing.list_videos(source, index)
    assert listing.keys == ("x", "y") and source.read == [0, 1]
    index.add({k: Entry(s) for k, s in zip(listing.keys, listing.stamps)}, rows_of([0, 1]))
    index.saw("one")
    assert indexing.list_videos(source, index) == listing and source.read == [0, 1]
    source.known, source.data = "two", {"x": b"1", "y": b"3"}
    assert indexing._stale(index, indexing.list_videos(source, index)) == [1]


def test_one_writes_at_a_time(ask, colours, videos, tmp_path):
    ask("red")
    [place] = (tmp_path / "index").glob("*/")
    with workdir.Lock(place):
        assert hits_in(ask("red")[1])  # nothing to write, nothing to wait for
        film(videos / "c.mp4", "g")
        assert "Another process brings the index" in ask("red", code=2)


def test_numbers_that_are_none_are_never_kept(ask, monkeypatch, tmp_path):
    broken = lambda params, batch: {"embedding": jnp.full((8, 3), jnp.nan)}
    towers = lambda *given: dataclasses.replace(colour_towers(*given), video=broken)
    monkeypatch.setattr(opening, "make_towers", towers)
    assert "must be finite" in ask("red", code=2) and not index_files(tmp_path)


# ------------------------------------------------------------------------------------------------ gallery


class Tags(html.parser.HTMLParser):
    """All tags with their attributes, and all text outside the style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += "" if self.open[-1:] == ["style"] else data


def test_the_gallery_needs_nothing_else_and_escapes_all(ask, colours, videos, tmp_path):
    evil = "<script>alert('x')</script> & \"red\""
    rows = [{"path": "a.mp4", "captions": [evil]}, {"path": "b.mp4", "start": 1.0, "end": 2.0}]
    manifest = videos / "list.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "page.html"
    _, told = ask("r<b>&'red", "--top=4", f"--videos={manifest}", f"--output={output}")
    assert str(output) in told and "4 clips of 2 videos" in told
    page = Tags(output.read_text())
    assert not page.open
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "b" in names and "link" not in names
    assert page.words.count(evil) == 3 and "r<b>&'red" in page.words  # of a.mp4 alone
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert len(pictures) == 4
    assert all(a["src"].startswith("data:image/jpeg;base64,/9j/") for a in pictures)
    assert "http" not in output.read_text() and "url(" not in output.read_text()
    bars = [a["style"] for tag, a in page.tags if "width" in a.get("style", "")]
    assert bars[0] == "width:100.0%" and bars[-1] == "width:0.0%"
    assert "0:01.0 – 0:02.0" in page.words  # the part of b.mp4 keeps the seconds of the file
    assert "prefers-color-scheme: dark" in output.read_text()


def test_frames_shown_are_those_of_the_hit(videos):
    spec = ClipSpec(frames=4, size=32, sampling="middle", views=1, crop="resize", flip=0.0)
    rule = Rule(seconds=1.0)
    example = open_source(str(videos))[0]
    for number, colour in enumerate("rgb"):
        shown = clips.read_cut(example, number, rule, spec, pictures=True).pictures
        assert shown.shape[1:] == (144, 192, 3)
        assert np.abs(shown.mean((0, 1, 2)) - COLOURS[colour]).max() < 12
    picture = clips.strip(list(shown))
    assert picture.shape == (144, len(shown) * 192 + (len(shown) - 1) * 4, 3)
    assert clips.jpeg(picture)[:2] == b"\xff\xd8" and clips.jpeg(picture)[-2:] == b"\xff\xd9"


def test_seconds_are_written_as_clocks():
    assert [gallery.clock(x) for x in (0, 9.96, 59.97, 61.5, 3723.04)] == [
        "0:00.0", "0:10.0", "1:00.0", "1:01.5", "1:02:03.0",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "got no query"),
        (["  "], "A query must have words; got '  '"),
        (["?!"], "of which nothing is left"),
        (["red", "--like=nowhere.mp4"], "--like must be a video file"),
        (["red", "--query_file=nowhere"], "--query_file must be a readable"),
        (["red", "--output=x.txt"], "--output must end in .html"),
        (["red", "--top=0"], "--top must be at least 1"),
        (["red", "--by=smell"], "--by must be one of video, audio, audio_video"),
        (["red", "--by=audio_video"], "embeds audio_video; "),
        (["red", "--videos=nowhere"], "must exist"),
        (["red", "--tokenizer="], "Give --tokenizer=FOLDER"),
        (["red", "--index={videos}/x"], "must not lie among the videos"),
        (["red", "--tops=1"], 'Did you mean "--top"'),
    ],
)
def test_mistakes_are_told_without_a_traceback(given, message, ask, videos):
    told = ask(*[x.format(videos=videos) for x in given], code=2)
    assert message in told


def test_videos_that_cannot_be_read_are_listed(ask, colours, videos, tmp_path):
    (videos / "bad.mp4").write_text("no video")
    found, told = ask("red")
    assert "1 videos cannot be found (not_video 1)" in told and len(found) == 5
    [file] = (tmp_path / "index").glob("*/bad.jsonl")
    assert json.loads(file.read_text())["video"].endswith("bad.mp4#0.0-")
    assert "indexing" not in ask("red")[1]
    for name in ("a.mp4", "b.mp4"):
        (videos / name).write_text("no")
    assert "none of the 3 could be read" in ask("red", code=2)


def test_a_stage_without_words_is_named(tmp_path, videos, capsys):
    """Only the meta is looked at."""
    config = coloured.config_lib.load("configs/quickstart.py:smoke").config
    meta = dict(config=config.to_dict(), stage="masked", epoch_examples=100)
    source = handover.Source({}, {}.get, {"name": "run"}, meta)
    with pytest.raises(UserError, match="of the stage 'masked'.*contrastive"):
        opening._of_run(source, "run", "")


def test_queries_that_are_too_long_or_strange(ask, colours, model):
    _, told = ask("red " * 20, "--top=1")
    assert "longer than the 32 tokens" in told and "cut to 'red red" in told
    opened = opening.open_model(str(model), sharding.make_mesh(), tokenizer="bytes")
    assert opened.words.unknown("red ☃") == [] and opened.words.cut("red") == ""


def test_words_that_the_tokenizer_lacks_are_said(ask, colours, monkeypatch, tmp_path):
    pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "ball"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    read = opening.Words(TextSpec(str(tmp_path / "vocab.txt"), 8, (), normalise="internvideo2"))
    assert read.unknown("Red zebra, ball; okapi") == ["zebra", "okapi"]
    monkeypatch.setattr(opening.Words, "unknown", lambda self, text: ["zebra"])
    assert "does not know 'zebra' of 'red zebra'" in ask("red zebra")[1]
