"""From the config of a stage to what runs it: model, optimiser, train step, evaluation functions.

A kind of stage is one module here with two functions, and one line of `PROGRAMS`:

    program(config, stage) -> base.Program
    check(config, stage_name) -> None: raises ValueError or TypeError for values that do not go
        together; it touches no device and reads no file.

Modules here spell config keys as keyword arguments; a key that nothing takes is a TypeError.
"""

import importlib

import ml_collections

from invideo_jax.errors import UserError
from invideo_jax.programs.base import Frozen, Kept, Program, Teacher
from invideo_jax.registry import nearest
from invideo_jax.stages import Stage

__all__ = ["PROGRAMS", "Frozen", "Kept", "Program", "Teacher", "check", "program"]

# stages.NAME.step / stages.NAME.objective -> module
PROGRAMS = {
    "masked/aligned": "invideo_jax.programs.aligned",
    "masked/latent": "invideo_jax.programs.latent",
    "masked/pixels": "invideo_jax.programs.masked",
    "classify/fused": "invideo_jax.programs.fusion",
    "classify/labels": "invideo_jax.programs.classify",
    "contrastive/fused": "invideo_jax.programs.contrastive",
    "contrastive/towers": "invideo_jax.programs.contrastive",
}


def _module(config: ml_collections.ConfigDict, stage_name: str):
    stage = config.stages[stage_name]
    kind = f"{stage.step}/{stage.objective}"
    if kind not in PROGRAMS:
        raise UserError(
            f"stages.{stage_name} must have a known step and objective; got step={stage.step!r}, "
            f"objective={stage.objective!r}.{nearest(kind, PROGRAMS)}"
        )
    return importlib.import_module(PROGRAMS[kind])


def program(config: ml_collections.ConfigDict, stage: Stage) -> Program:
    """Builds the stage called `stage.name` of the config.

    Raises:
        ValueError: values that do not go together; the message names them.
    """
    return _module(config, stage.name).program(config, stage)


def check(config: ml_collections.ConfigDict, stage_name: str) -> None:
    """Raises ValueError or TypeError where the parts of a stage do not go together."""
    _module(config, stage_name).check(config, stage_name)
