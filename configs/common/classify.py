"""A stage of classification: fine-tuning, attentive and linear probes; and the data sets' settings."""

import ml_collections

from configs.common.masked import masked_stage

TRUNK = r"^encoder/(patch_embed|cls_token|position_\w+|stack)(/|$)"
POOL = r"^encoder/pool/"
NEW_HEAD = (r"^(fc_norm|head)/",)  # parameters that no pretraining has
NEW_CAT_HEAD = (r"^(fc_norm|head|down|down_norm)/",)  # the same, of the variant 'cat'
NEW_ATTENTIVE_HEAD = (r"^(fc_norm|head|extra_mlp)/",)  # of the variant 'attentive'
# What is taken of another model's encoder. Its paths begin with 'encoder/' in models of pretraining, with
# 'vision/encoder/' in those of video and text, and with nothing where a file holds the encoder alone.
ENCODER = r"(vision/)?(encoder/)?(?=(patch_embed|cls_token|position_\w+|stack|pool)(/|$))"
TO_ENCODER = f"^{ENCODER}->encoder/"
NOT_TAKEN = f"^(?!{ENCODER})"  # heads, decoders, VideoMAE's last norm, stage 2's table for images

CLASSES = dict(
    k710=710, k400=400, k600=600, k700=700, mit=339, ssv1=174, ssv2=174, anet=200, hacs=200,
    ucf101=101, hmdb51=51,
)  # fmt: skip


def classify_stage() -> ml_collections.ConfigDict:
    """A stage of classification with what the published fine-tuning scripts have in common.

    Source: InternVideo2 single_modality/run_finetuning.py and its scripts.
    """
    stage = masked_stage()
    del stage.mask, stage.target
    stage.step = "classify"
    stage.objective = "labels"
    stage.batch_size = 512  # clips, not videos
    stage.clip.frames = 8
    stage.clip.sampling = "segments_inclusive"
    stage.clip.crop = "random_resized"
    stage.clip.randaugment = "rand-m7-n4-mstd0.5-inc1"
    stage.clip.erase = 0.25
    stage.clip.repeats = 2  # clips of each video, in one batch; an epoch is that many times as long

    stage.head = ml_collections.ConfigDict()
    stage.head.classes = 400
    stage.head.variant = "plain"  # 'attentive': a residual MLP before the head; 'cat': see `merge`
    stage.head.merge = "proj"  # of 'cat': what is put side by side, e.g. 'cls_avgN_proj'
    stage.head.merge_norm = "kaiming_BN"  # of 'cat': or 'BN' or 'LN'
    stage.head.dropout = 0.0
    stage.head.init_scale = 0.001
    stage.head.eps = 1e-5  # of the norm before the head

    stage.smoothing = 0.1  # of the labels
    stage.mix = ml_collections.ConfigDict()
    stage.mix.mixup = 0.8  # alpha of the Beta distribution; 0: none
    stage.mix.cutmix = 1.0
    stage.mix.probability = 1.0  # of mixing at all
    stage.mix.switch = 0.5  # of CutMix rather than mixup
    stage.mix.group = 0  # clips that share one draw, and are each other's partners; 0: the batch

    stage.optimizer.b2 = 0.999
    stage.optimizer.learning_rate = 5e-5
    stage.schedule.warmup_start = 1e-6
    stage.schedule.final = 1e-6
    return stage


def evaluation() -> ml_collections.ConfigDict:
    """One view of each video during training; `python -m invideo_jax.evaluate` takes them all."""
    one = dict(every="1 epochs", examples=1_000_000, clips=1, crops=1)
    return ml_collections.ConfigDict(
        dict(classification=one, multi_view=one | dict(every="0 steps", clips=4, crops=3))
    )


def put(
    c: ml_collections.ConfigDict,
    *,
    data: str,
    gpus: int,
    rows: int,
    epochs: float,
    rate: float,
    warmup: float = 0,
    final: float = 1e-6,
    repeats: int = 2,
    layer_decay: float = 1.0,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    weight_decay: float = 0.05,
    views: tuple[int, int] = (4, 3),
) -> None:
    """Writes the values of one published script into a recipe.

    Args:
        data: key of `CLASSES`.
        gpus, rows: published number of GPUs, and videos of each; one draw of the mixing serves a GPU.
        rate, final: base learning rates, for 256 clips.
        repeats: clips of each video.
        views: (clips, crops) of the test.
    """
    stage = c.stages.finetune
    stage.head.classes = CLASSES[data]
    stage.head.dropout = dropout
    stage.batch_size = gpus * rows * repeats
    stage.clip.repeats = repeats
    stage.mix.group = rows * repeats
    stage.length = f"{epochs} epochs"
    stage.schedule.warmup = f"{warmup} epochs"
    stage.schedule.final = final
    stage.optimizer.learning_rate = rate
    stage.optimizer.weight_decay = weight_decay
    stage.optimizer.layer_decay = layer_decay
    c.model.drop_path = drop_path
    c.evals.multi_view.clips, c.evals.multi_view.crops = views
    if data in ("ssv1", "ssv2", "hmdb51"):
        stage.clip.sampling = "tsn_padded"
    if data in ("ssv1", "ssv2"):
        stage.clip.flip = 0.0  # left and right are in the labels


def from_pretraining(stage: ml_collections.ConfigDict) -> None:
    """Takes the encoder of any run or file of pretraining, which says for how many frames it is."""
    stage.init.fresh = NEW_HEAD
    stage.init.rename = (TO_ENCODER,)
    stage.init.leftover = (NOT_TAKEN,)


def from_classes(stage: ml_collections.ConfigDict, data: str, *, old: str = "k710") -> None:
    """Takes a whole classifier; its head too, where the classes are among the old ones.

    K400 is the first 400 classes of K710; K600 and K700 need `init.label_map`, a JSON list of numbers of
    K710's classes, which the published code ships with its data.
    """
    if data == "k400":
        stage.init.label_map = "first"
    elif old != "k710" or data not in ("k600", "k700"):
        stage.init.fresh = (r"^head/",)


def smoke_stage(stage: ml_collections.ConfigDict) -> None:
    """Sizes of the built-in dataset."""
    stage.head.classes = 15
    stage.mix.group = 0
