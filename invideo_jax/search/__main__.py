"""Finds clips by words: `python -m invideo_jax.search --checkpoint=DIR --videos=FOLDER "a red ball bounces twice"`.

The first call embeds all videos into an index on disk, later ones only what is new or has changed. The hits
are printed, and shown with frames in one HTML file.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import sys

import jax

from invideo_jax import command_line, runtime, sharding
from invideo_jax.data.decode import BadVideo, Limits
from invideo_jax.data.sources import Source, open_source
from invideo_jax.errors import UserError
from invideo_jax.features.windows import Rule
from invideo_jax.metrics import replace_file
from invideo_jax.programs.base import compute_dtype
from invideo_jax.progress import duration
from invideo_jax.search import asking, gallery, indexing
from invideo_jax.search.clips import data_uri, read_cut, strip
from invideo_jax.search.index import Index, place_of
from invideo_jax.search.opening import Opened, open_model

INTERRUPTED = 130
SECONDS = 10.0  # of a clip
CAPTIONS = 3  # shown of a hit


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    with command_line.errors_for_people(ValueError):
        given = _arguments(sys.argv[1:] if argv is None else argv)
        try:
            return _run(given)
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the index", file=sys.stderr)
            return INTERRUPTED


def _run(given) -> int:
    queries = asking.read_queries(given.query, given.like, given.query_file)
    mesh = sharding.make_mesh(data=-1, fsdp=given.fsdp, devices=jax.local_devices())
    unit = mesh.shape["data"] * mesh.shape["fsdp"]
    opened = open_model(
        given.checkpoint,
        mesh,
        tokenizer=given.tokenizer,
        ema=given.weights == "ema",
        frames=given.frames,
        size=given.size,
        crop="" if given.crop == "auto" else given.crop,
        dtype=compute_dtype(given.dtype),
    )
    indexing.check_towers(opened, given.by, rerank=given.rerank)
    asking.check_words(opened, queries, print)
    roots = tuple(root for root in given.roots.split(",") if root)
    options = {"split": given.split} if given.split else {}
    source = open_source(given.videos, roots=roots, roots_option="--roots", **options)
    for note in source.notes:
        print(f"note: {note}")
    settings = indexing.Settings(
        by=given.by,
        rule=Rule(seconds=given.seconds),
        batch_size=math.ceil(given.batch_size / unit) * unit,
        limits=Limits(max_seconds=given.max_hours * 3600),
        threads=given.threads,
        save_seconds=given.save_seconds,
    )
    place = place_of(str(opened.source.about["name"]), given.index, given.videos)
    index = Index(place, _facts(given, opened))
    listing, done = indexing.update(index, source, opened, settings)
    rows = index.rows(listing.keys)
    _tell_index(index, listing, done, rows)
    answers = asking.answer(
        opened,
        rows,
        queries,
        source,
        listing.numbers,
        settings,
        top=given.top,
        rerank=given.rerank,
    )
    sections = [_section(a, source, listing.numbers, opened, settings) for a in answers]
    file = pathlib.Path(given.output) if given.output else place / f"{_slug(queries)}.html"
    about = f"{given.videos}, looked through by {given.checkpoint}"
    replace_file(file, gallery.page(sections, about=about).encode())
    _print_table(sections)
    print(f"shown in {file}")
    return runtime.FINISHED


def _facts(given, opened: Opened) -> dict:
    """What an index belongs to: another answer to any of it is another index."""
    spec = given.videos
    videos = os.path.abspath(spec) if os.path.exists(spec) else spec
    return dict(
        videos=videos,
        split=given.split,
        by=given.by,
        seconds=given.seconds,
        embeddings=dict(opened.about),
    )


def _tell_index(index: Index, listing: indexing.Listing, done: indexing.Update, rows) -> None:
    if done.added or done.dropped:
        parts = [f"{done.added - done.changed:,} new", f"{done.changed:,} changed"]
        print(
            f"index: {', '.join(parts)}, {done.dropped:,} gone; {done.clips:,} clips in "
            f"{duration(done.seconds)}"
        )
    bad = list(indexing.bad_videos(index, listing))
    lost = sum(index.entries[key].lost for key in listing.keys if not index.entries[key].bad)
    if bad:
        counts = collections.Counter(entry.bad for _, entry in bad)
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        file = index.folder / "bad.jsonl"
        lines = [json.dumps(dict(video=key, reason=e.bad, detail=e.detail)) for key, e in bad]
        replace_file(file, "".join(line + "\n" for line in lines).encode())
        print(f"{len(bad):,} videos cannot be found ({reasons}): {file}")
    if lost:
        print(f"{lost:,} clips of other videos could not be read")
    if not len(rows):
        raise UserError(
            f"There must be a video to look through; none of the {len(listing.keys):,} could be read "
            f"or embedded. See {index.folder / 'bad.jsonl'}."
        )
    print(f"{len(rows):,} clips of {len(listing.keys) - len(bad):,} videos")


def _section(answer: asking.Answer, source: Source, numbers, opened, settings) -> gallery.Section:
    cards = tuple(_card(hit, source, numbers[hit.video], opened, settings) for hit in answer.hits)
    return gallery.Section(answer.query.title, cards, answer.mean, answer.clips)


def _card(hit: asking.Hit, source: Source, number: int, opened, settings) -> gallery.Card:
    name = source.identify(number)
    card = gallery.Card(name, name, hit.start, hit.end, hit.score, hit.match)
    try:
        example = source[number]
        texts = (
            *example["captions"],
            *example["audio_captions"],
            *example["audio_video_captions"],
            *example["fused_captions"],
        )
        card = dataclasses.replace(card, path=example["path"], captions=texts[:CAPTIONS])
        options = dict(pictures=True, limits=settings.limits)
        cut = read_cut(example, hit.window, settings.rule, opened.clip, **options)
    except BadVideo:
        return card
    return dataclasses.replace(card, picture=data_uri(strip(cut.pictures)))


def _print_table(sections) -> None:
    for section in sections:
        print(f"\n{section.title}")
        judged = any(card.match is not None for card in section.cards)
        print(f"{'rank':>4}  {'score':>6}  {'match  ' if judged else ''}{'seconds':<19}  file")
        for rank, card in enumerate(section.cards, 1):
            match = (
                "" if not judged else "     –  " if card.match is None else f"{card.match:5.2f}  "
            )
            print(f"{rank:>4}  {card.score:6.3f}  {match}{gallery.span(card):<19}  {card.name}")
    print()


def _slug(queries) -> str:
    words = re.sub(r"\W+", "-", queries[0].title.lower()).strip("-")[:60] or "search"
    return words if len(queries) == 1 else f"{words}-and-{len(queries) - 1}-more"


def _arguments(argv):
    parser = command_line.Parser(
        prog="python -m invideo_jax.search", description=__doc__.split("\n\n")[1]
    )
    add = parser.add_argument
    add("query", nargs="*", help="what to look for, in quotes; several are searched one by one")
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="workdir of a contrastive stage, WORKDIR@STEP, or imported weights",
    )
    add("--videos", required=True, metavar="LIST", help="a folder, a manifest, or another source")
    add("--query_file", default="", metavar="FILE", help="more queries, one a line")
    add("--like", action="append", default=[], metavar="VIDEO", help="clips like this one")
    add("--by", default="video", help="what is compared: video (default), audio, or audio_video")
    add("--top", type=int, default=12, help="hits of each query")
    add("--rerank", type=int, default=0, help="best hits that the match score orders anew")
    add("--output", default="", metavar="FILE.html", help="the gallery; by default by the index")
    add("--index", default="", metavar="DIR", help="default: WORKDIR/search, or beside the weights")
    add("--seconds", type=float, default=SECONDS, help="of a clip; 0: whole videos")
    add("--tokenizer", default="", help="of imported weights; a workdir keeps its own")
    add("--frames", type=int, default=0, help="of a clip; 0: as the model was made for")
    add(
        "--size", type=int, default=0, help="side of a clip in pixels; 0: as the model was made for"
    )
    add("--crop", choices=("auto", "center", "resize"), default="auto", help="auto: as evaluated")
    add("--batch_size", type=int, default=8, help="clips computed together, over all devices")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the towers")
    add("--weights", choices=("ema", "params"), default="ema", help="ema: where the run keeps one")
    add("--fsdp", type=int, default=1, help="devices that share one copy of the parameters")
    add("--split", default="", help="rows of this split only")
    add("--roots", default="", help="more folders that paths of a manifest may lead to, by commas")
    add("--threads", type=int, default=min(os.cpu_count() or 1, 8), help="videos decoded at a time")
    add("--save_seconds", type=float, default=30.0, help="longest work that a kill can lose")
    add("--max_hours", type=float, default=6.0, help="a longer video is a bad one")
    given = parser.parse_intermixed_args(argv)
    least = dict(top=1, rerank=0, frames=0, size=0, batch_size=1, threads=1, fsdp=1, save_seconds=0)
    for name, low in least.items():
        if getattr(given, name) < low:
            parser.error(f"--{name} must be at least {low}; got --{name}={getattr(given, name)}")
    if given.output and not given.output.endswith((".html", ".htm")):
        raise UserError(f"--output must end in .html; got --output={given.output}.")
    return given


if __name__ == "__main__":
    sys.exit(main())
