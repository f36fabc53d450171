"""What is said of a clip: the kinds of text of an example, and the rule that picks one.

    video         what is seen               (`captions` of an example)
    audio         what is heard              (`audio_captions`)
    audio_video   both                       (`audio_video_captions`)
    fused         all in one sentence        (`fused_captions`)
    speech        what is spoken             (`transcript`)

A rule names kinds: 'video'; 'fused|video' (the first there is); 'video+audio' (one of those there are, at random);
'fused|video+audio' (fused, or else one of the two).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

KEYS = {  # kind -> key of an example
    "video": "captions",
    "audio": "audio_captions",
    "audio_video": "audio_video_captions",
    "fused": "fused_captions",
    "speech": "transcript",
}
KINDS = tuple(KEYS)
NORMALISE = ("", "internvideo2")


def texts_of(example: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """All texts of an example by kind; () where it has none."""
    found = {}
    for kind, key in KEYS.items():
        texts = example.get(key) or ()
        texts = (texts,) if isinstance(texts, str) else texts
        found[kind] = tuple(text for text in texts if text.strip())
    return found


@functools.lru_cache(maxsize=256)
def parse_rule(rule: str) -> tuple[tuple[str, ...], ...]:
    """'fused|video+audio' -> (('fused',), ('video', 'audio')).

    Raises:
        UserError: an empty part, an unknown kind, or one that stands twice.
    """
    groups = tuple(
        tuple(kind.strip() for kind in group.split("+")) for group in str(rule).split("|")
    )
    seen: set[str] = set()
    for kind in (kind for group in groups for kind in group):
        if not kind:
            raise UserError(
                f"A rule of texts must be kinds joined by | and +, as 'fused|video+audio'; got {rule!r}, with "
                f"an empty part. Kinds: {', '.join(KINDS)}."
            )
        if kind not in KINDS:
            raise UserError(f'Unknown kind of text "{kind}" in {rule!r}.{nearest(kind, KINDS)}')
        if kind in seen:
            raise UserError(
                f"A kind of text must stand once in a rule; got {kind} twice in {rule!r}."
            )
        seen.add(kind)
    return groups


@dataclasses.dataclass(frozen=True)
class CaptionRule:
    """Which text of an example is used, and how it is written.

    Args:
        rule: see the top of this file.
        normalise: 'internvideo2': small letters, no punctuation, as the published models were trained; '': as it is.
        min_words: texts with fewer words are as good as absent.
        templates: sentences with {} for the text ('a video of {}.'); one at random, the first in evaluation.
        join: all texts of a kind as one, in their order (paragraph retrieval), not one of them.
    """

    rule: str = "video"
    normalise: str = ""
    min_words: int = 0
    templates: tuple[str, ...] = ()
    join: bool = False

    def __post_init__(self):
        parse_rule(self.rule)
        if self.normalise not in NORMALISE:
            raise UserError(
                f"normalise must be '' or 'internvideo2'; got normalise={self.normalise!r}."
                + nearest(self.normalise, NORMALISE[1:])
            )
        if self.min_words < 0:
            raise UserError(
                f"min_words must be 0 or more; got min_words={self.min_words}. 0: any text will do."
            )
        object.__setattr__(self, "templates", tuple(self.templates))
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(
                    f"A template must hold {{}} once, where the text goes; got {template!r}."
                )


def choose(
    example: Mapping[str, Any],
    rule: str | CaptionRule,
    rng: np.random.Generator | None = None,
    *,
    index: int = 0,
) -> str:
    """One text of an example by a rule; '' where it has none.

    Args:
        rng: random draws of this example in training. None: evaluation: of several kinds the first there is, of several
            texts number `index`.
    """
    rule = _as_rule(rule)
    for kinds in _present(example, rule):
        texts = kinds[0 if rng is None else int(rng.integers(len(kinds)))]
        if rng is None:
            return _dress(texts[index], rule) if index < len(texts) else ""
        return _dress(texts[int(rng.integers(len(texts)))], rule, rng)
    return ""


def all_texts(example: Mapping[str, Any], rule: str | CaptionRule) -> tuple[str, ...]:
    """Every text that `choose` gives in evaluation, in order: `choose(example, rule, index=i)` is number i."""
    rule = _as_rule(rule)
    for kinds in _present(example, rule):
        return tuple(_dress(text, rule) for text in kinds[0])
    return ()


def normalise_caption(text: str) -> str:
    """A caption as the published models saw it.

    Source: InternVideo2 multi_modality/dataset/utils.py.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = re.sub(r"[-/]", " ", text).replace("<person>", "person")
    return " ".join(text.split())


def written(text: str, normalise: str) -> str:
    """A text as it is tokenised; `normalise` as in `CaptionRule`."""
    return normalise_caption(text) if normalise else text


def _as_rule(rule: str | CaptionRule) -> CaptionRule:
    return rule if isinstance(rule, CaptionRule) else CaptionRule(rule)


def _present(example: Mapping[str, Any], rule: CaptionRule) -> Sequence[list[tuple[str, ...]]]:
    """The groups of the rule that have texts: of each the kinds that have, as their usable texts."""
    found = texts_of(example)
    groups = [[_usable(found[kind], rule) for kind in group] for group in parse_rule(rule.rule)]
    present = [[texts for texts in group if texts] for group in groups]
    return [group for group in present if group]


def _usable(texts: tuple[str, ...], rule: CaptionRule) -> tuple[str, ...]:
    if rule.join and texts:
        texts = (" ".join(texts),)
    texts = tuple(written(text, rule.normalise) for text in texts)
    return tuple(text for text in texts if text and len(text.split()) >= rule.min_words)


def _dress(text: str, rule: CaptionRule, rng: np.random.Generator | None = None) -> str:
    if not rule.templates:
        return text
    number = 0 if rng is None else int(rng.integers(len(rule.templates)))
    return rule.templates[number].replace("{}", text)
