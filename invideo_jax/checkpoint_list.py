"""`python -m invideo_jax.checkpoint WORKDIR`: what checkpoints there are, and digests to compare two runs by eye."""

import argparse
import json
import sys
import time

import jax

from invideo_jax import stored


def describe(directory, step: int, *, verify: bool) -> dict:
    """One step as a flat dictionary.

    Args:
        directory: checkpoints folder.
        step: which step.
        verify: read all arrays and compare them with their digests.

    Returns:
        step, ok ('yes' verified, 'listed' not read, else what is wrong), and what the meta file says.
    """
    row = dict(step=step, ok="listed")
    try:
        meta = stored.meta_of(directory, step)
        if verify:
            stored.read_arrays(directory, step)
            row["ok"] = "yes"
    except stored.CheckpointError as error:
        return row | dict(ok=f"DAMAGED: {error.cause}")
    own = meta["checkpoint"]
    row.update(
        stage=meta.get("stage"),
        stage_step=meta.get("stage_step"),
        age_seconds=round(time.time() - own["saved_at"], 1),
        bytes=own["bytes"],
        metric=own["metric"],
        mesh=own["mesh"],
        digests=own["digests"],
    )
    return row


def table(rows: list[dict]) -> str:
    """The rows of `describe` as text."""
    lines = [f"{'step':>10}  {'stage':<14}{'age':>10}  {'size':>10}  {'metric':>10}  ok"]
    for row in rows:
        if "bytes" not in row:
            lines.append(f"{row['step']:>10}  {row['ok']}")
            continue
        stage = f"{row['stage'] or '-'}:{'-' if row['stage_step'] is None else row['stage_step']}"
        metric = "-" if row["metric"] is None else f"{row['metric']:.5g}"
        size = f"{row['bytes'] / 1e6:.1f} MB"
        age = stored.ago(row["age_seconds"])
        lines.append(
            f"{row['step']:>10}  {stage:<14}{age:>10}  {size:>10}  {metric:>10}  {row['ok']}"
        )
    for row in rows:
        if "digests" in row:
            lines += ["", f"digests of step {row['step']} (the same on every mesh)"]
            lines += [f"  {group:<12}{digest}" for group, digest in row["digests"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Prints the list; exit code 2 when there is nothing to list, 74 when something listed is damaged."""
    parser = argparse.ArgumentParser(prog="python -m invideo_jax.checkpoint", description=__doc__)
    parser.add_argument("workdir", help="folder of a run, or its checkpoints folder")
    parser.add_argument("--step", type=int, help="only this step")
    parser.add_argument("--verify", action="store_true", help="read everything, compare digests")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # must not take the accelerator of a running job
    directory = stored.find(args.workdir)
    steps = [s for s in stored.numbered(directory)[::-1] if stored.looks(directory, s) != "stray"]
    if args.step is not None:
        steps = [s for s in steps if s == args.step]
    if not steps:
        there = stored.numbered(directory)
        print(
            f"error: no checkpoint{'' if args.step is None else f' of step {args.step}'} in {directory}; "
            f"numbered folders there: {there}. Give the workdir of a run.",
            file=sys.stderr,
        )
        sys.exit(2)
    rows = [describe(directory, step, verify=args.verify) for step in steps]
    corrupt = sorted(p.name for p in directory.iterdir() if ".corrupt" in p.name)
    if args.json:
        print(json.dumps(dict(directory=str(directory), steps=rows, set_aside=corrupt), indent=1))
    else:
        print(directory)
        # All steps in the table, digests of the newest (or the one asked for): what two runs are compared by.
        for row in rows[:-1]:
            row.pop("digests", None)
        print(table(rows))
        if corrupt:
            print(f"\nset aside as damaged: {', '.join(corrupt)}")
    if any(row["ok"].startswith("DAMAGED") for row in rows):
        sys.exit(74)
