"""What protocols of benchmarks share. A protocol holds only what it sets over the config of the run that is judged.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/msrvtt_1k.py:FOLDER

`--config.KEY=VALUE` behind it sets any value once more. docs/benchmark_protocols.md has all of them.
"""

import ml_collections

from configs import common

_ALL = 1_000_000  # examples: the whole set
_EVERY = "0 steps"  # never during training


def parse(name: str, arg: str | None, *words: str, **defaults: str) -> tuple[str, dict]:
    """The folder, which comes first, and what follows it, as `common.parse_arg` reads it."""
    folder, _, rest = (arg or "").partition(",")
    if not folder:
        raise ValueError(
            f"the protocol needs the folder of the benchmark: --config=configs/benchmarks/{name}.py:FOLDER"
        )
    return folder, common.parse_arg(rest, *words, **defaults)


def retrieval(
    name: str, arg: str | None, *, split: str, frames: int, text: int
) -> ml_collections.ConfigDict:
    """Retrieval as InternVideo2's second stage is judged; with the word `towers` as InternVideo2-CLIP.

    Args:
        name: of the benchmark.
        arg: 'FOLDER', then `towers` or `frames=N`.
        frames: of a video, the middle ones of as many equal parts.
        text: tokens of a text.
    """
    folder, words = parse(name, arg, "towers", frames="")
    c = _protocol(name, folder, split)
    _test_clip(c, int(words["frames"] or (8 if words["towers"] else frames)))
    evaluator = dict(every=_EVERY, examples=_ALL, captions="all", dual_softmax=True, rerank=128)
    if words["towers"]:
        evaluator["rerank"] = (
            0  # nothing there looks at both; its tokenizer has a length of its own
        )
    else:
        c.stage.text = ml_collections.ConfigDict(dict(length=text))
    c.evals.retrieval = ml_collections.ConfigDict(evaluator)
    return c


def recognition(
    name: str,
    arg: str | None,
    *,
    split: str,
    views: tuple[int, int],
    templates: str = "actions",
) -> ml_collections.ConfigDict:
    """Zero-shot classification as of InternVideo2-CLIP; with the word `head` by the run's own classifier.

    Args:
        name: of the benchmark.
        arg: 'FOLDER', then `head` or `frames=N`.
        views: (clips, crops) of each video, of a classifier.
        templates: that class names are put into.
    """
    folder, words = parse(name, arg, "head", frames="")
    c = _protocol(name, folder, split)
    if words["head"]:
        c.training = True  # its class names, where it has any, are those of the head
        clips, crops = views
        evaluator = dict(every=_EVERY, examples=_ALL, clips=clips, crops=crops)
        c.evals.multi_view = ml_collections.ConfigDict(evaluator)
        if words["frames"]:
            c.stage.clip = ml_collections.ConfigDict(dict(frames=int(words["frames"])))
        return c
    _test_clip(c, int(words["frames"] or 8))
    c.evals.zero_shot = ml_collections.ConfigDict(
        dict(every=_EVERY, examples=_ALL, templates=templates, mean="cosine")
    )
    return c


def multiple_choice(name: str, arg: str | None, *, split: str) -> ml_collections.ConfigDict:
    """The best of a few texts, by cosine and by the fusion layers; with the word `towers` by cosine alone."""
    folder, words = parse(name, arg, "towers", frames="8")
    c = _protocol(name, folder, split)
    _test_clip(c, int(words["frames"]))
    evaluator = dict(every=_EVERY, examples=_ALL, match=not words["towers"])
    c.evals.multiple_choice = ml_collections.ConfigDict(evaluator)
    return c


def _protocol(name: str, folder: str, split: str) -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.data = ml_collections.ConfigDict(dict(eval=f"benchmark:{name}:{folder}", eval_split=split))
    c.stage = ml_collections.ConfigDict()
    c.evals = ml_collections.ConfigDict()
    c.training = False
    return c


def _test_clip(c: ml_collections.ConfigDict, frames: int) -> None:
    """The multi-modal test loader: middle frames, the whole picture resized without keeping its shape.

    Source: InternVideo2 multi_modality/dataset/__init__.py, video_utils.py.
    """
    c.stage.clip = ml_collections.ConfigDict(
        dict(frames=frames, sampling="middle", crop="resize", interpolation="bicubic")
    )
