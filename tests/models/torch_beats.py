"""BEATs written anew in PyTorch from its description, with the published names of parameters: a reference.

Source: BEATs (arXiv:2212.09058); WavLM (arXiv:2110.13900) 3.1 for the gate.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention whose scores get a bias by distance, scaled by a gate of each query."""

    def __init__(self, width, heads, gated):
        super().__init__()
        self.heads, self.gated = heads, gated
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))
        if gated:
            self.grep_linear = nn.Linear(width // heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x, bias, hidden):
        batch, tokens, width = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, -1).permute(0, 2, 1, 3)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        # The published order: scores a 32nd as large, minus their largest, times 32, then the bias.
        scores = torch.einsum("bhid,bhjd->bhij", q / math.sqrt(q.shape[-1]) / 32, k)
        scores = (scores - scores.amax(-1, keepdim=True)) * 32
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], -math.inf)
        if bias is not None and self.gated:
            eight = self.grep_linear(q)
            first, second = eight[..., :4].sum(-1), eight[..., 4:].sum(-1)
            gate = first.sigmoid() * (second.sigmoid() * self.grep_a[..., 0] - 1) + 2
            bias = gate[..., None] * bias
        if bias is not None:
            scores = scores + bias
        mixed = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v)
        return self.out_proj(mixed.reshape(batch, tokens, width))


class Layer(nn.Module):
    """One block."""

    def __init__(self, a):
        super().__init__()
        width = a["encoder_embed_dim"]
        self.self_attn = Attention(width, a["encoder_attention_heads"], a["gru_rel_pos"])
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, a["encoder_ffn_embed_dim"])
        self.fc2 = nn.Linear(a["encoder_ffn_embed_dim"], width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.first = a["layer_norm_first"]
        self.alpha = (2 * a["encoder_layers"]) ** 0.25 if a["deep_norm"] else 1.0

    def forward(self, x, bias, hidden):
        if self.first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), bias, hidden)
            return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, bias, hidden))
        return self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))


class Beats(nn.Module):
    """From the settings that a published file holds in 'cfg'."""

    def __init__(self, a):
        super().__init__()
        self.a, width, embed = a, a["encoder_embed_dim"], a["embed_dim"]
        if embed != width:
            self.post_extract_proj = nn.Linear(embed, width)
        patch = a["input_patch_size"]
        self.patch_embedding = nn.Conv2d(1, embed, patch, patch, bias=a["conv_bias"])
        self.encoder = nn.Module()
        conv = nn.Conv1d(
            width, width, a["conv_pos"], padding=a["conv_pos"] // 2, groups=a["conv_pos_groups"]
        )
        self.encoder.pos_conv = nn.ModuleList([nn.utils.weight_norm(conv, dim=2)])
        self.encoder.layers = nn.ModuleList(Layer(a) for _ in range(a["encoder_layers"]))
        if a["relative_position_embedding"]:
            table = nn.Embedding(a["num_buckets"], a["encoder_attention_heads"])
            for layer in self.encoder.layers:
                layer.self_attn.relative_attention_bias = table
        self.encoder.layer_norm = nn.LayerNorm(width)
        self.layer_norm = nn.LayerNorm(embed)

    def bias(self, tokens):
        """[K, A, A], distance by distance."""
        half, farthest = self.a["num_buckets"] // 2, self.a["max_distance"]
        rows = torch.zeros(tokens, tokens, dtype=torch.long)
        for query in range(tokens):
            for key in range(tokens):
                away = abs(key - query)
                if away >= half // 2:
                    share = math.log(away / (half // 2)) / math.log(farthest / (half // 2))
                    away = min(half // 2 + int(share * (half - half // 2)), half - 1)
                rows[query, key] = away + half * (key > query)
        table = self.encoder.layers[0].self_attn.relative_attention_bias
        return table(rows).permute(2, 0, 1)

    def forward(self, audio, hidden=None):
        """Tokens [B, A, D] of a filter bank [B, F, mels]; `hidden` [B, A] are padding."""
        x = self.patch_embedding(audio[:, None]).flatten(2).transpose(1, 2)
        x = self.layer_norm(x)
        if hasattr(self, "post_extract_proj"):
            x = self.post_extract_proj(x)
        if hidden is not None:
            x = x.masked_fill(hidden[..., None], 0.0)
        places = self.encoder.pos_conv[0](x.transpose(1, 2))[..., : x.shape[1]]
        x = x + F.gelu(places).transpose(1, 2)
        if not self.a["layer_norm_first"]:
            x = self.encoder.layer_norm(x)
        bias = self.bias(x.shape[1]) if self.a["relative_position_embedding"] else None
        for layer in self.encoder.layers:
            x = layer(x, bias, hidden)
        return self.encoder.layer_norm(x) if self.a["layer_norm_first"] else x


CONFIG = dict(
    input_patch_size=4, embed_dim=12, conv_bias=False, encoder_layers=3, encoder_embed_dim=16,
    encoder_ffn_embed_dim=24, encoder_attention_heads=2, activation_fn="gelu", layer_norm_first=False,
    deep_norm=True, conv_pos=6, conv_pos_groups=4, relative_position_embedding=True, num_buckets=16,
    max_distance=20, gru_rel_pos=True, dropout=0.0, encoder_layerdrop=0.05,
)  # fmt: skip


def made(**changes):
    """A model with random weights, none of which is where it starts, and its settings."""
    torch.manual_seed(0)
    config = CONFIG | changes
    model = Beats(config).eval()
    for name, x in model.named_parameters():
        scale = 1 + 0.3 * torch.randn_like(x) if x.ndim < 2 and "bias" not in name else None
        spread = 1.0 if "relative" in name or "grep" in name else 0.3
        x.data = spread * torch.randn_like(x) if scale is None else scale
    return model, config
