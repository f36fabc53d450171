"""Retrieval between texts and videos, or their sound: what a contrastive stage is for."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.evals import Given, ranking
from invideo_jax.evals.classification import to_host
from invideo_jax.evals.embed import Embedder, place, texts_of, towers_of, whole_rows
from invideo_jax.evals.ranking import Rows, Standing
from invideo_jax.registry import nearest

# What becomes of the texts of an example.
CAPTIONS = {
    "all": lambda texts: texts,
    "first": lambda texts: texts[:1],
    "joined": lambda texts: (" ".join(texts),) if texts else (),
}


class Evaluator:
    """Finds videos by texts and texts by videos, by the cosine of their embeddings.

    For `text_video_` (videos by text) and `video_text_`, `run` gives `r1`, `r5`, `r10` (shares in 0..1),
    `median_rank` and `mean_rank` (the best is 1); with the ending `_dsl` from the dual softmax, and with
    `_rerank` after the model has judged the best pairs itself; with another gallery its name stands for
    'video'. `chance_r1` and `video_text_chance_r1` are what scores that say nothing get; `examples` and
    `texts` the numbers counted. An example that cannot be read, or lacks the modality or the text, is left
    out.

    Args:
        examples: the first so many held-out videos.
        text: kind of texts, as of `Given.texts`.
        gallery: 'video', 'audio' or 'audio_video', what texts are paired with.
        captions: of an example with several, 'all' (each is a query; of a video the best ranked one
            counts), the 'first', or 'joined' by spaces (the paragraph protocol of DiDeMo and ActivityNet).
        same_text: whether a text is right for every example that has the very same one, and not for its own
            alone, as published.
        dual_softmax: whether its recall is given too.
        temperature: of the dual softmax; published: 1.
        rerank: how many candidates of each query the fusion layers judge (published: 128); 0: none.
            All others have the score -100. Videos are read once more for it, so that the tokens of one
            batch are held at a time.
        use_dsl_for_match: whether candidates are chosen by the dual softmax, as published for some sets.
        text_batch: texts embedded, or pairs judged, at once.

    Source: InternVideo2 (arXiv:2403.15377), multi_modality tasks/retrieval_utils.py.
    """

    def __init__(
        self,
        given: Given,
        *,
        examples: int,
        text: str,
        gallery: str,
        captions: str,
        same_text: bool,
        dual_softmax: bool,
        temperature: float,
        rerank: int,
        use_dsl_for_match: bool,
        text_batch: int,
    ):
        self.given, self.examples = given, examples
        self.text, self.gallery, self.captions = text, gallery, captions
        self.same_text = same_text
        self.temperature = temperature if dual_softmax else None
        self.candidates = rerank
        self.choose_by = temperature if use_dsl_for_match else None
        towers = towers_of(given, "retrieval", modality=gallery, match=rerank > 0)
        self.embedder = Embedder(towers, modality=gallery, text_batch=text_batch)
        self.judge = Judge(self.embedder, pairs=text_batch) if rerank else None

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        listed = texts_of(
            self.given, "retrieval", examples=self.examples, of="held_out", kind=self.text
        )
        videos = self.embedder.videos(params, self._batches())
        listed = [CAPTIONS[self.captions](texts) for texts in listed]
        videos = videos._replace(owner=without_texts(videos.owner, listed))
        shown = np.unique(videos.owner[videos.real])
        sentences = [text for i in shown for text in listed[i]]
        if not sentences:
            raise UserError(
                f"Retrieval needs videos that have {self.gallery} and texts of the kind {self.text!r}; got "
                "none. See bad_examples.jsonl, ask for another kind, or take it out of the recipe's evals."
            )
        texts = self.embedder.texts(params, sentences)
        if self.same_text:
            owners, of_examples = owners_by_text(listed, shown)
            videos = videos._replace(owner=of_examples[videos.owner[..., 0]])
        else:
            owners = np.repeat(shown, [len(listed[i]) for i in shown])
        texts = texts._replace(owner=np.where(texts.owner >= 0, owners[texts.owner], -1))
        both = self._both_ways(texts, videos, None)
        yield from self._measures(both, "")
        if self.temperature is not None:
            yield from self._measures(self._both_ways(texts, videos, self.temperature), "_dsl")
        if self.candidates:
            found = self.judge.rerank(
                params,
                self._batches(),
                (texts, videos),
                both,
                sentences,
                self.candidates,
                self.choose_by,
            )
            yield from self._measures(found, "_rerank")
        yield "chance_r1", ranking.chance(both[0])
        yield f"{self.gallery}_text_chance_r1", ranking.chance(both[1])
        yield "examples", float(len(both[1].above))
        yield "texts", float(len(both[0].above))

    def _batches(self):
        return self.given.batches(self.examples, taught=False)

    def _both_ways(self, texts: Rows, videos: Rows, dual_softmax) -> tuple[Standing, Standing]:
        rank = functools.partial(ranking.rank, dual_softmax=dual_softmax)
        return rank(texts, videos), rank(videos, texts)

    def _measures(self, both: tuple[Standing, Standing], end: str):
        names = f"text_{self.gallery}", f"{self.gallery}_text"
        for name, standing in zip(names, both):
            for key, value in ranking.measures(standing).items():
                yield f"{name}_{key}{end}", value


def make(
    given: Given,
    *,
    examples: int,
    text: str = "video",
    gallery: str = "video",
    captions: str = "all",
    same_text: bool = False,
    dual_softmax: bool = False,
    temperature: float = 1.0,
    rerank: int = 0,
    use_dsl_for_match: bool = False,
    text_batch: int = 256,
) -> Evaluator:
    """The evaluator; arguments as of `Evaluator`."""
    if captions not in CAPTIONS:
        raise UserError(
            f"captions must be one of {', '.join(CAPTIONS)}; got captions={captions!r}."
            f"{nearest(captions, CAPTIONS)}"
        )
    if temperature <= 0 or rerank < 0:
        raise UserError(
            "temperature must be above 0 and rerank at least 0; got "
            f"temperature={temperature}, rerank={rerank}."
        )
    if rerank and gallery != "video":
        raise UserError(
            f"Only pairs of text and video can be judged; got rerank={rerank} with gallery={gallery!r}. "
            "Set rerank=0."
        )
    return Evaluator(
        given,
        examples=examples,
        text=text,
        gallery=gallery,
        captions=captions,
        same_text=same_text,
        dual_softmax=dual_softmax,
        temperature=temperature,
        rerank=rerank,
        use_dsl_for_match=use_dsl_for_match,
        text_batch=text_batch,
    )


make_audio = functools.partial(make, text="audio", gallery="audio")
make_audio_video = functools.partial(make, text="audio_video", gallery="audio_video")
make_speech = functools.partial(make, text="speech")  # transcripts find videos


def without_texts(owner: np.ndarray, listed: Sequence[tuple[str, ...]]) -> np.ndarray:
    """`owner` with -1 for examples that have no text."""
    has = np.array([bool(texts) for texts in listed])
    known = (owner >= 0) & (owner < len(has))
    return np.where(known & has[np.where(known, owner, 0)], owner, -1)


def owners_by_text(
    listed: Sequence[tuple[str, ...]], shown: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Owners where equal texts belong to the same examples: a number for each different text.

    Returns:
        Of the texts of `shown` one after the other, int32 [texts]; of the examples, int32 [examples + 1, C],
        of which the last has none.
    """
    number: dict[str, int] = {}
    owners = [[number.setdefault(text, len(number)) for text in listed[i]] for i in shown]
    table = np.full((len(listed) + 1, max(map(len, owners))), -1, np.int32)
    for i, own in zip(shown, owners):
        table[i, : len(own)] = own
    return np.concatenate(owners).astype(np.int32), table


class Judge:
    """Scores of pairs of text and video by the fusion layers.

    Args:
        pairs: judged at once.
    """

    def __init__(self, embedder: Embedder, *, pairs: int):
        towers = embedder.towers
        self.embedder, self.pairs = embedder, pairs
        self._tokens = jax.jit(lambda params, batch: towers.video(params, batch)["tokens"])

        def match(params, ids, valid, tokens, row):
            words = towers.text(params, ids, valid)["tokens"]
            return towers.match(params, words, valid, tokens[row]).astype(jnp.float32)

        self._match = jax.jit(match)

    def scores(
        self, params: Any, batches: Iterator[Mapping], sentences: Sequence[str], pairs: np.ndarray
    ) -> np.ndarray:
        """The logit of each pair, float32 [pairs].

        Args:
            batches: of the videos, once more.
            pairs: int [pairs, 2], ascending: a row of all batches one after the other, a sentence.
        """
        found, first = [np.zeros(0, np.float32)], 0
        rows = whole_rows(self.pairs)
        for batch in batches:
            size = len(batch["valid"])
            start, end = np.searchsorted(pairs[:, 0], (first, first + size))
            tokens = self._tokens(params, batch) if end > start else None
            for at in range(start, end, rows):
                part = pairs[at : min(at + rows, end)]
                found.append(self._judge(params, tokens, part - (first, 0), sentences, rows))
            first += size
        return np.concatenate(found)

    def _judge(self, params, tokens, pairs, sentences, rows) -> np.ndarray:
        ids, valid = self.embedder.tokens([sentences[i] for i in pairs[:, 1]], rows)
        row = np.pad(pairs[:, 0], (0, rows - len(pairs))).astype(np.int32)
        row = place({"row": lambda mine: row[mine]}, rows)["row"]
        return to_host(self._match(params, ids, valid, tokens, row))[: len(pairs)]

    def rerank(
        self,
        params: Any,
        batches: Iterator[Mapping],
        rows: tuple[Rows, Rows],
        before: tuple[Standing, Standing],
        sentences: Sequence[str],
        k: int,
        dual_softmax: float | None,
    ) -> tuple[Standing, Standing]:
        """Standings of texts among videos, and of videos among texts, by the scores of the k best pairs.

        Args:
            rows: texts, and videos.
            before: their standings by cosine.
            dual_softmax: as of `ranking.rank`; how candidates are chosen.
        """
        ways = []
        for at, standing in enumerate(before):
            top = min(k, int(standing.items[0]))
            asked = rows[at].real.reshape(-1)
            chosen = ranking.top(rows[at], rows[1 - at], top, dual_softmax=dual_softmax)[asked]
            asked = np.broadcast_to(np.flatnonzero(asked)[:, None], chosen.shape)
            video, text = (chosen, asked) if at == 0 else (asked, chosen)
            ways.append(np.stack([video, text], axis=-1))
        # One list of all pairs: those that both ways ask for are judged once.
        every = np.concatenate([way.reshape(-1, 2) for way in ways])
        pairs, place_of = np.unique(every, axis=0, return_inverse=True)
        scores = self.scores(params, batches, sentences, pairs)[place_of.reshape(-1)]
        parts = np.split(scores, [ways[0][..., 0].size])
        text, video = (x.owner.reshape(-1, x.owner.shape[-1]) for x in rows)
        return tuple(
            ranking.rerank_standings(
                part.reshape(way.shape[:2]),
                ranking.overlap(text[way[..., 1]], video[way[..., 0]]),
                all_right=standing.right,
                items=int(standing.items[0]),
            )
            for way, part, standing in zip(ways, parts, before)
        )
