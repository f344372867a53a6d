"""Mutation testing: how many small faults in deepseek_v3.py, sections 1 to 10, do the tests see?

    pip install cosmic-ray
    python .ci/mutants.py [HOW_MANY] [SEED]      200 and 0, over an hour on two cores; all, some 3,300: days

In a copy of the last commit, one for each core, one place at a time is changed (an operator, a number, a condition,
...); then a test must fail. Prints each mutant that no test saw, and the score.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM, LAST = Path("deepseek_v3.py"), "# ---- 11. "  # of this section, the command line, no mutants are made
CONFIG = f"""
[cosmic-ray]
module-path = "{PROGRAM}"
timeout = 3600.0
test-command = "{sys.executable} .ci/mutants.py test"
[cosmic-ray.distributor]
name = "local"
"""
SLOW = "jax or readme or exactly_the_main"  # of the page's tests, these come last
RUNS = [["test_deepseek_v3.py", "-k", f"not ({SLOW})"], [".ci/test_cupy.py"], ["test_deepseek_v3.py", "-k", SLOW],
        [".ci/vectors/test_vectors.py", "-k", "page_passes"]]  # fmt: skip


def test():
    """Run the tests, the quick ones first; -> the exit code."""
    limits = "ulimit -v 12000000 -t 300; exec"  # a mutant may ask for all memory, or loop
    for chosen in RUNS:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *chosen]
        code = subprocess.run(["bash", "-c", f'{limits} "$@"', "bash", *command], check=False).returncode
        if code not in (0, 5):  # 5: no tests
            return code
    return 0


def main(count=200, seed=0):
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

    here, results = Path(__file__).resolve().parent.parent, []
    lines = (here / PROGRAM).read_text("utf-8").splitlines()
    end = next(n for n, line in enumerate(lines, 1) if line.startswith(LAST))
    with tempfile.TemporaryDirectory() as base:
        first, *others = copies = [Path(base, str(core)) for core in range(os.cpu_count())]
        subprocess.run(["git", "clone", "--quiet", str(here), str(first)], check=True)
        (first / "cosmic-ray.toml").write_text(CONFIG)
        subprocess.run(["cosmic-ray", "init", "cosmic-ray.toml", "mutants.sqlite"], cwd=first, check=True)
        for copy in others:
            shutil.copytree(first, copy)
        for core, copy in enumerate(copies):
            with use_db(copy / "mutants.sqlite", WorkDB.Mode.open) as db:
                place = {item.job_id: (m.start_pos, m.operator_name, m.occurrence)
                         for item in db.work_items for m in item.mutations}  # fmt: skip
                inside = sorted((job for job, at in place.items() if at[0][0] < end), key=place.get)
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
