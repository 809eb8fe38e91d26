"""How much of a detector's error is the same object found twice: average precision before and after suppression.

    python finetune.py --eval-only --init runs/mine/best.pt --val val.json --out runs/mine-eval
    python -m bench.duplicates val.json runs/mine-eval/detections.json

A DETR is trained to answer each object with one query. Non-maximum suppression within a class, of no use to it then,
shows by how much it falls short of that.
"""

import argparse
import json
from pathlib import Path

import torch
from torchvision.ops import batched_nms, box_convert

from data import read_annotations
from metrics import evaluate


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("val", type=Path, help="the COCO json that was evaluated on")
    parser.add_argument("detections", nargs="+", type=Path, help="what finetune.py --eval-only wrote")
    parser.add_argument("--iou", type=float, nargs="+", default=[0.7, 0.5], help="thresholds (default 0.7 0.5)")
    args = parser.parse_args(argv)
    annotations = read_annotations(args.val, quiet=True)
    print(f"{'':40}{'AP':>7}{'AP50':>7}{'AP75':>7}{'AR100':>7}")
    for path in args.detections:
        results = json.loads(path.read_text())
        for iou in (1.0, *args.iou):
            kept = suppressed(results, iou)
            metrics, _ = evaluate(annotations, kept)
            name = f"{path.parent.name}{f', NMS {iou:g}' if iou < 1 else ''}"
            print(f"{name:40}" + "".join(f"{100 * metrics[key]:7.1f}" for key in ("AP", "AP50", "AP75", "AR100")))


def suppressed(results, iou):
    """COCO results without those that overlap a better one of their image and class by more than `iou`."""
    boxes_xyxy = box_convert(torch.tensor([row["bbox"] for row in results]).reshape(-1, 4), "xywh", "xyxy")
    scores = torch.tensor([row["score"] for row in results])
    kinds = {kind: k for k, kind in enumerate({(row["image_id"], row["category_id"]) for row in results})}
    kind = torch.tensor([kinds[row["image_id"], row["category_id"]] for row in results], dtype=torch.long)
    return [results[i] for i in sorted(batched_nms(boxes_xyxy, scores, kind, iou).tolist())]


if __name__ == "__main__":
    main()
