"""LLaMA as a text tower: against transformers, LoRA against its own arithmetic, padding, ways to run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.interop import models
from invideo_jax.interop.from_torch import to_params
from invideo_jax.models import llama, sizes, text_towers

IDS = np.array([[5, 3, 9, 7, 2, 11], [4, 8, 6, 0, 0, 0]], np.int32)
VALID = IDS > 0


def tiny(**options):
    sizes = dict(width=24, depth=2, heads=4, mlp_width=36, output_width=10, vocabulary=20)
    return llama.LlamaText(**(sizes | dict(kv_heads=2, lora_rank=3, scan=True) | options))


@functools.cache
def fresh(model):
    """Parameters none of which is at a special initial value."""
    params = jax.jit(lambda: sharding.unbox(llama.init(model, jax.random.key(0))))()
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)


@functools.partial(jax.jit, static_argnames="model")
def run(model, params, ids=IDS, valid=None, keys=None):
    return model.apply({"params": params}, ids, valid, keys=keys, method="features")


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol)


# ------------------------------------------------------------------------------ against transformers


def hf(torch, transformers, **options):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", **options,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaModel(config).eval().requires_grad_(False)
    for x in theirs.parameters():
        x.add_(0.1 * torch.randn_like(x))
    return theirs


def test_lora_and_projection_against_transformers_with_merged_matrices():
    """q and v of each layer become W + (alpha / rank) B A; the feature is the last real token times P."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = hf(torch, transformers, rms_norm_eps=1e-6)
    state = {f"transformer.{k}": v.numpy().copy() for k, v in theirs.state_dict().items()}
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 4
    state["text_projection"] = draw(24, 10)
    for i, layer in enumerate(theirs.layers):
        for name, out in (("q_proj", 24), ("v_proj", 12)):
            a, b = draw(3, 24), draw(out, 3)
            key = f"transformer.layers.{i}.self_attn.{name}.lora"
            state |= {f"{key}_A.default.weight": a, f"{key}_B.default.weight": b}
            getattr(layer.self_attn, name).weight += torch.tensor(b @ a) * (32 / 3)
    model = tiny()
    params = to_params(state, layout="internvl_text", expected=models.abstract(model))
    out = run(model, params)
    mask = torch.tensor(VALID).long()
    want = theirs(torch.tensor(IDS).long(), attention_mask=mask).last_hidden_state.numpy()
    close(out["tokens"][VALID], want[VALID])
    close(out["pooled"], want[[0, 1], [5, 2]])
    close(out["embedding"], want[[0, 1], [5, 2]] @ state["text_projection"], 5e-5)


# ----------------------------------------------------------------------------------------------- LoRA


def test_lora_starts_as_nothing_and_is_two_parameters_a_layer():
    model = tiny()
    params = jax.jit(lambda: sharding.unbox(llama.init(model, jax.random.key(0))))()
    flat = flatten_dict(params, sep="/")
    lora = {path: x for path, x in flat.items() if "/lora_" in path}
    assert {path.removeprefix("stack/blocks/attention/"): x.shape for path, x in lora.items()} == {
        "query/lora_a": (2, 24, 3), "query/lora_b": (2, 3, 24),
        "value/lora_a": (2, 24, 3), "value/lora_b": (2, 3, 12),
    }  # fmt: skip
    for path, x in lora.items():
        assert (np.abs(x).max() > 0) == path.endswith("a")
        assert np.abs(x).max() <= 24**-0.5
    bare = tiny(lora_rank=0)
    assert set(models.shapes(bare)) == set(flat) - set(lora)
    without = jax.tree.map(lambda x: x, params)
    for name in ("query", "value"):
        attention = without["stack"]["blocks"]["attention"]
        attention[name] = {"kernel": attention[name]["kernel"]}
    close(run(model, params)["tokens"], run(bare, without)["tokens"], 0)


def test_dropout_is_of_the_factors_input_alone_and_of_each_examples_own_key():
    model, params = tiny(dropout=0.5), fresh(tiny(dropout=0.5))
    keys = jax.random.split(jax.random.key(0), 2)
    calm, drawn = run(model, params), run(model, params, keys=keys)
    again = run(model, params, keys=jnp.stack([keys[0], jax.random.key(9)]))
    assert np.abs(calm["embedding"] - drawn["embedding"]).max() > 1e-2
    close(again["embedding"][0], drawn["embedding"][0], 1e-6)
    assert np.abs(again["embedding"][1] - drawn["embedding"][1]).max() > 1e-2
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "lora_b" in str(path) else x, params
    )
    close(run(model, silent, keys=keys)["embedding"], run(model, silent)["embedding"], 0)


def test_lora_alone_is_trainable():
    """The documented pattern names the factors, and nothing else."""
    pattern = re.compile("/lora_[ab]$")
    found = {path for path in models.shapes(tiny()) if pattern.search(path)}
    assert len(found) == 4 and all("attention/" in path for path in found)


# -------------------------------------------------------------------------------------------- padding


def test_padding_is_not_looked_at_and_the_feature_is_the_last_real_token():
    model, params = tiny(), fresh(tiny())
    out = run(model, params)
    other = IDS.copy()
    other[1, 3:] = 17
    changed = run(model, params, other, VALID)
    close(changed["embedding"], out["embedding"], 1e-6)
    hole, there = VALID.copy(), IDS.copy()  # also where it does not stand behind
    hole[0, 1], there[0, 1] = False, 15
    a, b = run(model, params, IDS, hole), run(model, params, there, hole)
    close(a["embedding"], b["embedding"], 1e-6)
    assert np.abs(a["embedding"] - out["embedding"])[0].max() > 1e-2
    short = run(model, params, IDS[1:, :3])
    close(short["embedding"][0], out["embedding"][1])
    close(out["pooled"][0], out["tokens"][0, 5], 0)
    close(out["pooled"][1], out["tokens"][1, 2], 0)
    longer = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], bool)
    close(run(model, params, IDS, longer)["pooled"][0], out["tokens"][0, 3])


def test_no_token_sees_those_behind_it():
    model, params = tiny(), fresh(tiny())
    changed = IDS.copy()
    changed[0, 4] = 13
    a, b = run(model, params)["tokens"][0], run(model, params, changed)["tokens"][0]
    close(a[:4], b[:4], 0)
    assert np.abs(a[4:] - b[4:]).max() > 1e-2


def test_a_text_of_nothing_gives_numbers():
    model, params = tiny(), fresh(tiny())
    grad = jax.grad(lambda p: run(model, p, 0 * IDS)["embedding"].sum())(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))


# ----------------------------------------------------------------------------------------- ways to run


@pytest.mark.slow
def test_scan_and_remat_change_no_number():
    params = fresh(tiny())
    value = lambda model: jax.jit(
        jax.value_and_grad(lambda p: jnp.square(run(model, p)["embedding"]).sum())
    )(params)
    want, grads = value(tiny())
    for options in (dict(scan=False), dict(remat="save_qkv_mlp")):  # each compiles its gradient
        got, other = value(tiny(**options))
        np.testing.assert_allclose(got, want, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, other)


def test_bfloat16_is_near():
    params = fresh(tiny())
    got = run(tiny(dtype=jnp.bfloat16), params)["embedding"]
    assert got.dtype == jnp.bfloat16
    want = run(tiny(), params)["embedding"]
    close(got.astype(np.float32), want, 0.05 * float(np.abs(want).max()))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(heads=5), "heads"),
        (dict(kv_heads=3), "kv_heads"),
        (dict(head_width=3), "pair"),
        (dict(lora=("queries",)), "query, key, value, out; got lora="),
        (dict(activation="silly"), "silu"),
    ],
)
def test_attributes_that_do_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        tiny(**options).check()


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "kind, table, options",
    [
        ("bert", sizes.BERT, dict(vocabulary=30522)),
        ("clip", sizes.CLIP_TEXT, dict(vocabulary=49408)),
        ("llama", sizes.LLAMA, {}),
    ],
)
def test_every_text_tower_has_its_parameter_count(kind, table, options):
    for size, row in table.items():
        alone = dict(fusion_from=row.depth) if kind == "bert" else {}
        model = text_towers.build(kind, size, scan=True, **options, **alone)
        assert models.count(model) == (row.params or models.count(model)), size
        assert row.params or models.count(model) < 10e6, size
    with pytest.raises(UserError, match='mean "Micro"'):
        text_towers.build(kind, "Micrro")


def test_llama_7b_without_what_was_added_to_it_has_the_published_count():
    bare = text_towers.build(
        "llama", "7B", output_width=0, lora_rank=0, vocabulary=32000, scan=True
    )
    assert models.count(bare) == 6_607_343_616
