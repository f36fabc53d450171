"""The tokenizer of a stage: what is compared with its tower, kept, found again, and handed over."""

import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.test_text import MERGES, clip_words, write_clip

from configs.internvideo2 import clip_1b, clip_b, stage2_1b
from invideo_jax import checks, handover, sharding, stage_start, stage_words
from invideo_jax.checkpoint import Checkpoints
from invideo_jax.data import captions
from invideo_jax.data.open_video import Limits
from invideo_jax.data.pieces import train_pieces
from invideo_jax.data.text import open_tokenizer
from invideo_jax.errors import UserError
from invideo_jax.models.text_encoder import ClipText, init
from invideo_jax.programs import contrastive
from invideo_jax.search import opening

BERT = dict(name="vocab.txt", vocabulary=30522, first=101, pad=0, mask=103)
CLIP = dict(name="clip", vocabulary=49408, first=49406, pad=0, mask=None)
LLAMA = dict(name="tokenizer.model", vocabulary=49953, first=1, pad=0, mask=None)


def stage_of(module, **changes):
    stage = module.get_config().stages.contrastive
    with stage.unlocked():
        stage.update_from_flattened_dict(changes)
    return stage


def check(module, tokenizer, **changes):
    made = types.SimpleNamespace(**tokenizer)
    stage_words.check(made, stage_of(module, **changes), key="stages.contrastive")


# ------------------------------------------------------------------------------------------------ one for its tower


def test_the_published_tokenizers_fit_their_recipes():
    check(stage2_1b, BERT)
    check(clip_b, CLIP)
    check(clip_1b, LLAMA)  # tokenizer.model: [PAD] was added by hand, and is no piece of it
    check(clip_1b, LLAMA | dict(vocabulary=49954, pad=49953))  # tokenizer.json lists it
    check(clip_b, CLIP | dict(pad=49407))  # Hugging Face's
    check(stage2_1b, BERT | dict(mask=None), **{"losses.mlm": 0.0})  # nothing is hidden
    check(clip_b, CLIP | dict(mask=7))


@pytest.mark.parametrize(
    ("module", "its", "changes", "message"),
    [
        (stage2_1b, dict(first=7, mask=None), {}, r"needs a tokenizer with .*\[MASK\].*mask=103"),
        (stage2_1b, dict(first=7), {}, "vocab.txt has first=7, stages.contrastive.text.first=101"),
        (stage2_1b, dict(first=None), {}, "first=-1, stages.contrastive.text.first=101"),
        (stage2_1b, dict(mask=4), {}, "mask=4, stages.contrastive.text.mask=103"),
        (stage2_1b, {}, {"text.mask": -1}, "mask=103, stages.contrastive.text.mask=-1"),
        (stage2_1b, dict(pad=9), {}, "pad=9, stages.contrastive.text.pad=0"),
        (stage2_1b, dict(vocabulary=30521), {}, "vocabulary=30521, .*vocabulary=30522"),
        (clip_1b, dict(vocabulary=49952), {}, "vocabulary=49952"),
        (clip_1b, dict(vocabulary=49955), {}, "vocabulary=49955"),
        (clip_1b, dict(first=None), {}, "first=-1, stages.contrastive.text.first=1"),
    ],
)
def test_another_tokenizer_than_the_towers_is_an_error(module, its, changes, message):
    named = {stage2_1b: BERT, clip_1b: LLAMA}[module]
    with pytest.raises(UserError, match=message):
        check(module, named | its, **changes)


@pytest.mark.parametrize("loss", ["mlm", "amlm", "avmlm"])
def test_each_loss_of_hidden_words_needs_the_word_that_hides_them(loss):
    others = {f"losses.{name}": 0.0 for name in ("mlm", "amlm", "avmlm")}
    check(stage2_1b, BERT | dict(mask=None), **others)
    with pytest.raises(UserError, match="has none"):
        check(stage2_1b, BERT | dict(mask=None), **others | {f"losses.{loss}": 1.0})


def test_no_word_hides_others_where_the_config_says_so():
    """The last row of the table is not taken for it: the check of the config itself says no."""
    config = stage2_1b.get_config("smoke")
    config.data.train = "somewhere"
    config.stages.contrastive.text.mask = -1
    assert contrastive.objective(config, "contrastive")["words"]["mask"] is None
    with pytest.raises(UserError, match="The loss mlm needs a tokenizer with a mask word"):
        checks.check(config)
    config.stages.contrastive.losses.mlm = 0.0
    checks.check(config)


def test_the_tower_knows_padding_and_no_random_word_is_a_row_without_one():
    config = stage2_1b.get_config("smoke")
    config.stages.contrastive.text.update(pad=5, unused=3)
    assert contrastive.model(config, "contrastive").text.pad == 5
    assert contrastive.objective(config, "contrastive")["words"]["vocabulary"] == 257
    assert not hasattr(contrastive.model(clip_b.get_config("smoke"), "contrastive").text, "pad")


def test_clips_two_forms_end_a_text_at_the_same_place(tmp_path):
    """Hugging Face pads with the token that ends a text, OpenAI with 0: embeddings are the same."""
    transformers = pytest.importorskip("transformers")
    known = {word: number for number, word in enumerate(clip_words())}
    transformers.CLIPTokenizer(vocab=known, merges=MERGES).save_pretrained(tmp_path / "hf")
    told = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert told["pad_token"] == "<|endoftext|>" and (tmp_path / "hf" / "tokenizer.json").is_file()
    last = len(known) - 1
    forms = [open_tokenizer(tmp_path / "hf"), open_tokenizer(write_clip(tmp_path / "openai", "gz"))]
    assert [form.pad for form in forms] == [last, 0]
    words = {"text.vocabulary": last + 1, "text.first": last - 1}
    for form in forms:
        stage_words.check(form, stage_of(clip_b, **words), key="stages.contrastive")
    texts = ["a red ball", "it's 25", "a red ball on the red star and the ball"]
    for causal in (True, False):
        tower = ClipText(16, 1, 2, 24, 8, vocabulary=last + 1, positions=12, causal=causal)
        params = sharding.unbox(init(tower, jax.random.key(0)))
        run = functools.partial(tower.apply, {"params": params}, method="features")
        found = [run(*map(jnp.asarray, form(texts, 12)))["embedding"] for form in forms]
        np.testing.assert_allclose(*found, atol=1e-6)
        if causal:  # as published: at the first place of the highest id
            for form in forms:
                alone = run(jnp.asarray(form(texts, 12)[0]))["embedding"]
                np.testing.assert_allclose(alone, found[0], atol=1e-6)


# ------------------------------------------------------------------------------------------------ kept by the run


@pytest.fixture
def two(tmp_path):
    """Files of two tokenizers of as many words."""
    made = []
    for name, texts in (("one", ["a red ball bounces"]), ("two", ["blue discs drift down"])):
        made.append(tmp_path / f"{name}.model")
        made[-1].write_bytes(train_pieces(texts * 3, 30))
    return made


def started(tmp_path, file):
    """Config and workdir of a run that was started with a tokenizer."""
    config, workdir = stage2_1b.get_config("smoke"), tmp_path / "run"
    config.stages.contrastive.text.tokenizer = str(file)
    open_tokenizer(file).save(stage_words.folder(workdir, "contrastive"))
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    return config, workdir


def test_a_run_goes_on_with_its_own_tokenizer_where_the_file_is_gone(two, tmp_path):
    config, workdir = started(tmp_path, two[0])
    spec = lambda: stage_words.at_start(config, workdir).stages.contrastive.text.tokenizer
    assert spec() == str(two[0])
    digest = open_tokenizer(two[0]).digest
    two[0].unlink()
    assert spec() == str(workdir / "tokenizer" / "contrastive")
    assert open_tokenizer(spec()).digest == digest
    assert config.stages.contrastive.text.tokenizer == str(two[0])  # what is kept of it is as given
    config.stages.contrastive.text.tokenizer = "bytes"
    assert spec() == "bytes"
    config.stages.contrastive.text.tokenizer = str(tmp_path / "mistyped.model")
    assert spec() == str(tmp_path / "mistyped.model")  # no file there, and not that of the run
    assert stage_words.at_start(config, tmp_path / "new").to_dict() == config.to_dict()


def test_a_run_does_not_go_on_with_another_tokenizer(two, tmp_path):
    _, workdir = started(tmp_path, two[0])
    one, other = map(open_tokenizer, two)
    before = {"tokenizer/contrastive": {"digest": one.digest}}
    refuse = lambda now, *allowed: stage_words.refuse_others(
        {"contrastive": now}, before, workdir, allowed
    )
    refuse(one)
    with pytest.raises(UserError) as error:
        refuse(other)
    for word in (str(two[1]), str(workdir / "tokenizer" / "contrastive"), one.digest[:12]):
        assert word in str(error.value)
    refuse(other, "data_found.tokenizer/contrastive")
    with pytest.raises(UserError):
        refuse(other, "data_found.tokenizer/contrast")


def test_a_new_start_in_one_process_reads_the_files_anew(two, tmp_path):
    config = stage2_1b.get_config("smoke")
    config.stages.contrastive.text.tokenizer = str(two[0])
    config.stages.contrastive.text.update(vocabulary=30, pad=0, first=2, mask=4)
    loads = contrastive.modalities(config, "contrastive")
    program = types.SimpleNamespace(modalities=loads)
    was = stage_words.open_all(config, {"contrastive": program})["contrastive"].digest
    shutil.copy(two[1], two[0])
    assert loads.text.open().digest == was  # within a run nothing changes
    now = stage_words.open_all(config, {"contrastive": program})["contrastive"]
    assert now.digest == open_tokenizer(two[1]).digest != was
    assert loads.text.open() is now


# ------------------------------------------------------------------------------------------------ handed over


def start_from(source: str, *rows: tuple[str, str | None]) -> stage_start.Start:
    made = [
        handover.Row(path, jax.ShapeDtypeStruct((), "float32"), taken, None, None, "copy")
        for path, taken in rows
    ]
    return stage_start.Start(None, None, handover.Table(tuple(made), {}, {}), source)


@pytest.mark.parametrize("spec", ["{}", "{}@1", "vision=nowhere;text={}"])
def test_a_text_tower_is_handed_over_with_its_words(two, tmp_path, spec):
    _, workdir = started(tmp_path, two[0])
    spec, taken = spec.format(workdir), "text/" * ("text=" in spec) + "text/word_embedding"
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        params = {"text": {"word_embedding": jnp.zeros(2)}}
        checkpoints.save(1, {"params": params}, dict(step=1, stage="contrastive"), wait=True)
    compare = lambda tokenizer, *rows: stage_words.check_handed_over(
        {"clip": start_from(spec, *rows)}, {"clip": tokenizer}
    )
    tower = ("text/word_embedding", taken)
    compare(open_tokenizer(two[0], {"prefix": "summarize:"}), tower)
    with pytest.raises(UserError, match="must be handed over to a stage with the same") as error:
        compare(open_tokenizer(two[1]), ("vision/encoder/x", "vision/encoder/x"), tower)
    assert str(two[1]) in str(error.value) and "'^text/' to stages.clip.init.fresh" in str(
        error.value
    )
    assert str(workdir / "tokenizer" / "contrastive") in str(error.value)
    compare(open_tokenizer(two[1]), ("vision/encoder/x", "vision/x"), ("text/word_embedding", None))


def test_stages_of_one_run_hand_over_their_words_too(two):
    one, other = map(open_tokenizer, two)
    starts = {"first": start_from("fresh"), "second": start_from("", *[("text/x", "text/x")] * 2)}
    stage_words.check_handed_over(starts, {"first": one, "second": one})
    stage_words.check_handed_over(starts, {"second": other})  # from a stage without texts
    with pytest.raises(UserError, match="the tower of the stage first was trained with"):
        stage_words.check_handed_over(starts, {"first": one, "second": other})


# ------------------------------------------------------------------------------------------------ written one way


@pytest.mark.parametrize("normalise", ["", "internvideo2"])
def test_training_evaluation_and_search_write_a_text_the_same_way(normalise):
    config = stage2_1b.get_config("smoke")
    config.stages.contrastive.text.update(normalise=normalise, prefix="say ", length=40)
    said, plain = "A (Red) ball -- bounces!", open_tokenizer("bytes")
    example = dict(captions=(said,), media="video", start=None, end=None, speech=())
    loads = contrastive.modalities(config, "contrastive")
    rows = {
        train: loads.load(example, None, (0, 1), train=train, limits=Limits())
        for train in (True, False)
    }
    (asked,) = captions.all_texts(example, "video")
    meta = dict(config=config.to_dict(), stage="contrastive")
    source = handover.Source({}, {}.get, {"name": "run"}, meta)
    searched = opening._of_run(source, "run", "")[1].spec
    words = "say a red ball bounces" if normalise else f"say {said}"
    wanted = [a[0] for a in plain([words], 40)]
    for ids, valid in (
        *((row["text_video"], row["text_video_valid"]) for row in rows.values()),
        [a[0] for a in loads.text.asked([asked])],
        [a[0] for a in searched.asked([said])],
    ):
        np.testing.assert_array_equal(ids, wanted[0])
        np.testing.assert_array_equal(valid, wanted[1])
