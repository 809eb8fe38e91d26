"""How fast the parts are, against what else does the same work: `python -m bench.speed ops` (or `step`).

Every figure is a ratio of two times taken in turn in one process, round after round, because the machine's speed
drifts: the median over the rounds is given, and the smallest and largest. Every result is appended to
bench/results/speed.jsonl with the commit and the machine. One thread is timed in the process's own CPU time, which
other processes on the machine disturb less; more threads by the clock.
"""

import argparse

import torch

from bench import loading, operator, peers, scaling, training

COMMANDS = {  # name: what measures it, its own flags, one line about it
    "data": (loading.data, loading.add_data_flags, "samples of the loader against the released order in PIL"),
    "proposals": (loading.boxes, loading.add_proposal_flags, "object proposals, and the start with ImageNet's cache"),
    "ops": (operator.ops, operator.add_flags, "deformable attention against grid_sample and the PyPI peer"),
    "step": (training.step, training.add_flags, "the pretraining step against the released code's habits"),
    "finetune": (peers.finetune_step, peers.add_flags, "the fine-tuning step against Hugging Face transformers"),
    "scaling": (scaling.scaling, scaling.add_flags, "two processes against one"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, add_flags, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line)
        command.set_defaults(run=function)
        command.add_argument("--rounds", type=int, default=5, help="times that every contestant runs (default 5)")
        command.add_argument("--threads", type=int, default=1)
        add_flags(command)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
