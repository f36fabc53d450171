"""Texts that other people wrote, made tidy."""

import math
import re
import unicodedata
from typing import Any

MAX_TEXT = 20_000  # characters kept of one caption or transcript; longer is a mistake in the list
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean_text(value: Any) -> str:
    """One caption or transcript as tidy text: NFC, no control or zero-width characters, one line.

    Lone surrogates (bytes that were not UTF-8) become U+FFFD; None and NaN become ''.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = _SURROGATES.sub("\ufffd", str(value)[: 4 * MAX_TEXT])
    text = unicodedata.normalize("NFC", text)
    kept = (" " if c.isspace() else c for c in text if c.isspace() or _printable(c))
    return " ".join("".join(kept).split())[:MAX_TEXT]


def _printable(character: str) -> bool:
    # Joiners U+200C/U+200D carry meaning in Persian, Hindi and emoji; the other Cf are invisible.
    category = unicodedata.category(character)
    return category not in ("Cc", "Cf", "Cs") or character in "\u200c\u200d"
