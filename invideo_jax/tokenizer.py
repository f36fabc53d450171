"""A tokenizer from your own captions: `python -m invideo_jax.tokenizer --data=SPEC --output=FILE.model`.

Learns a SentencePiece vocabulary from the texts of any source that training takes (a manifest, packed shards, the built-in
dataset, several joined by ;). The same command gives the same file. What a tokenizer makes of a text:

    python -m invideo_jax.tokenizer --show=FILE "a red ball bounces"
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from invideo_jax import command_line
from invideo_jax.data.captions import KINDS, texts_of
from invideo_jax.data.decode import BadVideo
from invideo_jax.data.pieces import train_pieces
from invideo_jax.data.sources import NoSuchSplit, Source, open_source, parse_mixture
from invideo_jax.data.text import Tokenizer, open_tokenizer
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

MOST = 2_000_000  # examples read of one source, evenly spread
_MEASURED = 20_000  # texts that the printed figures are of


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    with command_line.errors_for_people(OSError):
        given = _arguments(sys.argv[1:] if argv is None else argv)
        if given.show:
            return _show(given.show, given.text)
        texts, notes = collect(
            given.data,
            kinds=_kinds(given.kinds),
            split=given.split,
            roots=[root for root in given.roots.split(",") if root],
        )
        for note in notes:
            print(f"note: {note}")
        model = train_pieces(
            texts, given.vocabulary, lowercase=given.lowercase, coverage=given.coverage
        )
        _write(pathlib.Path(given.output), model)
        tokenizer = open_tokenizer(given.output)
        print(f"{given.output}: {tokenizer.vocabulary:,} tokens from {len(texts):,} texts")
        print(describe(tokenizer, texts))
        print(f"in a recipe: {settings(given.output, tokenizer)}")
    return 0


def settings(path: str, tokenizer: Tokenizer) -> str:
    """What a recipe must say of it, as words for the training command; STAGE stands for its stage."""
    of = dict(tokenizer=path, vocabulary=tokenizer.vocabulary)
    of |= dict(pad=tokenizer.pad, first=tokenizer.first, mask=tokenizer.mask)
    return " ".join(f"--config.stages.STAGE.text.{name}={value}" for name, value in of.items())


def collect(
    spec: str, *, kinds: Sequence[str], split: str = "train", roots: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """All texts of some kinds of a source or of several.

    Args:
        spec: as `data.train` of a recipe.
        split: of sources that have splits.

    Returns:
        (texts in the order of the examples, what was left out).

    Raises:
        UserError: no text of these kinds.
    """
    texts: list[str] = []
    counts, notes = dict.fromkeys(KINDS, 0), []
    for part, _ in parse_mixture(spec):
        source = _open(part, split, roots)
        notes += source.notes
        if len(source) > MOST:
            notes.append(f"{part}: {MOST:,} of {len(source):,} examples read, evenly spread")
        bad = 0
        for found in _examples(source):
            bad += found is None
            for kind, ones in (found or {}).items():
                counts[kind] += len(ones)
                texts += ones if kind in kinds else ()
        if bad:
            notes.append(f"{part}: {bad:,} of {len(source):,} examples could not be read: left out")
    if not texts:
        held = ", ".join(f"{count:,} of {kind}" for kind, count in counts.items() if count)
        raise UserError(
            f"A tokenizer must be trained on at least one text; --data={spec} has none of the kinds "
            f"{','.join(kinds)}" + (f", but {held}. Say --kinds." if held else ", nor of others.")
        )
    return texts, notes


def describe(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """How a tokenizer fits texts: what it knows of them, tokens a text, one as an example; several lines."""
    sample = [
        texts[i * len(texts) // min(len(texts), _MEASURED)]
        for i in range(min(len(texts), _MEASURED))
    ]
    encoded = [tokenizer.encode(text) for text in sample]
    around = (tokenizer.first is not None) + (tokenizer.last is not None)
    lengths = np.array([len(ids) + around for ids in encoded])
    known = 1 - tokenizer.unknown_share(encoded)
    return (
        f"known: {known:.2%} of the tokens of these texts\n"
        f"tokens a text, first and last included: {lengths.mean():.1f} on average, {np.percentile(lengths, 99):.0f} "
        f"or fewer in 99 %, {lengths.max()} at most\n"
        f"example: {sample[0][:200]}\n         {' '.join(tokenizer.pieces(encoded[0][:60]))}"
    )


def _open(spec: str, split: str, roots: Sequence[str]) -> Source:
    """A source; whole where it tells no such split apart."""
    try:
        return open_source(spec, split=split, roots=roots, roots_option="--roots")
    except NoSuchSplit:
        if split != "train":
            raise
        source = open_source(spec, roots=roots, roots_option="--roots")
        source.notes = (*source.notes, f'{spec} has no split "train": all of it is read')
        return source


def _examples(source: Source) -> Iterator[dict[str, tuple[str, ...]] | None]:
    count = min(len(source), MOST)
    for number in range(count):
        try:
            yield texts_of(source[number * len(source) // count])
        except BadVideo:
            yield None


def _show(spec: str, texts: Sequence[str]) -> int:
    tokenizer = open_tokenizer(spec)
    print(tokenizer)
    for text in texts:
        ids = tokenizer.encode(text)
        print(f"{text!r}: {len(ids)} tokens")
        for number, piece in zip(ids, tokenizer.pieces(ids)):
            print(f"  {number:>6}  {piece}")
    return 0


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(
                f'Unknown kind of text "{kind}" in --kinds={text}.{nearest(kind, KINDS)}'
            )
    if not kinds:
        raise UserError(f"--kinds must name at least one of {', '.join(KINDS)}; got none.")
    return kinds


def _write(path: pathlib.Path, model: bytes) -> None:
    """Puts the file there whole; one that a run may use is not replaced by another."""
    if path.exists() and path.read_bytes() != model:
        raise UserError(
            f"--output must be a new file; {path} holds another tokenizer. Give another name, or delete it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(model)
    part.replace(path)


def _arguments(argv: list[str]):
    parser = command_line.Parser(
        prog="python -m invideo_jax.tokenizer", description=__doc__, add_help=True
    )
    parser.add_argument("--data", metavar="SPEC", help="a source of captions, as data.train")
    parser.add_argument("--output", metavar="FILE.model", help="the tokenizer to write")
    parser.add_argument(
        "--vocabulary", type=int, metavar="N", help="tokens (default: 8000, or what the texts give)"
    )
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"texts to learn from: {', '.join(KINDS)}"
    )
    parser.add_argument("--lowercase", action="store_true", help="read capitals as small letters")
    parser.add_argument(
        "--coverage", type=float, default=1.0, help="share of characters kept; 0.9995 for Chinese"
    )
    parser.add_argument("--split", default="train", help="of sources that have splits")
    parser.add_argument("--roots", default="", help="more folders that files may lie in, by commas")
    parser.add_argument("--show", metavar="FILE", help="print what this tokenizer makes of TEXT")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="for --show")
    given = parser.parse_args(argv)
    if given.show and not given.text:
        parser.error('--show needs a text: --show=FILE "a red ball bounces"')
    if not given.show and not (given.data and given.output):
        parser.error("--data and --output are required (or --show and a text)")
    if not given.show and given.text:
        parser.error(f"unrecognized arguments: {' '.join(given.text)}")
    if given.output and not given.output.endswith(".model"):
        parser.error(f"--output must end in .model; got --output={given.output}")
    return given


if __name__ == "__main__":
    sys.exit(main())
