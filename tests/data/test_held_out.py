"""The evaluation sources of a run: held-out rows, a list of its own, and what is an error."""

import json

import pytest
from small_videos import write_videos

from configs import common
from invideo_jax import build
from invideo_jax.data.sources import NoSuchSplit, SourceError


@pytest.fixture
def sources(tmp_path):
    """A function of (rows of train, rows of eval or None) -> (training, evaluation sources)."""
    write_videos(tmp_path, 3)

    def open_both(train, held_out=None, **data):
        config = common.base()
        for key, rows in {"train": train, "eval": held_out}.items():
            if rows is not None:
                path = tmp_path / f"{key}.jsonl"
                path.write_text("\n".join(map(json.dumps, rows)))
                config.data[key] = str(path)
        config.data.update(data)
        opened, _ = build.train_sources(config)
        return opened, build.held_out_sources(config, opened)

    return open_both


def rows(*places):
    keys = ("path", "split", "label")
    return [dict(zip(keys, place)) for place in places]


def test_held_out_rows_of_the_training_list(sources):
    _, found = sources(rows(("clip_000.mp4", "train"), ("clip_001.mp4", "val")))
    assert [source[0]["id"] for source in found] == ["clip_001.mp4"]
    assert sources(rows(("clip_000.mp4", "train"), ("clip_001.mp4", "test")))[1] == []
    assert sources(rows(("clip_000.mp4",), ("clip_001.mp4",)))[1] == []  # no splits: nothing apart


def test_only_a_missing_split_means_none_held_out(sources):
    train = rows(("clip_000.mp4", "train"), ("gone.mp4", "validation"))
    with pytest.raises(SourceError, match="1 missing"):  # and not silently none
        sources(train)
    with pytest.raises(NoSuchSplit):  # asked for by name
        sources(train, rows(("clip_001.mp4", "test")))


def test_a_list_of_its_own_counts_labels_as_the_training_list(sources):
    train = rows(("clip_000.mp4", "train", "ant"), ("clip_001.mp4", "train", "zebra"))
    _, (found,) = sources(train, rows(("clip_002.mp4", "validation", "zebra")))
    assert found[0]["label"] == 1 and found.classes == ("ant", "zebra")
