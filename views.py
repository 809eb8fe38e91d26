"""Two views of one photograph with matched regions (paper Sec. 3.2, Figure 3), and the batches made of them.

Read in this order: `ViewDataset.two_views`, the IoU-constrained rectangles, which are the heart, boxes, pixels.
UP-DETR and DETReg look at one view (`one_view`); everything else is shared.
Rectangles and names ending in `_xyxy` are (x0, y0, x1, y1) pixels of the base image, the photograph at its drawn size;
the boxes of a batch are (cx, cy, w, h) in [0, 1] of their own unpadded view.

    python views.py [IMAGE] [OUT.png] [--proposals CACHE] [--seed 0]    # draws a pair, matched regions in one colour
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert, nms

from colour import change_colour, change_colours, draw_colour
from data import ImageList, cut_window, draw_window, load_image, pad_stack, resize_size, stream
from proposals import MIN_SIDE, random_boxes

cv2.setNumThreads(1)  # one process per core; OpenCV's own threads fight the loader's workers and do not survive a fork
SHORT_SIDES = {  # recipe -> the short sides, one drawn per item, and the longest side (released code, without 384)
    "imagenet": ((320, 336, 352, 368, 400, 416, 432, 448, 464, 480), 600),
    "coco": ((480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800), 1333),
}
NOMINAL = {"imagenet": 384, "coco": 640}  # --resolution at which these hold
MIN_BOX = 8  # of a proposal to be cropped from a single view, pixels of the photograph: the least of UP-DETR's sampler
MIN_AREA, MAX_ASPECT = 0.05, 8.0  # of a region: share of the overlap; of a random one, either way (released code)
PAD_JITTER = 0.1  # largest shift of a repeated region, as a fraction of its side (released code)
UNIT = (0.0, 0.0, 1.0, 1.0)


class ViewBatch(NamedTuple):  # an item is one without the B axis and the mask; its index is an int, its fallback a bool
    x: Tensor  # (V, B, 3, H0, W0) uint8, augmented, to be normalised on the device
    mask: Tensor | None  # (V, B, H0, W0), True = padding
    boxes: Tensor  # (V, B, R, 4) clean targets: region r shows the same content in both views, region 0 is the overlap
    rois: Tensor  # (V, B, R, 4) the same, jittered: only for the query's RoIAlign
    valid: Tensor  # (V, B, R), False where DETReg has fewer proposals
    crops: Tensor | None  # (V, B, R, 3, 128, 128) uint8
    index: Tensor  # (B,) position in the image list
    fallback: Tensor  # (B,) no proposal survived: the regions are random (DETReg: none)
    labels: Tensor | None = None  # (V, B, R) pseudo-classes, -1 for a region that has none
    x_colours: Tensor | None = None  # (V, B, 11), of draw_colour, where x is to be augmented on the device
    crop_colours: Tensor | None = None  # (V, B, R, 11)

    def to(self, device, non_blocking=True):
        return ViewBatch(*(v if v is None else v.to(device, non_blocking=non_blocking) for v in self))

    def coloured(self):
        """The batch itself, or with `augment_on="device"` the one whose colours are changed, where its tensors are."""
        x, crops = self.x, self.crops
        if self.x_colours is not None:
            x = change_colours(x, self.x_colours, self.mask)
        if self.crop_colours is not None:
            crops = change_colours(crops, self.crop_colours)
        return self._replace(x=x, crops=crops, x_colours=None, crop_colours=None)


class ViewDataset(Dataset):
    """Views of photographs: `dataset[epoch, index]` depends on (seed, epoch, index) only, not on workers, ranks, order.

    `proposals.boxes(index, epoch)` gives (k, 4) xyxy in `load_image`'s frame, best first; None means random regions.
    `proposals.labels(index, epoch)` gives their pseudo-classes (k,), if `proposals.classes` says that there are any.
    method: siamese has V = 2 views, updetr and detreg V = 1. Boxes follow `rounded` rectangles, or exact ones.
    augment_on: "worker", or "device" for items with their pixels as they were and the draws of their colours.
    Raises ValueError naming a bad setting or a bad file, which is never replaced by another.
    """

    def __init__(self, images: ImageList, proposals=None, *, method="siamese", num_regions=10, tau=0.5,
                 short_sides=SHORT_SIDES["imagenet"][0], longest=SHORT_SIDES["imagenet"][1], jitter=0.1, crop_size=128,
                 crops=True, augment=True, augment_on="worker", region_nms=1.0, rounded=True, seed=0):  # fmt: skip
        if method not in ("siamese", "updetr", "detreg"):
            raise ValueError(f"method {method!r} has no views: choose siamese, updetr or detreg")
        if not (0 < tau <= 1 and num_regions >= 1 and 0 <= jitter < 0.5):  # from 0.5 on, jitter turns boxes inside out
            raise ValueError(f"tau {tau}, num_regions {num_regions}, jitter {jitter}: want (0, 1], 1 or more, [0, 0.5)")
        if augment_on not in ("worker", "device"):
            raise ValueError(f"augment_on {augment_on!r}: choose worker or device")
        if not 0 < region_nms <= 1:
            raise ValueError(f"region_nms {region_nms}: want an IoU in (0, 1]; 1 keeps all regions")
        self.images, self.proposals, self.num_regions, self.tau = images, proposals, num_regions, tau
        self.short_sides, self.longest, self.jitter, self.seed = tuple(short_sides), longest, jitter, seed
        self.crop_size, self.crops, self.augment, self.region_nms = crop_size, crops, augment, region_nms
        self.method, self.rounded, self.augment_on = method, rounded, augment_on

    def __len__(self):
        return len(self.images.paths)

    def __getitem__(self, key):
        epoch, index = key
        g = stream(self.seed, epoch, index)
        path = Path(self.images.root) / self.images.paths[index]
        image = load_image(path)
        if min(image.size) < MIN_SIDE:
            raise ValueError(f"{path}: {image.width} x {image.height} pixels, a view needs {MIN_SIDE}: leave it out")
        sizes = getattr(self.proposals, "sizes", None)
        if sizes is not None and tuple(sizes[index].tolist()) != image.size:
            raise ValueError(f"{path} is {image.size}, its proposals of {sizes[index]} (w, h): write the cache again")
        proposals = torch.empty(0, 4) if self.proposals is None else torch.tensor(self.proposals.boxes(index, epoch))
        make = self.two_views if self.method == "siamese" else self.one_view
        views, boxes, rois, rows, crops = make(image, proposals, g)
        x, x_colours = self.stack(views, g if self.method == "siamese" else None)
        stacked = self.stack(crops, g) if crops else (None, None)
        crops, crop_colours = (v if v is None else v.unflatten(0, boxes.shape[:2]) for v in stacked)
        boxes, rois = (box_convert(b, "xyxy", "cxcywh").float() for b in (boxes, rois))
        known, shape = self.proposals is not None, boxes.shape[:2]
        valid = torch.arange(shape[1]).lt(len(rows)).expand(shape)
        asked = self.num_regions > (self.method == "siamese")  # the overlap is no proposal
        fallback, labels = known and asked and not (rows >= 0).any().item(), None
        if known and getattr(self.proposals, "classes", None) is not None:
            labels = torch.full(shape, -1)
            classes = torch.tensor(self.proposals.labels(index, epoch), dtype=torch.long)
            labels[:, : len(rows)] = torch.where(rows < 0, -1, F.pad(classes, (0, 1))[rows])
        return ViewBatch(x, None, boxes, rois, valid, crops, index, fallback, labels, x_colours, crop_colours)

    def two_views(self, image, proposals, g):
        """Siamese DETR (Sec. 3.2): views, boxes and rois (2, R, 4) xyxy in [0, 1], rows (R,), crops.

        Views and crops are lists, of V and V * R arrays (h, w, 3) uint8, their colours as in the photograph.
        """
        base = resize_size(*image.size, self.short_sides[int(uniform(g, 0, len(self.short_sides)))], self.longest)
        flip = uniform(g) < 0.5  # one coin for both views (released code); SimSiam flips each on its own
        outer, *rects = two_rectangles(*base, self.tau, g, rounded=self.rounded)
        overlap = clip(row(*rects[0]), rects[1])[0].tolist()
        proposals = map_boxes(proposals, (0, 0, *image.size), (0, 0, *base))
        pixels = np.asarray(image)
        if flip:
            pixels = cv2.flip(pixels, 1)
            proposals = map_boxes(proposals, (0, 0, *base), (base[0], 0, 0, base[1]))[:, [2, 1, 0, 3]]
        regions, rows = choose_regions(proposals, overlap, self.num_regions, g, self.region_nms)
        boxes = torch.stack([map_boxes(regions, rect, UNIT) for rect in rects])  # (V, R, 4), in [0, 1] to the last bit
        rois = jitter_boxes(boxes, self.jitter, g, UNIT)  # from the item's key; the released code draws on the device
        shown = rects if self.rounded else [tuple(map(round, rect)) for rect in rects]  # --compat released
        views = [cut(pixels, rect, base, (outer[2] - outer[0], outer[3] - outer[1])) for rect in shown]
        # Eq. (5) crops the augmented views; released code: the clean ones, each crop recoloured
        return views, boxes, rois, rows, self.cut_crops(views, boxes) if self.crops else []

    def one_view(self, image, proposals, g):
        """UP-DETR: the image, only resized. DETReg: DETR's training crop. As `two_views`, with V = 1.

        Crops are cut from the photograph as it is, before it is resized. DETReg's boxes are clipped to the window, and
        those outside are dropped: rows then has fewer than R entries. UP-DETR's list is repeated, as a whole, until it
        is long enough (released code).
        """
        w, h = image.size
        short = self.short_sides[int(uniform(g, 0, len(self.short_sides)))]
        window, size, flip = (0, 0, w, h), resize_size(w, h, short, self.longest), False
        if self.method == "detreg":
            factor = min(self.short_sides) / min(SHORT_SIDES["imagenet"][0])
            window, size, flip = draw_window(w, h, self.short_sides, self.longest, factor, g)
        sides = (proposals[:, 2:] - proposals[:, :2]).amin(1)
        rows = torch.nonzero(sides >= MIN_BOX)[: self.num_regions, 0]
        if self.method == "updetr" and len(rows):
            rows = rows[torch.arange(self.num_regions) % len(rows)]
        source = proposals[rows].double()
        if not len(rows) and (self.method == "updetr" or self.proposals is None):
            source = torch.from_numpy(random_boxes(image.size, self.num_regions, g)[0]).double()
            rows = torch.full((self.num_regions,), -1)
        view, boxes = cut_window(image, source, window, size, flip)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, source, rows = map_boxes(boxes[kept], (0, 0, *size), UNIT), source[kept], rows[kept]
        missing = self.num_regions - len(rows)
        boxes, crops = F.pad(boxes, (0, 0, 0, missing), value=0.5)[None], []
        if self.crops:
            crops = self.cut_crops([np.asarray(image)], map_boxes(source, (0, 0, w, h), UNIT)[None])
            crops += [np.zeros((self.crop_size, self.crop_size, 3), np.uint8)] * missing
        return [np.asarray(view)], boxes, boxes, rows, crops

    def cut_crops(self, images, boxes):
        """Crop(x, b) of Eq. (5): (V, R, 4) xyxy in [0, 1] of each of V images -> V * R crops of 128 x 128."""
        side = (self.crop_size, self.crop_size)
        return [cut(image, box, (1, 1), side) for image, b in zip(images, boxes.tolist(), strict=True) for box in b]

    def stack(self, images, g):
        """List of images -> (len, 3, h, w), recoloured from g, or as they are with the draws (len, 11) for it."""
        if g is None or not self.augment:
            return stack_images(images), None
        if self.augment_on == "worker":
            return stack_images(images, g), None
        return stack_images(images), draw_colour(g, len(images))


def collate_views(items):
    """Join items into a ViewBatch; views are padded at the bottom and right to the largest of the whole batch."""
    x, _, boxes, rois, valid, crops, index, fallback, *more = zip(*items, strict=True)
    x, mask = pad_stack([view for views in zip(*x, strict=True) for view in views])  # (V*B, 3, H0, W0), view 1's first
    if crops[0] is not None:
        crops = [crop.movedim(2, -1) for crop in crops]  # as they lie in memory: a plain copy
    per_view = (None if f[0] is None else torch.stack(f, dim=1) for f in (boxes, rois, valid, crops, *more))
    boxes, rois, valid, crops, *more = per_view
    crops = None if crops is None else crops.movedim(-1, 3)
    x, mask = (field.unflatten(0, (len(boxes), -1)) for field in (x, mask))
    return ViewBatch(x, mask, boxes, rois, valid, crops, torch.tensor(index), torch.tensor(fallback), *more)


def scaled(recipe, resolution=None):
    """A recipe's (short sides, longest side), times `resolution` / 384 (imagenet) or / 640 (coco)."""
    (short_sides, longest), factor = SHORT_SIDES[recipe], (resolution or NOMINAL[recipe]) / NOMINAL[recipe]
    return tuple(max(1, round(side * factor)) for side in short_sides), max(1, round(longest * factor))


# ---------------------------------------------------------------- the IoU-constrained rectangles
def two_rectangles(width, height, tau, g, shrink=True, rounded=True):
    """Draw (outer, rect1, rect2), integer xyxy unless not `rounded`, with IoU(rect1, rect2) >= tau (paper Sec. 3.2)."""
    outer = outer_rectangle(width, height, g)  # Figure 3 (a)
    u1, u2 = (uniform(g), uniform(g)) if shrink else (0.0, 0.0)
    a, b = diagonal_pair(outer, tau, u1, u2)  # Figure 3 (b)
    a, b = round_pair(a, b) if rounded else (a, b)
    return (outer, a, b) if uniform(g) < 0.5 else (outer, b, a)  # view 1 is the upper left one half of the time


def outer_rectangle(width, height, g):
    """Figure 3 (a): a rectangle over 50 to 100 % of the image, aspect 3/4 to 4/3 (released code)."""
    for _ in range(10):
        area, aspect = uniform(g, 0.5, 1.0) * width * height, math.exp(uniform(g, math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x0, y0 = int(uniform(g, 0, width - w + 1)), int(uniform(g, 0, height - h + 1))
            return x0, y0, x0 + w, y0 + h
    # ten misses: the largest of these aspects, centred; of a long photograph less than half (released code)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    x0, y0 = (width - w) // 2, (height - h) // 2
    return x0, y0, x0 + w, y0 + h


def diagonal_pair(outer, tau, u1=0.0, u2=0.0):
    """Figure 3 (b): two views on both sides of the centre, along the diagonal of `outer`, as float xyxy (a, b).

    In units of the outer sides, views of side s = (1 + r) / 2 overlap in a square of side r, so that IoU = tau where
    r^2 / (2 s^2 - r^2) = tau, that is (tau + 2) r^2 - 2 tau r - tau = 0. The paper expands them, keeping IoU > tau;
    the released code starts at tau and moves each outer corner back in by the share u in [0, 1] of the margin
    (1 - r) / 2, of which this is the closed form. The overlap stays, so IoU only grows.
    """
    x0, y0, x1, y1 = outer
    r = (tau + math.sqrt(2 * tau * (tau + 1))) / (tau + 2)
    dx, dy = (1 - r) / 2 * (x1 - x0), (1 - r) / 2 * (y1 - y0)
    return (x0 + u1 * dx, y0 + u1 * dy, x1 - dx, y1 - dy), (x0 + dx, y0 + dy, x1 - u2 * dx, y1 - u2 * dy)


def round_pair(a, b):
    """Round a pair to integers so that its IoU cannot fall: the overlap outward, the outer corners inward.

    Pixels and boxes both use the result; the released code rounds the pixels only, which sets them up to 0.7 px apart.
    """
    near, far = (math.floor(b[0]), math.floor(b[1])), (math.ceil(a[2]), math.ceil(a[3]))  # of the overlap
    first = min(math.ceil(a[0]), near[0]), min(math.ceil(a[1]), near[1])  # never past the overlap's
    last = max(math.floor(b[2]), far[0]), max(math.floor(b[3]), far[1])
    return first + far, near + last


def uniform(g, low=0.0, high=1.0):
    return low + (high - low) * torch.rand((), generator=g, dtype=torch.float64).item()


# ---------------------------------------------------------------- boxes, in float64 until they leave
def map_boxes(boxes_xyxy, source, target):
    """Carry (k, 4) boxes to the coordinates in which the rectangle `source` becomes `target`, both xyxy.

    From the base image into the view cut at `rect`, as fractions of its sides: (rect, UNIT); back: (UNIT, rect).
    """
    size, new_size = ((r[2] - r[0], r[3] - r[1]) for r in (source, target))
    return (boxes_xyxy - row(*source[:2])) * row(*new_size) / row(*size) + row(*target[:2])


def choose_regions(boxes_xyxy, overlap, count, g, nms_iou=1.0):
    """Figure 3 (c): the overlap and `count` - 1 proposals in it, (count, 4) xyxy, and which they are (-1: none).

    Proposals are clipped to the overlap and kept, best first, if they fill 5 % of it, the same share in both views
    (released code; the paper picks at random). Too few are repeated in turn with jitter, none gives random boxes.
    Clipping makes boxes alike: below 1, `nms_iou` leaves out those with a higher IoU with a better one (ours).
    """
    boxes = clip(boxes_xyxy, overlap)  # the released code clips one pixel short and drops boxes for float noise
    sides = boxes[:, 2:] - boxes[:, :2]
    smallest = MIN_AREA * (overlap[2] - overlap[0]) * (overlap[3] - overlap[1])
    rows = torch.nonzero((sides > 0).all(dim=1) & (sides.prod(dim=1) >= smallest))[:, 0]
    found = boxes[rows] if len(rows) else random_regions(overlap, g)
    if nms_iou < 1:
        kept = nms(found, -torch.arange(len(found)).double(), nms_iou)
        found, rows = found[kept], rows[kept] if len(rows) else rows
    turn = torch.arange(count - 1) % len(found)
    chosen, rows = found[turn], rows[turn] if len(rows) else torch.full_like(turn, -1)
    chosen[len(found) :] = jitter_boxes(chosen[len(found) :], PAD_JITTER, g, overlap)
    return torch.cat([row(*overlap), chosen]), F.pad(rows, (1, 0), value=-1)


def random_regions(overlap, g):
    """Those of 100 random boxes with 5 % of the overlap's area and aspect 1/8 to 8, about half (released code)."""
    x0, y0, x1, y1 = overlap
    u = torch.rand(100, 4, generator=g, dtype=torch.float64)
    left, top = x0 + u[:, 0] * (x1 - x0), y0 + u[:, 1] * (y1 - y0)
    h = u[:, 2] * (y1 - top)
    narrowest, widest = MIN_AREA * (x1 - x0) * (y1 - y0) / h, x1 - left
    w = narrowest + u[:, 3] * (widest - narrowest)
    fits = (narrowest < widest) & (w <= MAX_ASPECT * h) & (h <= MAX_ASPECT * w)
    return clip(torch.stack([left, top, left + w, top + h], dim=1)[fits], overlap)


def jitter_boxes(boxes, ratio, g, bounds):
    """Shift each coordinate by side * ratio * (2 sigmoid(n) - 1), n ~ N(0, 1), and clip (box jitter of Sec. 3.2)."""
    noise = 2 * torch.randn(boxes.shape, generator=g, dtype=boxes.dtype).sigmoid() - 1
    return clip(boxes + (boxes[..., 2:] - boxes[..., :2]).tile(2) * ratio * noise, bounds)


def clip(boxes, bounds):
    return boxes.clamp(row(*bounds[:2]), row(*bounds[2:]))


def row(*values):  # (1, 4) of four values, or of (x, y) twice
    return torch.tensor([values * (4 // len(values))], dtype=torch.float64)


# ---------------------------------------------------------------- pixels
def cut(image, rect, frame, size):
    """Cut `rect`, in coordinates in which the (h, w, 3) uint8 image measures `frame`, and resize it to `size` (w, h).

    One bilinear pass from source to view, through fractions of pixels, so that they lie exactly where boxes say. Up to
    3-fold shrinking, a Gaussian as wide as the difference of the filters stands for PIL's antialiasing (ours: speed).
    """
    units = zip(rect, image.shape[1::-1] * 2, frame * 2, strict=True)
    x0, y0, x1, y1 = (value * side / unit for value, side, unit in units)
    left, top = max(int(x0) - 2, 0), max(int(y0) - 2, 0)  # what the filters read
    part = image[top : math.ceil(y1) + 2, left : math.ceil(x1) + 2]
    x0, y0, x1, y1 = x0 - left, y0 - top, x1 - left, y1 - top
    steps = (x1 - x0) / size[0], (y1 - y0) / size[1]
    if max(steps) > 3:
        resized = Image.fromarray(part).resize(size, Image.Resampling.BILINEAR, (x0, y0, x1, y1), reducing_gap=3.0)
        return np.asarray(resized)
    if max(steps) > 1:
        sigmas = (math.sqrt(max(step**2 - 1, 1e-6) / 6) for step in steps)  # a triangle of half-width s has s^2 / 6
        part = cv2.GaussianBlur(part, (0, 0), *sigmas, borderType=cv2.BORDER_REPLICATE)
    part = cv2.cvtColor(part, cv2.COLOR_RGB2RGBA)  # OpenCV warps four channels in half the time of three
    matrix = np.array([[steps[0], 0, x0 + (steps[0] - 1) / 2], [0, steps[1], y0 + (steps[1] - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    resized = cv2.warpAffine(part, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(resized, cv2.COLOR_RGBA2RGB)


def stack_images(images, g=None):
    """List of (h, w, 3) uint8 -> (len, 3, h, w), each with its colours changed by a draw of its own from g."""
    if g is not None:
        images = [change_colour(*pair) for pair in zip(images, draw_colour(g, len(images)).tolist(), strict=True)]
    return torch.from_numpy(np.stack(images)).movedim(-1, -3)  # channels last in memory, as convolutions like it


def main():
    parser = argparse.ArgumentParser(description="Draw the two views of a photograph, matched regions in one colour.")
    parser.add_argument("image", nargs="?", help="a photograph; default: the portrait that comes with matplotlib")
    parser.add_argument("out", nargs="?", default="pair.png", help="default: %(default)s")
    parser.add_argument("--proposals", help="cache of proposals.py that holds the image; default: random regions")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    from matplotlib.cbook import get_sample_data  # a view needs none of these three

    from plots import save_pair
    from proposals import Cache

    try:
        path = Path(args.image or get_sample_data("grace_hopper.jpg", asfileobj=False)).absolute().as_posix()
        proposals = Cache(args.proposals) if args.proposals else None
        names = proposals.paths if proposals else [Path(path).name]
        name = max((name for name in names if path.endswith(f"/{name}")), key=len, default=None)
        if name is None:
            raise ValueError(f"{args.proposals} has no proposals for {path}: name an image it was made for")
        images, index = ImageList(Path(path.removesuffix(name)), names), names.index(name)
        item = ViewDataset(images, proposals, seed=args.seed)[0, index]
        save_pair(args.out, item.x, item.boxes, title=f"{name}, seed {args.seed}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: {item.boxes.shape[1]} regions in two views of {item.x.shape[3]} x {item.x.shape[2]} pixels")


if __name__ == "__main__":
    main()
