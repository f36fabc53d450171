"""From queries to hits: the nearest clips of an index, and the pairs judged by the model once more."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from invideo_jax import sharding
from invideo_jax.data.decode import BadVideo
from invideo_jax.data.sources import Source
from invideo_jax.data.sources.base import make_example
from invideo_jax.errors import UserError
from invideo_jax.features.windows import Rule
from invideo_jax.search.clips import read_cut
from invideo_jax.search.index import Rows
from invideo_jax.search.indexing import Embedder, Settings, fill, sound_of
from invideo_jax.search.opening import Opened

_SCORES_AT_ONCE = 1 << 18  # rows of the index


@dataclasses.dataclass(frozen=True)
class Query:
    """What is looked for: words, or a file that the clips shall be like."""

    text: str = ""
    file: str = ""

    @property
    def title(self) -> str:
        """For people."""
        return self.text or f"like {pathlib.Path(self.file).name}"


@dataclasses.dataclass(frozen=True)
class Hit:
    """One clip of the index.

    Attributes:
        video: number of its key among those of the `Rows`.
        window: which window of the video.
        start, end: seconds into the file.
        score: cosine of the embeddings.
        match: what the model says of the pair, a logit; None where it was not asked.
    """

    video: int
    window: int
    start: float
    end: float
    score: float
    match: float | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """Hits of a query, best first.

    Attributes:
        mean: of the scores of all clips.
        clips: how many there are.
    """

    query: Query
    hits: tuple[Hit, ...]
    mean: float
    clips: int


def read_queries(texts: Sequence[str], like: Sequence[str] = (), file: str = "") -> list[Query]:
    """The queries of a command line.

    Args:
        texts: of queries.
        like: videos to look for the like of.
        file: a text file, one query a line; empty lines and those that begin with '#' are left out.

    Raises:
        UserError: none, or an empty one, or no such file.
    """
    texts = list(texts)
    if file:
        try:
            lines = pathlib.Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--query_file must be a readable text file; {file}: {error}."
            ) from None
        texts += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for text in texts:
        if not text.strip():
            raise UserError(f"A query must have words; got {text!r}. Say what to look for.")
    for path in like:
        if not pathlib.Path(path).is_file():
            raise UserError(f"--like must be a video file; there is no {path}.")
    if not texts and not like:
        raise UserError(
            'There must be something to look for; got no query. Give words, as "a red ball bounces '
            'twice", or --query_file=FILE, or --like=VIDEO.'
        )
    return [Query(text=text) for text in texts] + [Query(file=str(path)) for path in like]


def check_words(opened: Opened, queries: Sequence[Query], say: Callable[[str], None]) -> None:
    """Says what the model will not read of the queries; raises UserError where it is all."""
    for text in (query.text for query in queries if query.text):
        if not opened.words.spec.asked([text])[1].any():
            raise UserError(
                f"A query must have words that the model reads; got {text!r}, of which nothing is left "
                "once it is written as the texts of training were. Use words."
            )
        if unknown := opened.words.unknown(text):
            words = ", ".join(map(repr, unknown))
            say(f"note: the tokenizer does not know {words} of {text!r}: not looked for")
        if cut := opened.words.cut(text):
            say(
                f"note: {text!r} is longer than the {opened.words.spec.length} tokens that the text tower "
                f"reads; cut to {cut!r}"
            )


def embed_texts(opened: Opened, texts: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embeddings float32 [n, P] and, on the host, 'tokens' [n, L, D] and 'valid' [n, L]."""
    mesh = opened.mesh
    unit = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-len(texts) // unit) * unit
    ids, valid = opened.words.spec.asked([*texts, *[""] * (rows - len(texts))])
    batch = sharding.global_batch({"ids": ids, "valid": valid}, mesh)
    text = jax.jit(lambda params, *x: opened.towers.text(opened.filled(params), *x))
    with sharding.use(mesh):
        made = text(opened.text_params, batch["ids"], batch["valid"])
    host = {name: np.asarray(x)[: len(texts)] for name, x in made.items()}
    return host.pop("embedding"), host | {"valid": valid[: len(texts)]}


def embed_file(opened: Opened, path: str, settings: Settings) -> np.ndarray:
    """The embedding float32 [P] of a whole file, by the same tower as the index.

    Raises:
        UserError: it cannot be read, or has no sound where that is asked for.
    """
    whole = str(pathlib.Path(path).absolute())
    try:
        cut = read_cut(
            make_example(id=path, video=whole, path=whole),
            0,
            Rule(),
            opened.clip,
            limits=settings.limits,
        )
    except BadVideo as bad:
        raise UserError(f"--like must be a video that can be read; {bad}.") from None
    host = {"video": cut.clip[None]}
    if settings.by != "video":
        sound = sound_of(opened, whole, cut.window, settings.limits)
        if not sound["audio_frames"]:
            raise UserError(f"--like must have sound for --by={settings.by}; {path} has none.")
        host |= {name: np.asarray(x)[None] for name, x in sound.items()}
    return np.asarray(Embedder(opened, settings.by, settings.batch_size)(host))[0]


def best(rows: Rows, query: np.ndarray, top: int) -> tuple[list[Hit], float]:
    """The `top` clips nearest to a query, and the mean score of all.

    Args:
        query: float32 [P], of length 1.
    """
    pieces = [
        rows.embedding[low : low + _SCORES_AT_ONCE] @ query
        for low in range(0, len(rows), _SCORES_AT_ONCE)
    ]
    scores = np.concatenate(pieces)
    # Equal scores: in the order of the videos.
    order = np.argsort(-scores, kind="stable")[:top]
    hits = [
        Hit(
            int(rows.video[i]),
            int(rows.window[i]),
            float(rows.start[i]),
            float(rows.end[i]),
            float(scores[i]),
        )
        for i in order
    ]
    return hits, float(scores.mean())


def answer(
    opened: Opened,
    rows: Rows,
    queries: Sequence[Query],
    source: Source,
    numbers: Sequence[int],
    settings: Settings,
    *,
    top: int = 12,
    rerank: int = 0,
    say: Callable[[str], None] = print,
) -> list[Answer]:
    """The best clips for each query.

    Args:
        rows: of the index.
        source, numbers: examples, and which of them the videos of the rows are.
        top: hits for each query.
        rerank: how many of the best are judged by the match score; 0 for none.
    """
    texts = [query.text for query in queries if query.text]
    found, words = embed_texts(opened, texts) if texts else (None, {})
    judge = _judge_of(opened, settings.batch_size) if rerank else None
    answers, text = [], 0
    for query in queries:
        if query.text:
            vector, own = found[text], {name: x[text] for name, x in words.items()}
            text += 1
        else:
            vector, own = embed_file(opened, query.file, settings), None
        hits, mean = best(rows, vector, max(top, rerank))
        if judge and own:
            clips = _clips(opened, hits[:rerank], source, numbers, settings, say)
            hits = _judged(judge, own, hits[:rerank], clips, settings.batch_size) + hits[rerank:]
        answers.append(Answer(query, tuple(hits[:top]), mean, len(rows)))
    return answers


def _clips(opened, hits, source, numbers, settings, say) -> list[np.ndarray | None]:
    """The clips of hits, decoded again; None for those that cannot be read now."""
    clips = []
    for hit in hits:
        try:
            example = source[numbers[hit.video]]
            options = dict(limits=settings.limits)
            clips.append(read_cut(example, hit.window, settings.rule, opened.clip, **options).clip)
        except BadVideo as bad:
            say(f"note: not judged again: {bad}")
            clips.append(None)
    return clips


def _judged(judge, words, hits, clips, rows: int) -> list[Hit]:
    """Hits ordered by the match score; those without a clip stand behind."""
    whole = [(hit, clip) for hit, clip in zip(hits, clips) if clip is not None]
    scores: list[float] = []
    for low in range(0, len(whole), rows):
        some = np.stack([clip for _, clip in whole[low : low + rows]])
        scores += judge(words, some)[: len(some)].tolist()
    found = [dataclasses.replace(hit, match=s) for (hit, _), s in zip(whole, scores)]
    lost = [hit for hit, clip in zip(hits, clips) if clip is None]
    return sorted(found, key=lambda hit: -hit.match) + lost


def _judge_of(opened: Opened, rows: int):
    towers, mesh = opened.towers, opened.mesh

    @jax.jit
    def match(params, tokens, valid, batch):
        return towers.match(params, tokens, valid, towers.video(params, batch)["tokens"])

    def judge(words, clips):
        host = dict(
            video=fill(clips, rows),
            tokens=np.stack([words["tokens"]] * rows),
            valid=np.stack([words["valid"]] * rows),
        )
        batch = sharding.global_batch(host, mesh)
        with sharding.use(mesh):
            made = match(opened.params, batch["tokens"], batch["valid"], {"video": batch["video"]})
        return np.asarray(made)

    return judge
