"""Every picture of the project: view pairs, predicted regions, proposals, detections, curves, average precision.

Each `save_*` writes one PNG, makes its folder and returns the path. Images are uint8: PIL, numpy (H, W, 3) or torch
(3, H, W). Boxes are (cx, cy, w, h) in [0, 1] of the unpadded view, or pixels where a name ends in `_xyxy`. Masks:
True = padding.

    python plots.py RUN...     # the curves of run folders, from their log.jsonl, one colour a run
"""

import argparse
import json
import math
import sys
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.patheffects import Normal, Stroke

# ours: bright enough for dark photographs, dark enough for white ones, and neighbours in the list far apart in hue
COLOURS = "#ff3b30 #1e9bff #ffc400 #2fd15b #b45cff #ff7a00 #00d5c8 #ff5fb0 #a8d800 #5b6cff #b5793f #8fb6c9".split()
LINES = "#1f6fd6 #e4572e #2a9d5c #8f4fd1 #c99700 #0fa3b1 #d6437f #5c6670".split()  # on white paper
DASHED = (0, (3, 2))
HEIGHT = 4.4  # of one image, inches at 120 dots
PLAIN = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6"}
styled = matplotlib.rc_context({**PLAIN, "axes.titlesize": 11, "text.parse_math": False})  # a class may be called "$5"


@styled
def save_pair(path, x, boxes, mask=None, title=None):
    """The two views of an image, their regions in matching colours and numbers, four joined by lines (paper Fig. 2).

    x (2, 3, H, W), boxes (2, R, 4), mask (2, H, W); a single view (leading axis 1) stands alone.
    """
    views = [unpadded(x[v], None if mask is None else mask[v]) for v in range(len(x))]
    regions = [to_pixels(boxes[v], views[v]) for v in range(len(x))]
    fig, axes = panels(views, title)
    for ax, boxes_xyxy in zip(axes, regions, strict=True):
        draw(ax, boxes_xyxy, [str(i + 1) for i in range(len(boxes_xyxy))])
    for i in far_apart(regions[0], 4) if len(views) == 2 else ():
        ends = [(r[i, :2] + r[i, 2:]) / 2 for r in regions]
        line = ConnectionPatch(
            *ends, "data", "data", axesA=axes[0], axesB=axes[1], color=colour_of(i), lw=1.4, zorder=9
        )
        line.set_path_effects([Stroke(linewidth=2.8, foreground="white"), Normal()])
        fig.add_artist(line)
        for ax, end in zip(axes, ends, strict=True):
            ax.plot(*end, "o", ms=6, color=colour_of(i), mec="white", zorder=9)
    return write(fig, path)


@styled
def save_regions(path, x, mask, true_boxes, predicted, scores=None, title=None, images=4, regions=5):
    """Where regions are (solid) and where they were predicted (dashed), one colour a region, its IoU beside it.

    x (B, 3, H, W), mask (B, H, W) or None, true_boxes and predicted (B, R, 4), scores (B, R). Drawn are the `regions`
    of the highest score, or without scores those farthest apart; the mean below a panel is over all R.
    """
    views = [unpadded(x[i], None if mask is None else mask[i]) for i in range(min(images, len(x)))]
    fig, axes = panels(views, title, columns=2)
    for i, ax in enumerate(axes):
        true, found = to_pixels(true_boxes[i], views[i]), to_pixels(predicted[i], views[i])
        shown = far_apart(true, regions) if scores is None else np.argsort(-_numpy(scores[i]), kind="stable")[:regions]
        iou = paired_iou(true, found)
        draw(ax, found[shown], None, DASHED)
        draw(ax, true[shown], [f"{iou[k]:.2f}" for k in shown])
        ax.set_xlabel(f"mean IoU {iou.mean():.2f} over {len(iou)} regions" if len(iou) else "no region")
    look = {"color": "#444444", "lw": 2}
    lines = [Line2D([], [], label="true", **look), Line2D([], [], ls=DASHED, label="predicted", **look)]
    fig.legend(handles=lines, loc="outside upper right", ncols=2, frameon=False)
    return write(fig, path)


@styled
def save_proposals(path, image, boxes_xyxy, top=30, title=None):
    """The first `top` of boxes_xyxy (k, 4), best first: bright and thick at the front, dark and thin behind."""
    image, boxes_xyxy = _image(image), _numpy(boxes_xyxy).reshape(-1, 4)
    shown = boxes_xyxy[:top]
    fig, (ax,) = panels([image], title or f"the first {len(shown)} of {len(boxes_xyxy)} proposals")
    colours = matplotlib.colormaps["plasma"](np.linspace(0.95, 0.1, max(len(shown), 1)))
    for rank in reversed(range(len(shown))):
        draw_box(ax, shown[rank], colours[rank], width=2.6 - 1.6 * rank / len(shown))
    for rank, box in enumerate(shown[:3]):
        draw_tag(ax, box, str(rank + 1), matplotlib.colors.to_hex(colours[rank]), [])
    return write(fig, path)


@styled
def save_detections(path, image, boxes_xyxy, labels, scores, threshold=0.5, classes=None, title=None):
    """Detections of at least `threshold`, one colour a class name: boxes_xyxy (k, 4), labels k strings, scores (k,).

    classes: all names, so that a class has one colour in all pictures.
    """
    boxes_xyxy, scores = _numpy(boxes_xyxy).reshape(-1, 4), _numpy(scores).reshape(-1)
    keep = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= threshold]
    names = list(classes or sorted(set(labels)))
    fig, (ax,) = panels([_image(image)], title)
    colours = [colour_of(names.index(labels[i])) for i in keep]
    draw(ax, boxes_xyxy[keep], [f"{labels[i]} {scores[i]:.2f}" for i in keep], colours=colours)
    ax.set_xlabel(f"{len(keep)} of score {threshold:g} or more" if keep else f"nothing of score {threshold:g} or more")
    return write(fig, path)


@styled
def save_curves(path, logs, keys=None, x="step", title=None):
    """One panel a key of {label: run folder or its read_log}, one line a label; noisy ones with a running mean."""
    logs = {label: run if isinstance(run, list) else read_log(run) for label, run in logs.items()}
    rows = [r for records in logs.values() for r in records if x in r and "settings" not in r]
    found = dict.fromkeys(k for r in rows for k, v in r.items() if _is_number(v) and k not in (x, "step", "epoch"))
    if not found or (keys and not found.keys() & set(keys)):
        raise ValueError(f"{', '.join(logs)}: no numbers over '{x}' to draw yet but {', '.join(found) or 'none'}")
    keys = list(keys or found)
    columns = min(len(keys), 4 if len(keys) > 6 else 3)
    rows = math.ceil(len(keys) / columns)
    fig = Figure(figsize=(3.5 * columns, 2.5 * rows + 0.4), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for i, (ax, key) in enumerate(zip(axes, keys, strict=False)):
        for colour, records in zip(cycle(LINES), logs.values(), strict=False):
            points = np.array([(r[x], r[key]) for r in records if _is_number(r.get(x)) and _is_number(r.get(key))])
            if len(points):
                _curve(ax, *points.T, colour)
        ax.set_title(key, loc="left")
        ax.margins(x=0.02)
        ax.set_xlabel(x if i + columns >= len(keys) else "")
    for ax in axes[len(keys) :]:
        ax.remove()
    _legend(fig, logs, title)
    return write(fig, path)


@styled
def save_ap(path, runs, title=None):
    """AP and AP50 over epochs: {label: [(epoch, AP, AP50), ...]}; of an epoch given often (seeds) mean and range."""
    fig = Figure(figsize=(9, 3.6), layout="constrained")
    for column, (ax, name) in enumerate(zip(fig.subplots(1, 2), ("AP", "AP50"), strict=True), 1):
        for colour, rows in zip(cycle(LINES), runs.values(), strict=False):
            epochs = sorted({r[0] for r in rows})
            values = [[r[column] for r in rows if r[0] == e] for e in epochs]
            mean = [sum(v) / len(v) for v in values]
            ax.plot(epochs, mean, "o-", color=colour, lw=2, ms=5, mec="white")
            ax.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
            if epochs:
                ax.text(epochs[-1], mean[-1], f"  {mean[-1]:.3g}", color=colour, weight="bold", va="center")
        ax.set_title(name, loc="left")
        ax.set_xlabel("epoch")
        ax.set_ylim(bottom=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
    _legend(fig, runs, title)
    return write(fig, path)


@styled
def save_bands(path, panels, x="epoch", title=None):
    """Lines with intervals: {panel: {label: [(x, mean, low, high), ...]}}; low and high None where there is none."""
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    fig = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    labels = dict.fromkeys(label for lines in panels.values() for label in lines)
    colours = dict(zip(labels, cycle(LINES), strict=False))
    for place, (name, lines) in enumerate(panels.items(), 1):
        ax = fig.add_subplot(rows, columns, place)
        for label, points in lines.items():
            colour = colours[label]
            at, mean, low, high = (np.array(column, float) for column in zip(*points, strict=True))  # None: NaN
            ax.plot(at, mean, "o-", color=colour, lw=2, ms=4, mec="white")
            ax.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
        ax.set_title(name, loc="left")
        ax.set_xlabel(x)
    _legend(fig, labels, title)
    return write(fig, path)


@styled
def save_bars(path, bars, xlabel, title=None):
    """A bar a label with its interval, from the top: {label: (mean, low, high)}; low and high None for none."""
    fig = Figure(figsize=(7.5, 0.42 * len(bars) + 1), layout="constrained")
    ax = fig.subplots()
    for place, (mean, low, high) in enumerate(bars.values()):
        ax.barh(place, mean, color=LINES[0], alpha=0.75, height=0.6)
        if low is not None:
            ax.plot([low, high], [place, place], color="#222222", lw=1.6, marker="|", ms=8)
    ax.axvline(0, color="#222222", lw=0.8)
    ax.set_yticks(range(len(bars)), bars)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_axisbelow(True)
    ax.set_xlabel(xlabel)
    if title:
        ax.set_title(title, loc="left")
    return write(fig, path)


def read_log(path):
    """log.jsonl of a run folder, or that file -> list of dicts; ValueError names a line that is not JSON."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such log; give the --out folder of a run")
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]  # without the half line of a run that is writing just now
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no object")
        return rows
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a log, a line is not JSON ({error})") from error


def _numpy(x):
    """An array of a tensor on any device, or of what numpy takes; bfloat16, which numpy lacks, as float32."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
    return np.asarray(x)


def _image(x):
    if hasattr(x, "convert"):
        return np.asarray(x.convert("RGB"))
    return _numpy(x).transpose(1, 2, 0) if hasattr(x, "detach") else x


def unpadded(x, mask):
    """The part of an image (3, H, W) or (H, W, 3) that its mask (H, W) does not call padding, as (h, w, 3)."""
    image = _image(x)
    if mask is None:
        return image
    inside = ~_numpy(mask)
    return image[: max(inside.any(1).sum(), 1), : max(inside.any(0).sum(), 1)]


def to_pixels(boxes, view):
    """Boxes (k, 4) of a view, an array (H, W, ...), as xyxy pixels."""
    cx, cy, w, h = _numpy(boxes).reshape(-1, 4).T
    return np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1) * np.tile(view.shape[1::-1], 2)


def _area(boxes_xyxy):
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clip(0).prod(1)


def paired_iou(a, b):
    """IoU of the k-th box of a with the k-th of b, both (k, 4) xyxy."""
    inner = _area(np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], 1))
    return inner / np.maximum(_area(a) + _area(b) - inner, 1e-9)


def far_apart(boxes_xyxy, count):
    """Indices of up to `count` boxes, from the smallest on always the one farthest from those taken."""
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    taken = [int(_area(boxes_xyxy).argmin())] if len(centres) else []
    while 0 < len(taken) < min(count, len(centres)):
        distance = np.linalg.norm(centres[:, None] - centres[taken], axis=2).min(1)
        distance[taken] = -1  # boxes of one centre: never the same one twice
        taken.append(int(distance.argmax()))
    return taken


def colour_of(i):
    """The colour of region i, in every picture."""
    return COLOURS[i % len(COLOURS)]


def _is_number(v):
    return isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= sys.float_info.max


def panels(images, title=None, columns=2):
    """A figure with the images in rows of `columns`, each row as high as the next -> figure, axes."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)] or [[np.full((3, 4, 3), 255, np.uint8)]]
    aspects = [[min(max(im.shape[1] / im.shape[0], 0.4), 3.0) for im in row] for row in rows]
    fig = Figure(figsize=(HEIGHT * max(map(sum, aspects)), HEIGHT * len(rows)), layout="constrained")
    axes = []
    for part, row, ratios in zip(fig.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, aspects, strict=True):
        for ax, image in zip(part.subplots(1, len(row), width_ratios=ratios, squeeze=False)[0], row, strict=True):
            ax.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
            ax.set(xticks=[], yticks=[], autoscale_on=False)
            ax.grid(False)
            ax.spines[:].set_visible(False)
            axes.append(ax)
    if title:
        fig.suptitle(title)
    return fig, axes


def draw(ax, boxes_xyxy, tags, style="-", colours=None):
    """Boxes (k, 4) with a tag each (or None for none), coloured by their index unless `colours` are given."""
    placed = []
    order = np.argsort(-_area(boxes_xyxy), kind="stable")  # small boxes and their tags over large ones
    for i in order:
        draw_box(ax, boxes_xyxy[i], colours[i] if colours else colour_of(i), style)
    for i in order if tags else ():
        draw_tag(ax, boxes_xyxy[i], tags[i], colours[i] if colours else colour_of(i), placed)


def draw_box(ax, box, colour, style="-", width=2.2):
    """One box (x0, y0, x1, y1) with a thin dark rim, so that it shows on any background."""
    patch = Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, ec=colour, lw=width, ls=style, joinstyle="miter")
    patch.set_path_effects([Stroke(linewidth=width + 1.4, foreground="#00000090"), Normal()])
    ax.add_patch(patch)


def draw_tag(ax, box, text, colour, placed):
    """`text` in a corner of the box, above or below a box too small for it, not over the tags in `placed`."""
    (w, h), (x0, y0, x1, y1) = (ax.get_xlim()[1], ax.get_ylim()[0]), box
    tw, th = (
        (8.5 * len(text) + 6) * h / (120 * HEIGHT),
        20 * h / (120 * HEIGHT),
    )  # size of a tag, in pixels of the image
    spots = [(x0, y0 - th), (x0, y1), (x1, y0), (x0 - tw, y0)]  # above, below, right, left
    if min(x1 - x0, y1 - y0) > 2 * th:
        spots = [(x0, y0), (x1 - tw, y0), (x0, y1 - th), (x1 - tw, y1 - th)]  # its four corners
    spots = [(max(min(x, w - tw), 0), max(min(y, h - th), 0)) for x, y in spots]  # none leaves the image
    free = [s for s in spots if not any(-pw < x - s[0] < tw and abs(y - s[1]) < th for x, y, pw in placed)]
    x, y = (free or spots)[0]
    placed.append((x, y, tw))
    ink = "black" if np.dot(matplotlib.colors.to_rgb(colour), (0.3, 0.59, 0.11)) > 0.55 else "white"  # luminance
    face = {"boxstyle": "square,pad=0.2", "fc": colour, "ec": "none"}
    ax.text(x, y, text, va="top", fontsize=9, weight="bold", color=ink, bbox=face, zorder=10)


def _curve(ax, x, y, colour):
    noisy = len(x) >= 60 and len(np.unique(y)) > 10  # a learning rate has few values
    look = {"lw": 0.8, "alpha": 0.3} if noisy else {"lw": 1.8, "marker": "o" if len(x) < 15 else None, "ms": 4}
    ax.plot(x, y, color=colour, **look)
    if noisy:
        kernel = np.ones(len(x) // 25)  # at both ends fewer values, and divided by as many
        ax.plot(x, np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same"), color=colour, lw=2)


def _legend(fig, labels, title):
    if title:
        fig.suptitle(title)
    if len(labels) > 1:
        lines = [Line2D([], [], color=c, lw=2.5, label=name) for c, name in zip(cycle(LINES), labels, strict=False)]
        fig.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 4), frameon=False)


def write(fig, path):
    """The figure as a PNG at `path`, folder and all; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, format="png", dpi=120, bbox_inches="tight", pad_inches=0.08)
    return path


def main():
    parser = argparse.ArgumentParser(description="Draw the curves of run folders.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with a log.jsonl")
    parser.add_argument("--keys", nargs="+", help="which numbers of the logs (default: all)")
    parser.add_argument("--out", help="PNG to write (default: curves.png in the first folder)")
    args = parser.parse_args()
    try:
        first = Path(args.runs[0])
        out = args.out or (first.parent if first.is_file() else first) / "curves.png"
        print(save_curves(out, {run.rstrip("/"): run for run in args.runs}, args.keys))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
