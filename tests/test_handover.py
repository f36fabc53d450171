"""Hand-over of parameters: what comes from where, what is done to it, and what is refused."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from invideo_jax import handover, sharding, state, stored
from invideo_jax.checkpoint import Checkpoints
from invideo_jax.errors import UserError
from invideo_jax.interop import folder
from invideo_jax.models import classifier, positions, video_encoder, video_mae

KEY = "stages.tune.init"


def flat(tree):
    return {path: np.asarray(x) for path, x in flatten_dict(tree, sep="/").items()}


def params_of(init, model, seed):
    """Random values of the model's shapes, so that a wrong copy shows."""
    shapes = jax.eval_shape(lambda: sharding.unbox(init(model, jax.random.key(seed))))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype)
    return jax.tree.map(draw, shapes)


def same(a, b):
    """Equal but for how the compiler fuses the drawing of initial values."""
    return np.allclose(a, b, rtol=1e-5, atol=1e-8) and np.any(a != 0) == np.any(b != 0)


def encoder(**overrides):
    return video_encoder.build("Micro", **(dict(frames=4, image_size=32) | overrides))


def move(old, new, *, source=None, params=None, **options):
    """Hands the parameters of one encoder to another; both trees and the table."""
    params = params_of(video_encoder.init, old, 0) if params is None else params
    init = lambda: video_encoder.init(new, jax.random.key(1))
    target = jax.eval_shape(lambda: sharding.unbox(init()))
    source = source or handover.from_tree(params, "before")
    places = dict(grid=new.grid, tubelet=new.tubelet) | options
    table = handover.plan(target, source.shapes, about=source.about, key=KEY, **places)
    return flat(params), handover.apply(table, source.get, init), table


def run(model, params, video):
    return nn.apply(lambda m: m.pooled(m(video)[0]), model)({"params": params})


# ------------------------------------------------------------------------------------- copies and names


def test_equal_shapes_are_copied_and_lie_as_the_target_says():
    model = video_mae.build("Micro", frames=4, image_size=32)
    params = params_of(video_mae.init, model, 0)
    init = lambda: video_mae.init(model, jax.random.key(1))
    mesh = sharding.make_mesh(data=2, fsdp=4)
    boxed = jax.eval_shape(init)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        sharding.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )
    on_host = handover.from_tree(jax.tree.map(np.asarray, params), "before")
    for source in (handover.from_tree(params, "before"), on_host):
        table = handover.plan(target, source.shapes, key=KEY)
        made = handover.apply(table, source.get, init)
        for path, leaf in flatten_dict(made, sep="/").items():
            assert np.array_equal(leaf, flat(params)[path]), path
            assert leaf.sharding == flatten_dict(target, sep="/")[path].sharding, path
        assert {row.transform for row in table.rows} == {"copy"} and not table.left


def test_names_fresh_parameters_and_what_is_left():
    """From masked pretraining to a classifier of the same encoder."""
    before = video_mae.build("Micro", frames=4, image_size=32)
    after = classifier.build("Micro", encoder="video_mae", classes=5, frames=8, image_size=48)
    params = params_of(video_mae.init, before, 0)
    init = lambda: classifier.init(after, jax.random.key(3))
    target = jax.eval_shape(lambda: sharding.unbox(init()))
    source = handover.from_tree(params, "masked")
    recipe = dict(
        fresh=("^head/", "^fc_norm/"),
        leftover=("^decoder", "^mask_token$", "^encoder_to_decoder/", "^encoder/norm/"),
    )
    table = handover.plan(
        target, source.shapes, grid=after.encoder.grid, about=source.about, key=KEY, **recipe
    )
    made = flat(handover.apply(table, source.get, init))
    fresh = flat(jax.jit(lambda: sharding.unbox(init()))())
    assert made.keys() == fresh.keys()
    for path, value in made.items():
        if path.startswith("encoder/"):
            assert np.array_equal(value, flat(params)[path]), path
        else:
            assert same(value, fresh[path]), path
    taken = {path for path in flat(params) if path.startswith("encoder/")} - set(table.left)
    assert set(table.left) == set(flat(params)) - taken
    assert {path for path in table.left if path.startswith("encoder/")} == {
        "encoder/norm/scale",
        "encoder/norm/bias",
    }
    assert str(table).startswith(
        f"parameters from stage masked params: {len(taken)} copied, 4 fresh, {len(table.left)} of "
    )


def test_a_subtree_moves_by_renaming():
    model = encoder()
    params = params_of(video_encoder.init, model, 0)
    source = handover.from_tree({"encoder": params, "heads": {"a": jnp.ones(3)}}, "before")
    before, made, table = move(
        model, model, source=source, params=params, rename=("^encoder/->",), leftover=("^heads/",)
    )
    assert all(np.array_equal(x, before[path]) for path, x in flat(made).items())
    assert {row.source for row in table.rows} == {f"encoder/{path}" for path in before}


def test_fresh_wins_over_the_source():
    model = encoder()
    before, made, table = move(model, model, fresh=("^pool/",))
    wanted = flat(jax.jit(lambda: sharding.unbox(video_encoder.init(model, jax.random.key(1))))())
    for path, value in flat(made).items():
        assert same(value, (wanted if path.startswith("pool/") else before)[path]), path
    assert table.left["pool/out/kernel"] == "fresh: ^pool/"


def test_values_are_cast():
    params = {"w": np.linspace(-1, 1, 7, dtype=np.float32)}
    target = {"w": jax.ShapeDtypeStruct((7,), jnp.bfloat16)}
    table = handover.plan(target, params, key=KEY)
    for value in (params["w"], jnp.asarray(params["w"])):
        made = handover.apply(table, {"w": value}.get, dict)
        assert np.array_equal(made["w"], params["w"].astype(jnp.bfloat16))
    assert "copy, float32 -> bfloat16" in str(table)
    with pytest.raises(UserError, match="w: must come from floating-point numbers; .* int32"):
        handover.plan(target, {"w": np.zeros(7, np.int32)}, key=KEY)


# ------------------------------------------------------------------------------------------ other shapes


@pytest.mark.parametrize(
    "changes", [dict(frames=8), dict(image_size=48), dict(frames=6, image_size=24)]
)
def test_positions_are_interpolated(changes):
    old, new = encoder(), encoder(**changes)
    before, made, table = move(old, new, old_frames=4)
    wanted = positions.interpolate(before["position_embedding"], old_times=4, grid=new.grid)
    assert np.array_equal(made["position_embedding"], wanted)
    assert np.array_equal(made["position_embedding"][0], before["position_embedding"][0])
    others = [path for path in before if path != "position_embedding"]
    assert all(np.array_equal(flat(made)[path], before[path]) for path in others)
    assert f"interpolate 4x4x4 -> {'x'.join(map(str, new.grid))}" in str(table)


def test_interpolated_positions_agree_with_torch():
    torch = pytest.importorskip("torch")
    old, new = encoder(), encoder(frames=8, image_size=56)
    before, made, _ = move(old, new, old_frames=4)
    x = torch.tensor(before["position_embedding"][1:])
    x = x.reshape(4, 16, 48).permute(1, 2, 0)  # [h*w, D, t]
    x = torch.nn.functional.interpolate(x, size=8, mode="linear", align_corners=False)
    x = x.permute(2, 1, 0).reshape(8, 48, 4, 4)
    x = torch.nn.functional.interpolate(x, size=(7, 7), mode="bicubic", align_corners=False)
    wanted = x.permute(0, 2, 3, 1).reshape(-1, 48).numpy()
    assert np.abs(made["position_embedding"][1:] - wanted).max() < 1e-5


def test_separate_tables_are_interpolated_each_along_its_own_axis():
    options = dict(positions="separate", image_positions="separate")
    old, new = encoder(**options), encoder(frames=8, image_size=48, **options)
    before, made, table = move(old, new, old_frames=4)
    interpolate = positions.interpolate
    wanted = dict(
        position_temporal=interpolate(
            before["position_temporal"], old_times=4, grid=(8, 1, 1), prefix=0
        ),
        position_spatial=interpolate(
            before["position_spatial"], old_times=1, grid=(1, 6, 6), prefix=0
        ),
    )
    for path, value in wanted.items():
        assert np.array_equal(made[path], value), path
    moved = {row.path for row in table.rows if row.transform == "positions"}
    assert moved >= set(wanted) and "position_cls" not in moved


def test_one_table_for_every_frame_is_interpolated_in_space_alone():
    """CLIP's, of [1 + h*w] rows: the number of frames, declared or not, is none of its business."""
    rows = lambda side: np.random.default_rng(side).normal(size=(1 + side**2, 8)).astype("float32")
    source, target = dict(position_embedding=rows(4)), dict(position_embedding=rows(6))
    want = positions.interpolate(source["position_embedding"], old_times=1, grid=(1, 6, 6))
    for told in (dict(old_grid=(8, 4, 4)), dict(old_grid=(2, 4, 4)), dict(old_frames=8), {}):
        options = dict(grid=(8, 6, 6), key=KEY) | told
        table = handover.plan(target, source, **options)
        made = handover.apply(table, source.get, lambda: target)
        assert np.array_equal(made["position_embedding"], want), told
    same = handover.plan(target, target, grid=(8, 6, 6), old_grid=(4, 6, 6), key=KEY)
    assert [row.transform for row in same.rows] == ["copy"]
    with pytest.raises(UserError, match="16 rows of the source are none of its grid 1x5x5"):
        handover.plan(target, source, grid=(8, 6, 6), old_grid=(8, 5, 5), key=KEY)


def test_as_many_places_of_another_grid_are_not_copied():
    """4 slots of 4 x 4 are as many as 16 of 2 x 2: only the declared length tells them apart."""
    old, new = encoder(), encoder(frames=16, image_size=16)
    for told in (dict(old_frames=4), dict(old_grid=old.grid)):
        before, made, _ = move(old, new, **told)
        wanted = positions.interpolate(before["position_embedding"], old_times=4, grid=new.grid)
        assert np.array_equal(made["position_embedding"], wanted)
        assert not np.array_equal(made["position_embedding"], before["position_embedding"])


def test_undeclared_and_wrong_lengths_are_refused():
    with pytest.raises(UserError, match=rf"position_embedding: .*{KEY}.old_frames=4, say"):
        move(encoder(), encoder(frames=8))
    with pytest.raises(UserError, match=rf"no 8 square pictures: {KEY}.old_frames is not what"):
        move(encoder(), encoder(frames=8), old_frames=8)
    with pytest.raises(UserError, match="64 rows of the source are none of its grid 2x4x4"):
        move(encoder(), encoder(frames=8), old_grid=(2, 4, 4))


@pytest.mark.parametrize("how", ["repeat", "centre"])
def test_an_inflated_kernel_sees_a_still_clip_as_before(how):
    old, new = encoder(frames=4), encoder(frames=12, tubelet=3)
    before, made, table = move(old, new, inflate=how)
    picture = jax.random.randint(jax.random.key(5), (2, 1, 32, 32, 3), 0, 255).astype(jnp.uint8)
    clip = lambda frames: jnp.repeat(picture, frames, axis=1)
    wanted = run(old, jax.tree.map(jnp.asarray, nest(before)), clip(4))
    assert np.abs(run(new, made, clip(12)) - wanted).max() < 1e-5
    parts = np.split(np.asarray(made["patch_embed"]["kernel"]), 3)
    kernel = before["patch_embed/kernel"]
    still = {"repeat": [kernel / 3] * 3, "centre": [0 * kernel, kernel, 0 * kernel]}[how]
    assert np.allclose(parts, still, atol=1e-7)
    assert f"inflate to 3 frames ({how})" in str(table)


def nest(named):
    tree = {}
    for path, value in named.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def test_inflation_must_be_asked_for_and_possible():
    with pytest.raises(UserError, match=f"tubelet 2 from 1. .*{KEY}.inflate=repeat or centre"):
        move(encoder(), encoder(frames=8, tubelet=2))
    with pytest.raises(UserError, match="patch_embed/kernel: 192 pixels of a patch from 384"):
        move(encoder(tubelet=2, frames=8), encoder(), inflate="repeat")


def test_old_frames_count_frames_of_the_old_tubelet():
    old, new = encoder(frames=8), encoder(frames=8, tubelet=2)  # 8 slots become 4
    before, made, _ = move(old, new, old_frames=8, inflate="repeat")
    wanted = positions.interpolate(before["position_embedding"], old_times=8, grid=new.grid)
    assert np.array_equal(made["position_embedding"], wanted)


@pytest.mark.parametrize(
    "given, rows",
    [("first", [0, 1, 2]), ([4, 0, 6], [4, 0, 6]), ({"0": 4, "2": 6, "1": 0}, [4, 0, 6])],
)
def test_classes_of_a_head(given, rows, tmp_path):
    if given != "first":
        (tmp_path / "map.json").write_text(json.dumps(given))
        given = str(tmp_path / "map.json")
    source = {"head/kernel": np.random.rand(4, 7), "head/bias": np.random.rand(7)}
    shapes = {"head": {"kernel": (4, 3), "bias": (3,)}}
    target = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )
    table = handover.plan(target, source, label_map=handover.read_label_map(given), key=KEY)
    made = flat(handover.apply(table, source.get, dict))
    for path, value in source.items():
        assert np.array_equal(made[path], value[..., rows].astype(np.float32))
    with pytest.raises(UserError, match=rf"\[4, 3\] from \[4, 7\]. .*{KEY}.label_map=first"):
        handover.plan(target, source, key=KEY)
    with pytest.raises(UserError, match="it has 3 entries from 0 to 7"):
        handover.plan(target, source, label_map=[0, 1, 7], key=KEY)


@pytest.mark.parametrize("text", ['{"0": 1, "2": 3}', '["a"]', "[true]", "3", "{"])
def test_a_label_map_must_be_whole(text, tmp_path):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(UserError, match="label_map must be 'first', or a JSON file"):
        handover.read_label_map(str(tmp_path / "map.json"))


# --------------------------------------------------------------------------------------------- refusals


def test_the_complaint_can_be_pasted():
    """What the message says to write is accepted, and means what it says."""
    target = {
        "encoder": {"a": {"kernel": 2}, "b": {"kernel": 3}},
        "head": {"kernel": 4, "bias": 5},
        "head_norm": {"scale": 6},
    }
    target = jax.tree.map(lambda n: jax.ShapeDtypeStruct((n,), jnp.float32), target)
    source = {"encoder/a/kernel": 2, "encoder/b/kernel": 3, "decoder/x": 7, "decoder/y": 8}
    source = {path: np.ones(n, np.float32) for path, n in source.items()} | {"token": np.ones(1)}
    with pytest.raises(UserError) as caught:
        handover.plan(target, source, key=KEY)
    text = str(caught.value)
    assert "3 have no source: head/kernel, head/bias, head_norm/scale" in text or (
        "3 have no source: head/bias, head/kernel, head_norm/scale" in text
    )
    assert "3 of the source have no use: decoder/x, decoder/y, token" in text
    lines = {
        name: eval(text.split(f"{KEY}.{name}=")[1].split(",).")[0] + ",)")
        for name in ("fresh", "leftover")
    }
    assert lines == dict(fresh=("^head/", "^head_norm/"), leftover=("^decoder/", "^token$"))
    table = handover.plan(target, source, key=KEY, **lines)
    taken = {row.path for row in table.rows if row.source}
    assert taken == {"encoder/a/kernel", "encoder/b/kernel"}


def test_a_complaint_about_a_moved_tree_names_the_renaming():
    model = encoder()
    params = params_of(video_encoder.init, model, 0)
    source = handover.from_tree({"vision": {"encoder": params}}, "before")
    with pytest.raises(UserError) as caught:
        move(model, model, source=source, params=params)
    rule = str(caught.value).split(f"{KEY}.rename=(")[1].split(",)")[0].strip('"')
    assert rule == "^vision/encoder/->"
    move(model, model, source=source, params=params, rename=(rule,))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rename=("a->b",)), "both become b"),
        (dict(rename=("encoder",)), "must hold 'pattern->replacement'"),
        (dict(rename=(r"^a->\1",)), "the pattern has 0 groups"),
        (dict(rename=("[->b",)), "must hold 'pattern->replacement'"),
        (dict(rename=("zzz->b",)), rf"{KEY}.rename='zzz', which matches none"),
        (dict(fresh=("heads",)), rf"{KEY}.fresh='heads', which matches none"),
        (dict(leftover=("[",)), rf"{KEY}.leftover must hold regular expressions"),
    ],
)
def test_mistakes_in_a_recipe(options, message):
    source = {"a": np.ones(2), "b": np.ones(2)}
    target = {path: jax.ShapeDtypeStruct((2,), jnp.float32) for path in "ab"}
    with pytest.raises(UserError, match=message):
        handover.plan(target, source, key=KEY, **options)


def test_a_source_that_gives_something_else_than_planned():
    target = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    table = handover.plan(target, {"a": np.ones(2)}, key=KEY)
    with pytest.raises(ValueError, match=r"a must be \[2\] as planned; got \[3\]"):
        handover.apply(table, lambda path: np.ones(3), dict)


# ---------------------------------------------------------------------------------------------- sources


@pytest.fixture
def workdir(tmp_path):
    """Two checkpoints; in each the average differs from the parameters."""
    import optax

    params = params_of(video_encoder.init, encoder(), 0)
    with Checkpoints(tmp_path / "checkpoints") as kept:
        for step in (1, 2):
            made = state.create(
                jax.tree.map(lambda x, step=step: x + step, params), optax.sgd(0.1), keep_ema=True
            )
            made = made.replace(ema=jax.tree.map(lambda x: x * 2, made.ema))
            kept.save(step, made, dict(stage="masked"), wait=True)
    return tmp_path, flat(params)


def test_a_workdir_gives_its_newest_average(workdir):
    place, params = workdir
    for spec, ema, wanted in [
        (str(place), True, lambda x: (x + 2) * 2),
        (str(place), False, lambda x: x + 2),
        (f"{place}@1", True, lambda x: (x + 1) * 2),
    ]:
        source = handover.open_source(spec, ema=ema)
        assert source.shapes.keys() == params.keys()
        for path in ("cls_token", "stack/blocks/mlp/up/kernel"):
            assert np.array_equal(source.get(path), wanted(params[path]))
        assert source.about["weights"] == ("ema" if ema else "params")
    assert source.about["step"] == 1 and source.meta["stage"] == "masked"


def test_a_damaged_leaf_is_an_error_and_no_other_weights(workdir):
    place, _ = workdir
    files = [f for f in (place / "checkpoints" / "2" / "state").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    for i in range(len(data) // 4, len(data), len(data) // 64):
        data[i] ^= 1
    largest.write_bytes(data)
    source = handover.open_source(str(place))
    with pytest.raises(stored.CheckpointError, match="step 2: .*Use another step"):
        for path in source.shapes:
            source.get(path)


def test_a_folder_of_weights(tmp_path):
    params = params_of(video_encoder.init, encoder(), 0)
    folder.save_params(tmp_path, params, {"model": "internvideo2", "arguments": {}})
    before, made, table = move(
        encoder(),
        encoder(frames=8),
        params=params,
        old_frames=4,
        source=handover.open_source(str(tmp_path)),
    )
    assert np.array_equal(flat(made)["cls_token"], before["cls_token"])
    table.save(tmp_path, "tune")
    kept = json.loads((tmp_path / "handover_tune.json").read_text())
    rows = {row["path"]: row for row in kept["parameters"]}
    assert rows["position_embedding"]["options"] == dict(old=[4, 4, 4], new=[8, 4, 4], prefix=1)
    assert rows["position_embedding"]["source_shape"] == [65, 48]
    assert (tmp_path / "handover_tune.txt").read_text() == str(table)
    assert kept["source"]["digest"] == source_files(tmp_path)


def source_files(place):
    return json.loads((place / "model.json").read_text())["files"]


def test_parts_of_a_model_from_several_folders(tmp_path):
    trees = {
        "masked": params_of(video_encoder.init, encoder(), 0),
        "multimodal": params_of(video_encoder.init, encoder(depth=1), 1),
    }
    for part, tree in trees.items():
        folder.save_params(tmp_path / part, tree, {"model": "internvideo2", "arguments": {}})
    spec = ";".join(f"{part}={tmp_path / part}" for part in trees)
    found = handover.open_source(spec, key=KEY)
    table = handover.plan(jax.eval_shape(lambda: trees), found.shapes, about=found.about, key=KEY)
    got = flat(handover.apply(table, found.get, lambda: trees))
    assert got.keys() == flat(trees).keys()
    assert all(np.array_equal(got[path], x) for path, x in flat(trees).items())
    assert f"{tmp_path / 'masked'} + {tmp_path / 'multimodal'}" in table.summary()
    with pytest.raises(UserError, match="not there"):
        handover.open_source(f"masked={tmp_path / 'masked'};multimodal={tmp_path}/none", key=KEY)


@pytest.mark.parametrize("what", ["nothing", "empty", "file"])
def test_what_is_no_source(what, tmp_path):
    place = tmp_path / what
    if what == "empty":
        place.mkdir()
    if what == "file":
        place.write_bytes(b"x")
    wanted = dict(nothing="is not there", empty="is neither", file="interop.from_torch --layout")
    with pytest.raises(UserError, match=wanted[what]):
        handover.open_source(str(place), key=KEY)
