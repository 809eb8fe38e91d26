"""The whole path on a laptop: drawn scenes, proposals, Siamese pretraining, fine-tuning twice, one table.

    make demo            # or: python -m bench.demo --out runs/demo [--quick]

Runs the project's own commands one after the other, as a user would; nothing is imported but the pictures. Both
fine-tunings have the same recipe, seed and data; only `--init` differs. Interrupted, the same command goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import plots

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["--variant", "conditional", "--backbone", "mobilenet_v2", "--stride", 16, "--hidden-dim", 128,
         "--enc-layers", 2, "--dec-layers", 3, "--num-queries", 30, "--dropout", 0]  # fmt: skip
PRETRAIN = ["--region-stride", 16, "--region-target", "crop", "--match", "group", "--resolution", 192,
            "--batch-size", 8, "--lr", 3e-4, "--workers", 1, "--amp", "--log-every", 50]  # fmt: skip
FINETUNE = ["--backbone-weights", "auto", "--resolution", 192, "--batch-size", 8, "--lr", 3e-4, "--lr-backbone", 0,
            "--workers", 1, "--log-every", 20]  # fmt: skip


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/demo", help="folder for everything (default runs/demo)")
    p.add_argument("--quick", action="store_true", help="a tenth of the work: shows that it runs, not what it does")
    args = p.parse_args(argv)
    out, began = Path(args.out), time.time()
    steps, images, epochs, every = (60, 80, 2, 1) if args.quick else (1000, 600, 20, 2)
    toy, boxes, pre = out / "toy", out / "proposals", out / "pretrain"

    run("data.py", "toy", toy, "--unlabelled", images)
    run("proposals.py", toy / "unlabelled", boxes, "--workers", 2)
    run("pretrain.py", "--data", toy / "unlabelled", "--proposals", boxes, "--out", pre, "--steps", steps,
        "--save-every", steps // 4, *MODEL, *PRETRAIN)  # fmt: skip
    checkpoint = sorted(pre.glob("step-*.pt"))[-1]
    finetune = ["--train", toy / "train.json", "--val", toy / "val.json", "--epochs", epochs, "--drop-epoch", epochs,
                "--eval-every", every, *FINETUNE]  # fmt: skip
    arms = {"from scratch": [*MODEL], "pretrained": ["--init", checkpoint]}
    both = [start("finetune.py", *finetune, *arms[name], "--out", out / name.replace(" ", "-")) for name in arms]
    for process in both:
        finish(process)

    logs = {name: read_log(out / name.replace(" ", "-") / "log.jsonl") for name in arms}
    pictures(out, toy, boxes, pre, arms)
    print(table(logs))
    print(f"pictures: {', '.join(sorted(str(path) for path in out.glob('*.png')))}")
    print(f"demo: {(time.time() - began) / 60:.1f} minutes")
    return 0


def start(script, *flags):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print("$", script, *flags[:3], "...", flush=True)
    return subprocess.Popen(command)


def finish(process):
    if process.wait():
        sys.exit(f"demo: {Path(process.args[1]).name} failed with exit code {process.returncode}")


def run(script, *flags):
    finish(start(script, *flags))


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(logs):
    """AP and AP50 of both arms after each evaluated epoch, in percent."""
    rows = {name: {r["epoch"]: r for r in log if "AP50" in r} for name, log in logs.items()}
    head = f"{'':8}{'from scratch':>16}{'pretrained':>16}\n{'epoch':8}" + f"{'AP50':>8}{'AP':>8}" * 2
    lines = [head]
    for epoch in sorted(set.intersection(*(set(r) for r in rows.values()))):
        numbers = "".join(f"{100 * r[epoch]['AP50']:8.1f}{100 * r[epoch]['AP']:8.1f}" for r in rows.values())
        lines.append(f"{epoch:<8}{numbers}")
    return "\n".join(lines)


def pictures(out, toy, boxes, pre, arms):
    """The pair with its regions, proposals, curves of both phases and detections, in `out`."""
    photo = sorted((toy / "unlabelled").iterdir())[0]
    run("views.py", photo, out / "views.png")
    runs = {name: out / name.replace(" ", "-") for name in arms}
    run("finetune.py", "--predict", toy / "val", "--limit", 6, "--init", runs["pretrained"] / "best.pt", "--threshold", 0.3,
        "--out", out / "detections")  # fmt: skip
    plots.save_curves(out / "pretrain.png", {"pretrain": pre})
    plots.save_curves(out / "finetune.png", runs)


if __name__ == "__main__":
    sys.exit(main())
