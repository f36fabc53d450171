"""What goes with exported weights to show that PyTorch gives the numbers of JAX, and its check.

certificate.safetensors    'video' [B, C, T, H, W], of models with text 'ids' and 'valid' [B, L], and
                           'jax/<name>': what JAX gives for them
certificate.json           hashes of all files, and the largest differences, or why there are none
"""

import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import unflatten_dict

from invideo_jax.errors import UserError
from invideo_jax.interop import models, safetensors_io
from invideo_jax.interop.leaves import Leaf, cast

TEXT, TENSORS = "certificate.json", "certificate.safetensors"
# Largest difference allowed, as a share of the largest number of that output (of 1, where that is
# less): float32 noise is 2e-6 after 12 blocks, and grows with depth.
BOUND = 1e-4
COMPARED = ("internvideo2", "aligned", "projected", "classifier", "video_mae", "video_mae_encoder")
COMPARED += ("stage2", "video_clip", "bert", "clip_text")
_LENGTH = 12  # of the text that is compared, its padding included


def issue(
    folder: pathlib.Path,
    model: nn.Module,
    params: Mapping[str, Leaf],
    *,
    dtype: str,
    text: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the certificate of a finished export, and checks it where PyTorch is there.

    Args:
        params: as they were before export.
        dtype: that weights were exported in; both sides compute in float32 with weights so rounded.
        text: the model, as `models.describe` gives it, and the layout.

    Returns:
        What certificate.json holds.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name not in (TEXT, TENSORS))
    found = dict(text, bound=BOUND, dtype=dtype, jax=importlib.metadata.version("jax"))
    if compared(text):
        tensors = inputs = _inputs(model)
        arrays = _in_float32(params, dtype)
        out = models.embed(model, unflatten_dict(arrays, sep="/"), **inputs)
        del arrays
        if "video" in inputs:
            video = np.ascontiguousarray(inputs["video"].transpose(0, 4, 1, 2, 3))
            tensors = inputs | {"video": video}
        tensors |= {f"jax/{name}": value for name, value in out.items()}
        safetensors_io.write(folder / TENSORS, tensors)
        files.append(folder / TENSORS)
    found["files"] = {p.name: safetensors_io.sha256(p) for p in files}
    found["checked"] = _compared(folder, found)
    (folder / TEXT).write_text(json.dumps(found, indent=1) + "\n")
    return found


def compared(text: Mapping[str, Any]) -> bool:
    """Whether `torch_model` has this model, 'model', 'arguments' and 'layout', under these names."""
    a = text["arguments"]
    if text["model"] == "video_clip":
        return (a["vision"]["model"], a["text"]["model"]) == ("projected", "clip_text")
    if text["model"] == "clip_text":
        return text["layout"] != "clip_text_hf" and a["output_width"] > 0
    if text["model"] == "bert":
        return a["fusion_from"] == a["depth"]
    if text["model"] == "stage2":
        return not a["fusion_width"]
    return text["model"] in COMPARED


def _inputs(model: nn.Module) -> dict[str, np.ndarray]:
    """Arguments of `models.embed`: one clip, one text whose last quarter is padding."""
    rng, found = np.random.default_rng(0), {}
    if models.sees_video(model):
        encoder, _ = models.encoder_of(model)
        shape = (1, encoder.frames, encoder.image_size, encoder.image_size, encoder.channels)
        found["video"] = rng.normal(size=shape).astype(np.float32)
    text = models.text_tower(model)
    if text is None:
        return found
    length = min(_LENGTH, text.positions)
    real = max(1, length * 3 // 4)
    ids = rng.integers(1, text.vocabulary - 1, (1, length))
    if hasattr(text, "pad"):
        ids[:, real:] = text.pad
        return found | {"ids": ids, "valid": np.arange(length)[None] < real}
    ids[:, real - 1], ids[:, real:] = text.vocabulary - 1, 0
    return found | {"ids": ids}


def _in_float32(params: Mapping[str, Leaf], dtype: str) -> dict[str, np.ndarray]:
    rounded = {p: x if dtype == "keep" else cast(x, np.dtype(dtype)) for p, x in params.items()}
    return {path: cast(x, np.float32).read() for path, x in rounded.items()}


def _compared(folder: pathlib.Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """{'differences': {name: number}, 'torch': version}, or {'not': why}."""
    if TENSORS not in found["files"]:
        what = f"a model {found['model']!r} of layout {found['layout']!r}"
        return {"not": f"this package has no PyTorch module for {what}"}
    needed = ["torch", "transformers"] if found["layout"].startswith("videomae_hf") else ["torch"]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return {"not": f"{' and '.join(absent)} not installed (pip install 'invideo-jax[torch]')"}
    gaps, shares = differences(folder, found)
    return {
        "differences": gaps,
        "shares": shares,
        "torch": importlib.metadata.version("torch"),
    }


def differences(
    folder: pathlib.Path, found: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """Largest absolute differences between JAX and PyTorch for each output.

    Returns:
        Of each output; the same as a share of its largest number (of 1, where that is less).

    Raises:
        UserError: PyTorch gives no such output, or of another shape.
    """
    stored = {name: x.read() for name, x in safetensors_io.read(folder / TENSORS).items()}
    run = _hf if found["layout"].startswith("videomae_hf") else _own
    inputs = {name: x for name, x in stored.items() if not name.startswith("jax/")}
    got = run(folder, inputs, found)
    gaps, shares = {}, {}
    for key, want in stored.items():
        name = key.removeprefix("jax/")
        if name == key:
            continue
        if name not in got or got[name].shape != want.shape:
            raise UserError(f"{folder}: PyTorch gives no {name!r} of shape {want.shape}.")
        gap = np.abs(got[name].astype(np.float64) - want)
        gaps[name] = float(gap.max()) if np.isfinite(gap).all() else float("inf")
        shares[name] = gaps[name] / max(1.0, float(np.abs(want).max()))
    return gaps, shares


def _own(
    folder: pathlib.Path, inputs: Mapping[str, np.ndarray], _found: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """With this package's copy of model.py: a file of the folder is never run."""
    import torch

    from invideo_jax.interop import torch_model

    model = torch_model.load(folder, dtype=torch.float32)
    out = model(**{name: torch.from_numpy(x) for name, x in inputs.items()})
    return {name: x.numpy() for name, x in out.items()}


def _hf(
    folder: pathlib.Path, inputs: Mapping[str, np.ndarray], found: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """With transformers."""
    import torch
    import transformers

    pixels = torch.from_numpy(np.ascontiguousarray(inputs["video"].transpose(0, 2, 1, 3, 4)))
    classes = found["layout"].endswith("classification")
    kind = "VideoMAEForVideoClassification" if classes else "VideoMAEForPreTraining"
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = model.videomae(pixels).last_hidden_state
        out = {"tokens": tokens, "pooled": tokens.mean(1)}
        if classes:
            out["logits"] = model(pixels).logits
    return {name: x.numpy() for name, x in out.items()}


def verify(folder: str | pathlib.Path, log: Callable[[str], Any] = print) -> bool:
    """Checks an exported folder again: every file's hash, then the outputs in PyTorch.

    Nothing of the folder is run: outputs are computed by this package's own copy of model.py.

    Returns:
        Whether everything holds; `log` gets the reasons.

    Raises:
        UserError: no certificate there.
    """
    folder = pathlib.Path(folder)
    try:
        found = json.loads((folder / TEXT).read_text())
        files, bound = dict(found["files"]), float(found["bound"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} must hold a {TEXT} that can be read: {error}. Give a folder that to_torch wrote."
        ) from error
    for name, digest in files.items():
        if pathlib.Path(name).name != name or not (folder / name).is_file():
            log(f"FAIL {name}: the certificate names it, it is not there")
            return False
        if safetensors_io.sha256(folder / name) != digest:
            log(f"FAIL {name}: its content is not that of the certificate")
            return False
    log(f"ok   {len(files)} files are those of the certificate")
    own = safetensors_io.sha256(pathlib.Path(__file__).with_name("torch_model.py"))
    if files.get("model.py", own) != own:
        log("note: model.py is of another version; the outputs below are of this version's")
    checked = _compared(folder, found)
    if "not" in checked:
        log(f"FAIL outputs not checked: {checked['not']}")
        return False
    good = True
    for name, gap in checked["differences"].items():
        share = checked["shares"][name]
        good &= share <= bound
        log(
            f"{'ok  ' if share <= bound else 'FAIL'} {name}: largest difference {gap:.2e}, {share:.1e} of "
            f"its largest number (bound {bound:.0e})"
        )
    return good
