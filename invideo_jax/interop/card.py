"""The model card of exported weights."""

import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from invideo_jax.interop import hf_config, models
from invideo_jax.interop.leaves import Leaf
from invideo_jax.models import pixels

_OWN = """```python
import sys

import torch

sys.path.insert(0, "FOLDER")
from model import load

model = load("FOLDER"){load}
{inputs}
out = model({names})
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
    count = sum(int(np.prod(x.shape, dtype=np.int64)) for x in state.values())
    kinds = ", ".join(sorted({str(x.dtype) for x in state.values()}))
    hf = found["layout"].startswith("videomae_hf")
    kind = (
        "VideoMAEForVideoClassification"
        if "classification" in found["layout"]
        else "VideoMAEForPreTraining"
    )
    if hf:
        use = _HF.format(kind=kind)
    elif "model.py" in found["files"]:
        use = _own(model)
    elif found["layout"] in hf_config.TEXT:
        use = _HF.format(kind=hf_config.text_config(model, found["layout"])["architectures"][0])
    else:
        use = "The keys are those of the published model, whose own code loads them."
    parts = [
        "---",
        f"library_name: {'transformers' if hf else 'pytorch'}",
        "tags: [video, invideo_jax]",
        "---",
        f"# {found['model']}, layout {found['layout']}",
        " ".join([f"{count:,} numbers ({kinds}).", *_clips(model), *_texts(model)]),
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


def _own(model: nn.Module) -> str:
    """How the model of the folder is used."""
    rows, video, text = [], models.sees_video(model), models.text_tower(model)
    if video:
        encoder, _ = models.encoder_of(model)
        shape = (
            f"1, {encoder.channels}, {encoder.frames}, {encoder.image_size}, {encoder.image_size}"
        )
        rows.append(f"video = torch.randn({shape})  # normalised")
    if text is not None:
        low = f"{text.vocabulary - min(8, text.positions)}"
        rows.append(f"ids = torch.arange({low}, {text.vocabulary})[None]  # of the tokeniser")
    names = ", ".join(row.split(" ")[0] for row in rows)
    load = "  # frames=, image_size= for other clips" if video else ""
    return _OWN.format(load=load, inputs="\n".join(rows), names=names)


def _clips(model: nn.Module) -> list[str]:
    if not models.sees_video(model):
        return []
    encoder, _ = models.encoder_of(model)
    mean, std = pixels.constants(encoder.normalisation)
    rounded = lambda row: ", ".join(f"{x:.4g}" for x in row)
    return [
        f"Clips: {encoder.frames} frames of {encoder.image_size} x {encoder.image_size} pixels, RGB in "
        f"[0, 1], minus ({rounded(mean)}), divided by ({rounded(std)})."
    ]


def _texts(model: nn.Module) -> list[str]:
    text = models.text_tower(model)
    if text is None:
        return []
    most = getattr(text, "positions", None)  # turned queries and keys know no last place
    return [f"Texts: {f'up to {most} ' if most else ''}ids of {text.vocabulary:,}."]


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
