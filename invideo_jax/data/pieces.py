"""A SentencePiece vocabulary learned from captions."""

import io
import re
from collections.abc import Iterable

from invideo_jax.data.clean import clean_text
from invideo_jax.errors import UserError

VOCABULARY = 8000  # where none is asked for and the captions suffice
SMALLEST = 16
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[CLS]", "eos": "[SEP]"}  # ids 0, 1, 2, 3
MASK = "[MASK]"  # id 4
_SENTENCE = 2000  # characters given to the trainer at once


def train_pieces(
    texts: Iterable[str],
    vocabulary: int | None = None,
    *,
    lowercase: bool = False,
    coverage: float = 1.0,
) -> bytes:
    """Learns pieces of words from texts; the same texts in the same order give the same bytes.

    Args:
        vocabulary: tokens, special ones included. None: 8,000, or as many as the texts give.
        lowercase: capitals are read as small letters.
        coverage: share of all characters of the texts that get tokens of their own, the frequent ones first; the others
            become [UNK].

    Returns:
        A `.model` file: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4. None of them can be written in a text.

    Raises:
        UserError: no text, or a vocabulary that the texts cannot fill or that cannot hold their characters.
    """
    if vocabulary is not None and vocabulary < SMALLEST:
        raise UserError(
            f"A vocabulary must hold {SMALLEST} tokens or more; got vocabulary={vocabulary}."
        )
    if not 0.9 <= coverage <= 1.0:
        raise UserError(
            f"coverage must be in [0.9, 1]; got coverage={coverage}. 0.9995 suits Chinese."
        )
    sentences = [part for text in texts for part in _split(clean_text(text))]
    if not sentences:
        raise UserError("A tokenizer must be trained on at least one caption; got none.")
    try:
        return _train(sentences, vocabulary or VOCABULARY, lowercase, coverage)
    except RuntimeError as error:
        limit = re.search(r"set it to a value <= (\d+)", str(error))
        least = re.search(r"smaller than required_chars\.? *\d+ vs (\d+)", str(error))
        if limit and vocabulary is None:
            return _train(sentences, int(limit[1]), lowercase, coverage)
        if limit:
            raise UserError(
                f"A vocabulary must be filled by its captions; got vocabulary={vocabulary}, and these "
                f"{len(sentences):,} texts give {limit[1]} tokens at most. Ask for {limit[1]} or fewer, or give more captions."
            ) from None
        if least:
            raise UserError(
                f"A vocabulary must hold every character of its captions; got vocabulary={vocabulary or VOCABULARY}, and "
                f"they have so many that {least[1]} tokens are needed. Ask for more, or for less coverage (0.9995)."
            ) from None
        raise UserError(
            f"SentencePiece could not be trained on these {len(sentences):,} texts: {error}"
        ) from None


def _split(text: str) -> Iterable[str]:
    """A text in parts that the trainer takes: it leaves longer ones out without a word."""
    while len(text) > _SENTENCE:
        cut = text.rfind(" ", 1, _SENTENCE)
        cut = cut if cut > 0 else _SENTENCE
        yield text[:cut]
        text = text[cut:].lstrip()
    if text:
        yield text


def _train(sentences: list[str], vocabulary: int, lowercase: bool, coverage: float) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        # Frequent words stay whole: of the built-in dataset's captions 500 such tokens make 12 a caption, where the unigram
        # model ends at 257 tokens, 17 a caption, and "blue" in two.
        model_type="bpe",
        vocab_size=vocabulary,
        character_coverage=coverage,
        normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
        num_threads=1,  # sums of several threads differ in their last digits
        max_sentence_length=8 * _SENTENCE,
        minloglevel=2,
        control_symbols=[MASK],
        **{f"{role}_id": number for number, role in enumerate(SPECIAL)},
        **{f"{role}_piece": piece for role, piece in SPECIAL.items()},
    )
    return model.getvalue()
