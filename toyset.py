"""The toy set: scenes of drawn shapes with boxes, to try everything without a download (`python data.py toy OUT`).

Read it from the top. Boxes are (x0, y0, x1, y1) in pixels, 0-based, far edge exclusive.
"""

import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from data import randint, stream

PLUS = [[-3, -1], [-1, -1], [-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1], [1, 3], [-1, 3], [-1, 1], [-3, 1]]
TURN = np.linspace(0, 2 * np.pi, 61)[:60, None]
CIRCLE = np.hstack([np.cos(TURN), np.sin(TURN)])  # (60, 2)
SHAPES = {  # class name -> contours; the second one is a hole
    "disc": [CIRCLE],
    "box": [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])],
    "triangle": [CIRCLE[::20]],
    "star": [CIRCLE[::6] * np.resize([[1], [0.45]], (10, 1))],
    "ring": [CIRCLE, 0.55 * CIRCLE],
    "cross": [np.array(PLUS)],
}


def write_toy(out, unlabelled=600, train=64, val=64, size=256, seed=0):
    """Draw out/unlabelled, out/train, out/val (JPEG and PNG files), out/train.json and out/val.json; returns out.

    Equal settings give equal files. A set drawn with them is used again, anything else at `out` refused (ValueError).
    """
    out, counts = Path(out), {"unlabelled": unlabelled, "train": train, "val": val}
    settings = json.dumps({"toy": 1, **counts, "size": size, "seed": seed})
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temp:
            new = Path(temp, "toy")
            for part, (name, count) in enumerate(counts.items()):
                (new / name).mkdir(parents=True)
                write_scenes(new, name, (draw_scene(size, stream(seed, part, i)) for i in range(count)))
            (new / "settings.json").write_text(settings)
            with suppress(OSError):  # another process may have been faster; what counts is what stands there now
                new.rename(out)
    if not (out / "settings.json").is_file() or (out / "settings.json").read_text() != settings:
        raise ValueError(f"{out} is not the toy set {settings}: give another folder, or remove it")
    return out


def write_scenes(root, name, scenes):
    """Write the images to root/name, and unless they are to be unlabelled, their COCO json to root/name.json."""
    images, boxes = [], []
    for i, (pixels, boxes_xyxy, labels) in enumerate(scenes):
        file, (h, w, _) = f"{name}/{i:05d}.{'png' if i % 4 == 3 else 'jpg'}", pixels.shape
        Image.fromarray(pixels).save(root / file, quality=90)
        images.append({"id": i + 1, "file_name": file, "width": w, "height": h})
        for (x0, y0, x1, y1), label in zip(boxes_xyxy, labels, strict=True):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            boxes.append({"id": len(boxes) + 1, "image_id": i + 1, "category_id": label + 1, **box})
    categories = [{"id": k, "name": shape} for k, shape in enumerate(SHAPES, 1)]
    if name != "unlabelled":
        table = {"images": images, "annotations": boxes, "categories": categories}
        (root / f"{name}.json").write_text(json.dumps(table))


def draw_scene(size, g):
    """uint8 (H, W, 3), boxes_xyxy and labels of 2 to 5 shapes; those covered or cut off to less than 40 % get none.

    The class is the shape: colour, texture, size (12 to 50 % of `size`), stretch and rotation say nothing about it.
    A box bounds the whole shape, covered parts included, inside the image.
    """
    w, h = (round(size * uniform(0.75, 1, g)) for _ in range(2))
    canvas, owner, shapes = texture(w, h, g), np.full((h, w), -1), []
    for k in range(randint(2, 5, g)):
        label = randint(0, len(SHAPES) - 1, g)
        contours = place(list(SHAPES.values())[label], size * 0.12 * (0.5 / 0.12) ** uniform(0, 1, g), w, h, g)
        alpha = np.zeros((h, w), np.uint8)
        fixed = [np.round((c - 0.5) * 256).astype(np.int32) for c in contours]  # cv2 counts from pixel centres
        cv2.fillPoly(alpha, fixed, 255, cv2.LINE_AA, shift=8)
        for _ in range(10):  # until it can be told from what it lies on
            paint = texture(w, h, g)
            if np.abs((paint - canvas)[alpha > 127].mean(0)).max() > 0.2:
                break
        canvas += (paint - canvas) * (alpha[..., None] / np.float32(255))
        owner[alpha > 127] = k
        shapes.append((label, contours))
    boxes_xyxy, labels = [], []
    for k, (label, contours) in enumerate(shapes):
        outer, *hole = (cv2.contourArea(c.astype(np.float32)) for c in contours)
        if (owner == k).sum() >= 0.4 * (outer - sum(hole)):
            corners = np.stack([contours[0].min(0), contours[0].max(0)]).clip(0, (w, h))
            boxes_xyxy.append(corners.round(2).flatten().tolist())
            labels.append(label)
    return (canvas * 255).round().astype(np.uint8), boxes_xyxy, labels


def place(contours, side, w, h, g):
    """The contours stretched, turned, brought to `side` pixels and moved into a w x h image; they may overhang."""
    turn, stretch = uniform(0, 2 * math.pi, g), uniform(0.7, 1.4, g)
    cos, sin = math.cos(turn), math.sin(turn)
    contours = [c @ np.array([[stretch * cos, stretch * sin], [-sin, cos]]) for c in contours]
    centre = np.array([w * uniform(0.1, 0.9, g), h * uniform(0.1, 0.9, g)])
    return [c * (side / np.ptp(contours[0], axis=0).max()) + centre for c in contours]


def texture(w, h, g):
    """float32 (h, w, 3) in 0..1: two colours mixed as noise, a gradient, stripes or a checker, with some grain."""
    angle, wave, cells = uniform(0, math.pi, g), 2 * math.pi / uniform(8, 48, g), randint(3, 24, g)
    y, x = np.mgrid[:h, :w].astype(np.float32)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kind = randint(0, 3, g)
    if kind == 0:
        mix = cv2.resize(torch.rand(cells, cells, generator=g).numpy(), (w, h), interpolation=cv2.INTER_CUBIC)
    elif kind == 1:
        mix = (u - u.min()) / np.ptp(u)
    else:
        mix = 0.5 + 0.5 * np.tanh(4 * np.sin(wave * u) * (1 if kind == 2 else np.sin(wave * v)))
    first, second = torch.rand(2, 3, generator=g).numpy()
    grain = 0.03 * torch.randn(h, w, 3, generator=g).numpy()
    return (first + (second - first) * mix[..., None] + grain).clip(0, 1).astype(np.float32)


def uniform(low, high, g):
    return low + (high - low) * torch.rand((), generator=g).item()
