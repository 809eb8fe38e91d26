"""Matching and losses of Siamese DETR (paper Sec. 3.3, Eq. 9-13) and of the detectors it pretrains.

Reading order: pretext_losses, match, detection_losses (Eq. 9), region_loss (Eq. 12), global_loss (Eq. 11),
weighted_sum (Eq. 13), denoising_losses (DN-DETR), helpers.

Boxes are (cx, cy, w, h) in [0, 1] of the unpadded image. B images, N queries, L decoder layers, K logits
(under a softmax the last is "nothing"), T targets padded to the largest image (`valid` marks the real ones), J
denoising queries, R regions, D feature channels, C width.

`num_boxes` is the one normaliser: all targets of the optimiser step (at least 1) divided by the number of chunks, ranks
times micro-batches, that share the step. The mean of the chunks' losses is then the loss of the joint batch.
Losses come per layer, (L,), in float32 whatever the network's precision; float64 stays float64.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, sigmoid_focal_loss

NO_OBJECT = 0.1  # weight of the last class of the softmax head in the cross-entropy: DETR, released code
ALPHA, GAMMA = 0.25, 2.0  # focal loss and focal matching cost: Conditional and Deformable DETR
UNUSABLE = 1e6  # ours: cost of a NaN or infinite prediction, far above any real cost, so that it is matched last
MIN_AREA = 1e-12  # ours: keeps 0 / 0 away when both boxes are points; a pixel of a 10,000 x 10,000 image has area 1e-8
PRETEXT_WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0}  # released code; a recipe adds "region" (w_f), "global" (w_g)


class Match(NamedTuple):
    """Which query answers which target, for every layer and image."""

    query: Tensor  # (L, B, T) long, 0 where unmatched
    matched: Tensor  # (L, B, T) bool; False for padding, and for the targets left over when T > N


def pretext_losses(net, answer, batch, how="hungarian", num_boxes=None):
    """Every term of a pretext method, and the share of last-layer matches that fall on the region's own N / R queries.

    net (model.Pretext) has the heads and says what the terms are; answer (model.Answer) holds V*B rows, Siamese's 2B:
    in the first B, view 1 is searched for the regions of view 2, then the reverse; batch (views.ViewBatch) the clean
    boxes (V, B, R, 4). num_boxes None: V*B*R. For Siamese, dividing by the regions of both directions gives their
    mean, half the sums of Eq. (9) and (12) (released code). how: hungarian or group. Returns "class", "l1", "giou",
    "region" (L,), DETReg's (1,), "consistency" (L,) and "global" (), without the terms whose target or head is absent;
    the share is None for DETReg, whose queries belong to no region. Raises ValueError on another `how`.
    """
    if how not in ("hungarian", "group"):
        raise ValueError(f"matching {how!r}: choose hungarian or group")
    pred, boxes, valid = answer.pred, batch.boxes.flatten(0, 1), batch.valid.flatten(0, 1)  # (V*B, R, 4), (V*B, R)
    R, num_boxes = valid.shape[1], valid.numel() if num_boxes is None else num_boxes
    labels = region_labels(net, batch)
    kind = {"softmax": net.softmax, "cost_class": net.cost_class}
    found = (match if how == "hungarian" else match_groups)(pred.logits, pred.boxes, labels, boxes, valid, **kind)
    terms = detection_losses(pred.logits, pred.boxes, found, labels, boxes, softmax=net.softmax, num_boxes=num_boxes)
    q_hat = full_precision(take_matched(pred.q_hat, found))  # (L, V*B, R, C), all that f_sem needs
    if answer.p is not None and net.cosine:
        terms["region"] = region_loss(net.f_sem(q_hat), answer.p, found.matched, num_boxes)  # Eq. (10)
    elif answer.p is not None:
        terms["region"] = embedding_loss(net.f_sem(q_hat[-1:]), answer.p, found.matched[-1:], num_boxes)
    if net.consistency is not None:  # a region's output in one view against that in the other (SeqCo-DETR)
        other, found_there = (x.unflatten(1, (2, -1)).flip(1).flatten(1, 2) for x in (q_hat, found.matched))
        terms["consistency"] = region_loss(net.consistency(q_hat), other, found.matched & found_there, num_boxes)
    if answer.predicted_context is not None:
        terms["global"] = global_loss(*answer.predicted_context.chunk(2), *answer.projected_context.chunk(2))
    if not net.asks:
        return terms, None
    own = found.query[-1] // (pred.boxes.shape[2] // R) == torch.arange(R, device=valid.device)
    return terms, (own & found.matched[-1]).sum() / found.matched[-1].sum()


def region_labels(net, batch):
    """The class that each region is trained as, (V*B, R): its pseudo-class, or where it has none all others'."""
    pseudo = torch.full_like(batch.valid, -1, dtype=torch.long) if batch.labels is None else batch.labels
    return torch.where(pseudo >= 0, net.first + pseudo, net.other).flatten(0, 1)


@torch.no_grad()
def match(logits, boxes, labels, target_boxes, valid, *, softmax, cost_class, cost_l1=5.0, cost_giou=2.0) -> Match:
    """Assign targets to queries one to one at the least total cost, anew for each layer and image (as DETR does).

    logits (L, B, N, K), boxes (L, B, N, 4), labels (B, T) in 0..K-1 also where padded, target_boxes (B, T, 4), valid
    (B, T) bool. Any query may take any target of its image, whatever region it was made from (released code).
    """
    cost = matching_cost(logits, boxes, labels, target_boxes, softmax, cost_class, cost_l1, cost_giou)
    host = cost.masked_fill(~valid[:, None], torch.inf).cpu().numpy()  # the one copy; padding travels along as inf
    query = np.full((host.shape[0], host.shape[1], host.shape[3]), -1, dtype=np.int64)
    for layer, image in np.ndindex(query.shape[:2]):
        real = np.flatnonzero(np.isfinite(host[layer, image, 0]))
        rows, columns = linear_sum_assignment(host[layer, image][:, real])  # min(N, T) pairs
        query[layer, image, real[columns]] = rows
    query = torch.from_numpy(query).to(cost.device)
    return Match(query.clamp(min=0), query >= 0)


@torch.no_grad()
def match_groups(
    logits, boxes, labels, target_boxes, valid, *, softmax, cost_class, cost_l1=5.0, cost_giou=2.0
) -> Match:
    """Give each of T = R regions the cheapest of its own N / R queries (ours: a query knows only its own region's z).

    Shapes and cost as in `match`. Stays on the device. Raises ValueError unless R divides N.
    """
    L, B, N = boxes.shape[:3]
    R = labels.shape[1]
    if R == 0 or N % R:
        raise ValueError(f"{N} queries cannot be shared by {R} regions; choose a number of queries divisible by it")
    cost = matching_cost(logits, boxes, labels, target_boxes, softmax, cost_class, cost_l1, cost_giou)
    own = cost.reshape(L, B, R, N // R, R).diagonal(dim1=2, dim2=4)  # (L, B, N / R, R): group r against target r
    query = own.argmin(2) + torch.arange(R, device=own.device) * (N // R)
    matched = valid.expand(L, B, R)
    return Match(query * matched, matched)


def matching_cost(logits, boxes, labels, target_boxes, softmax, cost_class, cost_l1, cost_giou):
    """Finite cost of each query for each target of its own image, (L, B, N, T)."""
    logits, boxes = full_precision(logits), full_precision(boxes)
    label = labels[:, None].expand(*boxes.shape[:3], -1)  # (L, B, N, T)
    if softmax:
        class_cost = -logits.softmax(-1).gather(-1, label)
    else:
        p = logits.gather(-1, label).sigmoid()
        positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
        negative = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
        class_cost = positive - negative
    pair, target = boxes[..., None, :], target_boxes[:, None]  # (L, B, N, 1, 4), (B, 1, T, 4)
    l1 = (pair - target).abs().sum(-1)
    cost = cost_class * class_cost + cost_l1 * l1 - cost_giou * generalized_iou(pair, target)
    return cost.nan_to_num(nan=UNUSABLE, posinf=UNUSABLE, neginf=UNUSABLE)


def detection_losses(logits, boxes, match, labels, target_boxes, *, softmax, num_boxes):
    """{"class": (L,), "l1": (L,), "giou": (L,)}, the last two l_box of Eq. (9); shapes as in `match`."""
    l1, giou = box_losses(boxes, target_boxes, match, num_boxes)
    return {"class": class_loss(logits, match, labels, softmax=softmax, num_boxes=num_boxes), "l1": l1, "giou": giou}


def class_loss(logits, match, labels, *, softmax, num_boxes):
    """Cross-entropy with a no-object class (the last logit), or sigmoid focal loss, over all queries; (L,).

    Not in Eq. (9): released code.

    The cross-entropy is a weighted mean whose denominator follows from counts, so that no second number travels between
    ranks: `num_boxes` queries of weight 1, the rest of B * N of weight 0.1. It is the weighted mean of the joint batch
    if every chunk has B images and no image has more targets than queries.
    """
    L, B, N, K = logits.shape
    logits = full_precision(logits)
    classes = query_classes(match, labels, N, nothing=K - 1 if softmax else K)
    if not softmax:
        return focal(logits, classes).sum((1, 2, 3)) / num_boxes
    weight = logits.new_ones(K)
    weight[-1] = NO_OBJECT
    loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none")  # (L*B*N,)
    return loss.view(L, B * N).sum(1) / (num_boxes + NO_OBJECT * (B * N - num_boxes))


def box_losses(boxes, target_boxes, match, num_boxes):
    """l_box of Eq. (9): |b_hat - b| and 1 - GIoU, summed over matched pairs / `num_boxes`; l1 (L,), giou (L,)."""
    unmatched = ~match.matched[..., None]  # such pairs become two equal boxes: zero loss, zero gradient
    predicted = full_precision(take_matched(boxes, match)).masked_fill(unmatched, 0.5)  # (L, B, T, 4)
    target = target_boxes.expand_as(predicted).masked_fill(unmatched, 0.5)
    l1 = (predicted - target).abs().sum((1, 2, 3)) / num_boxes  # Eq. (9)
    giou = (1 - generalized_iou(predicted, target)).sum((1, 2)) / num_boxes  # Eq. (9)
    return l1, giou


def region_loss(p_hat, p, matched, num_boxes):
    """L_r of Eq. (12): squared distance of normalised features, summed over matched pairs / `num_boxes`; (L,).

    p_hat (L, B, T, D) = f_sem(take_matched(q_hat)), Eq. (10), in the order of the targets; p (B, T, D) the features of
    the same regions in the *other* view, which get no gradient; matched (L, B, T). A pair costs 2 - 2 cos, in [0, 4].
    """
    p_hat, p = full_precision(p_hat), full_precision(p).detach()
    distance = (F.normalize(p_hat, dim=-1) - F.normalize(p, dim=-1)).square().sum(-1)  # Eq. (12), (L, B, T)
    return distance.masked_fill(~matched, 0).sum((1, 2)) / num_boxes


def embedding_loss(p_hat, p, matched, num_boxes):
    """DETReg's: mean absolute difference of features, over matched pairs / `num_boxes`; shapes as in `region_loss`.

    Released code averages over the pairs of one process; here over those of the whole step.
    """
    distance = (full_precision(p_hat) - full_precision(p).detach()).abs().mean(-1)
    return distance.masked_fill(~matched, 0).sum((1, 2)) / num_boxes


def global_loss(pred1, pred2, proj1, proj2):
    """L_g of Eq. (11) as 2 - 2 cos, mean over images and both directions; a scalar in [0, 4].

    All (B, C). proj is the MLP of Eq. (11) on the pooled context c, pred a predictor on top of it (released code, after
    SimSiam; the paper's formula has no predictor and compares with c itself). The constant 2 leaves the gradient alone.
    """
    pred1, pred2 = full_precision(pred1), full_precision(pred2)
    proj1, proj2 = full_precision(proj1).detach(), full_precision(proj2).detach()  # Eq. (11): detach(c)
    cosine = F.cosine_similarity(pred1, proj2).mean() + F.cosine_similarity(pred2, proj1).mean()
    return 2 - cosine  # Eq. (11)


def weighted_sum(losses, weights):
    """Total of Eq. (13), layers added up; ValueError for a loss without a weight or a weight without a loss."""
    if losses.keys() != weights.keys():
        extra, lacking = sorted(losses.keys() - weights.keys()), sorted(weights.keys() - losses.keys())
        raise ValueError(f"losses without a weight: {extra}; weights without a loss: {lacking}; each needs the other")
    return sum(weights[name] * losses[name].sum() for name in losses)  # Eq. (13)


def denoising_losses(logits, boxes, labels, target_boxes, valid, num):
    """DN-DETR's losses: query i answers target i, so nothing is matched, and queries that only pad are left out.

    logits (L, B, J, K), boxes (L, B, J, 4); clean labels (B, J) and target_boxes (B, J, 4), of the J denoising
    queries; valid (B, J); num is `num_boxes` of them, all groups counted. Returns a dict of (L,).
    """
    L, B, J = logits.shape[:3]
    matched = valid.expand(L, B, J)
    fixed = Match(torch.arange(J, device=valid.device).expand(L, B, J), matched)
    by_query = focal(full_precision(logits), labels.expand(L, B, J)).sum(-1).masked_fill(~matched, 0)  # (L, B, J)
    l1, giou = box_losses(boxes, target_boxes, fixed, num)
    return {"dn_class": by_query.sum((1, 2)) / num, "dn_l1": l1, "dn_giou": giou}


def take_matched(x, match):
    """The matched queries of x (L, B, N, ...) by target, (L, B, T, ...): all f_sem needs, Eq. (10)."""
    return torch.take_along_dim(x, match.query[(...,) + (None,) * (x.dim() - 3)], dim=2)


def query_classes(match, labels, N, nothing):
    """The class each query should predict, (L, B, N): the label of its target, else `nothing`."""
    L, B, _ = match.query.shape
    slot = match.query.masked_fill(~match.matched, N)  # a spare column takes the unmatched and is cut off
    return labels.new_full((L, B, N + 1), nothing).scatter_(2, slot, labels.expand(L, -1, -1))[..., :N]


def focal(logits, classes):
    """Sigmoid focal loss of each logit, (..., N, K), for classes (..., N); class K stands for none."""
    one_hot = classes[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    return sigmoid_focal_loss(logits, one_hot.to(logits.dtype), alpha=ALPHA, gamma=GAMMA)


def generalized_iou(a, b):
    """GIoU of cxcywh boxes that broadcast, (..., 4) -> (...). MIN_AREA changes nothing from sides of 1e-6 on.

    Stands in for torchvision's: generalized_box_iou takes all pairs of two flat lists, generalized_box_iou_loss waits
    for the device and adds 1e-7 to areas in [0, 1], a 10 % error for a box of side 0.001.
    """
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")

    def area(low, high):
        width, height = (high - low).clamp(min=0).unbind(-1)
        return width * height

    intersection = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - intersection
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return intersection / union.clamp(min=MIN_AREA) - (hull - union) / hull.clamp(min=MIN_AREA)


def full_precision(x):
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
