"""How fast the loader makes samples, against the released order of operations in PIL, and proposals.py its boxes.

`Released` is the released pipeline on our draws: the whole photograph resized, views and crops cut from it and their
colours changed by PIL and torchvision, ToTensor and Normalize, image by image, in the worker.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as tv
from matplotlib.cbook import get_sample_data
from numpy.lib.format import open_memmap
from PIL import Image, ImageFilter

import proposals
from bench.timing import paired, ratios, record
from colour import draw_colour
from data import MEAN, STD, ImageList, list_images, load_image, normalise, resize_size
from views import (
    UNIT,
    ViewDataset,
    choose_regions,
    clip,
    collate_views,
    jitter_boxes,
    map_boxes,
    row,
    two_rectangles,
    uniform,
)

IMAGENET = 1_281_167  # photographs
BILINEAR = Image.Resampling.BILINEAR


class Released(ViewDataset):
    """The same samples made in the released order: normalised float32 x and crops, boxes bit for bit as ours."""

    once = False  # resize once from photograph to view, as ours does: sharper

    def two_views(self, image, proposals, g):
        base = resize_size(*image.size, self.short_sides[int(uniform(g, 0, len(self.short_sides)))], self.longest)
        flip = uniform(g) < 0.5
        outer, *rects = two_rectangles(*base, self.tau, g)
        overlap = clip(row(*rects[0]), rects[1])[0].tolist()
        proposals = map_boxes(proposals, (0, 0, *image.size), (0, 0, *base))
        image = image if self.once else image.resize(base, BILINEAR)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            proposals = map_boxes(proposals, (0, 0, *base), (base[0], 0, 0, base[1]))[:, [2, 1, 0, 3]]
        regions, rows = choose_regions(proposals, overlap, self.num_regions, g, self.region_nms)
        boxes = torch.stack([map_boxes(regions, rect, UNIT) for rect in rects])
        rois = jitter_boxes(boxes, self.jitter, g, UNIT)
        size = outer[2] - outer[0], outer[3] - outer[1]
        frame = (0, 0, *image.size)
        places = [map_boxes(row(*rect), (0, 0, *base), frame)[0].tolist() for rect in rects] if self.once else rects
        views = [image.resize(size, BILINEAR, place) if self.once else image.crop(place).resize(size, BILINEAR)
                 for place in places]  # fmt: skip
        places = map_boxes(boxes, UNIT, (0, 0, *size)).tolist()  # the released code rounds them to whole pixels
        side = (self.crop_size, self.crop_size)
        crops = [view.resize(side, BILINEAR, box) for view, b in zip(views, places, strict=True) for box in b]
        return views, boxes, rois, rows, crops

    def stack(self, images, g):
        colours = draw_colour(g, len(images)).tolist()
        images = [tv.to_tensor(pil_colour(*pair)) for pair in zip(images, colours, strict=True)]
        return torch.stack([tv.normalize(x, MEAN.flatten().tolist(), STD.flatten().tolist()) for x in images]), None


def pil_colour(image, colour):
    """Apply a row of `draw_colour` to a PIL image by torchvision, as the released code does."""
    jitter, brightness, contrast, saturation, hue, *order, gray, sigma = colour
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for step in order if jitter else ():
        image = steps[int(step)](image, (brightness, contrast, saturation, hue)[int(step)])
    image = tv.rgb_to_grayscale(image, 3) if gray else image
    return image.filter(ImageFilter.GaussianBlur(sigma)) if sigma else image


def collate_released(items):
    """Normalised views padded with 0 to the largest -> x (V, B, 3, H0, W0), mask, boxes, crops."""
    height, width = (max(item.x.shape[axis] for item in items) for axis in (2, 3))
    x = torch.zeros(2, len(items), 3, height, width)
    mask = torch.ones(2, len(items), height, width, dtype=torch.bool)
    for b, item in enumerate(items):
        x[:, b, :, : item.x.shape[2], : item.x.shape[3]] = item.x
        mask[:, b, : item.x.shape[2], : item.x.shape[3]] = False
    return x, mask, torch.stack([item.boxes for item in items], 1), torch.stack([item.crops for item in items], 1)


def add_data_flags(command, images=16):
    command.add_argument("--data", help="photographs (default: the portrait that comes with matplotlib)")
    command.add_argument("--images", type=int, default=images, help=f"how many of them (default {images})")


def photographs(args):
    portrait = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    images = list_images(args.data) if args.data else ImageList(portrait.parent, [portrait.name])
    chosen = np.linspace(0, len(images.paths) - 1, args.images).round().astype(int)
    return images._replace(paths=[images.paths[i] for i in chosen])


def data(args):
    """Samples per second and core, batches of 4 and the collate function included, and the pixels' mean difference."""
    images = photographs(args)
    ours, released = ViewDataset(images), Released(images)
    later = ViewDataset(images, augment_on="device")
    lists = [range(i, min(i + 4, args.images)) for i in range(0, args.images, 4)]

    def run(dataset, collate, after=lambda batch: batch):
        return lambda: [after(collate([dataset[0, i] for i in batch])) for batch in lists]

    contestants = {
        "ours": run(ours, collate_views),
        "ours, normalised": run(ours, collate_views, lambda b: (normalise(b.x, b.mask), normalise(b.crops))),
        "ours, colours left to the device": run(later, collate_views),
        "released": run(released, collate_released),
    }
    times = paired(contestants, args.rounds, args.threads)
    rate = {name: round(args.images / statistics.median(t), 1) for name, t in times.items()}
    ratio = {name: ratios(times["released"], t) for name, t in times.items() if name != "released"}
    difference = {"released": grey_levels(ours, released)}
    released.once = True
    difference["one resize"] = grey_levels(ours, released)
    record(dict(bench="data", data=args.data, images=args.images, rounds=args.rounds, samples_per_s=rate,
                released_over=ratio, grey_levels=difference))  # fmt: skip
    for name, (median, low, high) in ratio.items():
        print(f"{name}: {rate[name]} samples/s, {median} times the released order ({low} to {high})")
    print(f"released: {rate['released']} samples/s; one process, {args.threads} thread(s), {args.images} photographs")
    print("boxes equal; grey levels of 255 that pixels differ by, mean over photographs (worst):")
    for order, found in difference.items():
        print(f"    {order} by PIL: " + ", ".join(f"{name} {mean} ({worst})" for name, (mean, worst) in found.items()))


def grey_levels(ours, released):
    """{views, crops: (mean over photographs, worst)} of the mean difference of the pixels; boxes must be equal."""
    difference = {"views": [], "crops": []}
    for i in range(len(ours)):
        a, b = ours[1, i], released[1, i]
        if not (torch.equal(a.boxes, b.boxes) and torch.equal(a.rois, b.rois)):
            raise ValueError(f"{ours.images.paths[i]}: the boxes of the two pipelines differ")
        for name, pair in {"views": (a.x, b.x), "crops": (a.crops, b.crops)}.items():
            difference[name].append(((normalise(pair[0]) - pair[1]).abs() * STD * 255).mean().item())
    return {name: (round(statistics.mean(d), 2), round(max(d), 2)) for name, d in difference.items()}


def add_proposal_flags(command):
    add_data_flags(command, images=60)
    command.add_argument(
        "--entries", type=int, default=IMAGENET, help="images of the synthetic cache (default 1281167)"
    )


def boxes(args):
    """Boxes per second and core by kind and --workers, what ImageNet would take, and a training process's start."""
    images = photographs(args)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "list.txt"
        source.write_text("".join(f"{i}{Path(path).suffix}\n" for i, path in enumerate(images.paths)))
        for i, path in enumerate(images.paths):
            (source.parent / f"{i}{Path(path).suffix}").symlink_to((images.root / path).absolute())
        start = [written(source, Path(folder) / f"start-{workers}", "random", workers) for workers in (1, 2)]
        for kind in ("edgeboxes", "selective-search"):
            clock = time.process_time()
            for i, path in enumerate(images.paths):
                proposals.propose(load_image(images.root / path), [], i, **(proposals.DEFAULTS | {"kind": kind}))
            each = (time.process_time() - clock) / args.images
            runs = [written(source, Path(folder) / f"{kind}-{workers}", kind, workers) for workers in (1, 2)]
            seconds, empty = ([round(run[0], 2) for run in pair] for pair in (runs, start))
            cpu = [round(a[1] - b[1], 2) for a, b in zip(runs, start, strict=True)]
            entry = {"images_per_s": round(1 / each, 2), "imagenet_core_hours": round(each * IMAGENET / 3600)}
            entry |= {"bytes_per_image": round(runs[0][2] / args.images), "s_by_workers": seconds, "s_start": empty}
            entry |= {"cpu_s_by_workers": cpu, "images": args.images, "data": args.data}
            record({"bench": "proposals", "kind": kind, **entry})
            print(f"{kind}: {entry['images_per_s']} images/s/core, {entry['bytes_per_image']} bytes an image, ", end="")
            print(f"{entry['imagenet_core_hours']} core hours for ImageNet")
            print(f"    with 1 and 2 workers {seconds} s, {empty} s of it to start, {cpu} s of CPU time besides that")
        entry = {"bench": "cache start", "images": args.entries, **start_up(Path(folder) / "synthetic", args.entries)}
    record(entry)
    print(
        f"cache of {args.entries} images: open in {entry['open_s']} s, paths of all in {entry['paths_s']} s, "
        f"{entry['resident_mb']} MB more resident, {entry['peak_mb']} MB at its peak"
    )


def written(source, out, kind, workers):
    """Write a cache in a process of its own -> seconds, CPU seconds, bytes."""
    command = [sys.executable, "proposals.py", str(source), str(out), "--kind", kind, "--workers", str(workers)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


START = """
import json, sys, time
import proposals
def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
now, peak, clock = resident("VmRSS"), resident("VmHWM"), time.perf_counter()
cache = proposals.Cache(sys.argv[1])
cache.boxes(len(cache) // 2)
opened = time.perf_counter() - clock
cache.paths[len(cache) // 2]
done = time.perf_counter() - clock - opened
more = {"resident_mb": resident("VmRSS") - now, "peak_mb": resident("VmHWM") - max(now, peak)}
print(json.dumps({"open_s": round(opened, 3), "paths_s": round(done, 2)} | {k: round(v) for k, v in more.items()}))
"""


def start_up(out, n, each=500):
    """Time and memory that a fresh process takes to open a cache of n images with `each` boxes, zeros but for one."""
    out.mkdir()
    array = open_memmap(out / "boxes.npy", "w+", np.int16, (n * each, 4))  # a sparse file
    array[n // 2 * each : (n // 2 + 1) * each] = 0, 0, 500, 375
    open_memmap(out / "scores.npy", "w+", np.float32, (n * each,))
    np.save(out / "offsets.npy", np.arange(n + 1) * each)
    np.save(out / "sizes.npy", np.full((n, 2), (500, 375), np.int32))
    proposals.write_json(out / "plan.json", proposals.DEFAULTS | {"version": 1, "shards": 1})
    proposals.write_json(out / "list.json", [f"n{i // 1300:08}/n{i // 1300:08}_{i % 1300}.JPEG" for i in range(n)])
    proposals.write_json(out / "meta.json", {"root": ".", "boxes": n * each, "rejected": []})
    command = [sys.executable, "-c", START, str(out)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return json.loads(answer.stdout)
