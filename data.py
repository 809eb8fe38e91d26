"""Images and labels on their way to the network: lists, loading, padding, targets, fine-tuning transforms.

Read it from the top: random streams, image lists, one image, batches, labels (COCO, VOC), the fine-tuning set (paper
Sec. 4.1), the commands. Boxes are (x0, y0, x1, y1) in pixels, 0-based, far edge exclusive, and their names
end in `_xyxy`; only a `DetectionBatch` holds (cx, cy, w, h) in [0, 1] of the unpadded image. Masks: True = padding.

    python data.py check PATH...          # counts, class table, bad boxes, unreadable images
    python data.py voc2coco ROOT... OUT   # VOC XML folders -> one COCO json
    python data.py toy OUT                # labelled and unlabelled scenes of drawn shapes
"""

import argparse
import json
import math
import os
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert
from tqdm import tqdm

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet, on 0..1; released code
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")  # ours: PIL's EPS would start a program
MAX_PIXELS = 100_000_000  # ours: 300 MB once decoded; a larger header is taken for a decompression bomb
TRANSPOSE = {o: Image.Transpose(m) for o, m in zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True)}  # EXIF orientation
VOC_CLASSES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
pottedplant sheep sofa train tvmonitor""".split()


def stream(seed, *key):
    """The torch generator of one key, e.g. (epoch, index): its draws depend on nothing else (no worker, no rank)."""
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)  # keys (3,) and (3, 0) differ
    return torch.Generator().manual_seed(int(state[0]))


def randint(low, high, g):
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


class ImageList(NamedTuple):
    root: Path
    paths: list  # posix, relative to root


def list_images(source):
    """Images of a folder (recursive, sorted), a text file (a path a line, relative to it), a COCO json, or one file."""
    source = Path(source)
    if source.is_dir():
        start = len(os.path.join(source, ""))
        walk = (path[start:].replace(os.sep, "/") for path in files_below(source) if path.lower().endswith(SUFFIXES))
        paths = sorted(path for path in walk if "/." not in f"/{path}")  # hidden ones are no photographs
        if not paths:
            raise ValueError(f"{source} holds no image ({' '.join(SUFFIXES)}): give another folder")
        return ImageList(source, paths)
    if not source.is_file():
        raise ValueError(f"{source} does not exist: give a folder of images, a text file of paths or a COCO json")
    if source.suffix.lower() in SUFFIXES:
        return ImageList(source.parent, [source.name])
    if source.suffix.lower() == ".json":
        root, table = coco_table(source)
        return ImageList(root, [row["file_name"] for row in table["images"]])
    return ImageList(source.parent, existing(source.parent, read_lines(source), source))


def files_below(folder):
    """All files of a folder and those below; links are followed, no folder is entered twice, so that loops end."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            folders.sort()
            yield from (os.path.join(here, name) for name in files)


def read_lines(path):
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: give a folder of images, a text file of paths or a COCO json") from error


def below(root, name, source):
    """root / name, after a check that the name cannot climb out of the root (ValueError)."""
    path = PureWindowsPath(name if isinstance(name, str) else "..")  # splits at both kinds of slash
    if path.anchor or ".." in path.parts:
        raise ValueError(f"{source} names {name!r}, which is not below its image root, relative to {root}: correct it")
    return root / name


def existing(root, names, source):
    """The names, after a check that there are some and each is a file below root (ValueError)."""
    for name in names:
        if not os.path.isfile(below(root, name, source)):
            raise ValueError(f"{source} names {name!r}, which is not in {root}: add the file or take the entry out")
    if not names:
        raise ValueError(f"{source} names no image: give a list with at least one")
    return names


def fingerprint(names, *columns):
    """How many images, and a checksum of their names and tensors: a data set that has changed has another."""
    check = 0
    for name in names:
        check = zlib.crc32(f"{name}\n".encode(errors="surrogateescape"), check)
    for column in columns:
        check = zlib.crc32(torch.cat(column).numpy(), check)
    return f"{len(names)}, checksum {check:08x}"


def image_root(json_path, file_names):
    """The folder a COCO json's file names are relative to: the first of the four usual ones that holds an image."""
    here = Path(json_path).parent
    split = Path(json_path).stem.rsplit("_", 1)[-1]  # annotations/instances_train2017.json -> train2017
    tried = [here, here / "images", here.parent / split, here.parent / "images" / split]
    for root in tried:
        if any(os.path.isfile(below(root, name, json_path)) for name in file_names[:100]):
            return root
    raise ValueError(f"{json_path}: none of its images is in {', '.join(map(str, tried))}: move them to one of these")


def load_image(path, size=None):
    """The image as 8-bit RGB, turned as its EXIF tag says, unless `size` = (w, h) of its annotation is that before it.

    16-bit grey keeps its high byte, float grey its range, what is transparent lies on white. Raises ValueError with the
    path when the file cannot be read, has more than MAX_PIXELS, or has the annotated size in neither frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise ValueError(f"{file.width} x {file.height} pixels, the limit is {MAX_PIXELS:,}")
                stored = to_rgb(file)
                turn = None
                with suppress(Exception):  # a damaged EXIF block says nothing, the pixels are still good
                    turn = TRANSPOSE.get(file.getexif().get(0x0112))
    except Exception as error:  # PIL raises a dozen kinds on damaged files
        remedy = "remove it, or run proposals.py, which lists unreadable files in a reject list"
        raise ValueError(f"{path} cannot be read as an image ({error}): {remedy}") from error
    turned = stored if turn is None else stored.transpose(turn)
    for image in (turned, stored):
        if size is None or tuple(size) == image.size:
            return image
    raise ValueError(f"{path} is {turned.size} (w, h), its annotation says {tuple(size)}: correct the annotation")


def to_rgb(image):
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.nan_to_num(np.asarray(image).astype(np.float32))
        full = 65535 if image.mode != "F" or grey.max() > 255 else 255 if grey.max() > 1 else 1
        return Image.fromarray((grey * (255 / full)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy RGB


def to_tensor(image):
    """PIL image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize_size(w, h, short, longest=None):
    """(w, h) with the short side at `short`, or less where the long side would pass `longest` (released code).

    longest None: in DETR's proportion, 1333 to 800.
    """
    small, large, longest = min(w, h), max(w, h), longest or max(1, round(short * 1333 / 800))
    if large / small * short > longest:
        short = max(1, round(longest * small / large))
    if short == small:
        return w, h
    large = min(int(short * large / small), max(longest, short))  # ours: the cap stops 20000 x 10 at 1333 x 1
    return (short, large) if w < h else (large, short)


@lru_cache
def constants(device):
    """255 MEAN and 255 STD there: a copy at every step would make the host wait for the device."""
    return 255 * MEAN.to(device), 255 * STD.to(device)


def normalise(x, mask=None):
    """uint8 (..., 3, H, W) -> float32 (x / 255 - MEAN) / STD, exactly 0 where mask (..., H, W) says padding."""
    mean, std = constants(x.device)
    x = x.float().sub_(mean).div_(std)
    return x if mask is None else x.masked_fill_(mask.unsqueeze(-3), 0.0)


def pad_stack(images):
    """List of uint8 (3, h, w) -> x (B, 3, H0, W0), mask (B, H0, W0), padded at the bottom and right to the largest."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    layout = torch.channels_last if images[0].stride(0) == 1 else torch.contiguous_format  # as theirs: plain copies
    x = torch.empty(len(images), 3, height, width, dtype=torch.uint8, memory_format=layout).zero_()
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        _, h, w = image.shape
        x[i, :, :h, :w], mask[i, :h, :w] = image, False
    return x, mask


class Annotations(NamedTuple):
    """Labelled images; the lists but the last two have an entry per image, with t boxes in it."""

    root: Path
    images: list  # dict id, path, width, height
    boxes_xyxy: list  # (t, 4) float32, as annotated, not clipped
    labels: list  # (t,) int64, 0..K-1
    crowd: list  # (t,) bool
    area: list  # (t,) float32
    difficult: list  # (t,) bool, VOC's flag
    categories: list  # (id, name) of class 0..K-1, sorted by id
    bad: list  # a sentence for each box left out: empty, or outside its image


def read_annotations(source, split="trainval", quiet=False):
    """The labels of a COCO json, or of one or more VOC roots (a VOCdevkit/VOC2007 folder) with their `split`.

    Both give the same targets for the same data. Any category ids, in sorted order, become 0..K-1. Bad boxes are left
    out, with one line unless `quiet`. Raises ValueError naming the file and the entry where one is missing or wrong.
    """
    sources = [Path(s) for s in (source if isinstance(source, list | tuple) else [source])]
    source = " ".join(map(str, sources))
    if all(map(is_voc, sources)):
        root, table = voc_table(sources, split)
    elif len(sources) == 1 and sources[0].suffix.lower() == ".json":
        root, table = coco_table(sources[0])
    else:
        raise ValueError(f"{source} is neither one COCO json nor VOC roots: give a .json, or folders with JPEGImages")
    images = [{"id": row["id"], "path": row["file_name"], **image_size(root, row)} for row in table["images"]]
    categories = sorted((row["id"], str(row.get("name", row["id"]))) for row in entries(source, table, "categories"))
    place = {image["id"]: i for i, image in enumerate(images)}
    label = {number: k for k, (number, _) in enumerate(categories)}
    rows, bad = [[] for _ in images], []
    for row in entries(source, table, "annotations"):
        try:
            i, k = place[row["image_id"]], label[row["category_id"]]
            x, y, w, h = map(float, row["bbox"])
            crowd, difficult = (float(row.get(key) or 0) != 0 for key in ("iscrowd", "difficult"))  # "0" is no too
            rest = k, crowd, float(row.get("area", w * h)), difficult
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            fault = "an image_id or category_id that is in no table, or a bbox, area or iscrowd that is no number"
            raise ValueError(f"{source}: annotation {row['id']} has {fault} ({error}): correct it") from error
        width, height = images[i]["width"], images[i]["height"]
        with np.errstate(over="ignore", invalid="ignore"):
            x0, y0, x1, y1 = np.array([x, y, x + w, y + h]).astype(np.float32).tolist()  # what is kept of it
        if math.isfinite(x0 + y0 + x1 + y1) and min(x1, width) > max(x0, 0) and min(y1, height) > max(y0, 0):
            rows[i].append((x0, y0, x1, y1, *rest))
        else:
            bad.append(f"{images[i]['path']}: box {[x, y, w, h]} (x, y, w, h) is empty or outside the image")
    if bad and not quiet:
        print(f"{source}: {len(bad)} bad boxes left out, first {bad[0]}; `data.py check` lists all", file=sys.stderr)
    flat = torch.tensor([row for of_image in rows for row in of_image], dtype=torch.float64).reshape(-1, 8)
    columns = flat[:, :4].float(), flat[:, 4].long(), flat[:, 5].bool(), flat[:, 6].float(), flat[:, 7].bool()
    counts = [len(of_image) for of_image in rows]
    return Annotations(root, images, *(list(column.split(counts)) for column in columns), categories, bad)


def image_size(root, row):
    """Width and height that a table gives, or, where it gives none (hand-made ones), of the file itself."""
    size = row.get("width"), row.get("height")
    if not all(type(side) is int and side > 0 for side in size):
        size = load_image(root / row["file_name"]).size
    return dict(zip(("width", "height"), size, strict=True))


def coco_table(path):
    """(image root, the json's top-level object), its list of images checked."""
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a json file ({error}): give a COCO json") from error
    names = [row.get("file_name") for row in entries(path, table, "images")]
    root = image_root(path, names)
    existing(root, names, path)
    return root, table


def entries(source, table, key):
    """The list of objects `key` of a table, each with its own whole-number id."""
    rows, seen = table.get(key) if isinstance(table, dict) else None, set()
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{source}: {key!r} is missing or not a list of objects: give a COCO json")
    for row in rows:
        if type(row.get("id")) is not int or row["id"] in seen:
            raise ValueError(f"{source}: id {row.get('id')!r} in {key!r} is no whole number or not unique: renumber")
        seen.add(row["id"])
    return rows


def is_voc(root):
    return (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir()


def voc_table(roots, split):
    """(image root, COCO-style table) of VOC roots: 1-based inclusive corners become 0-based, far edge exclusive."""
    roots = [Path(os.path.abspath(root)) for root in roots]
    top = Path(os.path.commonpath(roots))
    images, boxes = [], []
    for root in roots:
        stems = {
            Path(name).stem: name for name in sorted(os.listdir(root / "JPEGImages")) if name.lower().endswith(SUFFIXES)
        }
        for xml in voc_files(root, split):
            size, found = parse_voc(xml)
            path = root / "JPEGImages" / stems.get(xml.stem, f"{xml.stem}.jpg")
            images.append({"id": len(images) + 1, "file_name": path.relative_to(top).as_posix(), **size})
            boxes += [{"image_id": len(images), **box} for box in found]
    existing(top, [row["file_name"] for row in images], f"split {split!r}")
    names = {box["name"] for box in boxes}
    if names != set(VOC_CLASSES):  # then the names in the whole folders, so that all splits agree
        every = [parse_voc(xml)[1] for root in roots for xml in (root / "Annotations").glob("*.xml")]
        names = {box["name"] for found in every for box in found}
    names = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    for i, box in enumerate(boxes):
        area = box["bbox"][2] * box["bbox"][3]
        box.update(id=i + 1, iscrowd=0, category_id=names.index(box.pop("name")), area=area)
    categories = [{"id": k, "name": name} for k, name in enumerate(names)]
    return top, {"images": images, "annotations": boxes, "categories": categories}


def voc_files(root, split):
    """The XML files of the ids in ImageSets/Main/<split>.txt, or all where there is no ImageSets."""
    main, folder = root / "ImageSets" / "Main", root / "Annotations"
    if not main.is_dir():
        return sorted(folder.glob("*.xml"))
    existing(main, [f"{split}.txt"], f"the split {split!r}")
    names = [f"{line}.xml" for line in read_lines(main / f"{split}.txt")]
    return [folder / name for name in existing(folder, names, main / f"{split}.txt")]


class NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, name, pubid, system):  # called before any entity is expanded
        raise ValueError("it declares a DOCTYPE")


def parse_voc(xml):
    """(dict width, height; list of dict name, difficult, bbox) of one VOC XML file."""
    try:
        tree = ElementTree.fromstring(xml.read_bytes(), parser=ElementTree.XMLParser(target=NoDoctype()))
        boxes = []
        for item in tree.iter("object"):
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            name, difficult = item.findtext("name").strip(), int(item.findtext("difficult", "0").strip() == "1")
            boxes.append({"name": name, "difficult": difficult, "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]})
        return {side: int(float(tree.findtext(f"size/{side}", "0"))) for side in ("width", "height")}, boxes
    except (ElementTree.ParseError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{xml} is no VOC annotation ({error}): correct it, or leave its image out") from error


def subset(annotations, fraction, seed):
    """The images of the published low-data rule (DETReg): numpy's choice without replacement from the sorted ids."""
    ids = sorted(image["id"] for image in annotations.images)
    count = round(len(ids) * fraction)
    if not 1 <= count <= len(ids):
        raise ValueError(f"a fraction of {fraction} leaves {count} of {len(ids)} images: give one that leaves some")
    chosen = set(np.random.default_rng(seed).choice(ids, count, replace=False).tolist())
    keep = [i for i, image in enumerate(annotations.images) if image["id"] in chosen]
    images, *columns = ([column[i] for i in keep] for column in annotations[1:7])
    return Annotations(annotations.root, images, *columns, annotations.categories, annotations.bad)


class DetectionBatch(NamedTuple):
    x: torch.Tensor  # (B, 3, H0, W0) uint8
    mask: torch.Tensor  # (B, H0, W0) bool
    boxes: torch.Tensor  # (B, T, 4) (cx, cy, w, h) in [0, 1]
    labels: torch.Tensor  # (B, T) int64
    valid: torch.Tensor  # (B, T) bool: a target, not filling
    index: torch.Tensor  # (B,) int64, place in annotations.images
    size: torch.Tensor  # (B, 2) float32 (w, h) of the original image

    def to(self, device):
        return DetectionBatch(*(field.to(device, non_blocking=True) for field in self))


class DetectionSet(torch.utils.data.Dataset):
    """Items (x (3, h, w) uint8, boxes (t, 4), labels (t,), index, size) by key (epoch, index); crowds are left out.

    Training images are augmented as in DETR (released code): flip; resize, or resize - crop - resize; all sizes scaled
    by resolution / 800, where resolution=800, longest=1333 are DETR's.
    """

    def __init__(self, annotations, train, resolution=800, longest=1333, seed=0):
        self.annotations, self.train, self.resolution, self.seed = annotations, train, resolution, seed
        self.longest = self.scaled(longest)

    def scaled(self, size):
        return max(1, round(size * self.resolution / 800))

    def __len__(self):
        return len(self.annotations.images)

    def __getitem__(self, key):
        epoch, index = key
        path, w, h = (self.annotations.images[index][k] for k in ("path", "width", "height"))
        image = load_image(self.annotations.root / path, (w, h))
        window, size, flip = (0, 0, w, h), resize_size(w, h, self.resolution, self.longest), False
        if self.train:
            window, size, flip = self.draw(w, h, stream(self.seed, epoch, index))
        image, boxes_xyxy = cut_window(image, self.annotations.boxes_xyxy[index], window, size, flip)
        keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(1) & ~self.annotations.crowd[index]
        boxes = box_convert(boxes_xyxy[keep], "xyxy", "cxcywh") / torch.tensor(size * 2)
        return to_tensor(image), boxes, self.annotations.labels[index][keep], index, (w, h)

    def draw(self, w, h, g):
        sides = [self.scaled(side) for side in range(480, 801, 32)]
        return draw_window(w, h, sides, self.longest, self.resolution / 800, g)


def draw_window(w, h, short_sides, longest, factor, g):
    """DETR's training crop: a window (x0, y0, x1, y1) of a w x h image, its (w, h) once resized, and whether to mirror.

    One half of the time the whole image, else a window of 384 to 600 pixels a side of the image resized to 400, 500 or
    600, all times `factor`; then one of `short_sides`, within `longest` (released code of DETR, and of DETReg).
    """
    flip, crop = (torch.rand(2, generator=g) < 0.5).tolist()
    short = short_sides[randint(0, len(short_sides) - 1, g)]
    if not crop:
        return (0, 0, w, h), resize_size(w, h, short, longest), flip

    def scaled(size):
        return max(1, round(size * factor))

    w1, h1 = resize_size(w, h, scaled((400, 500, 600)[randint(0, 2, g)]), math.inf)
    low, high = scaled(384), scaled(600)
    cw, ch = (randint(min(low, side), min(high, side), g) for side in (w1, h1))
    x, y = randint(0, w1 - cw, g), randint(0, h1 - ch, g)
    window = x * w / w1, y * h / h1, min((x + cw) * w / w1, w), min((y + ch) * h / h1, h)  # one resize, not two
    return window, resize_size(cw, ch, short, longest), flip


def cut_window(image, boxes_xyxy, window, size, flip):
    """The window of an image resized to `size` and mirrored, and the boxes with it, clipped to it."""
    x0, y0, x1, y1 = window
    w, h = size
    image = image.resize(size, Image.Resampling.BILINEAR, box=window)
    boxes_xyxy = (boxes_xyxy - torch.tensor([x0, y0, x0, y0])) * torch.tensor([w / (x1 - x0), h / (y1 - y0)] * 2)
    boxes_xyxy = boxes_xyxy.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes_xyxy = boxes_xyxy[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([w, 0, w, 0])
    return image, boxes_xyxy


def collate_detections(items):
    """Items of a DetectionSet -> DetectionBatch, filled up to the largest image and the most boxes (at least one)."""
    images, boxes, labels, index, size = zip(*items, strict=True)
    room = len(items), max(1, *map(len, labels))
    all_boxes, all_labels, valid = torch.zeros(*room, 4), torch.zeros(room).long(), torch.zeros(room).bool()
    for i, t in enumerate(map(len, labels)):
        all_boxes[i, :t], all_labels[i, :t], valid[i, :t] = boxes[i], labels[i], True
    index, size = torch.tensor(index), torch.tensor(size).float()
    return DetectionBatch(*pad_stack(images), all_boxes, all_labels, valid, index, size)


def check(source, split="trainval"):
    """A report on images or labels: counts, sizes, class table, and by name each bad box and each unreadable image."""
    sources, lines = [Path(s) for s in (source if isinstance(source, list | tuple) else [source])], []
    if sources[0].suffix.lower() == ".json" or is_voc(sources[0]):
        found = read_annotations(sources, split, quiet=True)
        files = [(found.root / image["path"], (image["width"], image["height"])) for image in found.images]
        labels, crowd, difficult = (torch.cat(column) for column in (found.labels, found.crowd, found.difficult))
        lines.append(f"{len(labels)} boxes, {crowd.sum()} crowd, {difficult.sum()} difficult, {len(found.bad)} bad")
        lines += found.bad
        lines.append(f"{len(found.categories)} classes:\n{'id':>8} {'images':>7} {'boxes':>7}  name")
        images = torch.cat([row.unique() for row in found.labels])
        for k, (number, name) in enumerate(found.categories):
            lines.append(f"{number:8} {(images == k).sum():7} {(labels == k).sum():7}  {name}")
    else:
        root, paths = list_images(sources[0])
        files = [(root / path, None) for path in paths]
    with ThreadPoolExecutor() as pool:
        sizes = list(tqdm(pool.map(probe, files), total=len(files), disable=None))
    broken = [size for size in sizes if isinstance(size, str)]
    w, h = zip(*([size for size in sizes if not isinstance(size, str)] or [(0, 0)]), strict=True)
    frame = f"width {min(w)} to {max(w)}, height {min(h)} to {max(h)}"
    lines.insert(0, f"{' '.join(map(str, sources))}: {len(files)} images, {frame}; {len(broken)} unreadable")
    return "\n".join([*lines, *broken])


def probe(file):
    """The (w, h) of an image, or the sentence that says why it cannot be read."""
    try:
        return load_image(*file).size
    except ValueError as error:
        return str(error)


def voc2coco(roots, out, split="trainval"):
    """Write the COCO json of VOC roots; `out` must stand in a folder above the images (ValueError)."""
    out = Path(os.path.abspath(out))
    root, table = voc_table(roots, split)
    if not root.is_relative_to(out.parent):
        raise ValueError(f"{out} is not above the images in {root}, as a json must be: write it there")
    for row in table["images"]:
        row |= image_size(root, row)
        row["file_name"] = (root / row["file_name"]).relative_to(out.parent).as_posix()
    out.write_text(json.dumps(table))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check data sets, convert VOC labels, draw the toy set.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "voc2coco", "toy"):
        command = commands.add_parser(name)
        if name != "toy":
            command.add_argument("paths", nargs="+", type=Path, help="VOC roots, or what to check")
            command.add_argument("--split", default="trainval", help="of VOC roots: ImageSets/Main/SPLIT.txt")
        if name != "check":
            command.add_argument("out", type=Path)
        if name == "toy":
            for part, count in (("unlabelled", 600), ("train", 64), ("val", 64)):
                command.add_argument(f"--{part}", type=int, default=count, help=f"scenes (default {count})")
    args = parser.parse_args(argv)
    try:
        if args.command == "toy":
            from toyset import write_toy  # it draws with what stands here

            print(write_toy(args.out, args.unlabelled, args.train, args.val))
        elif args.command == "voc2coco":
            voc2coco(args.paths, args.out, args.split)
        else:
            for source in [args.paths] if all(map(is_voc, args.paths)) else args.paths:
                print(check(source, args.split))
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
