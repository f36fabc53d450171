"""The PyTorch file that goes with exports: same numbers as JAX, published keys, any clip size."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import masking
from invideo_jax.interop import from_torch, models, names
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import alignment, classifier, video_encoder, video_mae

torch = pytest.importorskip("torch")
from invideo_jax.interop import torch_model  # noqa: E402 (imports torch)

TINY = dict(image_size=16, frames=4, depth=2)
STAGE1 = TINY | dict(clip_width=24, clip_layers=2, mae_layers=1, mae_width=20, final_width=16)
CASES = {
    "stage1": lambda **k: alignment.build("Micro", **(STAGE1 | k)),
    "distill": lambda **k: alignment.build("Micro", **(STAGE1 | dict(mlp=True, mae_layers=0) | k)),
    "separate": lambda **k: alignment.build("Micro", **(STAGE1 | dict(positions="separate") | k)),
    "images": lambda **k: alignment.build(
        "Micro", **(STAGE1 | dict(image_positions="separate") | k)
    ),
    "bare": lambda **k: alignment.build(
        "Micro",
        **(
            STAGE1
            | dict(qk_norm=False, qkv_bias=True, layer_scale=0.0, tubelet=2, activation="gelu")
            | k
        ),
    ),
    "encoder": lambda **k: video_encoder.build("Micro", **(TINY | k)),
    "no_pool": lambda **k: video_encoder.build("Micro", **(TINY | dict(pool_width=0) | k)),
    "clip": lambda **k: alignment.ProjectedEncoder(
        video_encoder.build("Micro", **(TINY | dict(layer_scale_float32=False) | k)), 24
    ),
    "video_mae": lambda **k: video_mae.build("Micro", **(TINY | k)),
    "video_mae_scaled": lambda **k: video_mae.build(
        "Micro", **(TINY | dict(layer_scale=0.1, last_norm=False, qkv_bias=False, scale=0.3) | k)
    ),
}
for _merge in ("plain", "attentive", *classifier.MERGES[1:]):
    for _norm in ("kaiming_BN",) if _merge in ("plain", "attentive") else classifier.NORMS:
        _options = dict(variant=_merge)
        if _merge not in ("plain", "attentive"):
            _options = dict(variant="cat", merge=_merge, merge_norm=_norm)
        CASES[f"classifier_{_merge}_{_norm}"] = lambda o=_options, **k: classifier.build(
            "Micro", classes=5, **(TINY | o | k)
        )
CASES["classifier_mae"] = lambda **k: classifier.build(
    "Micro", encoder="video_mae", classes=5, **(TINY | k)
)
LAYOUT = {
    "aligned": "internvideo2", "internvideo2": "internvideo2_encoder", "video_mae": "videomae",
    "projected": "internvideo2_clip_vision", "classifier": "internvideo2_classification",
}  # fmt: skip


def layout_of(model):
    mae = "MAE" in type(models.encoder_of(model)[0]).__name__
    name = LAYOUT[models.describe(model)["model"]]
    return "videomae_classification" if mae and "class" in name else name


def random_params(model, seed=0):
    """Nothing lies at its initial value; running variances stay positive."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        value = rng.normal(size=x.shape).astype(np.float32)
        if "variance" in name:
            return value**2 + np.float32(0.5)
        if "scale" in name and "kernel" not in name:
            return 1 + np.float32(0.2) * value
        if "batches" in name:
            return np.asarray(3, np.float32)
        return value / np.float32(x.shape[-2] ** 0.5 if "kernel" in name else 3)

    return jax.tree_util.tree_map_with_path(draw, models.abstract(model))


def state_of(model, params):
    return to_state_dict(params, layout=layout_of(model), cube=models.cube_of(model))


def torch_of(model, params):
    text = models.describe(model)
    built = torch_model.build(text)
    state = {k: torch.from_numpy(v) for k, v in state_of(model, params).items()}
    built.load_state_dict(state, strict=True)
    return built.eval().requires_grad_(False)


def video_for(model, batch=2, seed=0):
    encoder, _ = models.encoder_of(model)
    size = encoder.image_size
    shape = (batch, encoder.frames, size, size, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_first(video):
    return torch.from_numpy(np.ascontiguousarray(video.transpose(0, 4, 1, 2, 3)))


def close(ours, theirs, bound=1e-5):
    for name, value in ours.items():
        got = theirs[name].float().numpy()
        assert got.shape == value.shape, name
        assert np.abs(got - np.asarray(value)).max() <= bound, name


# The others run with the slow tests: each compiles a model.
QUICK = ("stage1", "separate", "bare", "clip", "video_mae_scaled", "classifier_mae")
QUICK += ("classifier_attentive_kaiming_BN", "classifier_cls_avgN_proj_BN")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", ALL)
def test_outputs_equal_jax_and_weights_come_back(name):
    model = CASES[name]()
    params, video = random_params(model), video_for(model)
    built = torch_of(model, params)
    ours = models.embed(model, params, jnp.asarray(video))
    assert {"logits"} <= set(ours) if "class" in name else {"tokens"} <= set(ours)
    close(ours, built(channels_first(video)))
    state = state_of(model, params)
    assert set(state) == set(built.state_dict())
    back = from_torch.to_params(
        {k: v.numpy() for k, v in built.state_dict().items()},
        layout=layout_of(model),
        expected=models.abstract(model),
    )
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", ["stage1", "separate", "images"])
@pytest.mark.parametrize("image", [False, True])
def test_heads_on_visible_tokens_and_images_equal_jax(name, image):
    model = CASES[name]()
    params, video = random_params(model), video_for(model)
    video = video[:, :1] if image else video
    patches = 4 if image else 16
    visible = np.sort(
        np.random.default_rng(1).permuted(np.tile(np.arange(patches), (2, 1)), axis=1)[:, :3]
    )
    ours = model.apply({"params": params}, jnp.asarray(video), jnp.asarray(visible), features=[0])
    ours.pop("embedded")
    theirs = torch_of(model, params)(
        channels_first(video), torch.from_numpy(visible), features=(0,)
    )
    assert {"clip_middle", "mae", "clip_final", "block0"} <= set(ours)
    close({k: v for k, v in ours.items() if k in theirs}, theirs)


def test_reconstruction_equals_jax():
    model = CASES["video_mae"]()
    params, video = random_params(model), video_for(model)
    mask = jnp.asarray(np.random.default_rng(1).permutation(8) < 5)[None].repeat(2, 0)
    visible, hidden = masking.ids_of(mask, 5)
    ours, _ = model.apply({"params": params}, jnp.asarray(video), visible, hidden)
    ids = [torch.from_numpy(np.asarray(x, np.int64)) for x in (visible, hidden)]
    close({"x": ours}, {"x": torch_of(model, params).reconstruct(channels_first(video), *ids)})


@pytest.mark.parametrize("name", ["stage1", "separate", "images"])
@pytest.mark.parametrize("frames, size", [(8, 24), (4, 8), (6, 16)])
def test_positions_of_other_clips_equal_jax(tmp_path, name, frames, size):
    import json

    from safetensors.torch import save_file

    model = CASES[name]()
    params = random_params(model)
    state = {k: torch.from_numpy(v) for k, v in state_of(model, params).items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(models.describe(model)))
    built = torch_model.load(tmp_path, frames=frames, image_size=size)
    larger = models.with_encoder(model, frames=frames, image_size=size)
    old, new = model.grid, larger.grid
    shapes, flat = models.shapes(larger), from_torch.flatten_dict(params, sep="/")
    flat = {
        k: v if v.shape == shapes[k] else from_torch.resized_table(k, v, old, new)
        for k, v in flat.items()
    }
    video = video_for(larger)
    ours = models.embed(larger, from_torch.unflatten_dict(flat, sep="/"), jnp.asarray(video))
    close(ours, built(channels_first(video)))


def test_bfloat16_is_near():
    model = CASES["stage1"]()
    params, video = random_params(model), video_for(model)
    half = models.with_encoder(model, dtype=jnp.bfloat16)
    ours = models.embed(half, params, jnp.asarray(video, jnp.bfloat16))
    theirs = torch_of(model, params).bfloat16()(channels_first(video).bfloat16())
    exact = models.embed(model, params, jnp.asarray(video))
    for name in ("pooled", "clip_final"):
        gap = np.abs(ours[name] - theirs[name].float().numpy()).max()
        noise = np.abs(ours[name] - exact[name]).max()
        assert gap <= max(3 * noise, 0.02), (name, gap, noise)


def test_published_keys_of_every_row_are_in_the_module():
    """The names come from the tables, so the tables and the module may not part."""
    for name in ("stage1", "classifier_cls_avgN_proj_BN", "video_mae_scaled"):
        model = CASES[name]()
        keys = set(torch_model.build(models.describe(model)).state_dict())
        shapes = models.shapes(model)
        from invideo_jax.interop import mapping

        assert keys == {k for _, k, _ in mapping.keys_of(names.get(layout_of(model)), shapes)}


def test_it_needs_nothing_but_torch():
    source = importlib.util.find_spec("invideo_jax.interop.torch_model").origin
    with open(source) as file:
        imports = {
            line.split()[1].split(".")[0] for line in file if line.startswith(("import", "from"))
        }
    assert imports == {"json", "pathlib", "sys", "warnings", "torch"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "video_mae", "classifier_cls_avgN_proj_kaiming_BN"])
def test_onnx_export_and_compile(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = CASES[name]()
    params = random_params(model)
    built = torch_of(model, params)
    torch_model.export_onnx(built, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for batch in (1, 3):
        video = channels_first(video_for(model, batch, seed=batch))
        wanted = built(video)
        found = session.run(None, {"video": video.numpy()})
        for spec, value in zip(session.get_outputs(), found):
            np.testing.assert_allclose(value, wanted[spec.name].numpy(), atol=1e-5)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(
        built, (channels_first(video_for(model)),), dynamic_shapes=dynamic
    )
    found = exported.module()(video)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)
    compiled = torch.compile(built, backend="eager", fullgraph=True)(video)
    torch.testing.assert_close(compiled["tokens"], wanted["tokens"], atol=1e-5, rtol=1e-5)
