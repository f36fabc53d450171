"""Text towers by name and size."""

import dataclasses
import functools
from typing import Any

from invideo_jax.errors import UserError
from invideo_jax.models import sizes
from invideo_jax.models.llama import LlamaText
from invideo_jax.models.text_encoder import Bert, ClipText
from invideo_jax.registry import nearest

TextTower = Bert | ClipText | LlamaText

# name -> (model, its sizes). MobileCLIP's is CLIP's with another activation.
KINDS = {
    "bert": (Bert, sizes.BERT),
    "clip": (ClipText, sizes.CLIP_TEXT),
    "mobileclip": (functools.partial(ClipText, activation="gelu"), sizes.CLIP_TEXT),
    "llama": (LlamaText, sizes.LLAMA),
}


# Kinds that look at the id of padding. The others are told which places are real, and never look at the rest: their
# published tokenizers pad with one id or another.
READ_PADDING = ("bert",)


def has_pad(kind: str) -> bool:
    """Whether towers of a kind have the attribute `pad`."""
    return kind in KINDS and hasattr(KINDS[kind][0], "pad")


def build(kind: str, size: str, /, *, dropout: float = 0.0, **overrides: Any) -> TextTower:
    """The tower of a row of `sizes`.

    Args:
        kind: a name of `KINDS`.
        dropout: of BERT, and of the input of LLaMA's LoRA; CLIP's towers have none.
        overrides: attributes of the model.

    Raises:
        UserError: unknown kind or size, or dropout of a tower that has none. TypeError: unknown attribute.
    """
    if kind not in KINDS:
        raise UserError(
            f"The text tower must be of a known kind; got {kind!r}.{nearest(kind, KINDS)}"
        )
    model, table = KINDS[kind]
    row = dataclasses.asdict(sizes.row(table, size))
    made = {name: value for name, value in row.items() if name != "params"} | overrides
    if kind == "bert":
        made |= dict(dropout=dropout, attention_dropout=dropout)
    elif kind == "llama":
        made |= dict(dropout=dropout)
    elif dropout:
        raise UserError(
            f"The text tower {kind!r} has no dropout; got dropout={dropout}. Set it to 0."
        )
    return model(**made)
