"""The whole path on a laptop: drawn scenes, proposals, Siamese pretraining, fine-tuning twice, one table.

    make demo            # or: python -m bench.demo --out runs/demo [--quick]

Runs the project's own commands one after the other, as a user would. Both fine-tunings have the same
recipe, seed and data; only `--init` differs. Interrupted, the same command goes on.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import plots
import runtime
from data import load_image
from proposals import Cache

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["--variant", "conditional", "--backbone", "mobilenet_v2", "--stride", 16, "--hidden-dim", 128,
         "--enc-layers", 2, "--dec-layers", 3, "--num-queries", 30, "--dropout", 0]  # fmt: skip
# R-O targets: the crops of R-C, the default, would take half of the time. Group matching: the README says why.
PRETRAIN = ["--region-stride", 16, "--region-target", "roi", "--match", "group", "--resolution", 192,
            "--batch-size", 8, "--lr", 3e-4, "--workers", 0, "--log-every", 50]  # fmt: skip
TOGETHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", min(os.cpu_count(), 2)]  # torchrun
FINETUNE = ["--resolution", 192, "--batch-size", 8, "--lr", 3e-4, "--lr-backbone", 0, "--workers", 1, "--log-every", 20]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/demo", help="folder for everything (default runs/demo)")
    p.add_argument("--quick", action="store_true", help="a tenth of the work: shows that it runs, not what it does")
    args = p.parse_args(argv)
    out, began = Path(args.out), time.time()
    steps, images, epochs, every = (60, 80, 2, 1) if args.quick else (400, 400, 20, 2)
    amp = ["--amp"] if runtime.bfloat16_pays(torch.device("cpu")) else []
    toy, boxes, pre = out / "toy", out / "proposals", out / "pretrain"

    run("data.py", "toy", toy, "--unlabelled", images)
    run("proposals.py", toy / "unlabelled", boxes, "--workers", 2)
    run(*TOGETHER, "pretrain.py", "--data", toy / "unlabelled", "--proposals", boxes, "--out", pre, "--steps", steps,
        "--save-every", steps // 4, *MODEL, *PRETRAIN, *amp)  # fmt: skip
    checkpoint = sorted(pre.glob("step-*.pt"))[-1]
    finetune = ["--train", toy / "train.json", "--val", toy / "val.json", "--epochs", epochs, "--drop-epoch", epochs,
                "--eval-every", every, *FINETUNE]  # fmt: skip
    arms = {"from scratch": [*MODEL, "--backbone-weights", "auto"], "pretrained": ["--init", checkpoint]}
    both = [start("finetune.py", *finetune, *arms[name], "--out", out / name.replace(" ", "-")) for name in arms]
    try:
        for process in both:
            finish(process)
    finally:  # where one has failed the other saves and ends: the same command starts both again
        for process in both:
            process.terminate()
            process.wait()

    runs = {name: out / name.replace(" ", "-") for name in arms}
    points = {name: [r for r in plots.read_log(folder) if "AP50" in r] for name, folder in runs.items()}
    pictures(out, toy, boxes, pre, runs, points)
    print(table(points))
    print(f"pictures: {', '.join(sorted(str(path) for path in out.glob('*.png')))} and {out / 'detections'}")
    print(f"demo: {(time.time() - began) / 60:.1f} minutes")
    return 0


def start(*words):
    command = [sys.executable, *(str(ROOT / word) if str(word).endswith(".py") else str(word) for word in words)]
    print("$ python", *words, flush=True)
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})  # two processes on two cores


def finish(process):
    if process.wait():
        script = next(word for word in process.args[1:] if word.endswith(".py"))
        sys.exit(f"demo: {Path(script).name} failed with exit code {process.returncode}")


def run(*words):
    finish(start(*words))


def table(points):
    """AP and AP50 of both arms after each evaluated epoch, in percent."""
    arms = [{r["epoch"]: r for r in rows} for rows in points.values()]
    lines = [f"{'':8}" + "".join(f"{name:>16}" for name in points), f"{'epoch':8}" + f"{'AP50':>8}{'AP':>8}" * 2]
    for epoch in sorted(arms[0].keys() & arms[1].keys()):
        lines.append(f"{epoch:<8}" + "".join(f"{100 * r[epoch]['AP50']:8.1f}{100 * r[epoch]['AP']:8.1f}" for r in arms))
    return "\n".join(lines)


def pictures(out, toy, boxes, pre, runs, points):
    """The pair with its regions, proposals, the curves of both phases, AP of both arms and detections, in `out`."""
    cache = Cache(boxes)
    photo = toy / "unlabelled" / cache.paths[0]
    run("views.py", photo, out / "views.png", "--proposals", boxes)
    run("finetune.py", "--predict", toy / "val", "--limit", 6, "--init", runs["pretrained"] / "best.pt",
        "--threshold", 0.2, "--out", out / "detections")  # fmt: skip
    plots.save_proposals(out / "proposals.png", load_image(photo), cache.boxes(0))
    losses, report = ["loss", "l1", "giou", "region", "global"], ["iou_own", "iou_exchanged", "iou_gain", "cos_gain"]
    plots.save_curves(out / "pretrain.png", {"pretrain": pre}, [*losses, *report])
    plots.save_curves(out / "finetune.png", runs, ["loss", "class", "l1", "giou", "AP50", "AP75"])
    plots.save_ap(
        out / "ap.png", {name: [(r["epoch"], r["AP"], r["AP50"]) for r in rows] for name, rows in points.items()}
    )


if __name__ == "__main__":
    sys.exit(main())
