"""Train a detector on labelled images, from scratch or from a pretrained checkpoint, and evaluate it (paper Sec. 4.1).

    python finetune.py --train train.json --val val.json --init runs/pre/step-00300000.pt --epochs 50 --out runs/mine
    python finetune.py --train VOCdevkit/VOC2007 VOCdevkit/VOC2012 --val VOCdevkit/VOC2007 --recipe voc --out runs/voc
    torchrun --nproc-per-node 8 finetune.py ...       # the same flags; batch sizes are totals over all processes
    python finetune.py --eval-only --init runs/voc/best.pt --val val.json --out runs/eval
    python finetune.py --predict photo.jpg FOLDER --init runs/voc/best.pt --out runs/pictures

Read in this order: recipes, flags, train (the loop), backward (one step), what a run starts from, evaluation,
prediction; `load_detector` and `detect` also serve from Python. The same command with the same --out resumes. Boxes are
(cx, cy, w, h) in [0, 1] up to the losses, (x0, y0, x1, y1) pixels of the original image (`_xyxy`) in detections,
[x, y, width, height] in json files.
"""

import argparse
import json
import math
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_convert
from tqdm import tqdm

import convert
import data
import losses
import plots
import proposals
import runtime
from metrics import METRICS, evaluate, table
from model import METHODS, VARIANTS, build_detector, objectness


class Recipe(NamedTuple):
    """A schedule; the flag of the same name overrides an entry."""

    epochs: int
    drop_epoch: int  # both learning rates fall to a tenth
    lr: float  # above the backbone
    lr_backbone: float
    batch_size: int = 32
    fraction: float = 1.0  # of the training images
    slow: float = 1.0  # multiplies lr for Deformable's reference points and sampling offsets


# Paper Sec. 4.1 gives epochs, drop, rates and batch of the first four variants on COCO and VOC. For DAB and DN the
# poster has only AP: they train as Conditional does (ours). VOC 10 % has no schedule either: epochs and drop are
# DETReg's for it (ours). The slow parameters are those of official Deformable DETR.
SINGLE, DEFORMABLE = Recipe(50, 40, 1e-4, 5e-5), Recipe(50, 40, 2e-4, 2e-5, slow=0.1)
VOC = {name: DEFORMABLE if row.decoder == "deformable" else SINGLE for name, row in VARIANTS.items()}
RECIPES = {
    "coco": {**VOC, "vanilla": SINGLE._replace(epochs=150, drop_epoch=120)},
    "voc": VOC,  # Table 2 has vanilla with 150 epochs too; its drop is not given
    "voc10": {variant: row._replace(epochs=200, drop_epoch=150, fraction=0.1) for variant, row in VOC.items()},
}
SHAPE = "variant backbone stride hidden_dim enc_layers dec_layers num_queries pre_norm box_refine".split()  # of a file
RUN_ONLY = """epochs out device workers micro_batch log_every eval_every save_every keep_every
eval_only predict export_proposals threshold save_json""".split()  # may change on resume
EVAL_BATCH = 8  # ours: one for all, since the padding of a batch moves convolution borders, and AP in its fourth digit


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("data").add_argument
    add("--train", nargs="+", metavar="PATH", help="COCO json, or VOC roots such as VOCdevkit/VOC2007 (trainval)")
    add("--val", nargs="+", metavar="PATH", help="the same to evaluate on (VOC: test)")
    add("--fraction", type=float, help="share of the training images to use (default: the recipe's)")
    add("--fraction-seed", type=int, default=0, help="which images these are, by DETReg's rule (default 0)")
    add("--limit", type=int, metavar="N", help="first N images of --train, --val or --predict only, for a quick look")
    add("--overfit", type=int, metavar="N", help="train and evaluate on the first N training images, not augmented")
    add("--resolution", type=int, help="short side, pixels; other sizes follow (default 800; to look: --init's)")
    add("--workers", type=int, default=4, help="loader processes per rank (default 4)")
    add = p.add_argument_group("model (default: as in --init, else the paper's sizes)").add_argument
    add("--init", metavar="FILE", help="checkpoint, ours or public; its class head is kept if the classes are the same")
    add("--variant", choices=VARIANTS, help="default conditional")
    add("--backbone", help="resnet18, 34, 50 (default), 101 or mobilenet_v2")
    add("--backbone-weights", default="random", help="SwAV, torchvision or timm file, auto (MobileNetV2), or random")
    add("--stride", type=int, help="of the map that a single-scale variant reads: 16 or 32 (default)")
    add("--hidden-dim", type=int, help="width C (default 256)")
    add("--enc-layers", type=int, help="default 6")
    add("--dec-layers", type=int, help="default 6")
    add("--num-queries", type=int, help="default 100 for vanilla and conditional, else 300")
    add("--dropout", type=float, help="default 0.1, for dab and dn 0")
    add("--pre-norm", action="store_true", default=None, help="vanilla with norms before the layers, as UP-DETR")
    add("--box-refine", action="store_true", default=None, help="deformable with refined boxes (not in the paper)")
    add = p.add_argument_group("optimisation (default: the recipe's)").add_argument
    add("--recipe", choices=RECIPES, default="coco", help="schedule of Sec. 4.1; other data: --epochs (default coco)")
    add("--epochs", type=int, help="passes over the training images")
    add("--drop-epoch", type=int, help="epoch after which both rates fall to a tenth (default: the recipe's share)")
    add("--batch-size", type=int, help="images per optimiser step, all processes together")
    add("--micro-batch", type=int, help="images per forward and process (default: no accumulation)")
    add("--lr", type=float, help="AdamW's rate above the backbone")
    add("--lr-backbone", type=float, help="0 freezes the backbone; else all but its stem and first stage train")
    add("--weight-decay", type=float, default=1e-4, help="on all parameters (default 1e-4, released code)")
    add("--clip", type=float, default=0.1, help="largest norm of the gradient (default 0.1, released code; 0: any)")
    add = p.add_argument_group("evaluation and prediction").add_argument
    add("--metric", choices=METRICS, default="coco", help="AP as pycocotools (default), or VOC 2007's 11-point AP")
    add("--difficult", choices=["count", "ignore"], default="count", help="VOC: objects like all (default), or not")
    add("--eval-only", action="store_true", help="evaluate --init on --val and write OUT/detections.json")
    add("--predict", nargs="+", metavar="PATH", help="draw what --init detects on these images or folders, into OUT")
    add("--export-proposals", metavar="OUT", help="write --init's boxes on --predict as a cache for pretrain.py")
    add("--threshold", type=float, default=0.5, help="least score of a drawn detection (default 0.5)")
    add("--save-json", metavar="FILE", help="where --eval-only and --predict write their detections")
    add = p.add_argument_group("run").add_argument
    add("--out", default="runs/finetune", help="folder for checkpoints, log.jsonl, pictures (default runs/finetune)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto: cuda if there is one")
    add("--amp", action="store_true", help="bfloat16 autocast of the network; losses stay float32")
    add("--seed", type=int, default=0, help="of class head, order of images, augmentation, dropout (default 0)")
    add("--log-every", type=int, default=50, help="steps (default 50)")
    add("--eval-every", type=int, default=1, help="epochs (default 1); the last epoch is always evaluated")
    add("--save-every", type=int, default=1, help="epochs (default 1), and each evaluation; two and best.pt are kept")
    add("--keep-every", type=int, help="epochs; the weights of these stay as epoch-NNNN.pt")
    args = p.parse_args(argv)
    look = args.eval_only or args.predict
    for a, b in (("eval_only", "predict"), ("eval_only", "overfit"), ("predict", "overfit")):
        if getattr(args, a) and getattr(args, b):
            p.error(f"--{a.replace('_', '-')} and --{b}: give one of them")
    needed = {"init": look, "train": not look, "val": args.eval_only or not (args.predict or args.overfit)}
    needed["predict"] = args.export_proposals
    for name in [name for name, need in needed.items() if need and not getattr(args, name)]:
        p.error(f"--{name} is needed here; see --help")
    if args.export_proposals and args.limit:
        p.error("--limit with --export-proposals: the cache of a part would fit no --data of pretrain.py")
    if args.init and args.backbone_weights != "random":
        p.error(f"--backbone-weights {args.backbone_weights}: --init has the backbone; leave one of them out")
    for name in "workers seed drop_epoch lr lr_backbone weight_decay clip".split():
        if not (getattr(args, name) or 0) >= 0:  # nan neither
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    if args.fraction is not None and not 0 < args.fraction <= 1:
        p.error(f"--fraction {args.fraction}: give a share in (0, 1]")
    counts = "limit overfit epochs batch_size micro_batch log_every eval_every save_every keep_every resolution".split()
    for name in [name for name in counts if getattr(args, name) is not None and getattr(args, name) < 1]:
        p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        for folder in (Path(args.out), Path(args.save_json or args.out).parent):
            folder.mkdir(parents=True, exist_ok=True)
        run = runtime.setup(args.device, args.amp)
        if args.predict or args.eval_only:  # a signal ends these at once: there is nothing to save
            if args.predict and run.world > 1:
                raise ValueError("--predict and --export-proposals run in one process: leave torchrun out")
            look = export_proposals if args.export_proposals else predict
            return look(args, run) if args.predict else evaluate_file(args, run)
        with runtime.stop_on_signals() as stop:
            return train(args, run, stop)
    except (ValueError, OSError, RuntimeError) as error:
        return runtime.failed("finetune.py", error)
    finally:
        runtime.close()


def train(args, run, stop):
    """The run from its first to its last step; returns the exit code."""
    # --- data and model
    found = runtime.latest_checkpoint(args.out, "train")
    source = found[0] if found else args.init
    build = resolve(args, source)
    labels = labelled(args, args.train, "trainval")
    train_set = data.DetectionSet(labels, not args.overfit, args.resolution, seed=args.seed)
    classes = [list(c) for c in labels.categories]
    seen = labels if args.overfit else evaluated(args, classes)
    val = data.DetectionSet(seen, False, args.resolution)
    both = {labels.root / image["path"] for image in labels.images} & {
        seen.root / image["path"] for image in seen.images
    }
    if both and not args.overfit and run.rank == 0:
        print(f"{len(both)} photographs are in --train and in --val: AP says little about unseen ones", file=sys.stderr)
    torch.manual_seed(args.seed)
    detector = open_detector(args, run, build, classes, source, resume=bool(found))
    optimizer = torch.optim.AdamW(parameter_groups(detector, args), weight_decay=args.weight_decay, fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = {"class": detector.row.weight_class, "l1": 5.0, "giou": 2.0}  # the official repositories
    weights |= {f"dn_{k}": w for k, w in weights.items()} if detector.row.denoise else {}

    # --- schedule: an epoch ends with the step that takes its last image; several with one step, if images are few
    n, batch_size, epochs_at = len(train_set), args.batch_size, defaultdict(list)
    for epoch in range(1, args.epochs + 1):
        epochs_at[math.ceil(epoch * n / batch_size)].append(epoch)
    steps, drop_step = max(epochs_at), math.ceil(args.drop_epoch * n / batch_size)

    # --- resume
    settings, start, best = {**vars(args), "classes": classes}, 0, -math.inf
    for name, part in (("train", labels), ("val", seen)):
        paths = [image["path"] for image in part.images]
        settings[f"images and labels of --{name}"] = data.fingerprint(paths, part.boxes_xyxy, part.labels)
    if found:
        saved = found[1]
        runtime.check_settings(saved["settings"], settings, RUN_ONLY)
        optimizer.load_state_dict(saved["optimizer"])
        start, best = saved["step"], saved["best"]
    log, out = runtime.Log(args.out, run.rank, start), Path(args.out)
    rows = plots.read_log(out) if run.rank == 0 else []
    ap = [float(row["AP"]) for row in rows if row.get("step") == start and "AP" in row]
    best, looked = max([best, *ap]), bool(runtime.sum_over_ranks(torch.tensor(len(ap))))
    if start > steps or (start == steps and looked):
        also = f"raise --epochs, with --drop-epoch {args.drop_epoch} as it was"
        print(f"{args.out} is finished, {start} of {steps} steps: {also}, or choose another --out")
        return 0
    if start == 0:
        log.write(step=0, settings=settings, images=n, val_images=len(val), steps=steps,
                  parameters=sum(p.numel() for p in parameters), commit=runtime.commit())  # fmt: skip

    def state(**more):
        meta = {"variant": args.variant, "build": detector.settings, "classes": classes, "resolution": args.resolution}
        return {"model": detector.state_dict(), "step": done, "settings": settings, "meta": meta, **more}

    def ends(step, every):
        """The last epoch that ends with `step` and is a multiple of `every`, else 0."""
        return max((epoch for epoch in epochs_at.get(step, ()) if every and epoch % every == 0), default=0)

    def due(step):
        return step == steps or ends(step, args.eval_every)

    def validate():
        """AP of --val after step `done`, and best.pt -> on rank 0 all numbers and a table by class; else None."""
        nonlocal best
        results = detect_all(detector, val, classes, run, args)
        if run.rank == 0:
            found, per_class = evaluate(val.annotations, results, args.metric, args.difficult)
            if found["AP"] > best:
                best = found["AP"]
                runtime.write_checkpoint(out / "best.pt", state())
            log.write(step=done, epoch=epochs_at[done][-1], **found)  # the last thing: a run that lacks it looks again
            return found, per_class
        return None

    # --- the loop
    net = DistributedDataParallel(detector, broadcast_buffers=False) if run.world > 1 else detector
    sampler = runtime.StepSampler(n, batch_size, args.micro_batch, run.rank, run.world, args.seed, start, steps)
    loader = iter(runtime.make_loader(train_set, sampler, data.collate_detections, args.workers, run.device))
    window, done = [], start  # of one log line; steps done
    metrics = validate() if due(start) and not looked else None
    for step in tqdm(range(start, steps), "finetune", initial=start, total=steps, disable=run.rank > 0):
        began = time.time()
        runtime.seed_step(args.seed, step, run.rank)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (0.1 if step >= drop_step else 1.0)  # a tenth: released code
        batches = [next(loader).to(run.device) for _ in range(sampler.accumulate)]
        optimizer.zero_grad(set_to_none=True)
        terms = backward(net, detector.row, batches, weights, run, args.amp)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)  # released code
        loss = sum(weights[k] * v for k, v in terms.items())
        if not norm.isfinite():
            rows = runtime.gather_rows(torch.cat([batch.index for batch in batches])).tolist()
            paths = [train_set.annotations.images[i]["path"] for i in rows]
            saved = state(optimizer=optimizer.state_dict(), best=best)
            rate = optimizer.param_groups[0]["lr"]
            runtime.stop_not_finite(out, log, step, saved, rate, {"loss": loss, **terms}, paths)
        optimizer.step()

        done, asked = step + 1, stop()
        window.append({"loss": loss, **terms, "grad_norm": norm, "seconds": time.time() - began})
        if done % args.log_every == 0 or done == steps:  # the only wait for the device besides matching and the norm
            values = runtime.mean_over_ranks({k: sum(row[k] for row in window) / len(window) for k in window[0]})
            values |= {"lr": optimizer.param_groups[0]["lr"], "images_per_s": batch_size / values.pop("seconds")}
            log.write(step=done, epoch=done * batch_size / n, **values)
            window.clear()
        if (epoch := ends(done, args.keep_every)) and run.rank == 0:
            runtime.write_checkpoint(out / f"epoch-{epoch:04d}.pt", state())
        if due(done) or ends(done, args.save_every) or asked:  # before an evaluation, which may be killed
            runtime.save_checkpoint(out, done, state(optimizer=optimizer.state_dict(), best=best))
        if asked:
            print(f"stopped by a signal after step {done}, state saved; the same command goes on")
            return runtime.STOPPED
        if due(done):
            metrics = validate()
    if run.rank == 0:
        print(table(*metrics))
        plots.save_curves(out / "curves.png", {out.name: plots.read_log(out)}, ["loss", *weights, "AP", "AP50"])
    return 0


def backward(net, row, batches, weights, run, amp=False):
    """Forward and backward of a step's micro-batches -> {term: scalar, layers and micro-batches joined}, no gradient.

    The gradient left in `net` is that of the mean over all images of the step, whatever their split over ranks and
    micro-batches: all their targets are counted first and give the normalisers.
    """
    per_image = torch.cat([batch.valid.sum(1) for batch in batches])
    counts = runtime.sum_over_ranks(torch.stack([per_image.sum(), per_image.clamp(max=row.num_queries).sum()]))
    num_boxes, num_matched = torch.stack([counts[0].clamp(min=1), counts[1]]) / (run.world * len(batches))
    parts = []
    net.train()
    for i, batch in enumerate(batches):
        net.require_backward_grad_sync = i + 1 == len(batches)  # ranks add up their gradients once (read by DDP)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=amp):
            pred = net(data.normalise(batch.x, batch.mask), batch.mask, batch.labels, batch.boxes, batch.valid)
        terms = detector_losses(pred, batch, row, num_boxes, num_matched)
        (sum(weights[k] * v for k, v in terms.items()) / len(batches)).backward()
        parts.append({name: value.detach() for name, value in terms.items()})
    return {name: sum(part[name] for part in parts) / len(parts) for name in weights}


def detector_losses(pred, batch, row, num_boxes, num_matched):
    """{"class", "l1", "giou"} of the matched queries, layers summed, no weights; for DN also of its noisy queries.

    All terms are divided by num_boxes, but for vanilla's weighted mean over the queries of which num_matched weigh 1:
    another number where an image has more targets than there are queries, or no image has any.
    """
    logits, target, softmax = pred.logits, (batch.labels, batch.boxes), row.softmax
    match = losses.match(logits, pred.boxes, *target, batch.valid, softmax=softmax, cost_class=row.cost_class)
    count = num_matched if softmax else num_boxes
    terms = {"class": losses.class_loss(logits, match, batch.labels, softmax=softmax, num_boxes=count)}
    terms["l1"], terms["giou"] = losses.box_losses(pred.boxes, batch.boxes, match, num_boxes)
    if pred.dn is not None:
        copies = pred.dn.valid.shape[1] // batch.valid.shape[1]  # of each target
        terms |= losses.denoising_losses(*pred.dn, num_boxes * copies)
    return {name: value.sum() for name, value in terms.items()}


def parameter_groups(detector, args):
    """What trains, by learning rate: the backbone, the slow parameters, and all else (the first group)."""
    rates = [args.lr, args.lr_backbone, args.lr * args.slow]
    groups = [{"params": [], "lr": rate, "base_lr": rate} for rate in rates]
    for name, parameter in detector.named_parameters():
        kind = 1 if name.startswith("backbone.") else 2 * ("reference_points" in name or "sampling_offsets" in name)
        groups[kind]["params"] += [parameter] if parameter.requires_grad else []
    return [group for group in groups if group["params"]]


def resolve(args, source):
    """Fill in `args` from the recipe -> build_detector's settings, from the checkpoint `source` (or None) and flags."""
    build = describe(source, args)[0] if source else {}
    given = {key: getattr(args, key) for key in (*SHAPE, "dropout") if getattr(args, key) is not None}
    build = {"variant": "conditional", **build, **given}
    recipe = RECIPES[args.recipe][build["variant"]]._asdict()
    if args.epochs and args.drop_epoch is None:
        args.drop_epoch = round(args.epochs * recipe["drop_epoch"] / recipe["epochs"])
    for key, value in {"resolution": 800, "variant": build["variant"], **recipe}.items():  # 800: released code, DETR's
        setattr(args, key, value if getattr(args, key, None) is None else getattr(args, key))
    return build


def describe(path, args=None):
    """What a checkpoint, ours or public, says of itself -> (build settings, classes or None, resolution or None).

    Classes are [[category id, name], ...]. Raises ValueError for a flag in `args` that contradicts the checkpoint.
    """
    _, state, _, meta = convert.read_native(path)
    build, classes = convert.detect_settings(state) | meta.get("build", {}), meta.get("classes")
    if not build.get("dec_layers"):
        raise ValueError(f"{path} holds only a backbone: pass it as --backbone-weights")
    for key in SHAPE:
        flag, name = getattr(args, key, None), f"--{key.replace('_', '-')}"
        if flag is not None and build.get(key, flag) != flag:
            raise ValueError(f"{name} {flag} contradicts {path}, which has {build[key]}: leave {name} out")
    head = next((t for name, t in state.items() if name.startswith("class_embed.") and t.dim() == 2), None)
    if classes is None and head is not None:  # an official detector: its columns are category ids, without names
        classes = [[k, str(k)] for k in range(len(head) - VARIANTS[build["variant"]].softmax)]
    return build, classes, meta.get("resolution")


def open_detector(args, run, build, classes, source, resume):
    """The detector to train, on the device, with the weights of `source` or else with those of its backbone alone."""
    detector = build_detector(**build | {"num_classes": len(classes)})
    lines = ["the network starts from random weights; --backbone-weights gives it a trained backbone"]
    if source:
        lines = convert.load_detector(detector, source, classes=classes, reset=() if resume else convert.HEADS)
    elif args.backbone_weights != "random":
        lines = convert.load_backbone(detector, args.backbone_weights)
    if run.rank == 0:
        print("\n".join(lines))
    vars(args).update({key: detector.settings[key] for key in (*SHAPE, "dropout")})
    detector.to(run.device).freeze_backbone(args.lr_backbone == 0)
    detector.fold_backbone(torch.bfloat16 if args.amp else torch.float32, trains=args.lr_backbone > 0)
    return detector


def labelled(args, paths, split):
    """The annotations of --train or --val, cut down as --fraction (of --train), --limit and --overfit say."""
    found, n = data.read_annotations(paths, split), args.overfit or args.limit
    if split == "trainval" and args.fraction < 1:
        found = data.subset(found, args.fraction, args.fraction_seed)
    return data.Annotations(found.root, *(column[:n] for column in found[1:7]), *found[7:])


def evaluated(args, classes):
    """The annotations of --val; ValueError unless each of its categories is a class of the detector: same id and, where
    known, same name. VOC has names alone, and takes the detector's ids.
    """
    found, number = labelled(args, args.val, "test"), {name: k for k, name in classes}
    if all(data.is_voc(Path(path)) for path in args.val):  # which lists all 20 classes of VOC, whichever it has
        used = set(torch.cat(found.labels).tolist())
        kept = [k for k, (_, name) in enumerate(found.categories) if name in number or k in used]
        place = torch.tensor([k in kept for k in range(len(found.categories))]).cumsum(0) - 1  # among those kept
        names = [found.categories[k][1] for k in kept]
        categories = [(number.get(name, name), name) for name in names]
        found = found._replace(labels=[place[x] for x in found.labels], categories=categories)
    for k, name in found.categories:
        if dict(map(tuple, classes)).get(k) not in (name, str(k)):
            have = convert.few([f"{k} ({v})" for k, v in classes])
            remedy = f"number it {number[name]} there" if name in number else "leave it out there"
            raise ValueError(f"category {k} ({name}) of --val is no class of the detector, which has {have}: {remedy}")
    return found


def evaluate_file(args, run):
    """--eval-only: the numbers of --metric and AP per class of --init on --val, and the detections as COCO results."""
    detector, _ = load_detector(args.init, args)
    detector.to(run.device).fold_backbone(torch.bfloat16 if args.amp else torch.float32)
    val = data.DetectionSet(evaluated(args, detector.classes), False, args.resolution or detector.resolution)
    results = detect_all(detector, val, detector.classes, run, args)
    if run.rank == 0:
        path = Path(args.save_json or Path(args.out) / "detections.json")
        path.write_text(json.dumps(results))
        numbers = table(*evaluate(val.annotations, results, args.metric, args.difficult))
        print(f"{numbers}\n{len(results)} detections on {len(val)} images: {path}")
    return 0


@torch.no_grad()
def detect_all(detector, dataset, classes, run, args):
    """COCO results of a whole data set, each image once over all ranks; the same list on each rank, ordered by image.

    A result: image_id and category_id of the json, bbox [x, y, w, h] in pixels of the original image, score.
    """
    detector.eval()
    keys = runtime.each_once(len(dataset), EVAL_BATCH, run.rank, run.world)
    loader = runtime.make_loader(dataset, keys, data.collate_detections, args.workers, run.device)
    rows = [torch.zeros(0, 7, dtype=torch.float64)]
    for batch in tqdm(loader, "evaluate", leave=False, disable=run.rank > 0):
        batch = batch.to(run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
            pred = detector(data.normalise(batch.x, batch.mask), batch.mask)
        for i, (scores, labels, boxes_xyxy) in zip(batch.index, detector.top_boxes(pred, batch.size), strict=True):
            columns = i.expand_as(labels), labels, scores, *boxes_xyxy.unbind(1)
            rows.append(torch.stack([c.double() for c in columns], 1).cpu())
    rows, images = runtime.gather_rows(torch.cat(rows)), dataset.annotations.images
    rows = rows[rows[:, 0].argsort(stable=True)].tolist()
    return [{"image_id": images[int(i)]["id"], "category_id": classes[int(k)][0], "score": score,
             "bbox": [x0, y0, x1 - x0, y1 - y0]} for i, k, score, x0, y0, x1, y1 in rows]  # fmt: skip


def predict(args, run):
    """--predict: a picture of each image with what is detected in it, and with --save-json a list of all that."""
    detector, classes = load_detector(args.init, args)
    detector.to(run.device).resolution = args.resolution or detector.resolution
    detector.fold_backbone(torch.bfloat16 if args.amp else torch.float32)
    paths = [str(images.root / name) for images in map(data.list_images, args.predict) for name in images.paths]
    found, skipped, out = [], [], Path(args.out)
    for i, path in enumerate(tqdm(paths[: args.limit], "predict")):
        try:
            image = data.load_image(path)
        except ValueError as error:
            skipped.append(str(error))
            continue
        with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
            detections = detect(detector, classes, image, args.threshold)
        labels, scores, boxes_xyxy = ([row[k] for row in detections] for k in range(3))
        picture = out / f"{i:04d}-{Path(path).stem}.png"
        plots.save_detections(picture, image, boxes_xyxy, labels, scores, args.threshold, classes)
        found += [{"file_name": path, "category": name, "score": score, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                  for name, score, (x0, y0, x1, y1) in detections]  # fmt: skip
    if args.save_json:
        Path(args.save_json).write_text(json.dumps(found))
    shown = i + 1 - len(skipped)
    print(f"{len(found)} detections of score {args.threshold} or more on {shown} images; pictures: {out}")
    print("".join(f"skipped: {line}\n" for line in skipped), end="", file=sys.stderr)
    return 1 if skipped else 0


@torch.no_grad()
def export_proposals(args, run):
    """--export-proposals: boxes that --init is sure of, whatever their class, for a round of self-training (SimDETR).

    A fine-tuned detector's or a pretrained one's; the latter was always told a region and, but for DETReg's, may know
    little without one.
    """
    if len(args.predict) > 1:
        raise ValueError("--export-proposals writes the cache of one folder, list file or json: give one to --predict")
    detector, method = load_pretrained(args.init)
    if detector is None:
        detector, _ = load_detector(args.init, args)
    detector.eval().to(run.device).resolution = args.resolution or detector.resolution
    detector.fold_backbone(torch.bfloat16 if args.amp else torch.float32)
    softmax, first = detector.row.softmax or bool(method and method.softmax), method.first if method else 0
    images = data.list_images(args.predict[0])

    def boxes():
        for path in tqdm(images.paths, "propose", unit="image"):
            try:
                image = proposals.open_image(images.root / path)
            except ValueError as error:
                yield str(error.__cause__ or error)
                continue
            with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
                pred, size = look_at(detector, image), torch.tensor(image.size * 2)
            score = objectness(pred.logits[-1, 0], softmax, first)
            order = score.argsort(descending=True)
            boxes_xyxy = box_convert(pred.boxes[-1, 0].float().cpu(), "cxcywh", "xyxy").clamp(0, 1) * size
            yield image.size, boxes_xyxy[order.cpu()].numpy(), score[order].cpu().numpy()

    cache = proposals.write_boxes(args.predict[0], args.export_proposals, images, boxes())
    boxes, rejected = cache.meta["boxes"], len(cache.meta["rejected"])
    print(f"{cache.path} is complete: {boxes} boxes on {len(cache)} images; give it to --proposals")
    if rejected:
        print(f"{rejected} images were rejected: {cache.path / 'meta.json'} says which, and why", file=sys.stderr)
    return 0


def load_detector(path, args=None):
    """A fine-tuned checkpoint or an official one -> (detector in evaluation mode, class names), for `detect`.

    The detector carries .classes, its [[category id, name], ...], and .resolution, the short side it was trained at.
    """
    build, classes, resolution = describe(path, args)
    if classes is None:
        raise ValueError(f"{path} comes from pretraining and has no class head: fine-tune it first")
    detector = build_detector(**build | {"num_classes": len(classes)})
    convert.load_detector(detector, path, reset=())
    detector.classes, detector.resolution = classes, resolution or 800
    return detector.eval(), [name for _, name in classes]


def load_pretrained(path):
    """A checkpoint of pretrain.py -> (detector with the pretext task's head, its method's class), else (None, None)."""
    tensors, meta = convert.read_weights(Path(path))
    outputs = {len(v) for name, v in tensors.items() if re.fullmatch(r"class_embed\.(\d+\.)?bias", name)}
    method = METHODS.get(meta.get("method")) if outputs and not meta.get("classes") else None
    if not method:
        return None, None
    detector = build_detector(**meta["build"])
    detector.pretext_heads(*outputs)
    detector.load_state_dict(tensors)
    detector.resolution = 800
    return detector.eval(), method


@torch.no_grad()
def detect(detector, classes, image, threshold=0.5):
    """Objects of an image (path or PIL image), best first: [(class name, score, (x0, y0, x1, y1) in its pixels)]."""
    image = data.to_rgb(image) if hasattr(image, "convert") else data.load_image(image)
    pred = look_at(detector, image)
    ((scores, labels, boxes_xyxy),) = detector.top_boxes(pred, torch.tensor([image.size]))
    rows = zip(labels.tolist(), scores.tolist(), boxes_xyxy.tolist(), strict=True)
    return [(classes[label], score, tuple(box)) for label, score, box in rows if score >= threshold]


def look_at(detector, image):
    """Prediction of a PIL image at the detector's resolution."""
    size = data.resize_size(*image.size, detector.resolution)
    small, _ = data.cut_window(image, torch.zeros(0, 4), (0, 0, *image.size), size, flip=False)
    x, mask = (t.to(next(detector.parameters()).device) for t in data.pad_stack([data.to_tensor(small)]))
    return detector(data.normalise(x, mask), mask)


if __name__ == "__main__":
    sys.exit(main())
