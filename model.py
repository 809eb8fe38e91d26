"""The network: Siamese pretraining on top of a detector, and six detectors of the DETR family.

Reading order: 1 the pretext method (paper Sec. 3.3), 2 the detector, 3 small parts; then detectors.py, the decoders,
and backbone.py.
Shapes: B images, R regions per view, N queries, L decoder layers, K classes, C width, D backbone channels, H W a
feature map, S tokens of all levels, G levels, H0 W0 the input, M heads, P points, T targets, J
denoising queries, V views, E the width of an attention's queries and keys.
Boxes are (cx, cy, w, h) in [0, 1] of the unpadded image; masks are True on padding; everything is batch first.
Modules that live on in a detector carry the names of the official repositories, so their files load as they are.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, roi_align

from backbone import Backbone, folded
from detectors import (
    MLP,
    Context,
    Transformer,
    at_least_float32,
    image_encoding,
    inverse_sigmoid,
    resize_mask,
    unpadded_size,
)

# ---------------------------------------------------------------------------------------------------------------------
# 1. Pretext method
# ---------------------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a pretext method returns. Siamese, for both views at once: rows :B belong to view 1, rows B: to view 2.

    A prediction belongs to the view whose context it read, so `pred` row b answers the question "where in this view
    is the region that z shows in the other one", and `p` row b is the target of that answer: the *other* view's.
    """

    pred: "Prediction"
    p: Tensor | None = None  # (V*B, R, D) region features to be predicted, Eq. (5) (R-O: Eq. 4), no gradient
    predicted_context: Tensor | None = None  # (2B, C) predictor(projector(c)), Eq. (11)
    projected_context: Tensor | None = None  # (2B, C) projector(c)


class Pretext(nn.Module):
    """What Siamese DETR, UP-DETR and DETReg share: a detector, features of regions, and the head that predicts them.

    A method says in `prepare` what a query is told (z) and what it should predict (p); heads and `look` may differ too.
    `losses.pretext_losses` reads the class attributes. Columns of the softmax heads: `first` unused ones (one in the
    released code, none in DETReg), one for each pseudo-class, `other` (a region without one: all of them where there
    are none), and last "nothing".
    """

    num_regions = 10  # n of Sec. 3.2, the overlap included: default of --num-regions
    asks = True  # a query is told a region, z
    cosine = True  # features are compared by Eq. (12) in all layers, else by their L1 distance in the last
    softmax, cost_class, weight_class = True, 1.0, 1.0  # the class loss, its matching cost and weight
    first = 1  # label of the first pseudo-class

    def __init__(self, detector, region_target="crop", use_global=True, region_stride=None, centre_features=False,
                 pseudo_classes=0, consistency=False, plain_mean=False):  # fmt: skip
        """region_target: crop (R-C), roi (R-O) or none; region_stride None reads RoIs from the detector's own maps.

        use_global, consistency, plain_mean are Siamese's. Raises ValueError on an unknown target or stride.
        """
        super().__init__()
        if region_target not in ("crop", "roi", "none"):
            raise ValueError(f"--region-target {region_target!r}: choose crop, roi or none")
        if region_stride not in (None, 8, 16, 32):
            raise ValueError(f"--region-stride {region_stride}: the backbones have maps at strides 8, 16 and 32")
        self.detector, self.region_target, self.pseudo_classes = detector, region_target, pseudo_classes
        self.region_strides = detector.strides if region_stride is None else (region_stride,)
        self.crop_strides = detector.strides if len(detector.strides) > 1 else (32,)  # multi-scale joins three levels
        self.centred, self.plain_mean = centre_features, plain_mean
        self.f_sem = self.projector = self.predictor = self.consistency = None
        self.make_heads(use_global, consistency)

    def dim(self, strides):
        return sum(self.detector.backbone[0].channels[s] for s in strides)

    def standardise(self, dim):
        """Centred features are ours: pooled ReLU6 features share a large mean, which hides the regions' differences."""
        return RunningStandardise(dim) if self.centred else nn.Identity()

    @property
    def other(self):
        return self.first + self.pseudo_classes

    def forward(self, x, mask, rois, boxes=None, crops=None, valid=None):
        """x (V*B, 3, H0, W0) normalised, mask (V*B, H0, W0), rois (V*B, R, 4) for the queries' RoIAlign, boxes (V*B, R,
        4) clean, crops (V*B*R, 3, 128, 128) normalised, valid (V*B, R) False where there is none. Returns Answer.
        """
        ctx, z, p = self.prepare(x, mask, rois, boxes, crops, valid)
        return Answer(self.look(ctx, z), p, *self.global_context(ctx))

    def look(self, ctx, z):
        """Eq. (6)-(8): queries conditioned on z look into the context."""
        return self.detector.decode(ctx, z=z)

    def encode(self, h, mask):
        """Eq. (1) on the maps that the detector reads: h {stride: (B, D, H, W)}, mask (B, H0, W0) -> Context."""
        return self.detector.encode([h[s] for s in self.detector.strides], mask)

    def region_features(self, h, boxes, mask):
        """Eq. (4): z = RoIAlign(h, b) averaged over its 7x7 bins, levels joined: (B, R, 4) -> (B, R, D).

        h {stride: map}. Legacy alignment (aligned=False) as in the released code.
        """
        size = unpadded_size(mask)  # (B, 2) w, h in pixels
        xyxy = box_convert(boxes.float(), "cxcywh", "xyxy") * size.repeat(1, 2)[:, None]
        z = [roi_align(h[s].float(), list(xyxy), 7, 1 / s).mean((2, 3)) for s in self.region_strides]
        return torch.cat(z, 1).unflatten(0, boxes.shape[:2])

    def crop_features(self, crops, B):
        """Eq. (5): p = global average of Backbone(Crop(x, b)), levels joined: (B*R, 3, 128, 128) -> (B, R, D)."""
        h = self.detector.features(crops, self.crop_strides)
        return torch.cat([h[s].float().mean((2, 3)) for s in self.crop_strides], 1).unflatten(0, (B, -1))

    def global_context(self, ctx):
        return ()  # only Siamese's


class Siamese(Pretext):
    """Multi-view detection pretraining: find the regions of one view in the other (paper Sec. 3.3, Figure 2)."""

    def make_heads(self, use_global, consistency):
        C = self.detector.hidden_dim
        dim_z = self.dim(self.region_strides)
        dim_p = {"crop": self.dim(self.crop_strides), "roi": dim_z, "none": 0}[self.region_target]
        self.detector.pretext_heads(self.other + 2)
        self.patch2query = nn.Linear(dim_z, C)  # Eq. (7) adds z itself; D channels to C: released code
        self.centre_z = self.standardise(dim_z)
        self.f_sem = MLP(C, C, dim_p, 2) if dim_p else None  # Eq. (10)
        self.centre_p = self.standardise(dim_p) if dim_p else nn.Identity()
        if use_global:
            dim_c = C * min(self.detector.levels, 3)  # released code: the extra fourth level is not pooled
            # the MLP of Eq. (11), and a predictor: losses.global_loss says why
            self.projector = nn.Sequential(*fc_bn(dim_c, C), nn.ReLU(), *fc_bn(C, C), nn.ReLU(), *fc_bn(C, C))
            self.predictor = nn.Sequential(*fc_bn(C, C), nn.ReLU(), nn.Linear(C, C))
        if consistency:
            self.consistency = MLP(C, C, C, 2)  # SeqCo-DETR's idea, ours in form: see losses.pretext_losses

    def prepare(self, x, mask, rois, boxes=None, crops=None, valid=None):
        """Both views as one batch of 2B: context c, query input z from the other view's regions, their features p.

        Arguments as in `forward` -> Context, patch2query(z) (2B, R, C), p (2B, R, D) or None.
        """
        with torch.no_grad():  # "only the forward pass is involved in preparations"
            h = self.detector.features(x, {*self.detector.strides, *self.region_strides})
            z = self.centre_z(self.region_features(h, rois, mask))  # Eq. (4), (2B, R, D)
            p = None
            if self.region_target == "roi":
                p = self.centre_p(self.region_features(h, boxes, mask))
            elif self.region_target == "crop":
                p = self.centre_p(self.crop_features(crops, len(mask)))  # Eq. (5), (2B, R, D)
        ctx = self.encode(h, mask)  # Eq. (1)
        z, p = swap_views(z), None if p is None else swap_views(p)  # Eq. (6): view 1 is asked for view 2's regions
        return ctx, self.patch2query(z), p

    def global_context(self, ctx):
        """Eq. (11)'s two inputs: predictor(projector(c)) and projector(c), (2B, C) each; batch norm sees one view.

        The mean runs over unpadded cells; `plain_mean`: over all cells (released code; the same without padding).
        """
        if self.projector is None:
            return ()
        pooled = []
        for c, blocked in zip(ctx.split(ctx.c)[:3], ctx.split(ctx.mask)[:3], strict=True):
            keep = (~blocked).unsqueeze(-1).to(c.dtype)
            keep = torch.ones_like(keep) if self.plain_mean else keep
            pooled.append((c * keep).sum(1) / keep.sum(1))
        views = torch.cat(pooled, 1).chunk(2)
        projected = [self.projector(c) for c in views]
        return torch.cat([self.predictor(g) for g in projected]), torch.cat(projected)


class UPDETR(Pretext):
    """Find crops of an image in the image itself (UP-DETR, CVPR 2021)."""

    drop = 0.1  # share of queries that are not told their crop: UP-DETR's mask ratio

    def make_heads(self, *_):
        C, dim = self.detector.hidden_dim, self.dim(self.region_strides if self.uses_rois else self.crop_strides)
        self.detector.pretext_heads(self.other + 2)
        self.patch2query = nn.Linear(dim, C)
        self.f_sem = None if self.region_target == "none" else MLP(C, C, dim, 2)
        self.centre_p = self.standardise(dim)

    @property
    def uses_rois(self):
        return self.region_target == "roi"

    def prepare(self, x, mask, rois, boxes=None, crops=None, valid=None):
        with torch.no_grad():
            h = self.detector.features(x, {*self.detector.strides, *(self.region_strides if self.uses_rois else ())})
            p = self.region_features(h, boxes, mask) if self.uses_rois else self.crop_features(crops, len(mask))
            p = self.centre_p(p)
        return self.encode(h, mask), self.patch2query(p), None if self.region_target == "none" else p

    def look(self, ctx, z):
        """Queries see only those of their own crop; in training some are not told it, without rescaling the rest."""
        (B, R), N = z.shape[:2], self.detector.num_queries
        keep = (torch.rand(B, N, 1, device=z.device) > self.drop).to(z.dtype) if self.training else None
        group = torch.arange(N, device=z.device) * R // N
        return self.detector.decode(ctx, z=z, keep=keep, attn_mask=group[:, None] != group)


class DETReg(Pretext):
    """Find the proposals of an image and embed what they show, without being told where (DETReg, CVPR 2022)."""

    num_regions, asks, cosine, first = 30, False, False, 0  # 30: DETReg, released code
    softmax = False  # but that of the detector, see make_heads

    def make_heads(self, *_):
        det, C = self.detector, self.detector.hidden_dim
        if self.region_target == "roi":
            raise ValueError("--region-target roi: DETReg embeds crops; choose crop or none")
        self.crop_strides = (8,)  # released code: pooled layer2, so that the crops stop there
        self.softmax, self.cost_class = det.row.softmax, det.row.cost_class  # the detector's own class loss and heads
        self.weight_class = 1.0 if self.softmax else 2.0
        det.make_heads(self.other + 1 + self.softmax)
        dim = 0 if self.region_target == "none" else self.dim(self.crop_strides)
        self.f_sem, self.centre_p = MLP(C, C, dim, 2) if dim else None, self.standardise(dim)

    def prepare(self, x, mask, rois, boxes=None, crops=None, valid=None):
        with torch.no_grad():
            h = self.detector.features(x, self.detector.strides)
            p = None if self.f_sem is None else self.crop_features(crops, len(mask))
            p = self.centre_p(p, valid) if self.centred and self.f_sem else p  # crops that are not there do not count
        return self.encode(h, mask), None, p


METHODS = {"siamese": Siamese, "updetr": UPDETR, "detreg": DETReg}


def objectness(logits, softmax, first=0):
    """How sure each query is of an object of any class: (..., K) -> (...). `first` columns of a softmax are unused."""
    logits = logits.float()
    return logits.softmax(-1)[..., first:-1].sum(-1) if softmax else logits.sigmoid().amax(-1)


def swap_views(x):
    """(2B, ...) with view 1 first -> the same with view 2 first."""
    return torch.cat(x.chunk(2)[::-1])


# ---------------------------------------------------------------------------------------------------------------------
# 2. Detector
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What tells one detector of the family from another (sizes: the official repositories)."""

    decoder: str  # additive, conditional or deformable
    softmax: bool = False  # class loss: softmax with a no-object class, else sigmoid focal
    anchors: bool = False  # queries are 4-d anchor boxes, refined by every layer
    denoise: bool = False  # DN-DETR's denoising queries in training
    levels: int = 1
    num_queries: int = 300
    ffn_dim: int = 2048
    dropout: float = 0.1
    temperature: float = 10000.0  # of the image's sine encoding
    offset: float = 0.0  # added to its cell counts (official Deformable; released pretraining has none)
    eps: float = 1e-5  # of the inverse sigmoid
    cost_class: float = 2.0  # matcher; L1 costs 5 and GIoU 2 everywhere
    weight_class: float = 2.0  # loss; L1 weighs 5 and GIoU 2 everywhere
    top: int = 100  # detections kept per image (vanilla: one a query)


VARIANTS = {
    "vanilla": Variant("additive", softmax=True, num_queries=100, cost_class=1, weight_class=1),
    "conditional": Variant("conditional", num_queries=100),  # the paper also runs 300
    "deformable-ss": Variant("deformable", ffn_dim=1024, offset=-0.5),
    "deformable-ms": Variant("deformable", ffn_dim=1024, offset=-0.5, levels=4),
    "dab": Variant("conditional", anchors=True, dropout=0, temperature=20, eps=1e-3, weight_class=1, top=300),
}
VARIANTS["dn"] = replace(VARIANTS["dab"], denoise=True)


class Denoised(NamedTuple):
    """Predictions of DN-DETR's denoising queries (J of them, groups of noisy targets) and what they should say."""

    logits: Tensor  # (L, B, J, K)
    boxes: Tensor  # (L, B, J, 4)
    labels: Tensor  # (B, J)
    target_boxes: Tensor  # (B, J, 4)
    valid: Tensor  # (B, J)


class Prediction(NamedTuple):
    """Outputs of all decoder layers; the last layer is the detector's answer."""

    logits: Tensor  # (L, B, N, K); softmax heads have more columns, the last one "no object"
    boxes: Tensor  # (L, B, N, 4) cxcywh in [0, 1], Eq. (8)
    q_hat: Tensor  # (L, B, N, C), Eq. (2)
    dn: Denoised | None = None


class DETR(nn.Module):
    """Backbone, encoder, decoder and heads: Eq. (1)-(3) and (8). Build it with `build_detector`."""

    def __init__(self, row, num_classes, backbone, stride, hidden_dim, heads, enc_layers, dec_layers, pre_norm,
                 box_refine, patterns):  # fmt: skip
        super().__init__()
        self.row, self.num_classes, self.hidden_dim, self.levels = row, num_classes, hidden_dim, row.levels
        self.patterns, self.box_refine = patterns, box_refine
        self.num_queries = row.num_queries * max(patterns, 1)  # N
        C, N = hidden_dim, row.num_queries
        self.fast_backbone = None
        self.backbone = nn.Sequential(Backbone(backbone))  # official name: backbone.0.body
        channels = self.backbone[0].channels
        self.strides = (8, 16, 32) if row.levels > 1 else (stride,)
        deformable = row.decoder == "deformable"
        if deformable:
            self.input_proj = nn.ModuleList(conv_gn(channels[s], C, 1) for s in self.strides)
            self.input_proj.extend(conv_gn(channels[32], C, 3) for _ in range(row.levels - len(self.strides)))
        else:
            self.input_proj = nn.Conv2d(channels[stride], C, 1)
        self.transformer = Transformer(row, C, heads, enc_layers, dec_layers, pre_norm, patterns)
        if row.anchors:
            self.refpoint_embed = nn.Embedding(N, 4)
        else:
            self.query_embed = nn.Embedding(N, 2 * C if deformable else C)  # phi_q, and Deformable's content beside it
        if row.denoise:
            self.label_enc = nn.Embedding(num_classes + 1, C - 1)  # the last row stands for "no label"
        self.make_heads(num_classes + row.softmax)

    def make_heads(self, outputs):
        """Class and box heads with the official initialisation; one of each, or one per layer with box refinement."""
        C, deformable = self.hidden_dim, self.row.decoder == "deformable"
        copies = self.transformer.decoder.num_layers if self.box_refine else 1
        class_heads = [nn.Linear(C, outputs) for _ in range(copies)]
        box_heads = [MLP(C, C, 4, 3) for _ in range(copies)]
        if not self.row.softmax:
            for head in class_heads:
                nn.init.constant_(head.bias, -math.log(99))  # focal: every class starts at probability 0.01
            for head in box_heads:  # boxes start at the reference
                nn.init.zeros_(head.layers[-1].weight)
                nn.init.zeros_(head.layers[-1].bias)
            if deformable:
                nn.init.constant_(box_heads[0].layers[-1].bias[2:], -2.0)
        self._set_heads(class_heads, box_heads)

    def pretext_heads(self, outputs=3):
        """Siamese's and UP-DETR's heads: classes (unused, object, nothing), boxes with default initialisation."""
        C, copies = self.hidden_dim, self.transformer.decoder.num_layers if self.box_refine else 1
        self._set_heads([nn.Linear(C, outputs) for _ in range(copies)], [MLP(C, C, 4, 3) for _ in range(copies)])

    def _set_heads(self, class_heads, box_heads):
        if self.row.decoder == "deformable":  # official layout: one entry per layer, the same module when shared
            repeat = self.transformer.decoder.num_layers // len(class_heads)
            self.class_embed, self.bbox_embed = nn.ModuleList(class_heads * repeat), nn.ModuleList(box_heads * repeat)
        else:
            self.class_embed, self.bbox_embed = class_heads[0], box_heads[0]

    def forward(self, images, mask, labels=None, boxes=None, valid=None):
        """images (B, 3, H0, W0) normalised, mask (B, H0, W0) -> Prediction.

        labels (B, T), boxes (B, T, 4), valid (B, T): targets, read by DN-DETR in training only.
        """
        h = self.features(images, self.strides)
        noisy = None
        if self.row.denoise and self.training and labels is not None and labels.shape[1]:
            noisy = noisy_targets(labels, boxes, valid, self.num_classes)
        return self.decode(self.encode([h[s] for s in self.strides], mask), dn=noisy)

    def features(self, x, strides):
        """h = Backbone(x): {stride: (B, D, H, W)}."""
        return (self.fast_backbone or self.backbone[0])(x, strides)

    def fold_backbone(self, dtype=torch.float32, compiled=False, trains=False):
        """From now on take features from a folded copy of the backbone: if it trains, as it will be; else as it is, so
        that it is folded again after loading, moving or copying the detector."""
        self.fast_backbone = folded(self.backbone[0], dtype, compiled, trains)

    def encode(self, h, mask):
        """Eq. (1): c = Encoder(h). h: one (B, D, H, W) map per stride; mask (B, H0, W0) of the input. -> Context."""
        if self.row.decoder == "deformable":
            maps = [proj(x) for proj, x in zip(self.input_proj, h, strict=False)]
            maps += [proj(h[-1]) for proj in self.input_proj[len(h) :]]  # fourth level: strided 3x3 on the raw last map
        else:
            maps = [self.input_proj(h[0])]
        masks = [resize_mask(mask, x.shape[-2:]) for x in maps]
        pos = [image_encoding(m, self.hidden_dim, self.row.temperature, self.row.offset) for m in masks]
        if self.row.decoder == "deformable":
            pos = [p + self.transformer.level_embed[g] for g, p in enumerate(pos)]
        ctx = Context(
            c=torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1),
            pos=torch.cat(pos, 1),
            mask=torch.cat([m.flatten(1) for m in masks], 1),
            shapes=[tuple(x.shape[-2:]) for x in maps],
            ratios=torch.stack([unpadded_size(m) / m.new_tensor(m.shape[:0:-1], dtype=torch.float) for m in masks], 1),
        )
        return ctx._replace(c=self.transformer.encoder(ctx))

    def decode(self, ctx, z=None, keep=None, attn_mask=None, dn=None):
        """Eq. (2)-(3) and (8), with z also Eq. (6)-(7): the queries look into ctx and the heads read them out.

        z (B, R, C): region features of the other view; every one conditions N // R consecutive queries.
        keep (B, N, 1): queries that get their z (UP-DETR drops some); attn_mask (N, N): True = may not attend;
        dn: noisy targets (DN-DETR). Raises ValueError when N is not a multiple of R.
        """
        B, N = len(ctx.c), self.num_queries
        if z is not None:
            if N % z.shape[1]:
                raise ValueError(f"--num-queries {N} cannot be shared out evenly among --num-regions {z.shape[1]}")
            z = z.repeat_interleave(N // z.shape[1], 1)  # (B, N, C): queries kN/R ... (k+1)N/R - 1 belong to region k
            z = z if keep is None else z * keep
        query, content, anchor = self._queries(B, z)
        if dn is not None:
            content, anchor, attn_mask = self._prepend_noisy(dn, content, anchor)
        q_hat, reference = self.transformer.decoder(query, content, anchor, ctx, attn_mask, self.bbox_embed)
        logits, boxes = self._heads(q_hat, reference)
        J = q_hat.shape[2] - N
        if not J:
            return Prediction(logits, boxes, q_hat)
        denoised = Denoised(logits[:, :, :J], boxes[:, :, :J], dn.labels, dn.target_boxes, dn.valid)
        return Prediction(logits[:, :, J:], boxes[:, :, J:], q_hat[:, :, J:], denoised)

    def _queries(self, B, z):
        """phi_q + z (Eq. 7) as (positional query, content, anchor), each (B, N, .) or None where a variant has none."""
        if not self.row.anchors:
            phi_q, content = self.query_embed.weight.expand(B, -1, -1), None
            if self.row.decoder == "deformable":
                phi_q, content = phi_q.split(self.hidden_dim, -1)
            query = phi_q if z is None else phi_q + z
            anchor = None if content is None else at_least_float32(self.transformer.reference_points(query)).sigmoid()
            return query, content, anchor
        anchor = self.refpoint_embed.weight.sigmoid().repeat(max(self.patterns, 1), 1).expand(B, -1, -1)
        content = anchor.new_zeros(B, anchor.shape[1], self.hidden_dim)
        if self.row.denoise:
            content = content + F.pad(self.label_enc.weight[-1], (0, 1))  # "no label", and indicator 0
        elif self.patterns:
            content = content + self.transformer.patterns.weight.repeat_interleave(self.row.num_queries, 0)
        # DAB and DN: z is the content query, anchors stay learned. Our reading; no code was released for these two.
        return None, (content if z is None else content + z), anchor

    def _prepend_noisy(self, dn, content, anchor):
        """Put DN-DETR's queries before the matching ones -> content, anchors (B, J + N, .) and the attention mask.

        True in the mask: may not look. Every query sees the matching ones; noisy ones are seen by their own group only.
        """
        noisy = torch.cat([self.label_enc(dn.noisy_labels), torch.ones_like(dn.noisy_boxes[..., :1])], -1)
        noisy = noisy * dn.valid.unsqueeze(-1)
        content = torch.cat([noisy, content], 1)
        anchor = torch.cat([torch.where(dn.valid.unsqueeze(-1), dn.noisy_boxes, 0.5), anchor], 1)
        group = F.pad(dn.group, (0, content.shape[1] - len(dn.group)), value=-1)  # (J + N,), matching queries: -1
        return content, anchor, (group[None] >= 0) & (group[None] != group[:, None])

    def _heads(self, q_hat, reference):
        """Class and box heads on (L, B, N, C): Eq. (8), relative to the reference (L, B, N, 2 or 4) if there is one."""
        if self.box_refine:
            logits = torch.stack([head(q) for head, q in zip(self.class_embed, q_hat, strict=True)])
            delta = torch.stack([head(q) for head, q in zip(self.bbox_embed, q_hat, strict=True)])
        else:
            shared = self.row.decoder == "deformable"  # the official list of six times the same head
            logits = (self.class_embed[0] if shared else self.class_embed)(q_hat)
            delta = (self.bbox_embed[0] if shared else self.bbox_embed)(q_hat)
        logits, delta = at_least_float32(logits), at_least_float32(delta)
        if reference is not None:
            delta = delta + F.pad(inverse_sigmoid(reference, self.row.eps), (0, 4 - reference.shape[-1]))
        return logits, delta.sigmoid()

    def freeze_backbone(self, everything):
        """Train nothing of the backbone, or (fine-tuning) all that is used but the stem and first stage."""
        self.backbone[0].freeze(() if everything else self.strides)

    @torch.no_grad()
    def top_boxes(self, pred, size):
        """The last layer's best detections: per image (scores, labels, boxes_xyxy in pixels of size (B, 2) = w, h)."""
        logits, boxes = pred.logits[-1].float(), box_convert(pred.boxes[-1].float(), "cxcywh", "xyxy")
        if self.row.softmax:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, order = scores.sort(descending=True)
            labels = labels.gather(1, order)
        else:
            K = logits.shape[-1]
            scores, order = logits.sigmoid().flatten(1).topk(min(self.row.top, logits[0].numel()))
            labels, order = order % K, order // K
        boxes = boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)) * size.to(boxes).repeat(1, 2)[:, None]
        return list(zip(scores, labels, boxes, strict=True))


def build_detector(variant, num_classes=91, **overrides):
    """A detector of the family at its official size, or smaller by overrides. `.settings` rebuilds it.

    overrides: backbone, stride (16 or 32, single scale), hidden_dim, heads, ffn_dim, enc_layers, dec_layers,
    num_queries, dropout; pre_norm (vanilla), box_refine (Deformable), patterns (DAB). Returns a DETR:
    detector(images (B, 3, H0, W0), mask (B, H0, W0)) -> Prediction. Raises ValueError on what does not exist or fit.
    """
    if variant not in VARIANTS:
        raise ValueError(f"--variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    row = VARIANTS[variant]
    build = {  # sizes: paper Sec. 4.1
        "backbone": "resnet50", "stride": 32, "hidden_dim": 256, "heads": 8, "enc_layers": 6, "dec_layers": 6,
        "ffn_dim": None, "num_queries": row.num_queries, "dropout": row.dropout,
        "pre_norm": False, "box_refine": False, "patterns": 0,
    }  # fmt: skip
    if "two_stage" in overrides:
        raise ValueError("two-stage Deformable DETR is not built: the paper does not use it")
    meaningless = {
        "pre_norm": variant != "vanilla",
        "box_refine": row.decoder != "deformable",
        "patterns": variant != "dab",
        "stride": row.levels > 1,
    }
    for key, value in overrides.items():
        if key not in build:
            raise ValueError(f"build_detector: unknown override {key!r}; there are {', '.join(build)}")
        if meaningless.get(key) and value != build[key]:
            raise ValueError(f"build_detector: {key}={value!r} has no meaning for variant {variant}")
        build[key] = value
    build["ffn_dim"] = build["ffn_dim"] or row.ffn_dim * build["hidden_dim"] // 256
    counts = dict.fromkeys("num_classes hidden_dim heads enc_layers dec_layers num_queries ffn_dim".split(), 1)
    for key, least in {**counts, "patterns": 0}.items():
        value = num_classes if key == "num_classes" else build[key]
        if not isinstance(value, int) or value < least:
            raise ValueError(f"build_detector: {key}={value!r} must be a whole number of at least {least}")
    if build["hidden_dim"] % 32 or build["hidden_dim"] % build["heads"]:
        raise ValueError(f"--hidden-dim {build['hidden_dim']}: must be a multiple of 32 and of {build['heads']} heads")
    if build["stride"] not in (16, 32):
        raise ValueError(f"--stride {build['stride']}: single-scale variants read the map of stride 16 or 32")
    settings = dict(variant=variant, num_classes=num_classes, **build)
    row = replace(row, **{key: build.pop(key) for key in ("num_queries", "ffn_dim", "dropout")})
    detector = DETR(row, num_classes, **build)
    detector.settings = settings
    return detector


class NoisyTargets(NamedTuple):
    """DN-DETR's denoising queries before encoding: J = groups * T slots per image."""

    noisy_labels: Tensor  # (B, J)
    noisy_boxes: Tensor  # (B, J, 4)
    labels: Tensor  # (B, J) clean
    target_boxes: Tensor  # (B, J, 4) clean
    valid: Tensor  # (B, J)
    group: Tensor  # (J,)


def noisy_targets(labels, boxes, valid, num_classes, groups=5, label_noise=0.2, box_noise=0.4):
    """Five noisy copies of all targets (DN-DETR, Sec. 4): labels flip with probability 0.2, boxes move and rescale.

    Centres shift by up to box_noise / 2 of the side, sides scale by 1 +- box_noise. labels (B, T), boxes (B, T, 4).
    """
    T = labels.shape[1]
    labels, boxes, valid = labels.repeat(1, groups), boxes.repeat(1, groups, 1), valid.repeat(1, groups)
    flip = torch.rand(labels.shape, device=labels.device) < label_noise
    noisy_labels = torch.where(flip, torch.randint_like(labels, num_classes), labels)
    noise = (torch.rand_like(boxes) * 2 - 1) * box_noise
    span = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
    noisy_boxes = inverse_sigmoid(boxes + noise * span, 1e-3).sigmoid()  # official code: within 0.001 of 0 and 1
    group = torch.arange(groups, device=labels.device).repeat_interleave(T)
    return NoisyTargets(noisy_labels, noisy_boxes, labels, boxes, valid, group)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Small parts
# ---------------------------------------------------------------------------------------------------------------------


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over (B, C) whose batch is that of all ranks together; nn.SyncBatchNorm refuses CPU tensors."""

    def forward(self, x):
        x = at_least_float32(x)
        if not self.training or not (dist.is_initialized() and dist.get_world_size() > 1):
            if self.training and len(x) < 2:
                raise ValueError("the global head needs two images a forward: raise --batch-size or --micro-batch")
            return super().forward(x)
        wide = x.double()  # E[x^2] - E[x]^2 cancels
        total = SumOverRanks.apply(torch.cat([wide.sum(0), (wide * wide).sum(0), wide.new_tensor([len(x)])]))
        n = total[-1].detach()
        mean, square = total[:-1].div(n).chunk(2)
        var = square - mean * mean
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), self.momentum)
        return ((wide - mean) * (var + self.eps).rsqrt()).to(x) * self.weight + self.bias


class SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class RunningStandardise(nn.Module):
    """(x - mean) / std with the mean and std of all valid features seen so far, over all ranks; no gradient."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("total", torch.zeros(2 * dim + 1))  # sum x, sum x^2, count

    @torch.no_grad()
    def forward(self, x, valid=None):
        """x (B, R, D), valid (B, R), None: all -> (B, R, D)."""
        flat, count = x.flatten(0, 1), (x.new_ones(x.shape[:2]) if valid is None else valid.to(x)).reshape(-1, 1)
        if self.training:
            seen = torch.cat([(count * flat).sum(0), (count * flat * flat).sum(0), count.sum(0)])
            if dist.is_initialized():
                dist.all_reduce(seen)
            self.total += seen
        mean, square = self.total[:-1].div(self.total[-1].clamp(min=1)).chunk(2)
        return (x - mean) * (square - mean * mean).clamp(min=1e-6).rsqrt()


def fc_bn(dim_in, dim_out):
    return nn.Linear(dim_in, dim_out), BatchNorm(dim_out)


def conv_gn(dim_in, dim_out, kernel):
    """Deformable DETR's projection of one level: 1x1, or 3x3 with stride 2 for the extra level, and group norm."""
    conv = nn.Conv2d(dim_in, dim_out, kernel, stride=(kernel + 1) // 2, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, dim_out))


def main():
    """One row per variant: parameters, tensors, output shapes, multiply-adds of one 640x640 image."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    print(f"{'variant':14}{'parameters':>12}{'tensors':>9}{'logits':>20}{'boxes':>18}{'GMAC at 640x640':>17}")
    for variant in VARIANTS:
        detector = build_detector(variant).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # what the counter can see
            out = detector(torch.zeros(1, 3, 640, 640), torch.zeros(1, 640, 640, dtype=torch.bool))
        numbers = f"{sum(p.numel() for p in detector.parameters()):12,}{len(detector.state_dict()):9}"
        shapes = f"{str(tuple(out.logits.shape)):>20}{str(tuple(out.boxes.shape)):>18}"
        print(f"{variant:14}{numbers}{shapes}{counter.get_total_flops() / 2e9:17.1f}")


if __name__ == "__main__":
    main()
