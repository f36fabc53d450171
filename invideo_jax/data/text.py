"""Texts as numbers: one interface over SentencePiece, WordPiece and BPE files.

    tok = open_tokenizer("captions.model")                       # or bert/vocab.txt, clip/, tokenizer.json, ...
    ids, valid = tok(["a red ball bounces", ""], length=32)      # int32 [B, L], bool [B, L]

A text is `first` token, pieces, `last` token, cut so that the last token stays; the rest is `pad` and not valid. A text
without a word (empty, spaces, only invisible characters) has no valid place at all. Special tokens written in a text are
plain text in every format that allows it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from invideo_jax.data.text_files import (
    BYTES,
    NAMES,
    SETTINGS,
    Backend,
    find_files,
    load,
    read_config,
)
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

ROLES = ("first", "last", "pad", "mask")
OPTIONS = (*ROLES, "prefix", "lowercase")
_SURROGATES = re.compile("[\ud800-\udfff]")
_MARGIN = 32  # tokens that a cut inside a word may change before it
_LOADED: dict[str, Backend] = {}  # by digest; one of each in a process
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _Settings:
    """All but the files' contents that ids depend on.

    Attributes:
        kind: see `text_files.find_files`.
        first, last, pad, mask: ids; None: no such token.
        prefix: what is written before every text.
        lowercase: of WordPiece; None: as the vocabulary is written.
    """

    kind: str
    first: int | None = None
    last: int | None = None
    pad: int = 0
    mask: int | None = None
    prefix: str = ""
    lowercase: bool | None = None


class Tokenizer:
    """A vocabulary with its special tokens. Made by `open_tokenizer`.

    Pickles as paths; the files are read once in each process, when first needed. Any number of threads may use one.

    Attributes:
        vocabulary: ids are in [0, vocabulary).
        pad, first, last, mask: ids; None: the tokenizer has no such token.
        digest: hash of the files and of all settings that ids depend on.
    """

    def __init__(self, files: Sequence[pathlib.Path], settings: _Settings):
        self.files = tuple(pathlib.Path(file).absolute() for file in files)
        self.settings = settings
        self.pad, self.mask = settings.pad, settings.mask
        self.first, self.last = settings.first, settings.last
        contents = [file.read_bytes() for file in self.files]
        self.digest = _digest(contents, settings)
        self.vocabulary = self._backend(contents).vocabulary

    @property
    def name(self) -> str:
        """Its first file, for messages."""
        return str(self.files[0]) if self.files else self.settings.kind

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocabulary={self.vocabulary}, digest={self.digest[:12]})"

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of texts.

        Args:
            texts: B texts of any script and length.
            length: L, places of a text, special tokens included.

        Returns:
            (ids int32 [B, L], valid bool [B, L]); all of a row is False where the text has no word.

        Raises:
            UserError: no place for a word.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a sequence of texts; got one: {texts[:50]!r}")
        around = (self.first is not None) + (self.last is not None)
        if length <= around:
            raise UserError(
                f"A text must have at least {around + 1} places, {around} of them for the first and last token; "
                f"got length={length}. Give more."
            )
        ids = np.full((len(texts), length), self.pad, np.int32)
        valid = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            found = self.encode(text, length - around)
            if found:
                whole = [*_one(self.first), *found, *_one(self.last)]
                ids[row, : len(whole)] = whole
                valid[row, : len(whole)] = True
        return ids, valid

    def encode(self, text: str, room: int | None = None) -> list[int]:
        """Ids of one text (the prefix before it), without first and last token; the first `room` of them."""
        text = _SURROGATES.sub("\ufffd", text)
        if not text or text.isspace():
            return []
        backend, text = self._backend(), self.settings.prefix + text
        if room is None:
            return backend.encode(text)
        # Only as much is read as can matter: 10,000 words cost what the first of them cost.
        reach = 16 * room + 256
        while reach < len(text):
            head = text[:reach]
            space = head.rfind(" ", reach // 2)
            found = backend.encode(head[:space] if space > 0 else head)
            if len(found) >= room + _MARGIN:
                return found[:room]
            reach *= 4
        return backend.encode(text)[:room]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, up to the last token or the padding."""
        return self._backend().decode(self._content(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id as it stands in the vocabulary."""
        return self._backend().pieces(ids)

    def same_words(self, other: "Tokenizer") -> bool:
        """Whether both give a text the same ids, whatever prefix each puts before it."""
        bare = lambda t: _digest(t._contents(), dataclasses.replace(t.settings, prefix=""))
        return bare(self) == bare(other)

    def unknown_share(self, encoded: Sequence[Sequence[int]]) -> float:
        """The share of ids that stand for something the vocabulary doesn't know."""
        unknown = self._backend().unknown
        ids = [i for row in encoded for i in row]
        return sum(i == unknown for i in ids) / max(len(ids), 1)

    def save(self, folder: str | os.PathLike) -> None:
        """Copies the files and the settings into a folder that `open_tokenizer` reads."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents = self._contents()
        for file, content in zip(self.files, contents):
            _write(folder / file.name, content)
        known = {"format": 1, "files": [file.name for file in self.files], "digest": self.digest}
        text = json.dumps(known | dataclasses.asdict(self.settings), indent=1)
        _write(folder / SETTINGS, text.encode())

    def _content(self, ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        ids = ids[1:] if ids and ids[0] == self.first else ids
        if self.last is not None and self.last in ids:
            return ids[: ids.index(self.last)]
        while ids and ids[-1] == self.pad:
            ids.pop()
        return ids

    def _contents(self) -> list[bytes]:
        contents = [file.read_bytes() for file in self.files]
        if _digest(contents, self.settings) != self.digest:
            raise UserError(
                f"The files of a tokenizer must stay as they are during a run; {self.name} changed."
            )
        return contents

    def _backend(self, contents: Sequence[bytes] | None = None) -> Backend:
        found = _LOADED.get(self.digest)
        if found is None:
            with _LOCK:
                found = _LOADED.get(self.digest)
                if found is None:
                    settings, where = self.settings, self.name
                    contents = contents or self._contents()
                    found = load(settings.kind, contents, settings.lowercase, where)
                    _LOADED[self.digest] = found
        return found


def open_tokenizer(spec: str | os.PathLike, options: Mapping[str, Any] | None = None) -> Tokenizer:
    """Opens a tokenizer.

    Args:
        spec: a file: x.model (SentencePiece), tokenizer.json, vocab.txt (WordPiece), vocab.json with merges.txt beside it,
            CLIP's bpe_simple_vocab_16e6.txt.gz; 'bytes', which needs no file; or a folder with one of them, as published or as `Tokenizer.save` left it.
        options: what the files don't say or say otherwise than wanted: `first`, `last`, `pad`, `mask`: the token that
            stands for it, by name, None for none; `prefix`: written before every text ('summarize:'); `lowercase` (of
            vocab.txt).

    Raises:
        UserError: nothing there, damaged files, an unknown option or token, or a library that isn't installed.
    """
    options = dict(options or {})
    for name in options:
        if name not in OPTIONS:
            raise UserError(f'Unknown option "{name}" of a tokenizer.{nearest(name, OPTIONS)}')
    spec = os.fspath(spec)
    saved = pathlib.Path(spec) / SETTINGS
    if saved.is_file():
        files, settings = _read_saved(saved)
        if "lowercase" in options:
            settings = dataclasses.replace(settings, lowercase=options["lowercase"])
        backend = _fresh_backend(files, settings)
        found: dict[str, Any] = {role: getattr(settings, role) for role in ROLES}
        prefix = settings.prefix
    else:
        kind, files = find_files(spec)
        config = {} if kind in ("sentencepiece", BYTES) else read_config(files[0].parent)
        cased = options.get("lowercase", config.get("do_lower_case"))
        settings = _Settings(kind, lowercase=cased if kind == "wordpiece" else None)
        backend = _fresh_backend(files, settings)
        found, prefix = _find_specials(backend, config), ""
    if options.get("lowercase") is not None and settings.kind != "wordpiece":
        raise UserError(
            f"lowercase is an option of vocab.txt alone; {spec} says itself how it reads capitals. Leave it out."
        )
    for role in ROLES:
        if role in options:
            found[role] = _by_name(backend, role, options[role], spec)
    found["pad"] = found["pad"] or 0
    prefix = options.get("prefix", prefix)
    return Tokenizer(files, dataclasses.replace(settings, **found, prefix=prefix))


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int, unused: int = 0) -> None:
    """Stops where a tokenizer and a table of word embeddings don't belong together.

    Args:
        vocabulary: rows of the table.
        unused: rows at its end that may stand for no token (tables padded to a round number; a token that
            one form of the same tokenizer lists and another doesn't).

    Raises:
        UserError: another number of rows: ids would read the wrong row, or none.
    """
    if not vocabulary - unused <= tokenizer.vocabulary <= vocabulary:
        spare = f", at most {unused} of them unused" if unused else ""
        raise UserError(
            f"The vocabulary of a tokenizer must be that of the text encoder's weights; {tokenizer.name} has "
            f"{tokenizer.vocabulary} tokens, the table of the weights {vocabulary} rows{spare}. Use the tokenizer that "
            f"the weights were trained with, or a text encoder with vocabulary={tokenizer.vocabulary + unused}."
        )


def _fresh_backend(files: Sequence[pathlib.Path], settings: _Settings) -> Backend:
    contents = [file.read_bytes() for file in files]
    where = str(files[0]) if files else settings.kind
    return load(settings.kind, contents, settings.lowercase, where)


def _read_saved(path: pathlib.Path) -> tuple[list[pathlib.Path], _Settings]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        files = [path.with_name(pathlib.Path(name).name) for name in known.pop("files")]
        digest, _ = known.pop("digest"), known.pop("format")
        settings = _Settings(**known)
        whole = _digest([file.read_bytes() for file in files], settings) == digest
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} must be as Tokenizer.save wrote it; {error}. Copy the folder again."
        ) from error
    if not whole:
        raise UserError(
            f"The files of a saved tokenizer must be those it was saved with; {path.parent} holds others "
            f"({', '.join(file.name for file in files)}). Copy the folder again."
        )
    return files, settings


def _find_specials(backend: Backend, config: Mapping[str, Any]) -> dict[str, int | None]:
    """Ids by role: as the file itself says, else its config, else a usual name."""
    keys = {"first": ("cls_token", "bos_token"), "last": ("sep_token", "eos_token")}
    keys |= {"pad": ("pad_token",), "mask": ("mask_token",)}
    own, found = backend.specials(), {}
    for role in ROLES:
        if role in own:
            found[role] = own[role]
            continue
        said = [config.get(key) for key in keys[role]]
        said = [s.get("content") if isinstance(s, dict) else s for s in said]
        names = [name for name in (*said, *NAMES[role]) if isinstance(name, str)]
        ids = (backend.find(name) for name in names)
        found[role] = next((i for i in ids if i is not None), None)
    return found


def _by_name(backend: Backend, role: str, name: str | None, spec: str) -> int | None:
    if name is None:
        return None
    number = backend.find(name)
    if number is None:
        raise UserError(
            f'The option {role} must name a token of {spec}; "{name}" is none of its {backend.vocabulary}.'
            + nearest(name, backend.names())
        )
    return number


def _digest(contents: Sequence[bytes], settings: _Settings) -> str:
    state = hashlib.sha256()
    for content in contents:
        state.update(len(content).to_bytes(8, "little") + content)
    state.update(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    return state.hexdigest()


def _write(path: pathlib.Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _one(number: int | None) -> list[int]:
    return [] if number is None else [number]
