"""The matching and the losses written literally: one query, one target, one number at a time, in Python floats.

Written to be read beside paper Sec. 3.3, not to be fast; `test_losses.py` holds losses.py to it. A box is (cx, cy, w,
h) in [0, 1]. The arguments are nested lists of one decoder layer: logits[image][query][class], boxes[image][query],
labels[image][target], targets[image][target]. Images may differ in their number of targets: there is no padding here.
A match of one image is a dict {target: query}. At the end: random cases for both, with their way into lists.
"""

import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

# ---------------------------------------------------------------------- small formulas


def softmax(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def corners(box):
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def l1_distance(box, target):
    return sum(abs(a - b) for a, b in zip(box, target, strict=True))


def giou(box, target):
    """IoU minus the share of the smallest enclosing box that the union leaves empty."""
    ax0, ay0, ax1, ay1 = corners(box)
    bx0, by0, bx1, by1 = corners(target)
    intersection = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return intersection / union - (hull - union) / hull


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


# ---------------------------------------------------------------------- matching


def class_cost(logits, label, use_softmax):
    if use_softmax:
        return -softmax(logits)[label]
    p = sigmoid(logits[label])
    positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    negative = 0.75 * p**2 * -math.log(1 - p + 1e-8)
    return positive - negative


def pair_cost(logits, box, label, target, use_softmax, cost_class, cost_l1=5, cost_giou=2):
    cost = cost_class * class_cost(logits, label, use_softmax)
    return cost + cost_l1 * l1_distance(box, target) + cost_giou * -giou(box, target)


def match_image(logits, boxes, labels, targets, use_softmax, cost_class):
    """The cheapest of all one-to-one assignments of min(N, T) targets, by trying every one."""
    N, T = len(boxes), len(targets)
    cost = [
        [pair_cost(logits[q], boxes[q], labels[t], targets[t], use_softmax, cost_class) for t in range(T)]
        for q in range(N)
    ]
    best, best_cost = {}, math.inf
    for chosen in itertools.combinations(range(T), min(N, T)):
        for queries in itertools.permutations(range(N), len(chosen)):
            total = sum(cost[q][t] for q, t in zip(queries, chosen, strict=True))
            if total < best_cost:
                best, best_cost = dict(zip(chosen, queries, strict=True)), total
    return best


def match_image_groups(logits, boxes, labels, targets, use_softmax, cost_class):
    """Target r takes the cheapest of queries r * N / R ... (r + 1) * N / R - 1."""
    size, assignment = len(boxes) // len(targets), {}
    for r in range(len(targets)):
        group = range(r * size, (r + 1) * size)
        cost = {q: pair_cost(logits[q], boxes[q], labels[r], targets[r], use_softmax, cost_class) for q in group}
        assignment[r] = min(group, key=cost.get)
    return assignment


# ---------------------------------------------------------------------- losses


def cross_entropy(logits, matches, labels):
    """Weighted mean over all queries: weight 1 with a target, 0.1 without (the last class)."""
    numerator = denominator = 0.0
    for image, match in enumerate(matches):
        label_of = {query: labels[image][target] for target, query in match.items()}
        for query, row in enumerate(logits[image]):
            weight = 1.0 if query in label_of else 0.1
            numerator += weight * -math.log(softmax(row)[label_of.get(query, len(row) - 1)])
            denominator += weight
    return numerator / denominator


def focal_of_query(logits, label):
    """Sigmoid focal loss summed over classes; label None for a query without target."""
    total = 0.0
    for k, x in enumerate(logits):
        p = sigmoid(x)
        total += 0.25 * (1 - p) ** 2 * -math.log(p) if k == label else 0.75 * p**2 * -math.log(1 - p)
    return total


def focal_loss(logits, matches, labels, num_boxes):
    total = 0.0
    for image, match in enumerate(matches):
        label_of = {query: labels[image][target] for target, query in match.items()}
        total += sum(focal_of_query(row, label_of.get(query)) for query, row in enumerate(logits[image]))
    return total / num_boxes


def box_losses(boxes, matches, targets, num_boxes):
    """l_box of Eq. (9): the L1 part and the GIoU part."""
    pairs = [(boxes[i][query], targets[i][t]) for i, match in enumerate(matches) for t, query in match.items()]
    l1 = sum(l1_distance(box, target) for box, target in pairs)
    overlap = sum(1 - giou(box, target) for box, target in pairs)
    return l1 / num_boxes, overlap / num_boxes


def region_loss(p_hat, matches, p, num_boxes):
    """L_r of Eq. (12); p_hat[image][query] of this view, p[image][region] of the other view."""
    total = 0.0
    for image, match in enumerate(matches):
        for target, query in match.items():
            total += 2 - 2 * cosine(p_hat[image][query], p[image][target])
    return total / num_boxes


def global_loss(pred1, pred2, proj1, proj2):
    """L_g of Eq. (11), half of each direction, each shifted by 2."""
    B = len(pred1)
    direction1 = sum(2 - 2 * cosine(pred1[i], proj2[i]) for i in range(B)) / B
    direction2 = sum(2 - 2 * cosine(pred2[i], proj1[i]) for i in range(B)) / B
    return direction1 / 2 + direction2 / 2


def denoising_losses(logits, boxes, labels, targets, num):
    """DN-DETR: query i of an image answers target i; queries beyond the targets are padding."""
    B = len(labels)
    matches = [{t: t for t in range(len(labels[i]))} for i in range(B)]
    focal = sum(focal_of_query(logits[i][t], labels[i][t]) for i in range(B) for t in matches[i]) / num
    return (focal, *box_losses(boxes, matches, targets, num))


# ---------------------------------------------------------------------- VOC 2007's metric


def iou(box, other):
    """Of two boxes (x, y, w, h)."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = box, other
    intersection = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(0, min(ay + ah, by + bh) - max(ay, by))
    return intersection / (aw * ah + bw * bh - intersection)


def eleven_point_ap(objects, detections, least):
    """AP of one class at one IoU; objects [(image, box, ignored)], detections [(image, box, score)]."""
    needed = sum(not ignored for _, _, ignored in objects)
    taken, right, seen, curve = set(), 0, 0, []
    for image, box, _ in sorted(detections, key=lambda detection: -detection[2]):
        best, overlap = None, least
        for i, (where, other, _) in enumerate(objects):
            if where == image and iou(box, other) > overlap:
                best, overlap = i, iou(box, other)
        if best is not None and objects[best][2]:
            continue
        seen += 1
        if best is not None and best not in taken:
            taken.add(best)
            right += 1
        curve.append((right / needed, right / seen))
    return sum(max([p for r, p in curve if r >= k / 10], default=0) for k in range(11)) / 11


# ---------------------------------------------------------------------- random cases


class Case(NamedTuple):
    """Predictions and ragged targets as losses.py takes them."""

    logits: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor

    def images(self, index):
        return Case(self.logits[:, index], self.boxes[:, index], *[x[index] for x in self[2:]])

    def pretext(self, q_hat, p, predicted_context, projected_context):
        """A pretext method's answer and its batch; the first half of the images is view 1."""
        pred = SimpleNamespace(logits=self.logits, boxes=self.boxes, q_hat=q_hat)
        context = {"predicted_context": predicted_context, "projected_context": projected_context}
        boxes, valid = (x.unflatten(0, (2, -1)) for x in (self.targets, self.valid))
        return SimpleNamespace(pred=pred, p=p, **context), SimpleNamespace(boxes=boxes, valid=valid, labels=None)

    def lists(self, layer):
        """One layer without padding: logits, boxes, labels, targets."""
        labels, targets = ([row[keep].tolist() for row, keep in zip(x, self.valid, strict=True)] for x in self[2:4])
        return self.logits[layer].tolist(), self.boxes[layer].tolist(), labels, targets


def as_dicts(match, layer):
    """One layer of a losses.Match as a {target: query} per image."""
    rows = zip(match.query[layer].tolist(), match.matched[layer].tolist(), strict=True)
    return [{t: q for t, (q, m) in enumerate(zip(query, matched, strict=True)) if m} for query, matched in rows]


def random_boxes(*shape, generator):
    """Boxes inside the image, sides 0.05 ... 0.5."""
    side, place = torch.rand(2, *shape, 2, generator=generator, dtype=torch.float64)
    side = 0.05 + 0.45 * side
    return torch.cat([side / 2 + (1 - side) * place, side], -1)


def random_case(seed, counts=(3, 0, 1), N=5, K=4, T=None, L=2):
    """counts[i] targets in image i, padded with rubbish to T."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(counts), max(counts) if T is None else T
    logits = 2 * torch.randn(L, B, N, K, generator=g, dtype=torch.float64)
    labels = torch.randint(0, K - 1, (B, T), generator=g)
    valid = torch.arange(T) < torch.tensor(counts)[:, None]
    return Case(logits, random_boxes(L, B, N, generator=g), labels, random_boxes(B, T, generator=g), valid)
