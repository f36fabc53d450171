"""Features on disk: bits, resuming, other teachers, missing and damaged parts."""

import ml_dtypes
import numpy as np
import pytest

from invideo_jax import feature_store
from invideo_jax.errors import UserError

FACTS = {"teacher": "one", "clip": {"size": 32}}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {
        "middle": rng.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "final": rng.standard_normal(5).astype(np.float32),
    }


def fill(folder, ids, **options):
    with feature_store.Writer(folder, FACTS, part_bytes=200, **options) as writer:
        for i in ids:
            writer.add(f"clip{i}", arrays(i))
            writer.reached = {"steps": i + 1}
    return writer


def test_bits_return(tmp_path):
    fill(tmp_path, range(7))
    assert len(list(tmp_path.glob("part-*"))) == 3
    rows = feature_store.Reader(tmp_path, FACTS).rows(["clip4", None, "clip0"])
    for row, seed in ((0, 4), (2, 0)):
        for name, want in arrays(seed).items():
            assert rows[name].dtype == want.dtype
            assert rows[name][row].tobytes() == want.tobytes()
    assert not rows["middle"][1].any() and not rows["final"][1].any()


def test_a_stopped_writer_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with feature_store.Writer(tmp_path, FACTS, part_bytes=200) as writer:
            for i in range(5):
                writer.add(f"clip{i}", arrays(i))
                writer.reached = {"steps": i + 1}
            raise KeyboardInterrupt
    again = feature_store.Writer(tmp_path, FACTS)
    assert again.done == {"clip0", "clip1", "clip2"} and again.reached == {"steps": 2}
    writer = fill(tmp_path, range(6))
    assert len(writer.done) == 6
    assert len(feature_store.Reader(tmp_path, FACTS)) == 6
    assert sorted(p.name for p in tmp_path.iterdir())[0] == "facts.json"  # nothing half-written


def test_several_writers_share_a_folder(tmp_path):
    fill(tmp_path, (0, 2), name="0of2")
    fill(tmp_path, (1, 3), name="1of2")
    assert feature_store.Reader(tmp_path, FACTS).missing(f"clip{i}" for i in range(5)) == ["clip4"]


def test_features_of_something_else_are_refused(tmp_path):
    fill(tmp_path, (0,))
    other = FACTS | {"teacher": "two"}
    for open_it in (feature_store.Reader, feature_store.Writer):
        with pytest.raises(UserError, match="same teacher; they are of teacher='one'.*'two'"):
            open_it(tmp_path, other)
    with pytest.raises(UserError, match="same clip"):
        feature_store.Reader(tmp_path, FACTS | {"clip": {"size": 64}})
    with pytest.raises(UserError, match="same shapes and types"):
        with feature_store.Writer(tmp_path, FACTS) as writer:
            writer.add("other", {"final": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="holds no facts.json"):
        feature_store.Reader(tmp_path / "nowhere", FACTS)


def test_a_missing_example_is_named(tmp_path):
    fill(tmp_path, (0,))
    with pytest.raises(UserError, match="it has 1, but not 'clip7' and 1 more of this batch"):
        feature_store.Reader(tmp_path, FACTS).rows(["clip7", "clip0", "clip8"])


def test_a_damaged_part_is_named(tmp_path):
    fill(tmp_path, range(4))
    part = sorted(tmp_path.glob("part-*"))[0]
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"{part.name} is damaged.*Delete it"):
        feature_store.Reader(tmp_path, FACTS)
    part.unlink()
    fill(tmp_path, range(4))
    assert len(feature_store.Reader(tmp_path, FACTS)) == 4
