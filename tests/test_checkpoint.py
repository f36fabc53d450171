"""Checkpoints inside one process: what is saved comes back, what is damaged is found, what fails is said."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from invideo_jax import checkpoint, digests, state, stored
from invideo_jax.checkpoint import CheckpointError, Checkpoints


def make_mesh(*shape):
    names = ("data", "fsdp")[: len(shape)]
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(shape))


def sharding(mesh, x):
    spec = PartitionSpec(*mesh.axis_names) if x.ndim == 2 and x.size else PartitionSpec()
    return NamedSharding(mesh, spec)


def make_state(mesh, seed=0, width=32, keep_ema=True) -> state.TrainState:
    """A train state of 17 leaves: two dtypes, scalars, an array without elements, nested optimiser tuples."""
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {
            "kernel": rng.standard_normal((64, width)).astype(np.float32),
            "bias": rng.standard_normal(width).astype(jnp.bfloat16),
        },
        "scale": np.float32(rng.standard_normal()),
        "none": np.zeros((0, 3), np.float32),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    made = state.create(jax.tree.map(jnp.asarray, params), tx, keep_ema=keep_ema)
    made = made.replace(ema=jax.tree.map(lambda x: x * 2, made.ema))  # never the bytes of `params`
    return jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, x)), made)


def abstract(tree, mesh):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, x)), tree
    )


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def fill(folder, steps=(10, 20, 30), **options) -> dict[int, state.TrainState]:
    """A folder with these steps; step n holds `make_state(seed=n)`."""
    mesh = make_mesh(4, 2)
    with Checkpoints(folder, keep_last=10, **options) as checkpoints:
        for n in steps:
            assert checkpoints.save(n, make_state(mesh, n), dict(stage="masked", stage_step=n))
    return {n: make_state(mesh, n) for n in steps}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with steps 10, 20, 30, to be copied before it is hurt."""
    folder = tmp_path_factory.mktemp("filled") / "checkpoints"
    fill(folder)
    return folder


@pytest.fixture
def copy(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "checkpoints")


def restore(folder, wanted=None, mesh=None, **options):
    """(state, meta, log lines) of a restore by a trainer."""
    mesh = mesh or make_mesh(4, 2)
    lines = []
    wanted = make_state(mesh) if wanted is None else wanted
    with Checkpoints(folder, **options) as checkpoints:
        found = checkpoints.restore(abstract(wanted, mesh), log=lines.append)
    return (*(found or (None, None)), lines)


# ---- what is saved comes back -----------------------------------------------------------------------------------


def test_nothing_saved_is_a_fresh_start(tmp_path):
    assert restore(tmp_path / "new")[0] is None
    assert Checkpoints(tmp_path / "absent", trainer=False).latest() is None
    assert not (tmp_path / "absent").exists()


def test_state_and_meta_come_back(copy):
    found, meta, lines = restore(copy)
    assert_equal(found, make_state(make_mesh(4, 2), 30))
    assert (
        isinstance(found, state.TrainState) and found.ema["encoder"]["bias"].dtype == jnp.bfloat16
    )
    assert (meta["stage"], meta["stage_step"]) == ("masked", 30)
    own = meta["checkpoint"]
    assert own["finite"] and own["step"] == 30 and own["mesh"] == dict(data=4, fsdp=2)
    assert own["leaves"]["params/encoder/bias"][:2] == [[32], "bfloat16"]
    assert len(lines) == 1 and lines[0].startswith("checkpoint: restored step 30, saved ")


def test_a_named_step_comes_back(copy):
    checkpoints = Checkpoints(copy, trainer=False)
    mesh = make_mesh(4, 2)
    found, meta = checkpoints.restore(abstract(make_state(mesh), mesh), step=10)
    assert_equal(found, make_state(mesh, 10))
    assert checkpoints.steps() == [10, 20, 30] and checkpoints.meta(20)["stage_step"] == 20
    with pytest.raises(
        CheckpointError, match=r"step 15: no such step. Steps here: \[10, 20, 30\]"
    ) as e:
        checkpoints.restore(abstract(make_state(mesh), mesh), step=15)
    assert e.value.exit_code == 2


@pytest.mark.parametrize("shape", [(1,), (2,), (8,), (2, 4), (1, 8), (8, 1)])
def test_restore_on_another_mesh(copy, shape):
    mesh = make_mesh(*shape)
    found, meta, _ = restore(copy, mesh=mesh)
    assert_equal(found, make_state(make_mesh(4, 2), 30))
    kernel = found.params["encoder"]["kernel"]
    assert kernel.sharding == sharding(mesh, kernel)
    leaves = {n: meta["checkpoint"]["leaves"][n][2] for n in meta["checkpoint"]["leaves"]}
    assert digests.tree_digests(found)[0] == leaves


def test_donated_state_is_saved_as_it_was(tmp_path):
    """The step after a save overwrites the very buffers; the save must hold a copy."""
    mesh = make_mesh(4, 2)
    now = {
        "params": {
            "k": jax.device_put(jnp.zeros((512, 512)), NamedSharding(mesh, PartitionSpec("data")))
        }
    }
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        for n in range(5):
            checkpoints.save(n, now, {})
            now = step(now)
    for n in range(5):
        assert (checkpoint.read_params(tmp_path, n)[0]["k"] == n).all()


def test_saving_a_step_twice_keeps_the_first(copy):
    mesh = make_mesh(4, 2)
    with Checkpoints(copy, keep_last=9) as checkpoints:
        assert not checkpoints.save(30, make_state(make_mesh(2), 30), {})
        with pytest.raises(
            CheckpointError, match="step 30: is there already and holds another state"
        ):
            checkpoints.save(30, make_state(mesh, 1), {})
        assert checkpoints.save(25, make_state(mesh, 25), {})
    assert_equal(restore(copy, keep_last=9)[0], make_state(mesh, 30))


def test_meta_survives_json(tmp_path):
    given = dict(config={"lr": 1e-4, "sizes": (1, 2), 3: None}, text="ä\n", nan=float("inf"))
    mesh = make_mesh(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(mesh), given)
        checkpoints.wait()
        assert checkpoints.meta(1)["config"] == {"lr": 1e-4, "sizes": [1, 2], "3": None}
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(2, make_state(mesh), dict(x=object()))


# ---- which steps are kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, left",
    [
        (dict(keep_last=2), {50, 60}),
        (dict(keep_last=1, keep_best=2), {60, 20, 40}),
        (dict(keep_last=1, keep_best=2, best_mode="max"), {60, 10, 50}),
        (dict(keep_last=1, keep_every=30), {30, 60}),
        (dict(keep_last=9), {10, 20, 30, 40, 50, 60}),
    ],
)
def test_which_steps_are_kept(options, left):
    metrics = {10: 5.0, 20: 1.0, 30: float("nan"), 40: 1.0, 50: 5.0, 60: None}
    assert checkpoint.kept(metrics, **options) == left


def test_old_steps_go_best_and_foreign_ones_stay(tmp_path):
    mesh = make_mesh(1)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "note.txt").write_text("mine")
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for n, metric in [(1, 3.0), (2, 0.5), (3, 2.0), (4, None), (5, 4.0)]:
            checkpoints.save(n, make_state(mesh, n), {}, metric=metric)
    assert Checkpoints(tmp_path, trainer=False).steps() == [2, 4, 5]
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as again:  # metrics read from the files
        again.save(6, make_state(mesh, 6), {}, metric=9.0)
    assert sorted(os.listdir(tmp_path)) == ["2", "6", "7"]
    assert (tmp_path / "7" / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("bad", [dict(keep_last=0), dict(keep_best=-1), dict(best_mode="least")])
def test_bad_settings_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=f"got .*{next(iter(bad))}={next(iter(bad.values()))!r}"):
        Checkpoints(tmp_path, **bad)


# ---- damage -----------------------------------------------------------------------------------------------------


def data_file(folder, step):
    """The largest file of the arrays: their bytes."""
    files = [p for p in (folder / str(step) / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0x10
    path.write_bytes(data)


def position_of(path, array) -> int:
    """Where the bytes of the first shard row of `array` lie in a data file."""
    found = path.read_bytes().find(np.asarray(array).tobytes()[:16])
    assert found >= 0
    return found


def test_orbax_itself_restores_a_flipped_byte_silently(copy):
    """Why there are digests: if this fails, Orbax has learned to check, and recipe and comments may change."""
    mesh = make_mesh(4, 2)
    kernel = make_state(mesh, 30).params["encoder"]["kernel"]
    for path in (copy / "30" / "state").rglob("*"):
        if path.is_file() and np.asarray(kernel)[0, :4].tobytes() in path.read_bytes():
            flip(path, position_of(path, kernel))
    wanted = digests.named_leaves(abstract(make_state(mesh), mesh))
    found = stored.read_onto(stored.epath.Path(copy / "30"), wanted)
    assert not (np.asarray(found["params/encoder/kernel"]) == np.asarray(kernel)).all()


def test_flipped_byte_falls_back_to_the_older_step(copy):
    mesh = make_mesh(4, 2)
    kernel = make_state(mesh, 30).params["encoder"]["kernel"]
    for path in (copy / "30" / "state").rglob("*"):
        if path.is_file() and np.asarray(kernel)[0, :4].tobytes() in path.read_bytes():
            flip(path, position_of(path, kernel))
    found, meta, lines = restore(copy)
    assert_equal(found, make_state(mesh, 20))
    assert meta["stage_step"] == 20
    text = "\n".join(lines)
    assert "step 30 is damaged and is not used: data of params/encoder/kernel differ" in text
    assert "renamed to 30.corrupt" in text and "restored step 20" in text
    assert "skipped as damaged: [30]" in text
    assert sorted(os.listdir(copy)) == ["10", "20", "30.corrupt"]
    with Checkpoints(copy, keep_last=9) as checkpoints:  # the run goes on and reaches 30 again
        assert checkpoints.save(30, make_state(mesh, 30), {})
    assert_equal(restore(copy, keep_last=9)[0], make_state(mesh, 30))


def hurt(folder, rng: random.Random) -> str:
    """Damages one random file of the newest step in a random way; says how."""
    files = sorted(p for p in (folder / "30").rglob("*") if p.is_file() and p.stat().st_size)
    path = rng.choice(files)
    if rng.random() < 0.4:
        path = data_file(folder, 30)
    data = bytearray(path.read_bytes())
    way = rng.choice(["flip", "truncate", "zero", "delete", "swap", "append"])
    if way == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "truncate":
        del data[rng.randrange(len(data)) :]
    elif way == "zero":
        start = rng.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    elif way == "swap":
        i, j = rng.randrange(len(data)), rng.randrange(len(data))
        data[i], data[j] = data[j], data[i]
    elif way == "append":
        data += b"xyz"
    path.write_bytes(data)
    if way == "delete":
        path.unlink()
    return f"{way} {path.relative_to(folder)}"


def check_random_damage(filled, tmp_path, seeds):
    """Never a wrong restore: 30 as it was (harmless damage) or 20; nothing is deleted."""
    mesh = make_mesh(4, 2)
    states = {n: make_state(mesh, n) for n in (20, 30)}
    outcomes = []
    for seed in seeds:
        folder = shutil.copytree(filled, tmp_path / str(seed))
        how = hurt(folder, random.Random(seed))
        found, meta, lines = restore(folder, mesh=mesh)
        step = meta["checkpoint"]["step"]
        assert step in (20, 30), (seed, how)
        assert_equal(found, states[step])
        assert meta["stage_step"] == step
        if step == 20:
            assert (folder / "30.corrupt").exists() and "step 30 is damaged" in lines[0], how
        outcomes.append(step)
        shutil.rmtree(folder)
    return outcomes


def test_random_damage_is_never_restored(filled, tmp_path):
    outcomes = check_random_damage(filled, tmp_path, range(24))
    assert outcomes.count(20) >= 8, outcomes


@pytest.mark.slow
def test_random_damage_is_never_restored_wide(filled, tmp_path):
    outcomes = check_random_damage(filled, tmp_path, range(100, 400))
    assert outcomes.count(20) >= 100


@pytest.mark.parametrize("part", ["_CHECKPOINT_METADATA", "meta/data.json", "state/manifest.ocdbt"])
def test_missing_part_falls_back(copy, part):
    (copy / "30" / part).unlink()
    found, meta, lines = restore(copy)
    assert meta["stage_step"] == 20 and "step 30 is damaged" in lines[0]
    assert (copy / "30.corrupt").is_dir()


def test_changed_meta_is_found(copy):
    path = copy / "30" / "meta" / "data.json"
    path.write_text(path.read_text().replace('"stage_step": 30', '"stage_step": 31'))
    assert restore(copy)[1]["stage_step"] == 20
    with pytest.raises(CheckpointError, match="no such|missing"):
        Checkpoints(copy, trainer=False).meta(30)


def test_no_good_step_is_an_error_and_nothing_is_renamed(copy):
    for n in (10, 20, 30):
        (copy / str(n) / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint though some exist: step 30") as e:
        restore(copy)
    assert e.value.exit_code == 74 and sorted(os.listdir(copy)) == ["10", "20", "30"]


def test_only_set_aside_steps_left_is_an_error(copy):
    for n in (10, 20):
        shutil.rmtree(copy / str(n))
    os.rename(copy / "30", copy / "30.corrupt")
    with pytest.raises(CheckpointError, match="only .'30.corrupt'. are left"):
        restore(copy)


def test_a_reader_renames_nothing(copy):
    (copy / "30" / "meta" / "data.json").unlink()
    (copy / "40.orbax-checkpoint-tmp").mkdir()
    before = sorted(os.listdir(copy))
    assert restore(copy, trainer=False)[1]["stage_step"] == 20
    assert sorted(os.listdir(copy)) == before


def test_a_trainer_removes_what_a_killed_run_left(copy):
    for name in ("40.orbax-checkpoint-tmp", "5.deleting"):
        (copy / name / "state").mkdir(parents=True)
    with Checkpoints(copy):
        assert sorted(os.listdir(copy)) == ["10", "20", "30"]


def test_stray_folders_are_ignored_with_a_word(copy):
    (copy / "99").mkdir()
    (copy / "012").mkdir()
    found, meta, lines = restore(copy)
    assert meta["stage_step"] == 30 and "99 is no checkpoint; ignored" in lines[0]
    assert (copy / "99").is_dir()
    mesh = make_mesh(4, 2)
    with Checkpoints(copy, keep_last=9) as checkpoints:
        assert checkpoints.latest() == 30
        assert checkpoints.save(99, make_state(mesh, 99), {})
    assert restore(copy, keep_last=9)[1]["checkpoint"]["step"] == 99
    assert (copy / "99.corrupt").is_dir()


# ---- another state than the stored one --------------------------------------------------------------------------


def expect_differences(copy, wanted, *texts):
    with pytest.raises(CheckpointError, match="the stored state is not the one") as e:
        restore(copy, wanted=wanted)
    assert e.value.exit_code == 2
    for text in texts:
        assert text in str(e.value), str(e.value)
    assert sorted(os.listdir(copy)) == ["10", "20", "30"]


def test_other_shapes_are_listed(copy):
    wanted = make_state(make_mesh(4, 2), width=64)
    expect_differences(
        copy,
        wanted,
        "params/encoder/kernel: stored float32[64, 32], asked for float32[64, 64]",
        "opt_state/1/0/mu/encoder/bias: stored bfloat16[32], asked for bfloat16[64]",
    )


def test_a_dtype_is_never_cast(copy):
    wanted = make_state(make_mesh(4, 2))
    kernel = wanted.params["encoder"]["kernel"].astype(jnp.int8)
    wanted.params["encoder"]["kernel"] = kernel
    expect_differences(
        copy, wanted, "params/encoder/kernel: stored float32[64, 32], asked for int8[64, 32]"
    )


def test_missing_and_extra_names_are_listed(copy):
    wanted = make_state(make_mesh(4, 2))
    wanted.params["head"] = wanted.params.pop("scale")
    expect_differences(
        copy,
        wanted,
        "params/head: asked for float32[], not stored",
        "params/scale: stored float32[], not asked for",
    )
    without = make_state(make_mesh(4, 2), keep_ema=False)
    expect_differences(copy, without, "ema/encoder/bias: stored bfloat16[32], not asked for")


def test_only_ten_differences_are_shown():
    rows = {f"w{i:02}": [[2], "float32", ""] for i in range(14)}
    text = str(stored.structure_error("folder", 3, stored.compare(rows, {})))
    assert text.count("not asked for") == 10 and "and 4 more" in text


def test_an_uneven_mesh_is_refused_before_loading(copy):
    with pytest.raises(CheckpointError, match=r"\[64, 32\] does not divide .* on 5 devices"):
        restore(copy, wanted=make_state(make_mesh(4, 2)), mesh=make_mesh(5))


def test_a_newer_format_is_refused(copy):
    path = copy / "30" / "meta" / "data.json"
    meta = json.loads(path.read_text())
    meta["checkpoint"]["format"] = 99
    path.write_text(json.dumps(meta | dict(meta_digest=stored.meta_digest(meta))))
    with pytest.raises(CheckpointError, match="newer version .format 99"):
        restore(copy)


# ---- what must not be saved, and failing saves ------------------------------------------------------------------


def test_a_state_that_is_not_finite_is_not_saved(copy, capsys):
    mesh = make_mesh(4, 2)
    bad = make_state(mesh, 40)
    bad.params["encoder"]["bias"] = bad.params["encoder"]["bias"].at[3].set(jnp.nan)
    with Checkpoints(copy) as checkpoints:
        assert not checkpoints.save(40, bad, {})
        assert checkpoints.steps() == [10, 20, 30]
    assert "step 40 NOT saved: params/encoder/bias is not finite" in capsys.readouterr().out


def test_saving_outside_with_is_refused(tmp_path):
    mesh = make_mesh(1)
    with pytest.raises(RuntimeError, match="save.. needs `with Checkpoints"):
        Checkpoints(tmp_path).save(1, make_state(mesh), {})
    with Checkpoints(tmp_path, trainer=False) as reader:
        with pytest.raises(RuntimeError, match="trainer=True"):
            reader.save(1, make_state(mesh), {})


def test_only_jax_arrays_of_numbers_are_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="got lr=float"):
            checkpoints.save(1, dict(lr=0.1), {})
        with pytest.raises(TypeError, match="got key=PRNGKeyArray key<fry>"):
            checkpoints.save(1, dict(key=jax.random.key(0)), {})


def test_the_save_in_flight_survives_an_exception(tmp_path):
    state_ = dict(params=dict(k=jnp.ones((2048, 2048))))
    with pytest.raises(ZeroDivisionError):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state_, {})
            assert checkpoints._running is not None
            raise ZeroDivisionError
    assert Checkpoints(tmp_path, trainer=False).steps() == [1]


class Broken:
    """Stands in for Orbax's save: fails in the background, leaving a half-written folder, like a full disk."""

    def __init__(self, monkeypatch):
        self.broken, self.real, self.calls = True, checkpoint.ocp.save_checkpointables_async, 0
        monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", self.save)

    def save(self, path, items):
        self.calls += 1
        if not self.broken:
            return self.real(path, items)
        temporary = stored.epath.Path(f"{path}.orbax-checkpoint-tmp")
        (temporary / "state").mkdir(parents=True)
        return self

    def result(self):
        time.sleep(0.02)
        raise OSError(errno.ENOSPC, "No space left on device")


def test_failed_save_is_told_cleaned_and_retried(tmp_path, monkeypatch, capsys):
    mesh = make_mesh(1)
    broken = Broken(monkeypatch)
    with Checkpoints(tmp_path, retry_seconds=(0.05, 0.05)) as checkpoints:
        assert checkpoints.save(1, make_state(mesh, 1), {})
        assert not checkpoints.retry_due()
        deadline = time.monotonic() + 10
        while not checkpoints.retry_due():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert os.listdir(tmp_path) == []
        said = capsys.readouterr().out
        assert "ALARM: step 1 could not be saved (1 interval(s) missed): OSError" in said
        assert "No space left on device" in said and "bytes; free: " in said
        broken.broken = False
        assert checkpoints.save(2, make_state(mesh, 2), {})
        checkpoints.wait()
        assert not checkpoints.retry_due() and checkpoints.steps() == [2]


def test_two_missed_intervals_go_on_the_third_stops(tmp_path, monkeypatch):
    mesh = make_mesh(1)
    Broken(monkeypatch)
    with pytest.raises(
        CheckpointError, match="saving failed: OSError.*needs .* bytes; free: "
    ) as e:
        with Checkpoints(tmp_path, retry_seconds=()) as checkpoints:
            for n in range(1, 10):
                checkpoints.save(n, make_state(mesh, n), {})
                last = n
    assert last == 3 and e.value.exit_code == 74


def test_the_last_save_is_not_lost_silently(tmp_path, monkeypatch):
    mesh = make_mesh(1)
    broken = Broken(monkeypatch)
    with pytest.raises(CheckpointError, match="saving failed"):
        with Checkpoints(tmp_path, retry_seconds=(0.01,)) as checkpoints:
            checkpoints.save(1, make_state(mesh, 1), {})
    assert broken.calls == 1
    with pytest.raises(CheckpointError, match="saving failed"):
        with Checkpoints(tmp_path, retry_seconds=(0.01,)) as checkpoints:
            checkpoints.save(1, make_state(mesh, 1), {}, wait=True)
    assert broken.calls == 3  # tried again before giving up


def test_a_full_disk(tmp_path):
    """A real one: a small tmpfs."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        big = lambda n: dict(params=dict(k=jnp.full((1024, 1024), n, jnp.float32)))
        with Checkpoints(small / "c", keep_last=1, retry_seconds=()) as checkpoints:
            assert checkpoints.save(1, big(1), {}, wait=True)
            assert checkpoints.save(2, big(2), {})  # 4 MB more do not fit
            assert checkpoints._failure is not None and checkpoints.steps() == [1]
            assert os.listdir(small / "c") == ["1"]
            shutil.rmtree(small / "c" / "1")  # somebody makes space
            assert checkpoints.save(3, big(3), {}, wait=True)
        assert (checkpoint.read_params(small / "c")[0]["k"] == 3).all()
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_disk_that_fills_while_orbax_writes(tmp_path, monkeypatch):
    """The same, with the look at the free space before writing made blind (a quota is invisible to it)."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        monkeypatch.setattr(Checkpoints, "_free_bytes", lambda self: None)
        big = lambda n: dict(params=dict(k=jnp.full((1024, 1024), n, jnp.float32)))
        with pytest.raises(CheckpointError, match="No space left on device"):
            with Checkpoints(small / "c", keep_last=1, retry_seconds=()) as checkpoints:
                assert checkpoints.save(1, big(1), {}, wait=True)
                assert checkpoints.save(2, big(2), {})
        assert os.listdir(small / "c") == ["1"]  # what it had written is gone again
        assert (checkpoint.read_params(small / "c")[0]["k"] == 1).all()
    finally:
        subprocess.run(["umount", small], check=True)


# ---- readers ----------------------------------------------------------------------------------------------------


def test_reading_during_a_live_save_disturbs_nothing(tmp_path):
    state_ = dict(params=dict(k=jnp.ones((1024, 1024))))
    errors, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            try:
                reader = Checkpoints(tmp_path, trainer=False)
                if reader.latest() is not None:
                    reader.meta(reader.latest())
            except CheckpointError as error:
                if "is missing" not in str(error):  # deleted as too old between the two calls
                    errors.append(error)
            time.sleep(0.002)

    thread = threading.Thread(target=read)
    thread.start()
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for n in range(12):
            checkpoints.save(n, state_, {})
    stop.set()
    thread.join()
    assert not errors and Checkpoints(tmp_path, trainer=False).steps() == [9, 10, 11]


def test_parameters_as_numpy(copy):
    want = make_state(make_mesh(1), 30)
    params, meta = checkpoint.read_params(copy.parent)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, want.params))
    assert isinstance(params["encoder"]["kernel"], np.ndarray) and meta["stage_step"] == 30
    ema, _ = checkpoint.read_params(copy, 10, "ema")
    assert np.array_equal(
        ema["encoder"]["kernel"], make_state(make_mesh(1), 10).ema["encoder"]["kernel"]
    )
    with pytest.raises(ValueError, match="which='head'"):
        checkpoint.read_params(copy, which="head")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.read_params(copy.parent / "elsewhere")


def test_reading_damaged_parameters_is_an_error(copy):
    kernel = make_state(make_mesh(4, 2), 30).params["encoder"]["kernel"]
    for path in (copy / "30" / "state").rglob("*"):
        if path.is_file() and np.asarray(kernel)[0, :4].tobytes() in path.read_bytes():
            flip(path, position_of(path, kernel))
    with pytest.raises(CheckpointError, match="params/encoder/kernel differ"):
        checkpoint.read_params(copy)


def run_list(*arguments):
    command = [sys.executable, "-m", "invideo_jax.checkpoint", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_list(copy):
    done = run_list(copy.parent, "--verify")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [line.split() for line in lines if "masked:" in line]
    assert [(r[0], r[1], r[-1]) for r in rows] == [
        (str(n), f"masked:{n}", "yes") for n in (10, 20, 30)
    ]
    meta = Checkpoints(copy, trainer=False).meta(30)
    for group in ("params", "opt_state", "ema"):
        assert any(line.split() == [group, meta["checkpoint"]["digests"][group]] for line in lines)


def test_the_list_finds_damage_and_tells_json(copy):
    path = data_file(copy, 20)
    for position in range(0, path.stat().st_size, 50):
        flip(path, position)
    assert run_list(copy.parent, "--json").returncode == 0  # not read, so not seen
    done = run_list(copy.parent, "--verify", "--json")
    found = {row["step"]: row["ok"] for row in json.loads(done.stdout)["steps"]}
    assert done.returncode == 74 and found[10] == found[30] == "yes" and "DAMAGED" in found[20]


def test_the_list_of_nothing(tmp_path):
    done = run_list(tmp_path)
    assert (
        done.returncode == 2
        and "no checkpoint in" in done.stderr
        and "Traceback" not in done.stderr
    )
