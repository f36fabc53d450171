"""Models of the InternVideo2 and VideoMAE families in PyTorch; this file needs nothing else.

    from model import load
    model = load(".")                      # the folder with config.json and the weights
    out = model(video)                     # [B, C, T, H, W], normalised (config.json has the constants)
    out["tokens"], out["pooled"]           # and 'clip_final', 'projected', 'logits' where it has them

Models of video and text take `model(video, ids)`, and have `encode_video(video)` and `encode_text(ids)`,
each with an 'embedding'; stage 2 has `match` and `words` besides. Nothing is ever dropped here.

`load(".", frames=16, image_size=336)` interpolates learned positions. `python model.py onnx FILE`
writes an ONNX file; `torch.compile(model)` and `torch.export.export(model, (video,))` work.
Keys of the state dicts are those of the published models.
"""

import json
import pathlib
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """x / root mean square in float32, cast back, times a weight."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def attend(q, k, v, heads, scale=None, mask=None):
    """Attention of [B, N, D]; `scale` defaults to (D / heads)^-0.5; `mask` is True where to look."""
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(split(q), split(k), split(v), mask, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention. `bias`: False, True (one of q, k and v), or 'qv' (of q and v, VideoMAE's)."""

    def __init__(self, width, heads, bias=False, qk_norm=False, scale=None):
        super().__init__()
        self.heads, self.scale = heads, scale
        if bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=bias is True)
        self.proj = nn.Linear(width, width)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x):
        bias = self.qkv.bias
        if hasattr(self, "q_bias"):
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        if hasattr(self, "q_norm"):  # over all heads together
            q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(attend(q, k, v, self.heads, self.scale))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),  # of CLIP
    "relu": F.relu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width, hidden, activation="gelu", out=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out or width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor of each channel."""

    def __init__(self, width, wide):
        super().__init__()
        self.gamma, self.wide = nn.Parameter(torch.ones(width)), wide

    def forward(self, x):
        return (x.float() * self.gamma.float()).to(x.dtype) if self.wide else x * self.gamma


class Block(nn.Module):
    """InternVideo2's pre-norm block."""

    def __init__(self, a):
        super().__init__()
        width, wide = a["width"], a["layer_scale_float32"]
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = Attention(width, a["heads"], bool(a["qkv_bias"]), a["qk_norm"])
        self.mlp = Mlp(width, a["mlp_width"], a["activation"])
        scaled = bool(a["layer_scale"])
        self.ls1 = LayerScale(width, wide) if scaled else nn.Identity()
        self.ls2 = LayerScale(width, wide) if scaled else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class MAEBlock(nn.Module):
    """VideoMAE's pre-norm block."""

    def __init__(self, width, heads, hidden, a):
        super().__init__()
        self.scaled = bool(a["layer_scale"])
        if self.scaled:
            self.gamma_1 = nn.Parameter(torch.ones(width))
            self.gamma_2 = nn.Parameter(torch.ones(width))
        self.norm1, self.norm2 = (nn.LayerNorm(width, a["eps"]) for _ in range(2))
        bias = "qv" if a["qkv_bias"] else False
        self.attn = Attention(width, heads, bias, scale=a["scale"])
        self.mlp = Mlp(width, hidden, a["activation"])

    def forward(self, x):
        one, two = (self.gamma_1, self.gamma_2) if self.scaled else (1, 1)
        x = x + one * self.attn(self.norm1(x))
        return x + two * self.mlp(self.norm2(x))


class Patches(nn.Module):
    """Cubes of a video, projected: [B, C, T, H, W] to [B, N, D]."""

    def __init__(self, a):
        super().__init__()
        cube = (a["tubelet"], a["patch"], a["patch"])
        self.proj = nn.Conv3d(a["channels"], a["width"], cube, stride=cube)

    def forward(self, video):
        return self.proj(video.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class CrossAttention(nn.Module):
    """The attention of `Pool`; biases stand apart from weights, as published."""

    def __init__(self, width, heads, out):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.proj = nn.Linear(width, out)

    def forward(self, q, k, v):
        q, k, v = self.q(q) + self.q_bias, self.k(k) + self.k_bias, self.v(v) + self.v_bias
        return self.proj(attend(q, k, v, self.heads))


class Pool(nn.Module):
    """Attention of the mean token over all tokens, [B, N, D] to [B, P]."""

    def __init__(self, width, heads, out):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width, 1e-5) for _ in range(3))
        self.cross_attn = CrossAttention(width, heads, out)

    def forward(self, x):
        query = self.norm1_q(x.mean(1, keepdim=True))
        return self.cross_attn(query, self.norm1_k(x), self.norm1_v(x))[:, 0]


class Head(nn.Module):
    """Linear (or Linear, GELU, Linear), LayerNorm, length 1."""

    def __init__(self, width, spec):
        super().__init__()
        out = nn.Linear(width, spec["width"])
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), out) if spec["mlp"] else out
        self.norm, self.unit = nn.LayerNorm(spec["width"], 1e-5), spec["normalise"]

    def forward(self, x):
        x = self.norm(self.head(x)).float()
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12) if self.unit else x


def gather(x, ids):
    """Rows [B, V, D] of x [B or 1, N, D]."""
    x = x.expand(ids.shape[0], -1, -1)
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))


class InternVideo2(nn.Module):
    """The encoder, with what stands on it: alignment heads, or a classification head."""

    def __init__(self, a, clip=None, mae=None, final=None, classifier=None):
        super().__init__()
        self.a, width = a, a["width"]
        self.clip_blocks, self.mae_blocks = (x["blocks"] if x else () for x in (clip, mae))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self._tables("", 1)
        if clip:
            self._tables("clip_", 1)
        if mae:
            self._tables("mae_", 0)
        self.patch_embed = Patches(a)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a["depth"]))
        if a["pool_width"]:
            self.clip_projector = Pool(width, a["pool_heads"], a["pool_width"])
        if clip:
            self.clip_decoder = nn.ModuleList(Head(width, clip) for _ in clip["blocks"])
        if final:
            self.final_clip_decoder = Head(a["pool_width"], final)
        if mae:
            self.mae_decoder = nn.ModuleList(Head(width, mae) for _ in mae["blocks"])
        self.classifier = classifier
        if classifier:
            self._classifier(classifier)

    @property
    def grid(self):
        """(t, h, w) of the tokens."""
        side = self.a["image_size"] // self.a["patch"]
        return self.a["frames"] // self.a["tubelet"], side, side

    def _tables(self, name, first):
        (t, h, w), width = self.grid, self.a["width"]
        table = lambda rows: nn.Parameter(torch.zeros(1, rows, width))
        if self.a["positions"] == "joint":
            setattr(self, f"{name}pos_embed", table(first + t * h * w))
            if self.a["image_positions"] == "separate":
                setattr(self, f"{name}img_pos_embed", table(first + h * w))
            return
        setattr(self, f"{name}pos_embed_spatial", table(h * w))
        setattr(self, f"{name}pos_embed_temporal", table(t))
        if first:
            setattr(self, f"{name}pos_embed_cls", table(1))

    def positions(self, name, image, first=1):
        """[1, first+N, D], of one frame for images."""
        (t, h, w), get = self.grid, lambda key: getattr(self, name + key)
        if self.a["positions"] == "separate":
            space, time = get("pos_embed_spatial"), get("pos_embed_temporal")
            rows = space if image else (time[:, :, None] + space[:, None]).flatten(1, 2)
            return torch.cat([get("pos_embed_cls"), rows], 1) if first else rows
        if image and self.a["image_positions"] == "separate":
            return get("img_pos_embed")
        table = get("pos_embed")
        if not image:
            return table
        rows = table[:, first:].unflatten(1, (t, h * w)).mean(1)
        return torch.cat([table[:, :first], rows], 1)

    def forward(self, video, visible=None, features=()):
        """Features of a batch.

        Args:
            video: [B, C, T, H, W], normalised; T is 1 for images.
            visible: int64 [B, V], patches to see; None for all.
            features: blocks whose outputs [B, 1+V, D] are returned as 'block<i>'.
        """
        image = video.shape[2] == 1 != self.a["frames"]
        if image:
            video = video.expand(-1, -1, self.a["tubelet"], -1, -1)
        x, place = self.patch_embed(video), self.positions("", image)
        if visible is not None:
            x, place = gather(x, visible), self._seen(place, visible)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + place
        wanted, out = {*features, *self.clip_blocks, *self.mae_blocks}, {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in wanted:
                out[f"block{i}"] = x
        heads = self._heads(out, visible, image)
        out = {f"block{i}": out[f"block{i}"] for i in features} | {"tokens": x} | heads
        if self.a["pool_width"]:
            out["pooled"] = self.clip_projector(x)
        if hasattr(self, "final_clip_decoder"):
            out["clip_final"] = self.final_clip_decoder(out["pooled"])
        if self.classifier:
            out["logits"] = self.logits(x, out["pooled"])
        return out

    @staticmethod
    def _seen(place, visible, first=1):
        rows = gather(place[:, first:], visible)
        return torch.cat([place[:, :first].expand(len(visible), -1, -1), rows], 1)

    def _heads(self, blocks, visible, image):
        out = {}
        for name, first, numbers in (("clip", 1, self.clip_blocks), ("mae", 0, self.mae_blocks)):
            if not numbers:
                continue
            place = self.positions(f"{name}_", image, first)
            place = place if visible is None else self._seen(place, visible, first)
            heads = getattr(self, f"{name}_decoder")
            each = [
                head(blocks[f"block{i}"][:, 1 - first :] + place) for i, head in zip(numbers, heads)
            ]
            out["clip_middle" if first else "mae"] = torch.stack(each, 1)
        return out

    def _classifier(self, c):
        width, pool, t = self.a["width"], self.a["pool_width"], self.grid[0]
        if c["variant"] == "attentive":
            self.extra_mlp = nn.Sequential(nn.LayerNorm(pool, 1e-5), Mlp(pool, 4 * pool))
        self.fc_norm, inputs = nn.LayerNorm(pool, c["eps"]), pool
        if c["variant"] == "cat" and c["merge"] != "proj":
            channels, places = (pool, 1 + t) if "avgN" in c["merge"] else (width, 2)
            if "avgN" in c["merge"]:
                self.down = nn.Sequential(nn.Linear(width, pool), nn.GELU())
            norms = {
                "LN": lambda: nn.LayerNorm(channels, 1e-5),
                "BN": lambda: nn.BatchNorm1d(channels),
                "kaiming_BN": lambda: nn.BatchNorm1d(channels, affine=False, eps=1e-6),
            }
            self.down_norm = norms[c["merge_norm"]]()
            inputs = channels * places + pool * c["merge"].endswith("_proj")
        self.head = nn.Linear(inputs, c["classes"])

    def logits(self, x, pooled):
        """[B, classes] of tokens [B, 1+N, D] and their pooled vector."""
        c = self.classifier
        if hasattr(self, "extra_mlp"):
            pooled = pooled + self.extra_mlp(pooled)
        last = self.fc_norm(pooled)
        if hasattr(self, "down_norm"):
            slots = self.grid[0] if "avgN" in c["merge"] else 1
            merged = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (slots, -1)).mean(2)], 1)
            merged = self.down(merged) if hasattr(self, "down") else merged
            if c["merge_norm"] == "LN":
                merged = self.down_norm(merged)
            else:  # channel after channel, as published
                merged = self.down_norm(merged.transpose(1, 2))
            last = (
                torch.cat([merged.flatten(1), last], 1)
                if "proj" in c["merge"]
                else merged.flatten(1)
            )
        return self.head(last)


class ProjectedInternVideo2(nn.Module):
    """The vision side of InternVideo2-CLIP: 'projected' is in the space shared with text."""

    def __init__(self, a, width):
        super().__init__()
        self.vision_encoder = InternVideo2(a)
        pool = a["pool_width"]
        self.vision_align = nn.Sequential(nn.LayerNorm(pool, 1e-5), nn.Linear(pool, width))

    def forward(self, video, visible=None, features=()):
        out = self.vision_encoder(video, visible, features)
        return out | {"projected": self.vision_align(out["pooled"])}


def sinusoid(tokens, width):
    """VideoMAE's fixed positions [N, D]: sine on even, cosine on odd channels."""
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10000.0 ** (2 * (channel // 2) / width)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class MAEEncoder(nn.Module):
    """VideoMAE's encoder; with `classifier` the fine-tuned model."""

    def __init__(self, a, classifier=None):
        super().__init__()
        self.a, width = a, a["width"]
        self.patch_embed = Patches(a)
        self.blocks = nn.ModuleList(
            MAEBlock(width, a["heads"], a["mlp_width"], a) for _ in range(a["depth"])
        )
        if a["last_norm"]:
            self.norm = nn.LayerNorm(width, a["eps"])
        slots = a["frames"] // a["tubelet"] * (a["image_size"] // a["patch"]) ** 2
        self.register_buffer("place", sinusoid(slots, width), persistent=False)
        self.classifier = classifier
        if classifier:
            self.fc_norm = nn.LayerNorm(width, classifier["eps"])
            self.head = nn.Linear(width, classifier["classes"])

    def forward(self, video, visible=None, features=()):
        """As `InternVideo2.forward`; there is no class token."""
        x = self.patch_embed(video)
        x = x + self.place.to(x.dtype)
        x = x if visible is None else gather(x, visible)
        out = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in features:
                out[f"block{i}"] = x
        x = self.norm(x) if hasattr(self, "norm") else x
        out |= {"tokens": x, "pooled": x.mean(1)}
        if self.classifier:
            out["logits"] = self.head(self.fc_norm(out["pooled"]))
        return out


class MAEDecoder(nn.Module):
    """VideoMAE's decoder."""

    def __init__(self, width, depth, heads, hidden, pixels, eps, a):
        super().__init__()
        self.blocks = nn.ModuleList(MAEBlock(width, heads, hidden, a) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, eps), nn.Linear(width, pixels)

    def forward(self, x, count):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -count:]))


class VideoMAE(nn.Module):
    """VideoMAE's pretraining model; `forward` gives features, `reconstruct` predicts pixels."""

    def __init__(self, encoder, width, depth, heads, hidden, eps):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = MAEEncoder(encoder)
        pixels = encoder["tubelet"] * encoder["patch"] ** 2 * encoder["channels"]
        self.decoder = MAEDecoder(width, depth, heads, hidden, pixels, eps, encoder)
        self.encoder_to_decoder = nn.Linear(encoder["width"], width, bias=False)
        place = sinusoid(len(self.encoder.place), width)
        self.register_buffer("place", place, persistent=False)

    def forward(self, video, visible=None, features=()):
        return self.encoder(video, visible, features)

    def reconstruct(self, video, visible, hidden):
        """Pixels [B, M, tubelet*patch*patch*C] of the cubes `hidden`, from those that are `visible`."""
        seen = self.encoder_to_decoder(self.encoder(video, visible)["tokens"])
        place = self.place.to(seen.dtype)
        x = torch.cat([seen + place[visible], self.mask_token + place[hidden]], 1)
        return self.decoder(x, hidden.shape[1])


class BertAttention(nn.Module):
    """Attention of x to itself or to `other`, then x + result and its norm."""

    def __init__(self, a, other=None):
        super().__init__()
        width, self.heads = a["width"], a["heads"]
        inputs = dict(query=width, key=other or width, value=other or width)
        self.self = nn.ModuleDict({name: nn.Linear(size, width) for name, size in inputs.items()})
        self.output = BertOutput(width, a)

    def forward(self, x, mask=None, other=None):
        source, part = x if other is None else other, self.self
        q, k, v = part["query"](x), part["key"](source), part["value"](source)
        return self.output(attend(q, k, v, self.heads, mask=mask), x)


class BertOutput(nn.Module):
    """The last matrix of a branch, then norm(x + branch)."""

    def __init__(self, inputs, a):
        super().__init__()
        self.dense, self.LayerNorm = (
            nn.Linear(inputs, a["width"]),
            nn.LayerNorm(a["width"], a["eps"]),
        )

    def forward(self, branch, x):
        return self.LayerNorm(x + self.dense(branch))


class BertBlock(nn.Module):
    """BERT's post-norm block; with `other`, the width of another tower's tokens, it looks at those too."""

    def __init__(self, a, other=None):
        super().__init__()
        self.attention = BertAttention(a)
        if other:
            self.crossattention = BertAttention(a, other)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(a["width"], a["mlp_width"])})
        self.output = BertOutput(a["mlp_width"], a)
        self.activation = ACTIVATIONS[a["activation"]]

    def forward(self, x, mask=None, tokens=None):
        x = self.attention(x, mask)
        if tokens is not None:
            x = self.crossattention(x, other=tokens)
        return self.output(self.activation(self.intermediate["dense"](x)), x)


class BertEmbeddings(nn.Module):
    """Words, places and the first type of segment."""

    def __init__(self, a):
        super().__init__()
        width = a["width"]
        self.register_buffer("position_ids", torch.arange(a["positions"])[None])
        self.word_embeddings = nn.Embedding(a["vocabulary"], width, padding_idx=a["pad"])
        self.position_embeddings = nn.Embedding(a["positions"], width)
        self.token_type_embeddings = nn.Embedding(a["types"], width)
        self.LayerNorm = nn.LayerNorm(width, a["eps"])

    def forward(self, ids):
        place = self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        return self.LayerNorm(
            self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + place
        )


class BertWords(nn.Module):
    """Scores of all words, by the table of words."""

    def __init__(self, a):
        super().__init__()
        width = a["width"]
        norm = nn.LayerNorm(width, a["eps"])
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": norm})
        self.decoder = nn.Linear(width, a["vocabulary"])
        self.bias = self.decoder.bias
        self.activation = ACTIVATIONS[a["activation"]]

    def forward(self, x):
        x = self.activation(self.transform["dense"](x))
        return self.decoder(self.transform["LayerNorm"](x))


class Bert(nn.Module):
    """BERT; the blocks from `fusion_from` on also look at a video's tokens, `other` wide."""

    inputs = ("ids", "valid")

    def __init__(self, a, other=None):
        super().__init__()
        self.text, self.fusion_from = a, a["fusion_from"]
        fuses = lambda i: other if i >= self.fusion_from else None
        layer = nn.ModuleList(BertBlock(a, fuses(i)) for i in range(a["depth"]))
        encoder = nn.ModuleDict({"layer": layer})
        self.bert = nn.ModuleDict({"embeddings": BertEmbeddings(a), "encoder": encoder})
        if a["word_head"]:
            self.cls = nn.ModuleDict({"predictions": BertWords(a)})
        self.tie()

    def tie(self):
        """Makes the word head's matrix and bias the arrays that they are copies of in files."""
        if hasattr(self, "cls"):
            head = self.cls["predictions"]
            head.decoder.weight = self.bert["embeddings"].word_embeddings.weight
            head.decoder.bias = head.bias

    def forward(self, ids, valid=None):
        """'tokens' [B, L, D], 'pooled' [B, D], 'words' [B, L, vocabulary]; arguments as in `encode`."""
        x = self.encode(ids, valid)
        out = {"tokens": x, "pooled": x[:, 0]}
        return out | ({"words": self.words(x)} if hasattr(self, "cls") else {})

    def encode(self, ids, valid=None):
        """Text alone [B, L, D].

        Args:
            ids: int64 [B, L].
            valid: bool [B, L], False for padding; None where all are real.
        """
        x = self.bert["embeddings"](ids)
        for block in self.bert["encoder"]["layer"][: self.fusion_from]:
            x = block(x, self._mask(valid))
        return x

    def fuse(self, x, valid, tokens):
        """Text [B, L, D] of `encode` that has looked at a video's tokens [B, N, any]."""
        for block in self.bert["encoder"]["layer"][self.fusion_from :]:
            x = block(x, self._mask(valid), tokens)
        return x

    def words(self, x):
        """Scores [B, L, vocabulary] of [B, L, D]."""
        return self.cls["predictions"](x)

    @staticmethod
    def _mask(valid):
        return None if valid is None else valid.bool()[:, None, None]


class ClipAttention(nn.Module):
    """Attention in a text tower of CLIP, under the names of torch.nn.MultiheadAttention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(attend(q, k, v, self.heads, mask=mask))


class MobileClipAttention(nn.Module):
    """The same under MobileCLIP's names."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask):
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        return self.out_proj(attend(q, k, v, self.heads, mask=mask))


class ClipBlock(nn.Module):
    """CLIP's pre-norm block."""

    def __init__(self, a):
        super().__init__()
        width = a["width"]
        self.attn = ClipAttention(width, a["heads"])
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, a["eps"]) for _ in range(2))
        up, down = nn.Linear(width, a["mlp_width"]), nn.Linear(a["mlp_width"], width)
        self.mlp = nn.ModuleDict({"c_fc": up, "c_proj": down})
        self.activation = ACTIVATIONS[a["activation"]]

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


class MobileClipBlock(nn.Module):
    """The same under MobileCLIP's names, which are places in a list."""

    def __init__(self, a):
        super().__init__()
        width, norm = a["width"], lambda: nn.LayerNorm(a["width"], a["eps"])
        up, down = nn.Linear(width, a["mlp_width"]), nn.Linear(a["mlp_width"], width)
        self.pre_norm_mha = nn.ModuleList([norm(), MobileClipAttention(width, a["heads"])])
        self.pre_norm_ffn = nn.ModuleDict({"0": norm(), "1": up, "4": down})
        self.activation = ACTIVATIONS[a["activation"]]

    def forward(self, x, mask):
        norm, attention = self.pre_norm_mha
        x = x + attention(norm(x), mask)
        mlp = self.pre_norm_ffn
        return x + mlp["4"](self.activation(mlp["1"](mlp["0"](x))))


def clip_text(ids, words, places, blocks, norm, projection, causal):
    """'embedding' [B, P] at the first highest id of [B, L], and 'tokens' [B, L, D]."""
    length = ids.shape[1]
    x = words(ids) + places[:length]
    ones = torch.ones(length, length, dtype=torch.bool, device=ids.device)
    for block in blocks:
        x = block(x, ones.tril() if causal else None)
    x = norm(x)
    last = gather(x, ids.argmax(1, keepdim=True))[:, 0]
    return {"embedding": last @ projection, "tokens": x}


class ClipText(nn.Module):
    """CLIP's text tower."""

    inputs = ("ids",)

    def __init__(self, a):
        super().__init__()
        self.text, width = a, a["width"]
        self.positional_embedding = nn.Parameter(torch.zeros(a["positions"], width))
        self.text_projection = nn.Parameter(torch.zeros(width, a["output_width"]))
        blocks = nn.ModuleList(ClipBlock(a) for _ in range(a["depth"]))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.token_embedding = nn.Embedding(a["vocabulary"], width)
        self.ln_final = nn.LayerNorm(width, a["eps"])

    def forward(self, ids):
        """'embedding' [B, P], 'tokens' [B, L, D] of int64 [B, L] whose last real id is the highest."""
        blocks, causal = self.transformer["resblocks"], self.text["causal"]
        embeddings = self.token_embedding, self.positional_embedding
        return clip_text(ids, *embeddings, blocks, self.ln_final, self.text_projection, causal)


class MobileClipText(nn.Module):
    """MobileCLIP's text tower."""

    inputs = ("ids",)

    def __init__(self, a):
        super().__init__()
        self.text, width = a, a["width"]
        self.projection_layer = nn.Parameter(torch.zeros(width, a["output_width"]))
        self.embedding_layer = nn.Embedding(a["vocabulary"], width)
        table = nn.Parameter(torch.zeros(1, 1, a["positions"], width))
        places = nn.ModuleDict({"pos_embed": nn.ParameterDict({"pos_embed": table})})
        self.positional_embedding = places
        self.transformer = nn.ModuleList(MobileClipBlock(a) for _ in range(a["depth"]))
        self.final_layer_norm = nn.LayerNorm(width, a["eps"])

    def forward(self, ids):
        """As `ClipText.forward`."""
        places = self.positional_embedding["pos_embed"]["pos_embed"][0, 0]
        last = self.final_layer_norm, self.projection_layer, self.text["causal"]
        return clip_text(ids, self.embedding_layer, places, self.transformer, *last)


class VideoClip(ProjectedInternVideo2):
    """InternVideo2-CLIP: both towers' 'embedding' [B, P] are in one space."""

    inputs = ("video", "ids")

    def __init__(self, a, width, text, temperature):
        super().__init__(a, width)
        self.text_encoder = MobileClipText(text)
        self.temp = nn.Parameter(torch.tensor(float(temperature)))

    def forward(self, video, ids):
        """What `encode_video` gives, and what `encode_text` gives as 'text_...'."""
        text = {f"text_{name}": x for name, x in self.encode_text(ids).items()}
        return self.encode_video(video) | text

    def encode_video(self, video, visible=None, features=()):
        """'tokens', 'pooled', 'projected', which is also the 'embedding'; arguments as in `InternVideo2`."""
        out = super().forward(video, visible, features)
        return out | {"embedding": out["projected"]}

    def encode_text(self, ids):
        """As `ClipText.forward`."""
        return self.text_encoder(ids)


class Stage2(nn.Module):
    """InternVideo2's stage 2: video tower, BERT that looks at its tokens, projections, matching head."""

    inputs = ("video", "ids", "valid")

    def __init__(self, vision, text, width, temperature):
        super().__init__()
        self.temp = nn.Parameter(torch.tensor(float(temperature)))
        self.vision_encoder = vision
        self.text_encoder = Bert(text, vision.a["width"])
        self.vision_proj = nn.Linear(vision.a["pool_width"], width)
        self.text_proj = nn.Linear(text["width"], width)
        self.itm_head = nn.Linear(text["width"], 2)

    def forward(self, video, ids, valid=None):
        """What `encode_video` gives, what `encode_text` gives as 'text_...', 'fused', 'match' and 'words'."""
        seen, text = self.encode_video(video), self.encode_text(ids, valid)
        fused = self.text_encoder.fuse(text["tokens"], valid, seen["tokens"])
        out = seen | {f"text_{name}": x for name, x in text.items()}
        out |= {"fused": fused, "match": self.itm_head(fused[:, 0])}
        head = self.text_encoder.text["word_head"]
        return out | ({"words": self.text_encoder.words(fused)} if head else {})

    def encode_video(self, video, visible=None, features=()):
        """As `InternVideo2.forward`, and 'embedding' [B, P]; its length is not 1."""
        out = self.vision_encoder(video, visible, features)
        return out | {"embedding": self.vision_proj(out["pooled"])}

    def encode_text(self, ids, valid=None):
        """'tokens' [B, L, D], 'pooled' [B, D], 'embedding' [B, P]; arguments as in `Bert.encode`."""
        x = self.text_encoder.encode(ids, valid)
        return {"tokens": x, "pooled": x[:, 0], "embedding": self.text_proj(x[:, 0])}

    def match(self, text, valid, video):
        """Scores [B, 2] of "they do not, they do belong together" for 'tokens' of text and video."""
        return self.itm_head(self.text_encoder.fuse(text, valid, video)[:, 0])

    def words(self, ids, valid, video):
        """Scores [B, L, vocabulary] at each place of a (masked) text, seen with a video's 'tokens'."""
        text = self.text_encoder.encode(ids, valid)
        return self.text_encoder.words(self.text_encoder.fuse(text, valid, video))


def build(config):
    """An nn.Module from {'model': name, 'arguments': {...}}, as config.json has it."""
    name, a = config["model"], dict(config["arguments"])
    inside = lambda key: a[key]["arguments"] if a.get(key) else None
    encoder = inside("encoder")
    if name == "internvideo2":
        return InternVideo2(a)
    if name == "aligned":
        return InternVideo2(encoder, inside("clip"), inside("mae"), inside("final"))
    if name == "projected":
        return ProjectedInternVideo2(encoder, a["width"])
    if name == "video_mae_encoder":
        return MAEEncoder(a)
    if name == "video_mae":
        decoder = (a[f"decoder_{x}"] for x in ("width", "depth", "heads", "mlp_width", "eps"))
        return VideoMAE(encoder, *decoder)
    if name == "classifier":
        video_mae = a["encoder"]["model"] == "video_mae_encoder"
        return (MAEEncoder if video_mae else InternVideo2)(encoder, classifier=a)
    if name == "stage2":
        return Stage2(build(a["vision"]), inside("text"), a["width"], a["initial_temperature"])
    if name == "video_clip":
        projected = inside("vision")
        towers = projected["encoder"]["arguments"], projected["width"], inside("text")
        return VideoClip(*towers, a["initial_temperature"])
    if name == "bert":
        return Bert(a)
    if name == "clip_text":
        return (MobileClipText if config["layout"] == "mobileclip_text" else ClipText)(a)
    raise ValueError(f"model must be one that this file has; got {name!r}")


def resized(state, old, new):
    """The state dict with learned position tables for another grid (t, h, w).

    Linear in time, then bicubic in space; rows in front of the patches stay.
    """
    if tuple(old) == tuple(new):
        return state
    video = lambda key: "pos_embed" in key and not key.startswith("text_encoder.")
    return {k: _table(k, v, old, new) if video(k) else v for k, v in state.items()}


def _table(key, table, old, new):
    (t, h, w), (frames, high, wide) = old, new
    kind = key.rpartition(".")[2]
    if kind.endswith("_cls"):
        return table
    if kind.endswith("_temporal"):
        h, w, high, wide = 1, 1, 1, 1
    elif kind.endswith("_spatial") or "img_" in kind:
        t, frames = 1, 1
    first = table.shape[1] - t * h * w
    x = table[0, first:].float().reshape(t, h * w, -1)
    if frames != t:
        x = F.interpolate(x.permute(1, 2, 0), size=frames, mode="linear").permute(2, 0, 1)
    if (high, wide) != (h, w):
        x = x.reshape(frames, h, w, -1).permute(0, 3, 1, 2)
        x = F.interpolate(x, size=(high, wide), mode="bicubic").permute(0, 2, 3, 1)
    x = x.reshape(1, frames * high * wide, -1).to(table.dtype)
    return torch.cat([table[:, :first], x], 1)


def encoder_arguments(config):
    """The part of a config that says what clips the model is for; None of a model of text."""
    inside = config["arguments"]
    part = inside.get("encoder") or inside.get("vision")
    if part:
        return encoder_arguments(part)
    return inside if "patch" in inside else None


def grid_of(a):
    """(t, h, w) of an encoder's arguments."""
    side = a["image_size"] // a["patch"]
    return a["frames"] // a["tubelet"], side, side


def read_weights(folder):
    """The state dict of a folder: safetensors (one file or shards), else .pth."""
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
    )
    if not files and (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    if not files:
        return torch.load(folder / "model.pth", map_location="cpu", weights_only=True)
    from safetensors.torch import load_file

    return {key: value for name in files for key, value in load_file(folder / name).items()}


def load(folder=".", *, frames=None, image_size=None, dtype=None):
    """The model of a folder, in evaluation mode, its weights loaded strictly.

    Args:
        frames, image_size: of the clips, where other than the weights were made for; learned
            positions are interpolated.
        dtype: of the parameters; by default that of the weights.
    """
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    a, state = encoder_arguments(config), read_weights(folder)
    if a:
        old = grid_of(a)
        a |= {"frames": frames or a["frames"], "image_size": image_size or a["image_size"]}
        state = resized(state, old, grid_of(a))
    elif frames or image_size:
        raise ValueError("frames and image_size must not be given: this is a model of text alone")
    model = build(config)
    model.load_state_dict(state, strict=True, assign=True)
    for part in model.modules():
        if isinstance(part, Bert):
            part.tie()
    model = model.to(dtype) if dtype else model
    return model.eval().requires_grad_(False)


def main(argv):
    """`python model.py onnx FILE`: the model of this file's folder as ONNX, with any batch size."""
    if len(argv) != 2 or argv[0] != "onnx":
        sys.exit("usage: python model.py onnx FILE")
    # In float32, whatever the weights are in: onnxruntime has no bfloat16 convolution on a CPU.
    export_onnx(load(pathlib.Path(__file__).parent, dtype=torch.float32), argv[1])
    print(f"wrote {argv[1]}")


class _Outputs(nn.Module):
    """A model whose outputs are in a fixed order."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs):
        out = self.model(*inputs)
        return tuple(out[name] for name in self.names)


def example(model, batch=2):
    """A video of the size that a model from `load` is for."""
    part = next(m for m in model.modules() if hasattr(m, "a"))
    a = part.a
    shape = (batch, a["channels"], a["frames"], a["image_size"], a["image_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def examples(model, batch=2):
    """What `forward` of a model from `load` takes, by name; texts are as long as they may be."""
    names, found = getattr(model, "inputs", ("video",)), {}
    if "video" in names:
        found["video"] = example(model, batch)
    if "ids" in names:
        a = next(m.text for m in model.modules() if hasattr(m, "text"))
        found["ids"] = torch.arange(a["positions"]).remainder(a["vocabulary"]).repeat(batch, 1)
    if "valid" in names:
        found["valid"] = torch.ones_like(found["ids"], dtype=torch.bool)
    return found


def export_onnx(model, file):
    """Writes a model as ONNX: what `examples` has to what `forward` gives, by these names.

    The number of examples B is free, the length of texts is not: pad them.
    """
    inputs = examples(model)
    names = list(model(**inputs))
    axes = {name: {0: "batch"} for name in [*inputs, *names]}
    options = dict(input_names=list(inputs), output_names=names, dynamic_axes=axes)
    with warnings.catch_warnings():
        # Of shapes that are fixed but for the batch, and of the exporter that needs no further package.
        for kind in (torch.jit.TracerWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
        values, settings = tuple(inputs.values()), dict(dynamo=False, opset_version=17)
        torch.onnx.export(_Outputs(model, names), values, str(file), **settings, **options)


if __name__ == "__main__":
    main(sys.argv[1:])
