"""Runs files of numbers from the original models: `python -m tests.golden FILE...`.

A file is NAME.safetensors beside NAME.json (either name is accepted); some have the json alone. The
json holds the original constructor arguments; the tensors are named group/key: `state/` and `in/` go into
our model, and every other tensor is compared with what comes out. Exit code 1 beyond a bound, for a
tensor that nothing here can compute, and for a state that does not come back bit for bit.

A family of files is one module `tests/golden_*.py` with

    FAMILIES = [(claims, run), ...]
    claims(meta, tensors) -> bool: whether `run` is for files like this one
    run(meta, state, inputs, wanted names) -> Outcome

where `meta` is the json with the file's name added as "file", and `inputs` the tensors of `in/` without
that prefix; those of groups that are neither state nor input are there too, by their whole names, for the
few that are inputs of a loss (see `Outcome.given`).
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray]
BOUND, BOUND_NORMALISED = 1e-5, 5e-6  # noise of float32 is 5e-6 at values up to 5, and 5e-7


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a family computed.

    Attributes:
        tensors: group/key -> array.
        state: the state dict, mapped to our parameters and back.
        normalised: names of outputs of length 1 each, which have the tighter bound.
        bounds: others for names where the noise of float32 is larger, which the family explains.
        given: names in the file that are inputs, though their group is not `in/`.
        wanted: values that the file keeps in its json, by the names that `tensors` has.
        notes: lines to print.
    """

    tensors: Mapping[str, Any]
    state: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    normalised: frozenset[str] = frozenset()
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    given: frozenset[str] = frozenset()
    wanted: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load(path: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    """The json and the tensors of a file; an input it shares with a sibling is taken from there."""
    path = path.with_suffix("")
    meta = json.loads(path.with_suffix(".json").read_text()) | {"file": path.name}
    if not path.with_suffix(".safetensors").exists():
        return meta, {}
    tensors = load_file(path.with_suffix(".safetensors"))
    sibling = path.with_name(path.name.replace("_hf", "_official")).with_suffix(".safetensors")
    if not any(name.startswith("in/") for name in tensors) and sibling.exists():
        given = load_file(sibling)
        tensors |= {name: given[name] for name in ("in/video", "in/mask") if name in given}
    return meta, tensors


def family(meta: Mapping[str, Any], tensors: Tensors) -> Callable[..., Outcome]:
    """What runs this file; ValueError for none or for several."""
    names = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("golden_*.py"))
    families = [f for n in names for f in importlib.import_module(f"tests.{n}").FAMILIES]
    found = [run for claims, run in families if claims(meta, tensors)]
    if len(found) != 1:
        raise ValueError(
            f"one family must know these arguments; {len(found)} of {len(families)} do"
        )
    return found[0]


def difference(ours: Any, theirs: np.ndarray) -> float:
    """Largest absolute difference; infinite for another shape or where either is not finite."""
    ours = np.asarray(ours, np.float64)
    if ours.shape != theirs.shape:
        return np.inf
    gap = np.abs(ours - theirs.astype(np.float64))
    return float(gap.max(initial=0.0)) if np.isfinite(gap).all() else np.inf


def _split(tensors: Tensors, group: str) -> Tensors:
    return {k.removeprefix(group): v for k, v in tensors.items() if k.startswith(group)}


def _report(group: str, gaps: Mapping[str, float], bounds: Mapping[str, float]) -> bool:
    worst = max(gaps, key=lambda name: gaps[name] / bounds[name])
    good = gaps[worst] <= bounds[worst]
    print(
        f"  {'ok  ' if good else 'FAIL'} {group + '/':12} {len(gaps):4} tensors, largest difference "
        f"{gaps[worst]:.2e} (bound {bounds[worst]:.0e}) in {worst}"
    )
    return good


def _bound(outcome: Outcome, name: str, theirs: np.ndarray) -> float:
    if name in outcome.bounds:
        return outcome.bounds[name]
    if name in outcome.normalised:
        return BOUND_NORMALISED
    return BOUND * max(1.0, float(np.abs(theirs.astype(np.float64)).max(initial=0.0)) / 5)


def _compare(outcome: Outcome, wanted: Tensors) -> bool:
    good = True
    groups = sorted({name.split("/")[0] for name in wanted})
    for group in groups:
        names = [n for n in wanted if n.split("/")[0] == group]
        able = [n for n in names if n in outcome.tensors]
        unable = [n for n in names if n not in outcome.tensors]
        gaps = {n: difference(outcome.tensors[n], wanted[n]) for n in able}
        bounds = {n: _bound(outcome, n, wanted[n]) for n in able}
        if able:
            good &= _report(group, gaps, bounds)
        if unable:
            good = False
            print(f"  FAIL {group + '/':12} could not check {', '.join(sorted(unable))}")
    return good


def _state_returns(outcome: Outcome, state: Tensors) -> bool:
    def same(name):
        back = outcome.state.get(name)
        return (
            back is not None
            and (back.dtype, back.shape) == (state[name].dtype, state[name].shape)
            and back.tobytes() == state[name].tobytes()
        )

    odd = [n for n in state if not same(n)] + [n for n in outcome.state if n not in state]
    if odd:
        print(f"  FAIL state/       not bit-identical after the way back: {', '.join(odd[:5])}")
    else:
        print(f"  ok   state/       {len(state):4} tensors bit-identical after the way back")
    return not odd


def check(path: pathlib.Path) -> bool:
    """Runs one file and prints a line for each group; True if everything holds."""
    print(path.with_suffix("").name)
    try:
        meta, tensors = load(path)
        run = family(meta, tensors)
        state, inputs = _split(tensors, "state/"), _split(tensors, "in/")
        wanted = {k: v for k, v in tensors.items() if not k.startswith("state/")}
        inputs |= {k: v for k, v in wanted.items() if not k.startswith("in/")}
        outcome = run(meta, state, inputs, list(wanted))
    except Exception as error:  # one file must not hide the others
        print(f"  FAIL could not run: {type(error).__name__}: {error}")
        return False
    # Inputs are given, but for those that we compute ourselves (position tables).
    given = {k for k in wanted if k.startswith("in/")} | outcome.given
    wanted = {k: v for k, v in wanted.items() if k not in given or k in outcome.tensors}
    wanted |= {k: np.asarray(v) for k, v in outcome.wanted.items()}
    for note in outcome.notes:
        print(f"  note {note}")
    if not wanted and not state:
        print("  FAIL nothing was compared")
        return False
    good = _compare(outcome, wanted)
    return _state_returns(outcome, state) and good if state else good


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    results = [check(path) for path in parser.parse_args(argv).files]
    print(f"{sum(results)} of {len(results)} files hold")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
