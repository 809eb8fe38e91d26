"""Steps 1 to 9 of the walkthrough: each function draws one picture and returns the numbers that the text quotes.

Regions keep one colour in all pictures (`plots.colour_of`); view 1 is drawn solid, view 2 dashed.
"""

import math
import time

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import losses
import plots
import pretrain
from bench.figures import columns, draw_regions, number_regions, show
from data import resize_size, stream
from detectors import cross_attention
from model import Siamese, objectness
from plots import colour_of
from proposals import edge_boxes
from views import two_rectangles, uniform

PAIRS = 16  # unseen pairs of views for the averages
SHOWN = 4  # regions that are followed through the pictures
TERMS = {"class": "#8a94a0", "l1": "#1f6fd6", "giou": "#0fa3b1", "region": "#e4572e", "consistency": "#e0a30b",
         "global": "#8f4fd1"}  # fmt: skip


# ---------------------------------------------------------------- steps 1 to 3: data
def the_image(out, image):
    fig, (ax,) = plots.panels([np.asarray(image)])
    ax.set(xticks=range(0, image.width + 1, 100), yticks=range(0, image.height + 1, 100))
    ax.set_xlabel(f"W0 = {image.width} pixels")
    ax.set_ylabel(f"H0 = {image.height} pixels")
    plots.write(fig, out / "01-image.png")
    return {"image_shape": f"({image.height}, {image.width}, 3)"}


def the_proposals(out, image):
    began = time.process_time()
    boxes_xyxy, _ = edge_boxes(image)
    seconds = time.process_time() - began
    plots.save_proposals(out / "02-proposals.png", image, boxes_xyxy, 20)
    return {"proposal_seconds": f"{seconds:.2f}", "proposals_shape": tuple(boxes_xyxy.shape)}


def the_views(out, image, batch, dataset):
    """The draws of `ViewDataset.two_views` once more, to show the rectangles that it keeps to itself."""
    g = stream(dataset.seed, 0, 0)
    base = resize_size(*image.size, dataset.short_sides[int(uniform(g, 0, len(dataset.short_sides)))], dataset.longest)
    flip = uniform(g) < 0.5
    outer, *rects = two_rectangles(*base, dataset.tau, g)
    (a0, a1, a2, a3), (b0, b1, b2, b3) = rects
    overlap = max(a0, b0), max(a1, b1), min(a2, b2), min(a3, b3)
    photo = (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image).resize(base)
    x, boxes = batch.x[:, 0], batch.boxes[:, 0]
    fig, axes = columns(3, [base[0] / base[1]] + [x.shape[-1] / x.shape[-2]] * 2, 3.4)
    for ax, view in zip(axes, (torch.from_numpy(np.array(photo)).movedim(-1, 0), *x), strict=True):
        show(ax, view)
    shade = np.full((base[1], base[0], 4), (0, 0, 0, 110), np.uint8)
    shade[int(overlap[1]) : int(overlap[3]), int(overlap[0]) : int(overlap[2])] = 0
    axes[0].imshow(shade, extent=axes[0].images[0].get_extent())
    for rect, style, name in ((outer, ":", "outer"), (rects[0], "-", "view 1"), (rects[1], "--", "view 2")):
        rect = np.array(rect, float)
        plots.draw_box(axes[0], rect, "white", style)
        if rect[0] + rect[1] == min(r[0] + r[1] for r in rects):
            axes[0].text(rect[0], rect[1] - 2, name, color="white", weight="bold")
        elif name != "outer":
            axes[0].text(rect[2], rect[3] + 2, name, color="white", weight="bold", ha="right", va="top")
    for ax, name, b, view in zip(axes, ("the photograph", "view 1", "view 2"), (None, *boxes), (None, *x), strict=True):
        ax.set_title(name + ("" if b is None else f": {view.shape[2]} x {view.shape[1]} pixels"))
        if b is not None:
            draw_regions(ax, b, view, shown_regions(batch))
    plots.write(fig, out / "03-views.png")
    area = [(r[2] - r[0]) * (r[3] - r[1]) for r in (*rects, overlap)]
    return {"base": f"{base[0]} x {base[1]}", "rect1": rects[0], "rect2": rects[1],
            "flip": "flipped" if flip else "not flipped", "view_iou": f"{area[2] / (area[0] + area[1] - area[2]):.2f}",
            "x_shape": tuple(batch.x.shape), "boxes_shape": tuple(batch.boxes.shape), "tau": dataset.tau}  # fmt: skip


def shown_regions(batch):
    """Which regions are followed: the overlap, and the smallest of the others with those farthest from it."""
    w, h = batch.x.shape[-1], batch.x.shape[-2]
    boxes_xyxy = plots.to_pixels(batch.boxes[0, 0, 1:], np.zeros((h, w)))
    return [0, *(i + 1 for i in plots.far_apart(boxes_xyxy, SHOWN - 1))]


# ---------------------------------------------------------------- steps 4 to 9: the network
@torch.no_grad()
def look(out, net, batch, settings, dataset):
    """`Pretext.forward` and `losses.pretext_losses` line by line, with a picture after each."""
    x, mask, rois, boxes, crops, _ = pretrain.inputs(batch)
    det, R = net.detector, boxes.shape[1]
    h = det.features(x, {*det.strides, *net.region_strides})
    z = net.centre_z(net.region_features(h, rois, mask))  # Eq. (4)
    facts = the_features(out, batch, h, z, net.region_strides[0])
    ctx, told, _ = net.prepare(x, mask, rois, boxes, crops)  # Eq. (1); told: patch2query of the other view's z
    facts |= the_queries(out, det, told, R)
    answer = net(x, mask, rois, boxes, crops)  # Eq. (6)-(8), (11)
    looked = cross_attention(det, lambda: net.look(ctx, told))
    facts |= the_attention(out, batch, ctx, answer.pred, looked)
    facts |= the_predictions(out, batch, answer.pred, net, dataset)
    terms, _ = losses.pretext_losses(net, answer, batch, settings.match)
    facts |= the_matching(out, net, answer.pred, boxes)
    facts |= the_losses(out, terms, pretrain.loss_weights(settings, net))
    return facts


def the_features(out, batch, h, z, stride):
    view, boxes = batch.x[0, 0], batch.boxes[0, 0]
    fig, axes = columns(3, (view.shape[2] / view.shape[1], 1.05, 1.05))
    show(axes[0], view)
    H, W = h[stride].shape[-2:]
    for k in range(1, max(H, W)):
        for line, n in ((axes[0].axvline, W), (axes[0].axhline, H)):
            if k < n:
                line(k * stride, color="white", lw=0.6, alpha=0.6)
    r = shown_regions(batch)[1]
    x0, y0, x1, y1 = plots.to_pixels(batch.rois[0, 0], np.zeros(view.shape[-2:]))[r]
    for k in range(8):
        axes[0].plot([x0 + k * (x1 - x0) / 7] * 2, [y0, y1], color=colour_of(r), lw=1)
        axes[0].plot([x0, x1], [y0 + k * (y1 - y0) / 7] * 2, color=colour_of(r), lw=1)
    axes[0].set_title(f"view 1: cells of stride {stride}, region {r + 1}'s 7 x 7 bins")
    z1, z2 = torch.nn.functional.normalize(z, dim=-1)
    for ax, a, b, title in ((axes[1], z1, z1, "view 1 against view 1"), (axes[2], z1, z2, "view 1 against view 2")):
        shown = ax.imshow((a @ b.T).numpy(), cmap="viridis", vmin=-0.5, vmax=1)
        ax.set_title(f"cosine of z: {title}")
        number_regions(ax, len(boxes))
    fig.colorbar(shown, ax=axes[2], shrink=0.8)
    plots.write(fig, out / "04-features.png")
    cosine = z1 @ z2.T
    R = len(cosine)
    return {"h_shape": tuple(h[stride].shape), "z_shape": tuple(z.shape), "stride": stride, "roi_region": r + 1,
            "z_own": f"{cosine.diagonal().mean():.2f}",
            "z_other": f"{(cosine.sum() - cosine.trace()) / (R * R - R):.2f}"}  # fmt: skip


def the_queries(out, det, told, R):
    phi_q = det.query_embed.weight  # (N, C)
    N, C = phi_q.shape
    told = told[1].repeat_interleave(N // R, 0)  # the queries that look into view 2: told view 1's regions
    fig, axes = columns(3, (1.2, 1.2, 1.2), 3.6)
    scale = 2 * torch.stack([told, phi_q]).std().item()
    names = ("patch2query(z1), each repeated", "+  phi_q, learned", "=  queries of view 2")
    for ax, values, name in zip(axes, (told, phi_q, told + phi_q), names, strict=True):
        ax.imshow(values.numpy(), aspect="auto", cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest")
        ax.set_title(name)
        ax.set_xlabel(f"C = {C} channels")
        number_regions(ax, R, N // R, across=False)
    axes[0].set_ylabel(f"N = {N} queries, {N // R} a region")
    plots.write(fig, out / "05-queries.png")
    return {"N": N, "C": C, "R": R, "per_region": N // R, "told_shape": (2, R, C), "query_shape": (2, N, C)}


def the_attention(out, batch, ctx, pred, weights):
    """Of each shown region: what view 1 shows there, and where the surest of its queries looks in view 2."""
    (x1, x2), (b1, b2), R = batch.x[:, 0], batch.boxes[:, 0], batch.boxes.shape[2]
    best = best_queries(pred, R)[1]  # of view 2, (R,)
    (H, W), shown = ctx.shapes[0], shown_regions(batch)
    maps = weights[1].mean(0)[best].reshape(R, H, W)  # (M, N, S) -> mean of the heads -> (R, H, W)
    fig = Figure(figsize=(8.6, 2.5 * math.ceil(len(shown) / 2)), layout="constrained")
    axes = fig.subplots(math.ceil(len(shown) / 2), 4, width_ratios=[0.6, x2.shape[2] / x2.shape[1]] * 2).ravel()
    inside = []
    for r in range(R):
        cx, cy, w, h = b2[r].tolist()
        ys, xs = (torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W
        rows, cols = (ys - cy).abs() <= h / 2, (xs - cx).abs() <= w / 2
        inside.append((maps[r][rows][:, cols].sum().item(), w * h))
    for k, r in enumerate(shown):
        left, top, right, bottom = plots.to_pixels(b1, np.zeros(x1.shape[-2:]))[r].round().astype(int)
        show(axes[2 * k], x1[:, max(top, 0) : bottom, max(left, 0) : right])
        axes[2 * k].spines[:].set(visible=True, color=colour_of(r), linewidth=4)
        axes[2 * k].set_title(f"region {r + 1}\nof view 1", color="black", size=9)
        show(axes[2 * k + 1], x2.float().mean(0, keepdim=True).expand(3, -1, -1).byte())
        heat = torch.nn.functional.interpolate(maps[None, r : r + 1], x2.shape[-2:], mode="bicubic")[0, 0].clamp(min=0)
        rgba = matplotlib.colormaps["inferno"]((heat / heat.max()).numpy())
        rgba[..., 3] = 0.75 * (heat / heat.max()).numpy() ** 0.5
        axes[2 * k + 1].imshow(rgba, extent=axes[2 * k + 1].images[0].get_extent())
        draw_regions(axes[2 * k + 1], b2, x2, [r], tags=())
        axes[2 * k + 1].set_title(f"attention in view 2\n{inside[r][0]:.0%} of it in the region", size=9)
    plots.write(fig, out / "06-attention.png")
    mass, area = np.array(inside[1:]).mean(0)
    return {"weights_shape": tuple(weights.shape), "context_shape": tuple(ctx.c.shape), "mass": f"{mass:.0%}",
            "area": f"{area:.0%}", "heads": weights.shape[1], "H": H, "W": W}  # fmt: skip


def the_predictions(out, batch, pred, net, dataset):
    x2, true, R = batch.x[1, 0], batch.boxes[1, 0], batch.boxes.shape[2]
    every, shown = pred.boxes[-1, 1], shown_regions(batch)
    best = pretrain.best_of_group(net, pred, R)[0][1]
    iou = pretrain.paired_iou(best, true)
    fig, axes = plots.panels([x2.movedim(0, -1).numpy()] * 2)
    for n, box in enumerate(plots.to_pixels(every, np.zeros(x2.shape[-2:]))):
        plots.draw_box(axes[0], box, colour_of(n * R // len(every)), width=1.2)
    axes[0].set_title(f"all {len(every)} boxes of the last layer in view 2")
    draw_regions(axes[1], best, x2, shown, tags=(), style=plots.DASHED)
    draw_regions(axes[1], true, x2, shown, [f"{r + 1}  IoU {iou[r]:.2f}" for r in range(R)])
    axes[1].set_title("regions (solid) and the surest box of each (dashed)")
    plots.write(fig, out / "07-predictions.png")
    report = pretrain.region_report(net, Pairs(dataset, PAIRS), torch.device("cpu"))
    return {"logits_shape": tuple(pred.logits.shape), "pred_boxes_shape": tuple(pred.boxes.shape), "pairs": PAIRS,
            "q_hat_shape": tuple(pred.q_hat.shape), "iou_here": f"{iou.mean():.2f}",
            "cos_own": "-", "cos_other": "-", **{k: f"{v:.2f}" for k, v in report.items()}}  # fmt: skip


class Pairs:
    """More unseen pairs of views of the one photograph, as `region_report` asks for a data set."""

    def __init__(self, dataset, count):
        self.dataset, self.count = dataset, count

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        return self.dataset[1 + key[1], 0]


def the_matching(out, net, pred, boxes):
    labels, valid = torch.full(boxes.shape[:2], net.other), torch.ones(boxes.shape[:2], dtype=torch.bool)
    kind = {"softmax": net.softmax, "cost_class": net.cost_class}
    last = (pred.logits[-1:], pred.boxes[-1:], labels, boxes)
    cost = losses.matching_cost(*last, **kind, cost_l1=5.0, cost_giou=2.0)[0, 1]  # (N, R), of view 2
    free, own = (match(*last, valid, **kind).query[0, 1] for match in (losses.match, losses.match_groups))
    N, R = cost.shape
    fig, (ax,) = columns(1, (2.6,), 3.4)
    shown = ax.imshow(cost.T.numpy(), cmap="magma_r", aspect="auto")
    ax.set(xlabel=f"N = {N} queries, in the colours of their regions", ylabel="regions of view 2")
    for r in range(R):
        ax.add_patch(Rectangle((r * N // R - 0.5, r - 0.5), N // R, 1, fill=False, ec=colour_of(r), lw=2.5))
    ax.plot(own, range(R), "s", ms=11, mfc="none", mec="#1e9bff", mew=2, label="group matching: cheapest of its own")
    ax.plot(free, range(R), "o", ms=5, color="#2fd15b", mec="black", label="Hungarian: least total cost")
    ax.set(xticks=[], yticks=range(R), yticklabels=range(1, R + 1))
    fig.legend(loc="outside upper center", ncols=2, frameon=False)
    fig.colorbar(shown, label="cost")
    plots.write(fig, out / "08-matching.png")
    inside = (free // (N // R) == torch.arange(R)).sum().item()
    return {"cost_shape": tuple(cost.shape), "free_inside": inside, "same_match": (free == own).sum().item()}


def the_losses(out, terms, weights):
    fig, (ax,) = columns(1, (2.6,), 2.6)
    L = len(terms["l1"])
    bottom = np.zeros(L)
    for name in [k for k in terms if k != "global"]:
        values = weights[name] * terms[name].numpy()
        ax.barh([f"decoder layer {i + 1}" for i in range(L)], values, left=bottom, color=TERMS[name],
                label=f"{weights[name]:g} x {name}")  # fmt: skip
        bottom += values
    if "global" in terms:
        ax.barh(["encoder"], [weights["global"] * terms["global"].item()], color=TERMS["global"],
                label=f"{weights['global']:g} x global")  # fmt: skip
    ax.invert_yaxis()
    ax.set_xlabel("share of the total loss, Eq. (13)")
    fig.legend(loc="outside upper center", ncols=5, frameon=False)
    plots.write(fig, out / "09-losses.png")
    rows = [
        f"| `{k}` | {', '.join(f'{v:.3f}' for v in terms[k].reshape(-1).tolist())} | {weights[k]:g} |" for k in terms
    ]
    total = losses.weighted_sum(terms, weights)
    return {"loss_rows": "\n".join(rows), "total": f"{total:.2f}", "layers": L}


def best_queries(pred, R):
    """Index of each region's own query that is surest of an object: (B, R)."""
    score = objectness(pred.logits[-1], Siamese.softmax, Siamese.first).unflatten(1, (R, -1))
    return score.argmax(-1) + torch.arange(R) * score.shape[-1]
