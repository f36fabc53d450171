"""Features of videos: `python -m invideo_jax.features --checkpoint=DIR --videos=LIST --output=FILE`.

One row for each video, or for each window of it, to a .safetensors or .parquet file. The same command
goes on where it was stopped. Videos that cannot be read are listed in OUTPUT.bad.jsonl.
"""

import math
import os
import pathlib
import sys

import jax

from invideo_jax import command_line, runtime, sharding, workdir
from invideo_jax.data.decode import Limits
from invideo_jax.data.scaling import INTERPOLATIONS
from invideo_jax.data.sources import open_source
from invideo_jax.features import encoder as encoders
from invideo_jax.features import extract, store, windows
from invideo_jax.programs.base import compute_dtype

STRICT = 1  # exit code of --strict where a video is bad
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    with command_line.errors_for_people(ValueError):
        given = _arguments(sys.argv[1:] if argv is None else argv)
        try:
            summary = _run(given)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on with {given.output}", file=sys.stderr)
            return INTERRUPTED
    output = pathlib.Path(given.output)
    print(f"{summary.rows:,} rows of {summary.videos:,} videos in {output}")
    if summary.padded:
        print(f"{summary.padded:,} windows have fewer frames than a clip: some are repeated")
    if summary.truncated:
        print(f"{summary.truncated:,} videos end before their declared length: used up to there")
    if summary.bad:
        reasons = ", ".join(
            f"{reason} {count}" for reason, count in sorted(summary.reasons.items())
        )
        print(f"{summary.bad:,} videos could not be read ({reasons}): {store.bad_file(output)}")
    return STRICT if given.strict and summary.bad else runtime.FINISHED


def _run(given) -> extract.Summary:
    output = pathlib.Path(given.output)
    rule = windows.Rule(
        given.window_seconds, given.stride_seconds, given.window_frames, given.stride_frames
    )
    kinds = encoders.parse_kinds(given.kind)
    options = {"split": given.split} if given.split else {}
    roots = tuple(root for root in given.roots.split(",") if root)
    source = open_source(given.videos, roots=roots, roots_option="--roots", **options)
    for note in source.notes:
        print(f"note: {note}")
    store.check_output(output, ())
    mesh = sharding.make_mesh(data=-1, fsdp=given.fsdp, devices=jax.local_devices())
    unit = mesh.shape["data"] * mesh.shape["fsdp"]
    encoder = encoders.open_encoder(
        given.checkpoint,
        mesh,
        ema=given.weights == "ema",
        frames=given.frames,
        size=given.size,
        dtype=compute_dtype(given.dtype),
    )
    print(encoder.note)
    request = extract.Request(
        kinds=kinds,
        layers=encoders.parse_layers(given.layer, encoder.module.depth),
        rule=rule,
        crop=given.crop,
        interpolation=given.interpolation,
        batch_size=math.ceil(given.batch_size / unit) * unit,
        stored=given.store,
    )
    limits = Limits(
        max_pixels=int(given.max_megapixels * 1e6),
        max_seconds=given.max_hours * 3600,
        decode_seconds=given.decode_seconds,
    )
    with workdir.Lock(store.parts_folder(output)):
        return extract.extract(
            encoder,
            source,
            output,
            request,
            mesh=mesh,
            limits=limits,
            threads=given.threads,
            save_seconds=given.save_seconds,
        )


def _arguments(argv):
    parser = command_line.Parser(
        prog="python -m invideo_jax.features", description=__doc__.split("`")[0].strip(": ")
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="workdir, WORKDIR@STEP, or imported weights",
    )
    add(
        "--videos",
        required=True,
        metavar="LIST",
        help="a folder, a manifest, or another data source",
    )
    add("--output", required=True, metavar="FILE", help="a .safetensors or .parquet file")
    add("--kind", default="clip", help="some of clip,frame,token (default clip)")
    add(
        "--layer",
        default=encoders.FINAL,
        help="'final' (default), or blocks: -1 is the last one; several by commas, as final,-7",
    )
    add("--window_seconds", type=float, default=0.0, help="length of a window; 0: whole videos")
    add("--stride_seconds", type=float, default=0.0, help="between windows; 0: their length")
    add("--window_frames", type=int, default=0, help="the same, in frames as stored")
    add("--stride_frames", type=int, default=0)
    add("--frames", type=int, default=0, help="of a clip; 0: as the model was made for")
    add(
        "--size", type=int, default=0, help="side of a clip in pixels; 0: as the model was made for"
    )
    add("--crop", choices=("center", "resize"), default="center", help="resize: all of the picture")
    add("--interpolation", choices=tuple(INTERPOLATIONS), default="bilinear")
    add("--batch_size", type=int, default=8, help="clips computed together, over all local devices")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the computation",
    )
    add("--store", choices=("float32", "float16"), default="float32", help="of the output")
    add("--weights", choices=("ema", "params"), default="ema", help="ema: where the run keeps one")
    add("--fsdp", type=int, default=1, help="devices that share one copy of the parameters")
    add("--split", default="", help="rows of this split only")
    add("--roots", default="", help="more folders that paths of a manifest may lead to, by commas")
    add("--threads", type=int, default=min(os.cpu_count() or 1, 8), help="videos decoded at a time")
    add(
        "--save_seconds", type=float, default=30.0, help="longest time of work that a kill can lose"
    )
    add("--strict", action="store_true", help="exit with 1 if a video could not be read")
    add("--max_megapixels", type=float, default=10.0, help="a larger picture is a bad video")
    add("--max_hours", type=float, default=6.0, help="a longer video is a bad one")
    add(
        "--decode_seconds",
        type=float,
        default=20.0,
        help="of CPU time, for some windows of a video",
    )
    given = parser.parse_args(argv)
    for name in ("frames", "size", "batch_size", "threads", "fsdp", "save_seconds"):
        least = 1 if name in ("batch_size", "threads", "fsdp") else 0
        if getattr(given, name) < least:
            parser.error(f"--{name} must be at least {least}; got --{name}={getattr(given, name)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
