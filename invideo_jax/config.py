"""Recipes: load, override from the command line, compare, and say where each value came from.

A recipe is a Python file with `get_config(arg=None) -> ml_collections.ConfigDict`. Only the command
lines see the config object; everything below them takes keyword arguments.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import math
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A resolved config and its history.

    Attributes:
        config: the locked ConfigDict with all overrides applied.
        source: key path -> 'file.py:LINE' or 'command line', for every leaf.
        spec: what the user gave as --config.
    """

    config: ml_collections.ConfigDict
    source: dict[str, str]
    spec: str


def load(spec: str, overrides: Sequence[str] = ()) -> Recipe:
    """Runs the recipe `spec` ('file.py' or 'file.py:argument') and applies `overrides`.

    Args:
        spec: path of the recipe; what follows the first colon goes to its `get_config`.
        overrides: strings 'a.b=value', in command-line order, last one wins.

    Raises:
        UserError: no such file, the recipe fails, an unknown key, or a value of another type.
    """
    path, _, argument = spec.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--config must be a recipe file; {_no_such_recipe(file)}")
    module = _import_recipe(file)
    lines: dict[tuple[int, str], str] = {}
    with _recording(lines), _explained(spec):
        config = module.get_config(argument) if argument else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"get_config of {path} must return a ConfigDict; got {type(config).__name__}."
        )
    config.lock()
    source = dict(_leaf_sources(config, lines))
    for override in overrides:
        source[apply_override(config, override)] = f"command line: --config.{override}"
    return Recipe(config, source, spec)


def apply_override(config: ml_collections.ConfigDict, override: str) -> str:
    """Sets one key from 'a.b=value' and returns the key path 'a.b'.

    Raises:
        UserError: no '=', an unknown key (naming the nearest), or a value of the wrong type.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"An override must look like --config.a.b=value; got --config.{override}.")
    known = flatten(config)
    if path not in known:
        inside = [k for k in known if k.startswith(path + ".")]
        if inside:
            raise UserError(
                f"--config.{path} is a section; set one of its keys: {', '.join(inside)}."
            )
        leaf = [k for k in known if k.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
        top, _, inner = path.partition(".")
        if leaf:
            hint = f" Did you mean {' or '.join(leaf[:3])}?"
        elif inner and top not in config:
            hint = f" There is no section {top}; the sections are {', '.join(sections(config))}."
        else:
            hint = nearest(path, known)
        raise UserError(f"Unknown config key {path} (from --config.{override}).{hint}")
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[key] = _convert(text, section[key], path)
    return path


def sections(config: ml_collections.ConfigDict) -> list[str]:
    """Top-level keys that hold other keys."""
    return [key for key in config if isinstance(config[key], ml_collections.ConfigDict)]


def _convert(text: str, old: Any, path: str) -> Any:
    """Reads `text` as a value of the type of `old`; a whole number may be written '1e3' or '1_000'."""
    try:
        return _READERS[type(old)](text)
    except (ValueError, KeyError, SyntaxError, OverflowError):
        raise UserError(
            f"{path} must be a value of type {type(old).__name__} (now {old!r}); got {path}={text!r}."
        ) from None


def _read_int(text: str) -> int:
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(text) if text.strip().lstrip("+-").isdigit() else int(value)


def _read_tuple(text: str) -> tuple:
    """'("a", "b")' or plain 'a,b'; a plain part may hold brackets, as regular expressions do."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(part.strip() for part in text.split(",") if part.strip())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


_READERS = {
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
    int: _read_int,
    float: float,
    str: str,
    tuple: _read_tuple,
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}, keys in alphabetical order; empty sections vanish."""
    flat = {}
    for key in sorted(config):
        value = config[key]
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ml_collections.ConfigDict) -> str:
    """The resolved config as indented JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def from_saved(saved: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The locked config of a run, from the JSON that was kept of it."""
    tuples = lambda v: (
        {k: tuples(x) for k, x in v.items()}
        if isinstance(v, Mapping)
        else tuple(v)
        if isinstance(v, list)
        else v
    )
    return ml_collections.ConfigDict(tuples(saved)).lock()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flat key -> (old, new) for keys whose values differ; an absent key counts as None.

    Both are compared after a round trip through JSON, as one of them usually comes from a file.
    """
    old, new = (flatten(json.loads(json.dumps(c))) for c in (old, new))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def require_unchanged(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    free: Sequence[str],
    allowed: Sequence[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """Refuses to resume with a config that would train something else.

    Args:
        old, new: configs as nested dictionaries.
        free: key prefixes that may change without asking ('log', 'data.workers').
        allowed: key prefixes that the user allows by name.

    Returns:
        The changes that are let through.

    Raises:
        UserError: other keys differ; the message lists them with both values.
    """
    changed = differences(old, new)
    under = lambda key, prefixes: any(key == p or key.startswith(p + ".") for p in prefixes)
    # A name that did not change is fine: the same command must also do for the start after this one.
    known = (*flatten(new), *changed)
    unknown = [p for p in allowed if not any(under(key, [p]) for key in known)]
    if unknown:
        raise UserError(
            f"--allow_change must name config keys; got {', '.join(unknown)}.{nearest(unknown[0], known)}"
        )
    refused = {k: v for k, v in changed.items() if not under(k, free) and not under(k, allowed)}
    if refused:
        lines = "\n".join(f"  {key}: {a!r} -> {b!r}" for key, (a, b) in refused.items())
        raise UserError(
            "This workdir was made with another config. These keys differ (saved -> now):\n"
            f"{lines}\n"
            "Use another --workdir for a new run, give the old values back, or accept the change "
            f"with --allow_change={','.join(refused)}"
        )
    return changed


def require_finite(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a NaN or infinite number anywhere in the config."""
    for path, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path} must be a finite number; got {path}={value}.")


def _no_such_recipe(file: pathlib.Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f"got {file}, and there is no folder {folder} in {pathlib.Path.cwd()}."
    recipes = [p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "common")]
    return f"got {file}, which does not exist.{nearest(file.stem, recipes)}"


def _import_recipe(file: pathlib.Path):
    """Imports the recipe; the folder that holds `configs/` goes on the path for its shared parts."""
    file = file.resolve()
    for parent in file.parents:
        if parent.name == "configs" and str(parent.parent) not in sys.path:
            sys.path.insert(0, str(parent.parent))
    module_spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    with _explained(str(file)):
        module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"A recipe must define get_config(arg=None); {file} does not.")
    return module


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns an exception of recipe code into a UserError that names its file and line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "ml_collections" not in f.filename and f.filename != __file__]
        at = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
        if isinstance(error, SyntaxError):
            at = f"{error.filename}:{error.lineno}: "
        message = str(error).strip("'\"").split("\nOther fields present")[0]
        raise UserError(
            f"The recipe {what} fails at\n{at}{type(error).__name__}: {message}"
        ) from error


@contextlib.contextmanager
def _recording(lines: dict[tuple[int, str], str]) -> Iterator[None]:
    """While active, every ConfigDict assignment notes the recipe line it came from.

    ConfigDict keeps no history, and line numbers cannot be recovered afterwards; its `__setitem__`
    is the one place all assignments pass.
    """
    original = ml_collections.ConfigDict.__setitem__

    def noting(self, key, value):
        original(self, key, value)
        frame = sys._getframe(1)
        while frame and "ml_collections" in frame.f_code.co_filename:
            frame = frame.f_back
        lines[id(self), key] = f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"

    ml_collections.ConfigDict.__setitem__ = noting
    try:
        yield
    finally:
        ml_collections.ConfigDict.__setitem__ = original


def _short(file: str) -> str:
    """The path from the folder configs/ on, where there is one."""
    parts = pathlib.Path(file).parts
    return "/".join(parts[parts.index("configs") :]) if "configs" in parts else file


def _leaf_sources(
    config: ml_collections.ConfigDict,
    lines: Mapping[tuple[int, str], str],
    prefix: str = "",
    above="",
) -> Iterator[tuple[str, str]]:
    """Key path -> recipe line; a value inside a section set as a whole has the section's line."""
    for key in sorted(config):
        value, line = config[key], lines.get((id(config), key), above)
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaf_sources(value, lines, f"{prefix}{key}.", line)
        else:
            yield prefix + key, line
