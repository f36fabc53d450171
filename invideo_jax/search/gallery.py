"""Hits as one HTML file that needs nothing else: frames, scores, names and seconds."""

import dataclasses
from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #0f172a; --soft: #64748b; --page: #f8fafc; --card: #fff;
        --line: #e2e8f0; --bar: #2563eb; --track: #e2e8f0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --soft: #94a3b8; --page: #0b1120; --card: #111a2e; --line: #243049;
          --bar: #60a5fa; --track: #243049; } }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
       color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 40px 0 2px; padding-top: 20px; border-top: 1px solid var(--line);
     overflow-wrap: anywhere; }
p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
nav { margin: 12px 0 0; }
nav a { color: var(--bar); margin-right: 16px; }
ol { list-style: none; margin: 16px 0 0; padding: 0; display: grid; gap: 16px;
     grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
li img { display: block; width: 100%; height: auto; max-height: 220px; object-fit: contain;
         background: var(--track); }
.none { padding: 28px 14px; background: var(--track); color: var(--soft); text-align: center; }
.text { padding: 10px 14px 14px; }
.row { display: flex; gap: 12px; align-items: baseline; }
.rank { font-weight: 700; font-size: 17px; min-width: 1.6em; }
.name { font-weight: 600; overflow-wrap: anywhere; flex: 1; }
.time { color: var(--soft); white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { display: flex; gap: 12px; align-items: center; margin: 6px 0 0; }
.bar div { flex: 1; height: 8px; border-radius: 4px; background: var(--track); overflow: hidden; }
.bar div span { display: block; height: 100%; background: var(--bar); }
.bar b { font-weight: 600; font-variant-numeric: tabular-nums; }
.caption { margin-top: 6px; }
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """One hit as it is shown.

    Attributes:
        name: of the file. path: where it lies.
        start, end: seconds into the file.
        score: cosine of the embeddings. match: logit, or None.
        captions: of the manifest.
        picture: data URI of some frames; '' where the file cannot be read now.
    """

    name: str
    path: str
    start: float
    end: float
    score: float
    match: float | None = None
    captions: tuple[str, ...] = ()
    picture: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """One query as it is shown: its words, its hits, the mean score of all clips, how many these are."""

    title: str
    cards: tuple[Card, ...]
    mean: float
    clips: int


def clock(seconds: float) -> str:
    """'1:02:03.5' of seconds; hours only where there are any."""
    tenths = round(max(seconds, 0) * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes:02d}:{rest / 10:04.1f}" if hours else f"{minutes}:{rest / 10:04.1f}"
    return f"{hours}:{text}" if hours else text


def span(card: Card) -> str:
    """From when to when, for people."""
    return f"{clock(card.start)} – {clock(card.end)}"


def page(sections: Sequence[Section], *, about: str) -> str:
    """The whole page.

    Args:
        about: one line on the model and the videos.
    """
    first = escape(sections[0].title)
    title = first if len(sections) == 1 else f"{first} and {len(sections) - 1} more"
    links = "".join(
        f"<a href='#q{n}'>{escape(section.title)}</a>" for n, section in enumerate(sections, 1)
    )
    nav = f"<nav>{links}</nav>\n" if len(sections) > 1 else ""
    body = "\n".join(_section(section, number) for number, section in enumerate(sections, 1))
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{title}: search</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Search</h1>\n<p>{escape(about)}</p>\n{nav}{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section, number: int) -> str:
    judged = any(card.match is not None for card in section.cards)
    order = (
        "ordered by the match score; the bar is the cosine" if judged else "the bar is the cosine"
    )
    top = max((card.score for card in section.cards), default=0.0)
    note = (
        f"The best of {section.clips:,} clips; {order}, empty at the mean of all clips "
        f"({section.mean:.3f}), full at the best ({top:.3f})."
    )
    cards = "\n".join(
        _card(card, rank, _share(card.score, section.mean, top))
        for rank, card in enumerate(section.cards, 1)
    )
    return (
        f"<section id='q{number}'>\n<h2>{escape(section.title)}</h2>\n<p>{note}</p>\n"
        f"<ol>\n{cards}\n</ol>\n</section>"
    )


def _share(score: float, low: float, high: float) -> float:
    return min(max((score - low) / (high - low), 0.0), 1.0) if high > low else 1.0


def _card(card: Card, rank: int, share: float) -> str:
    seconds = span(card)
    alt = f"frames of {card.name}, {seconds}"
    shown = (
        f"<img src='{escape(card.picture)}' alt='{escape(alt)}' loading='lazy'>"
        if card.picture
        else "<div class='none'>the file cannot be read now</div>"
    )
    match = "" if card.match is None else f"<b>match {card.match:.2f}</b>"
    captions = "".join(f"<p class='caption'>{escape(text)}</p>" for text in card.captions)
    return (
        f"<li>{shown}<div class='text'>"
        f"<div class='row'><span class='rank'>{rank}</span>"
        f"<span class='name' title='{escape(card.path)}'>{escape(card.name)}</span>"
        f"<span class='time'>{seconds}</span></div>"
        f"<div class='bar'><div><span style='width:{100 * share:.1f}%'></span></div>"
        f"<b>{card.score:.3f}</b>{match}</div>{captions}</div></li>"
    )
