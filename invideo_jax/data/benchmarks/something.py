"""Something-Something V2: 174 templates, whose names have no brackets; videos are called ID.webm.

labels.json is {template: "number"}, validation.json a list of {"id", "label", "template", "placeholders"}, test.json
one of {"id"}, and test-answers.csv has `id;template`. The captions are the labels, which name the things.

Source: the labels of Something-Something V2 (Qualcomm); Goyal et al. 2017.
"""

import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.reading import AnnotationError, each, json_of, table_of

_LONG = "something-something-v2-"
CLASSES = 174


def class_name(template: str) -> str:
    """'Putting [something] on [something]' -> 'Putting something on something'."""
    return template.replace("[", "").replace("]", "")


def _read(path: pathlib.Path, files: Files, split: str) -> Annotations:
    names = _class_names(files)
    known = set(names)
    answers = _answers(files) if split == "test" else {}

    def entry(row: dict) -> Entry:
        video = str(row["id"])
        template = row.get("template") or answers.get(video)
        if template is None:
            raise KeyError(
                "template (those of the test are in test-answers.csv, which must be there)"
            )
        if class_name(template) not in known:
            raise ValueError(f"must have a template of labels.json; got {template!r}")
        caption = (row["label"],) if row.get("label") else ()
        return Entry((video,), caption, label=class_name(template), flip=False)

    return Annotations(each(json_of(path), entry), names)


def _class_names(files: Files) -> tuple[str, ...]:
    path = files.find(("labels.json", f"{_LONG}labels.json"))
    if path is None:
        raise AnnotationError(
            f"its classes are in labels.json or {_LONG}labels.json, which is not there"
        )
    rows = each(json_of(path, dict).items(), lambda item: (int(item[1]), item[0]))
    if sorted(number for number, _ in rows) != list(range(CLASSES)):
        raise AnnotationError(f"{path.name} must number {CLASSES} classes; it has {len(rows)}")
    return tuple(name for _, name in sorted(rows))


def _answers(files: Files) -> dict[str, str]:
    path = files.find(("test-answers.csv",))
    return {} if path is None else dict(each(table_of(path, ";"), lambda row: (row[0], row[1])))


SSV2 = Benchmark(
    split="validation",
    formats=(
        Format(
            {
                "validation": ("validation.json", f"{_LONG}validation.json"),
                "test": ("test.json", f"{_LONG}test.json"),
                "train": ("train.json", f"{_LONG}train.json"),
            },
            _read,
        ),
    ),
    origin="the labels of Something-Something V2 (Qualcomm's AI datasets)",
)
