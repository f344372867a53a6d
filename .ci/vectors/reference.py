"""The components of DeepSeek-V3 in torch, from the equations: what `do: component` must give.

Independent of the file under test, which is not imported. In float64 these are the expected values;
with float32 and a rounding they are right kernels of half precision: what such a kernel keeps or
hands on between its products is rounded, what it accumulates is not.

Each is a function of (config, weights, inputs, layer, round) -> {name: array}; weights and inputs
are {name: tensor}. T tokens, S cache entries, H heads, L = kv_lora_rank + qk_rope_head_dim.
"""

import math

import torch

E4M3 = torch.float8_e4m3fn


def exact(x):
    return x


def linear(x, w, name, rnd):
    return rnd(x @ w[f"{name}.weight"].T)


def norm(x, weight, eps, rnd):
    return rnd(rnd(x / (x.square().mean(-1, keepdim=True) + eps).sqrt()) * weight)


def mlp(x, w, name, rnd):
    gate = linear(x, w, f"{name}.gate_proj", rnd)
    up = linear(x, w, f"{name}.up_proj", rnd)
    return linear(rnd(rnd(gate * torch.sigmoid(gate)) * up), w, f"{name}.down_proj", rnd)


def frequencies(cfg):
    """Radians per position of each pair, YaRN as in arXiv:2309.00071, in float64."""
    R, theta, yarn = cfg["qk_rope_head_dim"], cfg["rope_theta"], cfg["rope_scaling"]
    plain = torch.tensor([theta ** (-2 * j / R) for j in range(R // 2)], dtype=torch.float64)
    if yarn is None:
        return plain

    def turns(times):
        length = yarn["original_max_position_embeddings"] / (2 * math.pi * times)
        return R * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(turns(yarn["beta_slow"])), R - 1)
    ramp = ((torch.arange(R // 2, dtype=torch.float64) - low) / ((high - low) or 1e-3)).clamp(0, 1)
    return plain * (1 - ramp) + plain / yarn["factor"] * ramp


def rotated(x, positions, cfg, rnd):
    """x (T, ..., R): the pair (2j, 2j+1) turns by position times frequency j."""
    angle = positions.double().reshape(-1, *[1] * (x.dim() - 1)) * frequencies(cfg)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return rnd(torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2))


def softmax_scale(cfg):
    yarn = cfg["rope_scaling"]
    m = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1 if yarn else 1
    return m * m / math.sqrt(cfg["qk_nope_head_dim"] + cfg["qk_rope_head_dim"])


# ---- The components ------------------------------------------------------------------------------


def rms_norm(cfg, w, given, layer, rnd=exact):
    weight = w[f"model.layers.{layer}.input_layernorm.weight"]
    return {"y": norm(given["x"], weight, cfg["rms_norm_eps"], rnd)}


def rope(cfg, w, given, layer, rnd=exact):
    return {"y": rotated(given["x"], given["positions"], cfg, rnd)}


def router(cfg, w, given, layer, rnd=exact):
    """Never in half precision: only what stands before and behind it may be."""
    name, groups = f"model.layers.{layer}.mlp.gate", cfg["n_group"]
    scores = torch.sigmoid(given["x"] @ w[f"{name}.weight"].T)
    biased = scores + w[f"{name}.e_score_correction_bias"]
    of_group = biased.unflatten(-1, (groups, -1)).sort(-1).values[..., -2:].sum(-1)
    order = of_group.sort(dim=-1, descending=True, stable=True).indices
    lost = order[:, cfg["topk_group"] :, None] == torch.arange(groups)
    lost = lost.any(1).repeat_interleave(biased.shape[-1] // groups, -1)
    order = biased.masked_fill(lost, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    indices = order[:, : cfg["num_experts_per_tok"]]
    chosen = scores.gather(-1, indices)
    weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * cfg["routed_scaling_factor"]
    return {"scores": scores, "indices": indices, "weights": weights}


def experts(cfg, w, given, layer, rnd=exact):
    """The routed sum, in float32 or better, rounded once."""
    x, indices, gates = given["x"], given["indices"], given["weights"]
    total = torch.zeros_like(x)
    for e in indices.unique().tolist():
        token, place = (indices == e).nonzero(as_tuple=True)
        y = mlp(x[token], w, f"model.layers.{layer}.mlp.experts.{e}", rnd)
        total.index_add_(0, token, gates[token, place, None] * y)
    return {"y": rnd(total)}


def moe(cfg, w, given, layer, rnd=exact):
    chosen = router(cfg, w, given, layer)
    routed = experts(cfg, w, given | chosen, layer, rnd)["y"]
    return {"y": rnd(routed + mlp(given["x"], w, f"model.layers.{layer}.mlp.shared_experts", rnd))}


def mla_prologue(cfg, w, given, layer, rnd=exact):
    name, x, C = f"model.layers.{layer}.self_attn", given["x"], cfg["kv_lora_rank"]
    positions = given["start"] + torch.arange(len(x))
    if cfg["q_lora_rank"] is None:
        q = linear(x, w, f"{name}.q_proj", rnd)
    else:
        q = linear(x, w, f"{name}.q_a_proj", rnd)
        q = norm(q, w[f"{name}.q_a_layernorm.weight"], 1e-6, rnd)
        q = linear(q, w, f"{name}.q_b_proj", rnd)
    q = q.unflatten(-1, (cfg["num_attention_heads"], -1))
    kv = linear(x, w, f"{name}.kv_a_proj_with_mqa", rnd)
    N = cfg["qk_nope_head_dim"]
    return {"q_nope": q[..., :N], "q_rope": rotated(q[..., N:], positions, cfg, rnd),
            "kv_latent": norm(kv[:, :C], w[f"{name}.kv_a_layernorm.weight"], 1e-6, rnd),
            "k_rope": rotated(kv[:, C:], positions, cfg, rnd)}  # fmt: skip


def attention_core(cfg, w, given, layer, rnd=exact):
    """Queries (T, H, L) of the last T of S positions; keys are whole entries, values their latents.
    A kernel rounds e^(score - max) before it meets the values, and the sum once."""
    q, cache, C = given["q"], given["cache"], cfg["kv_lora_rank"]
    T, S = len(q), len(cache)
    score = torch.einsum("thl,kl->thk", q, cache) * softmax_scale(cfg)
    later = torch.arange(S) > torch.arange(S - T, S)[:, None]
    score = score.masked_fill(later[:, None], -math.inf)
    largest = score.amax(-1, keepdim=True)
    e = (score - largest).exp()
    total = e.sum(-1, keepdim=True)
    o = torch.einsum("thk,kc->thc", rnd(e), cache[:, :C])
    return {"o": rnd(o / total), "lse": (largest + total.log())[..., 0]}


def mla(cfg, w, given, layer, rnd=exact):
    """Absorbed: W_UK on the query's side, W_UV behind the sum."""
    name, cached = f"model.layers.{layer}.self_attn", given["cache"]
    made = mla_prologue(cfg, w, given | {"start": len(cached)}, layer, rnd)
    up = w[f"{name}.kv_b_proj.weight"].unflatten(0, (cfg["num_attention_heads"], -1))
    w_uk, w_uv = up.split([cfg["qk_nope_head_dim"], cfg["v_head_dim"]], 1)
    q = rnd(torch.einsum("thd,hdc->thc", made["q_nope"], w_uk))
    q = torch.cat([q, made["q_rope"]], -1)
    cache = torch.cat([cached, torch.cat([made["kv_latent"], made["k_rope"]], -1)])
    o = attention_core(cfg, w, {"q": q, "cache": cache}, layer, rnd)["o"]
    o = rnd(torch.einsum("thc,hvc->thv", o, w_uv))
    return {"y": linear(o.flatten(1), w, f"{name}.o_proj", rnd)}


def mtp_input(cfg, w, given, layer, rnd=exact):
    name, eps = f"model.layers.{layer}", cfg["rms_norm_eps"]
    embedded = w["model.embed_tokens.weight"][given["tokens"]]
    embedded = norm(embedded, w[f"{name}.enorm.weight"], eps, rnd)
    state = norm(given["h"], w[f"{name}.hnorm.weight"], eps, rnd)
    return {"y": linear(torch.cat([embedded, state], -1), w, f"{name}.eh_proj", rnd)}


def block(cfg, w, given, layer, rnd=exact):
    name, x, eps = f"model.layers.{layer}", given["x"], cfg["rms_norm_eps"]
    normed = norm(x, w[f"{name}.input_layernorm.weight"], eps, rnd)
    x = rnd(x + mla(cfg, w, {"x": normed, "cache": given["cache"]}, layer, rnd)["y"])
    normed = norm(x, w[f"{name}.post_attention_layernorm.weight"], eps, rnd)
    if layer < cfg["first_k_dense_replace"]:
        return {"y": rnd(x + mlp(normed, w, f"{name}.mlp", rnd))}
    return {"y": rnd(x + moe(cfg, w, {"x": normed}, layer, rnd)["y"])}


def spread(scale, shape):
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def fp8_matrix(w):
    """The one FP8 matrix that a case has: its codes and scales."""
    (name,) = (name for name, x in w.items() if x.dtype == E4M3)
    return w[name], w[f"{name}_scale_inv"]


def dequantize(cfg, w, given, layer, rnd=exact):
    code, scale = fp8_matrix(w)
    return {"weight": rnd(code.to(torch.float32) * spread(scale, code.shape))}


def quantised(x, config):
    """x (T, X) in float32 -> codes, and a scale for each tile of 1 x 128: the largest / 448; for
    "ue8m0", V3.1's, the next power of two. A tile of zeros has the codes 0."""
    tiles = x.to(torch.float32).unflatten(-1, (-1, 128))
    scale = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    if config["quantization_config"].get("scale_fmt") == "ue8m0":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return (tiles / scale).to(E4M3), scale


def fp8_linear(cfg, w, given, layer, rnd=exact):
    """Codes times codes, summed over a tile in float64 (the release: float32), times both scales."""
    code, scale = fp8_matrix(w)
    x, x_scale = quantised(given["x"], cfg)
    y = torch.zeros(len(x), len(code), dtype=torch.float64)
    for i in range(x.shape[1]):
        part = x[:, i].double() @ code[:, 128 * i : 128 * (i + 1)].double().T
        y += part * x_scale[:, i].double() * scale[:, i].double().repeat_interleave(128)[: len(code)]
    return {"y": rnd(y), "x_scale": x_scale[..., 0]}


def verify(cfg, w, given, layer, rnd=exact):
    """Row by row in plain Python: accepted if u q < p, else the first token whose cumulated share
    of max(p - q, 0) exceeds the second uniform number."""
    accepted, tokens = [], []
    rows = (given[name].tolist() for name in ("p", "q", "draft", "uniform"))
    for p, q, draft, (u, second) in zip(*rows, strict=True):
        accepted.append(int(u * q[draft] < p[draft]))
        rest, token, total = [max(a - b, 0) for a, b in zip(p, q, strict=True)], draft, 0.0
        if not accepted[-1]:
            whole = math.fsum(rest)
            for token, share in enumerate(rest):  # noqa: B007
                total += share
                if total > second * whole:
                    break
        tokens.append(token)
    return {"accepted": torch.tensor(accepted), "token": torch.tensor(tokens)}


COMPONENTS = {f.__name__: f for f in (
    rms_norm, rope, router, experts, moe, mla, attention_core, mla_prologue, mtp_input, block,
    dequantize, fp8_linear, verify)}  # fmt: skip
