"""What bench/transfer.py compares, and in which order it runs: read STUDY, then `plan`.

All rows of a detector fine-tune with the same seeds, hence the same class head, order of images and augmentation; all
methods pretrain for the same number of steps. Nothing here runs anything.
"""

import hashlib
import re
from typing import NamedTuple


class Arm(NamedTuple):
    """A row of a table: the detector, how it is pretrained (None: not), whether it is then fine-tuned, and on what."""

    model: str
    pre: str | None = None
    tune: bool = True
    fraction: float = 1.0  # of the labelled images; the epochs grow by as much, so that the steps stay
    longer: int = 1  # times the epochs, at the same rate
    rate: str | None = None  # of fine-tuning, instead of the chosen one


# One recipe a method: the regions are those of its paper; --match group where a method asks about regions, because
# nothing uses them otherwise in so few steps (README, Results). 10 regions for 30 queries in all three.
SMALL = "--backbone mobilenet_v2 --hidden-dim 128 --enc-layers 2 --dec-layers 3 --dropout 0 "
CONDITIONAL = SMALL + "--variant conditional --stride 16 --num-queries 30"
MULTI_SCALE = SMALL + "--variant deformable-ms --num-queries 30"
ASKS = "--match group --region-stride 16 "
SIAMESE = ASKS + "--method siamese --region-nms 0.5 --proposals {edgeboxes}"
UPDETR = ASKS + "--method updetr --proposals random"
DETREG = "--method detreg --num-regions 10 --proposals {selective-search}"
METHODS = {"from scratch": None, "UP-DETR": UPDETR, "DETReg": DETREG, "Siamese DETR": SIAMESE}
HUNGARIAN = {  # the same with the paper's matching, and what could explain the difference between them
    **{name: pre and pre.replace("group", "hungarian") for name, pre in METHODS.items()},
    "UP-DETR with EdgeBoxes": UPDETR.replace("group", "hungarian").replace("random", "{edgeboxes}"),
    "DETReg with EdgeBoxes": DETREG.replace("{selective-search}", "{edgeboxes}"),
    "Siamese DETR without feature losses": SIAMESE.replace("group", "hungarian") + " --region-target none --no-global",
}
SCENES = SIAMESE.replace("{edgeboxes}", "{scenes-edgeboxes}") + " --data {scenes}"


def both(name, model, **more):
    return {f"{name}, from scratch": Arm(model, **more), f"{name}, Siamese DETR": Arm(model, SIAMESE, **more)}


STUDY = {  # question: ((pretraining seeds, fine-tuning seeds), {row: Arm}); a run that several rows share is made once
    "1": ((2, 5), {f"Conditional, {name}": Arm(CONDITIONAL, pre) for name, pre in METHODS.items()}),
    "1h": ((2, 3), {f"Hungarian, {name}": Arm(CONDITIONAL, pre) for name, pre in HUNGARIAN.items()}),
    "1r": ((1, 5), {"Conditional, from scratch at 5e-4": Arm(CONDITIONAL, rate="5e-4")}),
    "1l": ((1, 3), both("Conditional, four times as long", CONDITIONAL, longer=4)
           | {"Conditional, four times as long, Siamese DETR with Hungarian matching":
              Arm(CONDITIONAL, HUNGARIAN["Siamese DETR"], longer=4)}),
    "1m": ((2, 3), {f"Deformable-MS, {name}": Arm(MULTI_SCALE, pre) for name, pre in METHODS.items()}
           | {"Deformable-MS, Siamese DETR with Hungarian matching": Arm(MULTI_SCALE, HUNGARIAN["Siamese DETR"])}),
    "1b": ((1, 3), both("Vanilla", CONDITIONAL.replace("conditional", "vanilla"))
           | both("DAB", CONDITIONAL.replace("conditional", "dab"))
           | both("DN", CONDITIONAL.replace("conditional", "dn"))
           | both("100 queries", CONDITIONAL.replace("queries 30", "queries 100"))
           | both("300 queries", CONDITIONAL.replace("queries 30", "queries 300"))
           | both("30 % of the labels", CONDITIONAL, fraction=0.3)
           | both("10 % of the labels", CONDITIONAL, fraction=0.1)),
    "2": ((1, 3), {
        "UP-DETR, single view": Arm(CONDITIONAL, UPDETR),
        "UP-DETR, EdgeBoxes": Arm(CONDITIONAL, UPDETR.replace("random", "{edgeboxes}")),
        "(a) multi-view": Arm(CONDITIONAL, SIAMESE + " --region-target none --no-global"),
        "(b) G": Arm(CONDITIONAL, SIAMESE + " --region-target none"),
        "(c) R-O": Arm(CONDITIONAL, SIAMESE + " --region-target roi --no-global"),
        "(d) R-C": Arm(CONDITIONAL, SIAMESE + " --no-global"),
        "(e) R-C + G": Arm(CONDITIONAL, SIAMESE),
        "random boxes": Arm(CONDITIONAL, SIAMESE.replace("{edgeboxes}", "random")),
        "Selective Search": Arm(CONDITIONAL, SIAMESE.replace("{edgeboxes}", "{selective-search}")),
        "EdgeBoxes": Arm(CONDITIONAL, SIAMESE),
        "scene-centric, random": Arm(CONDITIONAL, SCENES.replace("{scenes-edgeboxes}", "random")),
        "scene-centric, EdgeBoxes": Arm(CONDITIONAL, SCENES)}),
    "5": ((1, 1), {"untrained": Arm(CONDITIONAL, SIAMESE + " --steps 1", tune=False)}),
    "6": ((1, 3), {
        "as it is": Arm(CONDITIONAL, SIAMESE),
        "32 pseudo-classes": Arm(CONDITIONAL, SIAMESE + " --pseudo-classes {classes}"),
        "second round on its own boxes": Arm(CONDITIONAL, SIAMESE.replace("{edgeboxes}", "{own-boxes}")),
        "decoder consistency": Arm(CONDITIONAL, SIAMESE + " --decoder-consistency"),
        "Hungarian matching": Arm(CONDITIONAL, SIAMESE.replace("group", "hungarian"))}),
}  # fmt: skip
NEEDS = {  # what a {name} in the flags stands for: the file or folder, and the command that makes it
    "edgeboxes": ("edgeboxes/meta.json", "proposals.py {data} {out}/edgeboxes --workers {jobs}"),
    "selective-search": ("selective-search/meta.json", "proposals.py {data} {out}/selective-search "
                         "--kind selective-search --draws 2 --workers {jobs}"),
    "classes": ("edgeboxes/classes-32.npy", "proposals.py {data} {out}/edgeboxes --cluster 32 --backbone mobilenet_v2"),
    "scenes-edgeboxes": ("scenes-edgeboxes/meta.json", "proposals.py {scenes} {out}/scenes-edgeboxes --workers {jobs}"),
    "own-boxes": ("own-boxes/meta.json", "finetune.py --export-proposals {out}/own-boxes --predict {data} "
                  "--resolution 192 --init {siamese} --out {out}"),
}  # fmt: skip
PRETRAIN = "--resolution 192 --batch-size 8 --lr 3e-4 --workers 0 --log-every 50"  # float32: the same on any machine
FINETUNE = "--resolution 256 --batch-size 8 --lr-backbone 0 --workers 0 --save-every 5"
RATES = ("1e-4", "3e-4", "5e-4")  # of fine-tuning, tried by --tune; where it was not run see `rate_of`
TUNE_PART, TUNE_LENGTH = 0.8, 0.5  # share of the labelled images that --tune trains on, and of the epochs
MINUTES = {"siamese": 14.0, "updetr": 9.0, "detreg": 8.0, "finetune": 7.5}  # CPU-minutes of 800 steps and 25 epochs of
# 296 images, stated; what finished runs took replaces them
SLOWER = {"deformable-ms": 1.7}


class Run(NamedTuple):
    """One run of a script: `name` is its folder, made of its settings; init: the pretraining it starts from."""

    kind: str  # pretrain, finetune, or rate: a fine-tuning of --tune
    name: str
    flags: str
    arm: Arm
    pre_seed: int
    seed: int
    init: str | None = None
    rate: str | None = None


def plan(args, rates, tune=False):
    """All runs in their order: each row's with the first seeds, then each row's with the next; {run name: rows}.

    A fine-tuning follows its pretraining. For each fine-tuning seed all pretraining seeds come before the next, so that
    a study that is cut off holds all rows equally often.
    """
    runs, rows = {}, {}
    chosen = [(q, row, arm, args.seeds or STUDY[q][0]) for q in args.questions for row, arm in STUDY[q][1].items()
              if any(word in row for word in args.arms)]  # fmt: skip
    if tune:  # rows of one detector, method and share of the labels have one rate
        one = {rate_key(arm): (q, row, arm, (1, 1)) for q, row, arm, _ in reversed(chosen) if arm.tune and not arm.rate}
        chosen = list(reversed(one.values()))
    for seed in range(max([seeds[1] for *_, seeds in chosen], default=0)):
        for pre_seed in range(max(seeds[0] for *_, seeds in chosen)):
            for question, row, arm, seeds in chosen:
                if seed >= seeds[1] or pre_seed >= (seeds[0] if arm.pre else 1):
                    continue
                made = [pretraining(args, arm, pre_seed)] if arm.pre else []
                init = made[0].name if made else None
                tried = RATES if tune else [rate_of(arm, rates)]
                made += [finetuning(args, arm, pre_seed, seed, init, rate, tune) for rate in tried if arm.tune]
                for run in made:
                    runs.setdefault(run.name, run)
                    rows.setdefault(run.name, [])
                    if [question, row] not in rows[run.name]:
                        rows[run.name].append([question, row])
    return list(runs.values()), rows


def method(arm):
    return re.search(r"--method (\S+)", arm.pre)[1] if arm.pre else "scratch"


def rate_key(arm):
    return f"{method(arm)} {arm.model} {arm.fraction}" + (f" {arm.rate}" if arm.rate else "")


def rate_of(arm, rates):
    """The rate that the arm asks for, else its own of --tune, else that of its method on Conditional, else 3e-4."""
    return arm.rate or rates.get(rate_key(arm)) or rates.get(rate_key(Arm(CONDITIONAL, arm.pre)), "3e-4")


def pretraining(args, arm, seed):
    flags = f"--data {{data}} {arm.model} {PRETRAIN} --steps {args.steps} --drop-step {args.steps * 4 // 5} "
    flags += f"--save-every {max(args.steps // 4, 1)} {arm.pre} --seed {seed} {args.extra}"
    photographs = args.scenes if "{scenes}" in flags else args.data
    return Run("pretrain", name_of("pretrain", photographs, flags, arm, seed), flags, arm, seed, seed)


def siamese(args):
    """The pretraining whose boxes "own-boxes" are."""
    return pretraining(args, Arm(CONDITIONAL, SIAMESE), 0)


def finetuning(args, arm, pre_seed, seed, init, rate, tune):
    epochs = round(args.epochs * arm.longer / arm.fraction * (TUNE_LENGTH if tune else 1))
    labels, val = ("{split}/train.json", "{split}/val.json") if tune else ("{labels}", "{val}")
    flags = f"--train {labels} --val {val} {FINETUNE} --lr {rate} --epochs {epochs} --drop-epoch {epochs * 4 // 5} "
    flags += f"--eval-every {max(epochs // 10, 1)} --fraction {arm.fraction} --seed {seed} {args.extra} "
    flags += "" if init else f"{arm.model} --backbone-weights auto"
    kind = "rate" if tune else "finetune"
    name = name_of(kind, f"{init} {args.labels} {args.val}", flags, arm, seed)
    return Run(kind, name, flags, arm, pre_seed, seed, init, rate)


def name_of(kind, inputs, flags, arm, seed):
    """A folder's name: readable, and another for other settings."""
    variant = re.search(r"--variant (\S+)", arm.model)[1]
    digest = hashlib.sha256(f"{inputs} {' '.join(flags.split())}".encode()).hexdigest()[:8]
    return f"{kind}-{variant}-{method(arm)}-{seed}-{digest}"


def length(flags):
    """[epochs, steps] of a run's flags, 0 where it has none; the last one counts."""
    return [int((re.findall(rf"--{name} (\d+)", flags) or [0])[-1]) for name in ("epochs", "steps")]


def stated_minutes(run, images):
    """CPU-minutes that a run will take, judged by its settings; images: how many are labelled."""
    epochs, steps = length(run.flags)
    shorter = steps / 800 if run.kind == "pretrain" else epochs / 25 * run.arm.fraction * images / 296
    variant = re.search(r"--variant (\S+)", run.arm.model)[1]
    return MINUTES[method(run.arm) if run.kind == "pretrain" else "finetune"] * shorter * SLOWER.get(variant, 1)
