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

CAPTIONS = ("all", "first", "joined")


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
        dual_softmax: bool,
        temperature: float,
        rerank: int,
        use_dsl_for_match: bool,
        text_batch: int,
    ):
        self.given, self.examples = given, examples
        self.text, self.gallery, self.captions = text, gallery, captions
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
        videos = videos._replace(owner=without_texts(videos.owner, listed))
        sentences, owners = flat(listed, videos.owner, self.captions)
        if not sentences:
            raise UserError(
                f"Retrieval needs videos that have {self.gallery} and texts of the kind {self.text!r}; got "
                "none. See bad_examples.jsonl, ask for another kind, or take it out of the recipe's evals."
            )
        texts = self.embedder.texts(params, sentences)
        texts = texts._replace(owner=np.where(texts.owner >= 0, owners[texts.owner], -1))
        both = self._both_ways(texts, videos, None)
        yield from self._measures(both, "")
        if self.temperature is not None:
            yield from self._measures(self._both_ways(texts, videos, self.temperature), "_dsl")
        if self.candidates:
            found = self.judge.rerank(
                params, self._batches(), texts, videos, sentences, self.candidates, self.choose_by
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


def flat(
    listed: Sequence[tuple[str, ...]], owner: np.ndarray, captions: str
) -> tuple[list[str], np.ndarray]:
    """The texts of the examples that count, one after the other, and whose each is, int32."""
    cut = {"all": tuple, "first": lambda texts: texts[:1], "joined": lambda t: (" ".join(t),)}
    pairs = [(text, i) for i in sorted(set(owner[owner >= 0])) for text in cut[captions](listed[i])]
    return [text for text, _ in pairs], np.array([i for _, i in pairs], np.int32)


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
        self, params, batches, texts: Rows, videos: Rows, sentences, k: int, dual_softmax
    ) -> tuple[Standing, Standing]:
        """Standings of texts among videos, and of videos among texts, by the scores of the k best pairs."""
        flat_owner = texts.owner.reshape(-1), videos.owner.reshape(-1)
        counts = [owner >= 0 for owner in flat_owner]
        ways = []
        for queries, gallery, at in ((texts, videos, 0), (videos, texts, 1)):
            top = min(k, int(counts[1 - at].sum()))
            chosen = ranking.top(queries, gallery, top, dual_softmax=dual_softmax)[counts[at]]
            asked = np.broadcast_to(np.flatnonzero(counts[at])[:, None], chosen.shape)
            ways.append(np.stack([chosen, asked] if at == 0 else [asked, chosen], axis=-1))
        # One list of all pairs, of which those that both ways ask for are judged once.
        pairs, place_of = np.unique(
            np.concatenate([way.reshape(-1, 2) for way in ways]), axis=0, return_inverse=True
        )
        scores = self.scores(params, batches, sentences, pairs)[place_of.reshape(-1)]
        parts = np.split(scores, [ways[0][..., 0].size])
        return tuple(
            self._standing(way, part.reshape(way.shape[:2]), flat_owner, at)
            for at, (way, part) in enumerate(zip(ways, parts))
        )

    def _standing(self, way, match, flat_owner, at: int) -> Standing:
        text, video = flat_owner[0][way[..., 1]], flat_owner[1][way[..., 0]]
        asked, among = (flat_owner[i][flat_owner[i] >= 0] for i in (at, 1 - at))
        number = np.bincount(among, minlength=asked.max() + 1)
        return ranking.rerank_standings(
            match, text == video, all_right=number[asked], items=len(among)
        )
