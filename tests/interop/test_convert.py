"""The commands: PyTorch files to folders of ours and back, certificates, programs."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import REPOSITORY
from flax.traverse_util import flatten_dict, unflatten_dict

from invideo_jax.checkpoint import Checkpoints
from invideo_jax.errors import UserError
from invideo_jax.interop import (
    certificate,
    folder,
    from_torch,
    infer,
    mapping,
    models,
    names,
    reading,
    safetensors_io,
    stablehlo,
    to_torch,
    torch_zip,
    verify,
)
from invideo_jax.interop.leaves import Leaf, leaf
from invideo_jax.models import (
    alignment,
    classifier,
    clip_vit,
    positions,
    stage2,
    video_clip,
    video_encoder,
    video_mae,
)
from invideo_jax.models.text_encoder import Bert, ClipText

TINY = dict(image_size=16, frames=4, depth=2)
HEADS = dict(clip_width=24, clip_layers=2, mae_layers=1, mae_width=20, final_width=16)
BERT = Bert(32, 3, 2, 40, 2, vocabulary=30, positions=12)


def student(**options):
    return alignment.build("Micro", **(TINY | HEADS | options))


def projected():
    encoder = video_encoder.build("Micro", **(TINY | dict(layer_scale_float32=False)))
    return alignment.ProjectedEncoder(encoder, 24)


MODELS = {
    "videomae": lambda: video_mae.build("Micro", **TINY),
    "videomae_hf": lambda: video_mae.build("Micro", **TINY, eps=1e-12, decoder_eps=1e-5),
    "videomae_classification": lambda: classifier.build(
        "Micro", encoder="video_mae", classes=7, eps=1e-6, **TINY
    ),
    "videomae_hf_classification": lambda: models.with_encoder(
        classifier.build("Micro", encoder="video_mae", classes=7, **TINY), eps=1e-12
    ),
    "internvideo2_stage1": student,
    "internvideo2_distill": lambda: student(mlp=True, mae_layers=0),
    "internvideo2_encoder": lambda: video_encoder.build("Micro", **TINY),
    "internvideo2_classification": lambda: classifier.build(
        "Micro", classes=7, variant="cat", merge="cls_avgN_proj", merge_norm="BN", **TINY
    ),
    "internvideo2_clip_vision": projected,
    "internvl_vision": lambda: video_encoder.build("Micro", **(TINY | dict(frames=1, layer_scale=0.1))),
    "videomae_encoder": lambda: video_mae.build_encoder("Micro", **TINY),
    "clip_visual": lambda: clip_vit.ClipViT(64, 2, 1, 96, embed=24, patch=8, frames=4, image_size=16),
    "clip_visual_hf": lambda: clip_vit.ClipViT(64, 2, 1, 96, embed=24, patch=8, frames=4, image_size=16),
    "internvideo2_clip": lambda: video_clip.VideoClip(
        projected(), ClipText(32, 2, 2, 40, 24, vocabulary=30, positions=12, activation="gelu")
    ),
    "internvideo2_stage2": lambda: stage2.Stage2(
        student(image_positions="separate", mae_layers=0), BERT, 24
    ),
}  # fmt: skip


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32)
    return {p: draw(x) for p, x in flatten_dict(models.abstract(model), sep="/").items()}


def layout_options(model):
    """What the command must be told of a size that nobody published."""
    encoder, _ = models.encoder_of(model)
    options = [f"--old_frames={encoder.frames}", f"--old_image_size={encoder.image_size}"]
    options += ["--size=Micro"]
    return options + ["--model.text_heads=2"] * hasattr(model, "text")


def values_for(model):
    return {"text_heads": 2} if hasattr(model, "text") else {}


def given_for(model):
    encoder, _ = models.encoder_of(model)
    return infer.Given(encoder.frames, encoder.image_size, "Micro", values_for(model))


def state_of(model, params, layout):
    leaves = mapping.to_state(params, layout=layout, cube=models.cube_of(model))
    return {k: np.asarray(x.read(), order="C") for k, x in leaves.items()}


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", MODELS)
def test_files_of_every_layout_come_back_bit_for_bit(tmp_path, layout, kind):
    model = MODELS[layout]()
    whole = lambda x: x.dtype == np.int64
    state = state_of(model, random_params(model), layout)
    state = {k: x if whole(x) else x.astype(kind) for k, x in state.items()}
    torch_zip.write(tmp_path / "x.pth", {f"module.{k}": x for k, x in state.items()})
    leaves, meta = from_torch.convert(tmp_path / "x.pth", layout=layout, given=given_for(model))
    folder.save_params(tmp_path / "ours", leaves, meta)
    meta, lazy = folder.open_params(tmp_path / "ours")
    again = models.make(meta)
    assert again == model.clone() and set(lazy) == set(models.shapes(model))
    back = mapping.to_state(lazy.leaves, layout=layout, cube=models.cube_of(again))
    assert list(back) == list(state)
    for key, x in state.items():
        got = back[key].read()
        assert (got.dtype, got.shape, got.tobytes()) == (x.dtype, x.shape, x.tobytes()), key


KEYS = {
    "videomae_pretrain_": "videomae", "hf_videomae_pretrain_": "videomae_hf",
    "videomae_finetune_": "videomae_classification", "internvideo2_pretrain_": "internvideo2_stage1",
    "hf_videomae_classify_": "videomae_hf_classification", "internvideo2_distill_": "internvideo2_distill",
    "internvideo2_finetune_": "internvideo2_classification", "internvideo2_ap_": "internvideo2_classification",
    "internvideo2_cat_": "internvideo2_classification", "internvideo2_stage2_model": "internvideo2_stage2",
    "internvideo2_stage2_vision": "internvideo2_stage1",
}  # fmt: skip


def test_published_lists_of_keys_and_shapes_follow_from_themselves(shared):
    """From the published shapes alone: the model, its parameters, and the same list again, in order.

    Every size up to 6B: nothing is allocated, arrays are promises of shapes.
    """
    done = 0
    for file in sorted((shared / "golden" / "keys").glob("*.json")):
        layout = next((v for k, v in KEYS.items() if file.name.startswith(k)), None)
        if file.name.startswith("internvideo2_clip_vision"):
            layout = "internvideo2_clip_vision" if "14" in file.name else "internvideo2_encoder"
        if layout is None:
            continue
        listed = json.loads(file.read_text())
        empty = lambda shape, kind: Leaf(tuple(shape), np.dtype(kind), None)
        state = {k: empty(shape, kind) for k, (kind, shape) in listed["tensors"].items()}
        arange = np.arange(512)[None]
        state = {k: leaf(arange) if "position_ids" in k else x for k, x in state.items()}
        if (
            "stage2_model" in file.name
        ):  # the copy of the table of words is compared, so it must be read
            tied = (
                "text_encoder.cls.predictions.decoder.weight",
                "text_encoder.cls.predictions.decoder.bias",
            )
            state = {k: x for k, x in state.items() if k not in tied}
        state, _ = reading.without_prefixes(state, layout)
        table = names.get(layout)
        state = {mapping.spelled(k, table): x for k, x in state.items()}
        frames = 4 if "stage2" in file.name else 0
        shapes = {k: x.shape for k, x in state.items()}
        text = infer.model_text(shapes, layout, infer.Given(frames))
        model = models.with_encoder(models.make(text), scan=True)  # quicker to trace
        shapes = models.shapes(model)
        leaves = mapping.to_leaves(state, layout=layout, expected=shapes)
        back = mapping.to_state(leaves, layout=layout, cube=models.cube_of(model))
        want = {k: tuple(shape) for k, (_, shape) in listed["tensors"].items()}
        got = {k: x.shape for k, x in back.items()}
        tail = "_tf4" in file.name  # another spelling of the same
        if layout == "internvideo2_encoder":
            want = {k.removeprefix("vision_encoder."): v for k, v in want.items()}
        assert len(got) == len(want), file.name
        if not tail:
            assert list(got.items()) == list(want.items()), file.name
        done += 1
    assert done >= 28


def command(*argv):
    return from_torch.main(list(argv))


def test_commands_there_and_back(tmp_path, capsys):
    pytest.importorskip("torch")
    model = student()
    state = state_of(model, random_params(model), "internvideo2_stage1")
    inside = {f"vision_encoder.{k}": x for k, x in state.items()}
    safetensors_io.write_shards(
        tmp_path, "model", inside | {"temp": np.ones((), np.float32)}, limit=90_000
    )
    argv = ["--layout=internvideo2_stage1", f"--input={tmp_path}", f"--output={tmp_path / 'ours'}"]
    assert command(*argv, "--drop=temp", *layout_options(model)) == 0
    said = capsys.readouterr().out
    assert "prefix 'vision_encoder.' taken off" in said and "dropped: temp" in said
    assert "heads = 3" in said and "frames = 4" in said
    out = tmp_path / "theirs"
    argv = [f"--workdir={tmp_path / 'ours'}", "--layout=internvideo2_stage1", f"--output={out}"]
    assert to_torch.main(argv) == 0
    back = reading.open_weights(out / "model.safetensors").state
    assert all(back[k].read().tobytes() == x.tobytes() for k, x in state.items())
    found = json.loads((out / "certificate.json").read_text())
    assert set(found["checked"]["differences"]) == {"tokens", "pooled", "clip_final"}
    assert max(found["checked"]["differences"].values()) < 1e-5
    assert found["files"]["model.py"] and "| pooled |" in (out / "README.md").read_text()
    assert verify.main([str(out)]) == 0
    with pytest.raises(SystemExit):
        to_torch.main(argv)
    assert "must be new or empty" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("torch")
    out, model = tmp_path_factory.mktemp("exported") / "x", student()
    to_torch.export(out, random_params(model), models.describe(model), layout="internvideo2_stage1")
    return out


def copied(exported, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for file in exported.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def told(out):
    lines = []
    return certificate.verify(out, lines.append), "\n".join(lines)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.py", "config.json", certificate.TENSORS]
)
def test_a_flipped_byte_is_found(exported, tmp_path, name):
    out = copied(exported, tmp_path)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    good, said = told(out)
    assert not good and said == f"FAIL {name}: its content is not that of the certificate"
    (out / name).unlink()
    assert "it is not there" in told(out)[1]
    assert verify.main([str(out)]) == 1


def test_other_numbers_are_found_though_hashes_hold(exported, tmp_path):
    """As if the exporting code had had a defect: the files agree, the numbers do not."""
    out = copied(exported, tmp_path)
    assert told(out)[0]
    config = json.loads((out / "config.json").read_text())
    config["arguments"]["encoder"]["arguments"]["heads"] = 1
    (out / "config.json").write_text(json.dumps(config))
    sheet = json.loads((out / certificate.TEXT).read_text())
    sheet["files"]["config.json"] = safetensors_io.sha256(out / "config.json")
    (out / certificate.TEXT).write_text(json.dumps(sheet))
    good, said = told(out)
    assert not good and "FAIL tokens" in said and "ok   12" not in said


def test_a_folder_without_a_certificate(tmp_path):
    with pytest.raises(UserError, match="must hold a certificate.json"):
        certificate.verify(tmp_path)


def test_the_folders_model_is_never_run(exported, tmp_path):
    out = copied(exported, tmp_path)
    text = f"open({str(tmp_path / 'made')!r}, 'w')\n" + (out / "model.py").read_text()
    (out / "model.py").write_text(text)
    sheet = json.loads((out / certificate.TEXT).read_text())
    sheet["files"]["model.py"] = safetensors_io.sha256(out / "model.py")
    (out / certificate.TEXT).write_text(json.dumps(sheet))
    good, said = told(out)
    assert good and "model.py is of another version" in said and not (tmp_path / "made").exists()


def test_without_torch_the_certificate_says_so(tmp_path, monkeypatch):
    find = certificate.importlib.util.find_spec
    absent = lambda name, *a: None if name == "torch" else find(name, *a)
    monkeypatch.setattr(certificate.importlib.util, "find_spec", absent)
    model = MODELS["internvideo2_encoder"]()
    out = tmp_path / "x"
    found = to_torch.export(
        out, random_params(model), models.describe(model), layout="internvideo2_encoder"
    )
    assert found["checked"] == {"not": "torch not installed (pip install 'invideo-jax[torch]')"}
    assert "Not checked: torch not installed" in (out / "README.md").read_text()
    assert not told(out)[0]
    monkeypatch.undo()
    pytest.importorskip("torch")
    assert told(out)[0]


def test_the_folder_works_with_torch_alone(exported):
    """In a fresh process where nothing of JAX or of this package can be imported."""
    program = (
        "import sys\n"
        "for name in ('jax', 'flax', 'invideo_jax', 'transformers', 'timm'): sys.modules[name] = None\n"
        "import torch\nfrom model import load\n"
        "from safetensors.torch import load_file\n"
        "model, kept = load('.'), load_file('certificate.safetensors')\n"
        "out = model(kept['video'])\n"
        "print(max((out[n] - kept['jax/' + n]).abs().max().item() for n in ('tokens', 'pooled', 'clip_final')))\n"
        "print(tuple(load('.', frames=8, image_size=24)(torch.zeros(1, 3, 8, 24, 24))['tokens'].shape))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=exported, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gap, shape = done.stdout.strip().splitlines()
    assert float(gap) < 1e-5 and shape == "(1, 73, 48)"


def test_pth_and_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    from invideo_jax.interop import torch_model

    model = MODELS["internvideo2_classification"]()
    params = random_params(model)
    params = {p: np.abs(x) if "variance" in p else x for p, x in params.items()}
    found = to_torch.export(
        tmp_path / "x",
        params,
        models.describe(model),
        layout="internvideo2_classification",
        file_format="pth",
        dtype="bfloat16",
    )
    assert max(found["checked"]["shares"].values()) < 1e-5
    state = torch.load(tmp_path / "x" / "model.pth", weights_only=True)
    assert state["head.weight"].dtype == torch.bfloat16
    module = torch_model.load(tmp_path / "x")  # takes videos in float32
    assert module(torch_model.example(module))["logits"].dtype == torch.bfloat16
    assert state["down_norm.num_batches_tracked"].dtype == torch.int64
    assert told(tmp_path / "x")[0]


@pytest.mark.parametrize("last_norm, bias", [(True, True), (False, False)])
def test_transformers_opens_the_folder(tmp_path, last_norm, bias):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = video_mae.build(
        "Micro", **TINY, last_norm=last_norm, qkv_bias=bias, decoder_eps=1e-5
    )  # fmt: skip
    params = random_params(model)
    out = tmp_path / "x"
    found = to_torch.export(out, params, models.describe(model), layout="videomae_hf")
    assert max(found["checked"]["shares"].values()) < 1e-5
    theirs, report = transformers.VideoMAEForPreTraining.from_pretrained(
        out, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    video = np.random.default_rng(0).normal(size=(2, 4, 16, 16, 3)).astype(np.float32)
    mask = np.tile(np.arange(8) % 3 > 0, (2, 1))
    pick = lambda wanted: jnp.asarray([np.flatnonzero(row == wanted) for row in mask])
    ours, _ = model.apply(
        {"params": unflatten_dict(params, sep="/")}, jnp.asarray(video), pick(False), pick(True)
    )
    pixels = torch.from_numpy(video.transpose(0, 1, 4, 2, 3).copy())
    got = theirs.eval()(pixels, bool_masked_pos=torch.from_numpy(mask)).logits
    np.testing.assert_allclose(got.detach().numpy(), ours, atol=1e-5)
    back, _ = from_torch.convert(out, layout="videomae_hf")  # config.json tells heads and sizes
    assert all(back[p].read().tobytes() == x.tobytes() for p, x in params.items())
    body = transformers.VideoMAEModel.from_pretrained(out).eval()
    tokens = models.embed(model, unflatten_dict(params, sep="/"), video)["tokens"]
    np.testing.assert_allclose(body(pixels).last_hidden_state.detach().numpy(), tokens, atol=1e-5)


def test_transformers_lacks_what_it_lacks(tmp_path):
    model = video_mae.build("Micro", **TINY, scale=0.5)
    with pytest.raises(UserError, match="has no scale; got scale=0.5. Use layout 'videomae'"):
        to_torch.export(
            tmp_path / "x", random_params(model), models.describe(model), layout="videomae_hf"
        )


# ---- other clips, other classes ---------------------------------------------------------------------


def file_of(tmp_path, layout, model=None, change=lambda state: state):
    model = model or MODELS[layout]()
    params = random_params(model)
    safetensors_io.write(tmp_path / "x.safetensors", change(state_of(model, params, layout)))
    return tmp_path / "x.safetensors", model, params


@pytest.mark.parametrize("separate", [False, True])
def test_positions_are_interpolated_for_other_clips(tmp_path, separate):
    options = dict(positions="separate") if separate else dict(image_positions="separate")
    file, model, params = file_of(tmp_path, "internvideo2_stage1", student(**options))
    leaves, meta = from_torch.convert(
        file,
        layout="internvideo2_stage1",
        given=given_for(model),
        wanted=from_torch.Wanted(frames=8, image_size=24),
    )
    new = models.make(meta)
    assert new.encoder.grid == (8, 3, 3)
    assert {p: x.shape for p, x in leaves.items()} == models.shapes(new)
    changed = [p for p in params if params[p].shape != leaves[p].shape]
    assert len(changed) == 6
    if not separate:
        for path, first in [("encoder/position_embedding", 1), ("mae_position_embedding", 0)]:
            want = positions.interpolate(params[path], old_times=4, grid=(8, 3, 3), prefix=first)
            np.testing.assert_array_equal(leaves[path].read(), want)
        path = "encoder/image_position_embedding"
        want = positions.interpolate(params[path], old_times=1, grid=(1, 3, 3), prefix=1)
        np.testing.assert_array_equal(leaves[path].read(), want)
    same = [p for p in params if p not in changed]
    assert all(np.array_equal(leaves[p].read(), params[p]) for p in same)
    assert sum("interpolated" in note for note in meta["notes"]) == len(changed)


def test_a_wrong_number_of_old_frames_is_explained(tmp_path):
    file, model, _ = file_of(tmp_path, "internvideo2_stage1")
    with pytest.raises(
        UserError, match=r"16 places, which 8 frames do not .* 1 \(32 pixels\), 4 \(16"
    ):
        from_torch.convert(file, layout="internvideo2_stage1", given=infer.Given(size="Micro"))


def test_classes_and_fresh_heads(tmp_path):
    file, model, params = file_of(tmp_path, "videomae_classification")
    convert = lambda **w: from_torch.convert(
        file,
        layout="videomae_classification",
        given=given_for(model),
        wanted=from_torch.Wanted(**w),
    )
    leaves, meta = convert(classes=[5, 0, 2])
    assert models.make(meta).classes == 3
    np.testing.assert_array_equal(leaves["head/kernel"].read(), params["head/kernel"][:, [5, 0, 2]])
    np.testing.assert_array_equal(leaves["head/bias"].read(), params["head/bias"][[5, 0, 2]])
    with pytest.raises(UserError, match="of 0..6; got 2 from 0 to 7"):
        convert(classes=[0, 7])
    leaves, meta = convert(fresh=["head/*"])
    assert not leaves["head/bias"].read().any()
    np.testing.assert_array_equal(leaves["fc_norm/scale"].read(), params["fc_norm/scale"])
    assert "not used, made fresh: head.weight, head.bias" in meta["notes"]
    with pytest.raises(UserError, match=r"--fresh must name parameters; hed/\* names none"):
        convert(fresh=["hed/*"])
    with pytest.raises(UserError, match="--drop must name keys"):
        convert(drop=["hed*"])
    with pytest.raises(UserError, match="Missing: head.bias"):
        convert(drop=["head.bias"])


@pytest.mark.parametrize(
    "text, said", [("[5, 0]", 0), ("{}", "list of whole"), ("[1.5]", "list of"), ("[", "")]
)
def test_label_maps(tmp_path, capsys, text, said):
    file, model, params = file_of(tmp_path, "videomae_classification")
    rows = tmp_path / "map.json"
    rows.write_text(text)
    argv = ["--layout=videomae_classification", f"--input={file}", f"--output={tmp_path / 'o'}"]
    argv += [f"--label_map={rows}", *layout_options(model)]
    if said == 0:
        assert command(*argv) == 0
        _, lazy = folder.open_params(tmp_path / "o")
        np.testing.assert_array_equal(lazy["head/bias"], params["head/bias"][[5, 0]])
        assert "classes: 2 of 7" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    assert stop.value.code == 2 and f"--label_map={rows} cannot be used" in capsys.readouterr().err


def test_what_shapes_do_not_tell_must_be_given(tmp_path):
    file, model, _ = file_of(tmp_path, "internvideo2_stage1")
    convert = lambda **g: from_torch.convert(
        file, layout="internvideo2_stage1", given=infer.Given(4, **g)
    )
    with pytest.raises(
        UserError, match="no published model has width 48. Give --model.heads=N, or --size"
    ):
        convert()
    meta = convert(values=dict(heads=4, pool_heads=2, activation="gelu"))[1]
    encoder = models.make(meta).encoder
    assert (encoder.heads, encoder.pool_heads, encoder.activation) == (4, 2, "gelu")
    with pytest.raises(UserError, match='--model.activatoin must name an .* mean "activation"'):
        convert(size="Micro", values=dict(activatoin="gelu"))
    with pytest.raises(UserError, match="multiple of heads"):
        convert(values=dict(heads=5, pool_heads=4))


def test_layouts_that_do_not_fit_are_told(tmp_path):
    file, *_ = file_of(tmp_path, "internvideo2_stage1")
    with pytest.raises(
        UserError, match="must hold encoder.patch_embed.proj.weight; .* Its keys begin"
    ):
        from_torch.convert(file, layout="videomae")
    with pytest.raises(UserError, match="not made from a file alone"):
        from_torch.convert(file, layout="internvideo2")
    with pytest.raises(UserError, match="Did you mean"):
        from_torch.convert(file, layout="internvideo2_stage3")
    more = lambda state: state | {"mystery.weight": np.zeros(3, np.float32)}
    file, model, _ = file_of(tmp_path, "internvideo2_stage1", change=more)
    with pytest.raises(UserError, match="Not used: mystery.weight"):
        from_torch.convert(file, layout="internvideo2_stage1", given=given_for(model))


def test_a_wrong_layout_names_those_of_the_model(tmp_path):
    model = student()
    with pytest.raises(
        UserError, match="Layouts of this model: internvideo2, internvideo2_distill, i"
    ):
        to_torch.export(
            tmp_path / "x", random_params(model), models.describe(model), layout="videomae"
        )
    assert not (tmp_path / "x").exists()


def test_what_to_torch_wrote_needs_no_options(tmp_path):
    """Heads, frames and size come from its config.json, also for another layout of the same file."""
    for layout, other in (("internvideo2_stage1", "internvideo2_encoder"), ("videomae", "")):
        model = models.with_encoder(MODELS[layout](), heads=2)
        params = random_params(model)
        to_torch.export(tmp_path / layout, params, models.describe(model), layout=layout)
        assert models.make(from_torch.convert(tmp_path / layout, layout=layout)[1]) == model.clone()
        given = infer.Given(values=dict(heads=4))
        changed = models.make(from_torch.convert(tmp_path / layout, layout=layout, given=given)[1])
        assert models.encoder_of(changed)[0].heads == 4
        if other:
            alone = models.make(from_torch.convert(tmp_path / layout, layout=other)[1])
            assert (alone.heads, alone.frames, alone.image_size) == (2, 4, 16)


# ---- workdirs, programs, memory -----------------------------------------------------------------------


def test_a_checkpoint_is_exported(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    model = MODELS["videomae"]()
    trees = [unflatten_dict(random_params(model, seed), sep="/") for seed in (0, 1)]
    state = jax.tree.map(jnp.asarray, dict(zip(("params", "ema"), trees)))
    meta = dict(step=3, stage="masked", config={"seed": 7}, model=models.text_of(model))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(3, state, meta, wait=True)
    for flags, params in [([], trees[0]), (["--ema"], trees[1])]:
        out = tmp_path / f"out{len(flags)}"
        argv = [
            f"--workdir={tmp_path / 'run'}",
            "--layout=videomae",
            f"--output={out}",
            "--format=pth",
        ]
        assert to_torch.main([*argv, *flags]) == 0
        found = torch.load(out / "model.pth", weights_only=True)["encoder.norm.weight"]
        np.testing.assert_array_equal(found.numpy(), params["encoder"]["norm"]["scale"])
        text = (out / "README.md").read_text()
        assert "stage 'masked', step 3" in text and '"seed": 7' in text
        assert ("moving average" in text) == bool(flags)
    with pytest.raises(SystemExit):
        to_torch.main(["--workdir=/nowhere", "--layout=videomae", f"--output={tmp_path / 'z'}"])
    assert "must be the folder of a run, or of weights" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["internvideo2_stage1", "videomae"])
def test_a_program_takes_any_batch(tmp_path, layout):
    model = MODELS[layout]()
    params = random_params(model)
    folder.save_params(tmp_path / "in", params, models.describe(model))
    file = tmp_path / "x.stablehlo"
    assert (
        stablehlo.main([f"--checkpoint={tmp_path / 'in'}", f"--output={file}", "--platforms=cpu"])
        == 0
    )
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    for batch in (1, 3):
        video = np.random.default_rng(batch).integers(0, 256, (batch, 4, 16, 16, 3), dtype=np.uint8)
        tokens, pooled = program.call(video)
        want = models.embed(model, unflatten_dict(params, sep="/"), video)
        np.testing.assert_allclose(tokens, want["tokens"], atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(pooled, want["pooled"], atol=1e-6, rtol=1e-6)


def test_a_program_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(stablehlo, "MAX_BYTES", 1000)
    model = MODELS["videomae"]()
    leaves = {p: leaf(x) for p, x in random_params(model).items()}
    with pytest.raises(UserError, match="--dtype=bfloat16 first"):
        stablehlo.serialise(model, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_memory_of_a_conversion_is_a_fraction_of_the_file(tmp_path, kind):
    """A model of 1.2 GB in bfloat16: the process's peak above its start stays below the file's size."""
    model = video_mae.build("H", depth=32, decoder_depth=8, last_norm=True)
    one = np.random.default_rng(0).normal(size=8_000_000).astype(ml_dtypes.bfloat16)
    of = lambda shape: Leaf(shape, one.dtype, lambda a, b: np.resize(one, (b - a, *shape[1:])))
    leaves = {p: of(s) for p, s in models.shapes(model).items()}
    state = mapping.to_state(leaves, layout="videomae", cube=models.cube_of(model))
    file = tmp_path / f"x.{kind}"
    (safetensors_io if kind == "safetensors" else torch_zip).write(file, state)
    program = (
        "import resource, sys\nfrom invideo_jax.interop import from_torch\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\nfrom_torch.main(sys.argv[1:])\nprint(peak() - before)\n"
    )
    argv = ["--layout=videomae", f"--input={file}", f"--output={tmp_path / 'o'}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    more, size = int(done.stdout.split()[-1]), file.stat().st_size
    print(
        f"{kind}: {size / 1e9:.2f} GB, peak {more / 1e9:.2f} GB above the start, {more / size:.2f}"
    )
    assert size > 1e9 and more < size
