"""Files of weights: every form, wrappers and prefixes, damage, and files that try to run something."""

import argparse
import collections
import io
import json
import pathlib
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from invideo_jax.errors import UserError
from invideo_jax.interop import reading, safetensors_io, torch_zip

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.normal(size=(3, 4, 5)).astype(np.float32),
    "half": RNG.normal(size=(4, 3)).astype(np.float16),
    "brain": RNG.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
    "number": np.asarray(0.07, np.float32),
    "count": np.asarray(3, np.int64),
    "none": np.zeros((0, 4), np.float32),
}


def equal(found, wanted):
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        got = found[key].read()
        assert (got.shape, got.dtype) == (value.shape, value.dtype), key
        assert got.tobytes() == value.tobytes(), key


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_what_is_written_is_read(tmp_path, kind):
    file = tmp_path / f"x.{kind}"
    (safetensors_io if kind == "safetensors" else torch_zip).write(file, ARRAYS)
    equal(reading.open_weights(file).state, ARRAYS)
    np.testing.assert_array_equal(
        reading.open_weights(file).state["a"].rows(1, 3), ARRAYS["a"][1:3]
    )


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    torch_zip.write(tmp_path / "x.pth", ARRAYS)
    found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
    assert type(found) is collections.OrderedDict and list(found) == list(ARRAYS)
    for key, value in ARRAYS.items():
        assert found[key].shape == value.shape
        np.testing.assert_array_equal(found[key].float().numpy(), value.astype(np.float32))
    assert found["brain"].dtype == torch.bfloat16 and found["count"].dtype == torch.int64


def test_every_tensor_of_torch_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = dict(
        whole=whole,
        part=whole[1:3],
        turned=whole.T,
        steps=whole[:, 1::2],
        again=whole,
        parameter=torch.nn.Parameter(torch.ones(2)),
        brain=torch.randn(3, 2).bfloat16(),
        small=torch.ones(2, dtype=torch.uint8),
        unsigned=torch.ones(2, dtype=torch.uint16),
        truth=torch.tensor([True, False]),
        number=torch.tensor(2.0),
        spread=torch.zeros(1).expand(3, 2),
    )
    more = dict(
        epoch=3, args=argparse.Namespace(lr=0.1), sizes={"x": whole.shape}, kind=torch.float16
    )
    torch.save({"model": tensors, **more}, tmp_path / "x.pth")
    weights = reading.open_weights(tmp_path / "x.pth")
    for key, value in tensors.items():
        got = weights.state[key].read()
        want = value.detach()
        want = want.float().numpy().astype(ml_dtypes.bfloat16) if key == "brain" else want.numpy()
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want, err_msg=key)
    assert weights.notes[0] == "taken from the entry 'model'"
    assert weights.notes[1] == "left alone beside it: epoch, args, sizes, kind"


def test_module_state_is_read_with_its_metadata(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save({"module": {"model": module.state_dict()}}, tmp_path / "x.pt")
    weights = reading.open_weights(tmp_path / "x.pt")
    assert list(weights.state) == list(module.state_dict())
    assert weights.state["1.num_batches_tracked"].dtype == np.int64


# ---- a torch file made by hand, without torch -----------------------------------------------------


def torch_file(path, pickled: bytes, members=(), compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in members:
            archive.writestr(f"x/{name}", data)
    return path


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path(self.target),))


class Exec:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({str(self.target)!r}, 'w')",))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("kind", [Evil, Exec])
def test_no_program_in_a_file_is_run(tmp_path, kind, protocol):
    target = tmp_path / "made"
    pickled = pickle.dumps({"model": kind(target)}, protocol=protocol)
    file = torch_file(tmp_path / "x.pth", pickled)
    with pytest.raises(UserError, match=r"names (pathlib|builtins|__builtin__)\S+, which is not"):
        reading.open_weights(file)
    assert not target.exists()
    pickle.loads(pickled)  # the file is a real one: a plain reader does run it
    assert target.exists()


def test_nothing_is_reached_through_what_is_allowed(tmp_path):
    """Attributes of allowed names, setting of their state, extension codes, deep names."""
    target = tmp_path / "made"
    for name in (b"cargparse\n_sys.modules\n.", b"ctorch\nos.system\n.", b"c__main__\nx\n.",
                 b"\x82\x01.", b"cargparse\nNamespace\n}b.", b"ccollections\nabc.sys\n."):  # fmt: skip
        with pytest.raises(UserError):
            reading.open_weights(torch_file(tmp_path / "x.pth", b"\x80\x04" + name))
    assert not target.exists()


def test_a_memo_number_does_not_take_memory(tmp_path):
    bomb = b"\x80\x02N" + b"r" + struct.pack("<I", 0x7FFFFFFF) + b"."
    with pytest.raises(UserError, match="numbers its parts in an odd way"):
        reading.open_weights(torch_file(tmp_path / "x.pth", bomb))


def good(tmp_path):
    torch_zip.write(tmp_path / "good.pth", ARRAYS)
    return tmp_path / "good.pth"


def rewritten(path, change, compress=zipfile.ZIP_STORED):
    """The file with some members changed."""
    out = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compress) as new:
        for name in old.namelist():
            data = change(name.split("/", 1)[1], old.read(name))
            if data is not None:
                new.writestr(name, data)
    return out


def test_a_large_byteorder_is_not_unpacked(tmp_path):
    """64 MiB of 'little' and zeros in 64 KiB of a file: refused by its size."""
    large = lambda name, data: data + bytes(1 << 26) if name == "byteorder" else data
    packed = rewritten(good(tmp_path), large, zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 1 << 18
    tracemalloc.start()
    with pytest.raises(UserError, match="not written on a little-endian machine"):
        torch_zip.read(packed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 22


def test_damage_is_told(tmp_path):
    file = good(tmp_path)
    data = bytearray(file.read_bytes())
    cut = tmp_path / "cut.pth"
    for size in (0, 3, 100, len(data) // 2, len(data) - 3):
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match="Copy or download"):
            reading.open_weights(cut)
    place = data.index(ARRAYS["a"].tobytes())
    data[place + 7] ^= 1
    cut.write_bytes(data)
    with pytest.raises(UserError, match="checksum of good/data/0 differs"):
        reading.open_weights(cut).state["a"].read()
    lost = rewritten(file, lambda name, x: None if name == "data/2" else x)
    with pytest.raises(UserError, match="data/2"):
        reading.open_weights(lost)
    short = rewritten(file, lambda name, x: x[:8] if name == "data/0" else x)
    with pytest.raises(UserError, match="reaches beyond its storage"):
        reading.open_weights(short)
    packed = rewritten(file, lambda name, x: x, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        reading.open_weights(packed)
    big = rewritten(file, lambda name, x: b"big" if name == "byteorder" else x)
    with pytest.raises(UserError, match="little-endian"):
        reading.open_weights(big)
    with pytest.raises(UserError, match="no data.pkl"):
        reading.open_weights(rewritten(file, lambda name, x: None if name == "data.pkl" else x))


def test_every_byte_of_the_pickle_may_be_wrong(tmp_path):
    """Flips of any byte are an error or other arrays: never another exception, never a crash."""
    file, rng = good(tmp_path), np.random.default_rng(1)
    with zipfile.ZipFile(file) as archive:
        size = len(archive.read("good/data.pkl"))
    refused = 0
    for place in rng.integers(0, size, 150):

        def flip(name, x, place=place):
            return x[:place] + bytes([x[place] ^ 21]) + x[place + 1 :] if "pkl" in name else x

        try:
            reading.open_weights(rewritten(file, flip))
        except UserError:
            refused += 1
    assert refused > 50


def test_old_and_foreign_files_are_refused_with_the_way_out(tmp_path):
    file = tmp_path / "x.pth"
    file.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(UserError, match="before version 1.6 .* torch.save"):
        reading.open_weights(file)
    with tarfile.open(file, "w") as tar:
        info = tarfile.TarInfo("storages")
        tar.addfile(info, io.BytesIO())
    with pytest.raises(UserError, match="before version 1.6"):
        reading.open_weights(file)
    file.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(UserError, match="no file of torch.save"):
        reading.open_weights(file)
    torch_file(file, pickle.dumps({"epoch": 3, "net": {"a": 1}}, protocol=2))
    with pytest.raises(UserError, match="it has epoch, net. Name the right one: --entry=NAME"):
        reading.open_weights(file)
    with pytest.raises(UserError, match="must have an entry 'ne'.* mean \"net\""):
        reading.open_weights(file, entry="ne")
    torch_file(file, pickle.dumps([1, 2], protocol=2))
    with pytest.raises(UserError, match="dictionary of tensors; got list"):
        reading.open_weights(file)


def header(file, change):
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    change(head)
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda h: h["a"].update(dtype="F4"), "dtype 'F4' is not known"),
        (lambda h: h["a"].update(shape=[3, 4, 6]), "240 bytes"),
        (lambda h: h["a"].update(shape=[-3, -4, 5]), "whole numbers"),
        (
            lambda h: h["a"].update(data_offsets=[0, 1 << 40], shape=[1 << 38]),
            "overlap or leave gaps",
        ),
        (lambda h: h["number"].update(data_offsets=[0, 4]), "overlap or leave gaps"),
        (lambda h: h.pop("count"), "overlap or leave gaps|its arrays take"),
        (lambda h: h.update(b=3), "header cannot be read"),
    ],
)
def test_safetensors_whose_header_lies(tmp_path, change, said):
    file = tmp_path / "x.safetensors"
    safetensors_io.write(file, ARRAYS)
    header(file, change)
    with pytest.raises(UserError, match=said):
        reading.open_weights(file)


def test_safetensors_that_are_cut(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors_io.write(file, ARRAYS)
    data = file.read_bytes()
    for size in (0, 5, 8, 200, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(UserError, match="Copy or download"):
            reading.open_weights(file)
    file.write_bytes((1 << 40).to_bytes(8, "little") + data)
    with pytest.raises(UserError, match="whole safetensors file"):
        reading.open_weights(file)


def test_shards_and_their_index(tmp_path):
    files = safetensors_io.write_shards(tmp_path, "model", ARRAYS, limit=40)
    assert len(files) == 3 and all(
        f"{i}-of-00003" in name for i, name in enumerate(sorted(files), 1)
    )
    weights = reading.open_weights(tmp_path)
    equal(weights.state, ARRAYS)
    assert len(weights.files) == 4
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name, said in [("../x.safetensors", "name files beside it"), ("no", "must hold no")]:
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"a": name}}))
        with pytest.raises(UserError, match=said):
            reading.open_weights(index)
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"b": sorted(files)[0]}}))
    with pytest.raises(UserError, match="must hold b; it does not"):
        reading.open_weights(index)


def test_a_folder_of_torch_shards(tmp_path):
    for i, key in enumerate(["a", "half"]):
        torch_zip.write(tmp_path / f"pytorch_model-{i}.bin", {key: ARRAYS[key]})
    with pytest.raises(UserError, match="one file of weights; it has pytorch_model-0.bin, pytorch"):
        reading.open_weights(tmp_path)
    places = {"a": "pytorch_model-0.bin", "half": "pytorch_model-1.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    equal(reading.open_weights(tmp_path).state, {k: ARRAYS[k] for k in places})
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="must hold weights"):
        reading.open_weights(empty)
    with pytest.raises(UserError, match="there is none at"):
        reading.open_weights(tmp_path / "nothing")


OWN = [
    "mask_token",
    "encoder.patch_embed.proj.weight",
    "encoder.blocks.0.norm1.weight",
    "decoder.head.bias",
]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "backbone."])
def test_prefixes_go_where_the_layout_has_none(prefix):
    state = {prefix + key: None for key in OWN} | {"extra.weight": None}
    found, notes = reading.without_prefixes(state, "videomae")
    assert list(found) == [*OWN, "extra.weight"]
    said = f"prefix {prefix!r} taken off 4 of 5 keys"
    assert notes == ((said,) if prefix else ())  # 'encoder.' is the layout's own and stays


def test_a_prefix_that_makes_two_keys_one():
    state = {f"module.{key}": None for key in OWN} | {OWN[0]: None}
    with pytest.raises(UserError, match="both mask_token and module.mask_token"):
        reading.without_prefixes(state, "videomae")
