"""Names of LLaMA's text tower: full size without memory, both spellings, ways back."""

import numpy as np
import pytest

from invideo_jax.errors import UserError
from invideo_jax.interop import folder, from_torch, mapping, models, to_torch, torch_zip
from invideo_jax.models import text_towers
from invideo_jax.models.llama import LlamaText

LAYERS = "transformer.layers"


def listed(model, layout):
    """Key -> shape in order; the arrays are views of one zero."""
    zero = np.zeros((), np.float32)
    views = {path: np.broadcast_to(zero, shape) for path, shape in models.shapes(model).items()}
    state = mapping.to_state(views, layout=layout, cube=(1, 1, 1))
    return {key: tuple(x.shape) for key, x in state.items()}


def test_the_full_size_has_the_published_keys_and_shapes():
    """As listed for internvl_c_13b_224px.pth and InternVideo2-CLIP 1B: 32 layers of 9 keys and 4 of LoRA."""
    found = listed(text_towers.build("llama", "7B", scan=True), "internvl_text")
    assert len(found) == 3 + 32 * (9 + 4)
    assert sum(int(np.prod(shape)) for shape in found.values()) == 6_692_417_536
    first = [key for key in found if ".0." in key]
    assert first == [
        f"{LAYERS}.0.{key}.weight"
        for key in (
            "self_attn.q_proj", "self_attn.q_proj.lora_A.default", "self_attn.q_proj.lora_B.default",
            "self_attn.k_proj", "self_attn.v_proj", "self_attn.v_proj.lora_A.default",
            "self_attn.v_proj.lora_B.default", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
        )
    ]  # fmt: skip
    for key, shape in {
        "text_projection": (4096, 768),
        "transformer.embed_tokens.weight": (49954, 4096),
        f"{LAYERS}.31.self_attn.v_proj.lora_A.default.weight": (16, 4096),
        f"{LAYERS}.31.self_attn.v_proj.lora_B.default.weight": (4096, 16),
        f"{LAYERS}.31.mlp.down_proj.weight": (4096, 11008),
        f"{LAYERS}.31.mlp.gate_proj.weight": (11008, 4096),
        "transformer.norm.weight": (4096,),
    }.items():
        assert found[key] == shape, key


def test_newer_files_call_the_adapted_matrices_base_layers():
    model = text_towers.build("llama", "7B", scan=True)
    old, new = listed(model, "internvl_text"), listed(model, "internvl_text_peft")
    renamed = {f"self_attn.{n}_proj.weight": f"self_attn.{n}_proj.base_layer.weight" for n in "qv"}

    def spelt(key):
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        return key

    assert {spelt(key): shape for key, shape in old.items()} == new
    assert sum("base_layer" in key for key in new) == 64


def tiny(**options):
    sizes = dict(width=256, depth=2, heads=2, mlp_width=24, output_width=6, kv_heads=1)
    return LlamaText(
        **(sizes | dict(head_width=128, vocabulary=20, lora_rank=3, lora_alpha=6.0) | options)
    )


def random_params(model):
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    return {path: draw(shape) for path, shape in models.shapes(model).items()}


def state_of(params, layout):
    leaves = mapping.to_state(params, layout=layout, cube=(1, 1, 1))
    return {key: np.asarray(x.read(), order="C") for key, x in leaves.items()}


@pytest.mark.parametrize(
    "written, read, prefix",
    [
        ("internvl_text", "internvl_text", ""),
        (
            "internvl_text",
            "internvl_text",
            "text_encoder.",
        ),  # as files of InternVideo2-CLIP have it
        ("internvl_text_peft", "internvl_text_peft", "module."),
        ("internvl_text_peft", "internvl_text", ""),
    ],
)
def test_files_come_back_bit_for_bit_and_say_what_model_they_are_of(
    tmp_path, written, read, prefix
):
    model = tiny()
    params = random_params(model)
    state = {prefix + key: x for key, x in state_of(params, written).items()}
    inv_freq = np.ones(64, np.float32)
    state[f"{prefix}{LAYERS}.0.self_attn.rotary_emb.inv_freq"] = inv_freq  # of old transformers
    state |= {"logit_scale": inv_freq[0], "blocks.0.norm1.weight": inv_freq}  # the vision half
    torch_zip.write(tmp_path / "x.pth", state)
    leaves, meta = from_torch.convert(tmp_path / "x.pth", layout=read)
    assert models.make(meta) == model.clone()
    assert {path: leaf.read().tobytes() for path, leaf in leaves.items()} == {
        path: x.tobytes() for path, x in params.items()
    }


def test_the_tower_of_adapters_without_names_is_read_too(tmp_path):
    params = random_params(tiny())
    state = {k.replace(".default", ""): x for k, x in state_of(params, "internvl_text").items()}
    torch_zip.write(tmp_path / "x.pth", state)
    leaves, _ = from_torch.convert(tmp_path / "x.pth", layout="internvl_text")
    assert all(np.array_equal(leaves[path].read(), x) for path, x in params.items())


def test_what_shapes_do_not_tell_can_be_said(tmp_path):
    model = tiny(heads=4, kv_heads=2, head_width=64, lora_alpha=9.0, theta=5e5, pad=7)
    torch_zip.write(tmp_path / "x.pth", state_of(random_params(model), "internvl_text"))
    argv = [
        "--layout=internvl_text",
        f"--input={tmp_path / 'x.pth'}",
        f"--output={tmp_path / 'ours'}",
    ]
    said = ["--model.heads=4", "--model.lora_alpha=9.0", "--model.theta=5e5", "--model.pad=7"]
    assert from_torch.main(argv + said) == 0
    meta, _ = folder.open_params(tmp_path / "ours")
    assert models.make(meta) == model.clone()
    # And what the command wrote for PyTorch says it all itself.
    out = tmp_path / "out"
    assert (
        to_torch.main(
            [f"--workdir={tmp_path / 'ours'}", "--layout=internvl_text", f"--output={out}"]
        )
        == 0
    )
    _, again = from_torch.convert(out, layout="internvl_text")
    assert models.make(again) == model.clone()


def test_a_missing_factor_is_told(tmp_path):
    state = state_of(random_params(tiny()), "internvl_text")
    del state[f"{LAYERS}.1.self_attn.v_proj.lora_B.default.weight"]
    torch_zip.write(tmp_path / "x.pth", state)
    with pytest.raises(UserError, match="Missing: transformer.layers.1.self_attn.v_proj.lora_B"):
        from_torch.convert(tmp_path / "x.pth", layout="internvl_text")
