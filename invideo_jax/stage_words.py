"""The tokenizer of each stage of a run: compared with its tower and with what is handed over, kept, and found again."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from invideo_jax import handover
from invideo_jax.data.text import Tokenizer, open_tokenizer
from invideo_jax.data.text_files import BYTES
from invideo_jax.errors import UserError
from invideo_jax.models import text_towers
from invideo_jax.programs import Program, contrastive
from invideo_jax.stage_start import Start


def open_all(
    config: ml_collections.ConfigDict, made: Mapping[str, Program]
) -> dict[str, Tokenizer]:
    """The tokenizer of each stage that has texts, read anew.

    Args:
        made: programs by the names of their stages.

    Raises:
        UserError: none there, or one that the text tower was not built for.
    """
    found = {}
    for name, program in made.items():
        if program.modalities and program.modalities.text:
            found[name] = program.modalities.text.reopen()
            check(found[name], config.stages[name], key=f"stages.{name}")
    return found


def check(found: Tokenizer, stage: ml_collections.ConfigDict, *, key: str) -> None:
    """Compares a tokenizer with what the config says the text tower was built for.

    Args:
        stage: a section of `config.stages`; `key` is its name for messages.

    Raises:
        UserError: other numbers, where the stage reads them.
    """
    text, hides = stage.text, contrastive.hides_words(stage)
    if hides and found.mask is None:
        raise UserError(
            f"A loss that predicts hidden words needs a tokenizer with a token that hides them ([MASK]); "
            f"{found.name} has none, {key}.text.mask={text.mask}. Set {key}.losses.mlm=0, and amlm and avmlm, or "
            "take a tokenizer that has one (python -m invideo_jax.tokenizer makes such)."
        )
    padded = stage.text_tower.name in text_towers.READ_PADDING
    names = ["vocabulary", "first", *["pad"] * padded, *["mask"] * hides]
    its = {name: getattr(found, name) for name in names}
    its = {name: -1 if number is None else number for name, number in its.items()}
    wrong = [name for name in names if its[name] != text[name]]
    if 0 < text.vocabulary - found.vocabulary <= text.unused:
        wrong.remove("vocabulary")
    if wrong:
        name = wrong[0]
        raise UserError(
            f"The tokenizer must be the one that the text tower was built for; {found.name} has "
            f"{name}={its[name]}, {key}.text.{name}={text[name]}. Give the tower's own tokenizer, or for a tower "
            f"without trained weights --config.{key}.text.{name}={its[name]}."
        )


def folder(workdir: pathlib.Path, stage_name: str) -> pathlib.Path:
    """Where a run keeps the tokenizer of a stage."""
    return workdir / "tokenizer" / stage_name


def use_kept(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Names in the config of a run the tokenizers that the run keeps, in place: the files it names may be gone."""
    for name, stage in config.stages.items():
        kept = folder(workdir, name)
        if "text" in stage and kept.is_dir():
            stage.text.tokenizer = str(kept)


def at_start(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config that programs are made from: where a tokenizer's files are gone since the last start, the kept ones."""
    config, saved = config.copy_and_resolve_references(), workdir / "config.json"
    before = json.loads(saved.read_text())["stages"] if saved.is_file() else {}
    for name, stage in config.stages.items():
        spec, kept = stage.get("text", {}).get("tokenizer"), folder(workdir, name)
        same = spec and spec == before.get(name, {}).get("text", {}).get("tokenizer")
        if same and spec != BYTES and not pathlib.Path(spec).exists() and kept.is_dir():
            stage.text.tokenizer = str(kept)
    return config


def refuse_others(
    tokenizers: Mapping[str, Tokenizer],
    before: Mapping[str, Any],
    workdir: pathlib.Path,
    allowed: Sequence[str],
) -> None:
    """Refuses to go on with another tokenizer.

    Args:
        tokenizers: by stage.
        before: the `data` of the checkpoint's meta.
        allowed: config keys that the user lets change.

    Raises:
        UserError: one has another digest than the checkpoint says, and its key is not allowed.
    """
    for name, now in tokenizers.items():
        was = before.get(f"tokenizer/{name}", {}).get("digest", now.digest)
        key = f"data_found.tokenizer/{name}.digest"
        let = any(key == p or key.startswith(f"{p}.") for p in allowed)
        if was != now.digest and not let:
            kept = folder(workdir, name)
            raise UserError(
                f"Stage {name} must go on with the tokenizer it began with, of digest {was[:12]}, which lies in {kept}; "
                f"{now.name} has {now.digest[:12]}. Give --config.stages.{name}.text.tokenizer={kept}, use another "
                f"--workdir for a new run, or accept the change with --allow_change={key}"
            )


def check_handed_over(starts: Mapping[str, Start], tokenizers: Mapping[str, Tokenizer]) -> None:
    """Compares the tokenizer of a text tower that is handed over with that of the stage which takes it.

    Args:
        starts: of all stages in order, by name; `tokenizers`: of those with texts.

    Raises:
        UserError: words would read the rows of other words.
    """
    last = None
    for name, start in starts.items():
        taken = _text_source(start)
        if name in tokenizers and taken is not None:
            now, here = tokenizers[name], not start.source
            old = tokenizers.get(last) if here else _kept_by(taken)
            where = f"the stage {last}" if here else taken
            if old and not now.same_words(old):
                raise UserError(
                    f"A text tower must be handed over to a stage with the same tokenizer; stages.{name} has "
                    f"{now.name}, the tower of {where} was trained with {old.name}, another one. Set "
                    f"stages.{name}.text.tokenizer to {old.files[0].parent if old.files else old.name}, or start "
                    f"a new tower: add '^text/' to stages.{name}.init.fresh."
                )
        last = name


def _text_source(start: Start) -> str | None:
    """What the text tower of a stage is taken from; None where it is fresh, '' from the stage before."""
    if start.table is None:
        return None
    for row in start.table.rows:
        if row.path.startswith("text/") and row.source is not None:
            parts = [part.partition("=")[::2] for part in start.source.split(";")]
            several = all(re.fullmatch(r"\w+", part) and spec for part, spec in parts)
            return dict(parts)[row.source.partition("/")[0]] if several else start.source
    return None


def _kept_by(spec: str) -> Tokenizer | None:
    """The tokenizer that a workdir keeps of the stage of its checkpoint; None for imported weights."""
    source = handover.open_source(spec)
    if "stage" not in source.meta:
        return None
    kept = folder(pathlib.Path(source.about["name"]), source.meta["stage"])
    return open_tokenizer(kept) if kept.is_dir() else None
