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
import cases

import deepseek_v3 as dsv3


def load(directory, dtype):
    cfg = dsv3.read_config(directory)
    w = dsv3.Checkpoint(directory, cfg, dtype)
    return w, w.cfg


def by_row(prompts, row):
    """row(prompt) of each prompt -> {name: array}; of several, the names begin with its number."""
    found = {f"{n}/" if len(prompts) > 1 else "": row(prompt) for n, prompt in enumerate(prompts)}
    return {prefix + name: x for prefix, named in found.items() for name, x in named.items()}


def trace(directory, dtype, prompts, chunks, depth, start=0):
    """Without chunks the definition, with them the computation."""
    w, cfg = load(directory, dtype)
    if start:
        return by_row(prompts, lambda prompt: trace_far_out(prompt, w, cfg, start))
    if chunks is None:
        return by_row(prompts, lambda prompt: dsv3.trace(prompt, w, cfg, None))
    return by_row(prompts, lambda prompt: trace_in_chunks(prompt, w, cfg, chunks, depth))


def trace_far_out(prompt, w, cfg, start):
    with dsv3.recording() as named:
        dsv3.record("lm_head", dsv3.head(dsv3.forward(np.array(prompt), w, cfg, start), w))
    return named


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


def generate(directory, dtype, prompts, max_tokens, speculate, end_tokens=()):
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
            tokens = dsv3.generate(prompt, w, cfg, max_tokens, stop=end_tokens, speculate=speculate)
            made[f"{n}/tokens"] = list(tokens)
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


# ---- Components ----------------------------------------------------------------------------------------------------


def component(directory, dtype, component, layer):
    """One piece of the model, given its input."""
    cfg, w = dsv3.read_config(directory), dsv3.read_safetensors(directory / "model.safetensors")
    for name, x in w.items():
        x.scale = w[f"{name}_scale_inv"].whole() if x.kind == "F8_E4M3" else None
    if component in ("dequantize", "fp8_linear"):
        (matrix,) = (x for x in w.values() if x.kind == "F8_E4M3")
        if component == "dequantize":
            return {"weight": matrix.whole()}
    w = {name: x.whole() for name, x in w.items()}
    router = np.promote_types(dtype, np.float32)
    w = {name: x.astype(router if ".mlp.gate." in name else dtype) for name, x in w.items()}
    given = safetensors.numpy.load_file(directory / "inputs.safetensors")
    if component == "fp8_linear":
        return fp8_linear(given["x"], matrix, json.loads((directory / "config.json").read_text()), dtype)
    if component == "verify":
        return verify(**given)
    given = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in given.items()}
    answer = COMPONENTS[component](w, cfg, f"model.layers.{layer}", **given)
    return answer if isinstance(answer, dict) else {"y": answer}


def rope(w, cfg, name, x, positions):
    return dsv3.rope(x, np.concatenate([dsv3.rotations(p, 1, cfg, x.dtype) for p in positions])[:, None])


def router(w, cfg, name, x):
    with dsv3.recording() as named:
        dsv3.route(x, w, f"{name}.mlp", cfg)
    return {key.rpartition(".")[2]: x for key, x in named.items()}


def cached(w, cfg, name, cache, x):
    """What attention gets: the rotation of the new tokens, and attention that sees the entries before them."""
    held = dsv3.Cache(len(cache) + len(x))
    held.write(f"{name}.self_attn", cache)
    held.length = len(cache)
    return dsv3.rotations(len(cache), len(x), cfg, x.dtype), functools.partial(dsv3.mla_cached, held)


def mla(w, cfg, name, x, cache):
    return dsv3.mla(x, w, f"{name}.self_attn", cfg, *cached(w, cfg, name, cache, x))


def block(w, cfg, name, x, cache):
    return dsv3.block(x, w, int(name.split(".")[2]), cfg, *cached(w, cfg, name, cache, x), dsv3.moe_chosen)


def mla_prologue(w, cfg, name, x, start):
    rotation_TP = dsv3.rotations(int(start[0]), len(x), cfg, x.dtype)
    q_nope_THN, q_rope_THR = dsv3.mla_query(x, w, f"{name}.self_attn", cfg, rotation_TP)
    kv_TL = dsv3.mla_latent(x, w, f"{name}.self_attn", cfg, rotation_TP)
    kv_latent_TC, k_rope_TR = np.split(kv_TL, [cfg.kv_lora_rank], axis=-1)
    return {"q_nope": q_nope_THN, "q_rope": q_rope_THR, "kv_latent": kv_latent_TC, "k_rope": k_rope_TR}


def attention_core(w, cfg, name, q, cache):
    """The page keeps no log-sum-exp."""
    k_SJL, scale, (T, S) = cache[:, None], dsv3.softmax_scale(cfg), (len(q), len(cache))
    o_THL = dsv3.attention_in_pieces(q, k_SJL, k_SJL, scale)
    score_THS = scale * dsv3.wide(q @ cache.T)
    visible_TS = np.arange(S) <= np.arange(S - T, S)[:, None]
    lse_TH = np.logaddexp.reduce(np.where(visible_TS[:, None], score_THS, -np.inf), axis=-1)
    return {"o": o_THL[..., : cfg.kv_lora_rank], "lse": lse_TH}


def mtp_input(w, cfg, name, h, tokens):
    embedded = dsv3.rms_norm(w["model.embed_tokens.weight"][tokens], w, f"{name}.enorm", cfg.rms_norm_eps)
    state = dsv3.rms_norm(h, w, f"{name}.hnorm", cfg.rms_norm_eps)
    return dsv3.linear(np.concatenate([embedded, state], axis=-1), w, f"{name}.eh_proj")


def fp8_linear(x, matrix, config, dtype):
    """As the release multiplies, which the page does not: codes times codes, then both scales. x (T, X)."""
    matrix.scale, scale = np.ones_like(matrix.scale), matrix.scale
    tiles = x.astype(np.float32).reshape(len(x), -1, cases.BLOCK)
    x_scale = np.maximum(np.abs(tiles).max(-1), np.float32(1e-4)) / np.float32(448)
    if config["quantization_config"].get("scale_fmt") == "ue8m0":
        x_scale = np.exp2(np.ceil(np.log2(x_scale)))
    code = cases.from_fp8(cases.e4m3((tiles / x_scale[..., None]).reshape(x.shape).astype(np.float64)), None)
    y, rows = np.zeros((len(x), len(matrix.whole())), dtype), matrix.whole()
    for i in range(x_scale.shape[1]):
        columns = slice(i * cases.BLOCK, (i + 1) * cases.BLOCK)
        part = code[:, columns].astype(dtype) @ rows[:, columns].T.astype(dtype)
        y += part * x_scale[:, i : i + 1] * scale[:, i].repeat(cases.BLOCK)[: len(rows)]
    return {"y": y, "x_scale": x_scale}


class Numbers:
    """In place of a random generator: a given number for each question."""

    def __init__(self, first, second):
        self.random, self.second = lambda: first, second

    def choice(self, n, p):
        return np.searchsorted(np.cumsum(p), self.second, side="right")


def verify(p, q, draft, uniform):
    rows = [dsv3.verify(a, b, d, Numbers(*u)) for a, b, d, u in zip(p, q, draft, uniform, strict=True)]
    accepted, token = np.array(rows, np.int64).T.copy()
    return {"accepted": accepted, "token": token}


COMPONENTS = {f.__name__: f for f in (rope, router, mla, block, mla_prologue, attention_core, mtp_input)} | {
    "rms_norm": lambda w, cfg, name, x: dsv3.rms_norm(x, w, f"{name}.input_layernorm", cfg.rms_norm_eps),
    "experts": lambda w, cfg, name, x, indices, weights:
        dsv3.moe_chosen(x, w, f"{name}.mlp", indices, weights, cfg),
    "moe": lambda w, cfg, name, x: dsv3.moe(x, w, f"{name}.mlp", cfg, dsv3.moe_chosen)}  # fmt: skip
DO = {f.__name__: f for f in (trace, generate, losses, phases, update_bias, dequantize, component)}


def answer(directory, request):
    """What a request asks for -> {name: array}"""
    given = {key: value for key, value in request.items() if key not in ("do", "dtype")}
    return DO[request["do"]](Path(directory), np.dtype(request["dtype"]), **given)


def main(directory):
    request = json.loads((directory / "request.json").read_text())
    lacks = [what for what in (request["do"], request["dtype"]) if what not in (*DO, "float64", "float32", "float16")]
    if lacks:
        print(f"this port has no {lacks[0]}", file=sys.stderr)
        return 3  # "I lack this": the case is skipped
    dsv3.write_trace(directory / "answer.safetensors", answer(directory, request))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
