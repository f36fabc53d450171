"""How far the embeddings of an exported model are from JAX's, on real videos.

    python tests/benchmarks/bench_export.py --workdir=DIR --layout=NAME --videos=FOLDER_OR_MANIFEST

Exports the model, loads it again by the folder's own model.py in PyTorch, and gives both the same clips: one
of each video, decoded by the pipeline that features are made with. Prints for each output

    largest    its largest absolute number
    float32    largest absolute difference between JAX and PyTorch, both in float32
    bfloat16   the same, both with weights and computation in bfloat16
    JAX, torch largest difference between each one's bfloat16 and its own float32, to compare that with
"""

import importlib.util
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import unflatten_dict

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY)]

from invideo_jax import command_line  # noqa: E402
from invideo_jax.data.sources import open_source  # noqa: E402
from invideo_jax.data.transforms import ClipSpec  # noqa: E402
from invideo_jax.features.reading import Reading  # noqa: E402
from invideo_jax.features.windows import Rule  # noqa: E402
from invideo_jax.interop import models, to_torch  # noqa: E402
from invideo_jax.interop.leaves import cast  # noqa: E402
from invideo_jax.models import pixels  # noqa: E402

BATCH = 5


def read_clips(videos: str, frames: int, size: int, count: int) -> np.ndarray:
    """uint8 [n, T, S, S, 3]: the middles of equal parts of each video that can be read."""
    spec = ClipSpec(frames=frames, size=size, sampling="middle", views=1, crop="center", flip=0.0)
    with Reading(open_source(videos), Rule(), spec) as reading:
        clips = [item.clip for item in reading if item.clip is not None]
    return np.stack(clips[:count])


def in_jax(model, params, video: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Outputs by name, float32; weights and computation in `dtype`."""
    model = models.with_encoder(model, dtype=jnp.dtype(dtype))
    if hasattr(model, "dtype") and not hasattr(model, "patch"):
        model = model.clone(dtype=jnp.dtype(dtype))
    arrays = {path: cast(x, jnp.dtype(dtype)).read() for path, x in params.items()}
    return models.embed(model, unflatten_dict(arrays, sep="/"), video.astype(dtype))


def in_torch(folder: pathlib.Path, video: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The same by the folder's model.py."""
    spec = importlib.util.spec_from_file_location("exported_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load(folder, dtype=getattr(torch, dtype))
    turned = torch.from_numpy(np.ascontiguousarray(video.transpose(0, 4, 1, 2, 3)))
    return {name: x.float().numpy() for name, x in model(turned).items()}


def compare(workdir: str, layout: str, videos: str, count: int) -> None:
    """Prints the table."""
    params, meta = to_torch.open_workdir(workdir)
    model = models.make(meta)
    encoder, _ = models.encoder_of(model)
    clips = read_clips(videos, encoder.frames, encoder.image_size, count)
    print(f"{workdir}: {meta['model']}, {len(clips)} clips {clips.shape[1:]} of {videos}")
    mean, std = pixels.constants(encoder.normalisation)
    found: dict[tuple[str, str], list] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place, "export")
        to_torch.export(folder, params, meta, layout=layout)
        for first in range(0, len(clips), BATCH):
            video = ((clips[first : first + BATCH] / np.float32(255)) - mean) / std
            for dtype in ("float32", "bfloat16"):
                found.setdefault(("jax", dtype), []).append(in_jax(model, params, video, dtype))
                found.setdefault(("torch", dtype), []).append(in_torch(folder, video, dtype))
    outputs = {
        key: {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}
        for key, parts in found.items()
    }
    print(f"{'output':12} {'largest':>9} {'float32':>9} {'bfloat16':>9} {'JAX':>9} {'torch':>9}")
    for name, exact in outputs["jax", "float32"].items():
        of = lambda side, dtype, name=name: outputs[side, dtype][name]
        gap = lambda a, b: float(np.abs(a - b).max())
        row = (
            float(np.abs(exact).max()),
            gap(exact, of("torch", "float32")),
            gap(of("jax", "bfloat16"), of("torch", "bfloat16")),
            gap(of("jax", "bfloat16"), exact),
            gap(of("torch", "bfloat16"), of("torch", "float32")),
        )
        print(f"{name:12} " + " ".join(f"{x:9.2g}" for x in row))


def main() -> None:
    """Reads the arguments."""
    with command_line.errors_for_people():
        parser = command_line.Parser(description=__doc__)
        parser.add_argument("--workdir", required=True, help="of a run, or of from_torch")
        parser.add_argument("--layout", required=True, help="as of to_torch")
        parser.add_argument("--videos", required=True, help="folder or manifest")
        parser.add_argument("--clips", type=int, default=1000, help="at most so many")
        given = parser.parse_args()
        jax.config.update("jax_default_matmul_precision", "float32")
        compare(given.workdir, given.layout, given.videos, given.clips)


if __name__ == "__main__":
    main()
