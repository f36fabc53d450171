"""Real clips by their captions: tokenizer, two short stages, evaluation, search, gallery (docs/real_clips.md)."""

import html
import json
import re

import pytest
from conftest import REPOSITORY

from invideo_jax import evaluate, runtime, tokenizer, train
from invideo_jax.search import __main__ as search

pytestmark = (
    pytest.mark.slow
)  # a minute and a half: decodes 35 clips of up to 40 s, compiles two stages


@pytest.fixture
def listed(shared, tmp_path):
    """Rows of a list of the clips, in which every third is held out, and the options that open it."""
    folder = shared / "data" / "clips"
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["file"] = str((folder / row["file"]).resolve())
        row["split"] = "validation" if number % 3 == 2 else "train"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "clips.jsonl").write_text(text)
    return rows, tmp_path / "clips.jsonl", folder.resolve()


def test_from_captions_to_a_gallery(listed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "start", lambda *_: None)  # must come before JAX is used at all
    monkeypatch.chdir(REPOSITORY)
    (rows, manifest, folder), words = listed, tmp_path / "words.model"
    learn = [f"--data={manifest}", f"--output={words}", "--vocabulary=200"]
    assert tokenizer.main([*learn, f"--roots={folder}"]) == 0

    workdir, stage = tmp_path / "run", "--config.stages.contrastive"
    given = [f"--config={REPOSITORY / 'configs/real_clips.py'}:smoke", f"--workdir={workdir}"]
    given += [f"--config.data.train={manifest}", f"--config.data.roots={folder}"]
    given += [f"{stage}.text.tokenizer={words}", f"{stage}.text.vocabulary=200"]
    given += [f"{stage}.text.first=2", f"{stage}.text.mask=4", "--config.stages.masked.length=4"]
    given += [f"{stage}.length=4", "--config.evals.retrieval.examples=100"]
    assert train.main(given) == 0
    assert "24 videos" in (said := capsys.readouterr().out) and "11 held out" in said

    # The held-out captions, ranked by the evaluation and by the search: the same.
    assert evaluate.main([f"--workdir={workdir}"]) == 0
    (file,) = workdir.glob("evaluation_*.json")
    found = json.loads(file.read_text())
    held = [row for row in rows if row["split"] == "validation"]
    assert found["retrieval/examples"] == found["retrieval/texts"] == len(held) == 11
    assert found["retrieval/chance_r1"] == pytest.approx(1 / 11)
    look = [f"--checkpoint={workdir}", f"--videos={manifest}", f"--roots={folder}"]
    look += ["--split=validation", "--seconds=0", f"--output={tmp_path / 'gallery.html'}"]
    assert search.main([*look, *(row["caption"] for row in held)]) == 0
    page = (tmp_path / "gallery.html").read_text()
    ranks = []
    for row, section in zip(held, page.split("<section ")[1:], strict=True):
        names = re.findall(r"title='([^']*)'", section)
        assert len(names) == len(held) and section.count("data:image/") == len(held)
        assert html.escape(row["caption"]) in section
        ranks.append(1 + [html.unescape(name) for name in names].index(row["file"]))
    # Scores that differ in the last digits only may stand in another order.
    assert found["retrieval/text_video_mean_rank"] == pytest.approx(sum(ranks) / 11, abs=0.3)


def test_the_list_of_the_clips_needs_no_conversion(shared, tmp_path, capsys):
    """Its columns are `file` and `caption`, and it has no splits."""
    folder = shared / "data" / "clips"
    output = tmp_path / "words.model"
    texts, _ = tokenizer.collect(str(folder / "clips.jsonl"), kinds=("video", "speech"))
    assert len(texts) == 35 + 1
    assert tokenizer.main([f"--data={folder / 'clips.jsonl'}", f"--output={output}"]) == 0
    assert "from 36 texts" in capsys.readouterr().out
