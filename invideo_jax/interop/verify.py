"""Checks exported weights again: `python -m invideo_jax.interop.verify DIR`."""

import sys
from collections.abc import Sequence

from invideo_jax import command_line
from invideo_jax.interop import certificate


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 where everything holds, else 1."""
    with command_line.errors_for_people(OSError):
        parser = command_line.Parser(
            prog="python -m invideo_jax.interop.verify",
            description="Checks the hashes of all files, then PyTorch's outputs against JAX's.",
        )
        parser.add_argument("folder", metavar="DIR", help="a folder that to_torch wrote")
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
        good = certificate.verify(arguments.folder)
        print("verified" if good else "NOT verified")
        return 0 if good else 1
    return 2


if __name__ == "__main__":
    sys.exit(main())
