"""A stage of cross-model attention."""

import ml_collections

from configs.common.classify import classify_stage


def fusion_stage() -> ml_collections.ConfigDict:
    """Two frozen encoders, modules between them, and heads, trained on action labels.

    `model` is the masked encoder. Nothing of this stage is published but what is frozen and what is
    trained; the settings are this project's.

    Source: InternVideo (arXiv:2212.03191) 3.3.
    """
    stage = classify_stage()
    del stage.head
    stage.objective = "fused"
    stage.length = "10 epochs"
    stage.batch_size = 256
    stage.clip.frames = 16
    stage.clip.repeats = 1
    stage.classes = 400
    stage.mix.mixup = 0.0
    stage.mix.cutmix = 0.0

    stage.multimodal = ml_collections.ConfigDict()
    stage.multimodal.name = "uniformer_v2"  # or 'clip'
    stage.multimodal.size = "B"
    stage.multimodal.frames = 8  # every second of the clip's

    stage.fusion = ml_collections.ConfigDict()
    stage.fusion.modules = (
        4  # after the multimodal encoder's last blocks, and evenly spaced masked ones
    )
    stage.fusion.heads = 16
    # 'R2': the masked encoder asks in all modules but the last, where the class token does. 'R1': the reverse.
    stage.fusion.reading = "R2"
    stage.fusion.directions = ()  # 'to_masked' or 'to_multimodal' for each module; (): as `reading` says

    stage.optimizer.learning_rate = 1e-4
    stage.schedule.warmup = "1 epochs"
    return stage


def smoke_fusion(stage: ml_collections.ConfigDict) -> None:
    """A small multimodal encoder, the classes of the built-in dataset, and a fresh start."""
    stage.init.fresh = stage.init.rename = stage.init.leftover = ()
    stage.classes = 15
    stage.multimodal.size = "Micro"
    stage.multimodal.frames = 4
    stage.fusion.modules = 2
    stage.fusion.heads = 2
