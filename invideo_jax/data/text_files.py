"""The files that tokenizers are published in: which lie where, and how each kind is read."""

import gzip
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

SETTINGS = "tokenizer.settings.json"  # beside the files of a saved tokenizer
CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
_SHIFTED = "sentencepiece.bpe.model"  # XLM-R and its kin: the ids of the models are those of the file plus one
# What stands for a role, where the files don't say it; the first that the vocabulary has.
NAMES = {
    "first": ("[CLS]", "<s>", "<|startoftext|>", "<bos>"),
    "last": ("[SEP]", "</s>", "<|endoftext|>", "<eos>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "mask": ("[MASK]", "<mask>"),
}


BYTES = "bytes"  # kind and spec of the tokenizer that needs no file


class Backend(Protocol):
    """A vocabulary as its library reads it. Texts hold no lone surrogates; ids carry no special tokens."""

    vocabulary: int
    unknown: int | None  # stands for what it doesn't know

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, ids: Sequence[int]) -> list[str]: ...
    def find(self, piece: str) -> int | None: ...
    def specials(self) -> dict[str, int | None]: ...
    def names(self) -> list[str]: ...


class Bytes:
    """UTF-8 bytes behind four special tokens: no file, every script, texts of many tokens."""

    vocabulary = 260
    unknown = None  # every byte has its id
    _SPECIALS = {"pad": 0, "first": 1, "last": 2, "mask": 3}

    def encode(self, text: str) -> list[int]:
        """Byte b is the id b + 4."""
        return [byte + 4 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i - 4 for i in ids if i >= 4).decode(errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Two hex digits, or the name of a special token."""
        return [self.names()[i] for i in ids]

    def find(self, piece: str) -> int | None:
        """The id of a piece."""
        return self.names().index(piece) if piece in self.names() else None

    def specials(self) -> dict[str, int | None]:
        """Ids by role."""
        return dict(self._SPECIALS)

    def names(self) -> list[str]:
        """All pieces."""
        return [f"<{name}>" for name in self._SPECIALS] + [f"{byte:02x}" for byte in range(256)]


def find_files(spec: str) -> tuple[str, list[pathlib.Path]]:
    """What a spec is, and the files it consists of, the one with the vocabulary first.

    Returns:
        (kind, files): kind is 'sentencepiece', 'json', 'wordpiece', 'bpe', 'clip', or 'bytes' without files.

    Raises:
        UserError: nothing there, or no file of a known kind.
    """
    if spec == BYTES:
        return BYTES, []
    path = pathlib.Path(spec)
    if not spec or not path.exists():
        near = [p.name for p in path.parent.iterdir()] if spec and path.parent.is_dir() else []
        raise UserError(
            f"A tokenizer must be a file (x.model, tokenizer.json, vocab.txt, vocab.json, {CLIP_FILE}) or a "
            f"folder with one; nothing at {spec!r}.{nearest(path.name, near) if near else ''} Train one from "
            "captions with python -m invideo_jax.tokenizer."
        )
    if path.is_file():
        return _kind_of(path)
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json"):
        if (path / name).is_file():
            return _kind_of(path / name)
    others = [*sorted(path.glob("*.model")), *sorted(path.glob(CLIP_FILE))]
    if len(others) != 1:
        held = sorted(p.name for p in path.iterdir())[:20]
        raise UserError(
            f"A folder must hold one tokenizer (tokenizer.json, x.model, vocab.txt, vocab.json + merges.txt or "
            f"{CLIP_FILE}); {spec} holds {', '.join(held) or 'nothing'}. Give the file itself."
        )
    return _kind_of(others[0])


def _kind_of(path: pathlib.Path) -> tuple[str, list[pathlib.Path]]:
    if path.name == _SHIFTED:
        raise UserError(
            f"The ids of a tokenizer must be those of its model; the published models that come with {_SHIFTED} "
            f"count otherwise than the file {path}. Use the tokenizer.json of the same model."
        )
    if path.suffix == ".model":
        return "sentencepiece", [path]
    if path.name.endswith(".txt.gz"):
        return "clip", [path]
    if path.name in ("vocab.json", "merges.txt"):
        files = [path.with_name("vocab.json"), path.with_name("merges.txt")]
        if not all(file.is_file() for file in files):
            raise UserError(
                f"BPE needs vocab.json and merges.txt side by side; {path.parent} lacks one of them."
            )
        return "bpe", files
    if path.suffix == ".txt":
        return "wordpiece", [path]
    if path.suffix == ".json":
        return "json", [path]
    raise UserError(
        f"A tokenizer must be x.model (SentencePiece), tokenizer.json, vocab.txt (WordPiece), vocab.json with "
        f"merges.txt, or CLIP's {CLIP_FILE}; got {path}. Rename it as it was published."
    )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """What `tokenizer_config.json` and `special_tokens_map.json` of a published model say."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                read = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{folder / name} must be JSON; {error}. Copy it again.") from error
            found |= read if isinstance(read, dict) else {}
    return found


def load(kind: str, contents: Sequence[bytes], lowercase: bool | None, where: str) -> Backend:
    """Reads a vocabulary.

    Args:
        kind, contents: see `find_files`; the files' bytes.
        lowercase: of WordPiece; None: as its vocabulary is written.
        where: the file, for messages.

    Raises:
        UserError: not what its name says, or a library that isn't installed.
    """
    try:
        if kind == BYTES:
            return Bytes()
        if kind == "sentencepiece":
            return SentencePieces(contents[0])
        return Library(kind, contents, lowercase)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"Reading {where} needs the library tokenizers: pip install 'invideo_jax[text]' (or pip install "
            f"tokenizers; {error}). SentencePiece's .model files are read without it."
        ) from error
    except Exception as error:  # the libraries raise RuntimeError, bare Exception, ValueError, ...
        raise UserError(
            f"{where} must be a whole file of a tokenizer ({kind}); {str(error)[:300] or type(error).__name__}. "
            "Copy it again."
        ) from error


class SentencePieces:
    """A SentencePiece model; its control symbols cannot be written in a text."""

    def __init__(self, model: bytes):
        import sentencepiece

        if not model:
            raise ValueError("it is empty")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocabulary, self.unknown = self._model.get_piece_size(), self._model.unk_id()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._model.id_to_piece(int(i)) for i in ids]

    def find(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else None

    def specials(self) -> dict[str, int | None]:
        own = {"first": self._model.bos_id(), "last": self._model.eos_id()}
        own["pad"] = self._model.pad_id()
        return {role: number for role, number in own.items() if number >= 0}

    def names(self) -> list[str]:
        return self.pieces(range(self.vocabulary))


class Library:
    """A vocabulary read by the library `tokenizers`; special tokens written in a text are plain text."""

    def __init__(self, kind: str, contents: Sequence[bytes], lowercase: bool | None):
        import tokenizers

        build = {"json": _from_json, "wordpiece": _wordpiece, "bpe": _bpe, "clip": _clip}[kind]
        self._model = build(tokenizers, contents, lowercase)
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # a caption '[MASK]' is no masked word
        self._known = self._model.get_vocab(with_added_tokens=True)
        self.vocabulary = max(self._known.values()) + 1
        self.unknown = self.find(getattr(self._model.model, "unk_token", None) or "")
        self._suffix = getattr(self._model.model, "end_of_word_suffix", None) or ""

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        text = self._model.decode([int(i) for i in ids], skip_special_tokens=False)
        return text.replace(self._suffix, " ").strip() if self._suffix else text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._model.id_to_token(int(i)) or "" for i in ids]

    def find(self, piece: str) -> int | None:
        return self._known.get(piece)

    def specials(self) -> dict[str, int | None]:
        """First and last token as the file's own post-processor puts them; nothing where it has none."""
        if self._model.post_processor is None:
            return {}
        plain = self._model.encode("a", add_special_tokens=False)
        whole = self._model.encode("a", add_special_tokens=True)
        kind = whole.special_tokens_mask
        body = len(plain.ids)
        before = next((i for i, special in enumerate(kind) if not special), 0)
        after = len(whole.ids) - before - body
        if before > 1 or after > 1:
            raise UserError(
                "A tokenizer must put at most one token before and one behind a text; "
                f"this tokenizer.json puts {whole.tokens}. Give another file."
            )
        return {
            "first": whole.ids[0] if before else None,
            "last": whole.ids[-1] if after else None,
        }

    def names(self) -> list[str]:
        return list(self._known)


def _from_json(tokenizers, contents: Sequence[bytes], lowercase: bool | None):
    return tokenizers.Tokenizer.from_buffer(contents[0])


def _wordpiece(tokenizers, contents: Sequence[bytes], lowercase: bool | None):
    """BERT's: words at spaces, punctuation and Chinese characters, then the longest pieces that fit."""
    words = contents[0].decode("utf-8").removesuffix("\n").split("\n")
    known = {word.removesuffix("\r"): number for number, word in enumerate(words)}
    if "[UNK]" not in known:
        raise UserError(
            f"A WordPiece vocabulary must list one token a line, [UNK] among them; got {len(words)} lines "
            f"without it (first: {words[0][:40]!r}). Give the vocab.txt of the model."
        )
    if lowercase is None:
        lowercase = _is_uncased(known)
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(known, unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.decoder = tokenizers.decoders.WordPiece(prefix="##")
    return model


def _is_uncased(words: Iterable[str]) -> bool:
    """Whether a vocabulary has small letters only, special tokens aside."""
    return not any(re.search("[A-Z]", word) for word in words if not word.startswith("["))


def _bpe(tokenizers, contents: Sequence[bytes], lowercase: bool | None):
    """CLIP's BPE where the pieces end in </w>, GPT-2's and RoBERTa's otherwise."""
    known = json.loads(contents[0].decode("utf-8"))
    lines = contents[1].decode("utf-8").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    merges = [tuple(line.split()) for line in lines if line.strip()]
    if any(len(merge) != 2 for merge in merges):
        raise UserError(
            "A line of merges.txt must be two pieces; another stands there. Copy it again."
        )
    if any(word.endswith("</w>") for word in known):
        return _clip_bpe(tokenizers, known, merges)
    model = tokenizers.Tokenizer(tokenizers.models.BPE(known, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


def _clip(tokenizers, contents: Sequence[bytes], lowercase: bool | None):
    """OpenAI's file: merges only; the ids follow from their order.

    Source: openai/CLIP clip/simple_tokenizer.py: 256 bytes, the same ending a word, 48,894 merges, two more.
    """
    lines = gzip.decompress(contents[0]).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1] if line.strip()]
    symbols = byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return _clip_bpe(tokenizers, {word: number for number, word in enumerate(words)}, merges)


def byte_symbols() -> list[str]:
    """The character that stands for each byte, in the order that CLIP numbers them: printable ones first."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in kept] + [chr(256 + n) for n in range(256 - len(kept))]


def _clip_bpe(tokenizers, known: dict[str, int], merges: Sequence[tuple[str, str]]):
    normal, split = tokenizers.normalizers, tokenizers.pre_tokenizers
    unknown = "<|endoftext|>" if "<|endoftext|>" in known else None
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            known,
            merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=unknown,
        )
    )
    model.normalizer = normal.Sequence(
        [normal.NFC(), normal.Replace(tokenizers.Regex(r"\s+"), " "), normal.Lowercase()]
    )
    # Letters together, digits one by one, the rest together, English endings apart.
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    model.pre_tokenizer = split.Sequence(
        [
            split.Split(tokenizers.Regex(words), behavior="removed", invert=True),
            split.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    return model
