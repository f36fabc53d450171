"""Name -> object, imported when first asked for; an unknown name lists the nearest ones."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, names: Iterable[str]) -> str:
    """Says which known names look like `name`, as the tail of an error message.

    Returns:
        ' Did you mean "b"?' for one or more near names, else ' Known: a, b, c.'.
    """
    names = sorted(str(n) for n in names)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    if close:
        return " Did you mean " + " or ".join(f'"{n}"' for n in close) + "?"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f" Known: {', '.join(names[:20])}{more}." if names else " None is known."


class Registry:
    """A table of 'module:attribute' strings, looked up by a short name.

    Args:
        kind: what the entries are, for error messages ('objective', 'source', ...).
        entries: short name -> 'package.module:attribute'.
    """

    def __init__(self, kind: str, entries: dict[str, str]):
        self.kind = kind
        self.entries = dict(entries)

    def __iter__(self):
        return iter(sorted(self.entries))

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def register(self, name: str, target: str) -> None:
        """Adds one entry; a taken name is an error."""
        if name in self.entries:
            raise ValueError(
                f'{self.kind} "{name}" is taken by {self.entries[name]}; pick another name.'
            )
        self.entries[name] = target

    def get(self, name: str) -> Any:
        """Imports and returns the object called `name`.

        Raises:
            ValueError: unknown name; the message lists the nearest ones.
        """
        if name not in self.entries:
            raise ValueError(f'Unknown {self.kind} "{name}".{nearest(name, self.entries)}')
        module, attribute = self.entries[name].split(":")
        return getattr(importlib.import_module(module), attribute)
