"""Mutation testing: how many small faults in deepseek_v3.py, sections 1 to 9, do the tests see?

    pip install cosmic-ray
    python .ci/mutants.py [HOW_MANY] [SEED]      200 and 0, over an hour on two cores; all, some 6,000: days

In a copy of the last commit, one for each core, one place at a time is changed (an operator, a number, a condition,
...); then a test must fail. Prints each mutant that no test saw, and the score.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM, TESTS = Path("deepseek_v3.py"), Path("test_deepseek_v3.py")
CONFIG = f"""
[cosmic-ray]
module-path = "{PROGRAM}"
timeout = 3600.0
test-command = "{sys.executable} .ci/mutants.py test"
[cosmic-ray.distributor]
name = "local"
"""


def sections(path):
    """The first line of each numbered section: {number: line}."""
    banners = [re.match(r"# ---- ([\d, ]+)\. ", line) for line in path.read_text("utf-8").splitlines()]
    return {int(n): line for line, found in enumerate(banners, 1) if found for n in found[1].split(", ")}


def test():
    """Run the tests of the section that is changed, then the other ones, the trainer's last; -> the exit code."""
    diff = subprocess.run(["git", "diff", "-U0", str(PROGRAM)], capture_output=True, text=True, check=True).stdout
    changed, starts = int(re.search(r"^@@ -(\d+)", diff, re.M)[1]), sections(PROGRAM)
    section = max(n for n, line in starts.items() if line < changed)
    first, lines = sections(TESTS)[section], TESTS.read_text("utf-8").splitlines()
    last = next((n for n in range(first, len(lines)) if lines[n].startswith("# ---- ")), len(lines))
    names = [f"{TESTS}::{found[1]}" for line in lines[first:last] if (found := re.match(r"def (test_\w+)", line))]
    slow = "under_jax or a_resumed_training or readme"
    limits = "ulimit -v 12000000 -t 300; exec"  # a mutant may ask for all memory, or loop
    for chosen in ([*names, "-k", f"not ({slow})"], ["-k", f"not ({slow})"], ["-k", slow]):
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *chosen]
        code = subprocess.run(["bash", "-c", f'{limits} "$@"', "bash", *command], check=False).returncode
        if code not in (0, 5):  # 5: no tests
            return code
    return 0


def main(count=200, seed=0):
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

    here, results = Path(__file__).resolve().parent.parent, []
    with tempfile.TemporaryDirectory() as base:
        first, *others = copies = [Path(base, str(core)) for core in range(os.cpu_count())]
        subprocess.run(["git", "clone", "--quiet", str(here), str(first)], check=True)
        (first / "cosmic-ray.toml").write_text(CONFIG)
        subprocess.run(["cosmic-ray", "init", "cosmic-ray.toml", "mutants.sqlite"], cwd=first, check=True)
        for copy in others:
            shutil.copytree(first, copy)
        starts = sections(first / PROGRAM)
        for core, copy in enumerate(copies):
            with use_db(copy / "mutants.sqlite", WorkDB.Mode.open) as db:
                place = {item.job_id: (m.start_pos, m.operator_name, m.occurrence)
                         for item in db.work_items for m in item.mutations}  # fmt: skip
                inside = sorted((job for job, at in place.items() if starts[1] < at[0][0] < starts[10]), key=place.get)
                chosen = random.Random(seed).sample(inside, min(count, len(inside)))
                idle = set(place) - set(chosen[core :: len(copies)])
                db.set_multiple_results(idle, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
        print(f"{len(chosen)} of {len(inside)} mutants", flush=True)
        environment = os.environ | {"HYPOTHESIS_PROFILE": "unshrunk"}
        command = ["cosmic-ray", "exec", "cosmic-ray.toml", "mutants.sqlite"]
        workers = [subprocess.Popen(command, cwd=copy, env=environment) for copy in copies]
        failed = [worker for worker in workers if worker.wait()]
        assert not failed
        for copy in copies:
            with use_db(copy / "mutants.sqlite", WorkDB.Mode.open) as db:
                results += [result for _, result in db.results if result.test_outcome]
        survivors = [result.diff for result in results if result.test_outcome != TestOutcome.KILLED]
        print(*survivors, f"{len(results) - len(survivors)} of {len(results)} mutants killed", sep="\n\n")


if __name__ == "__main__":
    sys.exit(test() if sys.argv[1:] == ["test"] else main(*map(int, sys.argv[1:])))
