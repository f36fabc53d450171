"""Texts as numbers: the ids of published tokenizers, any text in bounded time, and the same tokenizer wherever it travels."""

import gzip
import json
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invideo_jax.data.pieces import train_pieces
from invideo_jax.data.text import check_vocabulary, open_tokenizer
from invideo_jax.data.text_files import byte_symbols
from invideo_jax.errors import UserError

CAPTIONS = [
    "a red ball bounces on the spot",
    "two striped stars move to the left, slowly",
    "one hears a thud at every landing",
    "it's 25 o'clock; we'll see what they've done",
    "a blue disc drifts down while a green arrow stays still",
]
SCRIPTS = [
    "\u7ea2\u7403\u5f39\u8df3",
    "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043c\u044f\u0447",
    "\u0643\u0631\u0629 \u062d\u0645\u0631\u0627\u0621",
    "\u0932\u093e\u0932 \u0917\u0947\u0902\u0926",
    "caf\u00e9 na\u00efve cafe\u0301",
    "a \U0001f534 ball \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u202ea right-to-left override",
]
WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 5 , . ' ; ! - # red ball star it see what they"
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
BERT += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"] + [
    "##ing",
    "bounc",
    "##es",
    "\u7ea2",
    "\u7403",
    "cafe",
]
MERGES = [
    ("r", "e"),
    ("re", "d</w>"),
    ("b", "a"),
    ("l", "l</w>"),
    ("ba", "ll</w>"),
    ("t", "h"),
    ("th", "e</w>"),
]
MERGES += [("'", "s</w>"), ("o", "n</w>"), ("2", "5</w>"), ("Ã", "©</w>")]


def clip_words() -> list[str]:
    symbols = byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in MERGES)]
    return [*words, "<|startoftext|>", "<|endoftext|>"]


def write_clip(folder, kind: str):
    folder.mkdir()
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)
    if kind == "gz":
        path = folder / "bpe_simple_vocab_16e6.txt.gz"
        path.write_bytes(gzip.compress(lines.encode()))
        return path
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    known = {word: number for number, word in enumerate(clip_words())}
    (folder / "vocab.json").write_text(json.dumps(known), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def pieces(folder):
    path = folder / "captions.model"
    path.write_bytes(train_pieces(CAPTIONS * 3))
    return str(path)


@pytest.fixture(scope="module")
def bert(folder):
    pytest.importorskip("tokenizers")
    path = folder / "vocab.txt"
    path.write_text("\n".join(BERT) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def clip(folder):
    pytest.importorskip("tokenizers")
    return str(write_clip(folder / "clip", "json"))


@pytest.fixture(params=["pieces", "bert", "clip"])
def any_tokenizer(request):
    return open_tokenizer(request.getfixturevalue(request.param))


# --- rows ---


def test_rows_are_first_pieces_last_and_padding(pieces):
    tok = open_tokenizer(pieces)
    assert (tok.pad, tok.first, tok.last, tok.mask) == (0, 2, 3, 4)
    ids, valid = tok(["the", "", " \t\n", "a red ball bounces on the spot"], 6)
    assert ids.dtype == np.int32 and valid.dtype == bool and ids.shape == valid.shape == (4, 6)
    body = tok.encode("the")
    assert 1 <= len(body) <= 3 and ids[0].tolist() == [2, *body, 3, 0, 0, 0][:6]
    assert valid[0].tolist() == [i < len(body) + 2 for i in range(6)]
    assert not valid[1:3].any() and not ids[1:3].any()
    assert ids[3].tolist() == [2, *tok.encode("a red ball bounces on the spot")[:4], 3]
    assert valid[3].all()


def test_a_cut_text_keeps_its_last_token_and_a_prefix_of_its_pieces(any_tokenizer):
    tok, text = any_tokenizer, CAPTIONS[1]
    body = tok.encode(text)
    for length in range(3, len(body) + 5):
        ids, valid = (a[0] for a in tok([text], length))
        assert ids[valid].tolist() == [tok.first, *body[: length - 2], tok.last]
        assert (ids[~valid] == tok.pad).all()


def test_decoding_stops_at_the_last_token(any_tokenizer):
    tok, text = any_tokenizer, "a red ball"
    assert tok.decode(tok([text], 32)[0][0]) == text
    assert tok.decode(tok.encode(text)) == text and tok.decode([]) == ""
    assert "".join(tok.pieces(tok.encode("ball"))).strip("\u2581").replace("</w>", "") == "ball"


def test_special_tokens_written_in_a_text_are_plain_text(any_tokenizer, folder):
    tok = any_tokenizer
    special = {tok.first, tok.last, tok.mask} - {None}
    for text in ("[CLS] [SEP] [MASK]", "<|startoftext|><|endoftext|>", "<s></s><pad>", "[PAD]"):
        found = tok.encode(f"a {text} b")
        # CLIP writes what it doesn't know as <|endoftext|>; all of these characters it knows.
        assert not special & set(found), (text, found)


def test_a_prefix_stands_before_every_text_but_an_empty_one(pieces):
    plain, tok = open_tokenizer(pieces), open_tokenizer(pieces, {"prefix": "one hears "})
    assert tok.encode("a thud") == plain.encode("one hears a thud")
    assert not tok([""], 8)[1].any()
    assert tok.digest != plain.digest


def test_too_few_places_and_a_single_text_are_errors(pieces):
    tok = open_tokenizer(pieces)
    with pytest.raises(UserError, match="at least 3 places, 2 of them.*length=2"):
        tok(["x"], 2)
    with pytest.raises(TypeError, match="a sequence of texts; got one: 'a red"):
        tok("a red ball", 8)
    assert tok([], 8)[0].shape == (0, 8)


# --- parity with transformers ---

TEXTS = [
    *CAPTIONS,
    *SCRIPTS,
    "A RED  Ball!",
    "x" * 150,
    "-".join("abc"),
    "e\x00f\x07g",
    "#7 & <b>",
    "it's",
]


@pytest.mark.parametrize("lowercase", [True, False])
def test_bert_ids_are_those_of_transformers(bert, lowercase):
    transformers = pytest.importorskip("transformers")
    known = {word: number for number, word in enumerate(BERT)}
    theirs = transformers.BertTokenizerFast(vocab=known, do_lower_case=lowercase)
    tok = open_tokenizer(bert, None if lowercase else {"lowercase": False})
    assert (tok.vocabulary, tok.pad, tok.first, tok.last, tok.mask) == (len(BERT), 0, 2, 3, 4)
    check_padded(tok, theirs, TEXTS)


@pytest.mark.parametrize("kind", ["json", "gz"])
def test_clip_ids_are_those_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    known = {word: number for number, word in enumerate(clip_words())}
    theirs = transformers.CLIPTokenizer(vocab=known, merges=MERGES)
    tok = open_tokenizer(str(write_clip(tmp_path / kind, kind)))
    last = len(known) - 1
    assert (tok.vocabulary, tok.pad, tok.first, tok.last) == (len(known), 0, last - 1, last)
    assert tok.mask is None
    check_padded(tok, theirs, TEXTS)


def test_llama_ids_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "llama").mkdir()
    with open(tmp_path / "llama" / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["summarize: " + text for text in CAPTIONS * 3]),
            model_writer=file,
            model_type="bpe",
            vocab_size=340,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    theirs = transformers.LlamaTokenizer.from_pretrained(
        tmp_path / "llama", add_bos_token=True, add_eos_token=True
    )
    tok = open_tokenizer(str(tmp_path / "llama" / "tokenizer.model"), {"prefix": "summarize:"})
    assert (tok.vocabulary, tok.pad, tok.first, tok.last, tok.mask) == (340, 0, 1, 2, None)
    for text in TEXTS:
        wanted = theirs("summarize:" + text).input_ids
        ids, valid = (a[0] for a in tok([text], 400))
        assert ids[valid].tolist() == wanted, text
        assert not ids[~valid].any()


def check_padded(tok, theirs, texts, length=24):
    """Padding and truncation as transformers does them."""
    wanted = theirs(list(texts), padding="max_length", truncation=True, max_length=length)
    ids, valid = tok(texts, length)
    for row, text in enumerate(texts):
        assert ids[row][valid[row]].tolist() == [
            i for i, real in zip(wanted.input_ids[row], wanted.attention_mask[row]) if real
        ], text
        assert (ids[row][~valid[row]] == tok.pad).all()


@pytest.mark.parametrize("fixture", ["bert", "clip"])
def test_a_whole_published_folder_is_read_by_its_tokenizer_json(fixture, tmp_path, request):
    transformers = pytest.importorskip("transformers")
    spec = request.getfixturevalue(fixture)
    known = {
        word: number for number, word in enumerate(BERT if fixture == "bert" else clip_words())
    }
    theirs = (
        transformers.BertTokenizerFast(vocab=known)
        if fixture == "bert"
        else transformers.CLIPTokenizer(vocab=known, merges=MERGES)
    )
    theirs.save_pretrained(tmp_path / "published")
    one, two = open_tokenizer(spec), open_tokenizer(str(tmp_path / "published"))
    assert two.files[0].name == "tokenizer.json"
    assert (two.first, two.last, two.mask) == (one.first, one.last, one.mask)
    assert two.pad == theirs.pad_token_id
    for text in (*TEXTS, "[CLS] a [MASK] [SEP]", "a <|endoftext|> b"):
        assert one.encode(text) == two.encode(text), text


def test_a_cased_vocabulary_keeps_capitals(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*BERT, "Red"]), encoding="utf-8")
    assert open_tokenizer(str(path)).pieces(open_tokenizer(str(path)).encode("Red red")) == [
        "Red",
        "red",
    ]
    path.write_text("\n".join(BERT), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert open_tokenizer(str(path)).pieces(open_tokenizer(str(path)).encode("Red red")) == [
        "[UNK]",
        "red",
    ]


def test_gpt_style_bpe_has_a_last_token_by_name(tmp_path):
    pytest.importorskip("tokenizers")
    symbols = byte_symbols()
    known = {w: n for n, w in enumerate([*symbols, "re", "red", "\u0120re", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(known))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d\n\u0120 re\n", encoding="utf-8")
    tok = open_tokenizer(str(tmp_path))
    assert (tok.first, tok.last, tok.pad) == (None, known["<|endoftext|>"], 0)
    assert tok.pieces(tok.encode("red red\u00e9")) == ["red", "\u0120", "red", "\u00c3", "\u00a9"]
    assert tok.decode(tok(["red red\u00e9 \u7ea2"], 20)[0][0]) == "red red\u00e9 \u7ea2"


# --- hostile texts ---

HOSTILE = [
    "",
    " ",
    "\x00",
    "\u200b",
    "\ufeff\u202e\u2066",
    "\ud800",
    "a\udfff\ud800b",
    "\x00a\x01b\x7f",
    "\u0301" * 300,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 50,
    "\u2581\u2581",
    "\n\r\u2028\u0085",
    "a" * 5000,
    *SCRIPTS,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:24])
def test_any_text_gives_ids_of_the_vocabulary_or_nothing(any_tokenizer, text):
    check_row(any_tokenizer, text, 16)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=400), length=st.integers(3, 20))
def test_any_unicode(pieces, bert, clip, text, length):
    for spec in (pieces, bert, clip):
        check_row(cached(spec), text, length)


def check_row(tok, text, length):
    ids, valid = (a[0] for a in tok([text], length))
    assert ((0 <= ids) & (ids < tok.vocabulary)).all()
    real = int(valid.sum())
    assert valid[:real].all() and (ids[real:] == tok.pad).all()
    assert real == 0 or (real > 2 and ids[0] == tok.first and ids[real - 1] == tok.last)
    if text and not text.isspace():
        whole = tok.encode(text)
        assert ids[:real].tolist()[1:-1] == whole[: length - 2]


_CACHE = {}


def cached(spec):
    return _CACHE.setdefault(spec, open_tokenizer(spec))


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.text(alphabet="abcdefgh'\u7ea2\u00e9\U0001f534.,  ", min_size=1, max_size=30),
        min_size=40,
        max_size=150,
    ),
    length=st.integers(3, 12),
)
def test_cutting_before_tokenising_changes_no_id(pieces, bert, clip, words, length):
    for text in (" ".join(words), "".join(words).replace(" ", "")):
        for spec in (pieces, bert, clip):
            tok = cached(spec)
            assert tok.encode(text, length) == tok.encode(text)[:length]


def test_ten_thousand_words_cost_what_the_first_cost(any_tokenizer):
    long = " ".join(CAPTIONS * 280)
    assert len(long.split()) > 10_000
    read, encode = [], any_tokenizer._backend().encode

    class Watched:
        def encode(self, text):
            read.append(len(text))
            return encode(text)

    watched = pickle.loads(pickle.dumps(any_tokenizer))
    watched._backend = lambda contents=None: Watched()
    assert watched.encode(long, 30) == encode(long)[:30]
    assert sum(read) < 4000 < len(long)


@pytest.mark.parametrize(
    "text", ["a " * 500_000, "a" * 1_000_000, "\u7ea2" * 300_000, "\u0301" * 300_000]
)
def test_a_megabyte_of_text_ends_soon(any_tokenizer, text):
    begin = time.process_time()
    check = any_tokenizer([text], 32)
    assert check[0].shape == (1, 32)
    assert time.process_time() - begin < 5  # measured: at most 0.5 s


# --- travelling ---


def test_saved_and_opened_it_is_the_same(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "a")
    again = open_tokenizer(str(tmp_path / "a"))
    assert again.digest == any_tokenizer.digest and again.settings == any_tokenizer.settings
    assert again.vocabulary == any_tokenizer.vocabulary
    for one, two in zip(again(TEXTS, 20), any_tokenizer(TEXTS, 20)):
        assert (one == two).all()
    again.save(tmp_path / "b")
    names = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert names == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}


def test_options_travel_too(pieces, tmp_path):
    tok = open_tokenizer(pieces, {"prefix": "see: ", "first": None, "mask": "[UNK]"})
    tok.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert (again.first, again.mask, again.settings.prefix) == (None, 1, "see: ")
    assert again.digest == tok.digest != open_tokenizer(pieces).digest
    assert open_tokenizer(tmp_path, {"prefix": ""}).encode("a") == open_tokenizer(pieces).encode(
        "a"
    )


def test_a_changed_file_is_refused(pieces, tmp_path):
    tok = open_tokenizer(pieces)
    tok.save(tmp_path)
    (tmp_path / "captions.model").write_bytes(train_pieces(CAPTIONS[:3]))
    with pytest.raises(UserError, match="must be those it was saved with"):
        open_tokenizer(tmp_path)
    (tmp_path / "captions.model").unlink()
    with pytest.raises(UserError, match="Copy the folder again"):
        open_tokenizer(tmp_path)


def test_pickles_small_and_reads_its_files_in_another_process(pieces, tmp_path):
    tok = open_tokenizer(pieces)
    data = pickle.dumps(tok)
    assert len(data) < 1000
    (tmp_path / "tok").write_bytes(data)
    program = (
        "import pickle, sys\n"
        f"tok = pickle.load(open({str(tmp_path / 'tok')!r}, 'rb'))\n"
        "assert 'sentencepiece' not in sys.modules, 'read before it is needed'\n"
        f"print(tok([{CAPTIONS[0]!r}], 12)[0].tolist(), 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == f"{tok([CAPTIONS[0]], 12)[0].tolist()} False", done.stderr


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(train_pieces(CAPTIONS))
    data = pickle.dumps(open_tokenizer(path))
    path.write_bytes(train_pieces(CAPTIONS[1:]))
    program = f"import pickle; pickle.loads({data!r})(['a'], 8)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "must stay as they are during a run" in done.stderr


def test_many_threads_get_the_same(any_tokenizer):
    wanted = any_tokenizer(TEXTS, 16)[0]
    wrong = []

    def work():
        for _ in range(20):
            if not (any_tokenizer(TEXTS, 16)[0] == wanted).all():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- mistakes ---


def test_another_vocabulary_than_the_weights_is_an_error(pieces):
    tok = open_tokenizer(pieces)
    check_vocabulary(tok, tok.vocabulary)
    check_vocabulary(tok, tok.vocabulary + 3, unused=3)
    for rows in (tok.vocabulary - 1, tok.vocabulary + 1, 30522):
        with pytest.raises(
            UserError, match=f"has {tok.vocabulary} tokens, the table of the weights {rows}"
        ):
            check_vocabulary(tok, rows)


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("x.model", b"not a model", "must be a whole file of a tokenizer"),
        ("x.model", b"", "it is empty"),
        ("tokenizer.json", b"{}", "must be a whole file of a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "must be a whole file of a tokenizer"),
        ("vocab.txt", b"a\nb\n", "one token a line, .UNK. among them; got 2 lines"),
        ("vocab.txt", b"\xff\xfe\xfd", "must be a whole file of a tokenizer"),
        ("bpe_simple_vocab_16e6.txt.gz", b"plain", "must be a whole file of a tokenizer"),
        ("vocab.json", b"{}", "vocab.json and merges.txt side by side"),
        ("sentencepiece.bpe.model", b"x", "Use the tokenizer.json of the same model"),
        ("words.bin", b"x", "must be x.model"),
    ],
)
def test_damaged_and_unknown_files_are_named(tmp_path, name, content, words):
    pytest.importorskip("tokenizers")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        open_tokenizer(tmp_path / name)
    assert str(tmp_path) in str(error.value) or "vocab.txt" in name


def test_missing_and_ambiguous_specs_say_what_is_there(tmp_path):
    with pytest.raises(UserError, match="nothing at ''"):
        open_tokenizer("")
    (tmp_path / "captions.model").write_bytes(train_pieces(CAPTIONS))
    with pytest.raises(UserError, match='Did you mean "captions.model"'):
        open_tokenizer(tmp_path / "caption.model")
    assert open_tokenizer(tmp_path).files[0].name == "captions.model"
    (tmp_path / "other.model").touch()
    with pytest.raises(UserError, match="holds captions.model, other.model"):
        open_tokenizer(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds nothing"):
        open_tokenizer(tmp_path / "none")


def test_wrong_options_name_the_nearest(pieces):
    with pytest.raises(UserError, match='Unknown option "frist".*Did you mean "first"'):
        open_tokenizer(pieces, {"frist": "[CLS]"})
    with pytest.raises(UserError, match=r'The option last .*"\[SEPP\]".*Did you mean "\[SEP\]"'):
        open_tokenizer(pieces, {"last": "[SEPP]"})
    with pytest.raises(UserError, match="lowercase is an option of vocab.txt alone"):
        open_tokenizer(pieces, {"lowercase": True})


def test_without_the_library_the_pip_line_is_said(tmp_path, monkeypatch, pieces):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "vocab.txt").write_text("\n".join(BERT))
    with pytest.raises(UserError, match=r"pip install 'invideo_jax\[text\]'"):
        open_tokenizer(tmp_path / "vocab.txt")
    assert open_tokenizer(pieces)(["a red ball"], 8)[1].any()
