"""`python -m invideo_jax.report WORKDIR`: makes WORKDIR/report/index.html again."""

import sys

from invideo_jax import command_line, report


def main(argv: list[str] | None = None) -> int:
    """Makes the report and prints where it is; mistakes of the user end with code 2."""
    with command_line.errors_for_people():
        parser = command_line.Parser(
            prog="python -m invideo_jax.report",
            description="Makes WORKDIR/report/index.html from what a run left in WORKDIR.",
        )
        parser.add_argument("workdir", metavar="WORKDIR", help="the folder of a run")
        print(report.build(parser.parse_args(argv).workdir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
