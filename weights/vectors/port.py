"""deepseek_v3.py as a port that check.py can try; a port in Python looks like this.

    python weights/vectors/check.py "python weights/vectors/port.py"

A port is called with a directory. What request.json there asks for, of the checkpoint there, goes to
answer.safetensors.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deepseek_v3 as dsv3


def load(directory, dtype):
    cfg = dsv3.read_config(directory)
    w = dsv3.Checkpoint(directory, cfg, dtype)
    return w, w.cfg


def by_row(prompts, row):
    """row(prompt) of each prompt -> {name: array}; of several, the names begin with its number."""
    found = {f"{n}/" if len(prompts) > 1 else "": row(prompt) for n, prompt in enumerate(prompts)}
    return {prefix + name: x for prefix, named in found.items() for name, x in named.items()}


def trace(directory, dtype, prompts, chunks, depth):
    """Without chunks the definition, with them the computation."""
    w, cfg = load(directory, dtype)
    if chunks is None:
        return by_row(prompts, lambda prompt: dsv3.trace(prompt, w, cfg, None))
    return by_row(prompts, lambda prompt: trace_in_chunks(prompt, w, cfg, chunks, depth))


def trace_in_chunks(prompt, w, cfg, chunks, depth):
    """As the page's `trace`, whose chunks all have one size."""
    token_T = np.array(prompt)

    def run(step, *arrays):
        cache, parts = dsv3.Cache(len(arrays[0])), []
        for size in chunks:
            part = [x[cache.length : cache.length + size] for x in arrays]
            if len(part[0]):  # the row may be shorter than the longest
                parts.append(dsv3.cached_pass(step, part, w, cfg, cache, size))
        return np.concatenate(parts)

    with dsv3.recording() as named:
        h_XD = run(dsv3.forward, token_T)
        dsv3.record("lm_head", dsv3.head(h_XD, w))
        for k in range(1, min(depth, len(prompt) - 1) + 1):
            h_XD = run(functools.partial(dsv3.mtp, k), h_XD[:-1], token_T[k:])
            name = f"model.layers.{cfg.num_hidden_layers + k - 1}.shared_head"
            dsv3.record(name, dsv3.head(h_XD, w))
    return named


def generate(directory, dtype, prompts, max_tokens, speculate):
    """The drafts are seen by what verifies them."""
    w, cfg = load(directory, dtype)
    made, verify = {}, dsv3.verify
    try:
        for n, prompt in enumerate(prompts):
            seen = []

            def watched(p_W, q_W, draft, rng):
                accepted, token = verify(p_W, q_W, draft, rng)
                seen.append((draft, accepted))
                return accepted, token

            dsv3.verify = watched
            made[f"{n}/tokens"] = list(dsv3.generate(prompt, w, cfg, max_tokens, speculate=speculate))
            if speculate:
                made[f"{n}/drafts"], made[f"{n}/accepted"] = zip(*seen, strict=True) if seen else ((), ())
    finally:
        dsv3.verify = verify
    return {name: np.array(x, np.int64) for name, x in made.items()}


def losses(directory, dtype, prompts, mtp_weight, balance_weight):
    """The mean over the rows."""
    w, cfg = load(directory, dtype)
    rows = []
    for prompt in prompts:
        total, parts = dsv3.training_objective(w, np.array(prompt), cfg, mtp_weight, balance_weight)
        row = {"main": parts["main"], "balance": parts["balance"], "total": total}
        rows.append(row | {f"mtp.{k}": loss for k, loss in enumerate(parts["mtp"], 1)})
    return {name: np.asarray(sum(row[name] for row in rows) / len(rows), dtype) for name in rows[0]}


def phases(directory, dtype, positions):
    cfg = dsv3.read_config(directory)
    rotation_TP = np.concatenate([dsv3.rotations(p, 1, cfg, dtype) for p in positions])
    return {"cos": rotation_TP.real, "sin": rotation_TP.imag}


def update_bias(directory, dtype, gamma):
    given = safetensors.numpy.load_file(directory / "model.safetensors")
    return {"bias": dsv3.update_bias(given["bias"].astype(dtype), given["load"], gamma)}


def dequantize(directory, dtype):
    stored = dsv3.read_safetensors(directory / "model.safetensors")
    stored["weight"].scale = stored["weight_scale_inv"]
    return {"weight": stored["weight"].whole()}


DO = {function.__name__: function for function in (trace, generate, losses, phases, update_bias, dequantize)}


def answer(directory, request):
    """What a request asks for -> {name: array}"""
    given = {key: value for key, value in request.items() if key not in ("do", "dtype")}
    return DO[request["do"]](Path(directory), np.dtype(request["dtype"]), **given)


def main(directory):
    request = json.loads((directory / "request.json").read_text())
    if request["do"] not in DO:
        print(f"this port has no {request['do']}", file=sys.stderr)
        return 3  # "I lack this": the case is skipped
    dsv3.write_trace(directory / "answer.safetensors", answer(directory, request))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
