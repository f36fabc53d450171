"""A stage that aligns video, text, sound and speech: InternVideo2's second stage, CLIP, ViCLIP."""

import ml_collections

from configs.common.aligned import clip_teacher
from configs.common.classify import ENCODER
from configs.common.masked import masked_stage

# What no pretraining before stage 2 has. Attention of texts to video starts fresh where BERT is imported.
FRESH_IN_STAGE2 = (
    r"^(vision|text|audio)_(projection|tokens)/",
    r"^((av_|audio_)?match_head|av_fusion)/",
    r"^(temperature|bias)$",
)


def take_encoder(stage: ml_collections.ConfigDict, part: str = "vision") -> None:
    """Takes the vision encoder of `part` of the source, a model of any stage or an encoder alone."""
    stage.init.rename = (f"^{part}/{ENCODER}->vision/encoder/",)
    stage.init.leftover = (f"^{part}/(?!{ENCODER})",)


def contrastive_stage() -> ml_collections.ConfigDict:
    """InternVideo2's second stage, with the values of the 1B model.

    Source: InternVideo2 (arXiv:2403.15377) 3.3; multi_modality/scripts/pretraining/stage2/1B/config.py.
    """
    stage = masked_stage()
    del stage.target
    stage.step = "contrastive"
    stage.objective = "fused"  # 'towers': two towers and nothing that looks at both
    stage.length = "10 epochs"
    stage.batch_size = 64 * 64
    stage.clip.frames = 4
    stage.clip.sampling = "rand"
    stage.clip.crop = "random_resized"
    stage.clip.crop_scale = (0.5, 1.0)
    stage.clip.interpolation = "bicubic"
    stage.image_positions = "average"  # or 'separate': images have a table of their own
    # Shares of the tokens that stay hidden, of videos and of images; 0 hides none.
    stage.mask = ml_collections.ConfigDict(dict(name="random", video=0.8, image=0.5))

    stage.text = ml_collections.ConfigDict()
    # A file or folder: `python -m invideo_jax.tokenizer` makes one; or those of a published model.
    stage.text.tokenizer = ""
    stage.text.length = 32  # tokens; longer texts are cut
    stage.text.normalise = (
        "internvideo2"  # as published, without case and punctuation; '': as they are
    )
    stage.text.prefix = ""  # stands before every text
    stage.text.min_words = 1  # a text of fewer counts as none
    # What the towers were built for; a tokenizer that says otherwise is an error.
    stage.text.vocabulary = 30522
    stage.text.unused = 0  # rows at the end of the table of words that may stand for no token
    stage.text.pad = 0
    stage.text.first = 101  # never hidden; -1: it has none
    stage.text.mask = 103  # stands for hidden words; -1: it has none
    # Which text of an example each view of it is paired with: 'video', 'audio', 'audio_video', 'fused', 'speech';
    # 'fused|video': the first there is; 'video+audio': one of them at random; '': none.
    stage.text.of = ml_collections.ConfigDict(
        dict(video="video", audio="", audio_video="", speech="")
    )

    stage.text_tower = ml_collections.ConfigDict()
    stage.text_tower.name = "bert"  # or 'clip', 'llama'
    stage.text_tower.size = "L"
    stage.text_tower.dropout = 0.1

    stage.audio = ml_collections.ConfigDict()
    stage.audio.name = ""  # 'beats' or 'audio_vit'; '': no sound
    stage.audio.size = "B"
    stage.audio.seconds = 10.0
    stage.audio.mels = 64
    stage.audio.silence = False  # whether a track of zeros counts as sound

    stage.shared = ml_collections.ConfigDict()
    # Of the space that all modalities meet in; 0, with projection='pool': as wide as the encoder's pool.
    stage.shared.width = 512
    # Of the tokens that texts look at, after a projection of each tower's; 0: the vision tower's own.
    stage.shared.fusion_width = 0
    stage.shared.temperature = 0.07  # at the start
    stage.shared.coldest = 0.001  # what the temperature is held within
    stage.shared.warmest = 0.5  # 0: no end
    stage.shared.logarithmic = False  # learn log(1 / temperature), as CLIP does
    # Of 'towers', from the pooled vector into that space: 'pool' (it is there already) or 'norm' (LayerNorm, Linear).
    stage.shared.projection = "pool"

    # Factors of the losses; one of factor 0 is not computed. Contrastive (c), matching (m), and masked language
    # modelling (lm): of video (v), audio (a), both (av) with their texts, of speech (vs) and audio (av) with video; and
    # stage 1's alignment with a teacher.
    stage.losses = ml_collections.ConfigDict(
        dict(vtc=1.0, vtm=1.0, mlm=1.0, uta=0.0, atc=0.0, atm=0.0, amlm=0.0)
        | dict(avtc=0.0, avtm=0.0, avmlm=0.0, vsc=0.0, avc=0.0)
    )
    stage.contrast = ml_collections.ConfigDict()
    stage.contrast.kind = "softmax"  # or 'sigmoid'
    stage.contrast.bias = -10.0  # of the scores, at the start; 'sigmoid' alone has one
    stage.contrast.form = (
        "chunked"  # 'dense', 'chunked', 'ring': the same values, less and less memory
    )
    stage.contrast.chunk = 1024  # columns of scores at once
    # Two rows are positives of each other where they show the same example ('global'). The published code knows an
    # example by its row in its source ('corpus'), so that those of several collide.
    stage.contrast.positives = "global"
    stage.contrast.equal_texts = False  # also where they have the same text
    # The published code loses a factor 1 / processes of this loss's gradient.
    stage.contrast.gradient_factor = 1.0
    stage.words = ml_collections.ConfigDict()
    stage.words.ratio = 0.5  # share of words to predict
    stage.words.hidden = 0.8  # of them, share that is hidden
    stage.words.swapped = 0.5  # of the rest, share that is replaced by a random word
    stage.negatives = ml_collections.ConfigDict(dict(kind="hard", floor=0.0))  # VideoChat2: 1e-4

    # Of the loss 'uta' alone: stage 1's clip teacher.
    stage.teachers = ml_collections.ConfigDict(dict(clip=clip_teacher(), stride=1))
    stage.teachers.images_only = False

    stage.optimizer.learning_rate = 5e-5
    stage.optimizer.scale_by_batch = 0
    stage.optimizer.b2 = 0.98
    stage.optimizer.weight_decay = 0.05
    stage.optimizer.clip_norm = 3.0
    stage.schedule.warmup = "1 epochs"
    stage.schedule.final = 5e-7
    return stage


def two_towers() -> ml_collections.ConfigDict:
    """InternVideo2-CLIP: frozen towers that a pool and the temperature bring together.

    Source: InternVideo2 (arXiv:2403.15377) 3.3; multi_modality/scripts/pretraining/clip.
    """
    stage = contrastive_stage()
    stage.objective = "towers"
    stage.clip.frames = 8
    stage.mask.video = 0.0
    stage.mask.image = 0.0
    stage.text.length = 80
    stage.shared.width = 0
    stage.shared.temperature = 0.01
    stage.shared.coldest = 0.01
    stage.shared.warmest = 0.0
    stage.losses.vtm = 0.0
    stage.losses.mlm = 0.0
    # Trained are the encoder's pool, the projection behind it, and the temperature.
    stage.optimizer.freeze = (r"^vision/encoder/(?!pool/)", r"^text/")
    stage.optimizer.learning_rate = 4e-4
    stage.optimizer.weight_decay = 0.2
    stage.optimizer.clip_norm = 0.0
    stage.schedule.final = 4e-6
    return stage


def unmasked(stage: ml_collections.ConfigDict) -> None:
    """The step behind masked alignment: every token is seen, and the vision encoder stays as it is."""
    stage.length = "1 epochs"
    stage.schedule.warmup = "0.2 epochs"
    stage.mask.video = 0.0
    stage.mask.image = 0.0
    stage.optimizer.freeze = (*stage.optimizer.freeze, r"^vision/")
    stage.init.fresh = ()
    stage.init.rename = ()
    stage.init.leftover = ()


def clip_words(stage: ml_collections.ConfigDict) -> None:
    """CLIP's vocabulary and length of texts."""
    text = stage.text
    text.length, text.vocabulary, text.pad, text.first, text.mask = 77, 49408, 0, 49406, -1
    stage.text_tower.dropout = 0.0


def llama_words(stage: ml_collections.ConfigDict) -> None:
    """The vocabulary of chinese-alpaca, with InternVL-C's prompt."""
    text = stage.text
    text.length, text.vocabulary, text.pad, text.first, text.mask = 80, 49954, 0, 1, -1
    # tokenizer.model has 49,953 pieces; the token that was added by hand, [PAD], is not used: 0 pads.
    text.unused = 1
    text.prefix = "summarize:"
    stage.text_tower.dropout = 0.1


def smoke_contrastive(stage: ml_collections.ConfigDict) -> None:
    """Small towers, and bytes for words."""
    stage.text_tower.size = "Micro"
    stage.text.tokenizer = "bytes"
    stage.text.vocabulary, stage.text.unused = 260, 0
    stage.text.pad, stage.text.first, stage.text.mask = 0, 1, 3
    stage.text.length = 24
    if stage.audio.name:
        stage.audio.size = "Micro"
        stage.audio.seconds = 2.0
