"""Paired times: every contestant in turn in one process, ratios to ours, and the file of results."""

import json
import math
import platform
import statistics
import time
from pathlib import Path

import torch

import runtime

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.jsonl"
LONG_ENOUGH = 0.05  # seconds: a decoder's attention takes 2 ms, which page faults and the clock's grain disturb


def paired(contestants, rounds, threads):
    """{name: [seconds per call and round]}; every round runs every contestant, the order turned round each time.

    The first round warms up and says how often to call what is too short to time once.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    times, calls = {name: [] for name in contestants}, dict.fromkeys(contestants, 1)
    for r in range(rounds + 1):
        for name in list(contestants)[:: 1 if r % 2 else -1]:
            start = clock()
            for _ in range(calls[name]):
                contestants[name]()
            seconds = (clock() - start) / calls[name]
            if r:
                times[name].append(seconds)
            else:
                calls[name] = math.ceil(LONG_ENOUGH / max(seconds, 1e-6))
    return times


def ratios(slow, fast):
    """[median, smallest, largest] of the rounds' ratios slow / fast."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return [round(x, 2) for x in (statistics.median(each), min(each), max(each))]


def compare_steps(contestant, other, args):
    """{"other / ours": ratios} of contestant(ours or other, autocast) in float32 and, where it pays, in bfloat16."""
    steps = {"ours": (True, False), other: (False, False)}
    steps |= {"ours, bfloat16": (True, True), f"{other}, autocast": (False, True)}
    pairs = [(other, "ours"), (other, "ours, bfloat16"), (f"{other}, autocast", "ours, bfloat16")]
    if not runtime.bfloat16_pays(torch.device("cpu")):
        print("this machine emulates bfloat16, which is left out")
        steps, pairs = dict(list(steps.items())[:2]), pairs[:1]
    times = paired({name: contestant(*settings) for name, settings in steps.items()}, args.rounds, args.threads)
    return {f"{slow} / {fast}": ratios(times[slow], times[fast]) for slow, fast in pairs}


def record(entry):
    """Appends a result, with where and when it was taken, to the results file."""
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    where = {"commit": runtime.commit(), "cpu": cpu[0] if cpu else platform.processor(), "torch": torch.__version__}
    when = {"threads": torch.get_num_threads(), "date": time.strftime("%F")}
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps({**entry, **where, **when}) + "\n")
