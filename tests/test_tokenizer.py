"""One command makes a tokenizer of any source's captions, the same each time; mistakes say what would do."""

import json
import re

import pytest

from invideo_jax import tokenizer
from invideo_jax.data import synthetic
from invideo_jax.data.pieces import train_pieces
from invideo_jax.data.prepare import prepare
from invideo_jax.data.sources import open_source
from invideo_jax.data.text import open_tokenizer
from invideo_jax.errors import UserError

SCRIPTS = [
    "\u7ea2\u7403\u5f39\u8df3",
    "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043c\u044f\u0447",
    "\u0643\u0631\u0629 \u062d\u0645\u0631\u0627\u0621",
    "a \U0001f534 ball",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A list with captions of 150 clips of the built-in dataset, the files themselves empty."""
    folder = tmp_path_factory.mktemp("clips")
    rows = [synthetic.clip_row(synthetic.Settings(), i) for i in range(150)]
    for row in rows:
        row["path"] = row["id"] + ".mp4"
        (folder / row["path"]).write_bytes(b"x")
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "m.jsonl"


def run(*arguments, code=0):
    try:
        assert tokenizer.main([str(a) for a in arguments]) == code
    except SystemExit as error:
        assert error.code == code


def test_one_command_makes_a_tokenizer(clips, tmp_path, capsys):
    run(f"--data={clips}", f"--output={tmp_path / 'a.model'}", "--vocabulary=200")
    said = capsys.readouterr().out
    assert "text.pad=0 --config.stages.STAGE.text.first=2 --config.stages.STAGE.text.mask=4" in said
    tok = open_tokenizer(tmp_path / "a.model")
    assert (tok.vocabulary, tok.pad, tok.first, tok.last, tok.mask) == (200, 0, 2, 3, 4)
    assert tok.pieces(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert re.search(r"a.model: 200 tokens from \d{3} texts", said)
    assert "known: 100.00%" in said
    # The printed figures against a plain count.
    texts, _ = tokenizer.collect(str(clips), kinds=tuple(tokenizer.KINDS))
    lengths = sorted(int(tok([t], 200)[1].sum()) for t in texts)
    assert f"{sum(lengths) / len(lengths):.1f} on average" in said
    assert f"{lengths[-1]} at most" in said
    longest = int(re.search(r"(\d+) or fewer in 99 %", said)[1])
    assert abs(longest - lengths[int(0.99 * (len(lengths) - 1))]) <= 1
    assert texts[0] in said


def test_the_same_command_gives_the_same_file(clips, tmp_path, capsys):
    for name in ("a.model", "b.model", "a.model"):
        run(f"--data={clips}", f"--output={tmp_path / name}", "--vocabulary=150")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    before = (tmp_path / "a.model").read_bytes()
    run(f"--data={clips}", f"--output={tmp_path / 'a.model'}", "--vocabulary=160", code=2)
    assert "holds another tokenizer" in capsys.readouterr().err
    assert (tmp_path / "a.model").read_bytes() == before


def test_only_the_asked_kinds_and_split_are_read(clips):
    source = open_source(str(clips), split="train")
    examples = [source[i] for i in range(len(source))]
    assert 100 < len(examples) < 150
    texts, notes = tokenizer.collect(str(clips), kinds=("audio", "speech"))
    wanted = [t for e in examples for t in (*e["audio_captions"], e["transcript"])]
    assert sorted(texts) == sorted(wanted) and any("split train" in note for note in notes)
    held, _ = tokenizer.collect(str(clips), kinds=("video",), split="validation")
    assert 0 < len(held) == 4 * len(open_source(str(clips), split="validation"))


def test_several_sources_and_packed_ones(clips, tmp_path):
    prepare(str(clips), tmp_path / "out")
    texts, _ = tokenizer.collect(str(clips), kinds=("video",))
    both, _ = tokenizer.collect(f"{clips};arrayrecord:{tmp_path / 'out'},0.5", kinds=("video",))
    assert both == texts + texts


def test_unreadable_examples_are_counted(clips, tmp_path):
    rows = [{"path": f"{i}.mp4", "caption": f"a ball number {i}"} for i in range(9)]
    for i in range(7):
        (tmp_path / f"{i}.mp4").write_bytes(b"x")
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, notes = tokenizer.collect(str(tmp_path / "m.jsonl"), kinds=("video",))
    assert len(texts) == 7 and any("2 of 9 examples could not be read" in note for note in notes)


def test_a_vocabulary_too_large_says_the_largest_that_works(clips, tmp_path, capsys):
    run(f"--data={clips}", f"--output={tmp_path / 'a.model'}", "--vocabulary=9000", code=2)
    said = capsys.readouterr().err
    largest = int(re.search(r"Ask for (\d+) or fewer", said)[1])
    assert f"give {largest} tokens at most" in said and not (tmp_path / "a.model").exists()
    run(f"--data={clips}", f"--output={tmp_path / 'a.model'}", f"--vocabulary={largest}")
    run(
        f"--data={clips}", f"--output={tmp_path / 'b.model'}", f"--vocabulary={largest + 1}", code=2
    )
    run(f"--data={clips}", f"--output={tmp_path / 'c.model'}")  # none asked for: the largest
    assert (tmp_path / "c.model").read_bytes() == (tmp_path / "a.model").read_bytes()


def test_a_vocabulary_too_small_says_what_is_needed(clips):
    with pytest.raises(UserError, match=r"so many that (\d+) tokens are needed") as error:
        train_pieces(SCRIPTS * 5, 20)
    least = int(re.search(r"that (\d+) tokens", str(error.value))[1])
    assert train_pieces(SCRIPTS * 5, least + 1)
    with pytest.raises(UserError, match="16 tokens or more; got vocabulary=3"):
        train_pieces(SCRIPTS, 3)
    with pytest.raises(UserError, match=r"coverage must be in \[0.9, 1\]; got coverage=2"):
        train_pieces(SCRIPTS, coverage=2)


def test_captions_in_any_script_are_known_and_come_back(tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(train_pieces(SCRIPTS * 3))
    tok = open_tokenizer(path)
    for text in SCRIPTS:
        assert 1 not in tok.encode(text) and tok.decode(tok([text], 64)[0][0]) == text


def test_hostile_captions_train_too(tmp_path):
    texts = ["", "\x00", "\ud800", "a" * 50_000, "word " * 10_000, *SCRIPTS, "[MASK] [SEP]"]
    path = tmp_path / "x.model"
    path.write_bytes(train_pieces(texts))
    tok = open_tokenizer(path)
    assert not {0, 2, 3, 4} & set(tok.encode("[MASK] [SEP] [PAD] [CLS]"))
    with pytest.raises(UserError, match="at least one caption; got none"):
        train_pieces(["", " ", "\x00"])


def test_lowercase_reads_capitals_as_small(tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(train_pieces(["A Red Ball", "two RED balls"] * 3, lowercase=True))
    tok = open_tokenizer(path)
    assert tok.encode("RED Ball") == tok.encode("red ball") and 1 not in tok.encode("RED Ball")
    path.write_bytes(train_pieces(["A Red Ball", "two RED balls"] * 3))
    assert open_tokenizer(path).encode("RED Ball") != open_tokenizer(path).encode("red ball")


def test_show_prints_pieces(clips, tmp_path, capsys):
    run(f"--data={clips}", f"--output={tmp_path / 'a.model'}", "--vocabulary=200")
    capsys.readouterr()
    run(f"--show={tmp_path / 'a.model'}", "a circle \u7403")
    said = capsys.readouterr().out
    tok = open_tokenizer(tmp_path / "a.model")
    ids = tok.encode("a circle \u7403")
    assert f"{len(ids)} tokens" in said and "[UNK]" in said
    assert [int(n) for n in re.findall(r"^ +(\d+)  ", said, re.M)] == ids


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--dat=x"], 'Did you mean "--data"'),
        ([], "--data and --output are required"),
        (["--show=x.model"], "--show needs a text"),
        (["--data={m}", "--output=x.bin"], "must end in .model; got --output=x.bin"),
        (["--data={m}", "--output=x.model", "--kinds=vidio"], 'Did you mean "video"'),
        (["--data={m}", "--output=x.model", "--kinds=,"], "at least one of video, audio"),
        (
            ["--data={m}", "--output=x.model", "--kinds=audio_video"],
            "none of the kinds audio_video, but",
        ),
        (["--data=nowhere.csv", "--output=x.model"], "must exist"),
        (["--data={m}", "--output=x.model", "--split=tset"], 'no split "tset"'),
        (["--data={m}", "--output=x.model", "stray"], "unrecognized arguments: stray"),
        (["--show=nothing.model", "a"], "nothing at 'nothing.model'"),
    ],
)
def test_mistakes_are_told_in_one_line(clips, capsys, arguments, words):
    run(*(a.replace("{m}", str(clips)) for a in arguments), code=2)
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("error: ") and "Traceback" not in said.err
