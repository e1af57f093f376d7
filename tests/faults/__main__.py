"""Run seeds of the fault simulation, on all cores:

python -m tests.faults 17                   # one seed, with what it was like; exit status 1 if something is broken
python -m tests.faults --seeds 10000        # make simulate-faults
python -m tests.faults --bugs               # the planted faults, and after how many seeds each is found
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

from .bugs import BUGS, planted
from .simulation import attempt, run, told


def many(first: int, count: int, workers: int) -> int:
    """Run seeds, print those that are broken; how many."""
    began, broken, faults, shapes = time.monotonic(), 0, Counter[str](), Counter[str]()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, (seed, what, more, seen) in enumerate(
            pool.imap_unordered(attempt, range(first, first + count), 8), 1
        ):
            faults, shapes = faults + more, shapes + seen
            if what:
                broken += 1
                print(f"seed {seed}: {what}\n    replay: python -m tests.faults {seed}", flush=True)
            if done % 500 == 0:
                print(f"{done} seeds, {broken} broken, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{count} seeds, {broken} broken, {time.monotonic() - began:.0f} s on {workers} workers")
    print(f"faults: {told(faults)}\nsessions: {told(dict(shapes.most_common(12)))}")
    return broken


def hunt(most: int) -> int:
    """Plant each fault; how many are not found."""
    hidden = 0
    for name in BUGS:
        with planted(name):
            seeds = [BUGS[name].seed, *range(most)]
            found = next(((seed, what) for seed, what, *_ in map(attempt, seeds) if what), None)
        hidden += found is None
        told = f"not found in {most} seeds" if found is None else f"seed {found[0]}: {found[1][:120]}"
        stale = "" if found is None or found[0] == BUGS[name].seed else f" (bugs.py says {BUGS[name].seed}: correct it)"
        print(f"{name}: {told}{stale}", flush=True)
    return hidden


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int, nargs="?", help="run this one and tell about it")
    parser.add_argument("--seeds", type=int, default=0, help="so many")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bugs", action="store_true", help="plant the faults of bugs.py, one after the other")
    given = parser.parse_args()
    if given.bugs:
        return hunt(given.seeds or 200)
    if given.seed is None:
        return many(given.first, given.seeds or 200, given.workers)
    print(run(given.seed))
    return 0


if __name__ == "__main__":
    sys.exit(bool(main()))
