"""Does pretraining help, in miniature: the paper's questions on small data, with several seeds, run by run.

    python -m bench.transfer --quick                     # one seed, few steps: under 10 minutes, shows how it works
    python -m bench.transfer --questions 1 --tune        # learning rates, on a split of --labels
    python -m bench.transfer --questions 1 1m 2          # the study: hours; the same command goes on after a stop
    python -m bench.transfer --report                    # tables into README.md and pictures, from the stored results

Runs proposals.py in --jobs processes, pretrain.py and finetune.py in one each, of one thread, and writes a line per
finished run into bench/results/transfer.jsonl. What is compared, and in which order, stands in bench/transfer_study.py;
intervals in bench/transfer_numbers.py; tables and pictures in bench/transfer_report.py. Ctrl-C or SIGTERM: all under
way is saved.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

import data
import plots
import runtime
from bench import transfer_numbers as numbers
from bench import transfer_report
from bench.transfer_study import NEEDS, RATES, STUDY, TUNE_PART, length, method, plan, rate_key, siamese, stated_minutes
from toyset import write_toy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "transfer.jsonl"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--questions", nargs="+", choices=STUDY, default=["1"], help="which tables of STUDY (default 1)")
    p.add_argument("--arms", nargs="+", metavar="WORD", default=[""], help="only rows with one of these words")
    p.add_argument("--data", help="photographs to pretrain on, labels unread (default DATA/caltech101/images)")
    p.add_argument("--scenes", default="DATA/coco_cc/images", help="the same of question 2's scene-centric rows")
    p.add_argument("--labels", help="COCO json to fine-tune on (default DATA/cards/train.json)")
    p.add_argument("--val", help="COCO json to evaluate on, never tuned on (default DATA/cards/val.json)")
    p.add_argument("--out", help="folder of all runs (default runs/transfer, with --quick runs/transfer-quick)")
    p.add_argument("--results", help="file of results (default bench/results/transfer.jsonl, --quick: in --out)")
    p.add_argument("--seeds", type=int, nargs=2, metavar=("PRE", "TUNE"), help="instead of those of STUDY")
    p.add_argument("--steps", type=int, default=800, help="of pretraining, one budget for all (default 800)")
    p.add_argument("--epochs", type=int, default=25, help="of fine-tuning, drop at 80 %% (default 25)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each (default 1)")
    p.add_argument("--extra", default="", help="flags for both scripts, such as --device cuda")
    p.add_argument("--quick", action="store_true", help="from scratch and Siamese, a seed, few steps, drawn scenes")
    p.add_argument("--tune", action="store_true", help=f"first try the learning rates {', '.join(RATES)}; no study yet")
    p.add_argument("--dry-run", action="store_true", help="list the runs and the CPU-hours they need")
    p.add_argument("--report", action="store_true", help="tables and pictures of the stored results; runs nothing")
    args = p.parse_args(argv)
    if args.quick:
        args.questions, args.arms, args.seeds = ["1"], ["Conditional, from", "Conditional, Siamese"], [1, 1]
        args.steps, args.epochs = 200, 20
    args.out = Path(args.out or ("runs/transfer-quick" if args.quick else "runs/transfer"))
    toy = [args.out / "toy" / name for name in ("unlabelled", "train.json", "val.json")]
    real = ["DATA/caltech101/images", "DATA/cards/train.json", "DATA/cards/val.json"]
    for name, default in zip(("data", "labels", "val"), toy if args.quick else real, strict=True):
        vars(args)[name] = str(vars(args)[name] or default)
    args.results = Path(args.results or (args.out / "transfer.jsonl" if args.quick else RESULTS))
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.report:
            lines = numbers.read(args.results)
            home = args.results == RESULTS  # results of others do not belong into our README
            print(transfer_report.publish(lines, args.out, ROOT if home else args.out, ROOT / "README.md", home))
            return 0
        if args.quick:
            write_toy(args.out / "toy", unlabelled=300, train=64, val=32)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return Study(args).go()
    except (ValueError, OSError) as error:
        sys.exit(f"transfer: {error}")


class Study:
    """The state of one call: results so far, processes under way."""

    def __init__(self, args):
        self.args, self.out, self.processes, self.stopping = args, args.out, [], False
        # before the results are read
        places = {args.out / "lock": args.out, args.results.with_suffix(".lock"): args.results}
        self.claims = [runtime.claim(lock, f"{place}: wait for it, or use --jobs")
                       for lock, place in places.items() if not args.dry_run]  # fmt: skip
        self.siamese, self.lock, self.boxes_lock = siamese(args).name, threading.Lock(), threading.Lock()
        self.lines = {line["run"]: line for line in numbers.read(args.results, missing_ok=True)}
        chosen = {line["key"]: line["lr"] for line in numbers.best_rates(self.lines.values())}
        self.runs, self.rows = plan(args, chosen, args.tune)
        wanted = {run.init for run in self.runs if run.name not in self.lines}
        second = [run for run in self.runs if "{own-boxes}" in run.flags and run.name not in self.lines]
        if second and not (self.out / NEEDS["own-boxes"][0]).exists():  # these boxes come from Siamese's pretraining
            first = siamese(args)
            if first.name not in self.rows:
                self.runs, self.rows[first.name] = [first, *self.runs], []
            wanted.add(first.name)
        self.images = len(numbers.open_labels(args.labels).dataset["images"])
        again = {run.name for run in self.runs if run.name in wanted and not self.whole(run)}  # done, its weights gone
        self.todo = [run for run in self.runs if run.name not in self.lines or run.name in again]
        self.left = list(self.todo)  # until they have finished

    def go(self):
        """Say what there is to do and, but for --dry-run, do it; returns the exit code."""
        for run in self.runs:  # a run made earlier for another question now belongs to this one too
            if line := self.lines.get(run.name):
                line["rows"] += [row for row in self.rows[run.name] if row not in line["rows"]]
        hours = sum(map(self.minutes, self.todo)) / 60
        done = len(self.runs) - len(self.todo)
        print(f"{len(self.runs)} runs, {done} done, {len(self.todo)} to do: about {hours:.1f} CPU-hours", flush=True)
        if self.args.dry_run:
            print("\n".join(f"{self.minutes(run):6.1f} CPU-minutes  {run.name}" for run in self.todo))
            return 0
        return self.work()

    def work(self):
        """All that is to do, --jobs runs at a time; returns the exit code."""
        self.write()
        failed, running, waiting = {}, {}, list(self.todo)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                self.prepare()
                while waiting or running:
                    pending = {run.name for run in (*waiting, *running.values())}
                    ready = [run for run in waiting if self.after(run) not in pending]  # in the order of `plan`
                    for run in ready[: self.args.jobs - len(running)]:
                        waiting.remove(run)
                        running[pool.submit(self.run, run, failed)] = run
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        run = running.pop(future)
                        if error := future.exception():
                            failed[run.name] = error
            except KeyboardInterrupt:
                self.stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGTERM)
        if self.stopping:
            print("stopped, state saved; the same command goes on")
            return runtime.STOPPED
        print("\n".join([f"failed: {name}: {error}" for name, error in failed.items()]
                        + [f"{self.args.results}: {len(self.lines)} runs"]))  # fmt: skip
        for best in numbers.best_rates(self.lines.values()) if self.args.tune else ():
            print(f"{best['lr']}  {best['key']}  {best['tried']}")
        return 1 if failed else 0

    def minutes(self, run):
        """CPU-minutes that a run will take: as similar ones took, else as stated."""
        same = [line["cpu_seconds"] / 60 for line in self.lines.values()
                if line["kind"] == run.kind and line["key"] == rate_key(run.arm)
                and line["length"] == length(run.flags)]  # fmt: skip
        return sum(same) / len(same) if same else stated_minutes(run, self.images)

    def prepare(self):
        """Proposals and pseudo-classes that the runs ask for; and for --tune the split of the labels."""
        asked = " ".join(run.flags for run in self.todo)
        if "{split}" in asked:
            write_split(self.args.labels, self.out / "split")
        for name, (made, command) in NEEDS.items():
            if f"{{{name}}}" in asked and name != "own-boxes" and not (self.out / made).exists():
                self.call(command, name)

    def after(self, run):
        """The name of the pretraining that a run starts from or takes its boxes from, or None."""
        return run.init or (self.siamese if "{own-boxes}" in run.flags else None)

    def run(self, run, failed):
        """One run and its line in the results file, unless the pretraining it needs is among `failed`."""
        if self.stopping:
            return
        if self.after(run) in failed:
            raise ValueError(f"{self.after(run)} failed before it")
        with self.boxes_lock:
            if "{own-boxes}" in run.flags and not (self.out / NEEDS["own-boxes"][0]).exists():
                self.call(NEEDS["own-boxes"][1], "own-boxes")
        folder, script = self.out / run.name, "pretrain.py" if run.kind == "pretrain" else "finetune.py"
        flags = run.flags + " --init {init}" * bool(run.init)
        self.call(f"{script} {flags} --out {{folder}}", run.name, run.init)
        log = plots.read_log(folder)
        if run.kind == "pretrain":
            report = next((row for row in reversed(log) if "iou_own" in row), {})
            line = {k: round(v, 4) for k, v in report.items() if k != "step"}
            line["before"] = self.look_before(run, folder)
        else:
            points = [row for row in log if "AP" in row]
            line = {"curve": {k: [round(row[k], 5) for row in points] for k in ("epoch", "AP", "AP50", "AP75")}}
            line |= {k: round(v, 5) for k, v in points[-1].items() if k.startswith("A")}
            if run.kind == "finetune":
                line["grid"] = self.evaluate(run, folder)
            for path in (folder / "best.pt", *sorted(folder.glob("step-*.pt"))[: -1 if run.seed == 0 else None]):
                path.unlink(missing_ok=True)  # a finished run is known by its line; seed 0's is kept for pictures
        with self.lock:  # other threads read and write the same lines
            self.record(run, folder, log[0], line)

    def record(self, run, folder, first, line):
        """The line of a finished run; one whose weights were lost stays as published, repetitions in "again"."""
        settings = {k: v for k, v in first["settings"].items() if v is not None and v is not False}
        seconds = json.loads((folder / "cpu.json").read_text())
        made = {"commit": first["commit"], "machine": machine(), "date": time.strftime("%F"),
                "cpu_seconds": round(seconds), **line}  # fmt: skip
        known = self.lines.setdefault(run.name, {
            "run": run.name, "kind": run.kind, "rows": [], "key": rate_key(run.arm),
            "method": method(run.arm), "model": run.arm.model, "fraction": run.arm.fraction, "pre_seed": run.pre_seed,
            "seed": run.seed, "init": run.init, "lr": run.rate, "length": length(run.flags),
            "settings": settings})  # fmt: skip
        known["rows"] += [row for row in self.rows[run.name] if row not in known["rows"]]
        if "cpu_seconds" in known:
            known.setdefault("again", []).append(made)
        else:
            known |= made
        self.write()
        (folder / "cpu.json").unlink()  # or a repetition in the same folder would count this time, too
        self.left.remove(run)
        gain = f"{line['iou_gain']:.3f}" if "iou_gain" in line else "-"  # DETReg's queries are told of no region
        result = f"AP {100 * line['AP']:.1f}" if "AP" in line else f"IoU gain {gain}"
        print(f"[{len(self.runs) - len(self.left)}/{len(self.runs)}] {run.name}  {seconds / 60:.1f} CPU-min  {result}; "
              f"{sum(map(self.minutes, self.left)) / 60:.1f} CPU-hours left", flush=True)  # fmt: skip

    def look_before(self, run, folder):
        """Recall of the pretrained detector's own boxes on --val, before it sees a label."""
        if not (folder / "boxes" / "meta.json").exists():
            self.call("finetune.py --predict {val} --export-proposals {folder}/boxes --resolution 256 --init {init} "
                      f"{self.args.extra} --out {{folder}}", run.name)  # fmt: skip
        return numbers.recall_of_boxes(self.args.val, folder / "boxes")

    def evaluate(self, run, folder):
        """AP of the last weights at each IoU threshold, for all, small, medium and large objects."""
        self.call("finetune.py --eval-only --init {init} --val {val} --save-json {folder}/detections.json --workers 0 "
                  f"{self.args.extra} --out {{folder}}", run.name)  # fmt: skip
        return numbers.grid(self.args.val, folder / "detections.json")

    def checkpoint(self, name):
        """The newest weights of a run's folder, or None."""
        return max((self.out / name).glob("step-*.pt"), default=None)

    def whole(self, run):
        """Whether the weights of a pretraining are there, and those of its last step."""
        path = self.checkpoint(run.name)
        return path is not None and path.stem == f"step-{length(run.flags)[1]:08d}"

    def call(self, command, name, init=None):
        """One of the scripts in a process of one thread; its words go to OUT/name.txt, its CPU time to a file there.

        Paths stand in the command as {names}, filled in after it is cut into words: a path may have spaces. {init} are
        the newest weights of the run `init`, by default of `name` itself.
        """
        places = {name: self.out / made[0].removesuffix("/meta.json") for name, made in NEEDS.items()}
        places |= {name: getattr(self.args, name) for name in ("data", "scenes", "labels", "val", "out", "jobs")}
        places |= {"split": self.out / "split", "siamese": self.checkpoint(self.siamese)}
        places |= {"folder": self.out / name, "init": self.checkpoint(init or name)}
        script, *flags = (word.format_map(places) for word in command.split())
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / f"{name}.txt", "a") as words:
            process = subprocess.Popen([sys.executable, str(ROOT / script), *flags], stdout=words, stderr=words,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
            self.processes.append(process)
            if self.stopping:
                os.kill(process.pid, signal.SIGTERM)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        self.processes.remove(process)
        if (self.out / name).is_dir() and name not in NEEDS:
            total = self.out / name / "cpu.json"
            before = json.loads(total.read_text()) if total.exists() else 0
            total.write_text(json.dumps(before + used.ru_utime + used.ru_stime))
        if process.returncode:
            raise ValueError(f"{script} ended with code {process.returncode}: see {self.out / name}.txt")

    def write(self):
        """The results file, replaced as a whole."""
        self.args.results.parent.mkdir(parents=True, exist_ok=True)
        new = self.args.results.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in self.lines.values()))
        os.replace(new, self.args.results)


def write_split(labels, out):
    """--tune's train.json and val.json: a random part of the labelled images, and the others, chosen once."""
    table = json.loads(Path(labels).read_text())
    root = data.image_root(labels, [image["file_name"] for image in table["images"]])
    order = np.random.default_rng(0).permutation(len(table["images"]))
    cut = round(len(order) * TUNE_PART)
    out.mkdir(parents=True, exist_ok=True)
    (out / "images").unlink(missing_ok=True)
    (out / "images").symlink_to(root.resolve(), target_is_directory=True)
    for name, rows in (("train", order[:cut]), ("val", order[cut:])):
        images = [table["images"][i] for i in sorted(rows)]
        ids = {image["id"] for image in images}
        boxes = [box for box in table["annotations"] if box["image_id"] in ids]
        (out / f"{name}.json").write_text(json.dumps({**table, "images": images, "annotations": boxes}))


def machine():
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
