"""The model card of exported weights."""

import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from invideo_jax.interop import models
from invideo_jax.interop.leaves import Leaf
from invideo_jax.models import pixels

_OWN = """```python
import sys

import torch

sys.path.insert(0, "FOLDER")
from model import load

model = load("FOLDER")  # frames=, image_size= for other clips
out = model(torch.randn(1, {channels}, {frames}, {size}, {size}))  # normalised
print({{name: tuple(x.shape) for name, x in out.items()}})
```

`python model.py onnx FILE` writes an ONNX file; `torch.compile(model)` works as it is."""
_HF = """```python
from transformers import {kind}

model = {kind}.from_pretrained("FOLDER")
```"""


def text(
    model: nn.Module, meta: Mapping[str, Any], found: Mapping[str, Any], state: Mapping[str, Leaf]
) -> str:
    """README.md of an exported folder.

    Args:
        meta: of the weights: 'step', 'stage', 'config' of a run, 'source' of imported ones.
        found: what the certificate says.
        state: of the exported weights.
    """
    encoder, _ = models.encoder_of(model)
    count = sum(int(np.prod(x.shape, dtype=np.int64)) for x in state.values())
    kinds = ", ".join(sorted({str(x.dtype) for x in state.values()}))
    mean, std = pixels.constants(encoder.normalisation)
    rounded = lambda row: ", ".join(f"{x:.4g}" for x in row)
    hf = found["layout"].startswith("videomae_hf")
    kind = (
        "VideoMAEForVideoClassification"
        if "classification" in found["layout"]
        else "VideoMAEForPreTraining"
    )
    use = _HF.format(kind=kind)
    if not hf:
        use = _OWN.format(channels=encoder.channels, frames=encoder.frames, size=encoder.image_size)
    if not hf and "model.py" not in found["files"]:
        use = "The keys are those of the published model, whose own code loads them."
    parts = [
        "---",
        f"library_name: {'transformers' if hf else 'pytorch'}",
        "tags: [video, invideo_jax]",
        "---",
        f"# {found['model']}, layout {found['layout']}",
        f"{count:,} numbers ({kinds}). Clips: {encoder.frames} frames of {encoder.image_size} x "
        f"{encoder.image_size} pixels, RGB in [0, 1], minus ({rounded(mean)}), divided by "
        f"({rounded(std)}).",
        "## Use",
        use,
        "## JAX and PyTorch",
        _parity(found),
        "## Where the weights come from",
        _origin(meta),
        "## Model",
        f"```json\n{json.dumps(models.describe(model), indent=1)}\n```",
    ]
    if "config" in meta:
        recipe = json.dumps(meta["config"], indent=1, default=str)
        parts += ["## Recipe", f"```json\n{recipe}\n```"]
    return "\n\n".join(parts[4:]).join(["\n".join(parts[:4]) + "\n\n", "\n"])


def _parity(found: Mapping[str, Any]) -> str:
    checked = found["checked"]
    if "not" in checked:
        return f"Not checked: {checked['not']}."
    rows = [f"| {name} | {gap:.2e} |" for name, gap in checked["differences"].items()]
    return "\n".join(
        [
            "On the input in certificate.safetensors, both in float32:",
            "",
            "| output | largest difference |",
            "| --- | --- |",
            *rows,
            "",
            "`python -m invideo_jax.interop.verify FOLDER` checks it again.",
        ]
    )


def _origin(meta: Mapping[str, Any]) -> str:
    if "step" in meta:
        return f"Trained with invideo_jax: stage {meta.get('stage')!r}, step {meta['step']}, " + (
            f"{meta.get('weights', 'trained')} weights."
        )
    lines = [f"- {name}: sha256 {digest}" for name, digest in meta.get("source", {}).items()]
    return "\n".join(["Imported from:", "", *lines]) if lines else "Not said."
