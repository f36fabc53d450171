"""Every recipe builds, passes its checks, and traces every stage at full size without memory."""

import ast
import pathlib
import re

import jax
import pytest
from conftest import REPOSITORY

from invideo_jax import checks, programs, sharding, train
from invideo_jax import config as config_lib
from invideo_jax.programs import base
from invideo_jax.programs import masked as programs_masked
from invideo_jax.registry import Registry

RECIPES = sorted(
    p
    for p in (REPOSITORY / "configs").rglob("*.py")
    if p.stem != "__init__"
    and p.parent.name not in ("common", "benchmarks")  # protocols set few keys
)
NAMES = [str(p.relative_to(REPOSITORY)) for p in RECIPES]


def arguments(recipe: pathlib.Path) -> list[str]:
    """The words that a recipe reads after the colon, from its own source."""
    calls = [n for n in ast.walk(ast.parse(recipe.read_text())) if isinstance(n, ast.Call)]
    parse = next(c for c in calls if getattr(c.func, "attr", "") == "parse_arg")
    return [a.value for a in parse.args[1:]]


def _case(name: str, word: str):
    """Data sets of fine-tuning change numbers and no shape but the head's: all of them take long."""
    repeats = ("finetune" in name or "probe" in name) and word not in ("", "ssv2", "smoke")
    return pytest.param(name, word, marks=[pytest.mark.slow] * repeats)


CASES = [(n, w) for p, n in zip(RECIPES, NAMES) for w in ("", *arguments(p))]


def load(name: str, word: str):
    spec = f"{REPOSITORY / name}" + (f":{word}" if word else "")
    return config_lib.load(spec, ["data.train=somewhere"])


@pytest.mark.parametrize(("name", "word"), CASES)
def test_every_recipe_passes_its_checks(name, word):
    checks.check(load(name, word).config)


@pytest.mark.parametrize(("name", "word"), [_case(*case) for case in CASES])
def test_every_stage_of_every_recipe_traces(name, word):
    config = load(name, word).config
    checks.check(config)
    for stage in train.place_stages(config, epoch_examples=240_000):
        program = programs.program(config, stage)
        boxed = jax.eval_shape(program.init_params)
        state = jax.eval_shape(program.make_state, sharding.unbox(boxed))
        new, metrics = jax.eval_shape(program.train_step, state, program.abstract_batch())
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert {"loss", "grad_norm", "learning_rate", "skipped"} <= metrics.keys()
        assert program.visible_tokens <= program.encoder.tokens + program.encoder.prefix


@pytest.mark.parametrize("name", NAMES)
def test_recipes_say_how_they_are_run(name):
    text = ast.get_docstring(ast.parse((REPOSITORY / name).read_text()))
    assert f"--config={name}" in text
    for word in arguments(REPOSITORY / name):
        assert f"`{word}`" in text or f":{word}" in text, f"{name}: {word} is not in its docstring"
    assert "smoke" in arguments(REPOSITORY / name)
    if "internvideo" in name:
        assert re.search(r"Hardware and hours:", text) and "Source" in text


@pytest.mark.parametrize(
    ("size", "published"),
    [("s", 24_029_376), ("b", 94_210_944), ("l", 342_996_992), ("h", 692_487_296)],
)
def test_full_size_recipes_have_the_published_parameters(size, published):
    config = load(f"configs/internvideo1/mae_vit_{size}.py", "").config
    stage = train.place_stages(config, epoch_examples=240_000)[0]
    shapes = sharding.unbox(jax.eval_shape(programs.program(config, stage).init_params))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == published


# recipe -> batch, epochs, warm-up epochs, peak rate, final rate, mask ratio, stride, decoder depth and width.
# Sources: scripts of MCG-NJU/VideoMAE and of OpenGVLab/InternVideo; rates are base * batch / 256.
PUBLISHED = {
    "s": (1024, 1601, 40, 6e-4, 4e-5, 0.9, 4, 4, 192),
    "s:ssv2": (2048, 2401, 40, 1.2e-3, 8e-5, 0.9, 2, 4, 192),
    "b": (2048, 1601, 40, 1.2e-3, 8e-5, 0.9, 4, 4, 384),
    "b:ssv2": (2048, 2401, 40, 1.2e-3, 8e-5, 0.9, 2, 4, 384),
    "b:ucf101": (192, 3201, 40, 2.25e-4, 7.5e-6, 0.75, 4, 4, 384),
    "b:hybrid": (2048, 801, 40, 1.2e-3, 8e-5, 0.9, 4, 4, 384),
    "l": (512, 1601, 40, 3e-4, 2e-5, 0.9, 4, 12, 512),
    "l:hybrid": (1152, 801, 40, 6.75e-4, 4.5e-5, 0.9, 4, 12, 512),
    "h": (1024, 1601, 40, 6e-4, 4e-5, 0.9, 4, 12, 640),
    # 64 GPUs * 6 videos * 4 clips; the script's rate counts the videos: 1e-3 * 384 / 256.
    "h:hybrid": (1536, 4 * 301, 4 * 15, 1.5e-3, 7.5e-5, 0.9, 4, 8, 512),
    "g": (1024, 1601, 40, 6e-4, 4e-5, 0.9, 4, 4, 512),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_settings(recipe):
    size, _, word = recipe.partition(":")
    config = load(f"configs/internvideo1/mae_vit_{size}.py", word).config
    videos = 240_000
    stage = train.place_stages(config, epoch_examples=videos)[0]
    batch, epochs, warmup, peak, final, ratio, stride, depth, width = PUBLISHED[recipe]
    options, model = config.stages.masked, programs_masked.model(config, "masked")
    rate, warm_steps = base.schedule(config, stage), int(warmup * videos / batch)
    assert (stage.batch_size, stage.steps) == (batch, int(epochs * videos / batch))
    assert float(rate(warm_steps)) == pytest.approx(peak, rel=1e-5)
    assert float(rate(warm_steps // 2)) == pytest.approx(peak / 2, rel=1e-2)
    assert float(rate(stage.steps - 1)) == pytest.approx(final, rel=1e-3)
    assert (options.mask.name, options.mask.ratio) == ("tube", ratio)
    assert (options.clip.frames, options.clip.size, options.clip.stride) == (16, 224, stride)
    assert (options.clip.sampling, options.clip.crop, options.clip.flip) == (
        "dense",
        "multi_scale",
        0,
    )
    assert (model.decoder_depth, model.decoder_width, model.encoder.tubelet) == (depth, width, 2)
    o = options.optimizer
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (
        "adamw",
        0.9,
        0.95,
        1e-8,
        0.05,
        0,
    )
    assert options.target.normalise and options.normalisation == "imagenet"


def test_published_schedule_of_vit_b():
    """1601 epochs of 240,000 videos in batches of 2048; rate 1.5e-4 * 2048 / 256."""
    config = load("configs/internvideo1/mae_vit_b.py", "").config
    stage = train.place_stages(config, epoch_examples=240_000)[0]
    assert stage.steps == 1601 * 240_000 // 2048
    rate = base.schedule(config, stage)
    warmup = 40 * 240_000 // 2048
    assert float(rate(0)) == 0.0
    assert float(rate(warmup)) == pytest.approx(1.2e-3, rel=1e-6)
    assert float(rate(stage.steps - 1)) == pytest.approx(8e-5, rel=1e-3)


def test_every_registered_name_can_be_imported():
    from invideo_jax.data import sources
    from invideo_jax.evals import EVALUATORS
    from invideo_jax.steps import masked

    registries = [base.ENCODERS, sources.SOURCES, EVALUATORS, masked.OBJECTIVES]
    for registry in registries:
        assert isinstance(registry, Registry)
        for name in registry:
            assert callable(registry.get(name)), name
