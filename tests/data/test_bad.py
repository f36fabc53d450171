"""Stand-ins for bad videos are a pure function; the ledger counts files once and stops in time."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invideo_jax.data.bad import BadLedger, TooManyBad, stand_ins


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**40), n=st.integers(1, 50), data=st.data())
def test_stand_ins_are_all_others_once(seed, n, data):
    record = data.draw(st.integers(0, n - 1))
    drawn = list(stand_ins(seed, record, n))
    assert sorted([record, *drawn]) == list(range(n))
    assert drawn == list(stand_ins(seed, record, n))


def test_stand_ins_depend_on_seed_and_record():
    first = [next(stand_ins(0, record, 1000)) for record in range(100)]
    assert len(set(first)) > 90  # one bad file's place isn't always taken by the same good one
    assert first != [next(stand_ins(1, record, 1000)) for record in range(100)]


def row(*failed):
    return {"failed": [dict(path=p, id=p, reason=r, detail="d") for p, r in failed]}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_file_is_listed_and_counted_once(tmp_path, caplog):
    path = tmp_path / "run" / "bad_examples.jsonl"
    ledger = BadLedger(path)
    ledger.observe([row(("a", "empty")), row(), row(("b", "empty"), ("c", "not_video"))])
    ledger.observe([row(("a", "empty")), row()])
    assert [(r["path"], r["reason"], r["detail"]) for r in lines(path)] == [
        ("a", "empty", "d"),
        ("b", "empty", "d"),
        ("c", "not_video", "d"),
    ]
    assert dict(ledger.counts) == {"empty": 2, "not_video": 1}
    assert (ledger.count, ledger.seen, ledger.share) == (3, 5, 3 / 5)
    assert caplog.text.count("Bad video a") == 1


def test_what_is_used_all_the_same_is_listed_but_not_bad(tmp_path, caplog):
    path = tmp_path / "bad.jsonl"
    cut = dict(path="a", id="a", truncated=True, fallback=True, padded=2)
    for _ in range(2):  # a second start lists nothing again
        ledger = BadLedger(path, max_share=0.0, min_count=0)
        ledger.observe([cut, cut | {"truncated": False}, row()])
        ledger.observe([cut])
        assert ledger.notes == {"truncated": 1, "fallback": 3, "padded": 3}
        assert (ledger.count, ledger.seen, ledger.counts) == (0, 4, {})
    assert [(r["path"], r["reason"], r["detail"]) for r in lines(path)] == [
        ("a", "truncated", "used up to the cut")
    ]
    assert caplog.text.count("Video a is cut short") == 2
    BadLedger(path).observe([row(("a", "empty"))])  # worse than it was
    assert [r["reason"] for r in lines(path)] == ["truncated", "empty"]


def test_a_resumed_run_lists_nothing_twice_and_ends_a_cut_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    BadLedger(path).observe([row(("a", "empty"))])
    path.write_text(path.read_text() + '{"path": "b", "id": "b", "rea')  # killed while writing
    ledger = BadLedger(path)
    assert ledger.count == 0  # may have been repaired: counts once it is met again
    ledger.observe([row(("a", "empty")), row(("b", "empty"))])
    text = path.read_text().splitlines()
    assert (
        len(text) == 3 and json.loads(text[0])["path"] == "a" and json.loads(text[2])["path"] == "b"
    )
    assert ledger.count == 2


def test_a_ledger_apart_counts_for_itself_and_lists_nothing_twice(tmp_path):
    path = tmp_path / "bad.jsonl"
    ledger = BadLedger(path, max_share=0.0, min_count=1)
    other = ledger.apart()
    other.observe([row(("a", "empty")), row(("b", "empty"))])
    ledger.observe([row(("a", "empty"))])
    other.found_hanging("f#3", dict(path="c", id="c", reason="hanging", detail="d"))
    assert [r["path"] for r in lines(path)] == ["a", "b", "c"]
    assert (other.count, ledger.count) == (2, 1) and ledger.hanging == {"f#3": "c"}


def test_stops_above_share_and_count():
    ledger = BadLedger(None, max_share=0.1, min_count=5)
    ledger.observe([row((f"{i}", "empty")) for i in range(5)])  # all bad, yet only min_count
    ledger.observe([row()] * 44)
    ledger.observe([row(("5", "truncated"))] + [row()] * 10)  # 6 of 60: the share itself is allowed
    with pytest.raises(TooManyBad) as error:
        ledger.observe([row(("6", "truncated"))])  # 7 of 61
    text = str(error.value)
    assert "At most 10.00%" in text and "7 bad of 61" in text and "empty 5, truncated 2" in text
    assert "  0: empty (d)" in text and "invideo_jax.data.scan" in text and "data.bad_share" in text


def test_message_names_ten_files():
    ledger = BadLedger(None, max_share=0.0, min_count=11)
    with pytest.raises(TooManyBad) as error:
        ledger.observe([row((f"file{i:02d}", "empty")) for i in range(12)])
    assert "file09" in str(error.value) and "file10" not in str(error.value)


def test_epochs_dont_thin_out_the_share():
    """3 of 10 files are bad: after ten epochs that is still 30 %, not 3 of 100."""
    ledger = BadLedger(None, max_share=0.5, min_count=0, total=10)
    for _ in range(10):
        ledger.observe([row((f"{i}", "empty")) for i in range(3)] + [row()] * 7)
    assert ledger.share == 0.3


def test_share_of_one_never_stops():
    BadLedger(None, max_share=1.0, min_count=0).observe([row((f"{i}", "empty")) for i in range(50)])


@pytest.mark.parametrize("wrong", [dict(max_share=1.5), dict(max_share=-0.1), dict(min_count=-1)])
def test_wrong_limits(wrong):
    with pytest.raises(ValueError, match="max_share must be in"):
        BadLedger(None, **wrong)
