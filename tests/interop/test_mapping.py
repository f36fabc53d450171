"""Rows of every kind, both ways, on a table made up here."""

import ml_dtypes
import numpy as np
import pytest

from invideo_jax.errors import UserError
from invideo_jax.interop import mapping, names
from invideo_jax.interop.names import rows as r

ROWS = (
    r.Row("table.position_ids", ("positions",), buffer="arange"),
    r.Row("table.weight", ("words",)),
    r.Row("positions", ("positions",)),
    *r.linear("layer.{i}.fc", "first/fc"),
    r.Row("layer.{i}.shared", ("bias_table",), tied=True),
    *[
        r.dataclasses.replace(row, after="first/fc/kernel")
        for row in r.linear("layer.{i}.fc", "second/fc")
    ],
    *r.linear("heads.{i}.head.0", "heads/fc"),
    r.Row("out.weight", ("words",), tied=True),
    r.Row("bn.count", ("words",), buffer="count"),
    r.Row("qkv.weight", ("q", "k", "v"), "linear"),
    r.Row("conv", ("conv",), "kernel"),
    r.Row("table4", ("table4",), "table4"),
    r.Row("temp", ("temp",), optional=True),
)


@pytest.fixture(autouse=True)
def layout(monkeypatch):
    table = names.Layout(ROWS, aliases=((r"\.gamma$", ".weight"),))
    monkeypatch.setitem(names.LAYOUTS, "made_up", table)


def state():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    found = {"table.position_ids": np.arange(6)[None], "table.weight": draw(5, 4)}
    found["positions"] = draw(6, 4)
    shared = draw(3, 2)
    for i in range(5):
        found |= {f"layer.{i}.fc.weight": draw(3, 4 if i < 2 else 2), f"layer.{i}.fc.bias": draw(3)}
        if i < 2:
            found[f"layer.{i}.shared"] = shared
    for i in range(3):
        found |= {f"heads.{i}.head.0.weight": draw(2, 4), f"heads.{i}.head.0.bias": draw(2)}
    found |= {"out.weight": found["table.weight"], "bn.count": np.zeros((), np.int64)}
    found |= {"qkv.weight": draw(6, 3), "conv": draw(4, 1, 3, 5, 7)}
    return found | {"table4": draw(1, 1, 6, 4), "temp": draw()}


SHAPES = {
    "positions": (6, 4), "words": (5, 4), "first/fc/kernel": (2, 4, 3), "first/fc/bias": (2, 3),
    "second/fc/kernel": (3, 2, 3), "second/fc/bias": (3, 3), "heads/fc/kernel": (3, 4, 2),
    "heads/fc/bias": (3, 2), "q": (3, 2), "k": (3, 2), "v": (3, 2), "conv": (3, 5, 7, 1, 4),
    "table4": (6, 4), "temp": (), "bias_table": (3, 2),
}  # fmt: skip


def read(found, shapes=SHAPES):
    leaves = mapping.to_leaves(found, layout="made_up", expected=shapes)
    return {path: value.read() for path, value in leaves.items()}


def test_every_kind_of_row_comes_back_bit_for_bit():
    given = state()
    params = read(given)
    assert {path: x.shape for path, x in params.items()} == SHAPES
    np.testing.assert_array_equal(params["second/fc/kernel"][2], given["layer.4.fc.weight"].T)
    np.testing.assert_array_equal(params["heads/fc/bias"][1], given["heads.1.head.0.bias"])
    np.testing.assert_array_equal(params["k"], given["qkv.weight"][2:4].T)
    np.testing.assert_array_equal(params["conv"][1, 2, 3, 0, 2], given["conv"][2, 0, 1, 2, 3])
    back = mapping.to_state(params, layout="made_up", cube=(1, 1, 1))
    assert list(back) == list(given)
    for key, value in given.items():
        again = back[key]
        assert (again.shape, again.dtype) == (value.shape, value.dtype), key
        assert again.read().tobytes() == value.tobytes(), key
    part = back["layer.3.fc.weight"].rows(1, 3)
    np.testing.assert_array_equal(part, given["layer.3.fc.weight"][1:3])


def test_copies_and_buffers_may_be_absent_but_not_differ():
    given = state()
    absent = {k: v for k, v in given.items() if k not in ("out.weight", "table.position_ids")}
    np.testing.assert_array_equal(read(absent)["words"], given["table.weight"])
    with pytest.raises(UserError, match="out.weight must hold the same numbers"):
        read(given | {"out.weight": given["out.weight"] + 1})
    with pytest.raises(UserError, match="layer.1.shared must hold the same numbers"):
        read(given | {"layer.1.shared": given["layer.1.shared"] + 1})
    with pytest.raises(UserError, match="table.position_ids must be the fixed array"):
        read(given | {"table.position_ids": np.arange(6)[None] + 1})
    read(given | {"bn.count": np.asarray(7)})  # any number of batches


def test_mistakes_are_named():
    given = state()
    spelt = given | {"qkv.gamma": given["qkv.weight"]}
    with pytest.raises(UserError, match="one key in two spellings"):
        read(spelt)
    with pytest.raises(UserError, match="qkv.weight holds 3 equal arrays"):
        read(given | {"qkv.weight": np.zeros((7, 3), np.float32)})
    with pytest.raises(UserError, match="conv must have|equal shapes"):
        read(given | {"conv": np.zeros((4, 1), np.float32)})
    with pytest.raises(UserError, match="must have 4 dimensions"):
        read(given | {"table4": np.zeros((6, 4), np.float32)})
    with pytest.raises(UserError, match=r"Missing: layer.5.fc.bias, layer.5.fc.weight"):
        read(given, SHAPES | {"second/fc/kernel": (4, 2, 3), "second/fc/bias": (4, 3)})


def test_bfloat16_stays_bfloat16():
    given = {
        k: v if v.dtype == np.int64 else v.astype(ml_dtypes.bfloat16) for k, v in state().items()
    }
    assert {x.dtype for x in read(given).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_prefixes_for_a_model_inside_another():
    inside = r.prefixed(ROWS, "vision_encoder.", "vision/")
    assert inside[3].theirs == "vision_encoder.layer.{i}.fc.weight"
    assert inside[3].ours == ("vision/first/fc/kernel",)
    assert inside[6].after == "vision/first/fc/kernel" and inside[0].after == ""
    assert all(row.optional for row in r.optional(ROWS))
