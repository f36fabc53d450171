"""Recipes: overrides, provenance, comparison, and what a user reads after a mistake."""

import pathlib

import pytest

from invideo_jax import config as config_lib
from invideo_jax.errors import UserError

RECIPE = '''"""A recipe."""
import ml_collections

def get_config(arg=None):
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.rate = 1e-3
    c.name = "a"
    c.on = False
    c.roots = ()
    c.model = ml_collections.ConfigDict(dict(size="B", depth=2))
    c.model.depth = 4 if arg == "deep" else 3
    return c
'''


@pytest.fixture
def recipe(tmp_path) -> str:
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "x.py"
    file.write_text(RECIPE)
    return str(file)


def test_argument_and_overrides_keep_types(recipe):
    overrides = ["seed=3", "rate=1", "name=7", "on=true", "roots=/a,/b", "model.size=L"]
    config = config_lib.load(recipe + ":deep", overrides).config
    assert config_lib.flatten(config) == {
        "seed": 3,
        "rate": 1.0,
        "name": "7",
        "on": True,
        "roots": ("/a", "/b"),
        "model.size": "L",
        "model.depth": 4,
    }
    assert isinstance(config.rate, float)
    assert config.is_locked


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ()),
        ("/a", ("/a",)),
        ("/a, /b", ("/a", "/b")),
        ('("/a",)', ("/a",)),
        ('("/a")', ("/a",)),
        ('["/a", "/b"]', ("/a", "/b")),
        ("(^|/)bias$,norm", ("(^|/)bias$", "norm")),
    ],
)
def test_overrides_of_tuples(recipe, text, value):
    assert config_lib.load(recipe, [f"roots={text}"]).config.roots == value


def test_every_value_knows_its_line(recipe):
    source = config_lib.load(recipe, ["model.depth=9", "seed=1", "seed=2"]).source
    lines = RECIPE.splitlines()
    line_of = lambda text: f"configs/x.py:{next(i for i, s in enumerate(lines, 1) if text in s)}"
    assert source["rate"] == line_of("c.rate")
    assert source["model.size"] == line_of("c.model = ")
    assert source["model.depth"] == "command line: --config.model.depth=9"
    assert source["seed"] == "command line: --config.seed=2"
    assert source.keys() == config_lib.flatten(config_lib.load(recipe).config).keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", r"Unknown config key sed .*Did you mean \"seed\""),
        ("model.sise=B", r"Unknown config key model.sise.*Did you mean \"model.size\""),
        ("depth=1", r"Unknown config key depth.*Did you mean model.depth"),
        ("model=B", r"is a section; set one of its keys: model.depth, model.size"),
        ("seed=abc", r"seed must be a value of type int \(now 0\); got seed='abc'"),
        ("seed=1.5", r"seed must be a value of type int"),
        ("seed=inf", r"seed must be a value of type int"),
        ("on=maybe", r"on must be a value of type bool"),
        ("on=1.0", r"on must be a value of type bool"),
        ("rate=fast", r"rate must be a value of type float"),
        ("seed", r"must look like --config.a.b=value"),
    ],
)
def test_wrong_overrides(recipe, override, message):
    with pytest.raises(UserError, match=message):
        config_lib.load(recipe, [override])


def test_missing_recipe_names_the_nearest(recipe):
    with pytest.raises(UserError, match=r'does not exist. Did you mean "x"|Known: x'):
        config_lib.load(str(pathlib.Path(recipe).with_name("xx.py")))
    with pytest.raises(UserError, match="there is no folder nowhere"):
        config_lib.load("nowhere/x.py")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.modl.depth = 1", "x.py:13: AttributeError"),
        ("c.seed = 'one'", "x.py:13: TypeError"),
        ("c.lock(); c.new = 1", "x.py:13: AttributeError.*new"),
        ("raise RuntimeError('boom')", "x.py:13: RuntimeError: boom"),
        ("return 3", "must return a ConfigDict; got int"),
        ("c.seed = = 1", "x.py:13: SyntaxError"),
    ],
)
def test_a_failing_recipe_names_its_line(recipe, body, message):
    text = RECIPE.replace("    return c", f"    {body}\n    return c")
    pathlib.Path(recipe).write_text(text)
    with pytest.raises(UserError, match=f"(?s){message}"):
        config_lib.load(recipe)


def test_recipe_without_get_config(recipe):
    pathlib.Path(recipe).write_text("x = 1\n")
    with pytest.raises(UserError, match=r"must define get_config"):
        config_lib.load(recipe)


def test_changed_config_is_refused_unless_free_or_allowed():
    old = {"seed": 0, "log": {"every": 5}, "model": {"depth": 3, "roots": (1, 2)}}
    new = {"seed": 0, "log": {"every": 7}, "model": {"depth": 4, "roots": [1, 2]}}
    with pytest.raises(UserError, match=r"model.depth: 3 -> 4\n.*--allow_change=model.depth"):
        config_lib.require_unchanged(old, new, free=["log"])
    changed = config_lib.require_unchanged(old, new, free=["log"], allowed=["model"])
    assert changed == {"log.every": (5, 7), "model.depth": (3, 4)}
    assert config_lib.require_unchanged(old, old, free=[]) == {}
    with pytest.raises(UserError, match='got sed.*Did you mean "seed"'):
        config_lib.require_unchanged(old, new, free=["log"], allowed=["model", "sed"])
    # The same command again, when the change is already in the checkpoint.
    assert config_lib.require_unchanged(new, new, free=[], allowed=["model.depth"]) == {}


def test_numbers_must_be_finite(recipe):
    with pytest.raises(UserError, match="rate must be a finite number; got rate=nan"):
        config_lib.require_finite(config_lib.load(recipe, ["rate=nan"]).config)
