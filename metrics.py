"""Average precision of detections: COCO's 12 numbers (the paper reports six, Sec. 4.1), or VOC 2007's 11 points.

Results are COCO's: image_id and category_id of the json, bbox [x, y, w, h] in pixels of the original image, score.
Read `evaluate`, then the metric.
"""

import contextlib
import math

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

try:  # the same 12 numbers in a third of the time
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

METRICS = {"coco": "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split(), "voc07": "AP AP50 AP75".split()}


def evaluate(annotations, results, metric="coco", difficult="count"):
    """COCO results -> {METRICS[metric]: 0..1, or -1 where there is no object} and {class name: AP}.

    difficult "ignore": a difficult object may be missed, and detections of it are forgiven (pycocotools: one of them).
    """
    return {"coco": coco_metrics, "voc07": voc07_metrics}[metric](annotations, results, difficult)


def truth_table(annotations, difficult="count"):
    """`data.Annotations` as the COCO-style table that pycocotools reads."""
    categories, truth = [{"id": number, "name": name} for number, name in annotations.categories], []
    for image, *columns in zip(*annotations[1:7], strict=True):
        for (x0, y0, x1, y1), label, crowd, area, hard in zip(*(c.tolist() for c in columns), strict=True):
            if hard and difficult == "ignore":
                area = math.inf  # outside all of pycocotools' size ranges, and so ignored
            truth.append({"id": len(truth) + 1, "image_id": image["id"], "category_id": categories[label]["id"],
                          "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "iscrowd": int(crowd)})  # fmt: skip
    return {"info": {}, "images": annotations.images, "annotations": truth, "categories": categories}


def coco_metrics(annotations, results, difficult="count"):
    """pycocotools' 12 numbers."""
    truth = truth_table(annotations, difficult)
    found = [{**r, "id": i, "area": r["bbox"][2] * r["bbox"][3]} for i, r in enumerate(results, 1)]
    with contextlib.redirect_stdout(None):  # pycocotools prints its progress
        tables = COCO(), COCO()
        for coco, table in zip(tables, (truth, {**truth, "annotations": found}), strict=True):
            coco.dataset = table  # unlike COCO.loadRes, no result at all is fine
            coco.createIndex()
        evaluation = COCOeval(*tables, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = evaluation.eval["precision"][:, :, :, 0, -1].mean((0, 1))  # over IoU and recall, (K,); any size
    names = [category["name"] for category in sorted(truth["categories"], key=lambda c: c["id"])]  # pycocotools' order
    metrics = dict(zip(METRICS["coco"], evaluation.stats.tolist(), strict=True))
    return metrics, dict(zip(names, per_class.tolist(), strict=True))


def voc07_metrics(annotations, results, difficult="count"):
    """VOC 2007's 11-point AP: its mean over IoU 0.50, 0.55 ... 0.95 (DETReg's VOC table), and at 0.50 and 0.75 alone.

    All detections count; each is held against the object of its class that it overlaps most, taken or not. DETReg's
    table has difficult "ignore"; its code rounds scores to three digits before it sorts, this does not.
    """
    classes = {number: k for k, (number, _) in enumerate(annotations.categories)}
    found, rows, objects = {image["id"]: [] for image in annotations.images}, [], 0
    for r in results:  # the detector may know more classes
        found[r["image_id"]].append([classes.get(r["category_id"], -1), r["score"], *r["bbox"]])
    for of_image, boxes_xyxy, labels in zip(found.values(), *annotations[2:4], strict=True):
        of_image = torch.tensor(of_image, dtype=torch.float64).reshape(-1, 6)
        overlap = box_iou(box_convert(of_image[:, 2:], "xywh", "xyxy"), boxes_xyxy.double())
        overlap = overlap * (of_image[:, :1] == labels)
        overlap, at = torch.cat([overlap, overlap.new_zeros(len(overlap), 1)], 1).max(1)  # of nothing: 0
        rows.append(torch.column_stack([of_image[:, :2], overlap, at + objects]))  # (detections, 4)
        objects += len(labels)
    rows, labels = torch.cat(rows), torch.cat(annotations.labels)
    rows = rows[rows[:, 1].argsort(descending=True, stable=True)]
    ignored = torch.cat(annotations.crowd) | (torch.cat(annotations.difficult) & (difficult == "ignore"))
    needed = [(~ignored[labels == k]).sum().item() for k in classes.values()]
    ap = [eleven_points(rows[rows[:, 0] == k, 2:], ignored, count) for k, count in enumerate(needed)]
    ap = torch.tensor(ap, dtype=torch.float64)  # (K, 10)
    at = ap.nanmean(0).nan_to_num(-1)  # over the classes that have an object: in VOC all
    per_class = zip((name for _, name in annotations.categories), ap.mean(1).nan_to_num(-1).tolist(), strict=True)
    return dict(zip(METRICS["voc07"], (at.mean().item(), at[0].item(), at[5].item()), strict=True)), dict(per_class)


def eleven_points(rows, ignored, needed):
    """11-point AP of one class at each of the ten IoUs, or NaN without an object to find (`needed` counts these).

    rows (detections, 2), best first: the overlap with an object, and its number in `ignored`, whose objects, when hit,
    make a detection neither right nor wrong.
    """
    if needed == 0:
        return [math.nan] * 10
    (overlap, number), at_each = rows.T.numpy(), []
    number = np.where(overlap > 0, number, 0).astype(int)
    for least in range(50, 100, 5):
        hit, right = overlap > least / 100, np.zeros(len(rows))
        right[np.flatnonzero(hit)[np.unique(number[hit], return_index=True)[1]]] = 1  # the first on each object
        counts = ~(hit & ignored.numpy()[number])
        right = np.cumsum(right * counts)
        recall, precision = right / needed, right / np.maximum(np.cumsum(counts), 1)
        at_each.append(sum(precision[recall >= point / 10].max(initial=0) for point in range(11)) / 11)
    return at_each


def table(metrics, per_class):
    """The numbers as text: a row of all, then a line per class."""
    lines = ["".join(f"{name:>7}" for name in metrics), "".join(f"{value:7.3f}" for value in metrics.values()), ""]
    return "\n".join(lines + [f"{value:7.3f}  {name}" for name, value in per_class.items()])
