"""Rows and layouts: what the tables of the families are made of."""

import dataclasses
from collections.abc import Container, Iterable


@dataclasses.dataclass(frozen=True)
class Row:
    """One PyTorch key, or one key of each block.

    Attributes:
        theirs: key; `{i}` is the number of a block, whose parameters we stack along the first axis.
        ours: paths of the parameters that it holds, one after the other along its first axis.
        turn: how an array is laid out: a name in `from_torch.TURNS`.
        optional: may be absent on both sides (bias, branch factor, last norm that a model lacks).
        after: path of a parameter of another stack: the blocks are numbered on from its last one.
        tied: holds an array that another key (or, with `{i}`, every block) also holds. Written as a
            copy; read, it may be absent, and must be equal.
        buffer: name in `from_torch.BUFFERS` of an array that is no parameter. `ours` then names the
            parameter whose shape gives the buffer's, and whose absence its.
        beside: path of the parameter whose absence is that of an optional row; '': the first of `ours`.
    """

    theirs: str
    ours: tuple[str, ...]
    turn: str = "copy"
    optional: bool = False
    after: str = ""
    tied: bool = False
    buffer: str = ""
    beside: str = ""

    def fits(self, paths: Container[str]) -> bool:
        """Whether a model with these parameters has the key."""
        return not self.optional or (self.beside or self.ours[0]) in paths


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows in published order, and regular expressions that turn other spellings into theirs.

    Attributes:
        rows: as the published state dict lists them.
        aliases: (pattern, spelling) for `re.sub` on keys that are read.
        prefixes: the key has one of these in files of the same weights elsewhere; stripped.
        unused: patterns of keys that such files hold and this model has no use for.
    """

    rows: tuple[Row, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def norm(theirs: str, ours: str, *, bias: bool = True, optional: bool = False) -> list[Row]:
    """LayerNorm, or with bias=False RMSNorm."""
    rows = [Row(f"{theirs}.weight", (f"{ours}/scale",), optional=optional)]
    return rows + [Row(f"{theirs}.bias", (f"{ours}/bias",), optional=optional)] * bias


def linear(theirs: str, ours: str, *, bias: bool = True, optional: bool = False) -> list[Row]:
    """Linear layer."""
    rows = [Row(f"{theirs}.weight", (f"{ours}/kernel",), "linear", optional=optional)]
    return rows + [Row(f"{theirs}.bias", (f"{ours}/bias",), optional=optional)] * bias


def patches(theirs: str, ours: str) -> list[Row]:
    """Convolution that projects cubes."""
    return [
        Row(f"{theirs}.weight", (f"{ours}/kernel",), "conv"),
        Row(f"{theirs}.bias", (f"{ours}/bias",)),
    ]


def prefixed(rows: Iterable[Row], theirs: str, ours: str) -> list[Row]:
    """The rows of a model that is part of a larger one: prefixes for their keys and our paths."""
    return [
        dataclasses.replace(
            row,
            theirs=theirs + row.theirs,
            ours=tuple(ours + path for path in row.ours),
            after=row.after and ours + row.after,
            beside=row.beside and ours + row.beside,
        )
        for row in rows
    ]


def optional(rows: Iterable[Row]) -> list[Row]:
    """The same rows, each of which may be absent."""
    return [dataclasses.replace(row, optional=True) for row in rows]
