"""DeepSeek-V3, the whole model in one file: a specification that runs.

    python deepseek_v3.py     tells a story with the small model beside it; --help lists its flags

Part I (sections 1-7) is the model as the paper defines it, for one sequence: nothing cached,
nothing skipped. Part II (section 8) computes the same; each piece says why it is equal, and a test
shows it in float64 (in float16 they round differently). Part III (sections 9-11) is the program.

    component   definition                     computation                 equal because
    attention   mla_naive: keys of each head   mla_absorbed: one for all   q . (W c) = (W^T q) . c
    context     forward, the whole sequence    cached_pass, in chunks      attention is causal
    experts     moe_all: the sum over all      moe_chosen: the chosen      the other gates are 0
    generation  generate_greedy                generate, MTP drafts        `verify` keeps p as it is

The model takes its two expensive parts as arguments, by default the definitions: `attend` is
mla_naive, `experts` is moe_all. With these it also runs under jax.numpy, in jit and grad, if
`top_k` is replaced (its kind="stable" is NumPy's); weights/train.py trains by it.

Equation numbers are the technical report's (arXiv:2412.19437v2), tensor names the checkpoint's,
configuration keys config.json's. "HF" is Hugging Face transformers 5.23.0, "official" the code in
deepseek-ai/DeepSeek-V3, inference/ (commit 9b4e978). x is the residual stream or what a layer reads
of it (the paper's h_t, u_t); h is a state after all layers (h^0, h^k). Capital letters at the end
of a name are the axes of an array: q_THX has the shape (T, H, X). A test checks them.

    T  tokens of this call             H  num_attention_heads     E  n_routed_experts
    S  tokens so far, these T the last N  qk_nope_head_dim        K  num_experts_per_tok
    D  hidden_size                     R  qk_rope_head_dim        G  n_group
    Q  q_lora_rank (the paper's d_c')  P  R / 2, pairs            W  vocab_size
    C  kv_lora_rank (d_c)              V  v_head_dim              J  key heads
    L  C + R, a cache entry            X, Y  any other size
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers

# ==== Part I. The model, as defined ===============================================================

# ---- 1. Arrays -----------------------------------------------------------------------------------
# Everything below is written against one array namespace, chosen once: NumPy, or CuPy on a GPU.

xp = np


def to_host(x):
    """An array of `xp` as a NumPy array; xp.asarray is the way back."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def wide(x):
    """x in float32 or better: norms, softmax and routing are never computed in half precision."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


def top_k(score, k):
    """Indices (..., k) of the k largest of the last axis, largest first. Of equals the lowest index
    wins: the paper does not say, and implementations have disagreed (vLLM #52679 and others)."""
    return xp.argsort(-score, axis=-1, kind="stable")[..., :k]


def one_hot(index, n):
    """Boolean (..., n): where the last axis equals index (...)."""
    return index[..., None] == xp.arange(n)


recorded = None  # a dict while `recording`


def record(name, x):
    """While `recording`, keep x under the path of the module that produced it."""
    if recorded is not None:
        recorded.setdefault(name, []).append(x)


@contextlib.contextmanager
def recording():
    """Yields a dict {name: array} of what is recorded in the block, parts of a sequence joined."""
    global recorded
    outer, recorded = recorded, {}
    named = recorded
    try:
        yield named
    finally:
        recorded = outer
    for name, parts in named.items():
        named[name] = parts[0] if len(parts) == 1 else xp.concatenate(parts)


# ---- 2. Configuration ----------------------------------------------------------------------------
# The numbers that make one model, with the paper's symbols. The defaults are DeepSeek-V3's.


@dataclass(frozen=True)
class Yarn:
    """YaRN's longer context (report 4.3), `rope_scaling` in config.json."""

    factor: float = 40.0  # s
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0  # beta
    beta_slow: float = 1.0  # alpha
    mscale: float = 1.0  # = mscale_all_dim; else YaRN would scale cos and sin too


@dataclass(frozen=True)
class Config:
    """The fields are keys of config.json. Section 9 says which values are accepted."""

    vocab_size: int = 129280
    hidden_size: int = 7168  # d
    num_hidden_layers: int = 61
    num_attention_heads: int = 128  # n_h
    q_lora_rank: int | None = 1536  # d_c'; None: queries are not compressed
    kv_lora_rank: int = 512  # d_c
    qk_nope_head_dim: int = 128  # d_h
    qk_rope_head_dim: int = 64  # d_h^R
    v_head_dim: int = 128  # d_h
    intermediate_size: int = 18432  # of the dense layers
    first_k_dense_replace: int = 3  # layers before it have no experts
    moe_intermediate_size: int = 2048  # of one expert
    n_shared_experts: int = 1  # N_s
    n_routed_experts: int = 256  # N_r
    num_experts_per_tok: int = 8  # K_r
    n_group: int = 8  # groups of experts, one on each node
    topk_group: int = 4  # M, groups a token may use
    routed_scaling_factor: float = 2.5  # not in eq. (13)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = Yarn()  # None: plain RoPE
    max_position_embeddings: int = 163840
    num_nextn_predict_layers: int = 1  # MTP modules; the paper's D

    def __post_init__(self):
        check_config(self)


# ---- 3. Primitives -------------------------------------------------------------------------------


def linear(x, w, name):
    """The matrix `name.weight` (Y, X) times x (..., X) -> (..., Y). No linear map has a bias."""
    return x @ w[f"{name}.weight"].T


def rms_norm(x, w, name, eps):
    """x / rms(x) * `name.weight` over the last axis. The normalised x is rounded to x's dtype
    before it meets the weight: so does HF, while the official code rounds once, after."""
    mean_square = (wide(x) ** 2).sum(axis=-1, keepdims=True) / x.shape[-1]
    normed = wide(x) / xp.sqrt(mean_square + eps)
    return normed.astype(x.dtype, copy=False) * w[f"{name}.weight"]


def sigmoid(x):
    """1 / (1 + e^-x), wide, returned in x's dtype; as e^min(x, 0) / (1 + e^-|x|): no power and no
    gradient overflows."""
    e = xp.exp(xp.minimum(wide(x), 0))
    return (e / (1 + xp.exp(xp.minimum(wide(x), -wide(x))))).astype(x.dtype, copy=False)


def silu(x):
    return (wide(x) * sigmoid(wide(x))).astype(x.dtype, copy=False)


def swiglu(x, w, name, linear=linear):
    """An MLP: down_proj(silu(gate_proj(x)) * up_proj(x)). x (..., D) -> (..., D)."""
    gate = linear(x, w, f"{name}.gate_proj")
    up = linear(x, w, f"{name}.up_proj")
    return linear(silu(gate) * up, w, f"{name}.down_proj")


def softmax(x):
    """Over the last axis, wide, returned in x's dtype. A row needs one entry above -inf."""
    e = xp.exp(wide(x) - wide(x).max(axis=-1, keepdims=True))
    return (e / e.sum(axis=-1, keepdims=True)).astype(x.dtype, copy=False)


@functools.cache
def rope_frequencies(cfg):
    """Radians per position of each of the P pairs, float64 on the host. Plain RoPE: theta^(-2j/R).

    YaRN keeps the pairs that turn more than beta_fast times within the original context, divides
    the frequency of those that turn less than beta_slow times by the factor, and blends in between:
    at every position of every prompt. (In the official code a large max_seq_len switches it on.)"""
    R, theta, yarn = cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling
    freq_P = theta ** -(np.arange(0, R, 2) / R)
    if yarn is None:
        return freq_P
    def pair(turns):  # a real number: the pair that turns so often within the original context
        length = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return R * math.log(length) / (2 * math.log(theta))
    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), R - 1)  # as HF; P - 1 would be natural
    ramp_P = np.clip((np.arange(R // 2) - low) / ((high - low) or 0.001), 0, 1)
    return freq_P * (1 - ramp_P) + freq_P / yarn.factor * ramp_P


def softmax_scale(cfg):
    """1 / sqrt(d_h + d_h^R) of eq. (10), times YaRN's m^2, which eq. (10) leaves out; report 4.3
    has m = 0.1 ln(s) + 1, mscale 1: in DeepSeek-V3 m^2 is 1.8739."""
    yarn = cfg.rope_scaling
    m = 0.1 * yarn.mscale * math.log(yarn.factor) + 1 if yarn else 1
    return m**2 / math.sqrt(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)


def rotations(start, T, cfg, dtype):
    """e^(i angle) of the T positions from `start` on -> (T, P). Angles are float64 (in JAX with
    jax_enable_x64): at position 163,839 those of float32 are off by 5e-3."""
    angle_TP = xp.arange(start, start + T)[:, None] * xp.asarray(rope_frequencies(cfg))
    return xp.exp(1j * angle_TP).astype(np.result_type(dtype, np.complex64))


def rope(x, rotation):
    """Rotate pair j of x, (a, b), by its angle: (a + ib) e^(i angle) is
    (a cos - b sin) + i (a sin + b cos). x (..., R), rotation (..., P), broadcast. Pairs are
    neighbours, (2j, 2j+1), in the released weights. HF reorders queries and keys to halves first,
    which leaves every score as it is but caches a permuted key."""
    z = (wide(x[..., 0::2]) + 1j * wide(x[..., 1::2])) * rotation
    return z.view(z.real.dtype).astype(x.dtype, copy=False)  # a and b of a pair side by side


# ---- 4. Multi-head latent attention (section 2.1.1) ----------------------------------------------
# All heads' keys and values are linear in one small vector per token, [c_KV ; k_R]. k_R alone, one
# key for all heads, carries the position: a rotated W_UK c could not be absorbed (section 8).

LATENT_EPS = 1e-6  # of the norms on the latents whatever rms_norm_eps says: so HF and official


def attention(q_THX, k_SJX, v_SJY, scale):
    """Eq. (10), softmax(q . k) v -> (T, H, Y). The queries are those of the last T of S positions;
    each sees its own position and those before. J = H key heads: multi-head attention; J = 1:
    multi-query; between them grouped-query, where query head h reads key head h // (H/J)."""
    (T, H), (S, J) = q_THX.shape[:2], k_SJX.shape[:2]
    k_SHX = xp.repeat(k_SJX, H // J, axis=1)
    v_SHY = xp.repeat(v_SJY, H // J, axis=1)
    score_HTS = scale * xp.einsum("THX,SHX->HTS", q_THX, k_SHX)
    visible_TS = xp.arange(S) <= xp.arange(S - T, S)[:, None]
    p_HTS = softmax(xp.where(visible_TS, score_HTS, -xp.inf))
    return xp.einsum("HTS,SHY->THY", p_HTS, v_SHY)


def mla_query(x_TD, w, name, cfg, rotation_TP):
    """The queries of all heads -> q_nope_THN and, rotated, q_rope_THR."""
    if cfg.q_lora_rank is None:
        q_TY = linear(x_TD, w, f"{name}.q_proj")
    else:
        c_TQ = linear(x_TD, w, f"{name}.q_a_proj")  # eq. (6)
        c_TQ = rms_norm(c_TQ, w, f"{name}.q_a_layernorm", LATENT_EPS)  # report 4.2
        q_TY = linear(c_TQ, w, f"{name}.q_b_proj")
    q_THX = q_TY.reshape(len(x_TD), cfg.num_attention_heads, -1)  # each head [nope ; rope]
    q_nope_THN = q_THX[..., : cfg.qk_nope_head_dim]  # eq. (7)
    q_rope_THR = rope(q_THX[..., cfg.qk_nope_head_dim :], rotation_TP[:, None])  # eq. (8)
    record(f"{name}.q_rope", q_rope_THR)
    return q_nope_THN, q_rope_THR


def mla_latent(x_TD, w, name, cfg, rotation_TP):
    """All that later tokens need of a token -> kv_TL = [c_KV ; k_R]. k_R is not normed."""
    kv_TL = linear(x_TD, w, f"{name}.kv_a_proj_with_mqa")
    c_TC = kv_TL[:, : cfg.kv_lora_rank]  # eq. (1)
    c_TC = rms_norm(c_TC, w, f"{name}.kv_a_layernorm", LATENT_EPS)  # report 4.2
    k_rope_TR = rope(kv_TL[:, cfg.kv_lora_rank :], rotation_TP)  # eq. (3)
    record(f"{name}.kv_latent", c_TC)
    record(f"{name}.k_rope", k_rope_TR)
    return xp.concatenate([c_TC, k_rope_TR], axis=-1)


def mla_naive(q_nope_THN, q_rope_THR, kv_SL, w, name, cfg, attention=attention):
    """Definition: latents to keys and values of every head, then multi-head attention -> o_THV."""
    S, H, N = len(kv_SL), cfg.num_attention_heads, cfg.qk_nope_head_dim
    c_SC, k_rope_SR = kv_SL[:, : cfg.kv_lora_rank], kv_SL[:, cfg.kv_lora_rank :]
    up_SHY = linear(c_SC, w, f"{name}.kv_b_proj").reshape(S, H, -1)  # each head [key ; value]
    k_nope_SHN, v_SHV = up_SHY[..., :N], up_SHY[..., N:]  # eqs. (2), (5)
    k_rope_SHR = xp.broadcast_to(k_rope_SR[:, None], (S, H, cfg.qk_rope_head_dim))
    k_SHX = xp.concatenate([k_nope_SHN, k_rope_SHR], axis=-1)  # eq. (4)
    q_THX = xp.concatenate([q_nope_THN, q_rope_THR], axis=-1)  # eq. (9)
    return attention(q_THX, k_SHX, v_SHV, softmax_scale(cfg))


def mla(x_TD, w, name, cfg, rotation_TP, attend=mla_naive):
    """Multi-head latent attention, eqs. (1)-(11) -> (T, D). `attend` gets the latents of these
    T tokens; one with a cache adds those before them."""
    q_nope_THN, q_rope_THR = mla_query(x_TD, w, name, cfg, rotation_TP)
    kv_TL = mla_latent(x_TD, w, name, cfg, rotation_TP)
    o_THV = attend(q_nope_THN, q_rope_THR, kv_TL, w, name, cfg)
    y_TD = linear(o_THV.reshape(len(x_TD), -1), w, f"{name}.o_proj")  # eq. (11)
    record(name, y_TD)
    return y_TD


# ---- 5. DeepSeekMoE (section 2.1.2) --------------------------------------------------------------
# Each token chooses a few experts of many; a bias that no gradient touches keeps the load even.


def route(x_TD, w, name, cfg):
    """Which experts, and with what gates -> index_TK, best first; gate_TK in float32 or better.
    The bias enters the choice alone: the gates come from the affinities without it."""
    score_TE = sigmoid(linear(wide(x_TD), w, f"{name}.gate"))  # eq. (15), affinities
    biased_TE = score_TE + w[f"{name}.gate.e_score_correction_bias"]
    index_TK = top_k(keep_best_groups(biased_TE, cfg), cfg.num_experts_per_tok)  # eq. (16)
    gate_TK = xp.take_along_axis(score_TE, index_TK, axis=-1)
    gate_TK = gate_TK / (gate_TK.sum(axis=-1, keepdims=True) + 1e-20)  # eq. (13); guard of HF
    gate_TK = gate_TK * cfg.routed_scaling_factor
    record(f"{name}.gate.scores", score_TE)
    record(f"{name}.gate.indices", index_TK)
    record(f"{name}.gate.weights", gate_TK)
    return index_TK, gate_TK


def keep_best_groups(biased_TE, cfg):
    """Score a group by the sum of its two highest biased affinities (two: the paper's K_r / M);
    mask the experts of all but the topk_group best with -inf. A mask of 0, as in older code, wins
    where biased affinities are negative (DeepSeek-V3 #741)."""
    biased_TGX = biased_TE.reshape(len(biased_TE), cfg.n_group, -1)
    score_TG = xp.sort(biased_TGX, axis=-1)[..., -2:].sum(axis=-1)
    keep_TG = one_hot(top_k(score_TG, cfg.topk_group), cfg.n_group).any(axis=-2)
    return xp.where(keep_TG[..., None], biased_TGX, -xp.inf).reshape(biased_TE.shape)


def moe_all(x_TD, w, name, index_TK, gate_TK, cfg):
    """Definition, the routed sum of eq. (12) over *all* experts: the gates of the others are 0."""
    y_TD = xp.zeros_like(x_TD)
    for e in range(cfg.n_routed_experts):
        gate_T = xp.where(index_TK == e, gate_TK, 0).sum(axis=-1).astype(x_TD.dtype)
        y_TD = y_TD + gate_T[:, None] * swiglu(x_TD, w, f"{name}.experts.{e}")
    return y_TD


def moe(x_TD, w, name, cfg, experts=moe_all):
    """Eq. (12) without its residual -> (T, D): the gated routed experts, plus the shared ones,
    which are one MLP of their joint width."""
    index_TK, gate_TK = route(x_TD, w, name, cfg)
    routed_TD = experts(x_TD, w, name, index_TK, gate_TK, cfg)
    shared_TD = swiglu(x_TD, w, f"{name}.shared_experts")
    record(f"{name}.shared_experts", shared_TD)
    return routed_TD + shared_TD


def update_bias(bias_E, load_E, gamma):
    """Balancing without an auxiliary loss, after each training step, by the loads of its whole
    batch: gamma down where overloaded, up where underloaded, 0 at the mean. As printed
    (arXiv:2408.15664, Algorithm 1) the biases are not centred and may drift."""
    return bias_E + gamma * xp.sign(load_E.mean() - load_E).astype(bias_E.dtype)


def balance_loss(score_TE, cfg):
    """The balance loss of one sequence, without alpha. As printed, f counts the plain top K_r
    affinities, without bias or groups; f has no gradient."""
    K, E = cfg.num_experts_per_tok, cfg.n_routed_experts
    chosen_TE = one_hot(top_k(score_TE, K), E).sum(axis=-2)
    f_E = chosen_TE.mean(axis=0) * (E / K)  # eq. (18)
    p_E = (score_TE / score_TE.sum(axis=-1, keepdims=True)).mean(axis=0)  # eqs. (19), (20)
    return (f_E * p_E).sum()  # eq. (17)


# ---- 6. The model --------------------------------------------------------------------------------
# Blocks of attention and MLP on a residual stream, each behind a norm; the first MLPs are dense.


def block(x_TD, w, layer, cfg, rotation_TP, attend=mla_naive, experts=moe_all):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""
    name = f"model.layers.{layer}"
    normed_TD = rms_norm(x_TD, w, f"{name}.input_layernorm", cfg.rms_norm_eps)
    record(f"{name}.input_layernorm", normed_TD)
    x_TD = x_TD + mla(normed_TD, w, f"{name}.self_attn", cfg, rotation_TP, attend)
    normed_TD = rms_norm(x_TD, w, f"{name}.post_attention_layernorm", cfg.rms_norm_eps)
    record(f"{name}.post_attention_layernorm", normed_TD)
    if layer < cfg.first_k_dense_replace:
        y_TD = swiglu(normed_TD, w, f"{name}.mlp")
    else:
        y_TD = moe(normed_TD, w, f"{name}.mlp", cfg, experts)
    record(f"{name}.mlp", y_TD)
    x_TD = x_TD + y_TD
    record(name, x_TD)
    return x_TD


def forward(token_T, w, cfg, start=0, attend=mla_naive, experts=moe_all):
    """Token ids to the main model's states h^0 (T, D), after `model.norm`. w: tensor names to
    arrays of `xp`, whose dtype is the computation's (a router's float32 or better). start: the
    position of the first token; the definition is given whole sequences, from 0 on."""
    x_TD = w["model.embed_tokens.weight"][token_T]
    record("model.embed_tokens", x_TD)
    rotation_TP = rotations(start, len(token_T), cfg, x_TD.dtype)
    for layer in range(cfg.num_hidden_layers):
        x_TD = block(x_TD, w, layer, cfg, rotation_TP, attend, experts)
    h_TD = rms_norm(x_TD, w, "model.norm", cfg.rms_norm_eps)
    record("model.norm", h_TD)
    return h_TD


def head(h_TD, w):
    """OutHead: states, normed already, to logits (T, W). The MTP modules share it."""
    return linear(h_TD, w, "lm_head")


def generate_greedy(prompt, w, cfg, max_tokens):
    """Generation, as defined: the likeliest token follows, of equals the lowest id -> new ids."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        h_TD = forward(np.array(tokens), w, cfg)
        tokens.append(int(xp.argmax(head(h_TD[-1:], w))))
    return tokens[len(prompt) :]


# ---- 7. Multi-token prediction (section 2.2) -----------------------------------------------------
# Module k predicts the token k+1 ahead, from the state of module k-1 and the embedding of the token
# k ahead: so the causal chain is kept.


def mtp_depth(w, cfg):
    """How many MTP modules w holds: some checkpoints leave them out."""
    for k in range(cfg.num_nextn_predict_layers):
        if f"model.layers.{cfg.num_hidden_layers + k}.eh_proj.weight" not in w:
            return k
    return cfg.num_nextn_predict_layers


def mtp(k, h_TD, token_T, w, cfg, start=0, attend=mla_naive, experts=moe_all):
    """Eqs. (21), (22): from the pairs (h_i^{k-1}, t_{i+k}), i from `start` on, the states h_i^k
    (T, D); token_T holds the t_{i+k}, `head` is eq. (23). Module k, from 1, is layer
    num_hidden_layers + k - 1 of the checkpoint, a block of its own; embedding and head are the main
    model's (copies are ignored). What the paper leaves open, or the released weights do otherwise:
    - the joined vector is [embedding ; state]; eq. (21) prints the reverse, the weights need this;
    - h^0 is the state after `model.norm`: so in HF, vLLM and SGLang; torchtitan takes it before
      (DeepSeek-V3 #839 was never answered). Likewise module k + 1 takes h^k after
      `shared_head.norm`, as in HF; DeepSeek-V3 has one module only;
    - a pair's position is i. Only differences of positions matter: i + 1 (HF) gives the same;
    - no embedding is masked at position 0 (vLLM masks one: its issue 33299)."""
    layer = cfg.num_hidden_layers + k - 1
    name = f"model.layers.{layer}"
    embedded_TD = w["model.embed_tokens.weight"][token_T]
    embedded_TD = rms_norm(embedded_TD, w, f"{name}.enorm", cfg.rms_norm_eps)
    state_TD = rms_norm(h_TD, w, f"{name}.hnorm", cfg.rms_norm_eps)
    joined_TX = xp.concatenate([embedded_TD, state_TD], axis=-1)
    x_TD = linear(joined_TX, w, f"{name}.eh_proj")  # eq. (21)
    record(f"{name}.eh_proj", x_TD)
    rotation_TP = rotations(start, len(token_T), cfg, x_TD.dtype)
    x_TD = block(x_TD, w, layer, cfg, rotation_TP, attend, experts)  # eq. (22)
    return rms_norm(x_TD, w, f"{name}.shared_head.norm", cfg.rms_norm_eps)


def cross_entropy(logits_TW, target_T):
    """-log P(target) at each position, natural logarithm -> (T,)."""
    logits_TW = wide(logits_TW)
    max_T = logits_TW.max(axis=-1)
    log_sum_T = xp.log(xp.exp(logits_TW - max_T[:, None]).sum(axis=-1)) + max_T
    return log_sum_T - xp.take_along_axis(logits_TW, target_T[:, None], axis=-1)[:, 0]


def training_objective(w, token_X, cfg, mtp_weight=0.3, balance_weight=1e-4, experts=moe_all):
    """The loss of pre-training, L_main + L_MTP + L_Bal, of one sequence of X = T + 1 tokens, X at
    least 2 + the MTP modules; that of a batch is the mean. L_main is the mean cross-entropy of
    tokens 2..T+1; L_Bal is alpha times `balance_loss`, summed over all layers with experts, the MTP
    modules' too (this file's reading). The weights are the paper's lambda at first, and its alpha.

    -> the loss, and its parts without lambda and alpha: {"main", "mtp": [L^1, L^2, ...], "balance",
    "load": {name of the router: load_E}}. The biases only choose, so their gradient is 0."""
    token_X = xp.asarray(token_X)
    T, depth, losses = len(token_X) - 1, mtp_depth(w, cfg), []
    with recording() as named:
        h_TD = forward(token_X[:T], w, cfg, experts=experts)
        main = cross_entropy(head(h_TD, w), token_X[1:]).mean()
        for k in range(1, depth + 1):
            h_TD = mtp(k, h_TD[: T - k], token_X[k:T], w, cfg, experts=experts)
            loss_T = cross_entropy(head(h_TD, w), token_X[k + 1 :])
            losses.append(loss_T.sum() / T)  # eq. (24): T - k terms, as printed divided by T
    routers = [name.removesuffix(".scores") for name in named if name.endswith(".gate.scores")]
    balance = sum(balance_loss(named[f"{name}.scores"], cfg) for name in routers)
    chosen = {name: one_hot(named[f"{name}.indices"], cfg.n_routed_experts) for name in routers}
    load = {name: chosen_TKE.sum(axis=(0, 1)) for name, chosen_TKE in chosen.items()}
    mtp_loss = sum(losses) / max(depth, 1)  # eq. (25), without lambda
    total = main + mtp_weight * mtp_loss + balance_weight * balance
    return total, {"main": main, "mtp": losses, "balance": balance, "load": load}


# ==== Part II. The model, as computed =============================================================

# ---- 8. Latent cache, absorption, attention in pieces, chosen experts, the cached pass -----------
# A port needs `Cache`, `mla_absorbed` (in it `attention` will do), `moe_chosen`, `cached_pass`.

MAX_EXPANDED = 2**29  # elements of expanded keys and values, without copies
MAX_SCORES = 2**18  # scores held at a time, as fit a core's cache; on a GPU 256 times more
MIN_QUERIES = 256  # of one key head in a product (tokens times heads), even beyond MAX_SCORES
# A large block, freed: glibc then reuses memory, without page faults (mallopt(3)).
np.empty(31 * 2**20, np.int8)


class Cache:
    """The latent cache of the main model or of one MTP module: for each layer an array (capacity,
    L), an entry [c_KV ; k_R] for each position. `length` positions are held; to lower it is to
    forget the last ones, such as a rejected draft. Equal because attention is causal: no later
    token changes an entry. Entry i of MTP module k is of (h_i^{k-1}, t_{i+k})."""

    def __init__(self, capacity):
        self.capacity, self.length, self.layers = capacity, 0, {}

    def write(self, name, kv_TL):
        """Put a layer's next T entries behind those held -> all S of them, (S, L)."""
        if name not in self.layers:
            self.layers[name] = xp.empty((self.capacity, kv_TL.shape[1]), kv_TL.dtype)
        end = self.length + len(kv_TL)
        assert end <= self.capacity  # NumPy would drop a single token beyond it without a word
        self.layers[name][self.length : end] = kv_TL
        return self.layers[name][:end]


def mla_absorbed(q_nope_THN, q_rope_THR, kv_SL, w, name, cfg):
    """= mla_naive, and no key is ever expanded.
    q . (W_UK c) = (W_UK^T q) . c: W_UK moves to the query's side, once per query instead of once
    per cached token. Then all heads share the key [c ; k_R], the cache's own entry, and the value
    c: multi-query attention with heads of size L, whose result W_UV expands at the end. Were the
    key rotated by its position s, R_s W_UK c, the absorbed query W_UK^T R_s^T q would differ for
    every s: that is why k_R is decoupled, eq. (3)."""
    up_HXC = w[f"{name}.kv_b_proj.weight"].reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank)
    w_uk_HNC, w_uv_HVC = up_HXC[:, : cfg.qk_nope_head_dim], up_HXC[:, cfg.qk_nope_head_dim :]
    q_HTC = q_nope_THN.swapaxes(0, 1) @ w_uk_HNC  # W_UK^T q, head by head
    q_THL = xp.concatenate([q_HTC.swapaxes(0, 1), q_rope_THR], axis=-1)
    k_SJL = kv_SL[:, None]  # J = 1
    o_THL = attention_in_pieces(q_THL, k_SJL, k_SJL, softmax_scale(cfg))  # of N + R, not L
    o_HTC = o_THL[..., : cfg.kv_lora_rank].swapaxes(0, 1)  # what k_R as a value gives is left out
    return (o_HTC @ w_uv_HVC.swapaxes(1, 2)).swapaxes(0, 1)  # W_UV o


def absorbing_pays(T, S, cfg):
    """Whether mla_absorbed multiplies less than mla_naive, or expanded keys find no room."""
    N, R, V, C = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank
    naive = S * C * (N + V) + T * S * (N + R + V)  # per head
    absorbed = T * C * (N + V) + T * S * 2 * (C + R)
    return absorbed < naive or S * cfg.num_attention_heads * (N + R + V) > MAX_EXPANDED


def mla_cached(cache, q_nope_THN, q_rope_THR, kv_TL, w, name, cfg):
    """= mla_naive of all positions so far, of which the cache holds all but the last T."""
    kv_SL = cache.write(name, kv_TL)
    if absorbing_pays(len(kv_TL), len(kv_SL), cfg):
        return mla_absorbed(q_nope_THN, q_rope_THR, kv_SL, w, name, cfg)
    return mla_naive(q_nope_THN, q_rope_THR, kv_SL, w, name, cfg, attention_in_pieces)


def attention_in_pieces(q_THX, k_SJX, v_SJY, scale):
    """= attention, a few heads and queries at a time, so that only few scores are held. Queries
    of one key head meet it in one product; the softmax's division comes after that with v."""
    (T, H, X), (S, J, Y) = q_THX.shape, v_SJY.shape
    shared = H // J  # query heads of each key head
    q = (wide(q_THX) * scale).reshape(T, J, shared, X).swapaxes(0, 1)
    k, v = wide(k_SJX).swapaxes(0, 1), wide(v_SJY).swapaxes(0, 1)
    out = xp.empty((J, T, shared, Y), q.dtype)
    limit = MAX_SCORES if xp is np else 256 * MAX_SCORES
    for tokens in slices(T, max(1, MIN_QUERIES // shared, limit // (H * S))):
        n = tokens.stop - tokens.start
        seen = S - T + tokens.stop  # no query of these looks further
        for heads in slices(J, max(1, limit // (n * shared * S))):
            part = q[heads, tokens].reshape(-1, n * shared, X)
            score = part @ k[heads, :seen].swapaxes(1, 2)
            if n > 1:  # all n tokens see what was before them
                later = xp.arange(n) > xp.arange(n)[:, None, None]
                own = score.reshape(-1, n, shared, seen)[..., seen - n :]
                xp.copyto(own, -xp.inf, where=later)
            score -= score.max(axis=-1, keepdims=True)
            xp.exp(score, out=score)
            o = (score @ v[heads, :seen]) / score.sum(axis=-1, keepdims=True)
            out[heads, tokens] = o.reshape(-1, n, shared, Y)
    return out.swapaxes(0, 1).reshape(T, H, Y).astype(q_THX.dtype, copy=False)


def slices(n, step):
    """0 to n in slices of step, the last one cropped: slices(5, 2) covers 0-1, 2-3 and 4."""
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def moe_chosen(x_TD, w, name, index_TK, gate_TK, cfg):
    """= moe_all, which adds 0 for the others: each chosen expert sees the tokens that chose it."""
    K, index_X = cfg.num_experts_per_tok, to_host(index_TK).ravel()  # X = T K choices
    order_X = index_X.argsort(kind="stable")  # the choices by expert
    load_E = np.bincount(index_X, minlength=cfg.n_routed_experts)
    end_E = load_E.cumsum()
    rows = {e: slice(end_E[e] - load_E[e], end_E[e]) for e in load_E.nonzero()[0].tolist()}
    def linear_chosen(x_XY, w, name):
        """`linear` of each choice by the matrix of its expert."""
        parts = [linear(x_XY[rows[e]], w, name.replace("experts", f"experts.{e}")) for e in rows]
        return xp.concatenate(parts)
    y_XD = swiglu(x_TD[xp.asarray(order_X // K)], w, f"{name}.experts", linear_chosen)
    y_TKD = y_XD[xp.asarray(order_X.argsort())].reshape(len(x_TD), K, -1)
    return (gate_TK[:, None].astype(x_TD.dtype, copy=False) @ y_TKD)[:, 0]


def cached_pass(step, arrays, w, cfg, cache, chunk):
    """= the last T states of step (`forward`, or one module's `mtp`) on the whole sequence: the
    arrays (T, ...) go on from what the cache holds, `chunk` positions at a time."""
    parts, attend = [], functools.partial(mla_cached, cache)
    for rows in slices(len(arrays[0]), chunk):
        part = [x[rows] for x in arrays]
        parts.append(step(*part, w, cfg, cache.length, attend, moe_chosen))
        cache.length += len(part[0])
    return xp.concatenate(parts)


# ==== Part III. The program =======================================================================

# ---- 9. Checkpoints ------------------------------------------------------------------------------


class InputError(ValueError):
    """What was given cannot be used. The message is one line: what, where, what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


SUPPORTED = {  # an absent key means the first
    "model_type": ["deepseek_v3", "kimi_k2", "glm4_moe_lite"], "hidden_act": ["silu"],
    "scoring_func": ["sigmoid"], "topk_method": ["noaux_tc"], "norm_topk_prob": [True],
    "moe_layer_freq": [1], "attention_bias": [False], "tie_word_embeddings": [False],
    "partial_rotary_factor": [1], "rope_interleave": [True],
    "rope_type": ["default", "yarn"], "attention_factor": [None], "truncate": [True],
}
OPTIONAL = ["num_nextn_predict_layers", "routed_scaling_factor", "rms_norm_eps", "rope_theta",
            "max_position_embeddings"]  # absent, they are as in DeepSeek-V3
MAY_BE_ZERO = ["first_k_dense_replace", "num_nextn_predict_layers"]


def read_json(path):
    """The JSON object in a file."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} cannot be read as JSON: {e}") from None
    require(isinstance(value, dict), f"{path} must be a JSON object")
    return value


def read_config(path):
    return parse_config(read_json(Path(path) / "config.json" if Path(path).is_dir() else path))


def parse_config(keys):
    """The Config that the keys of a config.json describe, in the release's or transformers 5's
    spelling. null means an absent key; keys that do not change the result are ignored."""
    given = {key: value for key, value in keys.items() if value is not None}
    rope = given.pop("rope_parameters", given.get("rope_scaling", {}))
    same = isinstance(rope, dict) and given.pop("rope_scaling", rope) == rope
    require(same, "rope_scaling must be an object or null, and equal to rope_parameters")
    given = {key: value for key, value in rope.items() if value is not None} | given
    given.setdefault("rope_type", given.get("type", None if "factor" in rope else "default"))
    for key, values in SUPPORTED.items():
        value, supported = given.get(key, values[0]), " or ".join(map(repr, values))
        require(value in values, f"{key} {value!r:.99} is not implemented, only {supported}")
    given = {"q_lora_rank": None} | given | {"rope_scaling": None}
    if given["rope_type"] == "yarn":
        for key in ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim"):
            require(key in given, f"rope_scaling of type yarn lacks {key}")
        same = given["mscale"] == given["mscale_all_dim"]
        require(same, "rope_scaling: only an mscale equal to mscale_all_dim is implemented")
        yarn = [f.name for f in fields(Yarn) if f.name in given]
        given["rope_scaling"] = Yarn(**{key: given[key] for key in yarn})
    absent = [f.name for f in fields(Config) if f.name not in given and f.name not in OPTIONAL]
    wanted = "the config.json of the Hugging Face layout is wanted; this one lacks"
    require(not absent, f"{wanted} {', '.join(absent)}")
    return Config(**{f.name: given[f.name] for f in fields(Config) if f.name in given})


def check_config(cfg):
    """Raise InputError unless each value has its type and a sane size, and they fit together."""
    for part in filter(None, (cfg, cfg.rope_scaling)):
        for f in fields(part):
            value, least = getattr(part, f.name), 0 if f.name in MAY_BE_ZERO else 1e-12
            fits = isinstance(value, f.type | int) and not isinstance(value, bool)
            fits = fits and (not isinstance(value, int | float) or least <= value <= 1e12)
            kind = getattr(f.type, "__name__", f.type)
            require(fits, f"{f.name} must be {kind}, {least} to 1e12, not {value!r:.99}")
    E, G, K = cfg.n_routed_experts, cfg.n_group, cfg.num_experts_per_tok
    layers, yarn, most = cfg.num_hidden_layers, cfg.rope_scaling, cfg.topk_group * E // G
    tensors = (layers + cfg.num_nextn_predict_layers) * (3 * E + 20)
    require(tensors < 2**19, "num_hidden_layers times n_routed_experts: over 500,000 tensors")
    require(cfg.first_k_dense_replace < layers, "first_k_dense_replace leaves no layer of experts")
    require(cfg.rope_theta > 1, f"rope_theta must be above 1, not {cfg.rope_theta}")
    require(yarn is None or yarn.factor >= 1, "rope_scaling: factor must be 1 or more")
    require(cfg.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even: RoPE rotates pairs")
    grouped = E % G == 0 and (G == 1 or E > G)  # a group is scored by its best two
    require(grouped, f"n_group {G} must divide n_routed_experts {E} into groups of 2 or more")
    require(cfg.topk_group <= G, f"topk_group {cfg.topk_group} must be at most n_group {G}")
    require(K <= most, f"num_experts_per_tok {K} is more than the {most} experts of topk_group")


def tensor_shapes(cfg):
    """Name -> shape of every tensor of a checkpoint, its MTP modules' too, except their copies of
    the embedding and head, which are shared."""
    D, H, C, R = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    N, V, Q, W = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.q_lora_rank, cfg.vocab_size
    def mlp(name, width):
        parts = {"gate_proj": (width, D), "up_proj": (width, D), "down_proj": (D, width)}
        return {f"{name}.{part}": shape for part, shape in parts.items()}
    attention = {"q_proj": (H * (N + R), D)}
    if Q is not None:
        attention = {"q_a_proj": (Q, D), "q_a_layernorm": (Q,), "q_b_proj": (H * (N + R), Q)}
    attention |= {"kv_a_proj_with_mqa": (C + R, D), "kv_a_layernorm": (C,)}
    attention |= {"kv_b_proj": (H * (N + V), C), "o_proj": (D, H * V)}
    E = cfg.n_routed_experts
    moe = {"mlp.gate": (E, D), "mlp.gate.e_score_correction_bias": (E,)}
    moe |= mlp("mlp.shared_experts", cfg.n_shared_experts * cfg.moe_intermediate_size)
    for e in range(E):
        moe |= mlp(f"mlp.experts.{e}", cfg.moe_intermediate_size)
    shapes = {"model.embed_tokens": (W, D), "model.norm": (D,), "lm_head": (W, D)}
    for layer in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        parts = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        parts |= {f"self_attn.{part}": shape for part, shape in attention.items()}
        parts |= mlp("mlp", cfg.intermediate_size) if layer < cfg.first_k_dense_replace else moe
        if layer >= cfg.num_hidden_layers:
            parts |= {"enorm": (D,), "hnorm": (D,), "eh_proj": (D, 2 * D), "shared_head.norm": (D,)}
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
    return {n if n.endswith("bias") else f"{n}.weight": shape for n, shape in shapes.items()}


BLOCK = 128  # an FP8 weight has one scale for each block of 128 x 128; the last ones are cropped


def dequantize(code, scale):
    """FP8 codes (Y, X) and `weight_scale_inv` (ceil(Y / 128), ceil(X / 128)) -> float32. The scale
    multiplies, whatever `inv` suggests, in one float32 product. The format, e4m3fn: sign, 4 bits of
    exponent (bias 7), 3 of mantissa; no infinity, 0x7f is NaN."""
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, (byte & 7) / 8
    value = np.where(exponent == 0, mantissa / 64, (1 + mantissa) * 2.0 ** (exponent - 7))
    value[127] = np.nan
    value = xp.asarray(np.concatenate([value, -value]).astype(np.float32))
    out = xp.empty(code.shape, np.float32)
    for rows, scale_X in zip(slices(len(code), BLOCK), scale, strict=True):
        out[rows] = xp.take(value, code[rows]) * xp.repeat(scale_X, BLOCK)[: code.shape[1]]
    return out


STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1"}  # as NumPy's
MAX_DECODED = 2**22  # elements that are decoded at a time, 16 MB in float32


class Stored:
    """A tensor in a file, in place of its array where there is no room for that: the model asks
    of a matrix x @ w.T, the rows of some ids (of the embedding), and a reshape."""

    __array_ufunc__ = None  # so that NumPy and CuPy leave x @ w to __rmatmul__
    T = property(lambda self: self)  # x @ w.T is the only product asked for

    def __init__(self, file, kind, shape, offset):
        self.file, self.kind, self.shape, self.offset = file, kind, shape, offset  # file: a memmap
        self.dtype, self.scale = np.dtype(np.float32), None  # of the computation; Stored, of FP8

    def __getitem__(self, rows):
        """Some rows, decoded to float32, then in dtype. A slice of FP8 begins with a block."""
        name, kind = self.file.filename, STORED[self.kind]
        apart = np.memmap(name, kind, "r", self.offset, self.shape)  # frees its pages
        part = xp.asarray(apart[rows if isinstance(rows, slice) else to_host(rows)])
        if self.kind == "BF16":
            part = (part.astype(xp.uint32) << 16).view(xp.float32)
        if self.kind == "F8_E4M3":
            scale = self.scale[rows.start // BLOCK : -(-rows.stop // BLOCK)]
            sound = ((scale >= 0) & (scale < 6e35)).all()  # times 448: the largest float32
            require(sound, f"{name}: a weight_scale_inv is not from 0 to 6e35")
            part = dequantize(part, scale)
        return part.astype(self.dtype, copy=False)

    def __rmatmul__(self, x):
        """x @ w.T, some rows at a time."""
        rows = MAX_DECODED // self.shape[1] // BLOCK * BLOCK
        bands = slices(self.shape[0], max(BLOCK, rows))
        return xp.concatenate([x @ self[band].T for band in bands], axis=-1)

    def whole(self):
        return self[0 : self.shape[0]]

    def reshape(self, *shape):
        return self.whole().reshape(*shape)


def read_safetensors(path):
    """A file's tensors, name -> Stored, if the safetensors library finds it sound. The format: the
    header's length n in 8 bytes; n bytes of JSON, {name: {dtype, shape, data_offsets}}; data."""
    try:
        names = safetensors.safe_open(path, "np").keys()
    except (OSError, safetensors.SafetensorError) as e:
        raise InputError(f"{path}: {e}; is the download complete?") from None
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n))
    file, tensors = np.memmap(path, np.uint8, "r"), {}
    for name in names:
        require(isinstance(header[name], dict), f"{path}: the entry of {name!r:.99} is no object")
        kind, shape, (begin, _) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
        tensors[name] = Stored(file, kind, tuple(shape), 8 + n + begin)
    return tensors


def read_shards(directory):
    """All tensors of a directory, name -> Stored. An index, if any, says which file holds which."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.exists():
        there = sorted(path.name for path in directory.glob("*"))[:5]
        require(single.exists(), f"{single} is not there, nor its index; there are {there}")
        return read_safetensors(single)
    weight_map = read_json(index).get("weight_map")
    require(isinstance(weight_map, dict), f"{index} lacks weight_map: which file holds a tensor")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard
        require(plain, f"{index}: {shard!r:.99} is not the name of a file beside it")
    shards = {shard: read_safetensors(directory / shard) for shard in set(weight_map.values())}
    return {name: shards[s][name] for name, s in weight_map.items() if name in shards[s]}


def system_bytes(path, key):
    """The bytes of a line "{key}: n kB" of a file in Linux's /proc; 0 elsewhere."""
    lines = Path(path).read_text() if Path(path).exists() else ""
    found = re.search(rf"{key}:\s*(\d+) kB", lines)
    return 1024 * int(found[1]) if found else 0


class Checkpoint:
    """The weights in a directory: tensor name -> array of `xp` in `dtype` (a router's in float32 or
    better), decoded when first used; where there is no room for a matrix, its Stored. Members are
    the tensors of `tensor_shapes`, each checked at once, without absent MTP modules. memory: bytes
    that decoded tensors may take, by default 70 % of what is free; first come, first kept."""

    def __init__(self, directory, cfg, dtype=np.float32, memory=None):
        quantised = read_json(Path(directory, "config.json")).get("quantization_config")
        fp8 = isinstance(quantised, dict) and quantised.get("quant_method") == "fp8"
        require(fp8 or quantised is None, f"{quantised!r:.99}: its quant_method is not fp8")
        self.loaded, self.stored = {}, read_shards(Path(directory))
        self.cfg = replace(cfg, num_nextn_predict_layers=mtp_depth(self.stored, cfg))
        self.shapes = tensor_shapes(self.cfg)
        for name, shape in self.shapes.items():
            check_tensor(name, shape, self.stored)
            least = np.float32 if ".mlp.gate." in name else dtype  # of routing
            self.stored[name].dtype = np.promote_types(dtype, least)
        if memory is None:
            free = system_bytes("/proc/meminfo", "MemAvailable") or math.inf
            memory = 0.7 * (free if xp is np else xp.cuda.runtime.memGetInfo()[0])
        self.room = memory

    def __contains__(self, name):
        return name in self.shapes

    def __getitem__(self, name):
        if name in self.loaded:
            return self.loaded[name]
        stored = self.stored[name]
        size = math.prod(stored.shape) * stored.dtype.itemsize
        if xp is np and STORED[stored.kind] == stored.dtype.str:  # nothing to decode: stays mapped
            found = np.ndarray(stored.shape, stored.dtype, stored.file, stored.offset)
        elif size > self.room and len(stored.shape) == 2:
            return stored
        else:
            found = stored.whole()
            self.room -= size
        finite = not name.endswith("e_score_correction_bias") or xp.isfinite(found).all()
        require(finite, f"{name} is not finite, so no expert can be chosen")
        self.loaded[name] = found
        return found


def check_tensor(name, shape, stored):
    """Raise InputError unless a tensor is there, as config.json says, and FP8 with its scales."""
    if name not in stored:
        near = max(stored, key=lambda it: len(os.path.commonprefix([it, name])), default="none")
        raise InputError(f"the weights lack {name}; the nearest name that they have is {near:.200}")
    it, scale = stored[name], stored.get(f"{name}_scale_inv")
    require(it.kind in STORED, f"{name} has dtype {it.kind}, not one of {', '.join(STORED)}")
    require(it.shape == shape, f"{name} has shape {it.shape}, config.json says {shape}")
    if it.kind == "F8_E4M3":
        grid = tuple(-(-n // BLOCK) for n in shape)
        sound = scale and scale.shape == grid and scale.kind in ("F32", "BF16")
        sound = sound and len(shape) == 2 and "embed_tokens" not in name
        require(sound, f"{name} is FP8: only a linear map may be, with {name}_scale_inv of {grid}")
        it.scale = scale


# ---- 10. Generation ------------------------------------------------------------------------------

CHUNK = 1024  # tokens that go through the model at a time, which bounds its activations' memory


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0: the likeliest; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        sound = 0 <= self.temperature < math.inf and self.top_k >= 0 and self.seed >= 0
        require(sound and 0 < self.top_p <= 1, f"temperature, top-k, top-p or seed: {self}")


def distribution(logits_W, sampling):
    """The probabilities (W,) that a token is drawn from, float64 on the host: temperature, then
    top-k, then top-p (of what top-k left, the fewest likeliest tokens that reach it). Of equals
    the lowest id comes first."""
    logits_W = logits_W.astype(np.float64)
    require(np.isfinite(logits_W).all(), "logits are not finite: the weights or the dtype overflow")
    if sampling.temperature == 0:
        return (np.arange(logits_W.size) == np.argmax(logits_W)).astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: e^-inf is the 0 it should be
        p_W = np.exp((logits_W - logits_W.max()) / sampling.temperature)
    if sampling.top_k or sampling.top_p < 1:
        ids = np.argsort(-p_W, kind="stable")[: sampling.top_k or None]
        sums = np.cumsum(p_W[ids])
        count = 1 + np.sum(sums[:-1] < sampling.top_p * sums[-1])
        p_W[np.delete(np.arange(p_W.size), ids[:count])] = 0
    return p_W / p_W.sum()


def draw(p_W, rng):
    """An index with probability p_W[index]. Where one is certain, no random number is used."""
    likeliest = int(np.argmax(p_W))
    return likeliest if p_W[likeliest] == 1 else int(rng.choice(p_W.size, p=p_W))


def verify(p_W, q_W, draft, rng):
    """The rejection rule of speculative sampling (arXiv:2211.17192) -> accepted, token. A draft
    of q is accepted with probability min(1, p/q), else max(p - q, 0) is drawn from: exactly p."""
    if rng.random() * q_W[draft] < p_W[draft]:
        return True, draft
    rest_W = np.maximum(p_W - q_W, 0)
    if not rest_W.any():  # p and q differ by rounding alone
        rest_W = p_W
    return False, draw(rest_W / rest_W.sum(), rng)


def check_prompt(prompt, cfg, max_tokens):
    """Raise InputError for a prompt that cannot be continued by max_tokens."""
    most = cfg.max_position_embeddings - max_tokens
    fits = max_tokens >= 0 and 0 < len(prompt) <= most
    require(fits, f"{len(prompt)} tokens, not 1 to {most}, and {max_tokens} new ones")
    bad = [token for token in prompt if not 0 <= token < cfg.vocab_size]
    require(not bad, f"token id {bad[:1]!s:.99} is not one of 0 to {cfg.vocab_size - 1}")


def generate(prompt, w, cfg, max_tokens, sampling=None, stop=(), speculate=True, stats=None,
             chunk=CHUNK):
    """Continue a prompt of token ids: yields up to max_tokens, or to the first of `stop`. speculate
    drafts with MTP module 1, if any; no distribution changes. stats: a Counter, to be filled.

    With t_n the last token, the main model sees [t_n, draft of t_{n+1}] in one pass. If `verify`
    accepts the draft, it and the token after it are known; if not, the token in its place, and the
    cache forgets the draft. Module 1 sees each verified h_i with its next token, and drafts."""
    check_prompt(prompt, cfg, max_tokens)
    sampling, stats = sampling or Sampling(), Counter() if stats is None else stats
    rng, end = np.random.default_rng(sampling.seed), len(prompt) + max_tokens
    cache, mtp_cache = caches = [Cache(end), Cache(end)]
    tokens, draft, q_W = list(prompt), [], None
    def predict(h_D):  # the next token's distribution
        return distribution(to_host(head(h_D[None], w))[0], sampling)
    while True:
        start = cache.length
        h_TD = cached_pass(forward, [np.array(tokens[start:] + draft)], w, cfg, cache, chunk)
        if draft:
            accepted, token = verify(predict(h_TD[-2]), q_W, draft[0], rng)
            new = [token, draw(predict(h_TD[-1]), rng)] if accepted else [token]
        else:
            new = [draw(predict(h_TD[-1]), rng)]
        stats.update(drafted=len(draft), accepted=len(new) - 1)
        stats["cache_bytes"] = sum(x.nbytes for each in caches for x in each.layers.values())
        for token in new[: end - len(tokens)]:
            tokens.append(token)
            yield token
            if token in stop:
                return
        if len(tokens) == end:
            return
        cache.length = len(tokens) - 1  # forgets a rejected draft
        if speculate and mtp_depth(w, cfg):
            pair_Y = np.array(tokens[start + 1 :])  # the tokens t_{i+1} of the states h_i
            step, inputs = functools.partial(mtp, 1), [h_TD[: len(pair_Y)], pair_Y]
            g_YD = cached_pass(step, inputs, w, cfg, mtp_cache, chunk)
            q_W = predict(g_YD[-1])
            draft = [draw(q_W, rng)]


def trace(prompt, w, cfg, chunk=CHUNK):
    """Every named activation of a prompt's forward pass -> {name: NumPy array (T, ...)}, in the
    order of computation, by the checkpoint's modules. chunk: how many tokens enter the cache at a
    time; None: the definition. MTP module k sees the pairs in the prompt, so it has T - k rows."""
    check_prompt(prompt, cfg, 0)
    T, token_T = len(prompt), np.array(prompt)
    def run(step, *arrays):
        if chunk is None:
            return step(*arrays, w, cfg)
        return cached_pass(step, arrays, w, cfg, Cache(T), chunk)
    with recording() as named:
        h_XD = run(forward, token_T)
        record("lm_head", head(h_XD, w))
        for k in range(1, min(mtp_depth(w, cfg), T - 1) + 1):
            h_XD = run(functools.partial(mtp, k), h_XD[:-1], token_T[k:])
            name = f"model.layers.{cfg.num_hidden_layers + k - 1}.shared_head"
            record(name, head(h_XD, w))  # logits
    return {name: to_host(x) for name, x in named.items()}


def write_trace(path, named):
    """Write arrays as safetensors; what stands at the path is whole, or as it was."""
    part = Path(f"{path}.part")
    named = {name: np.asarray(x, order="C") for name, x in named.items()}  # the library needs it
    try:
        part.write_bytes(safetensors.numpy.save(named))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---- 11. Command line ----------------------------------------------------------------------------

OPENING = "Once upon a time, there was a little dog"  # the prompt where none is given


def say(message):
    print(message.splitlines()[0], file=sys.stderr, flush=True)


def choose_device(wanted):
    """CuPy where it is wanted and works, or NumPy; auto says why if CuPy is there but fails."""
    if wanted == "cpu":
        return np
    try:
        import cupy

        float((cupy.ones((2, 2)) @ cupy.ones((2, 2))).sum())  # loads CUDA's NVRTC and cuBLAS
        return cupy
    except Exception as e:  # of any kind: a kernel that does not compile raises a bare Exception
        require(wanted != "gpu", f"--device gpu needs cupy-cuda13x[ctk] or cupy-cuda12x: {e}")
        if getattr(e, "name", None) != "cupy":  # CuPy is there
            say(f"note: on the CPU, since CuPy does not work: {e}")
        return np


def inspect(cfg):
    """Print the parameters and the cache, beside one of MLA's keys and values of some heads."""
    total = sum(map(math.prod, tensor_shapes(replace(cfg, num_nextn_predict_layers=0)).values()))
    modules = sum(map(math.prod, tensor_shapes(cfg).values())) - total
    layers, H = cfg.num_hidden_layers, cfg.num_attention_heads
    idle = (layers - cfg.first_k_dense_replace) * (cfg.n_routed_experts - cfg.num_experts_per_tok)
    active = total - idle * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    pair = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim  # one head's key and value
    print(f"parameters of the main model  {total:>19,}")
    print(f"  activated per token         {active:>19,}  embedding and head included")
    print(f"parameters of MTP modules     {modules:>19,}  beside the shared embedding and head")
    print(f"cache elements per token      {latent * layers:>19,}  of two bytes in BF16")
    for label, heads in (("MHA", H), ("GQA, 8 key heads", min(8, H)), ("MQA", 1)):
        times = f"{heads * pair / latent:.1f} times as many"
        print(f"  with {label:<22} {heads * pair * layers:>19,}  {times}")


def read_tokenizer(directory):
    """tokenizer.json, and the id of the BOS that tokenizer_config.json asks for."""
    path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # a bare Exception, if the file is absent or malformed
        raise InputError(f"{path}: {e}; --tokens takes ids without it") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = read_json(config) if config.exists() else {}
    bos = settings.get("bos_token")
    bos = str(bos.get("content") if isinstance(bos, dict) else bos)  # a string, or in an object
    return tokenizer, [tokenizer.token_to_id(bos)] if settings.get("add_bos_token") else []


def encode(text, tokenizer, bos):
    """Token ids, with BOS before them, once, if the tokenizer or its configuration says so."""
    ids = tokenizer.encode(text).ids
    return ids if ids[: len(bos)] == bos else bos + ids


def token_ids(text):
    """A --tokens: integers, separated by spaces or commas."""
    return [int(token) for token in text.replace(",", " ").split()]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="DeepSeek-V3 on NumPy and CuPy.")
    parser.error = lambda message: require(False, f"{message}; --help lists the flags")
    flag, weights = parser.add_argument, Path(__file__).resolve().parent / "weights"
    flag("-p", "--prompt", action="append", default=[], metavar="TEXT", help="- is stdin; repeat")
    flag("--tokens", action="append", default=[], type=token_ids, metavar="IDS", help='"3 14 15"')
    flag("--weights", type=Path, default=weights, metavar="DIR", help="default: weights/ here")
    flag("-n", "--max-tokens", "--max-new-tokens", type=int, metavar="N", help="200; in a trace 0")
    flag("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0: the likeliest")
    flag("--top-p", type=float, default=1.0, metavar="P", help="the likeliest that reach P")
    flag("--top-k", type=int, default=0, metavar="K", help="the K likeliest tokens; 0: all")
    flag("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text")
    flag("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto: a GPU if any")
    flag("--dtype", choices=["float32", "float64", "float16"], default="float32")
    flag("--memory", type=float, metavar="GB", help="for decoded weights; 70%% of what is free")
    flag("--mtp", action=argparse.BooleanOptionalAction, help="speculate: default on a GPU")
    flag("--chunk", type=int, default=CHUNK, metavar="N", help="tokens at a time (%(default)s)")
    flag("--trace", metavar="FILE", help="write one prompt's named activations, .safetensors")
    flag("--inspect", action="store_true", help="count, of a checkpoint or a bare config.json")
    args = parser.parse_args(argv)
    if args.max_tokens is None:
        args.max_tokens = 0 if args.trace else 200
    positive = (args.memory or 0) >= 0 and args.max_tokens >= 0 and args.chunk >= 1
    require(positive, "--memory and --max-tokens must be 0 or more, --chunk 1 or more")
    require(not (args.prompt and args.tokens), "--prompt and --tokens exclude each other")
    one = len(args.prompt + args.tokens) <= 1 and (args.trace or "").endswith(".safetensors")
    require(one or not args.trace, "--trace takes one prompt, and a FILE.safetensors")
    stdin = sys.stdin.read().removesuffix("\n") if "-" in args.prompt else ""
    args.prompt = [stdin if text == "-" else text for text in args.prompt]
    "".join(args.prompt).encode()  # UnicodeError for an argument that was not UTF-8
    return args


def respond(tokenizer, prompt, options):
    """Generate and print, text as it grows; last, even if interrupted, the line of statistics, in
    which the first token belongs to the prompt's time. options: what `generate` takes besides."""
    stats, made, shown, begin, first = Counter(), [], "", time.perf_counter(), None
    stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
    try:
        for token in generate(prompt, stats=stats, **options):
            first = first or time.perf_counter()
            stats["new"] += 1
            if not (tokenizer and token in options["stop"]):
                made.append(token)
                part = stream.step(tokenizer, token) if tokenizer else None  # no half characters
                shown += part or ""
                print(part or "", end="", flush=True)
    finally:
        text = tokenizer.decode(made) if tokenizer else " ".join(map(str, made))
        print(text[len(shown) :], flush=True)
        end, later = time.perf_counter(), max(0, stats["new"] - 1)
        first, peak = first or end, system_bytes("/proc/self/status", "VmHWM")
        if xp is not np:
            peak = xp.get_default_memory_pool().total_bytes()
        say(f"prompt: {len(prompt)} tokens, {len(prompt) / (first - begin):.1f} tok/s"
            f" · new: {stats['new']} tokens, {later / (end - first) if later else 0:.1f} tok/s"
            f" · drafted {stats['drafted']}, accepted {stats['accepted']}"
            f" · cache {stats['cache_bytes'] / 1000:.0f} KB"
            f" · peak memory {peak / 1e6:.0f} MB")


def run(args):
    """Do what the arguments ask for."""
    global xp
    directory = args.weights
    require(args.inspect or directory.is_dir(), f"{directory} is no directory; one is wanted")
    cfg = read_config(directory)
    if args.inspect:
        if directory.is_dir() and list(directory.glob("*.safetensors")):
            cfg = replace(cfg, num_nextn_predict_layers=mtp_depth(read_shards(directory), cfg))
        inspect(cfg)
        return
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    xp, path = choose_device(args.device), directory / "generation_config.json"
    settings = read_json(directory / "config.json") | (read_json(path) if path.exists() else {})
    end = settings.get("eos_token_id")  # one, a list, or null
    tokenizer, bos = (None, []) if args.tokens else read_tokenizer(directory)
    prompts = args.tokens or [encode(text, tokenizer, bos) for text in args.prompt or [OPENING]]
    for prompt in prompts:  # before any work
        check_prompt(prompt, cfg, args.max_tokens)
    w = Checkpoint(directory, cfg, args.dtype, None if args.memory is None else args.memory * 1e9)
    if args.trace:
        write_trace(args.trace, trace(prompts[0], w, cfg, args.chunk))
    pays = xp is not np or cfg.hidden_size <= 512  # else a second row costs as much as the first
    options = {"w": w, "cfg": cfg, "max_tokens": args.max_tokens, "sampling": sampling}
    options |= {"stop": end if isinstance(end, list) else [end], "chunk": args.chunk}
    options["speculate"] = pays if args.mtp is None else args.mtp
    if not (args.prompt or args.tokens):
        print(OPENING, end="", flush=True)
    for prompt in prompts:
        respond(tokenizer, prompt, options)


def main(argv=None):
    """The command line. Exit codes: 0 done, 2 refused in one line, 130 interrupted."""
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # stdout's reader has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is flushed
    except (InputError, MemoryError, OSError, UnicodeError) as e:
        say(f"deepseek_v3.py: {str(e) or 'not enough memory'}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
