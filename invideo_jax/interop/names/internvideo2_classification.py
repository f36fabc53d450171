"""InternVideo2 with a classification head: fine-tuning, attentive (`ap`) and linear (`cat`) probing."""

from invideo_jax.interop.names.internvideo2 import trunk
from invideo_jax.interop.names.rows import Layout, Row, linear, norm, optional

_EXTRA = [
    *norm("extra_mlp.0", "extra_mlp/norm"),
    *linear("extra_mlp.1.fc1", "extra_mlp/up"),
    *linear("extra_mlp.1.fc2", "extra_mlp/down"),
]
_MERGED = [
    *norm("down_norm", "down_norm"),
    Row("down_norm.running_mean", ("down_norm/mean",)),
    Row("down_norm.running_var", ("down_norm/variance",)),
    Row("down_norm.num_batches_tracked", ("down_norm/batches",), "count"),
    *linear("down.0", "down"),
]

LAYOUTS: dict[str, Layout] = {
    # OpenGVLab/InternVideo InternVideo2/single_modality/models/internvideo2{,_ap,_cat}.py
    "internvideo2_classification": Layout(
        (
            *trunk(ours="encoder/"),
            *optional(_EXTRA),
            *norm("fc_norm", "fc_norm"),
            *optional(_MERGED),
            *linear("head", "head"),
        ),
        prefixes=("backbone.", "encoder."),
    ),
}
