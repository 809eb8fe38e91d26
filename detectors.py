"""The transformers of six detectors: one encoder, three decoders, and the layers that tell them apart.

Read after model.py, which owns the table of variants and calls `Transformer`. Vanilla, Conditional and Deformable
layers stand side by side; DAB and DN run the Conditional ones on anchor boxes. Letters and conventions as in model.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import Linear, deform_attn, linear


class Context(NamedTuple):
    """The encoded image c of Eq. (1) with what a decoder needs to look into it."""

    c: Tensor  # (B, S, C) tokens of all levels
    pos: Tensor  # (B, S, C) phi_p, their position encoding
    mask: Tensor  # (B, S) True = padding
    shapes: list  # G pairs (H, W)
    ratios: Tensor  # (B, G, 2) unpadded part of each map's width and height

    def split(self, x):
        """(B, S, ...) -> G tensors, one per level."""
        return x.split([h * w for h, w in self.shapes], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Encoder and the three decoders: (query, content, anchor, ctx, blocked, bbox_embed) -> q_hat (L, B, N, C), reference
# ---------------------------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Encoder and decoder under the official name, with the official initialisation."""

    def __init__(self, row, C, heads, enc_layers, dec_layers, pre_norm, patterns):
        super().__init__()
        self.encoder = Encoder(row, C, heads, enc_layers, pre_norm)
        decoders = {"additive": AdditiveDecoder, "conditional": ConditionalDecoder, "deformable": DeformableDecoder}
        self.decoder = decoders[row.decoder](row, C, heads, dec_layers, pre_norm)
        if row.decoder == "deformable":
            self.level_embed = nn.Parameter(torch.empty(row.levels, C))
            self.reference_points = Linear(C, 2)  # query -> the point it looks at
        if patterns:
            self.patterns = nn.Embedding(patterns, C)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        for module in self.modules():
            if isinstance(module, DeformAttention):
                module.reset()
        if row.decoder == "deformable":
            nn.init.normal_(self.level_embed)
            nn.init.zeros_(self.reference_points.bias)
        if patterns:
            nn.init.normal_(self.patterns.weight)


class Encoder(nn.Module):
    """Eq. (1): layers of self-attention over the image's tokens."""

    def __init__(self, row, C, heads, num_layers, pre_norm):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(row, C, heads, pre_norm) for _ in range(num_layers))
        self.query_scale = MLP(C, C, C, 2) if row.anchors else None  # DAB: positions scaled by content
        self.norm = nn.LayerNorm(C) if pre_norm else None

    def forward(self, ctx):
        """ctx with projected features as c -> c (B, S, C)."""
        x = ctx.c
        for layer in self.layers:
            x = layer(x, ctx.pos if self.query_scale is None else ctx.pos * self.query_scale(x), ctx)
        return x if self.norm is None else self.norm(x)


class AdditiveDecoder(nn.Module):
    """Vanilla DETR: the query is added to the content wherever queries are compared."""

    def __init__(self, row, C, heads, num_layers, pre_norm):
        super().__init__()
        self.num_layers = num_layers
        self.layers = nn.ModuleList(VanillaLayer(row, C, heads, pre_norm) for _ in range(num_layers))
        self.norm = nn.LayerNorm(C)

    def forward(self, query, content, anchor, ctx, blocked, bbox_embed):
        x, states = torch.zeros_like(query), []
        for layer in self.layers:
            x = layer(x, query, ctx, blocked)
            states.append(self.norm(x))
        return torch.stack(states), None


class ConditionalDecoder(nn.Module):
    """Conditional DETR: the query names a point, matched apart from the content; DAB, DN: a box, refined."""

    def __init__(self, row, C, heads, num_layers, pre_norm):
        super().__init__()
        self.num_layers, self.anchors, self.eps, self.C = num_layers, row.anchors, row.eps, C
        self.layers = nn.ModuleList(ConditionalLayer(row, C, heads, first=i == 0) for i in range(num_layers))
        self.norm = nn.LayerNorm(C)
        self.query_scale = MLP(C, C, C, 2).requires_grad_(num_layers > 1)  # from the second layer on
        self.ref_point_head = MLP(2 * C, C, C, 2) if row.anchors else MLP(C, C, 2, 2)
        self.ref_anchor_head = MLP(C, C, 2, 2) if row.anchors else None

    def forward(self, query, content, anchor, ctx, blocked, bbox_embed):
        C = self.C
        x = torch.zeros_like(query) if content is None else content
        reference = (
            at_least_float32(self.ref_point_head(query)).sigmoid() if anchor is None else at_least_float32(anchor)
        )
        states, references = [], []
        for i, layer in enumerate(self.layers):
            references.append(reference)
            if self.anchors or i == 0:  # Conditional looks at one place in all layers
                at = reference.detach() if i else reference  # DAB: a layer looks where the last one said
                encoding = sine_encoding(at[..., [1, 0, 2, 3][: at.shape[-1]]], C // 2)  # order y, x (, w, h)
            if self.anchors:
                query = self.ref_point_head(encoding)
            spatial = encoding[..., :C]
            if i:
                spatial = spatial * self.query_scale(x)
            if self.anchors:  # width and height modulation: (h_ref / h) on the y half, (w_ref / w) on the x half
                scale = self.ref_anchor_head(x).sigmoid().flip(-1) / at[..., [3, 2]]
                spatial = spatial * scale.repeat_interleave(C // 2, -1)
            x = layer(x, query, spatial, ctx, blocked)
            states.append(self.norm(x))
            if self.anchors and i + 1 < self.num_layers:  # from the state before the norm, as in the official code
                reference = (bbox_embed(x).to(at.dtype) + inverse_sigmoid(at, self.eps)).sigmoid()
        return torch.stack(states), torch.stack(references)


class DeformableDecoder(nn.Module):
    """Deformable DETR: the query names a point, around which a few others are read. No final norm."""

    def __init__(self, row, C, heads, num_layers, pre_norm):
        super().__init__()
        self.num_layers, self.eps = num_layers, row.eps
        self.layers = nn.ModuleList(DeformableLayer(row, C, heads) for _ in range(num_layers))

    def forward(self, query, content, anchor, ctx, blocked, bbox_embed):
        x, reference = content, at_least_float32(anchor)  # (B, N, 2)
        first, last = (head.layers[0].weight for head in (bbox_embed[0], bbox_embed[-1]))
        refine = first is not last  # one head per layer: box refinement (torch.export copies modules, not parameters)
        states, references = [], []
        for layer, head in zip(self.layers, bbox_embed, strict=True):
            x = layer(x, query, reference, ctx, blocked)
            states.append(x)
            if refine:  # sides without a reference count as logit 0
                full = F.pad(reference, (0, 4 - reference.shape[-1]), value=0.5)
                references.append(full)
                reference = (head(x).to(full.dtype) + inverse_sigmoid(full, self.eps)).sigmoid().detach()
            else:
                references.append(reference)
        return torch.stack(states), torch.stack(references)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Layers
# ---------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """What every layer has: a feed-forward net and residual sums with their norms, before or after."""

    def __init__(self, row, C, norms, pre_norm=False):
        super().__init__()
        self.linear1, self.linear2 = Linear(C, row.ffn_dim), Linear(row.ffn_dim, C)
        self.activation = nn.PReLU() if row.anchors else nn.ReLU()
        self.dropout, self.pre_norm = nn.Dropout(row.dropout), pre_norm
        for i in range(1, norms + 1):
            setattr(self, f"norm{i}", nn.LayerNorm(C))

    def add(self, x, norm, f):
        """x + f(x), normalised after the sum (default) or before f (pre-norm: UP-DETR, DETReg)."""
        if self.pre_norm:
            return x + self.dropout(f(norm(x)))
        return norm(x + self.dropout(f(x)))

    def ffn(self, x):
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class EncoderLayer(Block):
    """Self-attention over image tokens, dense or deformable, then the feed-forward net."""

    def __init__(self, row, C, heads, pre_norm):
        super().__init__(row, C, 2, pre_norm)
        self.deformable = row.decoder == "deformable"
        self.self_attn = DeformAttention(C, heads, row.levels) if self.deformable else Attention(C, heads, row.dropout)

    def forward(self, x, pos, ctx):
        if self.deformable:
            x = self.add(x, self.norm1, lambda x: self.self_attn(x + pos, cell_centres(ctx), x, ctx))
        else:
            blocked = ctx.mask[:, None, None]
            x = self.add(x, self.norm1, lambda x: self.self_attn(x + pos, x + pos, x, blocked))
        return self.add(x, self.norm2, self.ffn)


class VanillaLayer(Block):
    """Queries attend to each other, then to the image: q = f_q(x + query), k = f_k(c + pos), v = f_v(c), Eq. (3).

    x is what the layers have found so far, zeros at first; query is phi_q, or phi_q + z.
    """

    def __init__(self, row, C, heads, pre_norm):
        super().__init__(row, C, 3, pre_norm)
        self.self_attn = Attention(C, heads, row.dropout)
        self.multihead_attn = Attention(C, heads, row.dropout)

    def forward(self, x, query, ctx, blocked):
        x = self.add(x, self.norm1, lambda x: self.self_attn(x + query, x + query, x, blocked))
        k, padding = ctx.c + ctx.pos, ctx.mask[:, None, None]
        x = self.add(x, self.norm2, lambda x: self.multihead_attn(x + query, k, ctx.c, padding))
        return self.add(x, self.norm3, self.ffn)


class ConditionalLayer(Block):
    """Content and position have projections of their own; in cross-attention each head joins [content | position].

    There, only the first layer adds the query's own position to the content (Conditional DETR, Sec. 3.3).
    """

    def __init__(self, row, C, heads, first):
        super().__init__(row, C, 3)
        self.heads = heads
        for name in ("sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v",
                     "ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"):  # fmt: skip
            setattr(self, f"{name}_proj", Linear(C, C))
        self.ca_qpos_proj = Linear(C, C) if first else None
        self.self_attn, self.cross_attn = OutProjection(C, heads, row.dropout), OutProjection(C, heads, row.dropout)

    def forward(self, x, query, spatial, ctx, blocked):
        x = self.add(x, self.norm1, lambda x: self._look_at_each_other(x, query, blocked))
        x = self.add(x, self.norm2, lambda x: self._look_at_image(x, query, spatial, ctx))
        return self.add(x, self.norm3, self.ffn)

    def _look_at_each_other(self, x, query, blocked):
        q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query)
        k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query)
        return self.self_attn(q, k, self.sa_v_proj(x), blocked)

    def _look_at_image(self, x, query, spatial, ctx):
        """Eq. (3). phi_q + z of Eq. (7) enters here in the first layer only; later by self-attention and `spatial`."""
        q, k, k_pos = self.ca_qcontent_proj(x), self.ca_kcontent_proj(ctx.c), self.ca_kpos_proj(ctx.pos)
        if self.ca_qpos_proj is not None:
            q, k = q + self.ca_qpos_proj(query), k + k_pos
        q = per_head_cat(q, self.ca_qpos_sine_proj(spatial), self.heads)
        return self.cross_attn(q, per_head_cat(k, k_pos, self.heads), self.ca_v_proj(ctx.c), ctx.mask[:, None, None])


class DeformableLayer(Block):
    """Self-attention (norm2!), deformable cross-attention (norm1), feed-forward (norm3): the official numbering."""

    def __init__(self, row, C, heads):
        super().__init__(row, C, 3)
        self.self_attn = Attention(C, heads, row.dropout)
        self.cross_attn = DeformAttention(C, heads, row.levels)

    def forward(self, x, query, reference, ctx, blocked):
        x = self.add(x, self.norm2, lambda x: self.self_attn(x + query, x + query, x, blocked))
        ratios = ctx.ratios.repeat(1, 1, reference.shape[-1] // 2)
        at = reference[:, :, None] * ratios[:, None]  # (B, N, G, 2 | 4) on the padded maps
        x = self.add(x, self.norm1, lambda x: self.cross_attn(x + query, at, ctx.c, ctx))
        return self.add(x, self.norm3, self.ffn)


class OutProjection(nn.Module):
    """Attention whose f_q, f_k, f_v live outside: Eq. (2) and an output projection."""

    def __init__(self, C, heads, dropout):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.out_proj = Linear(C, C)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, q, k, v, blocked=None):
        """q (B, N, E), k (B, S, E), v (B, S, C); blocked broadcasts to (B, 1, N, S), True = may not attend."""
        q, k, v = (self.split(t) for t in (q, k, v))
        allowed = None if blocked is None else ~blocked
        p = self.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)  # Eq. (2)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def split(self, x):
        """(B, S, E) -> (B, M, S, E / M)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def weights(self, q, k, v=None, blocked=None):
        """softmax(q k^T / sqrt(d_k)) of Eq. (2), (B, M, N, S): for pictures, `forward` never forms it."""
        q, k = self.split(q), self.split(k)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return (scores if blocked is None else scores.masked_fill(blocked, -torch.inf)).softmax(-1)


class Attention(OutProjection):
    """Multi-head attention with joint projection weights, named like nn.MultiheadAttention's."""

    def __init__(self, C, heads, dropout):
        super().__init__(C, heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * C, C))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * C))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, q, k, v, blocked=None):
        return super().forward(*self.project(q, k, v), blocked)

    def weights(self, q, k, v, blocked=None):
        return super().weights(*self.project(q, k, v), blocked)

    def project(self, *qkv):
        """Eq. (3): f_q, f_k, f_v."""
        parts = zip(qkv, self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        return [linear(x, w, b) for x, w, b in parts]


class DeformAttention(nn.Module):
    """Each query reads a few points around its reference on every level (Deformable DETR, Eq. 3).

    In the place of the paper's Eq. (2) and (3): there are no keys, the weights are a linear function of the query.
    """

    def __init__(self, C, heads, levels, points=4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = Linear(C, heads * levels * points * 2)
        self.attention_weights = Linear(C, heads * levels * points)
        self.value_proj, self.output_proj = Linear(C, C), Linear(C, C)

    def reset(self):
        """Head m looks along its own of M directions, point p p + 1 cells away; all points weigh the same."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]
        bias = (ray[:, None, None] * steps).expand(-1, self.levels, -1, -1)  # (M, G, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias = nn.Parameter(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        for module in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(module.bias)

    def forward(self, query, reference, c, ctx):
        """query (B, N, C), reference (B, N, G, 2 | 4) on the padded maps, c (B, S, C) -> (B, N, C)."""
        value = self.value_proj(c).masked_fill(ctx.mask.unsqueeze(-1), 0).unflatten(-1, (self.heads, -1))
        return self.output_proj(deform_attn(value, ctx.shapes, *self.weights(query, reference, c, ctx)))

    def weights(self, query, reference, c, ctx):
        """Where it looks: points (B, N, M, G, P, 2) in [0, 1] of the padded maps, and their weights (B, N, M, G, P)."""
        shape = (self.heads, self.levels, self.points)
        offsets = at_least_float32(self.sampling_offsets(query)).unflatten(-1, (*shape, 2))
        weights = at_least_float32(self.attention_weights(query)).unflatten(-1, (self.heads, -1)).softmax(-1)
        at = reference[:, :, None, :, None]  # (B, N, 1, G, 1, 2 | 4)
        if at.shape[-1] == 4:
            locations = at[..., :2] + offsets / self.points * at[..., 2:] * 0.5
        else:
            locations = at + offsets / offsets.new_tensor(ctx.shapes).flip(-1)[:, None]  # cells -> [0, 1]
        return locations, weights.unflatten(-1, shape[1:])


def cross_attention(detector, decode, layer=-1):
    """What a decoder layer looks at in the image while `decode()` runs, for pictures: training never asks.

    Weights (B, M, N, S) that add up to 1 over the tokens; Deformable: its points and their weights, see there.
    """
    layer = detector.transformer.decoder.layers[layer]
    attention = layer.multihead_attn if isinstance(layer, VanillaLayer) else layer.cross_attn
    seen = []
    with torch.no_grad(), attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs)):
        decode()
        return attention.weights(*seen[-1])


# ---------------------------------------------------------------------------------------------------------------------
# 3. Small parts
# ---------------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Linear layers with ReLU between; f_box of Eq. (8) and f_sem of Eq. (10) are such nets."""

    def __init__(self, dim_in, hidden, dim_out, num_layers):
        super().__init__()
        dims = [dim_in, *[hidden] * (num_layers - 1), dim_out]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(dims, dims[1:], strict=False))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def sine_encoding(x, channels, temperature=10000.0):
    """(..., k) coordinates in [0, 1] -> (..., k * channels): sines on even and cosines on odd channels."""
    i = torch.arange(channels // 2, dtype=x.dtype, device=x.device)
    angle = x.unsqueeze(-1) * 2 * math.pi / temperature ** (2 * i / channels)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


def image_encoding(mask, C, temperature, offset):
    """phi_p: the sine encoding of each cell's place in the unpadded image, y half first. (B, H, W) -> (B, H*W, C)."""
    inside = (~mask).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    y, x = (y + offset) / (y[:, -1:] + 1e-6), (x + offset) / (x[:, :, -1:] + 1e-6)
    return sine_encoding(torch.stack([y, x], -1), C // 2, temperature).flatten(1, 2)


def cell_centres(ctx):
    """Where each token lies, for every level to look at: (B, S, G, 2) in [0, 1] of the padded maps."""
    centres = []
    for g, (H, W) in enumerate(ctx.shapes):
        y = (torch.arange(H, device=ctx.c.device) + 0.5) / H
        x = (torch.arange(W, device=ctx.c.device) + 0.5) / W
        grid = torch.stack([x.expand(H, W), y[:, None].expand(H, W)], -1).flatten(0, 1)
        centres.append(grid / ctx.ratios[:, g, None])  # (B, H*W, 2) in the unpadded image
    return torch.cat(centres, 1)[:, :, None] * ctx.ratios[:, None]


def resize_mask(mask, shape):
    """(B, H0, W0) -> (B, H, W), nearest."""
    return F.interpolate(mask[:, None].float(), shape)[:, 0].bool()


def unpadded_size(mask):
    """(B, H, W) -> (B, 2) float: unpadded width and height in cells of the mask."""
    inside = ~mask
    return torch.stack([inside[:, 0].sum(-1), inside[:, :, 0].sum(-1)], -1).float()


def inverse_sigmoid(x, eps):
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def per_head_cat(a, b, heads):
    """(B, S, C) twice -> (B, S, 2C) with each head's share of a followed by its share of b."""
    return torch.cat([a.unflatten(-1, (heads, -1)), b.unflatten(-1, (heads, -1))], -1).flatten(2)


def at_least_float32(x):
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
