"""deepseek_v3.py as a port that check.py can try; a port in Python looks like this.

    python weights/vectors/check.py "python weights/vectors/port.py"

A port is called with a directory. What request.json there asks for, of the checkpoint there, goes to
answer.safetensors.
"""

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


def trace(directory, dtype, prompts, chunks, depth):
    """Without chunks the definition, with them the computation: `trace` of the page has chunks of one size alone."""
    w, cfg = load(directory, dtype)
    if chunks is None:
        return dsv3.trace(prompts, w, cfg, None)
    T = max(map(len, prompts))
    token_BT = np.array([prompt + [-1] * (T - len(prompt)) for prompt in prompts])
    cache, ends = dsv3.Cache(len(prompts), T), np.cumsum(chunks)

    def in_chunks(step, end):
        parts = [slice(stop - size, min(stop, end)) for stop, size in zip(ends, chunks, strict=True)]
        done = [step(part, np.full(len(prompts), part.start)) for part in parts if part.start < end]
        return np.concatenate(done, axis=1)

    with dsv3.recording() as named:
        h_BTD = in_chunks(lambda part, start_B: dsv3.forward(token_BT[:, part], w, cfg, cache, start_B), T)
        dsv3.record("lm_head", dsv3.head(h_BTD, w, cfg))
        for k in range(1, depth + 1):
            args = k, h_BTD, token_BT[:, k:]
            h_BTD = in_chunks(lambda part, start_B, args=args: mtp_step(*args, part, start_B, w, cfg, cache), T - k)
            name = f"model.layers.{cfg.num_hidden_layers + k - 1}.shared_head"
            dsv3.record(name, dsv3.head(h_BTD, w, cfg))
    several = len(prompts) > 1
    return {(f"{n}/" if several else "") + name: x[n, : x.shape[1] - T + len(prompt)]
            for n, prompt in enumerate(prompts) for name, x in named.items()}  # fmt: skip


def mtp_step(k, h_BTD, token_BT, part, start_B, w, cfg, cache):
    return dsv3.mtp(k, h_BTD[:, part], token_BT[:, part], w, cfg, cache, start_B)


def generate(directory, dtype, prompts, max_tokens, speculate):
    """The drafts are seen by what verifies them; each row's random stream says which row it is."""
    w, cfg = load(directory, dtype)
    made = {f"{n}/{key}": [] for n in range(len(prompts)) for key in ("tokens", "drafts", "accepted")}
    verify = dsv3.verify

    def watched(p_W, q_W, draft, rng):
        accepted, token = verify(p_W, q_W, draft, rng)
        row = rng.bit_generator.seed_seq.entropy[1]
        made[f"{row}/drafts"].append(draft)
        made[f"{row}/accepted"].append(accepted)
        return accepted, token

    dsv3.verify = watched
    try:
        for row, token in dsv3.generate(prompts, w, cfg, max_tokens, speculate=speculate):
            made[f"{row}/tokens"].append(token)
    finally:
        dsv3.verify = verify
    return {name: np.array(x, np.int64) for name, x in made.items() if speculate or name.endswith("tokens")}


def losses(directory, dtype, prompts, mtp_weight, balance_weight):
    w, cfg = load(directory, dtype)
    total, parts = dsv3.training_objective(w, np.array(prompts), cfg, mtp_weight, balance_weight)
    named = {"main": parts["main"], "balance": parts["balance"], "total": total}
    named |= {f"mtp.{k}": loss for k, loss in enumerate(parts["mtp"], 1)}
    return {name: np.asarray(x, dtype) for name, x in named.items()}


def phases(directory, dtype, positions):
    cfg, start_B = dsv3.read_config(directory), np.array(positions)
    rotation_BTP = dsv3.positions(np.zeros((len(positions), 1), int), start_B, cfg, dtype).rotation_BTP
    return {"cos": rotation_BTP.real[:, 0], "sin": rotation_BTP.imag[:, 0]}


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
    dsv3.write_trace(str(directory / "answer.safetensors"), answer(directory, request))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
