"""The pretraining step as the released code takes it, on our network's weights: what `bench.speed step` compares with.

Only these habits of the released code are kept, none slower than it needs to be: four calls of the backbone (two views,
their crops), its frozen batch norms unfused, NCHW, float32; attention that forms and returns its weights, matrix
products as torch has them; both directions one after the other; one matcher call and one copy per layer and direction;
losses layer by layer; AdamW as it comes. Everything else is ours, so that both steps have the same loss terms to the
last digits in double precision.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

import detectors
import losses
from data import normalise
from ops import dense
from ops.deform_attn import reference


@contextmanager
def released_operators():
    """Attention as nn.MultiheadAttention computes it when asked for its weights: scores, softmax, dropout, product.

    Deformable attention by grid_sample: what the released code can do without a GPU. Matrix products by torch alone.
    """
    fused, compiled, ours = F.scaled_dot_product_attention, detectors.deform_attn, dense.linear

    def attend(q, k, v, attn_mask=None, dropout_p=0.0):
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        weights = scores.softmax(-1)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
        weights.mean(1)  # over heads: what is returned, and dropped by the caller
        return weights @ v

    F.scaled_dot_product_attention, detectors.deform_attn = attend, reference
    detectors.linear = dense.linear = F.linear
    try:
        yield
    finally:
        F.scaled_dot_product_attention, detectors.deform_attn = fused, compiled
        detectors.linear = dense.linear = ours


@released_operators()
def pretext_terms(net, batch):
    """Siamese's loss terms, as losses.pretext_losses gives them, of a ViewBatch: {"class": (L,), ..., "global": ()}."""
    det = net.detector
    backbone = det.backbone[0]  # whatever fold_backbone did
    with torch.no_grad():
        x = [normalise(x, mask) for x, mask in zip(batch.x, batch.mask, strict=True)]
        h = [backbone(view, {*det.strides, *net.region_strides}) for view in x]
        z = [net.centre_z(net.region_features(*pair)) for pair in zip(h, batch.rois, batch.mask, strict=True)]
        p = []
        for crops in batch.crops:
            maps = backbone(normalise(crops.flatten(0, 1)), net.crop_strides)
            pooled = torch.cat([maps[s].mean((2, 3)) for s in net.crop_strides], 1)
            p.append(net.centre_p(pooled.unflatten(0, crops.shape[:2])))
    contexts = [net.encode(maps, mask) for maps, mask in zip(h, batch.mask, strict=True)]
    answers = [det.decode(ctx, z=net.patch2query(region)) for ctx, region in zip(contexts, z[::-1], strict=True)]
    directions = [
        direction(net, pred, *rest) for pred, *rest in zip(answers, batch.boxes, batch.valid, p[::-1], strict=True)
    ]
    terms = {name: sum(d[name] for d in directions) / 2 for name in directions[0]}
    projected = [net.projector(pooled_context(ctx)) for ctx in contexts]
    predicted = [net.predictor(g) for g in projected]
    terms["global"] = losses.global_loss(*predicted, *projected)
    return terms


def direction(net, pred, boxes, valid, p):
    """Terms of one view's predictions, layer by layer."""
    layers, labels, num = [], torch.full_like(valid, net.other, dtype=torch.long), valid.numel()
    for logits, box, q_hat in zip(pred.logits, pred.boxes, pred.q_hat, strict=True):
        one = logits[None], box[None]
        found = losses.match(*one, labels, boxes, valid, softmax=True, cost_class=1.0)
        terms = losses.detection_losses(*one, found, labels, boxes, softmax=True, num_boxes=num)
        p_hat = net.f_sem(losses.take_matched(q_hat[None], found))
        layers.append(terms | {"region": losses.region_loss(p_hat, p, found.matched, num)})
    return {name: torch.cat([terms[name] for terms in layers]) for name in layers[0]}


def pooled_context(ctx):
    """Mean of the unpadded cells of each level but a fourth, joined: (B, C) or (B, 3 C)."""
    pooled = []
    for c, blocked in zip(ctx.split(ctx.c)[:3], ctx.split(ctx.mask)[:3], strict=True):
        keep = (~blocked).unsqueeze(-1).to(c.dtype)
        pooled.append((c * keep).sum(1) / keep.sum(1))
    return torch.cat(pooled, 1)
