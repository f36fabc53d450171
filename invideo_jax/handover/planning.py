"""Plans a hand-over from shapes alone, and says what a recipe must add where it does not fit."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from invideo_jax import digests, optim
from invideo_jax.errors import UserError
from invideo_jax.handover.matching import KERNEL, Differs, Grid, Match
from invideo_jax.handover.table import Row, Table
from invideo_jax.registry import nearest

PyTree = Any

_SHOWN = 6  # paths of one kind in a message


def plan(
    target: PyTree,
    source: Mapping[str, Any],
    *,
    rename: Sequence[str] = (),
    fresh: Sequence[str] = (),
    leftover: Sequence[str] = (),
    old_frames: int = 0,
    inflate: str = "",
    label_map: str | Sequence[int] = "",
    grid: Grid | None = None,
    tubelet: int = 1,
    old_grid: Grid | None = None,
    about: Mapping[str, Any] | None = None,
    key: str = "stages.NAME.init",
) -> Table:
    """Decides where every parameter comes from; reads no value.

    Args:
        target: abstract parameter tree of the new stage, without boxes; shardings on its leaves are kept.
        source: path -> anything with `shape` and `dtype`.
        rename: 'pattern->replacement' on source paths: regular expressions, the first that is found counts.
        fresh: patterns of parameters that start fresh, whatever the source holds.
        leftover: patterns of source paths that are not taken; those of them that are there.
        old_frames: frames of the clips that the source was made for; 0: as `old_grid` says.
        inflate: 'repeat' or 'centre': how a patch kernel is spread over a longer tubelet; '': not at all.
        label_map: which classes of the source's head are kept: 'first' as many as there are now, or the
            number of each class in the source; '': all of them.
        grid: (t, h, w) of the new model.
        tubelet: frames of a patch of the new model.
        old_grid: (t, h, w) of the source's model, where known.
        about: what is known of the source, kept in the table.
        key: config key that messages name.

    Raises:
        UserError: a parameter without source, a source without use, or shapes that nothing brings together.
    """
    wanted = digests.named_leaves(target)
    named, left = _renamed(source, rename, leftover, key)
    patterns = {}
    for pattern, hits in zip(fresh, optim.matching(fresh, list(wanted), what=f"{key}.fresh")):
        patterns |= {path: pattern for path in hits if path not in patterns}
    left |= {named.pop(path): f"fresh: {why}" for path, why in patterns.items() if path in named}
    kernels = [source[named[p]].shape for p in wanted if p.endswith(KERNEL) and p in named]
    frame = [leaf.shape[0] // tubelet for p, leaf in wanted.items() if p.endswith(KERNEL)]
    old_tubelet = kernels[0][0] // frame[0] if kernels and frame[0] else tubelet
    slots = old_frames // max(old_tubelet, 1)
    match = Match(grid, tubelet, old_grid, slots, inflate, label_map, key)
    rows, missing, wrong = [], [], []
    for path, leaf in wanted.items():
        if path in patterns:
            rows.append(_row(path, leaf, None, None, "fresh", dict(pattern=patterns[path])))
        elif path not in named:
            missing.append(path)
        else:
            have = source[named[path]]
            try:
                rows.append(_row(path, leaf, named[path], have, *match.find(path, leaf, have)))
            except Differs as difference:
                wrong.append(f"{path}: {difference}")
    unused = [named[path] for path in named if path not in wanted]
    if missing or wrong or unused:
        raise UserError(_complaint(missing, unused, wrong, list(wanted), list(source), key))
    return Table(tuple(rows), left, dict(about or {}))


def _row(path, leaf, source, have, transform, options) -> Row:
    shape, dtype = (None, None) if have is None else digests.specification(have)
    where = getattr(leaf, "sharding", None)
    target = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=where)
    return Row(path, target, source, shape, dtype, transform, options)


def _renamed(source: Mapping[str, Any], rename, leftover, key) -> tuple[dict, dict]:
    """(new path -> source path, source path not taken -> its pattern)."""
    paths, left = list(source), {}
    # One that matches nothing is no mistake: a path that it should have named is told as having no use.
    hits_of = optim.matching(leftover, paths, what=f"{key}.leftover", none_ok=True)
    for pattern, hits in zip(leftover, hits_of):
        left |= {path: pattern for path in sorted(hits) if path not in left}
    pairs = [_pair(text, key) for text in rename]
    optim.matching([pattern for pattern, _ in pairs], paths, what=f"{key}.rename")
    named: dict[str, str] = {}
    for path in paths:
        if path in left:
            continue
        new = path
        for pattern, replacement in pairs:
            if re.search(pattern, path):
                new = re.sub(pattern, replacement, path, count=1)
                break
        if new in named:
            raise UserError(
                f"Two parameters of the source must not get one name; {named[new]} and {path} both "
                f"become {new}. Correct {key}.rename, or name one in {key}.leftover."
            )
        named[new] = path
    return named, left


def _pair(text: str, key: str) -> tuple[str, str]:
    pattern, arrow, replacement = text.partition("->")
    try:
        if not arrow or not pattern:
            raise ValueError("no 'pattern->replacement'")
        groups = re.compile(pattern).groups
        if any(int(n) > groups for n in re.findall(r"\\(\d+)", replacement)):
            raise ValueError(f"the pattern has {groups} groups")
    except (ValueError, re.error) as error:
        raise UserError(
            f"{key}.rename must hold 'pattern->replacement', as '^encoder/->vision/encoder/'; got "
            f"{text!r} ({error})."
        ) from None
    return pattern, replacement


def _complaint(missing, unused, wrong, wanted, source, key: str) -> str:
    """What does not fit, and the lines that would say what is meant."""
    parts = ["A hand-over must account for every parameter on both sides."]
    if wrong:
        parts.append(f"{len(wrong)} do not fit: {_some(wrong, '; ')}.")
    if missing:
        hint = nearest(missing[0], unused or source) if source else ""
        parts.append(f"{len(missing)} have no source: {_some(missing)}.{hint}")
    if unused:
        parts.append(f"{len(unused)} of the source have no use: {_some(unused)}.")
    rule = _rename_rule(missing, unused)
    if rule:
        parts.append(f'If they are the same: {key}.rename=("{rule}",).')
    if missing:
        parts.append(f"To start them fresh: {key}.fresh={_patterns(missing, wanted)}.")
    if unused:
        parts.append(f"To leave them: {key}.leftover={_patterns(unused, source)}.")
    return " ".join(parts)


def _some(texts: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return between.join(texts[:_SHOWN]) + more


def _patterns(some: Sequence[str], every: Sequence[str]) -> str:
    """Few patterns that match `some` of `every` path and no other, as a tuple to paste into a recipe."""
    chosen, others = [], set(every) - set(some)
    for path in some:
        if any(re.search(pattern, path) for pattern in chosen):
            continue
        parts = path.split("/")
        heads = ["^" + re.escape("/".join(parts[:n])) + "/" for n in range(1, len(parts))]
        free = (h for h in heads if not any(re.search(h, other) for other in others))
        chosen.append(next(free, "^" + re.escape(path) + "$"))
    return "(" + ", ".join(f'"{pattern}"' for pattern in chosen) + ",)"


def _rename_rule(missing: Sequence[str], unused: Sequence[str]) -> str:
    """The change of prefix that brings most unused paths to missing ones; '' if there is none."""
    lacking, found = set(missing), collections.Counter()
    for path in unused:
        for goal in missing:
            a, b = path.split("/"), goal.split("/")
            same = 0
            while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
                same += 1
            if same:
                heads = "/".join(a[: len(a) - same]), "/".join(b[: len(b) - same])
                old, new = (f"{head}/" if head else "" for head in heads)
                if old != new and new + path[len(old) :] in lacking:
                    found[f"^{re.escape(old)}->{new}"] += 1
    rule, count = found.most_common(1)[0] if found else ("", 0)
    return rule if count > 1 or count == len(unused) == 1 else ""
