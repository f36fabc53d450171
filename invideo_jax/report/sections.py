"""The sections of the report: each a function of a workdir that returns HTML, in the order of `SECTIONS`.

A new section is one function here (or in a file of its own) and one line in `SECTIONS`. It may put
files beside the page (`files[name] = content`); it returns '' when the workdir holds nothing for it.
"""

import base64
import collections
import json
import shlex
from collections.abc import Callable, MutableMapping
from html import escape

from invideo_jax.config import flatten
from invideo_jax.progress import duration, quantity
from invideo_jax.report import pictures
from invideo_jax.report.curve import Line, chart
from invideo_jax.report.workdir import Workdir

Files = MutableMapping[str, bytes]
_CLIPS_IN_OVERVIEW = 4
_SMALL_CHARTS = (
    ("PSNR on hidden pixels, dB", "/psnr"),
    ("Learning rate", "/learning_rate"),
    ("Gradient norm", "/grad_norm"),
    ("Clips a second", "/clips_per_s"),
)
_REASONS_SHOWN, _ROWS_SHOWN = 12, 10


def facts(run: Workdir, files: Files) -> str:
    """The figures one looks for first."""
    seconds, clips = run.total("perf/seconds"), run.total("perf/clips")
    cards = [("updates", f"{run.step:,}"), ("clips seen", f"{clips:,.0f}")]
    cards.append(("training time", duration(seconds)))
    if seconds:
        cards.append(("speed", f"{quantity(clips / seconds)}clips/s"))
        steps, shares = run.series("perf/data_wait")
        times = run.series("perf/seconds")[1]
        waited = sum(s * t for s, t in zip(shares, times)) / sum(times)
        cards.append(("waiting for data", f"{100 * waited:.1f} %"))
    for name in run.names():
        if name.endswith("/loss"):
            cards.append((name, f"{run.series(name)[1][-1]:.4f}"))
        elif name.endswith("/psnr"):
            cards.append((name, f"{run.series(name)[1][-1]:.2f} dB"))
    skipped = sum(run.series(n)[1][-1] for n in run.names() if n.endswith("/skipped"))
    if skipped:
        cards.append(("skipped updates", f"{skipped:.0f}"))
    inner = "".join(f"<div class='card'><b>{escape(v)}</b>{escape(k)}</div>" for k, v in cards)
    return f"<div class='cards'>{inner}</div>"


def reconstructions(run: Workdir, files: Files) -> str:
    """Original, masked input and reconstruction of held-out clips, animated and as strips of frames."""
    if not run.clips:
        return ""
    count = len(run.clips["original"])
    clips = [{name: run.clips[name][i] for name in pictures.PANELS} for i in range(count)]
    overview = pictures.animation(clips[:_CLIPS_IN_OVERVIEW], size=112)
    files["reconstructions.gif"] = pictures.gif(overview)
    files["reconstructions.png"] = pictures.png(overview[len(overview) // 2])
    strips = []
    for i, clip in enumerate(clips):
        files[f"clip_{i}.png"] = pictures.png(pictures.strip(clip))
        files[f"clip_{i}.gif"] = pictures.gif(pictures.animation([clip]))
        strips.append(_image(f"clip_{i}.png", files, f"held-out clip {i}: frames"))
    text = (
        f"Held-out clips after {run.clips_step:,} updates. The model sees the visible patches only; what "
        "was visible is shown as it was. A model of normalised patches predicts texture, not mean and "
        "contrast of a patch: these two are taken from the original, as is usual for such pictures."
    )
    moving = _image("reconstructions.gif", files, "original, masked input, reconstruction")
    frames = "".join(strips)
    return f"<h2>Reconstructions</h2><p>{text}</p><figure>{moving}</figure>{frames}"


def curves(run: Workdir, files: Files) -> str:
    """Loss over steps, of each stage; then learning rate, gradient norm and speed."""
    reference = (1.0, "predicting each patch's mean") if _normalised(run) else None
    options = dict(reference=reference, x_label="update", width=960, height=360)
    of_stages = _losses(run)
    big = ""
    for number, (stage, lines) in enumerate(of_stages.items()):
        title = f"Loss, {stage}" if len(of_stages) > 1 else "Loss"
        drawn = chart(lines, title=title, **options)
        if drawn:
            files["loss.svg" if number == 0 else f"loss_{stage}.svg"] = drawn.encode()
        big += drawn
    charts = []
    for title, ending in _SMALL_CHARTS:
        names = [n for n in (*run.names(), "perf/clips_per_s") if n.endswith(ending)]
        lines = [
            Line(n.removesuffix(ending) if names[1:] else "", *run.series(n), n.startswith("eval/"))
            for n in names
        ]
        charts.append(chart(lines, title=title, x_label="update", width=474, height=230))
    drawn = "".join(charts)
    return f"<h2>Curves</h2>{big}<div class='charts'>{drawn}</div>" if big or drawn else ""


def _losses(run: Workdir) -> dict[str, list[Line]]:
    """The losses by stage: stages may measure in different units. An evaluation's are of the stage it was made in."""
    line = lambda name: Line(
        name.removesuffix("/loss"), *run.series(name), name.startswith("eval/")
    )
    names = [name for name in run.names() if name.endswith("/loss")]
    stages = [name for name in names if not name.startswith("eval/")]
    found = {name.removesuffix("/loss"): [line(name)] for name in stages}
    for name in (name for name in names if name not in stages):
        last = run.series(name)[0][-1]
        ended = [stage for stage in stages if run.series(stage)[0][-1] >= last] or stages[-1:]
        found.setdefault(ended[0].removesuffix("/loss") if ended else "", []).append(line(name))
    return found


def retrieval(run: Workdir, files: Files) -> str:
    """How often texts and clips find each other, over steps, beside chance."""
    ends = ("_r1", "_r5")
    names = [n for n in run.names() if n.startswith("eval/") and n.endswith(ends)]
    chance = [n for n in names if n.endswith("chance_r1")]
    names = [n for n in names if n not in chance]
    if not names:
        return ""
    alone = len({n.split("/")[1] for n in names}) == 1
    short = lambda n: n.rpartition("/")[2] if alone else n.removeprefix("eval/")
    lines = [Line(short(n), *run.series(n), dots=True) for n in names]
    level = (run.series(chance[0])[1][-1], "chance of r1") if chance else None
    title = "First (r1), among five (r5)"
    drawn = chart(lines, title=title, reference=level, x_label="update", width=960, height=300)
    files["retrieval.svg"] = drawn.encode()
    text = (
        "text_video: captions of held-out clips that find their clip first, or among the first five; "
        "video_text: clips that find one of their captions so."
    )
    return f"<h2>Retrieval</h2><p>{text}</p>{drawn}"


def _normalised(run: Workdir) -> bool:
    """Whether all stages predict normalised pixels, for which a loss of 1 is that of the mean."""
    stages = run.config.get("stages", {}).values()
    flags = [stage.get("target", {}).get("normalise", False) for stage in stages]
    return bool(flags) and all(flags)


def evaluations(run: Workdir, files: Files) -> str:
    """First and last value of everything that was evaluated."""
    names = [name for name in run.names() if name.startswith("eval/")]
    rows = []
    for name in names:
        steps, values = run.series(name)
        first, last = f"{values[0]:.4f} (at {steps[0]:,})", f"{values[-1]:.4f} (at {steps[-1]:,})"
        rows.append((name.removeprefix("eval/"), first, last))
    return _table("Evaluation on held-out clips", ("measure", "first", "last"), rows)


def bad_examples(run: Workdir, files: Files) -> str:
    """How many videos could not be used, why, and which."""
    if not run.bad_examples:
        return "<h2>Bad videos</h2><p>None: every video asked for was used.</p>"
    reasons = collections.Counter(str(row.get("reason", "unknown")) for row in run.bad_examples)
    counts = _table("Bad videos", ("reason", "count"), reasons.most_common(_REASONS_SHOWN))
    shown = [
        (row.get("path", row.get("id", "")), row.get("reason", ""), row.get("detail", ""))
        for row in run.bad_examples[:_ROWS_SHOWN]
    ]
    note = f"<p>The first {len(shown)} of {len(run.bad_examples)} rows of bad_examples.jsonl:</p>"
    return counts + note + _table("", ("video", "reason", "detail"), shown)


def configuration(run: Workdir, files: Files) -> str:
    """What the command line changed in the recipe, and the whole resolved config to unfold."""
    if not run.config:
        return ""
    flat = flatten(run.config)
    rows = [
        (key, json.dumps(value), run.config_sources.get(key, "")) for key, value in flat.items()
    ]
    typed = [row[:2] for row in rows if row[2].startswith("command line")]
    changed = _table("", ("changed on the command line", "value"), typed)
    unchanged = "" if changed else "<p>The recipe as it is: the command line changed nothing.</p>"
    whole = _fold(f"all {len(rows)} values", _table("", ("key", "value", "set by"), rows))
    return f"<h2>Config</h2>{changed}{unchanged}{whole}"


def parameters(run: Workdir, files: Files) -> str:
    """The table of parameters, to unfold; its total in sight."""
    if not run.parameters:
        return ""
    total = next(
        (x for x in run.parameters.splitlines() if x.startswith("Total")), "all parameters"
    )
    return f"<h2>Parameters</h2>{_fold(total, _preformatted(run.parameters))}"


def environment(run: Workdir, files: Files) -> str:
    """Versions, devices, command."""
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in sorted(run.environment.items())
    ]
    return _table("Made with", ("what", "value"), rows)


def next_steps(run: Workdir, files: Files) -> str:
    """What to type next."""
    folder = shlex.quote(str(run.path))
    lines = [
        ("list the checkpoints, one digest each", f"python -m invideo_jax.checkpoint {folder}"),
        ("make this page again", f"python -m invideo_jax.report {folder}"),
        (
            "train on your own videos (a folder or a manifest)",
            "python -m invideo_jax.train --config=configs/internvideo1/mae_vit_b.py \\\n"
            "    --config.data.train=FOLDER_OR_MANIFEST --workdir=NEW_FOLDER",
        ),
    ]
    if (run.path / "tb").is_dir():
        lines.insert(1, ("curves, live", f"tensorboard --logdir={folder}/tb"))
    command = run.environment.get("command")
    if command:
        command = command if isinstance(command, str) else shlex.join(command)
        lines.insert(0, ("go on where this run stopped", command))
    body = "\n".join(f"<span class='note'># {escape(a)}</span>\n{escape(b)}" for a, b in lines)
    return f"<h2>What to type next</h2><pre>{body}</pre>"


def _image(name: str, files: Files, alt: str) -> str:
    kind = name.rpartition(".")[2]
    data = base64.b64encode(files[name]).decode()
    return f"<img src='data:image/{kind};base64,{data}' alt='{escape(alt, quote=True)}'>"


def _table(title: str, heads, rows) -> str:
    """A table under a heading; '' without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(str(h))}</th>" for h in heads)
    cells = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"{heading}<table><tr>{head}</tr>{body}</table>"


def _fold(title: str, html: str) -> str:
    """Content that is shown on a click."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def _preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


SECTIONS: tuple[Callable[[Workdir, Files], str], ...] = (
    facts,
    reconstructions,
    curves,
    retrieval,
    evaluations,
    next_steps,
    bad_examples,
    configuration,
    parameters,
    environment,
)
