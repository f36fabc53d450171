"""`python -m invideo_jax.report WORKDIR`: makes WORKDIR/report/index.html again."""

import argparse
import sys

from invideo_jax.errors import UserError
from invideo_jax.report import page


def main(arguments: list[str] | None = None) -> int:
    """Makes the report and says where it is; 2 when the user has to mend something."""
    parser = argparse.ArgumentParser(prog="python -m invideo_jax.report", description=__doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder of a run")
    options = parser.parse_args(arguments)
    try:
        print(page.write(options.workdir))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
