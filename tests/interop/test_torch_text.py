"""Models of text, and of video and text, in PyTorch: numbers of JAX, published keys, certificates."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from invideo_jax.errors import UserError
from invideo_jax.interop import folder, from_torch, models, to_torch, verify
from invideo_jax.models import alignment, stage2, video_clip, video_encoder
from invideo_jax.models.text_encoder import Bert, ClipText

torch = pytest.importorskip("torch")
from invideo_jax.interop import torch_model  # noqa: E402 (imports torch)

TINY = dict(frames=2, image_size=16, depth=1)
WORDS = dict(vocabulary=30, positions=8)


def bert(**options):
    sizes = dict(width=16, depth=2, heads=2, mlp_width=24, fusion_from=1) | WORDS
    return Bert(**(sizes | options))


def clip_text(**options):
    return ClipText(16, 2, 2, 24, 6, **(WORDS | options))


def pairs(text=(), **options):
    vision = alignment.build(
        "Micro", **(TINY | options), mae_layers=0, clip_layers=1, clip_width=12, final_width=10
    )
    return stage2.Stage2(vision, bert(**dict(text)), width=6)


def clip():
    vision = alignment.ProjectedEncoder(video_encoder.build("Micro", **TINY), 6)
    return video_clip.VideoClip(vision, clip_text(activation="gelu"))


CASES = {
    "stage2": ("internvideo2_stage2", pairs),
    "clip": ("internvideo2_clip", clip),
    "bert": ("bert", lambda: bert(fusion_from=2)),
    "clip_text": ("clip_text", clip_text),
    "mobileclip_text": ("mobileclip_text", lambda: clip_text(activation="gelu", causal=False)),
}
WIDE = {
    "stage2_separate": (
        "internvideo2_stage2",
        lambda: pairs(dict(fusion_from=0, pad=3, eps=1e-5), positions="separate", tubelet=2),
    ),
    "stage2_images": (
        "internvideo2_stage2",
        lambda: pairs(dict(activation="gelu_tanh"), image_positions="separate"),
    ),
    "stage2_deeper": ("internvideo2_stage2", lambda: pairs(dict(depth=5, fusion_from=3), depth=3)),
    "clip_text_of_all": ("clip_text", lambda: clip_text(causal=False, eps=1e-3)),
}
_slow = lambda names: [pytest.param(name, marks=pytest.mark.slow) for name in names]
QUICK = ("clip_text",)  # the others run with the slow tests: each compiles a model
ALL = [*QUICK, *_slow(name for name in CASES | WIDE if name not in QUICK)]
CERTIFIED = ["stage2", "bert", *_slow(name for name in CASES if name not in ("stage2", "bert"))]


def random_params(model, dtype=np.float32):
    """Path -> array; nothing lies at its initial value."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        value = rng.normal(size=shape) / (shape[-2] ** 0.5 if "kernel" in path else 3)
        return (value + path.endswith("scale")).astype(dtype)

    return {path: draw(path, shape) for path, shape in models.shapes(model).items()}


@functools.cache
def case(name):
    """Layout, model and parameters, which nobody may change."""
    layout, make = (CASES | WIDE)[name]
    model = make()
    return layout, model, random_params(model)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """name -> the folder that the command wrote of this case."""

    @functools.cache
    def write(name):
        (layout, model, params), place = case(name), tmp_path_factory.mktemp(name)
        folder.save_params(place / "ours", params, models.describe(model))
        argv = [f"--workdir={place / 'ours'}", f"--layout={layout}", f"--output={place / 'x'}"]
        assert to_torch.main(argv) == 0
        return place / "x"

    return write


def inputs_for(model, batch=3, frames=None):
    """Arguments by name, of JAX and of PyTorch; the texts have different lengths."""
    rng, found = np.random.default_rng(1), {}
    if models.sees_video(model):
        encoder, _ = models.encoder_of(model)
        shape = (batch, frames or encoder.frames, encoder.image_size, encoder.image_size, 3)
        found["video"] = rng.normal(size=shape).astype(np.float32)
    text = models.text_tower(model)
    ids = rng.integers(4, text.vocabulary - 1, (batch, 7))
    lengths = np.array([7, 5, 3])
    valid = np.arange(7) < lengths[:, None]
    if isinstance(text, Bert):
        found |= {"ids": np.where(valid, ids, text.pad), "valid": valid}
    else:
        ids[np.arange(batch), lengths - 1] = text.vocabulary - 1
        found["ids"] = np.where(valid, ids, 0)
    theirs = {name: torch.from_numpy(x) for name, x in found.items()}
    if "video" in found:
        theirs["video"] = theirs["video"].permute(0, 4, 1, 2, 3).contiguous()
    return found, theirs


def torch_of(model, params, layout):
    built = torch_model.build(models.describe(model) | {"layout": layout})
    tree = unflatten_dict(params, sep="/")
    state = to_torch.to_state_dict(tree, layout=layout, cube=models.cube_of(model))
    state = {k: torch.from_numpy(v) for k, v in state.items()}
    built.load_state_dict(state, strict=True)
    return built.eval().requires_grad_(False), state


def close(ours, theirs, bound=1e-5):
    assert set(ours) <= set(theirs)
    for name, value in ours.items():
        assert theirs[name].shape == value.shape, name
        assert np.abs(theirs[name].numpy() - np.asarray(value)).max() <= bound, name


OF_BOTH = {"tokens", "pooled", "embedding", "text_tokens", "text_embedding"}
WANTED = {
    "internvideo2_stage2": OF_BOTH | {"text_pooled", "clip_final", "match", "words"},
    "internvideo2_clip": OF_BOTH | {"projected"},
    "bert": {"tokens", "pooled", "words"},
    "clip_text": {"embedding", "tokens"},
    "mobileclip_text": {"embedding", "tokens"},
}


@pytest.mark.parametrize("name", ALL)
def test_outputs_equal_jax_and_weights_come_back(name):
    layout, model, params = case(name)
    built, state = torch_of(model, params, layout)
    ours, theirs = inputs_for(model)
    want = models.embed(model, unflatten_dict(params, sep="/"), **ours)
    assert set(want) == WANTED[layout]
    close(want, built(**theirs))
    written = {k: v.numpy() for k, v in built.state_dict().items()}
    assert set(written) == set(state)
    expected = models.abstract(model)
    back = flatten_dict(from_torch.to_params(written, layout=layout, expected=expected), sep="/")
    assert all(np.array_equal(back[path], x) for path, x in params.items())


def test_methods_of_stage2_equal_those_of_jax():
    layout, model, params = case("stage2")
    built, _ = torch_of(model, params, layout)
    ours, theirs = inputs_for(model, frames=1)  # an image
    ids, valid, other = ours["ids"], ours["valid"], np.array([1, 2, 0])
    visible = np.array([[0, 2], [1, 3], [0, 3]])

    @jax.jit
    def run(params):
        call = lambda *a, method: model.apply({"params": params}, *a, method=method)
        seen = call(ours["video"], visible, method="encode_video")
        text = call(ids, valid, method="encode_text")
        match = call(text["tokens"], valid, seen["tokens"][other], method="match")
        words = call(ids, valid, seen["tokens"], method="words")
        return seen, text, match, words

    seen, text, match, words = run(unflatten_dict(params, sep="/"))
    got = built.encode_video(theirs["video"], torch.from_numpy(visible))
    close({k: v for k, v in seen.items() if k in got}, got)
    assert {"tokens", "embedding", "clip_middle"} <= set(got)
    told = built.encode_text(theirs["ids"], theirs["valid"])
    close(text, told)
    found = built.match(told["tokens"], theirs["valid"], got["tokens"][other])
    close({"match": match}, {"match": found})
    close({"words": words}, {"words": built.words(theirs["ids"], theirs["valid"], got["tokens"])})


def test_padding_changes_nothing_and_nothing_is_dropped():
    layout, model, params = case("stage2")
    built, _ = torch_of(model, params, layout)
    _, theirs = inputs_for(model)
    out = built(**theirs)
    built.train()
    again = built(theirs["video"][2:], theirs["ids"][2:, :3])  # without its padding
    for name in ("embedding", "text_embedding", "match"):
        torch.testing.assert_close(again[name], out[name][2:], atol=1e-5, rtol=1e-5)


def test_the_word_head_is_one_array_with_the_words(written):
    loaded = torch_model.load(written("bert"))
    head = loaded.cls["predictions"]
    assert head.decoder.weight is loaded.bert["embeddings"].word_embeddings.weight
    assert head.decoder.bias is head.bias
    with pytest.raises(ValueError, match="a model of text alone"):
        torch_model.load(written("bert"), frames=4)


@pytest.mark.parametrize("name", CERTIFIED)
def test_the_certificate_holds_and_the_folder_comes_back(written, name):
    (layout, model, params), out = case(name), written(name)
    found = json.loads((out / "certificate.json").read_text())
    assert "not" not in found["checked"] and "model.py" in found["files"]
    assert set(found["checked"]["differences"]) == WANTED[layout]
    assert max(found["checked"]["shares"].values()) < 1e-5
    assert verify.main([str(out)]) == 0
    assert "ids = torch.arange" in (out / "README.md").read_text()
    leaves, meta = from_torch.convert(out, layout=layout)
    assert models.make(meta) == model
    assert all(np.array_equal(leaves[path].read(), x) for path, x in params.items())


def test_the_text_tower_of_a_run_is_written_alone(tmp_path):
    _, model, params = case("clip")
    meta = models.describe(model)
    found = to_torch.export(tmp_path / "x", params, meta, layout="mobileclip_text")
    assert set(found["checked"]["differences"]) == {"embedding", "tokens"}
    assert found["model"] == "clip_text"


def test_a_bert_with_fusion_blocks_is_no_model_of_its_own(tmp_path):
    _, model, params = case("stage2")
    with pytest.raises(UserError, match="Layouts of this model: internvideo2_stage2"):
        to_torch.export(tmp_path / "x", params, models.describe(model), layout="bert")
    with pytest.raises(UserError, match="must have no fusion blocks"):
        models.shapes(bert())


@pytest.mark.slow
def test_other_clips_leave_the_places_of_words(tmp_path):
    model = clip()
    params = random_params(model)
    to_torch.export(tmp_path / "x", params, models.describe(model), layout="internvideo2_clip")
    built = torch_model.load(tmp_path / "x", frames=4, image_size=24)
    larger = models.with_encoder(model, frames=4, image_size=24)
    path = "vision/encoder/position_embedding"
    grids = models.encoder_of(model)[0].grid, models.encoder_of(larger)[0].grid
    params = params | {path: from_torch.resized_table(path, params[path], *grids)}
    ours, theirs = inputs_for(larger)
    want = models.embed(larger, unflatten_dict(params, sep="/"), **ours)
    close({name: jnp.asarray(x) for name, x in want.items()}, built(**theirs))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_onnx_and_compile(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    layout, make = CASES[name]
    model = make()
    built, _ = torch_of(model, random_params(model), layout)
    torch_model.export_onnx(built, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    given = torch_model.examples(built, batch=3)
    want = built(**given)
    feed = {s.name: given[s.name].numpy() for s in session.get_inputs()}
    for spec, value in zip(session.get_outputs(), session.run(None, feed)):
        np.testing.assert_allclose(value, want[spec.name].numpy(), atol=1e-5, rtol=1e-5)
    compiled = torch.compile(built, backend="eager", fullgraph=True)(**given)
    for name, value in want.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-5)
