"""Draw curves.svg from the logs of a run of train.py and of its control, and print the figures of README.md.

    pip install numpy matplotlib
    python weights/curves.py my-weights/state/log.jsonl control/state/log.jsonl

The control is the same run with --no-bias-update; it may have been stopped earlier: loads are compared over the last
1,000 steps of the shorter one. Without a control only the figures are printed.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same logs, the same bytes
from matplotlib import pyplot as plt  # noqa: E402

LAST, WIDTH = 1000, 50  # steps over which loads are added up; over which a curve is smoothed


def violation(load_SLE):
    """MaxVio of each step and layer (arXiv:2408.15664, eq. 4)."""
    return load_SLE.max(-1) / load_SLE.mean(-1) - 1


def curve(axes, values, label):
    """The mean of each WIDTH steps."""
    values = np.array(values[: len(values) // WIDTH * WIDTH]).reshape(-1, WIDTH).mean(1)
    axes.plot(WIDTH * (0.5 + np.arange(len(values))), values, label=label, linewidth=1)


def main(paths):
    runs = [[json.loads(line) for line in Path(path).read_text().splitlines()] for path in paths]
    loads = [np.array([step["load"] for step in run], float) for run in runs]
    end = min(map(len, runs))
    names = ["with the bias update", "without"][: len(runs)]
    for name, load_SLE in zip(names, loads, strict=True):
        worst = violation(load_SLE)
        print(f"MaxVio {name}: first 50 steps {worst[:50].mean():.2f}, steps {end - LAST + 1} to {end} "
              f"{worst[end - LAST:end].mean():.2f}, its last 1000 {worst[-1000:].mean():.2f}: "
              f"by layer {worst[-1000:].mean(0).round(2)}")  # fmt: skip
    for name, run in zip(names, runs, strict=True):
        *_, last = (step for step in run[:end] if "validation_bits_per_byte" in step)
        print(f"bits per byte {name}: {last['validation_bits_per_byte']:.3f} at step {last['step']}")
    if len(runs) == 1:
        return

    layers = loads[0].shape[1]
    figure = plt.figure(figsize=(10, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    loss, valid, balance = top.subplots(1, 3)
    curve(loss, [step["main"] for step in runs[0]], "next token")
    curve(loss, [step["mtp"] for step in runs[0]], "MTP: the one after")
    loss.set(title="training loss, nats per token", xlabel="step", ylim=(1, 5))
    loss.legend()
    held = [(step["step"], step["validation_bits_per_byte"]) for step in runs[0] if "validation_bits_per_byte" in step]
    valid.plot(*zip(*held, strict=True))
    valid.set(title="64 held-out stories, bits per byte", xlabel="step", ylim=(0.5, 1.2))
    valid.grid(alpha=0.3)
    for name, load_SLE in zip(names, loads, strict=True):
        curve(balance, violation(load_SLE).mean(1), name)
    balance.set(title="MaxVio, mean of the layers", xlabel="step", ylim=(0, None))
    balance.legend()
    for layer, axes in enumerate(bottom.subplots(1, layers, sharey=True)):
        for load_SLE, shift in zip(loads, (-0.2, 0.2), strict=True):
            load_E = load_SLE[end - LAST : end, layer].sum(0)
            axes.bar(np.arange(load_E.size) + shift, np.sort(load_E / load_E.mean())[::-1], 0.4)
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set(title="MTP module" if layer == layers - 1 else f"layer {layer + 1}", xticks=[])
    bottom.suptitle(f"load of each expert, largest first, in steps {end - LAST + 1} to {end}; 1 is its fair share")
    figure.savefig(Path(__file__).with_name("curves.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
