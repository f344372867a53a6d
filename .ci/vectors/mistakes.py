"""Mistakes that ports make: each is the page with some of its functions replaced. They name what compare.py finds, and
show that the cases find them.

    python .ci/vectors/mistakes.py     # the table: the mistake, where it shows first, the cases that show it

A mistake is planted by a function that returns {name in deepseek_v3.py: what to put there}.
"""

import contextlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "weights" / "vectors")]
import cases  # noqa: E402
import compare  # noqa: E402
import port  # noqa: E402

import deepseek_v3 as dsv3  # noqa: E402


class Mistake(NamedTuple):
    plant: object  # () -> {name: replacement}
    cases: list  # that must fail; the first one shows it at `where`
    where: str  # the part of the layer, or the array


MISTAKES = {}


def mistake(what, where, cases):
    """A decorator: the function's replacements are the mistake `what`."""

    def add(plant):
        MISTAKES[what] = Mistake(plant, cases.split(), where)
        return plant

    return add


@contextlib.contextmanager
def planted(what):
    """deepseek_v3.py makes the mistake within this block."""
    new = MISTAKES[what].plant()
    old = {name: getattr(dsv3, name) for name in new}
    try:
        vars(dsv3).update(new)
        yield
    finally:
        vars(dsv3).update(old)


def config(change):
    """Another configuration is read; change(cfg) -> the fields that change."""
    read = dsv3.read_config

    def wrong(path):
        cfg = read(path)
        return replace(cfg, **change(cfg))

    return {"read_config": wrong}


def yarn(change):
    """The same of YaRN's numbers; change(yarn) -> the fields that change."""
    def fields(cfg):
        return {"rope_scaling": cfg.rope_scaling and replace(cfg.rope_scaling, **change(cfg.rope_scaling))}

    return config(fields)


def tensors(part, change):
    """Other weights are read: change(x, cfg), for all tensors whose names end with part."""

    class Wrong(dsv3.Checkpoint):
        def __getitem__(self, name):
            x = super().__getitem__(name)
            if not name.endswith(part):
                return x
            return change(x.whole() if isinstance(x, dsv3.Stored) else x, self.cfg)

    return {"Checkpoint": Wrong}


def recorded_instead(name, x):
    """What was recorded last under this name was right: this is the mistake's."""
    if dsv3.recorded is not None:
        dsv3.recorded[name][-1] = x


def simple(where, cases, table):
    """Mistakes that share a place and need one line each: {what: plant}"""
    for what, plant in table.items():
        mistake(what, where, cases)(plant)


# ---- Embedding, norms, MLPs, residuals -----------------------------------------------------------------------------


def norm(wrong):
    """wrong(x, weight, eps), x in float32 or better."""

    def rms_norm(x, w, name, eps):
        return wrong(dsv3.wide(x), w[f"{name}.weight"], eps).astype(x.dtype)

    return {"rms_norm": rms_norm}


def right_norm(x, weight, eps):
    return RIGHT_NORM(x, {"norm.weight": weight}, "norm", eps)


RIGHT_NORM = dsv3.rms_norm


def mean_square(x):
    return np.mean(x * x, axis=-1, keepdims=True)


simple("input_layernorm", "eps", {
    "eps is left out of the norms": lambda: norm(lambda x, weight, eps: x / np.sqrt(mean_square(x)) * weight),
    "eps stands outside the root": lambda: norm(lambda x, weight, eps: x / (np.sqrt(mean_square(x)) + eps) * weight),
    "eps is 1e-6 whatever rms_norm_eps says": lambda: config(lambda cfg: {"rms_norm_eps": 1e-6}),
    "eps bounds the mean square from below":
        lambda: norm(lambda x, weight, eps: x / np.sqrt(np.maximum(mean_square(x), eps)) * weight),
})  # fmt: skip
simple("input_layernorm", "v3_yarn one_token", {
    "the norms' weights are 1 + what is stored": lambda: norm(lambda x, weight, eps: right_norm(x, 1 + weight, eps)),
    "the norms subtract the mean": lambda: norm(
        lambda x, weight, eps: right_norm(x - x.mean(axis=-1, keepdims=True), weight, eps)),
    "the norms divide by the root of the sum": lambda: norm(
        lambda x, weight, eps: right_norm(x, weight, eps) / math.sqrt(x.shape[-1])),
    "the norms' weights are not applied": lambda: norm(lambda x, weight, eps: right_norm(x, np.ones_like(weight), eps)),
})  # fmt: skip


@mistake("the norms round once, after the weight", "input_layernorm", "half")
def _():
    return norm(lambda x, weight, eps: right_norm(x, dsv3.wide(weight), eps))


@mistake("input_layernorm and post_attention_layernorm are swapped", "input_layernorm", "v3_yarn")
def _():
    names = "input_layernorm", "post_attention_layernorm"

    class Wrong(dsv3.Checkpoint):
        def __getitem__(self, name):
            for a, b in (names, names[::-1]):
                if a in name:
                    return super().__getitem__(name.replace(a, b))
            return super().__getitem__(name)

    return {"Checkpoint": Wrong}


@mistake("embeddings are multiplied by the root of hidden_size", "model.embed_tokens", "v3_yarn")
def _():
    return tensors("embed_tokens.weight", lambda x, cfg: x * math.sqrt(cfg.hidden_size))


def activation(wrong):
    """wrong(gate, up) in the MLPs."""

    def swiglu(x, w, name, linear=dsv3.linear):
        gate, up = (linear(x, w, f"{name}.{part}_proj") for part in ("gate", "up"))
        return linear(wrong(gate, up), w, f"{name}.down_proj")

    return {"swiglu": swiglu}


simple("mlp", "v3_yarn", {
    "gate_proj and up_proj are swapped": lambda: activation(lambda gate, up: dsv3.silu(up) * gate),
    "gelu in place of silu": lambda: activation(
        lambda gate, up: 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up),
    "a sigmoid in place of silu": lambda: activation(lambda gate, up: dsv3.sigmoid(gate) * up),
    "silu of gate times up": lambda: activation(lambda gate, up: dsv3.silu(gate * up)),
})  # fmt: skip


def passed_on(attend=None, experts=None):
    """`block` hands on a wrong one in place of mla_naive or moe_all, which are default arguments."""
    right, naive, everyone = dsv3.block, dsv3.mla_naive, dsv3.moe_all

    def block(x_TD, w, layer, cfg, rotation_TP, attend_given=naive, experts_given=everyone):
        a = attend if attend and attend_given is naive else attend_given
        e = experts if experts and experts_given is everyone else experts_given
        return right(x_TD, w, layer, cfg, rotation_TP, a, e)

    return {"block": block}


def block(before_mlp=lambda x, a, normed: x + a, after_mlp=lambda x, y: x + y):
    """The page's block, with other residuals: of x and the attention's result, then of that and the MLP's."""

    def wrong(x_TD, w, layer, cfg, rotation_TP, attend=dsv3.mla_naive, experts=dsv3.moe_all):
        name, eps = f"model.layers.{layer}", cfg.rms_norm_eps
        normed_TD = dsv3.rms_norm(x_TD, w, f"{name}.input_layernorm", eps)
        dsv3.record(f"{name}.input_layernorm", normed_TD)
        a_TD = dsv3.mla(normed_TD, w, f"{name}.self_attn", cfg, rotation_TP, attend)
        x_TD = before_mlp(x_TD, a_TD, normed_TD)
        normed_TD = dsv3.rms_norm(x_TD, w, f"{name}.post_attention_layernorm", eps)
        dsv3.record(f"{name}.post_attention_layernorm", normed_TD)
        dense = layer < cfg.first_k_dense_replace
        mlp = dsv3.swiglu if dense else lambda *args: dsv3.moe(*args, cfg, experts)
        y_TD = mlp(normed_TD, w, f"{name}.mlp")
        dsv3.record(f"{name}.mlp", y_TD)
        x_TD = after_mlp(x_TD, y_TD)
        dsv3.record(name, x_TD)
        return x_TD

    return {"block": wrong}


simple("post_attention_layernorm", "v3_yarn", {
    "no residual around the attention": lambda: block(before_mlp=lambda x, a, normed: a),
    "the attention's residual is the normed x": lambda: block(before_mlp=lambda x, a, normed: normed + a),
})  # fmt: skip
simple("model.layers.0", "v3_yarn", {
    "no residual around the MLP": lambda: block(after_mlp=lambda x, y: y),
})  # fmt: skip
simple("model.norm", "v3_yarn one_token", {
    "model.norm is left out": lambda: final_norm(lambda h, w, cfg, last: last),
    "model.norm is applied twice": lambda: final_norm(
        lambda h, w, cfg, last: dsv3.rms_norm(h, w, "model.norm", cfg.rms_norm_eps)),
})  # fmt: skip


def watched_block(last):
    """The page's block; the last layer's result stays in `last`."""
    right = dsv3.block

    def block(*args):
        last[:] = [right(*args)]
        return last[0]

    return block


def final_norm(wrong):
    """wrong(h, w, cfg, the state before model.norm)"""
    right, last = dsv3.forward, []

    def forward(token_T, w, cfg, *args, **named):
        h_TD = wrong(right(token_T, w, cfg, *args, **named), w, cfg, last[0])
        recorded_instead("model.norm", h_TD)
        return h_TD

    return {"forward": forward, "block": watched_block(last)}


@mistake("the head is the embedding, as if they were tied", "lm_head", "v3_yarn")
def _():
    return {"head": lambda h_TD, w: h_TD @ w["model.embed_tokens.weight"].T}


# ---- Rotation and YaRN ---------------------------------------------------------------------------------------------


def turned(wrong, magnitude=lambda cfg: 1.0):
    """wrong(positions (T,), cfg) -> angles (T, P)."""

    def rotations(start, T, cfg, dtype):
        angle_TP = wrong(np.arange(start, start + T), cfg)
        return (magnitude(cfg) * np.exp(1j * angle_TP)).astype(np.result_type(dtype, np.complex64))

    return {"rotations": rotations}


def angles(pos_T, cfg):
    return pos_T[:, None] * dsv3.rope_frequencies(cfg)


def frequencies(wrong):
    return {"rope_frequencies": wrong}


def ramp(low_high):
    """YaRN's frequencies with another range of pairs; low_high(low, high, cfg), these not rounded yet."""

    def wrong(cfg):
        R, it = cfg.qk_rope_head_dim, cfg.rope_scaling
        freq_P = cfg.rope_theta ** -(np.arange(0, R, 2) / R)
        if it is None:
            return freq_P
        turns = np.array([it.beta_fast, it.beta_slow])
        ends = R * np.log(it.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(cfg.rope_theta))
        low, high = low_high(*ends, cfg)
        ramp_P = np.clip((np.arange(freq_P.size) - low) / ((high - low) or 0.001), 0, 1)
        return freq_P * (1 - ramp_P) + freq_P / it.factor * ramp_P

    return frequencies(wrong)


def rounded(low, high, cfg, top):
    return max(math.floor(low), 0), min(math.ceil(high), top)


def rotation(wrong):
    """wrong(x, rotation) for rope."""
    return {"rope": wrong}


RIGHT_ROPE = dsv3.rope


def backwards(x, rotation):
    return RIGHT_ROPE(x, rotation.conj())


def as_it_is(x, rotation):
    return x


def halves(x, rotation):
    a, b = np.split(dsv3.wide(x), 2, axis=-1)
    z = (a + 1j * b) * rotation
    return np.concatenate([z.real, z.imag], axis=-1).astype(x.dtype)


simple("self_attn.q_rope", "v3_yarn", {
    "RoPE pairs the elements of two halves, not neighbours": lambda: rotation(halves),
    "RoPE turns the other way": lambda: rotation(backwards),
    "nothing is rotated": lambda: rotation(as_it_is),
    "positions count from 1": lambda: turned(lambda pos, cfg: angles(pos + 1, cfg)),
    "frequencies are theta^(-j/R)": lambda: frequencies(
        lambda cfg: cfg.rope_theta ** -(np.arange(cfg.qk_rope_head_dim // 2) / cfg.qk_rope_head_dim)),
    "frequencies are kept in bfloat16": lambda: bf16_frequencies(),
})  # fmt: skip


def bf16_frequencies():
    right = dsv3.rope_frequencies

    def wrong(cfg):
        bits = right(cfg).astype(np.float32).view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32).astype(np.float64)

    return frequencies(wrong)


def one_rotation(part, wrong):
    """wrong(x, rotation) for the queries alone (3 axes) or the keys alone (2)."""
    axes = {"query": 3, "key": 2}[part]
    return {"rope": lambda x, rotation: (wrong if x.ndim == axes else RIGHT_ROPE)(x, rotation)}


simple("self_attn.q_rope", "v3_yarn", {
    "queries are rotated the other way": lambda: one_rotation("query", backwards),
    "queries are not rotated": lambda: one_rotation("query", as_it_is),
})  # fmt: skip
simple("self_attn.k_rope", "v3_yarn", {
    "keys are rotated the other way": lambda: one_rotation("key", backwards),
    "keys are not rotated": lambda: one_rotation("key", as_it_is),
})  # fmt: skip


@mistake("YaRN is off for the queries alone", "self_attn.q_rope", "v3_yarn")
def _():
    right, right_query, plain = dsv3.rotations, dsv3.mla_query, []

    def rotations(start, T, cfg, dtype):
        plain[:] = [right(start, T, replace(cfg, rope_scaling=None), dtype)]
        return right(start, T, cfg, dtype)

    def query(x_TD, w, name, cfg, rotation_TP):
        return right_query(x_TD, w, name, cfg, plain[0])

    return {"rotations": rotations, "mla_query": query}


simple("self_attn.q_rope", "v3_yarn", {
    "YaRN is off": lambda: frequencies(lambda cfg: cfg.rope_theta ** -(np.arange(0, cfg.qk_rope_head_dim, 2)
                                                                        / cfg.qk_rope_head_dim)),
    "all frequencies are divided by YaRN's factor": lambda: frequencies(
        lambda cfg: cfg.rope_theta ** -(np.arange(0, cfg.qk_rope_head_dim, 2) / cfg.qk_rope_head_dim)
        / (cfg.rope_scaling.factor if cfg.rope_scaling else 1)),
    "YaRN's range is not rounded to whole pairs": lambda: ramp(
        lambda low, high, cfg: (max(low, 0), min(high, cfg.qk_rope_head_dim - 1))),
    "beta_fast and beta_slow are swapped": lambda: yarn(
        lambda it: {"beta_fast": it.beta_slow, "beta_slow": it.beta_fast}),
    "YaRN slows the fast pairs and keeps the slow ones": lambda: reversed_ramp(),
    "YaRN's original context is taken for max_position_embeddings": lambda: config(
        lambda cfg: {"rope_scaling": cfg.rope_scaling and replace(
            cfg.rope_scaling, original_max_position_embeddings=cfg.max_position_embeddings)}),
    "cos and sin carry YaRN's m": lambda: turned(angles, lambda cfg: mscale_squared(cfg) ** 0.5),
})  # fmt: skip


def reversed_ramp():
    right = dsv3.rope_frequencies

    def wrong(cfg):
        if cfg.rope_scaling is None:
            return right(cfg)
        plain = right(replace(cfg, rope_scaling=None))
        return plain + plain / cfg.rope_scaling.factor - right(cfg)

    return frequencies(wrong)


simple("self_attn.q_rope", "yarn_range", {
    "YaRN's range is held at the last pair": lambda: ramp(
        lambda low, high, cfg: rounded(low, high, cfg, cfg.qk_rope_head_dim // 2 - 1)),
})  # fmt: skip
simple("self_attn", "yarn_crossing", {
    "YaRN begins only beyond the original context": lambda: dynamic_yarn(),
})  # fmt: skip


def dynamic_yarn():
    def wrong(pos_T, cfg):
        plain, slow = dsv3.rope_frequencies(replace(cfg, rope_scaling=None)), dsv3.rope_frequencies(cfg)
        it = cfg.rope_scaling
        far_T = pos_T >= (it.original_max_position_embeddings if it else 0)
        return pos_T[:, None] * np.where(far_T[:, None], slow, plain)

    return turned(wrong)


simple("self_attn.q_rope", "hf5_spelling moonlight", {
    "rope_theta is 10,000 whatever the configuration says": lambda: config(lambda cfg: {"rope_theta": 10000.0}),
})  # fmt: skip
simple("cos", "phases", {
    "angles are computed in float32": lambda: turned(
        lambda pos, cfg: np.float64(np.float32(pos)[:, None] * np.float32(dsv3.rope_frequencies(cfg)))),
})  # fmt: skip


# ---- Attention -----------------------------------------------------------------------------------------------------


def scale(wrong):
    return {"softmax_scale": wrong}


def mscale_squared(cfg):
    it = cfg.rope_scaling
    return (0.1 * it.mscale * math.log(it.factor) + 1) ** 2 if it else 1


def head_dim(cfg):
    return cfg.qk_nope_head_dim + cfg.qk_rope_head_dim


simple("self_attn", "v3_yarn mscale_707", {
    "the softmax scale lacks mscale^2": lambda: scale(lambda cfg: head_dim(cfg) ** -0.5),
    "the softmax scale has mscale, not its square": lambda: scale(
        lambda cfg: head_dim(cfg) ** -0.5 * mscale_squared(cfg) ** 0.5),
    "the softmax scale has mscale^2 twice": lambda: scale(lambda cfg: head_dim(cfg) ** -0.5 * mscale_squared(cfg) ** 2),
    "the softmax scale is 1 / sqrt(qk_nope_head_dim)": lambda: scale(
        lambda cfg: cfg.qk_nope_head_dim**-0.5 * mscale_squared(cfg)),
    "the softmax scale is 1 / sqrt(v_head_dim)": lambda: scale(lambda cfg: cfg.v_head_dim**-0.5 * mscale_squared(cfg)),
    "the softmax scale is that of the absorbed keys": lambda: scale(
        lambda cfg: (cfg.kv_lora_rank + cfg.qk_rope_head_dim) ** -0.5 * mscale_squared(cfg)),
    "the softmax scale is left out": lambda: scale(lambda cfg: 1.0),
})  # fmt: skip
def first_rows_last(x, heads, n):
    """In each head the first n rows go behind the others."""
    return np.roll(x.reshape(heads, len(x) // heads, -1), -n, axis=1).reshape(x.shape)


def all_heads_at_once(x, heads, n):
    """What a split finds that takes n rows for each of all heads first, then the rest of all heads."""
    first, rest = x[: heads * n].reshape(heads, n, -1), x[heads * n :].reshape(heads, len(x) // heads - n, -1)
    return np.concatenate([first, rest], axis=1).reshape(x.shape)


def heads_last(x, heads):
    """The heads' rows as if each element stood for all heads side by side."""
    return x.reshape(-1, heads, x.shape[-1]).swapaxes(0, 1).reshape(x.shape)


Q_UP = ("q_b_proj.weight", "q_proj.weight")
simple("self_attn.q_rope", "v3_yarn", {
    "the heads of q are read as [rope ; nope]": lambda: tensors(
        Q_UP, lambda x, cfg: first_rows_last(x, cfg.num_attention_heads, cfg.qk_rope_head_dim)),
    "q is split over all heads at once": lambda: tensors(
        Q_UP, lambda x, cfg: all_heads_at_once(x, cfg.num_attention_heads, cfg.qk_nope_head_dim)),
    "q's rows are read with the heads last": lambda: tensors(
        Q_UP, lambda x, cfg: heads_last(x, cfg.num_attention_heads)),
})  # fmt: skip
simple("self_attn.kv_latent", "v3_yarn", {
    "kv_a_proj_with_mqa is read as [k_R ; c_KV]": lambda: tensors(
        "kv_a_proj_with_mqa.weight", lambda x, cfg: np.roll(x, -cfg.qk_rope_head_dim, axis=0)),
    "the norm on c_KV reaches over k_R": lambda: latent(lambda c, k, weight, cfg: (
        c / np.sqrt(mean_square(np.concatenate([c, k], axis=-1)) + dsv3.LATENT_EPS) * weight, k)),
    "c_KV is not normed": lambda: latent(lambda c, k, weight, cfg: (c, k)),
    "c_KV is normed without its weight": lambda: latent(
        lambda c, k, weight, cfg: (right_norm(c, np.ones_like(weight), dsv3.LATENT_EPS), k)),
})  # fmt: skip
simple("self_attn.k_rope", "v3_yarn", {
    "k_R is normed": lambda: latent(lambda c, k, weight, cfg: (
        right_norm(c, weight, dsv3.LATENT_EPS), right_norm(k, np.ones_like(k[0]), dsv3.LATENT_EPS))),
})  # fmt: skip
simple("self_attn", "v3_yarn", {
    "the heads of kv_b_proj are read as [v ; k]": lambda: tensors(
        "kv_b_proj.weight", lambda x, cfg: first_rows_last(x, cfg.num_attention_heads, cfg.v_head_dim)),
    "kv_b_proj is split over all heads at once": lambda: tensors(
        "kv_b_proj.weight", lambda x, cfg: all_heads_at_once(x, cfg.num_attention_heads, cfg.qk_nope_head_dim)),
    "kv_b_proj's rows are read with the heads last": lambda: tensors(
        "kv_b_proj.weight", lambda x, cfg: heads_last(x, cfg.num_attention_heads)),
    "o_proj takes the heads' elements in another order": lambda: tensors(
        "o_proj.weight", lambda x, cfg: heads_last(x.T, cfg.num_attention_heads).T),
    "k_R is the first head's alone": lambda: expanded(
        lambda k, v, cfg: (
            k * (np.arange(k.shape[1])[:, None] * (np.arange(k.shape[2]) >= cfg.qk_nope_head_dim) == 0), v)),
    "keys are joined as [rope ; nope], queries as [nope ; rope]": lambda: expanded(
        lambda k, v, cfg: (np.roll(k, cfg.qk_rope_head_dim, axis=-1), v)),
    "k_R is left out of the keys": lambda: expanded(
        lambda k, v, cfg: (k * (np.arange(k.shape[2]) < cfg.qk_nope_head_dim), v)),
})  # fmt: skip


def latent(wrong):
    """wrong(c, k_R before its rotation, the norm's weight, cfg) -> both, c as it enters the cache."""

    def mla_latent(x_TD, w, name, cfg, rotation_TP):
        kv_TL, C = dsv3.linear(x_TD, w, f"{name}.kv_a_proj_with_mqa"), cfg.kv_lora_rank
        c_TC, k_TR = wrong(kv_TL[:, :C], kv_TL[:, C:], w[f"{name}.kv_a_layernorm.weight"], cfg)
        k_TR = dsv3.rope(k_TR, rotation_TP)
        dsv3.record(f"{name}.kv_latent", c_TC)
        dsv3.record(f"{name}.k_rope", k_TR)
        return np.concatenate([c_TC, k_TR], axis=-1).astype(x_TD.dtype)

    return {"mla_latent": mla_latent}


def query(wrong):
    """wrong(c, the norm's weight, cfg) -> what q_b_proj reads."""

    def mla_query(x_TD, w, name, cfg, rotation_TP):
        if cfg.q_lora_rank is None:
            q_TX = dsv3.linear(x_TD, w, f"{name}.q_proj")
        else:
            c_TQ = dsv3.linear(x_TD, w, f"{name}.q_a_proj")
            c_TQ = wrong(c_TQ, w[f"{name}.q_a_layernorm.weight"], cfg)
            q_TX = dsv3.linear(c_TQ, w, f"{name}.q_b_proj")
        q_THX = q_TX.reshape(len(x_TD), cfg.num_attention_heads, -1)
        nope, rope = np.split(q_THX, [cfg.qk_nope_head_dim], axis=-1)
        rope = dsv3.rope(rope, rotation_TP[:, None])
        dsv3.record(f"{name}.q_rope", rope)
        return nope, rope

    return {"mla_query": mla_query}


def with_eps(c, weight, cfg):
    return right_norm(c, weight, cfg.rms_norm_eps)


simple("self_attn.q_rope", "v3_yarn", {
    "the queries' latent is not normed": lambda: query(lambda c, weight, cfg: c),
})  # fmt: skip
simple("self_attn.q_rope", "latent_eps", {
    "the norm on the queries' latent takes rms_norm_eps": lambda: query(with_eps),
})  # fmt: skip
simple("self_attn.kv_latent", "latent_eps moonlight", {
    "the norm on c_KV takes rms_norm_eps": lambda: latent(lambda c, k, weight, cfg: (with_eps(c, weight, cfg), k)),
    "the norms on both latents take rms_norm_eps": lambda: query(with_eps) | latent(
        lambda c, k, weight, cfg: (with_eps(c, weight, cfg), k)),
})  # fmt: skip
def expanded(wrong):
    """wrong(k_SHX, v_SHV, cfg), of the keys and values of all heads."""
    right, definition = dsv3.mla_naive, dsv3.attention

    def mla_naive(q_nope, q_rope, kv, w, name, cfg, attention=definition):
        def attend(q, k, v, scale):
            return attention(q, *wrong(k, v, cfg), scale)

        return right(q_nope, q_rope, kv, w, name, cfg, attend)

    return {"mla_naive": mla_naive} | passed_on(attend=mla_naive)


def attending(wrong):
    """wrong(q_THX, k_SHX, v_SHY, scale) for attention, as defined and as computed."""
    right = dsv3.mla_naive

    def attention(q_THX, k_SJX, v_SJY, scale):
        k_SHX, v_SHY = (np.repeat(x, q_THX.shape[1] // x.shape[1], axis=1) for x in (k_SJX, v_SJY))
        return wrong(q_THX, k_SHX, v_SHY, scale).astype(q_THX.dtype)

    def mla_naive(q_nope, q_rope, kv, w, name, cfg, given=None):
        return right(q_nope, q_rope, kv, w, name, cfg, attention)

    return {"attention_in_pieces": attention, "mla_naive": mla_naive} | passed_on(attend=mla_naive)


def visible(wrong):
    """wrong(position of the key (S,), of the query (T, 1), of the first query) -> True where it may look."""

    def attention(q_THX, k_SHX, v_SHY, scale):
        S, T = len(k_SHX), len(q_THX)
        visible_TS = wrong(np.arange(S), np.arange(S - T, S)[:, None], S - T)
        score_HTS = np.where(visible_TS, scale * np.einsum("THX,SHX->HTS", q_THX, k_SHX), -np.inf)
        return np.einsum("HTS,SHY->THY", dsv3.softmax(score_HTS), v_SHY)

    return attending(attention)


simple("self_attn", "v3_yarn long", {
    "no causal mask": lambda: visible(lambda key, query, start: (key >= 0) & (query >= 0)),
    "the mask lets a token see the next one": lambda: visible(lambda key, query, start: key <= query + 1),
    "the mask hides a token from itself": lambda: visible(lambda key, query, start: (key < query) | (key == 0)),
})  # fmt: skip


@mistake("the softmax runs over the heads", "self_attn", "v3_yarn")
def _():
    def attention(q_THX, k_SHX, v_SHY, scale):
        score_TSH = scale * np.einsum("THX,SHX->TSH", q_THX, k_SHX)
        S, T = len(k_SHX), len(q_THX)
        visible_TS = np.arange(S) <= np.arange(S - T, S)[:, None]
        return np.einsum("TSH,SHY->THY", dsv3.softmax(score_TSH) * visible_TS[..., None], v_SHY)

    return attending(attention)


# ---- The cache and the absorbed form -------------------------------------------------------------------------------


def cache(wrong):
    """wrong(kv_TL, name, self) -> what is written in its place."""

    class Wrong(dsv3.Cache):
        def write(self, name, kv_TL):
            return super().write(name, wrong(kv_TL, name, self))

    return {"Cache": Wrong}


simple("self_attn.q_rope", "chunks", {
    "positions start again in each chunk": lambda: turned(
        lambda pos, cfg: angles(pos - pos[0], cfg)),
    "positions of later chunks are one too far": lambda: turned(
        lambda pos, cfg: angles(pos + (pos[0] > 0), cfg)),
})  # fmt: skip
simple("self_attn", "chunks chunks_of_three", {
    "a chunk sees only itself": lambda: visible(lambda key, query, start: (key >= start) & (key <= query)),
    "a chunk sees all of itself": lambda: visible(
        lambda key, query, start: (key <= query) | (key >= start) & (start > 0)),
    "a later chunk's mask begins at 0": lambda: visible(lambda key, query, start: key <= query - start),
    "each chunk is cached one entry too late": lambda: late_cache(),
})  # fmt: skip


def late_cache():
    def wrong(kv_TL, name, self):
        if self.length and len(kv_TL) > 1:
            return np.concatenate([self.layers[name][self.length - 1 : self.length], kv_TL[:-1]])
        return kv_TL

    return cache(wrong)


def absorbed(w_uk=lambda w, cfg: w[:, : cfg.qk_nope_head_dim], w_uv=lambda w, cfg: w[:, cfg.qk_nope_head_dim :],
             keys=lambda kv, cfg: kv, scale=lambda cfg: dsv3.softmax_scale(cfg)):  # fmt: skip
    """The absorbed form, with other matrices, keys, or another scale."""

    right = dsv3.attention

    def wrong(q_nope, q_rope, kv_SL, w, name, cfg):
        C = cfg.kv_lora_rank
        up_HXC = w[f"{name}.kv_b_proj.weight"].reshape(cfg.num_attention_heads, -1, C)
        q_THC = np.einsum("THN,HNC->THC", q_nope, w_uk(up_HXC, cfg))
        q_THL = np.concatenate([q_THC, q_rope], axis=-1)
        o_THC = right(q_THL, keys(kv_SL, cfg)[:, None], kv_SL[:, None, :C], scale(cfg))
        return np.einsum("THC,HVC->THV", o_THC, w_uv(up_HXC, cfg))

    return {"mla_absorbed": wrong}


simple("self_attn", "absorbed absorbed_moonlight", {
    "absorbed: W_UV is read where W_UK is, and the reverse": lambda: absorbed(
        lambda w, cfg: w[:, -cfg.qk_nope_head_dim :], lambda w, cfg: w[:, : -cfg.qk_nope_head_dim]),
    "absorbed: the scale is that of its longer keys": lambda: absorbed(
        scale=lambda cfg: (cfg.kv_lora_rank + cfg.qk_rope_head_dim) ** -0.5 * mscale_squared(cfg)),
    "absorbed: k_R is left out of the scores": lambda: absorbed(
        keys=lambda kv, cfg: kv * (np.arange(kv.shape[-1]) < cfg.kv_lora_rank)),
    "absorbed: all heads take the first one's W_UK": lambda: absorbed(
        lambda w, cfg: np.repeat(w[:1, : cfg.qk_nope_head_dim], len(w), axis=0)),
})  # fmt: skip
simple("self_attn", "absorbed", {
    "absorbed: the scale lacks mscale^2": lambda: absorbed(scale=lambda cfg: head_dim(cfg) ** -0.5),
})  # fmt: skip


# ---- Routing and experts -------------------------------------------------------------------------------------------


def affinities(x_TD, weight_ED, cfg):
    return dsv3.sigmoid(dsv3.wide(x_TD) @ dsv3.wide(weight_ED).T)


def biased(s, b, cfg):
    return s + b


def best_groups(choice, s, b, cfg):
    return dsv3.keep_best_groups(choice, cfg)


def highest(choice, k):
    return dsv3.top_k(choice, k)


def of_the_chosen(s, choice, index, b, cfg):
    return np.take_along_axis(s, index, axis=-1)


def normalised(g, s, cfg):
    return g / (g.sum(-1, keepdims=True) + 1e-20) * cfg.routed_scaling_factor


def routing(score=affinities, choose=biased, groups=best_groups, pick=highest, gate=of_the_chosen, scale=normalised):
    """The page's router, one step of it another."""

    def route(x_TD, w, name, cfg):
        s = score(x_TD, w[f"{name}.gate.weight"].reshape(cfg.n_routed_experts, -1), cfg)
        dsv3.record(f"{name}.gate.scores", s)
        b = dsv3.wide(w[f"{name}.gate.e_score_correction_bias"])
        choice = groups(choose(s, b, cfg), s, b, cfg)
        index = pick(choice, cfg.num_experts_per_tok)
        dsv3.record(f"{name}.gate.indices", index)
        g = scale(gate(s, choice, index, b, cfg), s, cfg)
        dsv3.record(f"{name}.gate.weights", g)
        return index, g

    return {"route": route}


def ranked(rank, mask=-np.inf):
    """Groups by rank(choice (..., G, X), the same of unbiased affinities, cfg); the others' experts get the mask."""

    def groups(choice, s, b, cfg):
        of_group = choice.reshape(len(choice), cfg.n_group, -1)
        best = dsv3.top_k(rank(of_group, s.reshape(of_group.shape), cfg), cfg.topk_group)
        keep = dsv3.one_hot(best, cfg.n_group).any(-2)
        return np.where(keep[..., None], of_group, mask).reshape(choice.shape)

    return routing(groups=groups)


def two_best(x):
    return np.sort(x, axis=-1)[..., -2:].sum(-1)


def last_of_equals(choice, k):
    return choice.shape[-1] - 1 - dsv3.top_k(choice[..., ::-1], k)


def last_of_equal_groups(choice, s, b, cfg):
    of_group = choice.reshape(len(choice), cfg.n_group, -1)
    keep = dsv3.one_hot(last_of_equals(two_best(of_group), cfg.topk_group), cfg.n_group).any(-2)
    return np.where(keep[..., None], of_group, -np.inf).reshape(choice.shape)


simple("mlp.gate.scores", "v3_yarn", {
    "affinities are a softmax": lambda: routing(lambda x, w, cfg: dsv3.softmax(dsv3.wide(x) @ dsv3.wide(w).T)),
    "affinities are not squashed": lambda: routing(lambda x, w, cfg: dsv3.wide(x) @ dsv3.wide(w).T),
})  # fmt: skip
simple("mlp.gate.scores", "half", {
    "the router computes in half precision": lambda: routing(lambda x, w, cfg: dsv3.sigmoid(
        (x @ w.astype(x.dtype).T) if x.dtype == np.float16 else dsv3.wide(x) @ dsv3.wide(w).T).astype(np.float32)),
})  # fmt: skip
simple("mlp.gate.indices", "group_scores", {
    "the bias is not used": lambda: routing(choose=lambda s, b, cfg: s),
    "the bias is subtracted": lambda: routing(choose=lambda s, b, cfg: s - b),
    "a group's score is its best affinity": lambda: ranked(lambda choice, s, cfg: choice.max(-1)),
    "a group's score is the sum of all its affinities": lambda: ranked(lambda choice, s, cfg: choice.sum(-1)),
    "a group's score is from unbiased affinities": lambda: ranked(lambda choice, s, cfg: two_best(s)),
})  # fmt: skip
simple("mlp.gate.indices", "v3_yarn many_groups", {
    "groups are not limited": lambda: routing(groups=lambda choice, s, b, cfg: choice),
})  # fmt: skip
simple("mlp.gate.indices", "negative_bias", {
    "experts of the other groups are masked with 0": lambda: ranked(lambda choice, s, cfg: two_best(choice), 0.0),
})  # fmt: skip
simple("mlp.gate.indices", "ties_experts", {
    "of equal experts the highest index wins": lambda: routing(pick=last_of_equals),
})  # fmt: skip
simple("mlp.gate.indices", "ties_groups", {
    "of equal groups the highest index wins": lambda: routing(groups=last_of_equal_groups),
})  # fmt: skip
simple("mlp.gate.weights", "v3_yarn", {
    "the bias is in the gates": lambda: routing(
        gate=lambda s, choice, index, b, cfg: np.take_along_axis(s + b, index, axis=-1)),
    "gates are not normalised": lambda: routing(scale=lambda g, s, cfg: g * cfg.routed_scaling_factor),
    "gates are normalised over all experts": lambda: routing(
        scale=lambda g, s, cfg: g / s.sum(-1, keepdims=True) * cfg.routed_scaling_factor),
    "gates are a softmax of the chosen affinities": lambda: routing(
        scale=lambda g, s, cfg: dsv3.softmax(g) * cfg.routed_scaling_factor),
    "gates are not scaled": lambda: routing(scale=lambda g, s, cfg: normalised(g, s, cfg) / cfg.routed_scaling_factor),
    "gates are scaled twice": lambda: routing(
        scale=lambda g, s, cfg: normalised(g, s, cfg) * cfg.routed_scaling_factor),
    "gates are scaled before they are normalised": lambda: routing(
        scale=lambda g, s, cfg: g / g.sum(-1, keepdims=True)),
})  # fmt: skip
simple("mlp.gate.weights", "tiny_affinities", {
    "the normalisation's guard is 1e-6": lambda: routing(
        scale=lambda g, s, cfg: g / (g.sum(-1, keepdims=True) + 1e-6) * cfg.routed_scaling_factor),
    "affinities are got back as biased minus bias": lambda: routing(
        gate=lambda s, choice, index, b, cfg: np.take_along_axis((s + b) - b, index, axis=-1)),
})  # fmt: skip


def experts(wrong):
    """wrong(the routed sum, the shared experts' result, cfg) -> their sum."""

    def moe(x_TD, w, name, cfg, experts=dsv3.moe_all):
        index_TK, gate_TK = dsv3.route(x_TD, w, name, cfg)
        routed = experts(x_TD, w, name, index_TK, gate_TK, cfg)
        return wrong(routed, dsv3.swiglu(x_TD, w, f"{name}.shared_experts"), cfg)

    return {"moe": moe}


def routed(wrong):
    """wrong in place of the routed sum, as defined and as computed."""
    return {"moe_chosen": wrong} | passed_on(experts=wrong)


def gate_before(x_TD, w, name, index_TK, gate_TK, cfg):
    y_TD = np.zeros_like(x_TD)
    for e in range(cfg.n_routed_experts):
        gate_T = np.where(index_TK == e, gate_TK, 0).sum(-1).astype(x_TD.dtype)
        y_TD = y_TD + dsv3.swiglu(gate_T[:, None] * x_TD, w, f"{name}.experts.{e}")
    return y_TD


RIGHT_MOE = dsv3.moe_all
simple("mlp", "v3_yarn", {
    "no shared expert": lambda: experts(lambda routed, shared, cfg: routed),
    "no routed experts": lambda: experts(lambda routed, shared, cfg: shared),
    "the shared expert is scaled too": lambda: experts(
        lambda routed, shared, cfg: routed + shared * cfg.routed_scaling_factor),
    "the shared expert is scaled down": lambda: experts(
        lambda routed, shared, cfg: routed + shared / cfg.routed_scaling_factor),
    "gates multiply the experts' inputs": lambda: routed(gate_before),
    "gates go to the chosen experts in another order": lambda: routed(
        lambda x, w, name, index, gate, cfg: RIGHT_MOE(x, w, name, index, gate[:, ::-1], cfg)),
})  # fmt: skip
simple("mlp", "moonlight", {
    "shared experts are averaged": lambda: experts(lambda routed, shared, cfg: routed + shared / cfg.n_shared_experts),
})  # fmt: skip


# ---- Multi-token prediction, losses, balancing, FP8 ----------------------------------------------------------------


def module(join=lambda embedded, state: [embedded, state], token=lambda x, pos: x,
           state=lambda h, w, cfg: h, norms=("enorm", "hnorm"), final="shared_head.norm"):  # fmt: skip
    """The page's MTP module: what is joined, of which tokens, from which state, by which norms; the last norm."""

    def mtp(k, h_TD, token_T, w, cfg, start=0, attend=dsv3.mla_naive, experts=dsv3.moe_all):
        layer = cfg.num_hidden_layers + k - 1
        name, eps, T = f"model.layers.{layer}", cfg.rms_norm_eps, len(token_T)
        embedded = token(w["model.embed_tokens.weight"][token_T], np.arange(start, start + T))
        embedded = dsv3.rms_norm(embedded, w, f"{name}.{norms[0]}", eps)
        hidden = dsv3.rms_norm(state(h_TD, w, cfg), w, f"{name}.{norms[1]}", eps)
        x_TD = dsv3.linear(np.concatenate(join(embedded, hidden), axis=-1), w, f"{name}.eh_proj")
        dsv3.record(f"{name}.eh_proj", x_TD)
        rotation_TP = dsv3.rotations(start, T, cfg, x_TD.dtype)
        x_TD = dsv3.block(x_TD, w, layer, cfg, rotation_TP, attend, experts)
        last = final if final.startswith("model") else f"{name}.{final}"
        return dsv3.rms_norm(x_TD, w, last, eps) if final else x_TD

    return {"mtp": mtp}


def before_the_norm():
    """Module 1 takes what the last layer gave."""
    right, last = dsv3.mtp, []

    def mtp(k, h_TD, *args, **named):
        return right(k, last[0][: len(h_TD)] if k == 1 else h_TD, *args, **named)

    return {"mtp": mtp, "block": watched_block(last)}


simple("eh_proj", "mtp", {
    "MTP joins [state ; embedding]": lambda: module(lambda embedded, state: [state, embedded]),
    "MTP reads the state before model.norm": before_the_norm,
    "MTP swaps enorm and hnorm": lambda: module(norms=("hnorm", "enorm")),
    "MTP masks the embedding at position 0": lambda: module(token=lambda x, pos: x * (pos > 0)[:, None]),
    "MTP norms its state by model.norm again": lambda: module(
        state=lambda h, w, cfg: dsv3.rms_norm(h, w, "model.norm", cfg.rms_norm_eps)),
    "MTP reads the state one token too late": lambda: module(
        state=lambda h, w, cfg: np.roll(h, -1, axis=0)),
})  # fmt: skip
simple("shared_head", "mtp", {
    "MTP ends with model.norm": lambda: module(final="model.norm"),
    "MTP lacks its last norm": lambda: module(final=""),
})  # fmt: skip
simple("model.layers.3.eh_proj", "mtp_depth_2", {
    "MTP module 2 reads module 1's state before its norm": lambda: next_before_norm(),
})  # fmt: skip


def next_before_norm():
    """The state goes on without shared_head.norm, and the head norms it."""
    plain, right_head, made = module(final="")["mtp"], dsv3.head, {}

    def mtp(k, h_TD, token_T, w, cfg, *args, **named):
        y_TD = plain(k, h_TD, token_T, w, cfg, *args, **named)
        name = f"model.layers.{cfg.num_hidden_layers + k - 1}.shared_head.norm"
        made[id(y_TD)] = y_TD, (name, cfg.rms_norm_eps)
        return y_TD

    def head(h_TD, w):
        if id(h_TD) in made:
            h_TD = dsv3.rms_norm(h_TD, w, *made[id(h_TD)][1])
        return right_head(h_TD, w)

    return {"mtp": mtp, "head": head}


@mistake("MTP writes into the last layer's cache", "0/tokens", "generate_mtp_cache generate_mtp")
def _():
    made = []  # in turn the main model's and the module's

    class Wrong(dsv3.Cache):
        def __init__(self, capacity):
            super().__init__(capacity)
            self.main = made.pop() if made else made.append(self)

        def write(self, name, kv_TL):
            if self.main:
                self.layers[name] = list(self.main.layers.values())[-1]
            return super().write(name, kv_TL)

    return {"Cache": Wrong}


simple("0/tokens", "generate_mtp", {
    "all drafts are accepted": lambda: {"verify": lambda p, q, draft, rng: (True, draft)},
})  # fmt: skip
simple("0/drafts", "generate_mtp_small_vocab", {
    "all drafts are rejected": lambda: {"verify": lambda p, q, draft, rng: (False, dsv3.draw(p, rng))},
})  # fmt: skip


def objective(wrong):
    """wrong(parts, T, cfg) changes the losses; the total is made of them again."""
    right = dsv3.training_objective

    def training_objective(w, token_X, cfg, mtp_weight=0.3, balance_weight=1e-4):
        _, parts = right(w, token_X, cfg, mtp_weight, balance_weight)
        parts = dict(parts, average=True)
        wrong(parts, len(token_X) - 1, cfg)
        mtp = sum(parts["mtp"]) / (len(parts["mtp"]) if parts["average"] else 1)
        return parts["main"] + mtp_weight * mtp + balance_weight * parts["balance"], parts

    return {"training_objective": training_objective}


def by_its_terms(parts, T, cfg):
    parts["mtp"] = [loss * T / (T - k) for k, loss in enumerate(parts["mtp"], 1)]


simple("mtp.1", "losses", {"the MTP loss is divided by its T - k terms": lambda: objective(by_its_terms)})
simple("total", "losses", {
    "MTP losses are summed, not averaged": lambda: objective(lambda parts, T, cfg: parts.update(average=False)),
})  # fmt: skip
simple("main", "losses", {
    "the main loss is in bits": lambda: objective(lambda parts, T, cfg: parts.update(main=parts["main"] / math.log(2))),
})  # fmt: skip
simple("balance", "losses", {
    "the balance loss is averaged over layers": lambda: objective(
        lambda parts, T, cfg: parts.update(balance=parts["balance"] / len(parts["load"]))),
    "the balance loss lacks E / K": lambda: objective(lambda parts, T, cfg: parts.update(
        balance=parts["balance"] * cfg.num_experts_per_tok / cfg.n_routed_experts)),
})  # fmt: skip
simple("bias", "update_bias", {
    "an expert with the mean load gets more": lambda: {"update_bias": lambda b, n, gamma: b + gamma * np.where(
        n <= n.mean(), 1, -1)},
    "the biases are centred": lambda: {"update_bias": lambda b, n, gamma: RIGHT_UPDATE(b, n, gamma)
                                       - RIGHT_UPDATE(b * 0, n, gamma).mean()},
    "overloaded experts get more": lambda: {"update_bias": lambda b, n, gamma: b - (RIGHT_UPDATE(b, n, gamma) - b)},
    "the bias moves by the load's error": lambda: {"update_bias": lambda b, n, gamma: b + gamma * (n.mean() - n)},
})  # fmt: skip
RIGHT_UPDATE, RIGHT_DEQUANTIZE = dsv3.update_bias, dsv3.dequantize
simple("weight", "fp8", {
    "FP8 is divided by its scale": lambda: {"dequantize": lambda code, scale: RIGHT_DEQUANTIZE(code, 1 / scale)},
    "FP8's blocks are rows / scales high": lambda: {"dequantize": lambda code, scale: RIGHT_DEQUANTIZE(
        code, np.ones_like(scale)) * scale.repeat(-(-code.shape[0] // scale.shape[0]), 0)[: code.shape[0]].repeat(
        -(-code.shape[1] // scale.shape[1]), 1)[:, : code.shape[1]]},
    "FP8 is read as E4M3FNUZ": lambda: {"dequantize": lambda code, scale: np.where(
        code == 0x80, np.float32(np.nan), np.where(code & 127 == 127, 480 * np.sign(127.5 - code) * RIGHT_DEQUANTIZE(
            code * 0 + 0x38, scale), RIGHT_DEQUANTIZE(code, scale)) / 2).astype(np.float32)},
    "FP8 has no NaN": lambda: {"dequantize": lambda code, scale: np.where(
        code & 127 == 127, 480 * np.sign(127.5 - code) * RIGHT_DEQUANTIZE(code * 0 + 0x38, scale),
        RIGHT_DEQUANTIZE(code, scale)).astype(np.float32)},
    "FP8's scales are transposed": lambda: {"dequantize": lambda code, scale: RIGHT_DEQUANTIZE(code, scale.T)},
    "FP8's last blocks take the scale before": lambda: {"dequantize": lambda code, scale: RIGHT_DEQUANTIZE(
        code, np.concatenate([scale[:-1], scale[-2:-1]]))},
})  # fmt: skip


# ---- The diagnosis -------------------------------------------------------------------------------------------------


def wrong_answer(what, request, directory):
    """What the page answers with a mistake; None if the checkpoint has nothing that it could change."""
    try:
        with planted(what), np.errstate(all="ignore"):
            return port.answer(directory, request)
    except (ArithmeticError, LookupError, ValueError, AttributeError, TypeError):
        return None


def candidates(request, at):
    """The mistakes that a case with such a request shows: first those that show at this array, then the others."""
    index, do = cases.read_index(), request["do"]
    kinds = ("trace", "phases") if do == "trace" else (do,)  # wrong phases show in a trace as well
    goes = [what for what, it in MISTAKES.items() if any(index[name]["do"] in kinds for name in it.cases)]
    here = [what for what in goes if at.endswith(MISTAKES[what].where)]
    return here, [what for what in goes if what not in here]


MANY = 60  # tokens; of longer prompts and texts not all mistakes are tried
suspects, in_vain = {}, []  # the mistakes named so far are tried first; after a few searches in vain there is no other


def diagnose(mine, request, directory, at, names, tolerance=compare.TOLERANCE, answers=wrong_answer):
    """"; as if ..." if the page with one of the mistakes answers the request as `mine` does, at `at` and as far beyond
    as any mistake explains. names: of the expected arrays, in the order of computation."""
    order = list(dict.fromkeys(compare.split(name)[1] for name in names))
    short = request.get("max_tokens", 0) + sum(map(len, request.get("prompts", []))) <= MANY
    here, others = candidates(request, at)
    searches = [list(suspects), here, others if short and len(in_vain) < 5 else []]
    for search in searches:
        reach = {what: explained(mine, answers(what, request, directory), at, order, tolerance) for what in search}
        furthest = max(reach.values(), default=0)
        if furthest:
            found = [what for what in search if reach[what] == furthest]
            suspects.update(dict.fromkeys(found[:3]))
            upto = f", up to {order[furthest]}" if furthest < len(order) else ""
            return f"; as if {' or '.join(found[:3])}{upto}"
    in_vain.append(at)
    return ""


def explained(mine, wrong, at, order, tolerance):
    """Up to which array of the order the page's wrong answer is `mine`, 0 if not even up to the one that departs."""
    if not wrong or at not in wrong:
        return 0
    wrong = {name: compare.numbers(wrong[name]) for base in order for name in wrong if compare.split(name)[1] == base}
    verdict = compare.compare(mine, wrong, tolerance, needed=[])
    end = len(order) if verdict.agrees else order.index(compare.split(verdict.at)[1])
    return end if end > order.index(compare.split(at)[1]) else 0


def main():
    for what, it in MISTAKES.items():
        print(f"{what:66} {it.where:32} {' '.join(it.cases)}")


if __name__ == "__main__":
    main()
