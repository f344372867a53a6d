"""How fast deepseek_v3.py is, beside another version of it and the programs that people would take instead.

    python .ci/bench.py --against 469f022 --python PYTHON_WITH_TRANSFORMERS --gguf MID.gguf SHIPPED.gguf

All sides run the same weights in float32: `mid`, a random model of 292 M parameters, and the shipped model. A side that
is not at hand is left out. Each computes in a process of its own, with as many threads as it takes by itself, one side
at a time: 15 turns, in each a burst of every side (every third turn for bursts above 3 seconds). The table shows the
medians, and how many times better ours is: the median of the turns' ratios. llama.cpp needs llama-bench on the path and
a GGUF of `mid`, which --directory keeps to be converted; llama-bench caches in float16 and chooses no tokens.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MID = json.loads((ROOT / "weights/config.json").read_text()) | {
    "vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048,
    "torch_dtype": "float32", "num_attention_heads": 12, "num_key_value_heads": 12, "q_lora_rank": 384,
    "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 32,
    "moe_intermediate_size": 256, "max_position_embeddings": 8192, "rope_scaling": None, "num_nextn_predict_layers": 0,
}  # fmt: skip
CACHED = 4 * 12 * (256 + 32)  # bytes of a token in its cache
STORIES = [[0, 421, 433, 260, 395], [0, 764, 363, 260, 700, 492, 15], [0, 409, 466, 282, 493, 698]]  # beginnings
TURNS, LONG = 15, 3.0


# ---- One side, in a process of its own ------------------------------------------------------------------------------
# A loader turns a directory into generate(prompt, max_tokens, speculate), which yields tokens as they are made.


def imported(path):
    spec = importlib.util.spec_from_file_location("page", path)
    page = sys.modules["page"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


def load_page(path, directory):
    page = imported(path)
    cfg = page.read_config(directory)
    w = page.Checkpoint(directory, cfg)
    of_one = hasattr(page, "cached_pass")  # older pages take several prompts
    return lambda prompt, n, speculate=False: page.generate(
        prompt if of_one else [prompt], w, cfg, n, speculate=speculate
    )


def load_transformers(directory):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def generate(prompt, n, speculate=False):
        token_BT, cache = torch.tensor([prompt]), None
        for _ in range(n):
            out = model(token_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token_BT, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield token_BT.item()

    return generate


def random_prompt(tokens):
    rng = random.Random(0)
    return [rng.randrange(MID["vocab_size"]) for _ in range(tokens)]


def seconds(step, times=1):
    start = time.perf_counter()
    for _ in range(times):
        step()
    return time.perf_counter() - start


class Jobs:
    """What a side is asked for; each job returns seconds."""

    def __init__(self, load, mid):
        self.load, self.mid, self.begun = functools.cache(load), Path(mid), {}

    def prompt(self, tokens):
        """From a prompt to its first token."""
        made = self.begun[tokens] = self.load(self.mid)(random_prompt(tokens), 256)
        return seconds(lambda: next(made))

    def decode(self, context, steps):
        """More tokens, behind a prompt that may have been taken in before."""
        if context not in self.begun:
            self.prompt(context)
        return seconds(lambda: next(self.begun[context]), steps)

    def tell(self, tokens, speculate=False):
        """Stories by the shipped weights, each without its first token."""
        took, generate = 0, self.load(ROOT / "weights")
        for beginning in STORIES:
            story = generate(beginning, 1 + tokens, speculate)
            next(story)
            took += seconds(lambda: next(story), tokens)
        return took

    def speculate(self, tokens):
        return self.tell(tokens, speculate=True)

    def write(self):
        """Random weights for `mid`."""
        import numpy as np
        from safetensors.numpy import save_file

        page, rng, w = imported(ROOT / "deepseek_v3.py"), np.random.default_rng(0), {}
        for name, shape in page.tensor_shapes(page.parse_config(MID)).items():
            x = rng.standard_normal(shape, np.float32)
            w[name] = x / np.float32(math.sqrt(shape[1])) if len(shape) == 2 else 1 + x / 10
        self.mid.mkdir(parents=True, exist_ok=True)
        save_file(w, self.mid / "model.safetensors")
        (self.mid / "config.json").write_text(json.dumps(MID))  # last: what it lies beside is complete

    def limits(self):
        """A matrix-vector product of 256 MiB, and a product of 2048 x 2048 matrices."""
        import numpy as np

        matrix, vector = np.ones((16384, 4096), np.float32), np.ones(4096, np.float32)
        square = matrix[:1024].reshape(2048, 2048)
        products = lambda: matrix @ vector, lambda: square @ square
        return [statistics.median(seconds(product) for _ in range(TURNS)) for product in products]


def serve(page, mid):
    """Do the jobs that stdin names, one per line, and answer on what was stdout."""
    load = load_transformers if page == "transformers" else functools.partial(load_page, page)
    jobs, answers, sys.stdout = Jobs(load, mid), sys.stdout, sys.stderr
    for line in sys.stdin:
        job, *given = json.loads(line)
        print(json.dumps(getattr(jobs, job)(*given)), file=answers, flush=True)


# ---- The rows, and what each side does for them ---------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the table."""

    label: str
    unit: str
    tokens: int  # how many a burst makes; 1 where the burst itself is measured: that of a whole process
    job: tuple
    llama: str | None  # arguments of llama-bench


def rows(far):
    """The lines that each row measures in the same turns."""
    return {
        "prompt-512": [Line("prompt of 512", "tok/s", 512, ("prompt", 512), "-p 512 -n 0")],
        "prompt-4096": [Line(f"prompt of {far:,}", "tok/s", far, ("prompt", far), f"-p {far} -n 0")],
        "decode-128": [Line("decoding at 128", "tok/s", 8, ("decode", 128, 8), "-p 0 -n 8 -d 128")],
        "decode-4096": [Line(f"decoding at {far:,}", "tok/s", 8, ("decode", far, 8), f"-p 0 -n 8 -d {far}")],
        "shipped": [Line("shipped model, decoding", "tok/s", 180, ("tell", 60), "-p 0 -n 180 -d 5"),
                    Line("  with speculation", "tok/s", 180, ("speculate", 60), None)],
        "load": [Line("load to first token", "s", 1, ("prompt", 4), "-p 4 -n 0")],
        "memory": [Line(f"peak memory, {far:,} tokens", "GB", 1, ("decode", far, 1), f"-p 0 -n 1 -d {far}")],
    }  # fmt: skip


class Side:
    """A process that is asked for jobs, and waits on a pipe between them."""

    def __init__(self, name, python, page, mid):
        self.name, self.command = name, [python, __file__, "serve", page, str(mid)]

    @functools.cached_property
    def process(self):
        return subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *job):
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else sys.exit(f"{self.name} failed at {job}")

    def cost(self, line):
        """Seconds or GB; None for what this side does not do."""
        if line.unit != "tok/s":
            return whole(line.unit, self.command, json.dumps(line.job))
        return None if line.job[0] == "speculate" and self.name == "transformers" else self.ask(*line.job)


class Llama:
    """llama-bench, which loads the model for every burst and times the burst alone."""

    def __init__(self, mid, shipped=None):
        self.name, self.mid, self.shipped = "llama.cpp", mid, shipped

    def cost(self, line):
        gguf = self.shipped if line.job[0] == "tell" else self.mid
        if not (gguf and line.llama):
            return None
        command = ["llama-bench", "-m", gguf, "-r", "1", "-o", "json", *line.llama.split()]
        if line.unit != "tok/s":
            return whole(line.unit, [*command, "--no-warmup"])
        return json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))[0]["avg_ns"] / 1e9


def whole(unit, command, text=""):
    """Seconds, or at most how many GB, a process takes from its start to its end."""
    start, quiet = time.perf_counter(), subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, text=True)
    process.stdin.write(text)
    process.stdin.close()
    _, status, used = os.wait4(process.pid, 0)  # unlike process.wait(), it tells this child's memory
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start if unit == "s" else used.ru_maxrss * 1024 / 1e9  # KB on Linux


# ---- The table ------------------------------------------------------------------------------------------------------


def in_turn(sides, lines, turns):
    """-> {(side, line): {turn: cost}}."""
    costs = {(side, line): {} for line in lines for side in sides}
    took = dict.fromkeys(costs, 0.0)
    for turn in range(turns):
        for side, line in list(costs)[:: (-1) ** turn]:
            if turn % 3 and took[side, line] > LONG:
                continue
            time.sleep(0.2)  # the threads of the side before look for more work for some time
            start = time.perf_counter()
            cost = side.cost(line)
            took[side, line] = time.perf_counter() - start
            if cost is not None:
                costs[side, line][turn] = cost
    return costs


def times_better(ours, theirs):
    """The median over the turns that both have, in which the machine treats them alike."""
    return statistics.median(theirs[turn] / ours[turn] for turn in ours.keys() & theirs.keys())


def cell(line, ours, theirs):
    """A median, and how many times better ours is."""
    if not theirs:
        return "-"
    cost = statistics.median(theirs.values())
    value = f"{line.tokens / cost:.1f}" if line.unit == "tok/s" else f"{cost:.2f}"
    return value if theirs is ours else f"{value} {times_better(ours, theirs):6.2f}x"


def show(label, unit, cells):
    print(f"{label:28}{unit:6}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def show_row(sides, lines, costs, held):
    for line in lines:
        ours = costs[sides[0], line]
        show(line.label, line.unit, [cell(line, ours, costs[side, line]) for side in sides])
    if line.unit == "GB":
        show("  over weights and cache", "x", [f"{costs[side, line][0] / held:.2f}" for side in sides])
    if line.job[0] == "speculate":
        pairs = [[costs[side, line], costs[side, lines[0]]] for side in sides]
        show("  over none", "x", [f"{times_better(*pair):.2f}" if pair[0] else "-" for pair in pairs])


def find_sides(args, mid, scratch):
    """Ours first, then the others that are at hand."""
    sides = [Side("ours", sys.executable, str(ROOT / "deepseek_v3.py"), mid)]
    if args.against:
        path = Path(args.against)
        if not path.exists():
            path = scratch / "deepseek_v3.py"
            path.write_bytes(subprocess.check_output(["git", "show", f"{args.against}:deepseek_v3.py"], cwd=ROOT))
        sides.append(Side(Path(args.against).name[-16:], sys.executable, str(path), mid))
    if args.python or importlib.util.find_spec("transformers"):
        sides.append(Side("transformers", args.python or sys.executable, "transformers", mid))
    else:
        print("transformers was not there (--python names an interpreter that has it)")
    if args.gguf and shutil.which("llama-bench"):
        sides.append(Llama(*args.gguf))
    else:
        print("llama.cpp was not there (it takes llama-bench on the path, and --gguf)")
    return sides


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, names = parser.add_argument, list(rows(0))
    flag("--against", metavar="PATH_OR_COMMIT", help="another version of deepseek_v3.py")
    flag("--python", metavar="PATH", help="an interpreter that has transformers")
    flag("--gguf", nargs="+", metavar="FILE", help="mid, and the shipped model if it is there, for llama-bench")
    flag("--directory", type=Path, metavar="DIR", help="where mid is, or else is written (default: a temporary one)")
    flag("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=f"of {', '.join(names)}")
    flag("--quick", action="store_true", help="two turns, and 1,024 in place of 4,096: only to see that all runs")
    args = parser.parse_args()
    turns, far = (2, 1024) if args.quick else (TURNS, 4096)
    with tempfile.TemporaryDirectory() as scratch:
        mid = args.directory or Path(scratch) / "mid"
        sides = find_sides(args, mid, Path(scratch))
        machine = Side("this program", sys.executable, "", mid)
        if not (mid / "config.json").exists():
            machine.ask("write")
        vector, square = machine.ask("limits")
        limits = f"sgemv {2**28 / vector / 1e9:.1f} GB/s, sgemm {2**34 / square / 1e9:.0f} GFLOP/s"
        print(f"{os.cpu_count()} cores, {limits}")
        show("", "", [side.name for side in sides])
        held = ((mid / "model.safetensors").stat().st_size + CACHED * (far + 1)) / 1e9
        for name in args.rows:
            lines = rows(far)[name]
            show_row(sides, lines, in_turn(sides, lines, 1 if name == "memory" else turns), held)


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main()
