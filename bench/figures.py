"""The paper's three drawings, redone with this code's own views, names and equation numbers.

    python -m bench.figures --out docs       # figure1.png to figure3.png; part of `make walkthrough`

Figure 1: single against multi view. Figure 2: the architecture, and one direction of it. Figure 3: view construction.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from scipy.spatial import cKDTree

import plots
from data import load_image, resize_size, stream
from plots import colour_of
from proposals import edge_boxes
from views import UNIT, choose_regions, cut, map_boxes, stack_images, two_rectangles

FROZEN, SHARED, HEAD, LOSS, PLAIN = "#dfe9f5", "#fdebc8", "#e3f1df", "#f9d9d3", "#f2f2f2"  # faces of the boxes
SEED, RESOLUTION = 115, 320


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="docs", help="folder (default %(default)s)")
    p.add_argument("--image", help="a photograph (default: the portrait that comes with matplotlib)")
    args = p.parse_args(argv)
    made = construct(load_image(Path(args.image or get_sample_data("grace_hopper.jpg", asfileobj=False))))
    for name, draw in (("figure1", figure1), ("figure2", figure2), ("figure3", figure3)):
        path = plots.write(draw(**made), Path(args.out) / f"{name}.png")
        shrink(path)
        print(path)
    return 0


def construct(photo):
    """The steps of `ViewDataset.two_views` in the open: rectangles, regions, views, boxes in the views."""
    g = stream(SEED)
    base = resize_size(*photo.size, RESOLUTION, 600)
    outer, *rects = two_rectangles(*base, 0.5, g)
    proposals = map_boxes(torch.from_numpy(edge_boxes(photo)[0]).double(), (0, 0, *photo.size), (0, 0, *base))
    (a0, a1, a2, a3), (b0, b1, b2, b3) = rects
    overlap = max(a0, b0), max(a1, b1), min(a2, b2), min(a3, b3)
    regions, _ = choose_regions(proposals, overlap, 10, g, 0.5)
    size = outer[2] - outer[0], outer[3] - outer[1]
    x = stack_images([cut(np.asarray(photo), rect, base, size) for rect in rects], g)  # (2, 3, h, w)
    boxes = torch.stack([map_boxes(regions, rect, UNIT) for rect in rects])
    boxes = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)  # cxcywh
    shown = [0, *(i + 1 for i in plots.far_apart(regions[1:].numpy(), 2))]
    photo = torch.from_numpy(np.array(photo.resize(base))).movedim(-1, 0)
    return {"photo": photo, "outer": outer, "rects": rects, "overlap": overlap, "regions": regions, "x": x,
            "boxes": boxes, "shown": shown}  # fmt: skip


# ---------------------------------------------------------------- figure 1
def figure1(x, boxes, shown, **_):
    fig, ax = canvas(100, 50)
    r = shown[1]
    ax.text(0, 50, "(a) single view: UP-DETR, DETReg", weight="bold", va="top")
    ax.text(46, 50, "(b) multi view: Siamese DETR", weight="bold", va="top")
    ax.plot([42.5, 42.5], [0, 50], color="#bbbbbb", lw=1)

    picture(ax, x[0], boxes[0], [r], (0, 14), 14, "the image")
    block(ax, (18, 17), (10, 8), "DETR", SHARED)
    arrow(ax, (14, 22.5), (18, 22.5))
    ax.text(16, 23.2, "k, v", ha="center", va="bottom", size=8)
    arrow(ax, (10, 15.8), (18, 18.5), colour_of(r))
    ax.text(16, 15.5, "q", ha="center", va="center", size=12, color=colour_of(r))
    ax.text(0, 13, "q: a region of the image itself (DETReg: none)", va="top", size=8, color=colour_of(r))
    arrow(ax, (28, 21), (32, 21))
    ax.text(32.5, 21, "box $\\hat{b}$\nfeature $\\hat{p}$", va="center")
    arrow(ax, (35, 24.5), (12, 30.5), LINE, "arc3,rad=0.35", "--")
    ax.text(26, 34, "compared with the same image:\na small gain, says the paper", ha="center", size=8)

    picture(ax, x[0], boxes[0], [r], (46, 27), 14, "view 1")
    picture(ax, x[1], boxes[1], [r], (46, 3), 14, "view 2")
    for y, k in ((29, 1), (6, 2)):
        block(ax, (70, y), (10, 8), "DETR", SHARED)
        arrow(ax, (60, y + 4), (70, y + 4))
        ax.text(65, y + 1.2, f"$k_{k}, v_{k}$", ha="center", size=8)
        arrow(ax, (80, y + 4), (85, y + 4))
        ax.text(85.5, y + 4, f"$\\hat{{b}}_{k}, \\hat{{p}}_{k}$", va="center", size=12)
    arrow(ax, (60, 30), (72, 14), colour_of(r))
    arrow(ax, (60, 13), (72, 29), colour_of(r))
    ax.text(64, 26.5, "$q_1$", color=colour_of(r), size=12)
    ax.text(64, 15.2, "$q_2$", color=colour_of(r), size=12)
    arrow(ax, (75, 28.5), (75, 14.5), LINE, style="<|-|>")
    ax.text(75.6, 21.5, "same\nweights", va="center", size=8)
    ax.text(92.5, 21.5, "where is it\nin the other view,\nand what is it?", ha="center", va="center", size=8)
    return fig


# ---------------------------------------------------------------- figure 2
def figure2(x, boxes, shown, **_):
    fig, ax = canvas(110, 87)
    r = shown[1]
    ax.text(0, 87, "(a) both views; everything is shared between them", weight="bold", va="top")
    for k, y in enumerate((66, 43)):
        n, other, up = k + 1, 2 - k, 1 - 2 * k
        picture(ax, x[k], boxes[k], [r], (0, y - 6), 14, f"view {n}: $x_{n}, b_{n}$")
        block(ax, (18, y - 4), (12, 8), "Backbone\n(frozen)", FROZEN)
        block(ax, (38, y - 4), (12, 8), "Encoder\nEq. (1)", SHARED)
        block(ax, (62, y - 4), (13, 8), "Decoder\nEq. (6), (7)", SHARED)
        block(ax, (83, y + 1), (9, 5), "$f_{box}$  (8)", HEAD)
        block(ax, (83, y - 6), (9, 5), "$f_{sem}$  (10)", HEAD)
        block(ax, (97, y + 1), (13, 5), f"$L_{{loc}}$ (9): $b_{n}$", LOSS)
        block(ax, (97, y - 6), (13, 5), f"$L_r$ (12): $p_{other}$ (5)", LOSS)
        block(ax, (97, 66 + 10 if k == 0 else 43 - 14.5), (13, 5), f"$L_g$ (11): $c_{other}$", LOSS)
        block(ax, (51, 66 + 10 if k == 0 else 43 - 14.5), (10, 5), "MLP (11)", HEAD)
        for start, end, text in (
            ((14, y), (18, y), None),
            ((30, y), (38, y), f"$h_{n}$"),
            ((50, y), (62, y), f"$c_{n}$"),
            ((75, y), (83, y + 3.5), f"$\\hat{{q}}_{n}$"),
            ((75, y), (83, y - 3.5), None),
            ((92, y + 3.5), (97, y + 3.5), f"$\\hat{{b}}_{n}$"),
            ((92, y - 3.5), (97, y - 3.5), f"$\\hat{{p}}_{n}$"),
        ):
            arrow(ax, start, end, text=text)
        arrow(ax, (53.5, y), (53.5, y + 10 if k == 0 else y - 9.5))
        level = y + 12.5 if k == 0 else y - 12
        arrow(ax, (61, level), (97, level))
        # the regions of this view become the queries of the other one
        ax.add_patch(Rectangle((31, y - up * 9 - 2), 14, 4, fc="white", ec=colour_of(r), lw=1.5, zorder=3))
        ax.text(
            38, y - up * 9, f"RoIAlign: $z_{n}$ (4)", color=colour_of(r), size=9, ha="center", va="center", zorder=5
        )
        arrow(ax, (32.5, y), (32.5, y - up * 7), colour_of(r))
        arrow(ax, (45, y - up * 9), (63, y - up * 19), colour_of(r))

    ax.plot([0, 110], [26.2, 26.2], color="#bbbbbb", lw=1)
    ax.text(0, 25.2, "(b) one direction, view 1 asks view 2: one decoder layer", weight="bold", va="top")
    y = 9.5
    picture(ax, x[0], boxes[0], [r], (0, y - 6), 12, "$x_1$: the question")
    block(ax, (17, y - 3.5), (13, 7), "patch2query\n$z_1 + \\phi_q$  (7)", HEAD)
    block(ax, (36, y - 3.5), (14, 7), "queries see\neach other", SHARED)
    block(ax, (56, y - 3.5), (14, 7), "cross-attention\nEq. (2), (6)", SHARED)
    block(ax, (76, y - 3.5), (10, 7), "FFN", SHARED)
    picture(ax, x[1], boxes[1], [r], (97, y - 6), 12, "$x_2$: the answer")
    arrow(ax, (12, y), (17, y), colour_of(r), text="$z_1$")
    arrow(ax, (30, y), (36, y), text="q")
    arrow(ax, (50, y), (56, y), text="$q_1$")
    arrow(ax, (70, y), (76, y))
    arrow(ax, (86, y), (97, y), text="$\\hat{q}_2 \\to \\hat{b}_2$")
    arrow(ax, (63, 17.5), (63, y + 3.5))
    ax.text(63, 18, "$k_2 = f_k(c_2),\\ v_2 = f_v(c_2)$", ha="center", va="bottom", size=9)
    return fig


# ---------------------------------------------------------------- figure 3
def figure3(photo, outer, rects, overlap, x, boxes, shown, regions):
    aspect = photo.shape[2] / photo.shape[1]
    fig = Figure(figsize=(9.6, 3.2), layout="constrained")
    widths = [aspect] * 3 + [x.shape[-1] / x.shape[-2] * 0.5]
    grid = fig.add_gridspec(2, 4, width_ratios=widths)
    axes = [fig.add_subplot(grid[:, k]) for k in range(3)]
    titles = ("(a) a rectangle over\n50 to 100 % of the image", "(b) two views around its centre,\nIoU at least 0.5",
              "(c) regions: the overlap\nand proposals inside it")  # fmt: skip
    for k, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        show(ax, photo)
        ax.set_title(title, size=10)
        inside = (outer, outer, overlap)[k]
        darken(ax, photo, inside)
        if k < 2:
            plots.draw_box(ax, np.array(outer, float), "white", ":" if k else "-")
        if k:
            for rect, style in zip(rects, ("-", "--"), strict=True):
                plots.draw_box(ax, np.array(rect, float), "white", style)
    (cx, cy) = (outer[0] + outer[2]) / 2, (outer[1] + outer[3]) / 2
    axes[1].plot(*zip(outer[:2], outer[2:], strict=True), color="white", lw=1, ls=":")
    axes[1].plot(cx, cy, "o", color="white", mec="black", ms=6)
    axes[1].text(cx + 6, cy, "c", color="white", va="center", weight="bold", size=12)
    for r in shown:
        plots.draw_box(axes[2], regions[r].numpy(), colour_of(r))
    for k in range(2):
        ax = fig.add_subplot(grid[k, 3])
        show(ax, x[k])
        draw_regions(ax, boxes[k], x[k], shown, tags=())
        ax.set_title(f"view {k + 1} ({('solid', 'dashed')[k]})", size=9)
    return fig


# ---------------------------------------------------------------- drawing
LINE = "#444444"


def canvas(width, height):
    fig = Figure(figsize=(width / 11, height / 11))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-1, width + 1), ylim=(-1, height + 1), aspect="equal")
    ax.axis("off")
    return fig, ax


def block(ax, corner, size, text, face):
    ax.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.8", fc=face, ec=LINE, lw=1))
    ax.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", size=9)


def arrow(ax, start, end, colour=LINE, bend="arc3,rad=0", line="-", style="-|>", text=None):
    ax.add_patch(FancyArrowPatch(start, end, connectionstyle=bend, arrowstyle=style, mutation_scale=11, color=colour,
                                 lw=1.5, ls=line, shrinkA=0, shrinkB=0, zorder=4))  # fmt: skip
    if text:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.5
        ax.text(*middle, text, ha="center", va="bottom", size=9, color=colour)


def picture(ax, view, boxes, regions, corner, width, title=None):
    """A view of the given width with the lower left corner at `corner`, its regions in their colours."""
    height = width * view.shape[1] / view.shape[2]
    ax.imshow(view.movedim(0, -1).numpy(), extent=(corner[0], corner[0] + width, corner[1], corner[1] + height),
              zorder=2, aspect="auto", interpolation="antialiased")  # fmt: skip
    for r in regions:
        cx, cy, w, h = boxes[r].tolist()
        at = corner[0] + (cx - w / 2) * width, corner[1] + (1 - cy - h / 2) * height
        ax.add_patch(Rectangle(at, w * width, h * height, fill=False, ec=colour_of(r), lw=2, zorder=3))
    if title:
        ax.text(corner[0] + width / 2, corner[1] + height + 0.6, title, ha="center", va="bottom", size=9)


def darken(ax, photo, rect):
    shade = np.full((*photo.shape[1:], 4), (0, 0, 0, 120), np.uint8)
    x0, y0, x1, y1 = (round(v) for v in rect)
    shade[y0:y1, x0:x1] = 0
    ax.imshow(shade, extent=ax.images[0].get_extent())


def draw_regions(ax, boxes, view, regions, tags=None, style="-", width=2.4):
    """Boxes (R, 4) of the given regions, each in its own colour, with tags or its number."""
    tags = [str(r + 1) for r in range(len(boxes))] if tags is None else tags
    boxes_xyxy = plots.to_pixels(boxes, np.zeros(view.shape[-2:]))
    placed = []
    for r in regions:
        plots.draw_box(ax, boxes_xyxy[r], colour_of(r), style, width)
    for r in regions if tags else ():
        plots.draw_tag(ax, boxes_xyxy[r], tags[r], colour_of(r), placed)


def columns(count, widths, height=4.0):
    fig = Figure(figsize=(height * sum(widths) + 0.4, height), layout="constrained")
    return fig, fig.subplots(1, count, width_ratios=list(widths), squeeze=False)[0]


def show(ax, view):
    ax.imshow(view.movedim(0, -1).numpy(), extent=(0, view.shape[2], view.shape[1], 0))
    ax.set(xticks=[], yticks=[], autoscale_on=False)
    ax.spines[:].set_visible(False)


def number_regions(ax, R, size=1, across=True):
    """Rows (and columns) of a matrix named by region, in its colour."""
    middle = [r * size + (size - 1) / 2 for r in range(R)]
    for axis in (ax.xaxis, ax.yaxis) if across else (ax.yaxis,):
        axis.set_ticks(middle, range(1, R + 1))
        for r, label in enumerate(axis.get_ticklabels()):
            label.set(color=colour_of(r), weight="bold")


def shrink(path, width=10_000):
    """At most 200 colours, those of regions and lines among them, and `width` pixels: a third of the bytes."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((width, 10_000), Image.Resampling.LANCZOS)
    own = np.array([matplotlib.colors.to_rgb(name) for name in (*plots.COLOURS, *plots.LINES, "white", "black")]) * 255
    rest = np.array(image.quantize(200 - len(own)).getpalette()).reshape(-1, 3)
    palette = np.concatenate([own.round(), rest[: 200 - len(own)]]).astype(np.uint8)
    pixels, back = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_inverse=True)
    nearest = cKDTree(palette).query(pixels)[1].astype(np.uint8)[back]
    small = Image.fromarray(nearest.reshape(image.size[::-1]), "P")
    small.putpalette(palette.tobytes())
    small.save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
