"""What becomes of a memory whose edits are killed, have no room, or that is damaged: counts of outcomes.

Usage: benchmarks/faults.py [--kills 200] [--full 50] [--damages 100] [--minutes 30] [--seed 0]

Trials are those of tests/test_edit_faults.py. Mounting a small file system for full disks needs root's rights.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common import ROOT, save

sys.path.append(str(ROOT))  # last, so that nothing in it is taken for an installed library

from tests.faults import KINDS, MOMENTS, WAYS, Trials, Wrong, small_disk
from tests.processes import Forks


def counted(trial: Callable[[], str], counts: Counter[str], wrong: list[str]) -> None:
    """Do a trial and count what it comes to."""
    try:
        counts[trial()] += 1
    except Wrong as error:
        counts["WRONG"] += 1
        wrong.append(str(error).strip().splitlines()[-1][:300])  # of a trace what was raised
        print(f"WRONG: {error}", flush=True)


def main() -> None:
    """Print and save the counts."""
    parser = argparse.ArgumentParser(description="Counts of what becomes of a memory under faults.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--damages", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many, whatever is left")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    begin = time.monotonic()
    names = ("killed at random moments", "killed at chosen moments", "full disk", "damage")
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    by_kind: dict[str, Counter[str]] = {f"{kind} {way}": Counter() for kind in KINDS for way in WAYS}
    wrong: list[str] = []

    def in_time() -> bool:
        return time.monotonic() - begin < 60 * arguments.minutes

    forks = Forks()
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk") as no_disk:
        trials = Trials(forks, Path(folder))
        print(f"made in {time.monotonic() - begin:.0f} s", flush=True)
        damages = [(kind, way) for kind in KINDS for way in WAYS]
        # In turn, so that a run that is stopped has something of each.
        for number in range(max(arguments.kills, len(MOMENTS), arguments.full, arguments.damages)):
            if not in_time():
                break
            if number < len(MOMENTS):
                moment = list(MOMENTS)[number]
                counted(lambda moment=moment: trials.kill_at(moment), counts[names[1]], wrong)  # type: ignore[misc]
            if number < arguments.kills and in_time():
                timed = number % 2 == 0
                counted(lambda timed=timed: trials.kill(generator, timed=timed), counts[names[0]], wrong)  # type: ignore[misc]
            if number < arguments.damages and in_time():
                kind, way = damages[number % len(damages)]
                own: Counter[str] = Counter()
                counted(lambda kind=kind, way=way: trials.damage(generator, kind, way), own, wrong)  # type: ignore[misc]
                counts[names[3]] += own
                by_kind[f"{kind} {way}"] += own
            if number < arguments.full and not no_disk and in_time():
                counted(lambda: trials.fill(Path(folder) / "disk", generator), counts[names[2]], wrong)
            print(f"{number}: { ({name: dict(own) for name, own in counts.items()}) }", flush=True)
    forks.close()
    figures = {
        "trials": {name: {"trials": own.total(), **dict(sorted(own.items()))} for name, own in counts.items()},
        "damage by kind and way": {name: dict(sorted(own.items())) for name, own in by_kind.items() if own},
        "without a small file system": no_disk,
        "wrong": wrong,
        "seconds": round(time.monotonic() - begin),
    }
    print(figures)
    save("faults", figures, arguments)


if __name__ == "__main__":
    main()
