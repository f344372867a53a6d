# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0", "safetensors>=0.5", "tokenizers>=0.21", "jinja2>=3.1"]
# ///
"""DeepSeek-V3, the whole model in one file: a specification that runs.

    python deepseek_v3.py     tells a story with the small model beside it; --help lists what else it does

Part I (sections 1-7) is, where `cache` is None, the model as the paper *defines* it: equations, nothing cached, nothing
skipped. Part II (section 8) is the same model as generation *computes* it, with a cache; test_deepseek_v3.py shows the
two equal in float64. Part III (sections 9-11) is the program around them.

    component    definition                        computation                          equal because
    attention    mla_naive: keys of every head     mla_absorbed: one shared latent key  q . (W_UK c) = (W_UK^T q) . c
    context      forward, the whole sequence       forward with a Cache, in any chunks  the past never sees the future
    experts      moe_all: the sum over all         moe_computed: the chosen ones alone  the other gates are 0
    generation   one token per pass                MTP drafts, the main model verifies  the rejection rule of section 10

Without a cache, `forward` writes nothing in place and has no shape that depends on data: it also runs under jax.numpy,
in `jit` and `grad` (except `top_k`: JAX spells a stable sort differently). So weights/train.py made the checkpoint.

Equation numbers are those of the technical report (arXiv:2412.19437v2), tensor names those of the released checkpoint,
configuration keys those of its config.json. "HF" is Hugging Face transformers 5.23.0, "official" the code in
deepseek-ai/DeepSeek-V3, inference/ (commit 9b4e978). x is the residual stream, or what a layer reads of it (the paper's
h_t, u_t); h is a state after all layers (h^0, h^k). Capital letters at the end of a name are the axes of an array:
q_BTHX has the shape (B, T, H, X). A test runs the program and checks them.

    B  sequences in the batch               H  num_attention_heads           E  n_routed_experts
    T  tokens of each in this call          N  qk_nope_head_dim              K  num_experts_per_tok
    S  positions looked at, S >= T          R  qk_rope_head_dim              G  n_group
    D  hidden_size                          P  R / 2, pairs that rotate      W  vocab_size
    Q  q_lora_rank (the paper's d_c')       V  v_head_dim                    M  B T, all tokens of the call
    C  kv_lora_rank (d_c)                   J  key heads: H in multi-head    X, Y, Z  any other size
    L  C + R, an entry of the cache            attention, 1 in multi-query
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import safetensors.numpy
import tokenizers

# ==== Part I. The model, as defined =================================================================================

# ---- 1. Arrays -----------------------------------------------------------------------------------------------------
# Everything below is written against one array namespace, chosen once: NumPy, or CuPy on a GPU.

xp = np


class InputError(ValueError):
    """What was given (a checkpoint, a request) cannot be used. The message is one line: what, where, what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


def to_host(x):
    """An array of `xp` as a NumPy array; xp.asarray is the way back."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def wide(x):
    """x in float32 or better: statistics, softmax and routing are never computed in half precision."""
    return x.astype(np.promote_types(x.dtype, np.float32), copy=False)


def top_k(score, k):
    """Indices (..., k) of the k largest of the last axis, largest first. The paper does not say how ties fall: here the
    lowest index wins (unstable choices have made implementations disagree, vLLM #52679 and others)."""
    return xp.argsort(-score, axis=-1, kind="stable")[..., :k]


def one_hot(index, n):
    """Boolean (..., n): where the last axis equals index (...)."""
    return index[..., None] == xp.arange(n)


recorded = None  # a dict while `recording`


def record(name, x):
    """While `recording`, keep x under the name of the module that produced it."""
    if recorded is not None:
        recorded.setdefault(name, []).append(x)


@contextlib.contextmanager
def recording():
    """Yields a dict that, after the block, holds what was recorded in it, {name: array}; pieces of a sequence joined
    along axis 1."""
    global recorded
    recorded = named = {}
    try:
        yield named
    finally:
        recorded = None
    named |= {name: parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=1) for name, parts in named.items()}


# ---- 2. Configuration ----------------------------------------------------------------------------------------------
# The numbers that make one model of the family, with the paper's symbols in the margin. The defaults are DeepSeek-V3.


@dataclass(frozen=True)
class Yarn:
    """YaRN's longer context (section 4.3), `rope_scaling` in config.json, where the first two must be given."""

    factor: float = 40.0  # s
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0  # beta
    beta_slow: float = 1.0  # alpha
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Config:
    """One model; the fields are named as in config.json. Section 9 says for which values a model is defined."""

    vocab_size: int = 129280
    hidden_size: int = 7168  # d
    num_hidden_layers: int = 61
    num_attention_heads: int = 128  # n_h
    q_lora_rank: int | None = 1536  # d_c'; None: queries are not compressed
    kv_lora_rank: int = 512  # d_c
    qk_nope_head_dim: int = 128  # d_h
    qk_rope_head_dim: int = 64  # d_h^R
    v_head_dim: int = 128  # d_h
    attention_bias: bool = False  # on q_a_proj, kv_a_proj_with_mqa and o_proj
    intermediate_size: int = 18432  # of the dense layers
    first_k_dense_replace: int = 3  # layers before this one have no experts
    moe_intermediate_size: int = 2048  # of one expert
    n_shared_experts: int = 1  # N_s
    n_routed_experts: int = 256  # N_r
    num_experts_per_tok: int = 8  # K_r
    scoring_func: str = "sigmoid"  # of the affinities; DeepSeek-V2: softmax
    topk_method: str = "noaux_tc"  # bias and groups; V2: group_limited_greedy (groups), greedy (none)
    n_group: int = 8  # groups of experts, one on each node
    topk_group: int = 4  # how many groups, so nodes, a token may be sent to (the paper's M)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5  # not in eq. (13)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = Yarn(mscale=1.0, mscale_all_dim=1.0)
    rope_interleave: bool = True
    max_position_embeddings: int = 163840
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1  # how many MTP modules (the paper's D)

    def __post_init__(self):
        check_config(self)

    def is_dense(self, layer):
        """Whether a layer has one MLP instead of experts; the MTP modules, past the last layer, always have experts."""
        return layer < min(self.first_k_dense_replace, self.num_hidden_layers)


# ---- 3. Primitives -------------------------------------------------------------------------------------------------
# Linear maps, the norm, the MLP, softmax and the rotation by position are all that the rest is made of.


def linear(x, w, name):
    """The matrix `name.weight` (Y, X) times x (..., X), plus the bias where the checkpoint has one -> (..., Y)."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last axis. The normalised x is rounded to x's dtype before it meets the weight: so
    does HF, while the official code rounds once, after."""
    x_wide = wide(x)
    normed = x_wide / xp.sqrt(xp.mean(x_wide * x_wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype, copy=False) * weight


@np.errstate(over="ignore")  # where e^-x is infinite the result is 0, as it should be
def sigmoid(x):
    """1 / (1 + e^-x), wide, returned in x's dtype."""
    return (1 / (1 + xp.exp(-wide(x)))).astype(x.dtype, copy=False)


@np.errstate(over="ignore")
def silu(x):
    """x sigmoid(x), wide, returned in x's dtype."""
    return (x / (1 + xp.exp(-wide(x)))).astype(x.dtype, copy=False)


def swiglu(x, w, name, linear=linear):
    """An MLP: down_proj(silu(gate_proj(x)) * up_proj(x)). x (..., D) -> (..., D)."""
    gate, up = linear(x, w, f"{name}.gate_proj"), linear(x, w, f"{name}.up_proj")
    return linear(silu(gate) * up, w, f"{name}.down_proj")


def softmax(x):
    """Over the last axis, wide, returned in x's dtype. A row needs one entry above -inf."""
    x_wide = wide(x)
    e = xp.exp(x_wide - xp.max(x_wide, axis=-1, keepdims=True))
    return (e / xp.sum(e, axis=-1, keepdims=True)).astype(x.dtype, copy=False)


def yarn_mscale(factor, mscale):
    """m = 0.1 mscale ln(s) + 1; YaRN multiplies scores by m^2 (section 4.3, for mscale 1; not in eq. (10))."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


@functools.cache
def rope_frequencies(cfg):
    """Radians per position, for each of the P pairs; float64 on the host. Plain RoPE: theta^(-2j/R).

    YaRN keeps the pairs that turn more than beta_fast times within the original context, divides the frequency of those
    that turn less than beta_slow times by the factor, and blends in between. It is static: once configured it holds at
    every position of every prompt, for queries as for keys. (In the official code max_seq_len switches it on.)"""
    R, yarn = cfg.qk_rope_head_dim, cfg.rope_scaling
    freq_P = cfg.rope_theta ** -(np.arange(0, R, 2) / R)
    if yarn is None:
        return freq_P

    def correction_dim(turns):
        """The pair, as a real number, that turns so many times within the original context."""
        length = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return R * math.log(length) / (2 * math.log(cfg.rope_theta))

    low, high = correction_dim(yarn.beta_fast), correction_dim(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)  # R - 1 though there are only P pairs: so HF and the official code
    ramp_P = np.clip((np.arange(freq_P.size) - low) / ((high - low) or 0.001), 0, 1)
    return freq_P * (1 - ramp_P) + freq_P / yarn.factor * ramp_P


def rope_magnitude(cfg):
    """YaRN's factor on cos and sin: m(mscale) / m(mscale_all_dim), 1 in DeepSeek-V3; m(1) if either is absent or 0. The
    official code has no such factor. The softmax scale is another matter, below."""
    if (yarn := cfg.rope_scaling) is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1)


def softmax_scale(cfg):
    """1 / sqrt(d_h + d_h^R) of eq. (10), times YaRN's m(mscale_all_dim)^2, which the paper's equations leave out. (The
    official code takes mscale here, the same number in DeepSeek-V3.)

    >>> round(softmax_scale(Config()) * math.sqrt(128 + 64), 4)
    1.8739
    """
    yarn = cfg.rope_scaling
    m = yarn_mscale(yarn.factor, yarn.mscale_all_dim) if yarn and yarn.mscale_all_dim else 1
    return m**2 / math.sqrt(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)


def rope(x, rotation, interleave=True):
    """Rotate pair j of x, (a, b), by its angle: to (a cos - b sin, a sin + b cos), which is (a + ib) e^(i angle).
    x (..., R), rotation = e^(i angle) (..., P), broadcast.

    In the released weights the pairs are neighbours, (2j, 2j+1). HF reorders queries and keys to halves first, which
    leaves every score as it is but caches a permuted key; `rope_interleave` false means weights stored as halves."""
    if interleave:  # (a, b) lies in memory as a + ib does; a GPU needs it aligned, so N and C even
        z = wide(x).view(np.result_type(x.dtype, np.complex64)) * rotation
        return z.view(z.real.dtype).astype(x.dtype, copy=False)
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    z = (a + 1j * b) * rotation
    return xp.concatenate([z.real, z.imag], axis=-1).astype(x.dtype, copy=False)


# ---- 4. Multi-head latent attention (section 2.1.1) ----------------------------------------------------------------
# Every head's key and value of a token are linear in one small vector, [c_KV ; k_R], so a cache keeps nothing else.

LATENT_EPS = 1e-6  # of the norms on the latents, whatever rms_norm_eps says: so in HF and the official code


class Positions(NamedTuple):
    """Where the tokens of one call stand; padding (id -1) is not real."""

    row_B1: object  # 0 to B - 1: with the next, a token's place in arrays (B, S, ...)
    pos_BT: object
    real_BT: object
    rotation_BTP: object  # e^(i angle), times YaRN's magnitude
    visible_BTS: object  # True where a query may look: position of the key <= position of the query


def positions(token_BT, start_B, cfg, dtype):
    """The Positions of tokens: token t of row b stands at start_B[b] + t; S is the largest start + T. Angles are
    float64 (in JAX with jax_enable_x64): at position 163,839 float32 is off by 5e-3 rad."""
    B, T = token_BT.shape
    start_B = np.zeros(B, int) if start_B is None else np.asarray(start_B)
    pos_BT = xp.asarray(start_B)[:, None] + xp.arange(T)
    angle_BTP = pos_BT[:, :, None] * xp.asarray(rope_frequencies(cfg))
    rotation_BTP = (rope_magnitude(cfg) * xp.exp(1j * angle_BTP)).astype(np.result_type(dtype, np.complex64))
    visible_BTS = xp.arange(int(start_B.max()) + T) <= pos_BT[:, :, None]
    row_B1, real_BT = xp.arange(B)[:, None], xp.asarray(token_BT >= 0)
    return Positions(row_B1, pos_BT, real_BT, rotation_BTP, visible_BTS)


def attention(q_BTHX, k_BSJX, v_BSJY, visible_BTS, scale):
    """Eq. (10), softmax(q . k) v -> (B, T, H, Y). J = H key heads: multi-head attention; J = 1: multi-query; between
    them grouped-query, where query head h reads key head h // (H/J)."""
    H, J = q_BTHX.shape[2], k_BSJX.shape[2]
    k_BSHX, v_BSHY = xp.repeat(k_BSJX, H // J, axis=2), xp.repeat(v_BSJY, H // J, axis=2)
    score_BHTS = scale * xp.einsum("BTHX,BSHX->BHTS", q_BTHX, k_BSHX)
    p_BHTS = softmax(xp.where(visible_BTS[:, None], score_BHTS, -xp.inf))
    return xp.einsum("BHTS,BSHY->BTHY", p_BHTS, v_BSHY)


def mla_query(x_BTD, w, name, cfg, pos):
    """The queries of all heads -> q_nope_BTHN and, rotated, q_rope_BTHR."""
    if cfg.q_lora_rank is None:
        q_BTY = linear(x_BTD, w, f"{name}.q_proj")
    else:
        c_BTQ = linear(x_BTD, w, f"{name}.q_a_proj")  # eq. (6)
        c_BTQ = rms_norm(c_BTQ, w[f"{name}.q_a_layernorm.weight"], LATENT_EPS)  # section 4.2
        q_BTY = linear(c_BTQ, w, f"{name}.q_b_proj")
    q_BTHX = q_BTY.reshape(*x_BTD.shape[:2], cfg.num_attention_heads, -1)  # each head [nope ; rope]
    q_nope_BTHN, q_rope_BTHR = q_BTHX[..., : cfg.qk_nope_head_dim], q_BTHX[..., cfg.qk_nope_head_dim :]  # eq. (7)
    q_rope_BTHR = rope(q_rope_BTHR, pos.rotation_BTP[:, :, None], cfg.rope_interleave)  # eq. (8)
    record(f"{name}.q_rope", q_rope_BTHR)
    return q_nope_BTHN, q_rope_BTHR


def mla_latent(x_BTD, w, name, cfg, pos):
    """What the cache keeps of each token -> kv_BTL = [c_KV ; k_R]. k_R is made from x, not from c_KV, and is one key
    for all heads."""
    kv_BTL = linear(x_BTD, w, f"{name}.kv_a_proj_with_mqa")
    c_BTC, k_rope_BTR = kv_BTL[..., : cfg.kv_lora_rank], kv_BTL[..., cfg.kv_lora_rank :]  # eq. (1)
    c_BTC = rms_norm(c_BTC, w[f"{name}.kv_a_layernorm.weight"], LATENT_EPS)  # section 4.2
    k_rope_BTR = rope(k_rope_BTR, pos.rotation_BTP, cfg.rope_interleave)  # eq. (3)
    record(f"{name}.kv_latent", c_BTC)
    record(f"{name}.k_rope", k_rope_BTR)
    return xp.concatenate([c_BTC, k_rope_BTR], axis=-1)


def mla_naive(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, visible_BTS, attention=attention):
    """Definition: expand the latents to every head's keys and values, then multi-head attention -> (B, T, H, V)."""
    c_BSC, k_rope_BSR = kv_BSL[..., : cfg.kv_lora_rank], kv_BSL[..., cfg.kv_lora_rank :]
    kv_BSHY = linear(c_BSC, w, f"{name}.kv_b_proj").reshape(*c_BSC.shape[:2], cfg.num_attention_heads, -1)
    k_nope_BSHN, v_BSHV = kv_BSHY[..., : cfg.qk_nope_head_dim], kv_BSHY[..., cfg.qk_nope_head_dim :]  # eqs. (2), (5)
    k_rope_BSHR = xp.broadcast_to(k_rope_BSR[:, :, None], (*k_nope_BSHN.shape[:3], cfg.qk_rope_head_dim))
    k_BSHX = xp.concatenate([k_nope_BSHN, k_rope_BSHR], axis=-1)  # eq. (4)
    q_BTHX = xp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)  # eq. (9)
    return attention(q_BTHX, k_BSHX, v_BSHV, visible_BTS, softmax_scale(cfg))


def mla(x_BTD, w, layer, cfg, pos, cache):
    """Multi-head latent attention, eqs. (1)-(11): the definition without a cache, part II's computation with one."""
    name = f"model.layers.{layer}.self_attn"
    q_nope_BTHN, q_rope_BTHR = mla_query(x_BTD, w, name, cfg, pos)
    kv_BTL = mla_latent(x_BTD, w, name, cfg, pos)
    if cache is None:
        o_BTHV = mla_naive(q_nope_BTHN, q_rope_BTHR, kv_BTL, w, name, cfg, pos.visible_BTS)
    else:
        kv_BSL = cache.append(layer, kv_BTL, pos)
        o_BTHV = mla_computed(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, pos.visible_BTS)
    y_BTD = linear(o_BTHV.reshape(*x_BTD.shape[:2], -1), w, f"{name}.o_proj")  # eq. (11)
    record(name, y_BTD)
    return y_BTD


# ---- 5. DeepSeekMoE (section 2.1.2) --------------------------------------------------------------------------------
# Each token chooses a few experts out of many, and a bias that no gradient touches keeps the choices even.


def route(x_BTD, w, name, cfg):
    """Which experts, and with what gates -> index_BTK, best first; gate_BTK in float32 or better.

    The bias enters the choice alone: the gates come from the affinities without it. DeepSeek-V2 (arXiv:2405.04434,
    section 2.2) has softmax affinities, no bias, and groups ranked by their best expert."""
    affinity = sigmoid if cfg.scoring_func == "sigmoid" else softmax
    score_BTE = affinity(linear(wide(x_BTD), w, f"{name}.gate"))  # eq. (15)
    record(f"{name}.gate.scores", score_BTE)
    choice_BTE, noaux_tc = score_BTE, cfg.topk_method == "noaux_tc"
    if noaux_tc:
        choice_BTE = score_BTE + w[f"{name}.gate.e_score_correction_bias"]  # eq. (16), in place of (14)
    if cfg.n_group > 1 and cfg.topk_method != "greedy":
        choice_BTE = keep_best_groups(choice_BTE, 2 if noaux_tc else 1, cfg)
    index_BTK = top_k(choice_BTE, cfg.num_experts_per_tok)
    record(f"{name}.gate.indices", index_BTK)
    gate_BTK = xp.take_along_axis(score_BTE, index_BTK, axis=-1)
    if cfg.norm_topk_prob:
        gate_BTK = gate_BTK / (xp.sum(gate_BTK, axis=-1, keepdims=True) + 1e-20)  # eq. (13); the guard is HF's
    gate_BTK = gate_BTK * cfg.routed_scaling_factor  # always, normalised or not
    record(f"{name}.gate.weights", gate_BTK)
    return index_BTK, gate_BTK


def keep_best_groups(choice_BTE, best, cfg):
    """Node-limited routing: -inf for the experts of all groups except the topk_group ones whose `best` highest (biased)
    affinities sum highest: 2 in V3 (the paper's K_r / topk_group), 1 in V2. Masking with 0, as older code does, lets a
    masked expert win where the kept ones' biased affinities are negative (DeepSeek-V3 #741)."""
    choice_BTGX = choice_BTE.reshape(*choice_BTE.shape[:2], cfg.n_group, -1)
    group_BTG = xp.sum(xp.sort(choice_BTGX, axis=-1)[..., -best:], axis=-1)
    keep_BTG = xp.any(one_hot(top_k(group_BTG, cfg.topk_group), cfg.n_group), axis=-2)
    return xp.where(keep_BTG[..., None], choice_BTGX, -xp.inf).reshape(choice_BTE.shape)


def moe_all(x_BTD, w, name, index_BTK, gate_BTK, cfg):
    """Definition, the routed sum of eq. (12) over *all* experts; the gate of one that was not chosen is 0."""
    y_BTD = xp.zeros_like(x_BTD)
    for e in range(cfg.n_routed_experts):
        gate_BT = xp.sum(xp.where(index_BTK == e, gate_BTK, 0), axis=-1).astype(x_BTD.dtype)
        y_BTD = y_BTD + gate_BT[..., None] * swiglu(x_BTD, w, f"{name}.experts.{e}")
    return y_BTD


def moe(x_BTD, w, name, cfg, cache):
    """Eq. (12) without its residual: the gated routed experts, plus the shared ones, which are one MLP of their joint
    width. The routed sum is the definition without a cache, part II's computation with one."""
    index_BTK, gate_BTK = route(x_BTD, w, name, cfg)
    routed_sum = moe_all if cache is None else moe_computed
    y_BTD = routed_sum(x_BTD, w, name, index_BTK, gate_BTK, cfg)
    if not cfg.n_shared_experts:
        return y_BTD
    shared_BTD = swiglu(x_BTD, w, f"{name}.shared_experts")
    record(f"{name}.shared_experts", shared_BTD)
    return y_BTD + shared_BTD


def expert_load(index_BTK, cfg):
    """How many tokens chose each expert -> (E,)."""
    return xp.sum(one_hot(index_BTK, cfg.n_routed_experts), axis=(0, 1, 2))


def update_bias(bias_E, load_E, gamma):
    """Balancing without an auxiliary loss, after each training step: down by gamma where overloaded, up where
    underloaded, sign(0) = 0. As printed (arXiv:2408.15664, Algorithm 1) the biases are not centred and may drift.

    >>> update_bias(np.zeros(4), np.array([4, 2, 1, 1]), gamma=0.001)
    array([-0.001,  0.   ,  0.001,  0.001])
    """
    return bias_E + gamma * xp.sign(xp.mean(load_E) - load_E).astype(bias_E.dtype)


def max_violation(load_E):
    """MaxVio = (max load - mean load) / mean load (arXiv:2408.15664, eq. 4); 0 is perfect balance.

    >>> float(max_violation(np.array([4, 2, 1, 1])))
    1.0
    """
    return xp.max(load_E) / xp.mean(load_E) - 1


def balance_loss(score_BTE, cfg):
    """The sequence-wise balance loss without alpha, averaged over the batch.

    As printed: f counts the plain top K_r affinities, with neither bias nor group limit; it carries no gradient."""
    K, E = cfg.num_experts_per_tok, cfg.n_routed_experts
    chosen_BTE = xp.sum(one_hot(top_k(score_BTE, K), E), axis=-2)
    f_BE = xp.mean(chosen_BTE, axis=1) * (E / K)  # eq. (18)
    p_BE = xp.mean(score_BTE / xp.sum(score_BTE, axis=-1, keepdims=True), axis=1)  # eqs. (19), (20)
    return xp.mean(xp.sum(f_BE * p_BE, axis=-1))  # eq. (17)


# ---- 6. The model --------------------------------------------------------------------------------------------------
# Blocks of attention and MLP on a residual stream, each behind a norm; the first few MLPs are dense.


def block(x_BTD, w, layer, cfg, pos, cache):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""
    name = f"model.layers.{layer}"
    normed_BTD = rms_norm(x_BTD, w[f"{name}.input_layernorm.weight"], cfg.rms_norm_eps)
    record(f"{name}.input_layernorm", normed_BTD)
    x_BTD = x_BTD + mla(normed_BTD, w, layer, cfg, pos, cache)
    normed_BTD = rms_norm(x_BTD, w[f"{name}.post_attention_layernorm.weight"], cfg.rms_norm_eps)
    record(f"{name}.post_attention_layernorm", normed_BTD)
    if cfg.is_dense(layer):
        y_BTD = swiglu(normed_BTD, w, f"{name}.mlp")
    else:
        y_BTD = moe(normed_BTD, w, f"{name}.mlp", cfg, cache)
    record(f"{name}.mlp", y_BTD)
    x_BTD = x_BTD + y_BTD
    record(name, x_BTD)
    return x_BTD


def forward(token_BT, w, cfg, cache=None, start_B=None):
    """Token ids to the main model's states h^0 (B, T, D), after `model.norm`; `head` turns states into logits.

    w: a mapping of tensor names to arrays of `xp`; their dtype is the dtype of the computation. Without a cache: the
    definition, of whole sequences from position 0. With one: the T tokens of row b continue what the cache holds before
    position start_B[b] (0 by default), and enter it. Shorter rows are padded on the right with -1. Padding reads the
    last embedding, is seen by no token before it, and is cached as zeros until the row's next tokens overwrite them."""
    embedding_WD = w["model.embed_tokens.weight"]
    pos = positions(token_BT, start_B, cfg, embedding_WD.dtype)
    x_BTD = embedding_WD[token_BT]
    record("model.embed_tokens", x_BTD)
    for layer in range(cfg.num_hidden_layers):
        x_BTD = block(x_BTD, w, layer, cfg, pos, cache)
    h_BTD = rms_norm(x_BTD, w["model.norm.weight"], cfg.rms_norm_eps)
    record("model.norm", h_BTD)
    return h_BTD


def head(h_BTD, w, cfg):
    """OutHead: states, normed already, to logits (B, T, W). The MTP modules share it and the embedding."""
    return linear(h_BTD, w, "model.embed_tokens" if cfg.tie_word_embeddings else "lm_head")


# ---- 7. Multi-token prediction (section 2.2) -----------------------------------------------------------------------
# Module k predicts the token k+1 ahead: it joins the state of module k-1 with the embedding of the token k ahead.


def mtp_depth(w, cfg):
    """How many MTP modules there are: those of the config before the first whose tensors are absent (some checkpoints
    leave them out)."""
    for k in range(cfg.num_nextn_predict_layers):
        if f"model.layers.{cfg.num_hidden_layers + k}.eh_proj.weight" not in w:
            return k
    return cfg.num_nextn_predict_layers


def mtp(k, h_BTD, token_BT, w, cfg, cache=None, start_B=None):
    """Eqs. (21), (22): from the pairs (h_i^{k-1}, t_{i+k}) at positions i, the states h_i^k (B, T, D); k from 1.

    token_BT[b, j] is t_{i+k} of the pair at i = start_B[b] + j (0 by default), counted from 0. Module k is layer
    num_hidden_layers + k - 1 of the checkpoint, a whole block with a latent cache of its own.
    Where the paper leaves a choice or the released weights differ from it:
    - the joined vector is [embedding ; state]; eq. (21) prints the reverse, the weights need this;
    - h^0 is the state after `model.norm`: so in HF, vLLM and SGLang, while torchtitan takes it before (DeepSeek-V3
      #839 was never answered). Likewise module k + 1 takes h^k after `shared_head.norm`, as in HF; DeepSeek-V3
      has one module only;
    - a pair's position is i. Only differences of positions matter, so i + 1 (HF) gives the same;
    - no embedding is masked at position 0 (vLLM masks one: its issue 33299)."""
    layer = cfg.num_hidden_layers + k - 1
    name = f"model.layers.{layer}"
    pos = positions(token_BT, start_B, cfg, h_BTD.dtype)
    embedded_BTD = w["model.embed_tokens.weight"][token_BT]
    embedded_BTD = rms_norm(embedded_BTD, w[f"{name}.enorm.weight"], cfg.rms_norm_eps)
    state_BTD = rms_norm(h_BTD, w[f"{name}.hnorm.weight"], cfg.rms_norm_eps)
    x_BTD = linear(xp.concatenate([embedded_BTD, state_BTD], axis=-1), w, f"{name}.eh_proj")  # eq. (21)
    record(f"{name}.eh_proj", x_BTD)
    x_BTD = block(x_BTD, w, layer, cfg, pos, cache)  # eq. (22); `head` is eq. (23)
    return rms_norm(x_BTD, w[f"{name}.shared_head.norm.weight"], cfg.rms_norm_eps)


def cross_entropy(logits_BTW, target_BT):
    """-log P(target) of each position, natural logarithm -> (B, T)."""
    logits_BTW = wide(logits_BTW)
    max_BT = xp.max(logits_BTW, axis=-1)
    log_sum_BT = xp.log(xp.sum(xp.exp(logits_BTW - max_BT[..., None]), axis=-1)) + max_BT
    return log_sum_BT - xp.take_along_axis(logits_BTW, target_BT[..., None], axis=-1)[..., 0]


def training_objective(w, token_BX, cfg, mtp_weight=0.3, balance_weight=1e-4):
    """The loss of pre-training, L_main + L_MTP + L_Bal, of sequences of X = T + 1 tokens, X >= 2 + the MTP modules.

    L_main is the mean cross-entropy of tokens 2..T+1. L_Bal is alpha times `balance_loss`, summed over all layers with
    experts (that the MTP modules' are among them is this file's reading). The default weights are the paper's lambda
    of the first 10 trillion tokens, and its alpha (section 4.2).

    Returns the loss and its parts, without lambda and alpha: {"main", "mtp": [L^1, L^2, ...], "balance", "load": {name
    of the gate: load_E}}; the loads are what `update_bias` needs. The biases only choose, so their gradient is 0."""
    token_BX = xp.asarray(token_BX)
    T, depth = token_BX.shape[1] - 1, mtp_depth(w, cfg)
    with recording() as named:
        h_BTD = forward(token_BX[:, :T], w, cfg)
        main = xp.mean(cross_entropy(head(h_BTD, w, cfg), token_BX[:, 1:]))
        losses = []
        for k in range(1, depth + 1):
            h_BTD = mtp(k, h_BTD[:, : T - k], token_BX[:, k:T], w, cfg)
            loss_BT = cross_entropy(head(h_BTD, w, cfg), token_BX[:, k + 1 :])
            losses.append(xp.mean(xp.sum(loss_BT, axis=1)) / T)  # eq. (24): T - k terms, as printed divided by T
    scores = {name.removesuffix(".scores"): score for name, score in named.items() if name.endswith(".gate.scores")}
    balance = sum(balance_loss(score_BTE, cfg) for score_BTE in scores.values())
    load = {name: expert_load(named[f"{name}.indices"], cfg) for name in scores}
    total = main + mtp_weight * sum(losses) / max(depth, 1) + balance_weight * balance  # the middle term is eq. (25)
    return total, {"main": main, "mtp": losses, "balance": balance, "load": load}


# ==== Part II. The model, as computed ===============================================================================

# ---- 8. What generation runs: latent cache, absorption, chosen experts, products -----------------------------------
# The same model, where a cache is given. Each piece says why it is equal to its definition in part I. A port that
# generates needs `Cache`, `mla_absorbed` (with `attention` and an einsum) and of `moe_computed` the last branch; the
# rest is for the speed and memory of NumPy and CuPy.

EXPANDED = 2**29  # at most so many elements of expanded keys and values
SCORES = 2**18  # held at a time, as many as fit a core's cache
QUERIES = 256  # at least about so many (tokens times heads of one key) at a time, even if SCORES says fewer
EACH = 2  # tokens up to which each choice is computed by itself on the CPU, which spares sorting them by expert
FEW = 16  # tokens up to which a GPU reads an expert once per choice, so that its host need not wait for the choices


class Cache:
    """The latent cache: for each layer one array (B, capacity, L), an entry [c_KV ; k_R] for each position, no more.

    Equal because attention is causal: no later token changes an entry. An entry's index is its position, and a query
    sees no index beyond its own, so what stands behind a row's last token, such as a rejected draft, is not seen before
    it is overwritten. Entry i of MTP module k is of the pair (h_i^{k-1}, t_{i+k})."""

    def __init__(self, batch, capacity):
        self.batch, self.capacity, self.layers = batch, capacity, {}

    def append(self, layer, kv_BTL, pos):
        """Write the tokens at their positions, padding as 0 -> the entries of positions 0 to S - 1, (B, S, L)."""
        if layer not in self.layers:
            self.layers[layer] = xp.zeros((self.batch, self.capacity, kv_BTL.shape[-1]), kv_BTL.dtype)
        self.layers[layer][pos.row_B1, pos.pos_BT] = xp.where(pos.real_BT[:, :, None], kv_BTL, 0)
        return self.layers[layer][:, : pos.visible_BTS.shape[2]]


def mla_absorbed(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, visible_BTS):
    """= mla_naive, and no key is ever expanded.

    q . (W_UK c) = (W_UK^T q) . c: W_UK moves to the query's side, once per query instead of once per cached token. All
    heads then share the keys [c ; k_R], which is the cache's entry as it lies, and the values c: multi-query attention
    with heads of size L, whose result W_UV expands at the end. Were the key rotated by its position s, R_s W_UK c, its
    absorbed query W_UK^T R_s^T q would differ for every s: that is why k_R is decoupled, eq. (3)."""
    up_HXC = w[f"{name}.kv_b_proj.weight"].reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank)
    w_uk_HNC, w_uv_HVC = up_HXC[:, : cfg.qk_nope_head_dim], up_HXC[:, cfg.qk_nope_head_dim :]
    q_BTHC = per_head(q_nope_BTHN, w_uk_HNC)  # W_UK^T q
    q_BTHL = xp.concatenate([q_BTHC, q_rope_BTHR], axis=-1)
    k_BSJL = wide(kv_BSL)[:, :, None]  # one key for all heads: J = 1
    o_BTHL = attend(q_BTHL, k_BSJL, k_BSJL, visible_BTS, softmax_scale(cfg))  # values keep k_R: CuPy would copy a slice
    return per_head(o_BTHL[..., : cfg.kv_lora_rank], w_uv_HVC.swapaxes(1, 2))  # W_UV o


def per_head(x_BTHX, w_HXY):
    """einsum("BTHX,HXY->BTHY"), by one product for each head."""
    B, T, H, X = x_BTHX.shape
    y_HMY = x_BTHX.reshape(B * T, H, X).swapaxes(0, 1) @ w_HXY
    return y_HMY.swapaxes(0, 1).reshape(B, T, H, -1)


def mla_computed(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, visible_BTS):
    """= mla_naive, in the form with fewer multiplications: few queries absorb; many expand, while there is room."""
    (B, T, H, N), S = q_nope_BTHN.shape, kv_BSL.shape[1]
    C, R, V = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.v_head_dim
    naive, absorbed = S * C * (N + V) + T * S * (N + R + V), T * C * (N + V) + T * S * 2 * (C + R)  # per head
    if absorbed < naive or B * S * H * (N + R + V) > EXPANDED:
        return mla_absorbed(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, visible_BTS)
    return mla_naive(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, visible_BTS, attend)


def attend(q_BTHX, k_BSJX, v_BSJY, visible_BTS, scale):
    """= attention, a few heads and queries at a time, so that only few scores are held.

    The queries that share a key head meet it in one product. Scores are overwritten by their exponentials; the division
    by their sum comes last, after the product with the values, as that is linear."""
    (B, T, H, X), (S, J, Y) = q_BTHX.shape, v_BSJY.shape[1:]
    shared = H // J
    q = (wide(q_BTHX) * scale).reshape(B, T, J, shared, X).swapaxes(1, 2)
    k, v, out = wide(k_BSJX).swapaxes(1, 2), wide(v_BSJY).swapaxes(1, 2), xp.empty((B, J, T, shared, Y), q.dtype)
    limit = SCORES if xp is np else 256 * SCORES  # a GPU wants large calls
    for tokens in slices(T, max(1, QUERIES // shared, limit // (B * H * S))):
        seen = S - T + tokens.stop  # keys; none of these queries looks further
        for heads in slices(J, max(1, limit // (B * (tokens.stop - tokens.start) * shared * S))):
            part = q[:, heads, tokens]
            score = product(part.reshape(*part.shape[:2], -1, X), k[:, heads, :seen])
            if B * T > 1:  # one query alone is the last token, and sees all
                visible = visible_BTS[:, None, tokens, None, :seen]
                score = xp.where(visible, score.reshape(*part.shape[:4], seen), -xp.inf).reshape(score.shape)
            score -= xp.max(score, axis=-1, keepdims=True)
            xp.exp(score, out=score)
            o = (score @ v[:, heads, :seen]) / xp.sum(score, axis=-1, keepdims=True)
            out[:, heads, tokens] = o.reshape(*part.shape[:4], Y)
    return out.swapaxes(1, 2).reshape(B, T, H, Y).astype(q_BTHX.dtype, copy=False)


def slices(n, step):
    """0 to n in slices of step, the last one cropped: slices(5, 2) covers 0-1, 2-3 and 4."""
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def moe_computed(x_BTD, w, name, index_BTK, gate_BTK, cfg):
    """= moe_all, which adds 0 for all others: each chosen expert sees only the tokens that chose it."""
    K, index_X = cfg.num_experts_per_tok, index_BTK.ravel()  # X = M K choices
    x_MD, gate_MK = x_BTD.reshape(-1, x_BTD.shape[-1]), gate_BTK.reshape(-1, K).astype(x_BTD.dtype, copy=False)
    if xp is np and len(x_MD) <= EACH:
        each = [swiglu(x_MD[c // K, None], w, f"{name}.experts.{e}") for c, e in enumerate(index_X)]
        y_XD = np.concatenate(each)
    elif len(x_MD) <= FEW and f"{name}.experts.gate_proj.weight" in w:
        y_XD = swiglu(x_MD, w, f"{name}.experts", functools.partial(linear_chosen, index_X))
    else:
        order_X = xp.argsort(index_X, kind="stable")  # the choices by expert
        load_E = to_host(expert_load(index_BTK, cfg))
        by_expert = functools.partial(linear_by_expert, load_E)
        y_XD = swiglu(x_MD[order_X // K], w, f"{name}.experts", by_expert)
        y_XD = y_XD[xp.argsort(order_X, kind="stable")]  # back in the order of choices
    return (gate_MK[:, None] @ y_XD.reshape(*gate_MK.shape, -1)).reshape(x_BTD.shape)


def linear_by_expert(load_E, x_XY, w, name):
    """`linear` with the matrix of each row's expert, for rows in the order of experts, load_E[e] of each. On a GPU each
    product goes to its place at once: to join so many parts, CuPy would upload where they lie."""
    end_E, stack = np.cumsum(load_E), f"{name}.weight"
    rows = {e: slice(end_E[e] - load_E[e], end_E[e]) for e in np.flatnonzero(load_E)}
    if stack not in w:
        return xp.concatenate([linear(x_XY[rows[e]], w, name.replace("experts", f"experts.{e}")) for e in rows])
    out_XZ = xp.empty((len(x_XY), w[stack].shape[1]), x_XY.dtype)
    for e in rows:
        xp.matmul(x_XY[rows[e]], w[stack][e].T, out=out_XZ[rows[e]])
    return out_XZ


def linear_chosen(index_X, x, w, name):
    """`linear` with the matrix of each choice's expert, on a GPU: a layer's experts lie in one array (so section 9 lays
    them), and are read there. x has one row per choice, or one per token, which its K choices share."""
    w_EZY = w[f"{name}.weight"]
    Z, Y = w_EZY.shape[1:]
    out_XZ = xp.empty((len(index_X), Z), x.dtype)
    args = x, w_EZY, index_X, out_XZ, *map(np.int64, (Z, Y, len(index_X) // len(x)))
    chosen_kernel(x.dtype)((-(-Z // 4), len(index_X)), (32, 4), args)  # a block is 4 warps: 4 elements of out
    return out_XZ


@functools.cache
def chosen_kernel(dtype):
    """out[c, z] = sum over y of w[index[c], z, y] x[c // share, y]; a warp of 32 threads adds up one."""
    real = {"float16": "__half", "float32": "float", "float64": "double"}[dtype.name]
    return xp.RawKernel(f"""
        #include <cuda_fp16.h>
        typedef {real} real; typedef {"double" if real == "double" else "float"} wide;
        extern "C" __global__ void chosen(const real* x, const real* w, const long long* index, real* out,
                                          long long Z, long long Y, long long share) {{
            const long long c = blockIdx.y, z = blockIdx.x * 4 + threadIdx.y;
            if (z >= Z) return;
            const real *w_row = w + (index[c] * Z + z) * Y, *x_row = x + c / share * Y;
            wide sum = 0;
            for (long long y = threadIdx.x; y < Y; y += 32) sum += wide(w_row[y]) * wide(x_row[y]);
            for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);
            if (threadIdx.x == 0) out[c * Z + z] = sum;
        }}""", "chosen")  # fmt: skip


def product(x, w):
    """= x W^T, x (..., M, X), w (..., Y, X) -> (..., M, Y), the same sums in another order. On NumPy, up to 192 rows of
    x and a w of over 2^17 elements go as (W x^T)^T, which is faster. Beyond two axes CuPy copies the transposed
    operand: let that be the smaller."""
    M, size = x.shape[-2], w.shape[-2] * w.shape[-1]
    if (M <= 192 and size > 2**17) if xp is np else (x.ndim > 2 and x.size < w.size):
        return (w @ x.swapaxes(-1, -2)).swapaxes(-1, -2)
    return x @ w.swapaxes(-1, -2)


# ==== Part III. The program =========================================================================================

# ---- 9. Checkpoints ------------------------------------------------------------------------------------------------
# A directory in the Hugging Face layout: config.json is checked, tensors are decoded when used, kept if there is room.

ONLY = {  # the implemented values of keys that would change the result, first what an absent key means
    "model_type": ["deepseek_v3", "kimi_k2", "deepseek_v2"], "hidden_act": ["silu"], "moe_layer_freq": [1],
    "rope_scaling.type": ["default", "yarn"], "rope_scaling.partial_rotary_factor": [1.0],
    "rope_scaling.attention_factor": [None],
    "quantization_config.quant_method": ["fp8"], "quantization_config.fmt": ["e4m3"],
    "quantization_config.weight_block_size": [[128, 128]],
}  # fmt: skip
V3 = {"scoring_func": ["sigmoid"], "topk_method": ["noaux_tc"]}
V2 = {"scoring_func": ["softmax"], "topk_method": ["greedy", "group_limited_greedy"], "num_nextn_predict_layers": [0],
      "norm_topk_prob": [False]}  # implementations disagree on what true means; fmt: skip
ABSENT = {  # what other absent keys mean; those of Config that are not here must be given
    "q_lora_rank": None, "attention_bias": False, "n_shared_experts": 0, "n_group": 1, "topk_group": 1,
    "rope_theta": 10000.0, "rope_interleave": True, "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
}  # fmt: skip
MAY_BE_ZERO = ["first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "n_routed_experts",
               "moe_intermediate_size", "mscale", "mscale_all_dim"]  # fmt: skip


def read_json(path):
    """The JSON object in a file."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} cannot be read as JSON: {e}") from None
    require(isinstance(value, dict), f"{path} must be a JSON object")
    return value


def read_config(path):
    """The Config of a config.json, or of a directory that holds one."""
    return parse_config(read_json(Path(path) / "config.json" if Path(path).is_dir() else path))


def parse_config(keys):
    """The Config that the keys of a config.json describe, in the release's spelling or in that of transformers 5. null
    is the same as an absent key; keys that do not change the result are ignored. Raises InputError."""
    given = {key: value for key, value in keys.items() if value is not None}
    rope = given.get("rope_parameters", given.get("rope_scaling", {}))
    require(given.get("rope_scaling", rope) == rope, "rope_scaling and rope_parameters differ")
    for name, nested in (("rope_scaling", rope), ("quantization_config", given.get("quantization_config", {}))):
        require(isinstance(nested, dict), f"{name} must be an object or null")
        given |= {f"{name}.{key}": value for key, value in nested.items() if value is not None}
    given["rope_scaling.type"] = given.get("rope_scaling.rope_type", given.get("rope_scaling.type", "default"))
    for key, values in (ONLY | (V2 if given.get("model_type") == "deepseek_v2" else V3)).items():
        value = given.setdefault(key, values[0])
        require(value in values, f"{key} {value!r:.99} is not implemented, only {' or '.join(map(repr, values))}")
    given = ABSENT | given | {"rope_scaling": None}
    given["rope_theta"] = given.get("rope_scaling.rope_theta", given["rope_theta"])
    needed = [f.name for f in fields(Config)]
    if given["rope_scaling.type"] == "yarn":
        needed += ["rope_scaling.factor", "rope_scaling.original_max_position_embeddings"]
        yarn = {f.name: given[f"rope_scaling.{f.name}"] for f in fields(Yarn) if f"rope_scaling.{f.name}" in given}
        given["rope_scaling"] = Yarn(**yarn)
    absent = [key for key in needed if key not in given]
    require(not absent, f"config.json lacks {', '.join(absent)}; is it that of a DeepSeek-V3?")
    heads = given["num_attention_heads"]
    require(given.get("num_key_value_heads", heads) == heads, "num_key_value_heads must be num_attention_heads in MLA")
    return Config(**{f.name: given[f.name] for f in fields(Config)})


def check_config(cfg):
    """Raise InputError unless each value has its type (a bool is no number), each number is positive, or 0 where that
    means something, and the model is defined for them."""
    named = [(f, getattr(cfg, f.name)) for f in fields(cfg)]
    if isinstance(cfg.rope_scaling, Yarn):
        named += [(f, getattr(cfg.rope_scaling, f.name)) for f in fields(Yarn)]
    for f, value in named:
        kinds = get_args(f.type) or (f.type,)
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if fits and type(value) in (int, float):
            fits = 1e-12 <= value <= 1e12 or (value == 0 and f.name in MAY_BE_ZERO)
        kind = getattr(f.type, "__name__", f.type)
        require(fits, f"{f.name} must be {kind}, if a number from 1e-12 to 1e12, not {value!r:.99}")
    E, G = cfg.n_routed_experts, cfg.n_group
    tensors = (cfg.num_hidden_layers + cfg.num_nextn_predict_layers) * (3 * E + 20)
    require(tensors < 2**19, "num_hidden_layers times n_routed_experts makes more than half a million tensors")
    require(cfg.rope_theta > 1, f"rope_theta must be above 1, not {cfg.rope_theta}")
    require(cfg.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even: RoPE rotates pairs")
    if cfg.first_k_dense_replace >= cfg.num_hidden_layers and not cfg.num_nextn_predict_layers:
        return  # no layer has experts
    require(E and cfg.moe_intermediate_size, "n_routed_experts and moe_intermediate_size must be above 0")
    require(E % G == 0, f"n_routed_experts {E} must be a multiple of n_group {G}")
    require(cfg.topk_group <= G, f"topk_group {cfg.topk_group} must be at most n_group {G}")
    one_each = cfg.topk_method == "noaux_tc" and E == G > 1
    require(not one_each, f"n_group {G} leaves one expert per group, whose score needs its best two")
    choice = E if cfg.topk_method == "greedy" else cfg.topk_group * E // G
    require(cfg.num_experts_per_tok <= choice, f"num_experts_per_tok must be at most {choice}, what topk_group leaves")


def tensor_shapes(cfg):
    """Name -> shape of every tensor of the model and its MTP modules, under the checkpoint's own names. (Released
    checkpoints hold the MTP modules' embedding and head a second time; they are shared, so not listed.)"""
    D, H, C, R = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    N, V, Q, E = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.q_lora_rank, cfg.n_routed_experts
    shapes = {"model.embed_tokens.weight": (cfg.vocab_size, D), "model.norm.weight": (D,)}
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, D)

    def mlp(name, width):
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, D)
        shapes[f"{name}.down_proj.weight"] = (D, width)

    query = {"q_a_proj.weight": (Q, D), "q_a_layernorm.weight": (Q,), "q_b_proj.weight": (H * (N + R), Q)}
    attention = {"q_proj.weight": (H * (N + R), D)} if Q is None else query
    attention |= {"kv_a_proj_with_mqa.weight": (C + R, D), "kv_a_layernorm.weight": (C,)}
    attention |= {"kv_b_proj.weight": (H * (N + V), C), "o_proj.weight": (D, H * V)}
    for part in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
        if cfg.attention_bias and f"{part}.weight" in attention:
            attention[f"{part}.bias"] = attention[f"{part}.weight"][:1]
    for layer in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        name = f"model.layers.{layer}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        if layer >= cfg.num_hidden_layers:
            norms += ["enorm", "hnorm", "shared_head.norm"]
            shapes[f"{name}.eh_proj.weight"] = (D, 2 * D)
        shapes |= {f"{name}.{norm}.weight": (D,) for norm in norms}
        shapes |= {f"{name}.self_attn.{part}": shape for part, shape in attention.items()}
        if cfg.is_dense(layer):
            mlp(f"{name}.mlp", cfg.intermediate_size)
            continue
        shapes[f"{name}.mlp.gate.weight"] = (E, D)
        if cfg.topk_method == "noaux_tc":
            shapes[f"{name}.mlp.gate.e_score_correction_bias"] = (E,)
        if cfg.n_shared_experts:
            mlp(f"{name}.mlp.shared_experts", cfg.n_shared_experts * cfg.moe_intermediate_size)
        for e in range(E):
            mlp(f"{name}.mlp.experts.{e}", cfg.moe_intermediate_size)
    return shapes


BLOCK = 128  # an FP8 weight has one scale for each block of 128 x 128, the last of a row or column cropped


def dequantize(code, scale):
    """FP8 codes (Y, X) and their `weight_scale_inv` (ceil(Y / 128), ceil(X / 128)) -> float32. The scale multiplies,
    whatever `inv` suggests: one float32 product is the definition. The format, e4m3fn: sign, 4 bits of exponent (bias
    7), 3 of mantissa; no infinity, 0x7f is NaN."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7) / 8
    value = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    value[byte & 127 == 127] = np.nan
    value = xp.asarray(np.where(byte < 128, value, -value).astype(np.float32))
    out = xp.empty(code.shape, np.float32)
    for rows, scale_X in zip(slices(code.shape[0], BLOCK), scale, strict=True):
        out[rows] = xp.take(value, code[rows]) * xp.repeat(scale_X, BLOCK)[: code.shape[1]]
    return out


class Matrix:
    """A weight (Y, X) in memory, which multiplies by `product`. The model asks three things of it: x @ matrix.T, the
    rows of some ids (of an embedding), and a reshape to heads."""

    __array_ufunc__ = None  # so that NumPy and CuPy leave x @ matrix to __rmatmul__
    T = property(lambda self: self)  # x @ matrix.T is the only product asked for, and __rmatmul__ is it

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __rmatmul__(self, x):
        y_MY = xp.ascontiguousarray(self.times(x.reshape(-1, x.shape[-1])))  # `rope` needs pairs side by side
        return y_MY.reshape(*x.shape[:-1], -1)

    def __getitem__(self, ids):
        return self.array[xp.asarray(ids)]

    def reshape(self, *shape):
        return self.whole().reshape(*shape)

    def times(self, x_MX):
        return product(x_MX, self.array)

    def whole(self):
        return self.array


STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1"}  # how NumPy views the bytes
BAND = 2**22  # elements that a thread decodes at a time, 16 MB in float32
THREADS = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


class Stored(Matrix):
    """A tensor in a file. Where there is no room to keep it decoded, it is a matrix as it lies there: each product
    decodes it anew, in bands of rows, each multiplied by the thread that decoded it."""

    def __init__(self, file, kind, shape, offset):
        self.file, self.kind, self.shape, self.offset = file, kind, shape, offset  # file: its bytes, mapped into memory
        self.dtype, self.scale = np.dtype(np.float32), None  # of the computation; the Stored scales of an FP8 tensor

    def __getitem__(self, rows):
        """Some rows, decoded to float32, then in dtype. A slice of FP8 must begin with a block."""
        apart = np.memmap(self.file.filename, STORED[self.kind], "r", self.offset, self.shape)  # freed with its pages
        part = xp.asarray(apart[rows if isinstance(rows, slice) else to_host(rows)])
        if self.kind == "BF16":
            part = (part.astype(xp.uint32) << 16).view(xp.float32)
        if self.kind == "F8_E4M3":
            scale = self.scale[rows.start // BLOCK : -(-rows.stop // BLOCK)]
            sound = ((scale >= 0) & (scale < 6e35)).all()  # 448 times a larger one nears the largest float32
            require(sound, f"{self.file.filename}: a weight_scale_inv is not a number from 0 to 6e35")
            part = dequantize(part, scale)
        return part.astype(self.dtype, copy=False)

    def bands(self, use):
        """use(slice) for each band of rows, in threads on the CPU; -> what it returned."""
        rows = BAND // math.prod(self.shape[1:])
        parts = slices(self.shape[0], max(BLOCK, rows // BLOCK * BLOCK))
        return list((THREADS.map if xp is np and len(parts) > 1 else map)(use, parts))

    def times(self, x_MX):
        return xp.concatenate(self.bands(lambda rows: product(x_MX, self[rows])), axis=1)

    def whole(self):
        out = xp.empty(self.shape, self.dtype)
        self.bands(lambda rows: out.__setitem__(rows, self[rows]))
        return out


def read_safetensors(path):
    """A file's tensors, name -> Stored, if the safetensors library finds it sound. The format: 8 bytes, the length n of
    the header; n bytes of JSON, {name: {dtype, shape, data_offsets}}, and "__metadata__"; the tensors' bytes."""
    try:
        names = safetensors.safe_open(path, "np").keys()
    except (OSError, safetensors.SafetensorError) as e:
        raise InputError(f"{path}: {e}; is the download complete?") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    require(all(isinstance(header[name], dict) for name in names), f"{path}: a tensor's entry is not an object")
    mapped = np.memmap(path, np.uint8, "r")
    return {name: Stored(mapped, header[name]["dtype"], tuple(header[name]["shape"]),
                         8 + length + header[name]["data_offsets"][0]) for name in names}  # fmt: skip


def read_shards(directory):
    """All tensors of a directory, name -> Stored. The index, if there is one, says which file holds which; a weight and
    its scale may lie in different files."""
    index = Path(directory, "model.safetensors.index.json")
    if not index.exists():
        return read_safetensors(Path(directory, "model.safetensors"))
    weight_map = read_json(index).get("weight_map")
    require(isinstance(weight_map, dict), f"{index} lacks weight_map, which says which tensor is in which file")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and shard.isprintable() and os.path.basename(shard) == shard != ""
        require(plain, f"{index}: {shard!r:.99} is not a plain file name; shards lie beside the index")
    shards = {shard: read_safetensors(Path(directory, shard)) for shard in set(weight_map.values())}
    return {name: shards[shard][name] for name, shard in weight_map.items() if name in shards[shard]}


def system_bytes(path, key):
    """The bytes of a line "{key}: n kB" of a file in Linux's /proc; 0 elsewhere."""
    try:
        found = re.search(rf"{key}:\s*(\d+) kB", Path(path).read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


class Checkpoint:
    """The weights in a directory: tensor name -> array of `xp` in `dtype` (a router's in float32 or better), or a
    Matrix of it; decoded when first used.

    Members are the tensors of `tensor_shapes`, each checked at once, without absent MTP modules; on a GPU also what
    `stack_experts` adds. memory: bytes that decoded matrices may take, by default 70 % of what Linux or the GPU has
    free; first come, first kept. Raises InputError."""

    def __init__(self, directory, cfg, dtype=np.float32, memory=None):
        self.loaded, self.stored = {}, read_shards(directory)
        self.cfg = replace(cfg, num_nextn_predict_layers=mtp_depth(self.stored, cfg))
        self.shapes = tensor_shapes(self.cfg)
        for name, shape in self.shapes.items():
            require(name in self.stored, f"{directory} lacks {name}; does its config.json belong to it?")
            stored = self.stored[name]
            require(stored.kind in STORED, f"{name} has dtype {stored.kind}, not one of {', '.join(STORED)}")
            require(stored.shape == shape, f"{name} has shape {list(stored.shape)}, config.json says {list(shape)}")
            routes = ".mlp.gate." in name  # routing is computed in float32 or better
            stored.dtype = np.promote_types(dtype, np.float32) if routes else np.dtype(dtype)
            if stored.kind == "F8_E4M3":
                linear_map = len(shape) == 2 and name != "model.embed_tokens.weight"
                require(linear_map, f"{name} is FP8, which only the matrix of a linear map can be")
                stored.scale, grid = self.stored.get(f"{name}_scale_inv"), tuple(-(-n // BLOCK) for n in shape)
                sound = stored.scale and stored.scale.shape == grid and stored.scale.kind in ("F32", "BF16")
                require(sound, f"{name} is FP8, so {name}_scale_inv must be there, F32 or BF16 of shape {list(grid)}")
        free = system_bytes("/proc/meminfo", "MemAvailable") if xp is np else xp.cuda.runtime.memGetInfo()[0]
        self.room = 0.7 * (free or math.inf) if memory is None else memory
        size = sum(map(math.prod, self.shapes.values())) * np.dtype(dtype).itemsize
        if xp is not np and size <= self.room:
            self.stack_experts()

    def __contains__(self, name):
        return name in self.shapes or name in self.loaded

    def __getitem__(self, name):
        if name in self.loaded:
            return self.loaded[name]
        stored = self.stored[name]
        if xp is np and STORED[stored.kind] == stored.dtype.str:  # nothing to decode: it stays mapped
            found = np.ndarray(stored.shape, stored.dtype, stored.file, stored.offset)
        elif len(stored.shape) == 2 and math.prod(stored.shape) * stored.dtype.itemsize > self.room:
            return stored
        else:
            found = stored.whole()
            self.room -= found.nbytes
        self.loaded[name] = Matrix(found) if len(stored.shape) == 2 else found
        return self.loaded[name]

    def stack_experts(self):
        """Lay all experts' matrices of one kind and layer in one array, {layer}.mlp.experts.{part}_proj.weight, for
        `linear_chosen`; by their own names they become views of it."""
        for first in [name for name in self.shapes if ".experts.0." in name]:
            names = [first.replace(".experts.0.", f".experts.{e}.") for e in range(self.cfg.n_routed_experts)]
            stack = xp.stack([self[name].whole() for name in names])
            self.loaded[first.replace(".experts.0.", ".experts.")] = stack
            self.loaded |= {name: Matrix(stack[e]) for e, name in enumerate(names)}


# ---- 10. Generation ------------------------------------------------------------------------------------------------
# One loop feeds what is new, chooses the next token, has the MTP module draft the one after, and verifies the draft
# next time; the trace of one pass is what a port is checked by.

CHUNK = 1024  # tokens of a prompt that go through the model at a time by default, which bounds its activations' memory


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        sound = 0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1 and self.seed >= 0
        require(sound, f"temperature, top-k and seed must be 0 or more, top-p above 0 and at most 1: {self}")


def distribution(logits_W, sampling):
    """The probabilities (W,) that a token is drawn from, float64 on the host: temperature, then top-k, then top-p (of
    what top-k left, the fewest likeliest tokens that reach it). Among equals the lowest id comes first.

    >>> distribution(np.log([0.2, 0.5, 0.3]), Sampling(temperature=1.0, top_p=0.6)).round(3)
    array([0.   , 0.625, 0.375])
    """
    logits_W = logits_W.astype(np.float64)
    require(np.isfinite(logits_W).all(), "the model's logits are not finite: the weights or the dtype overflow")
    if sampling.temperature == 0:
        return (np.arange(logits_W.size) == np.argmax(logits_W)).astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: e^-inf is the 0 it should be
        p_W = np.exp((logits_W - logits_W.max()) / sampling.temperature)
    p_W /= p_W.sum()
    if 0 < sampling.top_k < p_W.size:
        p_W = keep_likeliest(p_W, sampling.top_k)
    if sampling.top_p < 1:
        many = np.sort(p_W[p_W >= (1 - sampling.top_p) / p_W.size])[::-1]  # all others reach less than 1 - top_p
        p_W = keep_likeliest(p_W, 1 + np.searchsorted(np.cumsum(many)[:-1], sampling.top_p))
    return p_W


def keep_likeliest(p_W, count):
    """Only the `count` likeliest, the lowest ids among equals, normalised."""
    least = np.partition(p_W, -count)[-count]
    kept_W = p_W > least
    kept_W[np.flatnonzero(p_W == least)[: count - np.sum(kept_W)]] = True
    p_W = np.where(kept_W, p_W, 0)
    return p_W / p_W.sum()


def draw(p_W, rng):
    """An index with probability p_W[index]: the only place where chance enters. What is certain takes no chance."""
    if p_W[likeliest := int(np.argmax(p_W))] == 1:
        return likeliest
    cumulated = np.cumsum(p_W)
    return int(np.searchsorted(cumulated / cumulated[-1], rng.random(), side="right"))


def verify(p_W, q_W, draft, rng):
    """The rejection rule of speculative sampling (arXiv:2211.17192): whether a draft drawn from q is accepted, and the
    token, which is distributed as p exactly. Accept with probability min(1, p/q), else draw from max(p - q, 0)."""
    accept = min(1.0, p_W[draft] / q_W[draft])
    if draw([1 - accept, accept], rng):  # 1 with probability accept
        return True, draft
    rest_W = np.maximum(p_W - q_W, 0)
    return False, draw(rest_W if rest_W.any() else p_W, rng)  # nothing is left where p and q differ by rounding alone


def check_prompts(prompts, cfg, max_tokens):
    """Raise InputError for prompts that cannot be continued by max_tokens."""
    require(len(prompts) and max_tokens >= 0, "generation needs a prompt, and 0 or more tokens to make")
    most = cfg.max_position_embeddings - max_tokens
    for n, prompt in enumerate(prompts):
        fits = 0 < len(prompt) <= most
        require(fits, f"prompt {n} has {len(prompt)} tokens, not 1 to {most}, the model's positions less the new ones")
        bad = [t for t in prompt if not 0 <= t < cfg.vocab_size]
        require(not bad, f"prompt {n}: token id {bad[:1]!s:.99} is outside the vocabulary, 0 to {cfg.vocab_size - 1}")


def pad(rows):
    """Lists of token ids to one array (B, T), padded on the right with -1."""
    return np.array(list(itertools.zip_longest(*rows, fillvalue=-1))).T


def forward_in_chunks(token_BT, w, cfg, cache, start_B, chunk, k=0, h_BXD=None):
    """`forward`, or for k > 0 `mtp` of module k from states h, with `chunk` positions going through at a time."""
    parts = []
    for part in slices(token_BT.shape[1], chunk):
        given = token_BT[:, part], w, cfg, cache, start_B + part.start
        parts.append(mtp(k, h_BXD[:, part], *given) if k else forward(*given))
    return xp.concatenate(parts, axis=1)


def logits_from(first, count, h_BTD, w, cfg):
    """The logits of `count` states of each row b, from h[b, first[b]] on, on the host: (B, count, W)."""
    index = xp.asarray(np.array(first)[:, None] + np.arange(count))
    return to_host(head(h_BTD[xp.arange(len(h_BTD))[:, None], index], w, cfg))


@dataclass
class Row:
    """One sequence while it is generated."""

    tokens: list
    left: int  # how many tokens may still be made
    rng: np.random.Generator
    start: int = 0  # how many tokens the cache holds
    draft: list = field(default_factory=list)  # of the next token: one, or none
    q_W: np.ndarray | None = None  # what the draft was drawn from

    def choose(self, logits_XW, sampling):
        """The next token, and the one after it if there is a draft and it is accepted."""
        p_W = distribution(logits_XW[0], sampling)
        if not self.draft:
            return [draw(p_W, self.rng)]
        accepted, token = verify(p_W, self.q_W, self.draft[0], self.rng)
        return [token, draw(distribution(logits_XW[1], sampling), self.rng)] if accepted else [token]


def generate(prompts, w, cfg, max_tokens, sampling=None, stop=(), speculate=True, stats=None, chunk=CHUNK):
    """Continue each prompt; yields (row, token) as tokens are made. A row ends after max_tokens or a token in `stop`.

    prompts: lists of token ids, of any lengths; row b draws from its own random stream (seed, b). stats: a Counter, to
    fill with drafted, accepted, cache_bytes. speculate: draft with the first MTP module, if there is one. This changes
    the speed, not the distribution, and no token of greedy output (unless two logits are equal but for rounding).

    With t_n the last token, the main model sees [t_n, draft of t_{n+1}] in one pass. If `verify` accepts the draft, it
    and the token after it are known; if not, the token in its place, and the draft's cache entry is overwritten. Now
    each verified state h_i has its next token: the MTP module sees these pairs, at positions i, and drafts again."""
    sampling, stats = sampling or Sampling(), Counter() if stats is None else stats
    check_prompts(prompts, cfg, max_tokens)
    speculate = speculate and mtp_depth(w, cfg)
    cache = Cache(len(prompts), max(map(len, prompts)) + max_tokens + 1)  # + 1: padding beside others' drafts
    rows = [Row(list(ids), max_tokens, np.random.default_rng([sampling.seed, b])) for b, ids in enumerate(prompts)]
    while True:
        context = w, cfg, cache, np.array([row.start for row in rows]), chunk
        h_BTD = forward_in_chunks(pad([row.tokens[row.start :] + row.draft for row in rows]), *context)
        last = [len(row.tokens) - row.start - 1 for row in rows]
        logits_BXW = logits_from(last, 1 + any(row.draft for row in rows), h_BTD, w, cfg)
        stats["cache_bytes"] = sum(kv_BSL.nbytes for kv_BSL in cache.layers.values())
        for b, row in enumerate(rows):
            new = row.choose(logits_BXW[b], sampling)
            stats["drafted"] += len(row.draft)
            stats["accepted"] += len(new) == 2
            for token in new:
                if row.left:
                    row.left = 0 if token in stop else row.left - 1
                    row.tokens.append(token)
                    yield b, token
        if not any(row.left for row in rows):
            return
        if speculate:
            draw_drafts(rows, h_BTD, *context, sampling)
        for row in rows:
            row.start = len(row.tokens) - 1


def draw_drafts(rows, h_BTD, w, cfg, cache, start_B, chunk, sampling):
    """Show the MTP module the pairs (h_i, t_{i+1}) that the new tokens complete; draw a draft for each row to go on."""
    pairs = [row.tokens[row.start + 1 :] for row in rows]
    h_BTD = forward_in_chunks(pad(pairs), w, cfg, cache, start_B, chunk, 1, h_BTD)
    logits_BXW = logits_from([len(tokens) - 1 for tokens in pairs], 1, h_BTD, w, cfg)
    for row, logits_XW in zip(rows, logits_BXW, strict=True):
        row.q_W = distribution(logits_XW[0], sampling) if row.left else None
        row.draft = [draw(row.q_W, row.rng)] if row.left else []


def trace(prompts, w, cfg, chunk=CHUNK):
    """Every named activation of the prompts' forward pass -> {name: NumPy array (T, ...)}, in the order of computation.

    chunk: how many tokens enter the latent cache at a time; None: the definition, all at once and without a cache. The
    names are the paths of the checkpoint's modules; of several prompts, prefixed "{n}/". MTP module k sees the pairs
    within the prompt, so its arrays have T - k rows."""
    check_prompts(prompts, cfg, 0)
    token_BT = pad(prompts)
    B, T = token_BT.shape
    context = w, cfg, Cache(B, T) if chunk else None, np.zeros(B, int), chunk or T
    with recording() as named:
        h_BXD = forward_in_chunks(token_BT, *context)
        record("lm_head", head(h_BXD, w, cfg))
        for k in range(1, min(mtp_depth(w, cfg), T - 1) + 1):
            h_BXD = forward_in_chunks(token_BT[:, k:], *context, k, h_BXD)
            record(f"model.layers.{cfg.num_hidden_layers + k - 1}.shared_head", head(h_BXD, w, cfg))  # logits
    return {(f"{n}/" if B > 1 else "") + name: to_host(x)[n, : max(0, x.shape[1] - T + len(prompt))]
            for n, prompt in enumerate(prompts) for name, x in named.items()}  # fmt: skip


def write_trace(path, named):
    """Write arrays as .safetensors or else .npz; what stands at the path is whole, or as it was."""
    part = Path(f"{path}.part")
    try:
        with part.open("wb") as file:
            if path.endswith(".safetensors"):
                file.write(safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in named.items()}))
            else:
                np.savez(file, **named)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---- 11. Command line ----------------------------------------------------------------------------------------------
# Text goes to stdout, everything else to stderr, and what cannot be done is refused in one line.

OPENING = "Once upon a time, there was a little dog"  # the prompt where none is given


def say(message):
    """One line on stderr, whatever an error's text may hold."""
    print(message.splitlines()[0], file=sys.stderr, flush=True)


def choose_device(wanted):
    """The namespace. auto takes the GPU if CuPy works, and says why if it is there but does not; gpu insists."""
    if wanted == "cpu":
        return np
    try:
        import cupy

        one = cupy.ones((2, 2), np.float32)
        float((one @ one).sum())  # CUDA's libraries are loaded late: NVRTC by a kernel, cuBLAS by a product
        return cupy
    except Exception as e:  # of any kind: a kernel that does not compile raises a bare Exception
        require(wanted != "gpu", f"--device gpu needs cupy-cuda13x[ctk] or cupy-cuda12x, the one for the driver: {e}")
        if getattr(e, "name", None) != "cupy":  # CuPy is there
            say(f"note: on the CPU, since CuPy does not work: {e}")
        return np


def inspect(cfg):
    """A table of parameters and of the cache, beside one that would keep MLA's own keys (N + R) and values (V) for all
    heads, for 8, for one."""
    total = sum(map(math.prod, tensor_shapes(replace(cfg, num_nextn_predict_layers=0)).values()))
    modules = sum(map(math.prod, tensor_shapes(cfg).values())) - total
    latent, H, layers = cfg.kv_lora_rank + cfg.qk_rope_head_dim, cfg.num_attention_heads, cfg.num_hidden_layers
    pair = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim  # one head's key and value
    sparse = sum(not cfg.is_dense(layer) for layer in range(layers))
    idle = sparse * (cfg.n_routed_experts - cfg.num_experts_per_tok) * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    print(f"parameters of the main model  {total:>19,}")
    print(f"  activated per token         {total - idle:>19,}  embedding and head included")
    print(f"parameters of MTP modules     {modules:>19,}  beside the shared embedding and head")
    print(f"cache elements per token      {latent * layers:>19,}  {2 * latent * layers:,} bytes in BF16")
    for label, heads in (("MHA", H), ("GQA, 8 key heads", 8), ("MQA", 1)):
        if heads <= H:
            print(f"  with {label:<22} {heads * pair * layers:>19,}  {heads * pair / latent:.1f} times as many")


class Text:
    """A checkpoint's tokenizer.json, with the BOS and the chat template that its tokenizer_config.json may ask for."""

    def __init__(self, directory):
        path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # a bare Exception, if the file is absent or malformed
            raise InputError(f"{path}: {e}; --tokens takes ids without it") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings, template = read_json(config) if config.exists() else {}, directory / "chat_template.jinja"
        self.template = template.read_text("utf-8") if template.exists() else settings.get("chat_template")
        special = {key: settings.get(key) or "" for key in ("bos_token", "eos_token")}  # a string, or in an object
        self.special = {key: str(x.get("content") if isinstance(x, dict) else x) for key, x in special.items()}
        self.bos = self.tokenizer.token_to_id(self.special["bos_token"]) if settings.get("add_bos_token") else None

    def encode(self, text):
        """Token ids of a prompt, with BOS before it, once, if the tokenizer or its configuration says so."""
        ids = self.tokenizer.encode(text).ids
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def encode_chat(self, messages):
        """Token ids of a conversation. The template is a stranger's program: it runs in Jinja's sandbox, and it alone
        may write special tokens."""
        for token in self.tokenizer.get_added_tokens_decoder().values():
            spelled = any(token.content in each["content"] for each in messages if each["role"] == "user")
            require(not spelled, f"a message spells out {token.content!r}, a token that only the template may write")
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment

            template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.template)
            text = template.render(messages=messages, add_generation_prompt=True, **self.special)
        except Exception as e:  # jinja2 is missing, or the template fails in any way
            raise InputError(f"the checkpoint's chat template: {e}") from None
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def parse_arguments(argv):
    parser = argparse.ArgumentParser("deepseek_v3.py", description="DeepSeek-V3 on NumPy and CuPy.")
    parser.error = lambda message: require(False, f"{message}; --help lists the flags")  # in one line, like every error
    flag, weights = parser.add_argument, Path(__file__).resolve().parent / "weights"
    flag("-p", "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; - is stdin; repeatable")
    flag("--tokens", action="append", default=[], type=token_ids, metavar="IDS", help='token ids instead: "3 14 15"')
    flag("--weights", type=Path, default=weights, metavar="DIR", help="checkpoint (default: weights/ beside this file)")
    flag("-n", "--max-tokens", "--max-new-tokens", type=int, metavar="N", help="new tokens (200; with --trace 0)")
    flag("--temperature", "--temp", type=float, default=0.0, metavar="T", help="default 0: always the likeliest token")
    flag("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that together reach P")
    flag("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; default 0: all")
    flag("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text")
    flag("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto (default): the GPU if there is one")
    flag("--dtype", choices=["float32", "float64", "float16"], default="float32", help="of the computation (float32)")
    flag("--memory", type=float, metavar="GB", help="for decoded weights; default: 70%% of what is free")
    flag("--mtp", action=argparse.BooleanOptionalAction, help="speculate (default: on a GPU, and in a small model)")
    flag("--chunk", type=int, default=CHUNK, metavar="N", help=f"tokens that go through at a time (default {CHUNK})")
    flag("--chat", action="store_true", help="converse in the checkpoint's chat template, one line of stdin per turn")
    flag("--trace", metavar="FILE", help="write the prompt's named activations, as .npz or .safetensors")
    flag("--inspect", action="store_true", help="count parameters and cache, of a checkpoint or a bare config.json")
    args = parser.parse_args(argv)
    args.max_tokens = (0 if args.trace else 200) if args.max_tokens is None else args.max_tokens
    require((args.memory or 0) >= 0 and args.max_tokens >= 0, "--memory and --max-tokens must be 0 or more")
    require(args.chunk >= 1, f"--chunk must be 1 or more, not {args.chunk}")
    require(not (args.prompt and args.tokens), "--prompt and --tokens exclude each other")
    require(not (args.chat and (args.tokens or args.trace)), "--chat takes no --tokens or --trace")
    args.prompt = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in args.prompt]
    "".join(args.prompt).encode()  # UnicodeError for an argument that was not UTF-8
    return args


def token_ids(text):
    """A --tokens: integers, separated by spaces or commas."""
    return [int(token) for token in text.replace(",", " ").split()]


def respond(text, options, prompts):
    """Generate and print: text as it grows, that of further prompts and plain ids when they are complete; last, even if
    interrupted, the line of statistics. options: what `generate` takes besides prompts. -> each prompt's new tokens."""
    check_prompts(prompts, options["cfg"], options["max_tokens"])
    stats, made, begin, first = Counter(), [[] for _ in prompts], time.perf_counter(), None
    stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
    try:
        for b, token in generate(prompts, stats=stats, **options):
            first = first or time.perf_counter()
            stats["new"] += 1
            if not (text and token in options["stop"]):
                made[b].append(token)
                if text and b == 0:
                    print(stream.step(text.tokenizer, token) or "", end="", flush=True)  # never half a character
    finally:
        ids = [" ".join(map(str, tokens)) for tokens in made]
        print(*(["", *map(text.tokenizer.decode, made[1:])] if text else ids), sep="\n", flush=True)
        say(statistics(prompts, stats, begin, first))
    return made


def statistics(prompts, stats, begin, first):
    """The line of statistics; the first token of each row belongs to the prompt's time."""
    end, prompt = time.perf_counter(), sum(map(len, prompts))
    first, later = first or end, max(0, stats["new"] - len(prompts))
    peak = system_bytes("/proc/self/status", "VmHWM") if xp is np else xp.get_default_memory_pool().total_bytes()
    return (f"prompt: {prompt} tokens, {prompt / (first - begin):.1f} tok/s"
            f" · new: {stats['new']} tokens, {later / (end - first) if later else 0:.1f} tok/s"
            f" · drafted {stats['drafted']}, accepted {stats['accepted']}"
            f" · cache {stats['cache_bytes'] / 1000:.0f} KB · peak memory {peak / 1e6:.0f} MB")  # fmt: skip


def converse(turns, answer, text):
    """Each of the given turns, then each line of stdin, is answered."""
    require(text.template, "this checkpoint has no chat template; --prompt continues text")
    messages = []
    for turn in itertools.chain(turns, sys.stdin):
        messages.append({"role": "user", "content": turn.strip()})
        made = answer([text.encode_chat(messages)])
        messages.append({"role": "assistant", "content": text.tokenizer.decode(made[0])})


def run(args):
    """Do what the arguments ask for."""
    global xp
    cfg = read_config(args.weights)
    if args.inspect:
        inspect(cfg)
        return
    sampling, xp = Sampling(args.temperature, args.top_k, args.top_p, args.seed), choose_device(args.device)
    text, path = None if args.tokens else Text(args.weights), args.weights / "generation_config.json"
    settings = read_json(args.weights / "config.json") | (read_json(path) if path.exists() else {})
    end = settings.get("eos_token_id")  # one, a list, or null
    w = Checkpoint(args.weights, cfg, args.dtype, None if args.memory is None else args.memory * 1e9)
    pays = xp is not np or cfg.hidden_size <= 512  # on a CPU a large model's second row costs as much as the first
    options = {"speculate": pays if args.mtp is None else args.mtp, "stop": end if isinstance(end, list) else [end]}
    options |= {"w": w, "cfg": cfg, "max_tokens": args.max_tokens, "sampling": sampling, "chunk": args.chunk}
    if args.chat:
        converse(args.prompt, functools.partial(respond, text, options), text)
        return
    prompts = args.tokens or [text.encode(prompt) for prompt in args.prompt or [OPENING]]
    check_prompts(prompts, cfg, args.max_tokens)  # before a long trace
    if args.trace:
        write_trace(args.trace, trace(prompts, w, cfg, args.chunk))
    if not (args.prompt or args.tokens):
        print(OPENING, end="", flush=True)
    respond(text, options, prompts)


def main(argv=None):
    """The command line. Exit codes: 0 done, 2 refused in one line, 130 interrupted."""
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # stdout's reader has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is flushed there at the exit
    except (InputError, MemoryError, OSError, UnicodeError) as e:  # UnicodeError: a prompt that is not UTF-8
        say(f"deepseek_v3.py: {str(e) or 'not enough memory'}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
