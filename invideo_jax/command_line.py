"""What the commands of the package share: their flags, and how mistakes are told."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence

import jax

from invideo_jax import runtime
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

_OVERRIDE = re.compile(r"--config\.([^=]*)(=?)(.*)", re.DOTALL)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes '--config.a.b=1' and '--config.a.b 1' out of `argv`.

    Returns:
        The other arguments; overrides as 'a.b=1', in order.
    """
    rest, overrides, words = [], [], iter(argv)
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if not match:
            rest.append(word)
        elif match[2]:
            overrides.append(f"{match[1]}={match[3]}")
        else:
            value = next(words, None)
            overrides.append(match[1] if value is None else f"{match[1]}={value}")
    return rest, overrides


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError and names the nearest flag."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--[^= ]+)", message)
        flags = [f for action in self._actions for f in action.option_strings]
        hint = nearest(unknown[1], flags) if unknown else ""
        raise UserError(f"{message}.{hint} See --help.")


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a run of several processes; all or none of them are given."""
    group = parser.add_argument_group(
        "several processes", "found automatically on TPU pods, Slurm and Kubernetes"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, help="processes of the run")
    group.add_argument("--process_id", type=int, help="which of them this is, from 0")


def training_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags of `python -m invideo_jax.train`, and the overrides of its config."""
    rest, overrides = split_overrides(argv)
    parser = Parser(
        prog="python -m invideo_jax.train",
        description="Trains a recipe. The same command goes on where a run stopped.",
        epilog="Any value of the recipe can be set: --config.stages.masked.batch_size=64",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="the recipe, as configs/x.py"
    )
    parser.add_argument("--workdir", metavar="DIR", help="where the run keeps everything it makes")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print every parameter and where each config value comes from, and exit",
    )
    parser.add_argument(
        "--allow_change",
        default="",
        metavar="KEYS",
        help="config keys that may differ from those the workdir was made with",
    )
    add_process_flags(parser)
    arguments = parser.parse_args(rest)
    if not arguments.workdir and not arguments.explain:
        parser.error("the following arguments are required: --workdir")
    arguments.allow_change = [key for key in arguments.allow_change.split(",") if key]
    return arguments, overrides


@contextlib.contextmanager
def errors_for_people(*kinds: type[Exception]) -> Iterator[None]:
    """Prints mistakes of the user without a traceback, and exits with the error's code.

    INVIDEO_JAX_TRACEBACK=1 shows the traceback.

    Args:
        kinds: further exceptions that are the user's here (ValueError while the run is set up).
    """
    try:
        yield
    except Exception as error:
        code = getattr(error, "exit_code", 2 if isinstance(error, kinds) else None)
        if code is None or os.environ.get("INVIDEO_JAX_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            # A normal exit waits for the other processes in JAX's barrier, and its code would be lost.
            runtime.leave(code)
        raise SystemExit(code) from None
