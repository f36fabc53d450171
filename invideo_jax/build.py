"""From the config to the data of a run: sources, batches, evaluators. `programs/` builds what runs on them."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from invideo_jax import sharding
from invideo_jax.data import captions
from invideo_jax.data.alternating import Alternating, by_media, in_turn
from invideo_jax.data.bad import BadLedger
from invideo_jax.data.decode import BadVideo, Limits
from invideo_jax.data.order import Turns
from invideo_jax.data.pipeline import Loader
from invideo_jax.data.sources import NoSuchSplit, Source, open_source, parse_mixture
from invideo_jax.data.transforms import ClipSpec
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS, Given
from invideo_jax.programs import Program
from invideo_jax.stages import Duration, Stage

Batch = Mapping[str, jax.Array]


def clip_spec(
    config: ml_collections.ConfigDict,
    stage_name: str,
    *,
    train: bool = True,
    clips: int = 1,
    crops: int = 1,
) -> ClipSpec:
    """How a clip is cut from a video; evaluation takes the middle, in time and space, unflipped.

    A stage whose crop is 'resize', the whole picture, keeps it in evaluation.

    Args:
        clips: of each video of an evaluation, spread over it.
        crops: of each of them: 1, or 3 along the long side.
    """
    clip = config.stages[stage_name].clip
    if crops not in (1, 3):
        raise UserError(f"crops must be 1 or 3 of each clip; got crops={crops}.")
    whole = "resize" if clip.crop == "resize" else "center"
    where = {1: whole, 3: "three_crop"}[crops]
    fixed = dict(crop=where, flip=0.0, randaugment="", erase=0.0, views=clips)
    fixed = {} if train else fixed | dict(repeats=clips * crops)
    if not train and clip.sampling == "rand":
        fixed["sampling"] = "middle"  # its fixed counterpart
    return ClipSpec(**{**clip.to_dict(), **fixed})


def train_sources(config: ml_collections.ConfigDict) -> tuple[list[Source], list[float]]:
    """The training sources and their weights.

    Raises:
        ValueError: nothing there, or not what the spec says.
    """
    parts, data = parse_mixture(config.data.train), config.data
    opened = [_open(spec, data, data.train_split) for spec, _ in parts]
    return opened, [weight for _, weight in parts]


def _open(
    spec: str, data: ml_collections.ConfigDict, split: str, classes: Sequence[str] = ()
) -> Source:
    filters = dict(min_seconds=data.min_seconds, max_seconds=data.max_seconds)
    filters = {name: value for name, value in filters.items() if value}
    try:
        return open_source(spec, split=split, roots=data.roots, classes=classes, **filters)
    except TypeError as error:
        if not filters:
            raise
        raise UserError(
            f"data.{min(filters)} needs a manifest that says how long its videos are; {spec} does not. Make "
            f"one: python -m invideo_jax.data.scan {spec} --output=manifest.jsonl"
        ) from error


def held_out_sources(config: ml_collections.ConfigDict, train: Sequence[Source]) -> list[Source]:
    """The evaluation sources: those of `data.eval`, else the held-out rows of the training sources.

    Empty where `data.eval` is empty and no training source has rows of the split `data.eval_split`.

    Args:
        train: the training sources, as opened.
    """
    data = config.data
    parts = parse_mixture(data.eval or data.train)
    lists = {source.classes for source in train if source.classes}
    # A list of its own must count its named labels as the training data does.
    classes = lists.pop() if data.eval and len(lists) == 1 else ()
    opened = []
    for (spec, _), source in zip(parts, [None] * len(parts) if data.eval else train):
        try:
            found = _open(spec, data, data.eval_split, classes)
        except NoSuchSplit:
            if data.eval:
                raise
            continue  # training rows only
        if source is None or found.fingerprint() != source.fingerprint():  # equal: it has no splits
            opened.append(found)
    return opened


def train_loader(
    config: ml_collections.ConfigDict,
    made: Program,
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    start_step: int,
    steps: int,
    **options: Any,
) -> Loader | Alternating:
    """Training batches of a stage, each of one kind of media; `options` are those of `loader`."""
    check_media(made, sources)
    options |= dict(modalities=made.modalities)
    groups = by_media(sources, weights)
    if len(groups) == 1:
        options |= dict(weights=weights, start_step=start_step, steps=steps)
        return loader(config, made.stage, sources, **options)

    def one(turns: Turns, start: int, steps: int) -> Loader:
        group = groups[turns.number]
        its = dict(weights=group.weights, numbers=group.numbers, firsts=group.firsts, turns=turns)
        its |= dict(start_step=start, steps=steps)
        return loader(config, made.stage, group.sources, **options, **its)

    shares = [sum(group.weights) for group in groups]
    return Alternating(one, shares, start_step=start_step, steps=steps)


def check_media(made: Program, sources: Sequence[Source]) -> None:
    """Raises UserError for a source of a kind of media that the stage has no use for."""
    for source in sources:
        if source.media in made.media:
            continue
        name, named = made.stage.name, {"video": "videos", "image": "images", "audio": "sounds"}
        sound = f", and a tower of sound (stages.{name}.audio.name)"
        raise UserError(
            f"A stage must have a use for all its data; {source.name} holds {named[source.media]}, and stage {name} "
            f"takes only {' and '.join(named[media] for media in made.media)}. Leave the source out (data.train, "
            "data.eval), or run it in a recipe of contrastive stages whose encoder takes images, as internvideo2"
            f"{sound if source.media == 'audio' else ''}."
        )


def video_share(made: Program, sources: Sequence[Source], weights: Sequence[float]) -> float:
    """The share of the training batches that are clips, of which the program's tokens and FLOPs are known."""
    clips = ("video", "image") if made.clip_frames == 1 else ("video",)
    whole = sum(w for source, w in zip(sources, weights) if source.media in clips)
    return whole / sum(weights)


def loader(
    config: ml_collections.ConfigDict, stage: Stage, sources: Sequence[Source], **options: Any
) -> Loader:
    """Batches of a stage; `options` are further arguments of `Loader`, and `clips` and `crops`."""
    train, data = options.get("train", True), config.data
    views = {name: options.pop(name) for name in ("clips", "crops") if name in options}
    return Loader(
        sources,
        clip=clip_spec(config, stage.name, train=train, **views),
        seed=config.seed,
        stage=stage.name,
        workers=data.workers if train else 0,
        threads=data.threads,
        read_seconds=data.read_seconds,
        hang_seconds=config.guard.hang_seconds / 2,  # sooner than the watchdog: this names the file
        limits=Limits(
            max_pixels=int(data.max_megapixels * 1e6),
            max_seconds=data.max_hours * 3600,
            decode_seconds=data.decode_seconds,
        ),
        **options,
    )


def evaluators(
    config: ml_collections.ConfigDict,
    made: Program,
    *,
    mesh: jax.sharding.Mesh,
    train: Sequence[Source],
    held_out: Sequence[Source],
    folder: pathlib.Path,
    teach: Callable[[Batch], Batch] = lambda batch: batch,
    ledger: BadLedger | None = None,
    on_batch: Callable[[], None] = lambda: None,
    only_due: bool = True,
) -> dict[str, Any]:
    """The evaluators of a stage by name; see `invideo_jax.evals` for what they do.

    Args:
        train, held_out: examples; of several kinds of media videos come first, then images, then sounds.
        folder: where their files go.
        teach: adds to a device batch what the stage's teacher gives.
        ledger: lists videos that cannot be read.
        on_batch: called before each batch, and now and then while texts are read (the watchdog is told that the run
            lives).
        only_due: leave out those that the config never runs during training.
    """

    data = dict(held_out=held_out, train=train)
    said = {of: _Texts(sources, on_batch) for of, sources in data.items()}

    def batches(examples: int, *, of: str = "held_out", taught: bool = True, **views: int):
        options = dict(mesh=mesh, sources=data[of], examples=examples, ledger=ledger, **views)
        options |= dict(taught=taught)
        for batch in eval_batches(config, made, **options):
            on_batch()
            yield teach(batch) if taught else batch

    def texts(examples: int, *, of: str = "held_out", kind: str = "video"):
        return said[of](examples, kind)

    jitted = lambda function: None if function is None else jax.jit(function)
    given = Given(
        batches=batches,
        eval_loss=jax.jit(made.eval_loss),
        encode=jax.jit(made.encode),
        encode_tokens=jax.jit(made.encode_tokens),
        reconstruct=jitted(made.reconstruct),
        predict=jitted(made.predict),
        classes=next((source.classes for source in (*train, *held_out) if source.classes), ()),
        workdir=folder,
        towers=made.towers,
        texts=texts if made.towers else None,
    )
    ready = {}
    for name, options in config.evals.items():
        options = options.to_dict()
        if made.stage.name not in (options.pop("stages", None) or config.stage_order):
            continue
        if Duration.parse(options.pop("every")).amount or not only_due:
            ready[name] = EVALUATORS.get(name)(given, **options)
    return ready


class _Texts:
    """Texts of examples in the order of `eval_batches`; each is read once, however often it is asked for."""

    def __init__(self, sources: Sequence[Source], on_batch: Callable[[], None]):
        self._on_batch, self._found = on_batch, []
        of = (source for group in in_turn(sources) for source in group.sources)
        self._places = [(source, len(source)) for source in of]

    def __call__(self, examples: int, kind: str) -> list[tuple[str, ...]]:
        found, first = self._found, 0
        for source, size in self._places:
            for number in range(max(len(found), first), min(first + size, examples)):
                if number % 64 == 0:
                    self._on_batch()
                found.append(_texts(source, number - first))
            first += size
        return [captions.all_texts(example, kind) for example in found[:examples]]


def _texts(source: Source, index: int) -> dict[str, Any]:
    try:
        return source.texts(index)
    except BadVideo:  # its row of the batches is not valid
        return {}


def eval_batches(
    config: ml_collections.ConfigDict,
    made: Program,
    *,
    mesh: jax.sharding.Mesh,
    sources: Sequence[Source],
    examples: int,
    clips: int = 1,
    crops: int = 1,
    ledger: BadLedger | None = None,
    taught: bool = True,
) -> Iterator[Batch]:
    """Device batches of the first `examples` videos, cut as for evaluation; rows beyond are not valid.

    taught=False leaves out what is kept of a teacher on disk.

    Each video gives `clips` * `crops` rows, at consecutive positions. Each batch is of one kind of media: videos come
    first, then images, then sounds, and their positions count on.

    The clips are the same for every mesh and batch size. One process of each run decodes in threads:
    starting workers would take longer than most evaluations.
    """
    check_media(made, sources)
    unit, stage, each = mesh.shape["data"] * mesh.shape["fsdp"], made.stage, clips * crops
    wanted = min(examples, sum(map(len, sources))) * each
    rows = min(stage.batch_size, -(-wanted // unit) * unit)
    options = dict(batch_size=rows, rows=sharding.rows_of_process(mesh, rows), train=False)
    options |= dict(clips=clips, crops=crops, modalities=made.modalities)
    first = 0  # examples before this group
    for group in in_turn(sources):
        left = min(sum(map(len, group.sources)), examples - first) * each
        if left <= 0:
            return
        its = dict(numbers=group.numbers, firsts=group.firsts, steps=-(-left // rows))
        with loader(config, stage, group.sources, **options, **its, ledger=ledger) as batches:
            for host, info in batches:
                host["valid"] &= host["position"] < left
                host["position"] += np.uint32(first * each)
                host = made.with_read(host, info) if taught else host
                yield sharding.global_batch(host, mesh)
        first += sum(map(len, group.sources))
