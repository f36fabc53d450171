"""Folders of transformers' text models: in by the command, the same numbers, and out again."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from invideo_jax import handover
from invideo_jax.errors import UserError
from invideo_jax.interop import folder, from_torch, models, to_torch
from invideo_jax.models import alignment, stage2, text_towers, video_encoder
from invideo_jax.models.text_encoder import Bert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = np.array([[5, 3, 9, 7, 2, 19], [4, 8, 19, 0, 0, 0]])
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)
SIZES = dict(vocab_size=20, hidden_size=24, intermediate_size=36, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=4, attn_implementation="eager")


def made(kind, config):
    """A model none of whose parameters is at a special value."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model


def bert(kind="BertForMaskedLM", **options):
    config = transformers.BertConfig(**SIZES, max_position_embeddings=9, **options)
    return made(getattr(transformers, kind), config)


def clip_config(**options):
    more = dict(max_position_embeddings=7, projection_dim=10, eos_token_id=19, bos_token_id=18)
    return transformers.CLIPTextConfig(**SIZES, **more, **options)


def llama(kind="LlamaModel", **options):
    more = dict(num_key_value_heads=2, rms_norm_eps=1e-4, pad_token_id=0) | options
    return made(getattr(transformers, kind), transformers.LlamaConfig(**SIZES, **more))


def imported(theirs, place, layout, *options, **saving):
    """The folder that the command made of a saved model: its model and its parameters."""
    theirs.save_pretrained(place / "hf", **saving)
    argv = [f"--layout={layout}", f"--input={place / 'hf'}", f"--output={place / 'ours'}", *options]
    assert from_torch.main(argv) == 0
    meta, lazy = folder.open_params(place / "ours")
    return models.make(meta), unflatten_dict(dict(lazy), sep="/")


def run(model, params, valid=VALID):
    return models.embed(model, params, ids=IDS, valid=valid)


def theirs_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS), attention_mask=torch.tensor(VALID).long())


def close(ours, want):
    np.testing.assert_allclose(ours, want.detach().numpy(), atol=1e-5)


def exported(place, layout):
    assert (
        to_torch.main(
            [f"--workdir={place / 'ours'}", f"--layout={layout}", f"--output={place / 'out'}"]
        )
        == 0
    )
    return place / "out"


# --------------------------------------------------------------------------------------------- BERT


def test_bert_for_masked_words_comes_in_and_goes_out(tmp_path):
    theirs = bert(hidden_act="gelu_new", layer_norm_eps=1e-3, pad_token_id=3)
    model, params = imported(theirs, tmp_path, "bert")
    assert (model.heads, model.eps, model.activation, model.pad) == (4, 1e-3, "gelu_tanh", 3)
    assert model.word_head and model.fusion_from == 3
    out, want = run(model, params), theirs_of(theirs)
    close(out["words"][VALID], want.logits[VALID])
    again = transformers.BertForMaskedLM.from_pretrained(exported(tmp_path, "bert"))
    assert again.config.hidden_act == "gelu_pytorch_tanh"
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_bert_without_a_head_comes_in_and_goes_out(tmp_path):
    theirs = bert("BertModel")
    model, params = imported(theirs, tmp_path, "bert")
    assert not model.word_head
    out = run(model, params)
    close(out["tokens"][VALID], theirs_of(theirs).last_hidden_state[VALID])
    again = transformers.BertModel.from_pretrained(exported(tmp_path, "bert"))
    for key, value in theirs.state_dict().items():
        if "pooler" not in key:
            assert torch.equal(again.state_dict()[key], value), key


def fused():
    vision = alignment.AlignedEncoder(
        video_encoder.build("Micro", frames=2, image_size=16, depth=1, scan=True)
    )
    text = Bert(24, 3, 4, 36, 2, vocabulary=20, positions=9, scan=True)
    return stage2.Stage2(vision, text, width=6)


def test_bert_becomes_the_text_half_of_stage_2_with_fresh_cross_attention(tmp_path):
    """The published start: all layers from BERT, cross-attention fresh in the last ones."""
    theirs = bert()
    options = [
        "--model.fusion_from=2",
        "--model.context_width=48",
        "--fresh=fusion_stack/blocks/cross*",
    ]
    _, params = imported(theirs, tmp_path, "bert", *options)
    model = fused()
    source = handover.open_source(f"text={tmp_path / 'ours'}")
    fresh = ("^vision", "^text_projection/", "^match_head/", "^temperature$")
    expected = models.abstract(model)
    table = handover.plan(expected, source.shapes, fresh=fresh, key="stages.align.init")
    assert not table.left
    taken = {row.path for row in table.rows if row.transform == "copy"}
    assert taken == {path for path in models.shapes(model) if path.startswith("text/")}
    made = handover.apply(table, source.get, lambda: models.init(model, jax.random.key(0)))
    encode = jax.jit(
        lambda p: model.apply({"params": p}, IDS, VALID, method="encode_text")["tokens"]
    )
    with torch.no_grad():
        hidden = theirs.bert(
            torch.tensor(IDS), torch.tensor(VALID).long(), output_hidden_states=True
        ).hidden_states
    close(np.asarray(encode(made))[VALID], hidden[2][VALID])
    block = theirs.bert.encoder.layer[2]
    ours = made["text"]["fusion_stack"]["blocks"]
    close(ours["mlp"]["up"]["kernel"][0].T, block.intermediate.dense.weight)
    assert np.ptp(ours["cross"]["query"]["kernel"]) > 0


def test_what_bert_must_know_to_have_fusion_blocks(tmp_path):
    with pytest.raises(UserError, match="context_width=0"):
        from_torch.convert(
            saved(bert(), tmp_path),
            layout="bert",
            given=from_torch.infer.Given(values={"fusion_from": 2}),
        )


def saved(theirs, place, **options):
    theirs.save_pretrained(place / "hf", **options)
    return place / "hf"


# --------------------------------------------------------------------------------------------- CLIP


@pytest.mark.parametrize("whole", [False, True])
def test_clips_text_tower_comes_in_and_goes_out(tmp_path, whole):
    config = clip_config(hidden_act="gelu", layer_norm_eps=1e-3)
    if whole:
        images = transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        )  # fmt: skip
        both = dict(text_config=config.to_dict(), vision_config=images.to_dict(), projection_dim=10)
        theirs = made(transformers.CLIPModel, transformers.CLIPConfig(**both))
    else:
        theirs = made(transformers.CLIPTextModelWithProjection, config)
    model, params = imported(theirs, tmp_path, "clip_text_hf")
    assert (model.heads, model.eps, model.activation) == (4, 1e-3, "gelu")
    out = run(model, params)
    with torch.no_grad():
        tower = theirs.text_model(torch.tensor(IDS))
        want = theirs.text_projection(tower.pooler_output)
    close(out["embedding"], want)
    close(out["tokens"], tower.last_hidden_state)
    kind = transformers.CLIPTextModelWithProjection
    again = kind.from_pretrained(exported(tmp_path, "clip_text_hf"))
    with torch.no_grad():
        torch.testing.assert_close(again(torch.tensor(IDS)).text_embeds, want, rtol=0, atol=1e-6)


def test_clips_text_tower_without_projection(tmp_path):
    theirs = made(transformers.CLIPTextModel, clip_config())
    model, params = imported(theirs, tmp_path, "clip_text_hf")
    assert model.output_width == 0
    out = run(model, params)
    close(out["embedding"], theirs(torch.tensor(IDS)).pooler_output)


# -------------------------------------------------------------------------------------------- LLaMA


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForCausalLM"])
def test_llama_comes_in_by_shards_and_goes_out(tmp_path, kind, capsys):
    theirs = llama(kind, rope_parameters=dict(rope_type="default", rope_theta=500.0))
    model, params = imported(theirs, tmp_path, "llama_hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    assert ("of no use here: lm_head.weight" in capsys.readouterr().out) == (kind != "LlamaModel")
    assert (model.heads, model.kv_heads, model.eps, model.theta) == (4, 2, 1e-4, 500.0)
    out = run(model, params)
    inside = getattr(theirs, "model", theirs)
    want = theirs_of(inside).last_hidden_state
    close(out["tokens"][VALID], want[VALID])
    close(out["embedding"], want[[0, 1], [5, 2]])
    again = transformers.LlamaModel.from_pretrained(exported(tmp_path, "llama_hf"))
    for key, value in inside.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert again.config.rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(attention_bias=True), "attention_bias=False"),
        (
            dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
            "rope_type='default'",
        ),
    ],
)
def test_llamas_that_are_other_models_are_refused(tmp_path, options, words):
    place = saved(llama(**options), tmp_path)
    with pytest.raises(UserError, match=words):
        from_torch.convert(place, layout="llama_hf")


def test_lora_has_no_place_in_transformers_llama(tmp_path):
    model = text_towers.build("llama", "Micro", output_width=0)
    params = {k: np.zeros(s, np.float32) for k, s in models.shapes(model).items()}
    with pytest.raises(UserError, match="no LoRA; got lora_rank=4"):
        to_torch.export(tmp_path / "x", params, models.describe(model), layout="llama_hf")


def test_a_damaged_config_is_told(tmp_path):
    place = saved(llama(), tmp_path)
    (place / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        from_torch.convert(place, layout="llama_hf")
    config = json.dumps({"num_attention_heads": 8})  # not what the weights have: the shapes object
    (place / "config.json").write_text(config)
    with pytest.raises(UserError, match="multiple|heads"):
        from_torch.convert(place, layout="llama_hf")
