"""Sentences that class names are put into, so that a class looks like the captions a model has learned from."""

import pathlib
import re

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

# Sixteen, as many as ViCLIP and InternVideo2 put actions into; the wording is ours.
ACTIONS = (
    "a clip of {}.",
    "a video that shows {}.",
    "someone is {}.",
    "a person doing {}.",
    "people doing {}.",
    "a short recording of {}.",
    "footage of the action {}.",
    "this is {}.",
    "the activity here is {}.",
    "watch a person {}.",
    "a man is {}.",
    "a woman is {}.",
    "a group that is {}.",
    "an example of {} on camera.",
    "a scene with {} in it.",
    "{}, filmed from nearby.",
)
TEMPLATES = {"none": ("{}",), "actions": ACTIONS}


def templates(spec: str) -> tuple[str, ...]:
    """The templates of a name, or of a text file with one in each line.

    Raises:
        UserError: neither, or a line without exactly one '{}'.
    """
    if spec in TEMPLATES:
        return TEMPLATES[spec]
    file = pathlib.Path(spec)
    if not file.is_file():
        raise UserError(
            f"Templates must be one of {', '.join(TEMPLATES)} or a text file; got templates={spec!r}."
            f"{nearest(spec, TEMPLATES)}"
        )
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        what = f"{wrong[0]!r}" if wrong else "an empty file"
        raise UserError(
            f"Each line of {spec} must have '{{}}' once, where the name of the class goes; got {what}."
        )
    return tuple(lines)


def fill(template: str, name: str) -> str:
    """The template with the name in place of '{}'; braces in the name stay as they are."""
    return template.replace("{}", name)


def words(name: str) -> str:
    """A class name as words: 'brush_hair' and 'BrushHair' are 'brush hair'.

    Names that have a space are left as they are, but for the brackets of
    'Pushing [something] off [something]'.
    """
    if " " in name.strip():
        return name.replace("[", "").replace("]", "").strip()
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    parts = re.sub(r"[_\-\s]+", " ", parts).strip()
    # Only what was taken apart is made small: 'YoYo' is, 'TRX' is not.
    return parts if parts == name else parts.lower()
