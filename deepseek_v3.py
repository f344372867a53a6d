# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0", "tokenizers>=0.21", "jinja2>=3.1"]
# ///
"""DeepSeek-V3, the whole model in one file: a specification that runs.

    python deepseek_v3.py     tells a story with the small model beside it; --help lists what else it does

Every component stands here once as the paper *defines* it (the equation, nothing cached, nothing skipped) and, where
that is slow, again as it is *computed* (what generation runs). test_deepseek_v3.py shows them equal in float64.

    component    definition                        computation                           equal because
    attention    mla_naive: keys of every head     mla_absorbed: one shared latent key   (W_UK c) . q = c . (W_UK^T q)
    context      forward, whole sequence           forward with a Cache, in any chunks   the past never sees the future
    experts      moe_all: sum over all experts     moe_chosen, or moe_gathered for few   the other gates are 0
    generation   one token a pass                  MTP drafts, the main model verifies   the rejection rule

`forward` without a cache is the definition throughout; with one it is the computation, which takes the cheaper form of
attention. The definitions write nothing in place and have no shape that depends on data, so they also run under
jax.numpy, in `jit` and `grad`: that is how weights/train.py made the checkpoint beside this file.

Equation numbers are those of the DeepSeek-V3 technical report (arXiv:2412.19437v2), tensor names those of the released
checkpoint, configuration keys those of its config.json. The symbols in the margin of `Config` are the paper's. "HF" is
Hugging Face transformers 5.23.0, "official" the code in deepseek-ai/DeepSeek-V3, inference/ (commit 9b4e978).

Capital letters at the end of a name are the array's axes: q_BTHX has shape (B, T, H, X). A test runs the program and
checks them as functions return. x is the residual stream, or what a layer reads of it (the paper's h_t, u_t); h is a
state after all layers (h^0, h^k).

    of the model (Config)                                         of the call
    D  hidden_size          C  kv_lora_rank     (paper: d_c)      B  sequences in the batch, its rows
    H  num_attention_heads  L  C + R, one entry of the cache      T  tokens of each in this call
    N  qk_nope_head_dim     Q  q_lora_rank      (paper: d_c')     S  positions looked at, the cached ones included
    R  qk_rope_head_dim     E  n_routed_experts                   J  key heads: H in MHA, 1 in MQA, between in GQA
    P  R / 2, rotated pairs K  num_experts_per_tok                Z  T H / J, the queries that share a key head
    V  v_head_dim           G  n_group                            M  B T, all tokens
    W  vocab_size                                                 U  logits read of each row in one pass: 2 with a draft
                                                                  X, Y  any other size, such as of a query, of a value
"""

import argparse
import contextlib
import contextvars
import functools
import itertools
import json
import math
import mmap
import os
import re
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections import ChainMap, Counter, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np


class InputError(ValueError):
    """What was given (a checkpoint, a request) cannot be used. The message is one line: what, where, what to do."""


def _require(condition, message):
    if not condition:
        raise InputError(message)


# ---- 1. Arrays -----------------------------------------------------------------------------------------------------
# Everything below is written against one array namespace, chosen once: NumPy, or CuPy on a GPU.

xp = np


def to_device(x, dtype=None):
    """Upload: the one place where a host array becomes an array of `xp`."""
    return xp.asarray(x, dtype=dtype)


def to_host(x):
    """Download: the one place where an array of `xp` becomes a NumPy array."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def wide(x):
    """x in float32 or better: statistics, softmax and routing are never computed in half precision."""
    return x.astype(np.promote_types(x.dtype, np.float32), copy=False)


def top_k(score, k):
    """Indices (..., k) of the k largest of the last axis, largest first; among equals the lowest index wins.

    The paper does not say how ties fall; unstable choices have made implementations disagree (vLLM #52679 and others).

    >>> top_k(np.array([1.0, 3.0, 2.0, 3.0]), 3)
    array([1, 3, 2])
    """
    stable = {"stable": True} if getattr(xp, "__name__", "").startswith("jax") else {"kind": "stable"}
    return xp.argsort(-score, axis=-1, **stable)[..., :k]


def slices(n, step):
    """0 to n in slices of step, the last one cropped.

    >>> slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def join(parts, axis):
    """Concatenated along an axis, unless there is but one part."""
    return xp.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]


def one_hot(index, n):
    """Boolean (..., n): where the last axis equals index (...)."""
    return index[..., None] == xp.arange(n)


_recorder = contextvars.ContextVar("recorder", default=None)


def record(name, x):
    """Return x; while `recording`, also keep it under the name of the module that produced it."""
    if (kept := _recorder.get()) is not None:
        kept[name] = x
    return x


@contextlib.contextmanager
def recording():
    """Within this block `record` keeps what it is given, in the order of computation, in the dict that this yields."""
    token = _recorder.set({})
    try:
        yield _recorder.get()
    finally:
        _recorder.reset(token)


# ---- 2. Configuration ----------------------------------------------------------------------------------------------
# The numbers that make one model of the family; the defaults are DeepSeek-V3 itself, 671B parameters.


@dataclass(frozen=True)
class Yarn:
    """YaRN's context extension (section 4.3), `rope_scaling` in config.json. Optional keys mean what they do in HF."""

    factor: float = 40.0  # s
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0  # beta; the paper's alpha is beta_slow
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Config:
    """One model, fields named as in config.json. Raises InputError for values under which the model is not defined."""

    vocab_size: int = 129280
    hidden_size: int = 7168  # d
    num_hidden_layers: int = 61
    num_attention_heads: int = 128  # n_h
    q_lora_rank: int | None = 1536  # d_c'; None: queries are not compressed
    kv_lora_rank: int = 512  # d_c
    qk_nope_head_dim: int = 128  # d_h
    qk_rope_head_dim: int = 64  # d_h^R
    v_head_dim: int = 128  # d_h
    attention_bias: bool = False
    intermediate_size: int = 18432  # of the dense layers
    first_k_dense_replace: int = 3  # layers before this one have no experts
    moe_intermediate_size: int = 2048  # of one expert
    n_shared_experts: int = 1  # N_s
    n_routed_experts: int = 256  # N_r
    num_experts_per_tok: int = 8  # K_r
    scoring_func: str = "sigmoid"  # of the affinities; DeepSeek-V2: softmax
    topk_method: str = "noaux_tc"  # with bias and groups; V2: group_limited_greedy, or greedy, without groups
    n_group: int = 8  # groups of experts, one on each node
    topk_group: int = 4  # M, the nodes a token may be sent to
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5  # section 4.2: "additional scaling factors at the width bottlenecks"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = field(default=Yarn(mscale=1.0, mscale_all_dim=1.0))
    rope_interleave: bool = True
    max_position_embeddings: int = 163840
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1  # D, the MTP modules

    def __post_init__(self):
        check_config(self)

    def is_dense(self, layer):
        """Whether a layer has one MLP instead of experts; the MTP modules, past the last layer, always have experts."""
        return layer < min(self.first_k_dense_replace, self.num_hidden_layers)


# ---- 3. Primitives -------------------------------------------------------------------------------------------------
# Matrix products, the norm, the MLP, softmax and the rotation by position are all that the rest is made of.


ONE_CORE = 460_800  # elements of a matrix up to which OpenBLAS multiplies it by a vector on one core


def linear(x, w, name):
    """W x, plus the bias where the checkpoint has one. x (..., in), `name.weight` (out, in) -> (..., out)."""
    x_MX = x.reshape(-1, x.shape[-1])
    y = join([product(x_MX, band_YX) for band_YX in bands(w[f"{name}.weight"])], axis=1)
    if f"{name}.bias" in w:
        y = y + w[f"{name}.bias"]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def product(x, w):
    """x W^T: x (..., M, X), w (..., Y, X) -> (..., M, Y). NumPy is given what its BLAS does best.

    Up to 4 rows: a W that BLAS would leave to one core, yet too large for that core's cache, by dot products, which
    stream it from memory faster; a larger W in pieces that stay in the cache for the next row of x, so that two rows
    cost little more than one. Up to 192 rows: (W x^T)^T.
    """
    M, (Y, X) = x.shape[-2], w.shape[-2:]
    if xp is np and M <= 4 and X >= 128 and 2**17 < Y * X <= ONE_CORE:
        return xp.vecdot(w[..., None, :, :], x[..., None, :])
    if xp is not np or M == 1 or M > 192 or Y * X <= 2**17:
        return x @ w.swapaxes(-1, -2)
    if M > 4:
        return (w @ x.swapaxes(-1, -2)).swapaxes(-1, -2)
    pieces = [w[..., None, part, :] @ x[..., None] for part in slices(Y, max(1, 2**19 // X))]
    return join(pieces, axis=-2)[..., 0]


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last axis. The statistics are wide, the normalised x is rounded to x's dtype
    before it meets the weight: so does HF's DeepseekV3RMSNorm, while the official code rounds once, after."""
    x_wide = wide(x)
    normed = x_wide / xp.sqrt((x_wide * x_wide).sum(axis=-1, keepdims=True) / x.shape[-1] + eps)
    return normed.astype(x.dtype, copy=False) * weight


def sigmoid(x):
    """1 / (1 + e^-x), wide, returned in x's dtype; the exponent is held where e^-x is finite, so nothing overflows."""
    x_wide = wide(x)
    limit = math.floor(math.log(float(np.finfo(x_wide.dtype).max)))
    return (1 / (1 + xp.exp(-xp.maximum(x_wide, -limit)))).astype(x.dtype, copy=False)


def swiglu(x, w, name):
    """An MLP: W_down (silu(W_gate x) * W_up x), silu(z) = z sigmoid(z). x (..., D) -> (..., D)."""
    gate = linear(x, w, f"{name}.gate_proj")
    return linear(gate * sigmoid(gate) * linear(x, w, f"{name}.up_proj"), w, f"{name}.down_proj")


def softmax(x):
    """Over the last axis, in float32 or better, returned in x's dtype. A row needs one entry above -inf.

    What is subtracted cancels; it need only be near the maximum. Rounded, it has no gradient, which spares training
    the costly one through the maximum.
    """
    x_wide = wide(x)
    e = xp.exp(x_wide - xp.floor(x_wide.max(axis=-1, keepdims=True)))
    return (e / e.sum(axis=-1, keepdims=True)).astype(x.dtype, copy=False)


def yarn_mscale(factor, mscale):
    """m = 0.1 mscale ln(s) + 1, the square root of what YaRN multiplies scores by (section 4.3, for mscale 1).

    >>> round(yarn_mscale(40, 1.0), 4)
    1.3689
    """
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


@functools.cache
def rope_frequencies(cfg):
    """Radians a position, for each of the P pairs; float64 on the host.

    Plain RoPE: theta^(-2j/R). YaRN keeps the pairs that turn more than beta_fast times within the original context,
    slows those that turn less than beta_slow times by the factor, and blends in between. It is static: configured, it
    holds at every position of every prompt, for queries as for keys (section 4.3 speaks of the key alone). The official
    code switches it on by its max_seq_len instead.
    """
    freq_P = cfg.rope_theta ** -(np.arange(0, cfg.qk_rope_head_dim, 2) / cfg.qk_rope_head_dim)
    if (yarn := cfg.rope_scaling) is None:
        return freq_P

    def pair_that_turns(times):
        turns = yarn.original_max_position_embeddings / (2 * math.pi * times)
        return cfg.qk_rope_head_dim * math.log(turns) / (2 * math.log(cfg.rope_theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.qk_rope_head_dim - 1)  # R - 1 though there are P pairs: so in all code
    slowed_P = np.clip((np.arange(freq_P.size) - low) / ((high - low) or 0.001), 0, 1)
    return freq_P * (1 - slowed_P) + freq_P / yarn.factor * slowed_P


def rope_magnitude(cfg):
    """YaRN's factor on cos and sin: m(mscale) / m(mscale_all_dim), 1 in DeepSeek-V3; m(1) if either is absent or 0.

    The official code has no such factor, and would differ where it is not 1.
    """
    if (yarn := cfg.rope_scaling) is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
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
    mscale = yarn_mscale(yarn.factor, yarn.mscale_all_dim) if yarn and yarn.mscale_all_dim else 1
    return (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5 * mscale**2


def rope(x, cos, sin, interleave=True):
    """Rotate pair j of x by its angle. x (..., R), cos and sin (..., P), broadcast.

    In the released weights the pairs are neighbours, (2j, 2j+1). HF reorders queries and keys to halves first, which
    leaves every score as it is but caches a permuted key; `rope_interleave` false means weights stored as halves.
    """
    if interleave:
        a, b = x[..., 0::2], x[..., 1::2]
        return xp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return xp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


# ---- 4. Multi-head latent attention (section 2.1.1) ----------------------------------------------------------------
# A token leaves one small vector in the cache, and every head's key and value are linear in it.

# How many scores attention holds at a time (on a GPU 256 times as many): a core's cache keeps them, and memory grows
# with the context, not with its square. In a long one there are more, as all keys are read for each FEW queries.
SCORES, FEW = 2**18, 256
EXPANDED = 2**29  # elements of keys and values of all heads that are expanded at most
LATENT_EPS = 1e-6  # of the norms on the latents, whatever rms_norm_eps says: so in HF and the official code


class Positions(NamedTuple):
    """Where the tokens of one call stand: token t of row b at position start_B[b] + t."""

    start_B: np.ndarray  # on the host
    cos_BTP: object
    sin_BTP: object
    visible_BTS: object  # True where a query may look: position of the key <= position of the query


def positions(start_B, T, cfg, dtype):
    """The Positions of T tokens of each row. Angles are float64 until cos and sin: at position 163,839 float32 is off
    by 5e-3 rad. S reaches to the last position of the longest row; a key's index is its position."""
    start_B = np.asarray(start_B)
    position_BT = start_B[:, None] + np.arange(T)
    angle_BTP = position_BT[:, :, None] * rope_frequencies(cfg)
    cos_BTP, sin_BTP = (rope_magnitude(cfg) * f(angle_BTP) for f in (np.cos, np.sin))
    visible_BTS = np.arange(start_B.max() + T) <= position_BT[:, :, None]
    return Positions(start_B, to_device(cos_BTP, dtype), to_device(sin_BTP, dtype), to_device(visible_BTS))


class Cache:
    """The latent cache: for each layer one array (B, capacity, L), an entry [c_KV ; k_R] for each position, no more.

    c_KV is the latent after its norm, k_R the key after its rotation. An entry's index is its position, and a query
    sees no index beyond its own: what a call leaves behind its last accepted token (padding, a rejected draft) stays
    unseen until the next call overwrites it. `tokens[b]` are the tokens whose entries in row b are right. If every call
    speculated, so are the MTP module's, the last one of them for the token that followed then.
    """

    def __init__(self, batch, capacity=0):
        self.capacity, self.layers, self.tokens = capacity, {}, [[] for _ in range(batch)]

    def append(self, layer, kv_BTL, start_B):
        """Write row b's T entries from position start_B[b]; return all up to the last one's position, (B, S, L)."""
        B, T, L = kv_BTL.shape
        S, kept = int(start_B.max()) + T, self.layers.get(layer)
        if kept is None:
            kept = xp.zeros((B, max(S, self.capacity), L), kv_BTL.dtype)
        elif kept.shape[1] < S:
            kept = xp.concatenate([kept, xp.zeros((B, S, L), kept.dtype)], axis=1)
        self.layers[layer] = kept
        for b, start in enumerate(start_B):
            kept[b, start : start + T] = kv_BTL[b]
        return kept[:, :S]

    @property
    def nbytes(self):
        return sum(kept.nbytes for kept in self.layers.values())


def attention(q_BTHX, k_BSJX, v_BSJY, visible_BTS, scale):
    """Eq. (10), softmax(q . k) v, for any number of key heads J that divides H -> (B, T, H, Y).

    J = H is multi-head attention, J = 1 multi-query, between them grouped-query: query head h reads key head
    h // (H/J). The Z = T H/J queries that share a key head meet it in one product, or in several where there would be
    more than SCORES scores at a time.
    """
    B, T, H, X = q_BTHX.shape
    S, J, Y = v_BSJY.shape[1:]
    Z = T * (H // J)
    q_BJZX = (q_BTHX * scale).reshape(B, T, J, H // J, X).transpose(0, 2, 1, 3, 4).reshape(B, J, Z, X)
    k_BJSX, v_BJSY = k_BSJX.transpose(0, 2, 1, 3), v_BSJY.transpose(0, 2, 1, 3)
    token_Z = xp.arange(Z) // (H // J)
    limit = SCORES if xp is np else 256 * SCORES
    heads = max(1, limit // (B * Z * S))
    queries = Z if heads > 1 else max(FEW, limit // (B * S))

    def some(z):
        mask = xp.where(visible_BTS[:, None, token_Z[z]], 0, -xp.inf).astype(q_BTHX.dtype)
        return join(
            [softmax(product(q_BJZX[:, j, z], k_BJSX[:, j]) + mask) @ v_BJSY[:, j] for j in slices(J, heads)], 1
        )

    out_BJZY = join([some(z) for z in slices(Z, queries)], axis=2)
    return out_BJZY.reshape(B, J, T, H // J, Y).transpose(0, 2, 1, 3, 4).reshape(B, T, H, Y)


def mla_query(x_BTD, w, name, cfg, at):
    """Eqs. (6)-(8): the compressed query c_Q, normed (section 4.2), and from it every head's q_nope_BTHN and, rotated,
    q_rope_BTHR."""
    if cfg.q_lora_rank is None:
        q_BTX = linear(x_BTD, w, f"{name}.q_proj")
    else:
        c_BTQ = rms_norm(linear(x_BTD, w, f"{name}.q_a_proj"), w[f"{name}.q_a_layernorm.weight"], LATENT_EPS)
        q_BTX = linear(c_BTQ, w, f"{name}.q_b_proj")
    q_BTHY = q_BTX.reshape(*x_BTD.shape[:2], cfg.num_attention_heads, -1)  # each head [nope ; rope]
    q_nope_BTHN, q_rope_BTHR = q_BTHY[..., : cfg.qk_nope_head_dim], q_BTHY[..., cfg.qk_nope_head_dim :]
    cos_BTP, sin_BTP = at.cos_BTP, at.sin_BTP
    return q_nope_BTHN, rope(q_rope_BTHR, cos_BTP[:, :, None], sin_BTP[:, :, None], cfg.rope_interleave)


def mla_latent(x_BTD, w, name, cfg, at):
    """Eqs. (1), (3), what the cache keeps: [c_KV ; k_R]. c_KV is normed (section 4.2); k_R comes from x, not from
    c_KV, and is one key for all heads. -> kv_BTL."""
    kv_BTL = linear(x_BTD, w, f"{name}.kv_a_proj_with_mqa")
    c_BTC, k_rope_BTR = kv_BTL[..., : cfg.kv_lora_rank], kv_BTL[..., cfg.kv_lora_rank :]
    c_BTC = record(f"{name}.kv_latent", rms_norm(c_BTC, w[f"{name}.kv_a_layernorm.weight"], LATENT_EPS))
    k_rope_BTR = record(f"{name}.k_rope", rope(k_rope_BTR, at.cos_BTP, at.sin_BTP, cfg.rope_interleave))
    return xp.concatenate([c_BTC, k_rope_BTR], axis=-1)


def kv_up(w, name, cfg):
    """W_UK (H, N, C) and W_UV (H, V, C): `kv_b_proj` holds for each head first the one, then the other."""
    up_HXC = w[f"{name}.kv_b_proj.weight"].reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank)
    return up_HXC[:, : cfg.qk_nope_head_dim], up_HXC[:, cfg.qk_nope_head_dim :]


def mla_naive(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, visible_BTS):
    """Definition, eqs. (2), (4), (5), (9), (10): expand each head's keys and values, then multi-head attention."""
    c_BSC, k_rope_BSR = kv_BSL[..., : cfg.kv_lora_rank], kv_BSL[..., cfg.kv_lora_rank :]
    kv_BSHY = linear(c_BSC, w, f"{name}.kv_b_proj").reshape(*c_BSC.shape[:2], cfg.num_attention_heads, -1)
    k_nope_BSHN, v_BSHV = kv_BSHY[..., : cfg.qk_nope_head_dim], kv_BSHY[..., cfg.qk_nope_head_dim :]
    k_rope_BSHR = xp.broadcast_to(k_rope_BSR[:, :, None], (*k_nope_BSHN.shape[:3], cfg.qk_rope_head_dim))
    q_BTHX = xp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)
    k_BSHX = xp.concatenate([k_nope_BSHN, k_rope_BSHR], axis=-1)
    return attention(q_BTHX, k_BSHX, v_BSHV, visible_BTS, softmax_scale(cfg))


def mla_absorbed(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, visible_BTS):
    """Computation: the same, and no key is ever expanded.

    q . (W_UK c) = (W_UK^T q) . c: W_UK moves to the query's side, once a token instead of once a cached token. All
    heads then share the keys [c ; k_R], which is the cache's entry as it lies, and the values c: multi-query attention
    with heads of size L, whose result W_UV expands at the end. RoPE could not have moved: its rotation would stand
    between W_UK and the query, and it belongs to the key's position. That is why k_R is decoupled, eq. (3).
    """
    w_uk_HNC, w_uv_HVC = kv_up(w, name, cfg)
    q_latent_BTHC = _per_head(q_nope_BTHN, w_uk_HNC)
    q_BTHL = xp.concatenate([q_latent_BTHC, q_rope_BTHR], axis=-1)
    k_BSJL = kv_BSL[:, :, None]
    o_BTHC = attention(q_BTHL, k_BSJL, k_BSJL[..., : cfg.kv_lora_rank], visible_BTS, softmax_scale(cfg))
    return _per_head(o_BTHC, w_uv_HVC.transpose(0, 2, 1))


def _per_head(x_BTHX, w_HXY):
    """Multiply each head by a matrix of its own -> (B, T, H, Y)."""
    B, T, H, X = x_BTHX.shape
    if xp is np and B * T == 1 and w_HXY.size > 2**16:
        return xp.einsum("BTHX,HXY->BTHY", x_BTHX, w_HXY)
    y_HMY = x_BTHX.reshape(B * T, H, X).transpose(1, 0, 2) @ w_HXY
    return y_HMY.transpose(1, 0, 2).reshape(B, T, H, -1)


def absorbing_is_cheaper(T, S, cfg, B=1):
    """Count the multiplications of both forms for T queries over S keys, a head. Few queries: absorb; many: expand,
    unless the keys and values of all heads would be too large.

    >>> [absorbing_is_cheaper(T, 4096, Config()) for T in (1, 4096)]  # a token, a prompt
    [True, False]
    """
    C, R, N, V = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.v_head_dim
    naive = S * C * (N + V) + T * S * (N + R + V)
    absorbed = T * C * (N + V) + T * S * (C + R + C)
    return absorbed < naive or B * S * cfg.num_attention_heads * (N + R + V) > EXPANDED


def mla(x_BTD, w, layer, cfg, at, cache):
    """Multi-head latent attention, eqs. (1)-(11): the definition without a cache, the cheaper form with one."""
    name = f"model.layers.{layer}.self_attn"
    q_nope_BTHN, q_rope_BTHR = mla_query(x_BTD, w, name, cfg, at)
    record(f"{name}.q_rope", q_rope_BTHR)
    kv_BTL = mla_latent(x_BTD, w, name, cfg, at)
    if cache is None:
        form, kv_BSL = mla_naive, kv_BTL
    else:
        kv_BSL = cache.append(layer, kv_BTL, at.start_B)
        B, S, _ = kv_BSL.shape
        form = mla_absorbed if absorbing_is_cheaper(x_BTD.shape[1], S, cfg, B) else mla_naive
    o_BTHV = form(q_nope_BTHN, q_rope_BTHR, kv_BSL, w, name, cfg, at.visible_BTS)
    return record(name, linear(o_BTHV.reshape(*x_BTD.shape[:2], -1), w, f"{name}.o_proj"))


# ---- 5. DeepSeekMoE (section 2.1.2) --------------------------------------------------------------------------------
# Each token chooses a few experts out of many, and a bias that no gradient touches keeps the choices even.


def route(x_BTD, w, name, cfg):
    """Which experts, and with what gates -> index_BTK, best first; gate_BTK in float32 or better.

    Eq. (15): affinities. Eq. (16), in place of (14): the choice, by affinity plus bias, among the experts of the
    topk_group groups whose two best biased affinities sum highest. Eq. (13): gates from the affinities alone, divided
    by their sum if norm_topk_prob, then always times routed_scaling_factor. Experts of the other groups are masked with
    -inf; 0, as in older code, lets them win where the kept ones' biased affinities are negative (DeepSeek-V3 #741).

    DeepSeek-V2 (arXiv:2405.04434, section 2.1.2) has softmax affinities, no bias, and groups ranked by their best one.
    """
    weight_ED = wide(w[f"{name}.gate.weight"])
    affinity = sigmoid if cfg.scoring_func == "sigmoid" else softmax
    score_BTE = record(f"{name}.gate.scores", affinity(wide(x_BTD) @ weight_ED.T))
    biased = cfg.topk_method == "noaux_tc"
    choice_BTE = score_BTE + wide(w[f"{name}.gate.e_score_correction_bias"]) if biased else score_BTE
    if cfg.n_group > 1 and cfg.topk_method != "greedy":
        choice_BTGX = choice_BTE.reshape(*choice_BTE.shape[:2], cfg.n_group, -1)
        group_BTG = xp.sort(choice_BTGX, axis=-1)[..., -2 if biased else -1 :].sum(axis=-1)
        keep_BTG = xp.any(one_hot(top_k(group_BTG, cfg.topk_group), cfg.n_group), axis=-2)
        choice_BTE = xp.where(keep_BTG[..., None], choice_BTGX, -xp.inf).reshape(choice_BTE.shape)
    index_BTK = record(f"{name}.gate.indices", top_k(choice_BTE, cfg.num_experts_per_tok))
    gate_BTK = xp.take_along_axis(score_BTE, index_BTK, axis=-1)
    if cfg.norm_topk_prob:
        gate_BTK = gate_BTK / (xp.sum(gate_BTK, axis=-1, keepdims=True) + 1e-20)  # HF's guard; the paper has none
    return index_BTK, record(f"{name}.gate.weights", gate_BTK * cfg.routed_scaling_factor)


def stacked(w, name, part, cfg):
    """One matrix, gate, up or down, of all experts -> (E, out, in): as w keeps it, or else put together now."""
    if (key := f"{name}.experts.{part}_proj.weight") in w:
        return w[key]
    return stack([w[f"{name}.experts.{e}.{part}_proj.weight"] for e in range(cfg.n_routed_experts)])


def moe_all(x_BTD, w, name, index_BTK, gate_BTK, cfg):
    """Definition, the routed sum of eq. (12) over *all* experts, the gates of those not chosen being 0.

    The experts' matrices are laid side by side, so that the sum over experts is part of the last of three large
    products, which is how training runs it. The gate multiplies before W_down instead of after: they commute.
    """
    E, D = cfg.n_routed_experts, x_BTD.shape[-1]
    gate_BTE = xp.sum(xp.where(one_hot(index_BTK, E), gate_BTK[..., None], 0), axis=-2).astype(x_BTD.dtype)
    w_gate, w_up, w_down = (stacked(w, name, part, cfg) for part in ("gate", "up", "down"))
    a, b = x_BTD @ w_gate.reshape(-1, D).T, x_BTD @ w_up.reshape(-1, D).T
    y_BTEX = (a * sigmoid(a) * b).reshape(*x_BTD.shape[:2], E, -1) * gate_BTE[..., None]
    return y_BTEX.reshape(*x_BTD.shape[:2], -1) @ w_down.transpose(0, 2, 1).reshape(-1, D)


def moe_chosen(x_BTD, w, name, index_BTK, gate_BTK, cfg):
    """Computation: each chosen expert sees only the tokens that chose it."""
    x_MD, index_MK = x_BTD.reshape(-1, x_BTD.shape[-1]), to_host(index_BTK).reshape(-1, index_BTK.shape[-1])
    gate_MK = gate_BTK.reshape(index_MK.shape).astype(x_BTD.dtype)
    y_MD = xp.zeros_like(x_MD)
    for e in np.unique(index_MK):
        row, slot = map(to_device, np.nonzero(index_MK == e))  # an expert is at most once among a token's choices
        y_MD[row] += gate_MK[row, slot][:, None] * swiglu(x_MD[row], w, f"{name}.experts.{e}")
    return y_MD.reshape(x_BTD.shape)


def moe_gathered(x_BTD, w, name, index_BTK, gate_BTK, cfg):
    """Computation for few tokens: the chosen matrices are copied side by side, where they lie, and all multiplied at
    once. A few large calls, and the host need not wait for a GPU to say which experts were chosen."""
    x_MD, index_MK = x_BTD.reshape(-1, x_BTD.shape[-1]), index_BTK.reshape(-1, index_BTK.shape[-1])
    a, b = (stacked(w, name, part, cfg)[index_MK] @ x_MD[:, None, :, None] for part in ("gate", "up"))
    y_MKD = (stacked(w, name, "down", cfg)[index_MK] @ (a * sigmoid(a) * b))[..., 0]
    gate_MK = gate_BTK.reshape(index_MK.shape).astype(x_BTD.dtype)
    return xp.sum(gate_MK[..., None] * y_MKD, axis=1).reshape(x_BTD.shape)


def gathering_is_cheaper(M, w, name, cfg):
    """Whether the copy of M K matrices of one kind is cheaper than a walk through the chosen experts: on the CPU if it
    is small, on a GPU if it fits easily, to spare the wait; and only where w keeps all experts together."""
    elements = M * cfg.num_experts_per_tok * cfg.hidden_size * cfg.moe_intermediate_size
    return elements <= (2**19 if xp is np else 2**28) and f"{name}.experts.gate_proj.weight" in w


def moe(x_BTD, w, name, cfg, cache):
    """Eq. (12) less its residual: the shared experts, one MLP of their joint width, plus the gated routed ones; the
    definition without a cache, the cheaper computation with one."""
    index_BTK, gate_BTK = route(x_BTD, w, name, cfg)
    if cache is None:
        form = moe_all
    else:
        M = x_BTD.shape[0] * x_BTD.shape[1]
        form = moe_gathered if gathering_is_cheaper(M, w, name, cfg) else moe_chosen
    y_BTD = form(x_BTD, w, name, index_BTK, gate_BTK, cfg)
    return y_BTD + swiglu(x_BTD, w, f"{name}.shared_experts") if cfg.n_shared_experts else y_BTD


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
    """Eqs. (17)-(20) without alpha: sum_i f_i P_i of each sequence, averaged over the batch.

    As printed: f counts the plain top K_r affinities, with neither bias nor group limit; it carries no gradient.
    """
    K, E = cfg.num_experts_per_tok, cfg.n_routed_experts
    f_BE = xp.mean(xp.sum(one_hot(top_k(score_BTE, K), E), axis=-2), axis=1) * (E / K)
    p_BE = xp.mean(score_BTE / xp.sum(score_BTE, axis=-1, keepdims=True), axis=1)
    return xp.mean(xp.sum(f_BE * p_BE, axis=-1))


# ---- 6. The model --------------------------------------------------------------------------------------------------
# Blocks of attention and MLP on a residual stream, each behind a norm; the first few MLPs are dense.


def block(x_BTD, w, layer, cfg, at, cache):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""
    name = f"model.layers.{layer}"
    normed_BTD = rms_norm(x_BTD, w[f"{name}.input_layernorm.weight"], cfg.rms_norm_eps)
    x_BTD = x_BTD + mla(record(f"{name}.input_layernorm", normed_BTD), w, layer, cfg, at, cache)
    normed_BTD = rms_norm(x_BTD, w[f"{name}.post_attention_layernorm.weight"], cfg.rms_norm_eps)
    record(f"{name}.post_attention_layernorm", normed_BTD)
    if cfg.is_dense(layer):
        y_BTD = swiglu(normed_BTD, w, f"{name}.mlp")
    else:
        y_BTD = moe(normed_BTD, w, f"{name}.mlp", cfg, cache)
    return record(name, x_BTD + record(f"{name}.mlp", y_BTD))


def forward(token_BT, w, cfg, cache=None, start_B=None):
    """Token ids to the main model's states h^0 (B, T, D), after `model.norm`; `head` turns states into logits.

    w: mapping of tensor names to arrays of `xp`; their dtype is the dtype of the computation. Without a cache: the
    definition, of whole sequences from position 0. With one: the T tokens of row b continue what the cache holds
    before position start_B[b] (0 by default), and enter it. Rows of unequal length are padded on the right, with any
    valid token: nothing before the padding sees it, and the next call writes over it.
    """
    B, T = token_BT.shape
    embedding_WD = w["model.embed_tokens.weight"]
    at = positions(np.zeros(B, int) if start_B is None else start_B, T, cfg, embedding_WD.dtype)
    x_BTD = record("model.embed_tokens", embedding_WD[to_device(token_BT)])
    for layer in range(cfg.num_hidden_layers):
        x_BTD = block(x_BTD, w, layer, cfg, at, cache)
    return record("model.norm", rms_norm(x_BTD, w["model.norm.weight"], cfg.rms_norm_eps))


def head(h_BTD, w, cfg):
    """OutHead: states, normed already, to logits (B, T, W). The MTP modules share it and the embedding."""
    return linear(h_BTD, w, "model.embed_tokens" if cfg.tie_word_embeddings else "lm_head")


# ---- 7. Multi-token prediction (section 2.2) -----------------------------------------------------------------------
# Module k predicts the token k+1 ahead: it joins the state of module k-1 with the embedding of the token k ahead.


def mtp_depth(w, cfg):
    """How many MTP modules there are: those of the config whose tensors exist (some checkpoints leave them out)."""
    layers = range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers)
    return sum(f"model.layers.{layer}.eh_proj.weight" in w for layer in layers)


def mtp(k, h_BTD, token_BT, w, cfg, cache=None, start_B=None):
    """Eqs. (21), (22): from pairs (h_i^{k-1}, t_{i+k}) at positions i, the states h_i^k (B, T, D), for k = 1..D.

    Module k is layer num_hidden_layers + k - 1 of the checkpoint, a whole block with a latent cache of its own.
    Where the paper leaves a choice or the released weights differ from it:
    - the joined vector is [embedding ; state]; eq. (21) prints the reverse, the weights need this;
    - h^0 is the state after `model.norm`: so in HF, vLLM and SGLang, while torchtitan takes it before (DeepSeek-V3
      #839 was never answered). Likewise module k + 1 takes h^k after `shared_head.norm`, as in HF; DeepSeek-V3
      has one module only;
    - a pair's position is i. Only differences of positions matter, so i + 1 (HF) gives the same;
    - no embedding is masked at position 0 (vLLM masks one: its issue 33299).
    """
    name = f"model.layers.{cfg.num_hidden_layers + k - 1}"
    B, T = token_BT.shape
    at = positions(np.zeros(B, int) if start_B is None else start_B, T, cfg, h_BTD.dtype)
    embedded_BTD = w["model.embed_tokens.weight"][to_device(token_BT)]
    embedded_BTD = rms_norm(embedded_BTD, w[f"{name}.enorm.weight"], cfg.rms_norm_eps)
    state_BTD = rms_norm(h_BTD, w[f"{name}.hnorm.weight"], cfg.rms_norm_eps)
    joined_BTX = xp.concatenate([embedded_BTD, state_BTD], axis=-1)
    x_BTD = record(f"{name}.eh_proj", linear(joined_BTX, w, f"{name}.eh_proj"))
    x_BTD = block(x_BTD, w, cfg.num_hidden_layers + k - 1, cfg, at, cache)
    return rms_norm(x_BTD, w[f"{name}.shared_head.norm.weight"], cfg.rms_norm_eps)


def cross_entropy(logits_BTW, target_BT):
    """-log P(target) of each position, natural logarithm -> (B, T)."""
    logits_BTW = wide(logits_BTW)
    most_BT = xp.floor(xp.max(logits_BTW, axis=-1))  # as in softmax
    log_sum_BT = xp.log(xp.sum(xp.exp(logits_BTW - most_BT[..., None]), axis=-1)) + most_BT
    return log_sum_BT - xp.take_along_axis(logits_BTW, target_BT[..., None], axis=-1)[..., 0]


def training_objective(w, token_BX, cfg, mtp_weight=0.3, balance_weight=1e-4):
    """The loss of pre-training, L_main + L_MTP + L_Bal, of sequences of T + 1 tokens (X = T + 1).

    L_main: mean cross-entropy of tokens 2..T+1. L_MTP = lambda / D sum_k L^k, eq. (25), where L^k, eq. (24), sums
    T - k cross-entropies and, as printed, divides by T. L_Bal: `balance_loss` times alpha, summed over all layers
    with experts. Defaults: lambda as for the first 10T tokens, alpha (section 4.2).

    Returns the loss and its parts: {"main", "mtp": [L^1 .. L^D], "balance", "load": {name of the gate: load_E}}, the
    loads being what `update_bias` needs. Differentiate with respect to w; the biases' gradient is 0, as they only
    choose. (That L_Bal is summed over layers, those of the MTP modules too, is this file's reading.)
    """
    token_BX = to_device(token_BX)
    T, depth = token_BX.shape[1] - 1, mtp_depth(w, cfg)
    _require(T > depth, f"the objective needs more than {depth + 1} tokens a sequence, {depth} being the depth of MTP")
    with recording() as named:
        h_BTD = forward(token_BX[:, :T], w, cfg)
        main = xp.mean(cross_entropy(head(h_BTD, w, cfg), token_BX[:, 1:]))
        losses = []
        for k in range(1, depth + 1):
            h_BTD = mtp(k, h_BTD[:, : T - k], token_BX[:, k:T], w, cfg)
            loss_BT = cross_entropy(head(h_BTD, w, cfg), token_BX[:, k + 1 :])
            losses.append(xp.mean(xp.sum(loss_BT, axis=1)) / T)
    scores = {name.removesuffix(".scores"): score for name, score in named.items() if name.endswith(".gate.scores")}
    balance = sum(balance_loss(score_BTE, cfg) for score_BTE in scores.values())
    load = {name: expert_load(named[f"{name}.indices"], cfg) for name in scores}
    total = main + mtp_weight * sum(losses) / max(depth, 1) + balance_weight * balance
    return total, {"main": main, "mtp": losses, "balance": balance, "load": load}


# ---- 8. Checkpoints ------------------------------------------------------------------------------------------------
# Of a directory in the Hugging Face layout config.json is checked, safetensors are mapped, and tensors are decoded when
# used and kept as long as there is room.


LONGEST = 100_000_000  # bytes of text that are read, the safetensors library's limit on a header


def member(directory, name):
    """The path of a checkpoint's file. A stranger packed the directory: what is there must be a plain file (a pipe
    would keep us waiting), and no link may lead out, but to the blobs beside the snapshots in Hugging Face's cache."""
    path, home = Path(directory) / name, Path(os.path.realpath(directory))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    inside = any(Path(os.path.realpath(path)).is_relative_to(each) for each in homes)
    _require(inside, f"{path}: is a link out of its directory; put the file itself there")
    _require(os.path.isfile(path) or not os.path.exists(path), f"{path}: is no file; put the checkpoint's there")
    return path


def read(path):
    """The bytes of a file of text; InputError if there is none, or it is larger than such files are."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _require(size <= LONGEST, f"{path}: {size} bytes are too many for this file; is it the checkpoint's own?")
            return file.read()
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


def read_json(path):
    """The JSON object in a file; InputError if there is none."""
    return _parse_json(read(path), path)


def _parse_json(raw, where):
    """The JSON object in some bytes; InputError too where other readers might read another one."""

    def unambiguous(pairs):
        for text in itertools.chain(*pairs):
            if isinstance(text, str):
                text.encode()  # raises for half a surrogate pair
        for key, times in Counter(key for key, _ in pairs).items() if len(dict(pairs)) < len(pairs) else ():
            _require(times == 1, f"the key {key!r:.99} is there twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unambiguous)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON: {e}; download it again") from None
    _require(isinstance(value, dict), f"{where}: must be a JSON object; download it again")
    return value


def read_config(path):
    """The Config of a config.json, or of a directory that holds one."""
    path = Path(path)
    path = member(path, "config.json") if path.is_dir() else path
    keys = read_json(path)
    lacking = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers") if key not in keys]
    _require(not lacking, f"{path}: lacks {', '.join(lacking)}; is it a model's config.json?")
    try:
        return parse_config(keys)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


V3 = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "hidden_act": ("silu",), "moe_layer_freq": (1,)}
V2 = V3 | {
    "scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy"),
    "norm_topk_prob": (False,),  # with true, DeepSeek's code leaves out routed_scaling_factor, HF the norm
}  # fmt: skip
FAMILY = {"deepseek_v3": V3, "kimi_k2": V3, "deepseek_v2": V2}  # model_type -> what each key may be, its default first
V2_DEFAULTS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0}
NULL_MEANS = {"q_lora_rank": None, "n_shared_experts": 0, "n_group": 1, "topk_group": 1}  # elsewhere: the default
MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "n_routed_experts",
               "moe_intermediate_size", "mscale", "mscale_all_dim")  # fmt: skip


def _same(value, expected):
    """Whether two values are equal in JSON, where true is not 1."""
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def parse_config(keys):
    """The model that a config.json describes, in the release's spelling or in that of transformers 5.

    keys: the parsed JSON object. Keys that do not change the result are ignored; a value that would change it and
    that this file does not implement is refused by name (InputError).
    """
    _require(isinstance(keys, dict), "must be a JSON object")
    given = {key: value for key, value in keys.items() if value is not None}
    model_type = given.get("model_type", "deepseek_v3")
    _require(isinstance(model_type, str) and model_type in FAMILY,
             f"model_type {model_type!r:.99} is not implemented, only {' or '.join(map(repr, FAMILY))}")  # fmt: skip
    for key, allowed in FAMILY[model_type].items():
        value = given.setdefault(key, allowed[0])
        _require(any(_same(value, each) for each in allowed),
                 f"{key} {value!r:.99} is not implemented, only {' or '.join(map(repr, allowed))}")  # fmt: skip
    if model_type == "deepseek_v2":
        given = V2_DEFAULTS | given
    heads = given.get("num_attention_heads", Config.num_attention_heads)
    _require(_same(given.get("num_key_value_heads", heads), heads), "num_key_value_heads must equal "
             "num_attention_heads: MLA expands its latent to keys and values of every head")  # fmt: skip
    quantization = given.get("quantization_config", {})
    _require(isinstance(quantization, dict), "quantization_config must be an object")
    for key, value in {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}.items():
        got = quantization.get(key, value)
        _require(_same(got, value), f"quantization_config.{key} {got!r:.99} is not implemented, only {value!r}")
    both = [given[key] for key in ("rope_parameters", "rope_scaling") if given.get(key, {}) != {}]
    ropes = [_rope_from_dict(rope, given) for rope in both]
    _require(len(ropes) < 2 or ropes[0] == ropes[1], "rope_parameters and rope_scaling contradict each other")
    theta, yarn = ropes[0] if ropes else (given.get("rope_theta", Config.rope_theta), None)
    depths = [given[key] for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in given]
    _require(len(depths) < 2 or depths[0] == depths[1], "num_nextn_predict_layers and num_mtp_layers differ")
    null = {key: meaning for key, meaning in NULL_MEANS.items() if key in keys and keys[key] is None}
    known = {f.name: given[f.name] for f in fields(Config) if f.name in given} | null
    known |= {"rope_theta": theta, "rope_scaling": yarn}
    known |= {"num_nextn_predict_layers": depths[0]} if depths else {}
    if "n_routed_experts" in keys and keys["n_routed_experts"] is None:
        known |= {"first_k_dense_replace": known.get("num_hidden_layers", 61), "num_nextn_predict_layers": 0}
    return Config(**known)


def _rope_from_dict(rope, given):
    """A `rope_scaling` or `rope_parameters` object -> (rope_theta, Yarn, or None for plain RoPE)."""
    _require(isinstance(rope, dict), "rope_scaling and rope_parameters must be objects or null")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require(kind in ("default", "yarn"), f"rope_scaling type {kind!r:.99} is not implemented, only yarn or default")
    _require(_same(rope.get("partial_rotary_factor", 1.0), 1.0), "partial_rotary_factor must be 1")
    theta = rope.get("rope_theta", given.get("rope_theta", Config.rope_theta))
    if kind == "default":
        return theta, None
    for key in ("factor", "original_max_position_embeddings"):
        _require(key in rope, f"rope_scaling lacks {key}")
    return theta, Yarn(**{f.name: rope[f.name] for f in fields(Yarn) if f.name in rope})


def check_config(cfg):
    """Raise InputError unless the model is defined for these numbers."""
    _check_numbers(cfg)
    if cfg.rope_scaling:
        _check_numbers(cfg.rope_scaling)
    for key, known in (("scoring_func", ("sigmoid", "softmax")),
                       ("topk_method", ("noaux_tc", "group_limited_greedy", "greedy"))):  # fmt: skip
        _require(getattr(cfg, key) in known, f"{key} must be one of {', '.join(known)}, not {getattr(cfg, key)!r:.99}")
    layers, E = cfg.num_hidden_layers + cfg.num_nextn_predict_layers, cfg.n_routed_experts
    _require(layers * (3 * E + 20) < 2**19, f"{layers} layers of {E} experts are more than half a million tensors; "
             "num_hidden_layers or n_routed_experts is wrong")  # fmt: skip
    _require(cfg.rope_theta > 1, f"rope_theta must be above 1, not {cfg.rope_theta}")
    _require(cfg.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even: RoPE rotates pairs")
    if cfg.first_k_dense_replace < cfg.num_hidden_layers or cfg.num_nextn_predict_layers:
        G, kept = cfg.n_group, cfg.topk_group
        _require(E and cfg.moe_intermediate_size, "n_routed_experts and moe_intermediate_size must be above 0")
        _require(E % G == 0, f"n_routed_experts {E} must be a multiple of n_group {G}")
        single = G == 1 or cfg.topk_method != "noaux_tc"
        _require(single or E // G >= 2, f"n_group {G} leaves one expert a group, whose score needs its best two")
        _require(kept <= G, f"topk_group {kept} must be at most n_group {G}")
        choice = E if cfg.topk_method == "greedy" else kept * E // G
        _require(cfg.num_experts_per_tok <= choice, f"num_experts_per_tok must be at most {choice}, the number of "
                 "experts in topk_group groups")  # fmt: skip


def _check_numbers(settings):
    """Every field has its annotated type (a bool is no number) and is positive, or zero where that means something."""
    for f in fields(settings):
        value, name, kind = getattr(settings, f.name), f.name, (get_args(f.type) or (f.type,))[0]
        if value is None and type(None) in get_args(f.type):
            continue
        if kind is bool:
            _require(isinstance(value, bool), f"{name} must be true or false, not {value!r:.99}")
        elif kind in (int, float):
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            what, zero = "an integer from 1" if kind is int else "a number from 1e-12", name in MAY_BE_ZERO
            fits = number and (1e-12 <= value <= 1e12 or (value == 0 and zero))
            _require(fits, f"{name} must be {what} to 1e12{', or 0' if zero else ''}, not {value!r:.99}")


def tensor_shapes(cfg):
    """Name -> shape of every tensor of the model, the MTP modules included, under the checkpoint's own names.

    Released checkpoints hold the MTP modules' embedding and head a second time; they are shared, so not listed.
    """
    D, H, C, R = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    N, V, Q, E, W = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.q_lora_rank, cfg.n_routed_experts, cfg.vocab_size
    shapes = {"model.embed_tokens.weight": (W, D)}

    def mlp(name, width):
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, D)
        shapes[f"{name}.down_proj.weight"] = (D, width)

    for layer in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        name = f"model.layers.{layer}"
        if layer >= cfg.num_hidden_layers:
            shapes |= {f"{name}.{norm}.weight": (D,) for norm in ("enorm", "hnorm", "shared_head.norm")}
            shapes[f"{name}.eh_proj.weight"] = (D, 2 * D)
        shapes[f"{name}.input_layernorm.weight"] = shapes[f"{name}.post_attention_layernorm.weight"] = (D,)
        query = {"q_proj.weight": (H * (N + R), D)} if Q is None else {
            "q_a_proj.weight": (Q, D), "q_a_layernorm.weight": (Q,), "q_b_proj.weight": (H * (N + R), Q)
        }  # fmt: skip
        latent = {"kv_a_proj_with_mqa.weight": (C + R, D), "kv_a_layernorm.weight": (C,)}
        out = {"kv_b_proj.weight": (H * (N + V), C), "o_proj.weight": (D, H * V)}
        shapes |= {f"{name}.self_attn.{part}": shape for part, shape in (query | latent | out).items()}
        if cfg.attention_bias:
            biases = {"kv_a_proj_with_mqa": C + R, "o_proj": D} | ({} if Q is None else {"q_a_proj": Q})
            shapes |= {f"{name}.self_attn.{part}.bias": (size,) for part, size in biases.items()}
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
    shapes["model.norm.weight"] = (D,)
    return shapes if cfg.tie_word_embeddings else shapes | {"lm_head.weight": (W, D)}


BLOCK = 128  # an FP8 weight has one float32 scale for each block of 128 x 128, the last of a row or column cropped
BAND = 2**22  # elements, 16 MB in float32: what is decoded and multiplied at a time; on a GPU 64 times as many
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1"}  # how NumPy views the bytes
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "BOOL": 8} | {  # an element's, of all dtypes of the format
    name: int(re.search(r"\d+", name)[0]) for name in (*STORED, "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
                                                       "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
}  # fmt: skip


def read_safetensors(path):
    """A file's tensors, name -> (dtype, array over the mapped bytes); BF16 as uint16 and F8_E4M3 as uint8.

    The format: 8 bytes, the header's length n as little-endian; n bytes of JSON, {name: {dtype, shape, data_offsets}};
    the raw tensors, row by row, without a gap. A tensor of a dtype that no weight has is left as its bytes.

    The mapped file may be replaced, by renaming; one shortened where it lies ends the program (SIGBUS).
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length, most = int.from_bytes(file.read(8), "little"), min(size - 8, LONGEST)
            _require(length <= most, f"{path}: no safetensors file, or truncated: a header of {length} bytes, where "
                     f"{max(most, 0)} have room; download it again")  # fmt: skip
            header = _parse_json(file.read(length), f"{path}: the header")
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[8 + length :]
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    metadata = {} if header.get("__metadata__") is None else header["__metadata__"]
    sound = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    _require(sound, f"{path}: the header's __metadata__ must be an object of strings; download it again")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _require(_is_entry(entry), f"{path}: the header's entry for {name!r:.99} is malformed; it must be a dtype, "
                 "a shape that an array can have and two data_offsets; download it again")  # fmt: skip
    tensors, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        where, bits = f"{path}: {name!r:.99}, bytes {begin} to {end} of the data,", math.prod(shape) * BITS[dtype]
        _require(begin == at, f"{where} must begin at {at}: tensors neither overlap nor leave a gap; download it again")
        _require(8 * (end - begin) == bits, f"{where} must have the {bits / 8:.9g} of its shape; download it again")
        _require(end <= data.size, f"{where} is outside the file, whose data has {data.size}; download it again")
        stored, at = data[begin:end], end
        tensors[name] = dtype, stored.view(STORED[dtype]).reshape(shape) if dtype in STORED else stored
    _require(at == data.size, f"{path}: {data.size - at} bytes follow the last tensor; download it again")
    return tensors


def _is_entry(entry):
    """Whether a header's entry has the form that it must have, with numbers that NumPy's arrays can have."""
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        return False
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 64 and len(offsets) == 2
    if not lists or any(type(n) is not int or not 0 <= n < 2**60 for n in (*shape, *offsets)):
        return False
    return isinstance(dtype, str) and dtype in BITS and math.prod(n or 1 for n in shape) < 2**60


def e4m3_values():
    """The 256 values of float8 e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f is NaN.

    >>> e4m3_values()[[0x00, 0x38, 0x39, 0x7E, 0x7F, 0xC0]].tolist()
    [0.0, 1.0, 1.125, 448.0, nan, -2.0]
    """
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    value = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    value[code & 127 == 127] = np.nan
    return np.where(code < 128, value, -value).astype(np.float32)


def dequantize(code, scale):
    """FP8 codes (out, in) and their `weight_scale_inv` (ceil(out/128), ceil(in/128)) -> float32.

    The scale multiplies, whatever `inv` suggests: one float32 product is the definition.
    """
    rows, columns = code.shape
    scale = xp.repeat(xp.repeat(scale, BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]
    return xp.take(to_device(e4m3_values()), code) * scale


@functools.cache
def e4m3_pairs():
    """The values of two neighbouring codes, for each 16 bits that hold them: half as many look-ups."""
    value, pair = e4m3_values(), np.arange(2**16)
    return np.stack([value[pair & 255], value[pair >> 8]], axis=-1).view(np.complex64)[:, 0]


def dequantize_on_cpu(code, scale, out=None):
    """Computation: the same in NumPy, two codes a look-up, a row of blocks at a time while it is in the CPU's cache."""
    rows, columns = code.shape
    out = np.empty((rows, columns), np.float32) if out is None else out
    for top, scale_X in zip(range(0, rows, BLOCK), scale, strict=True):
        part, codes = out[top : top + BLOCK], code[top : top + BLOCK]
        if columns % 2 == 0:
            np.take(e4m3_pairs(), codes.view(np.uint16), out=part.view(np.complex64), mode="clip")
        else:
            np.take(e4m3_values(), codes, out=part, mode="clip")
        part *= np.repeat(scale_X, BLOCK)[:columns]
    return out


def decode(dtype, stored, scale=None, out=None):
    """A stored tensor as an array of `xp` in a dtype that computes: F8 (with its decoded scale) and BF16 exactly as
    float32, on the CPU in `out` if given, others as they are. What travels to the device is the stored form."""
    stored = to_device(stored)
    if dtype == "F8_E4M3":
        return dequantize_on_cpu(stored, scale, out) if xp is np else dequantize(stored, scale)
    if dtype == "BF16":
        if out is None:
            bits = stored.astype(xp.uint32)
        else:
            bits = out.view(np.uint32)
            bits[...] = stored
        bits <<= 16
        return bits.view(xp.float32)
    return stored


def bands(weight):
    """The rows of a matrix in bands of some BAND elements, one after the other. Products go by them wherever the
    matrix lies, so that results do not depend, in any bit, on where that is."""
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    limit = BAND if xp is np else 64 * BAND
    step = rows if rows * columns <= limit else max(BLOCK, limit // columns // BLOCK * BLOCK)
    if isinstance(weight, OnDisk):
        return weight.ahead(slices(rows, step))
    return [weight] if step == rows else (weight[part] for part in slices(rows, step))


def stack(matrices):
    """Matrices of one shape (rows, columns), in memory or not -> (n, rows, columns)."""
    return xp.stack([matrix.whole() if isinstance(matrix, OnDisk) else matrix for matrix in matrices])


@functools.cache
def _threads():
    """The threads that decode, and buffers of BAND elements into which they do: memory fresh from the system costs half
    as much again as the decoding."""
    return ThreadPoolExecutor(os.cpu_count()), deque()


class OnDisk:
    """A matrix for which there is no room in memory: it is decoded anew at each use, on the CPU by a thread a core, a
    few bands ahead of the products."""

    def __init__(self, stored, scale, dtype):
        (self.stored_as, self.stored), self.scale, self.dtype, self.shape = stored, scale, dtype, stored[1].shape

    def rows(self, part, out=None):
        """Rows part.start to part.stop, decoded; with FP8 the first one must begin a block."""
        stored = self.stored[part]
        scale = self.scale if self.scale is None else self.scale[part.start // BLOCK : -(-part.stop // BLOCK)]
        decoded = decode(self.stored_as, stored, scale, out).astype(self.dtype, copy=False)
        _forget(stored)
        return decoded

    def ahead(self, parts):
        """The decoded rows of each part, in turn, each valid until the next is asked for."""
        if xp is not np:  # a GPU runs behind as it is, and CuPy uploads through pinned buffers that it uses again
            yield from map(self.rows, parts)
            return
        parts, waiting, (pool, spare) = iter(parts), deque(), _threads()
        while (part := next(parts, None)) or waiting:
            if part:
                shape = part.stop - part.start, *self.shape[1:]
                size = math.prod(shape)
                buffer = spare.pop() if spare and spare[-1].size >= size else np.empty(max(size, BAND), np.float32)
                out = buffer[:size].reshape(shape)
                waiting.append((buffer, pool.submit(self.rows, part, out)))
            if len(waiting) > os.cpu_count() or not part:
                buffer, band = waiting.popleft()
                yield band.result()
                if buffer.size == BAND:
                    spare.append(buffer)

    def whole(self):
        if xp is not np or self.stored.size <= BAND:
            return self.rows(slice(0, self.shape[0]))
        out, top = np.empty(self.shape, self.dtype), 0
        for band in bands(self):
            out[top : top + len(band)] = band
            top += len(band)
        return out

    def reshape(self, *shape):
        return self.whole().reshape(*shape)

    def __getitem__(self, index):
        """Rows by an array of ids, as of an embedding: these alone are decoded."""
        ids, block = to_host(index), BLOCK if self.stored_as == "F8_E4M3" else 1
        rows = [self.rows(slice(i - i % block, i + 1))[-1] for i in ids.flat]
        return xp.stack(rows).reshape(*ids.shape, -1)


def _forget(stored):
    """Let the system take back the memory behind mapped bytes, which would count as ours: they are read again when
    needed, from its cache of the file if that has them still."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped, start = stored.base.base.obj, stored.ctypes.data - stored.base.ctypes.data
        start -= start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, stored.ctypes.data + stored.nbytes - stored.base.ctypes.data - start)


def _number(path, pattern):
    """The number that a pattern finds in one of the system's files; None if there is none."""
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


def free_memory():
    """Bytes that are free on the GPU, or else on the machine, within the limit of its container (cgroup v2); infinite
    where the system does not tell."""
    if xp is not np:
        return xp.cuda.runtime.memGetInfo()[0]
    kilobytes, limit = (
        _number("/proc/meminfo", r"MemAvailable:\s*(\d+)"),
        _number("/sys/fs/cgroup/memory.max", r"(\d+)"),
    )
    free = math.inf if kilobytes is None else 1024 * kilobytes
    return free if limit is None else min(free, limit - (_number("/sys/fs/cgroup/memory.stat", r"anon (\d+)") or 0))


class Checkpoint(Mapping):
    """The weights in a directory: tensor name -> array of `xp` in `dtype`, decoded at first use and kept, or a matrix
    `OnDisk` for want of memory.

    directory: holds model.safetensors, or shards and model.safetensors.index.json. Only the tensors of `tensor_shapes`
    are members, each checked for its presence and shape now; those of absent MTP modules are not. `unused` lists what
    the files hold beyond that. `{layer}.mlp.experts.{part}_proj.weight` is that part of all experts, stacked.

    memory: bytes that decoded tensors may take, by default 70 % of what is free. A tensor stays if there is room, or
    in the place of others used less often; one that finds none is decoded at each use. So of layers walked through in
    turn always the same ones stay (keeping the latest would keep none), and of experts those that are often chosen.
    Raises InputError.
    """

    def __init__(self, directory, cfg, dtype=np.float32, memory=None):
        self.directory, self.dtype = directory, np.dtype(dtype)
        self.memory = 0.7 * free_memory() if memory is None else memory
        self._kept, self._taken, self._uses = {}, 0, Counter()
        self.stored = stored = _read_shards(directory)
        cfg = replace(cfg, num_nextn_predict_layers=mtp_depth(stored, cfg))
        layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
        least = 8 * layers + 3 * cfg.n_routed_experts * sum(not cfg.is_dense(layer) for layer in range(layers))
        _require(least <= len(stored), f"{directory}: config.json describes {least} tensors or more, there are "
                 f"{len(stored)}; is the download complete, and does config.json belong to it?")  # fmt: skip
        self._shapes = tensor_shapes(cfg)
        if missing := [name for name in self._shapes if name not in stored]:
            raise InputError(f"{directory}: {len(missing)} tensors are missing, {missing[0]} first; "
                             "is the download complete, and does config.json belong to it?")  # fmt: skip
        scales = set()
        for name, shape in self._shapes.items():
            dtype, array = stored[name]
            _require(dtype in STORED, f"{directory}: {name} has dtype {dtype}, not one of {', '.join(STORED)}")
            _require(array.shape == shape, f"{directory}: {name} has shape {list(array.shape)}, "
                     f"config.json says {list(shape)}")  # fmt: skip
            if dtype == "F8_E4M3":
                scales.add(f"{name}_scale_inv")
                grid = tuple(-(-n // BLOCK) for n in shape)
                scale_dtype, scale = stored.get(f"{name}_scale_inv", (None, None))
                _require(len(shape) == 2, f"{directory}: {name} is FP8, which only a matrix can be")
                _require(scale is not None, f"{directory}: {name} is FP8 but {name}_scale_inv is missing")
                _require(scale.shape == grid and scale_dtype in ("F32", "BF16"),
                         f"{directory}: {name}_scale_inv must be F32 or BF16 of shape {list(grid)}")  # fmt: skip
        shared = ("embed_tokens.weight", "shared_head.head.weight", "rotary_emb.inv_freq")  # stored again, or derived
        unused = set(stored) - set(self._shapes) - scales
        self.unused = sorted(name for name in unused if not name.endswith(shared))

        sizes = (math.prod(shape) * self._dtype(name).itemsize for name, shape in self._shapes.items())
        self._all_fit = sum(sizes) <= self.memory
        self._stacks = {}
        for name in self._shapes:
            if (xp is np or self._all_fit) and (of := re.fullmatch(r"(.*\.mlp\.experts)\.\d+(\..*)", name)):
                self._stacks.setdefault(of[1] + of[2], []).append(name)

    def __getitem__(self, name):
        self._uses[name] += 1
        if name in self._kept:
            return self._kept[name]
        if name in self._stacks:
            return self._stack(name)
        (dtype, stored), wanted = self.stored[name], self._dtype(name)
        if xp is np and stored.dtype == wanted:
            return stored
        scale = decode(*self._scale(name)) if dtype == "F8_E4M3" else None
        tensor = OnDisk(self.stored[name], scale, wanted)
        if self._make_room(name, stored.size * wanted.itemsize):
            self._kept[name] = tensor.whole()
            return self._kept[name]
        return tensor if stored.ndim == 2 and ".mlp.gate." not in name else tensor.whole()

    def _scale(self, name):
        """The stored scales of an FP8 matrix, checked as they are read. Bits order floats from 0 up: one comparison of
        integers refuses what is negative, NaN, infinite, or above 2^119, where 448 times the scale overflows."""
        dtype, stored = self.stored[f"{name}_scale_inv"]
        sound = (stored.view(f"<u{stored.itemsize}") <= (0x7B000000 if dtype == "F32" else 0x7B00)).all()
        _require(sound, f"{self.directory}: {name}_scale_inv must be from 0 to 6e35 throughout; download it again")
        return dtype, stored

    def _dtype(self, name):
        """That of a decoded tensor: the routers' are float32 or better."""
        return np.promote_types(self.dtype, np.float32) if ".mlp.gate." in name else self.dtype

    def _stack(self, name):
        """All experts' matrices as one array. If it stays, the matrices by their own names become views of it."""
        names = self._stacks[name]
        whole = stack([self[each] for each in names])
        if self._all_fit:
            self._kept |= {name: whole} | {each: whole[e] for e, each in enumerate(names)}
        return whole

    def _make_room(self, name, size):
        """Whether there is room for a tensor to stay, made if need be at the cost of tensors used less."""
        free, yielding = self.memory - self._taken, []
        for each in sorted((k for k in self._kept if self._uses[k] < self._uses[name]), key=self._uses.__getitem__):
            if free >= size:
                break
            free += self._kept[each].nbytes
            yielding.append(each)
        if free < size:
            return False
        for each in yielding:
            del self._kept[each]
        self._taken = self.memory - free + size
        return True

    def __contains__(self, name):
        return name in self._shapes or name in self._stacks

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self):
        return len(self._shapes)


def _read_shards(directory):
    """All tensors of a directory. The index, if there is one, says which file holds which; a weight and its scale may
    lie in different files."""
    index = member(directory, "model.safetensors.index.json")
    if not index.exists():
        return read_safetensors(member(directory, "model.safetensors"))
    weight_map = read_json(index).get("weight_map")
    _require(isinstance(weight_map, dict) and weight_map, f"{index}: lacks weight_map, which tensor is in which file")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and shard.isprintable() and os.path.basename(shard) == shard
        _require(plain, f"{index}: {shard!r:.99} is no plain file name; shards lie beside the index")
    shards = {shard: read_safetensors(member(directory, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        _require(name in shards[shard], f"{index}: places {name!r:.99} in {shard}, which lacks it; download both again")
    for shard, tensors in shards.items():
        twice = next((name for name in tensors if weight_map.get(name, shard) != shard), None)
        _require(twice is None, f"{index}: {shard} too has {twice!r:.99}, beside the file that has it by the index")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


# ---- 9. Generation -------------------------------------------------------------------------------------------------
# One loop feeds what is new, chooses the next token, has the MTP module draft the one after, and verifies the draft
# next time; the trace of one pass is what a port is checked by.

CHUNK = 1024  # tokens of a prompt that go through the model at once, which bounds the memory for activations


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _require(0 <= self.temperature < math.inf, f"temperature must be 0 or more, not {self.temperature}")
        _require(self.top_k >= 0, f"top-k must be 0 (all) or more, not {self.top_k}")
        _require(0 < self.top_p <= 1, f"top-p must be above 0 and at most 1, not {self.top_p}")
        _require(self.seed >= 0, f"seed must be 0 or more, not {self.seed}")


@dataclass
class Stats:
    """What a generation did; `generate` fills it in. The first token of each row belongs to the prompt's time."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    rows: int = 0
    cache_bytes: int = 0
    times: list = field(default_factory=list)  # seconds, at the start and after each round

    def line(self):
        def rate(tokens, times):
            return f"{tokens / (times[-1] - times[0]) if len(times) > 1 else 0:.1f} tok/s"

        return (
            f"prompt: {self.prompt_tokens} tokens, {rate(self.prompt_tokens, self.times[:2])}"
            f" · new: {self.new_tokens} tokens, {rate(self.new_tokens - self.rows, self.times[1:])}"
            f" · drafted {self.drafted}, accepted {self.accepted}"
            f" · cache {self.cache_bytes / 1000:.0f} KB · peak memory {_peak_memory() / 1e6:.0f} MB"
        )


def _peak_memory():
    """Bytes that this process has had in memory at most; 0 where the system does not tell."""
    if kilobytes := _number("/proc/self/status", r"VmHWM:\s*(\d+) kB"):
        return 1024 * kilobytes  # on Linux; its ru_maxrss would count the process that started this one
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def distribution(logits_W, sampling):
    """The probabilities (W,) that a token is drawn from, float64 on the host: temperature, then top-k, then top-p (of
    what top-k left, the fewest likeliest tokens that reach it). Among equals the lowest id comes first.

    >>> distribution(np.log([0.2, 0.5, 0.3]), Sampling(temperature=1.0, top_p=0.6)).round(3)
    array([0.   , 0.625, 0.375])
    """
    logits_W = logits_W.astype(np.float64)
    _require(np.isfinite(logits_W).all(), "the model's logits are not finite: the weights or the dtype overflow")
    if sampling.temperature == 0:
        return (np.arange(logits_W.size) == np.argmax(logits_W)).astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: e^-inf is the 0 it should be
        p_W = np.exp((logits_W - logits_W.max()) / sampling.temperature)
    p_W /= p_W.sum()
    if sampling.top_k or sampling.top_p < 1:
        order_W = np.argsort(-p_W, kind="stable")
        p_W[order_W[sampling.top_k or p_W.size :]] = 0
        reached_W = np.cumsum(p_W[order_W]) / p_W.sum()
        p_W[order_W[np.searchsorted(reached_W, sampling.top_p) + 1 :]] = 0
        p_W /= p_W.sum()
    return p_W


def draw(p_W, rng):
    """An index with probability p_W[index]: the only place where chance enters."""
    if p_W[likeliest := int(np.argmax(p_W))] == 1:
        return likeliest
    cumulated = np.cumsum(p_W)
    chosen = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
    return chosen if chosen < len(p_W) else int(np.flatnonzero(p_W)[-1])  # rounded up to the very end


def verify(p_W, q_W, draft, rng):
    """The rejection rule of speculative sampling (arXiv:2211.17192): whether a draft drawn from q stands, and the
    token, which is distributed as p exactly. Accept with probability min(1, p/q), else draw from max(p - q, 0)."""
    accept = min(1.0, p_W[draft] / q_W[draft])
    if draw([1 - accept, accept], rng):
        return True, draft
    return False, draw(np.maximum(p_W - q_W, 0), rng)


def pad(rows):
    """Lists of token ids to one array (B, T), each repeating its last token on the right (see `Cache` for why that
    never matters)."""
    token_BT = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for b, row in enumerate(rows):
        token_BT[b] = [*row, *(row or [0])[-1:] * (token_BT.shape[1] - len(row))]
    return token_BT


def check_prompts(prompts, cfg, max_tokens):
    """Raise InputError for prompts that cannot be continued by max_tokens."""
    _require(len(prompts) and max_tokens >= 0, "generation needs a prompt, and 0 or more tokens to make")
    for n, prompt in enumerate(prompts):
        _require(len(prompt), f"prompt {n} is empty: it needs at least one token")
        bad = [t for t in prompt if not 0 <= t < cfg.vocab_size]
        _require(not bad, f"prompt {n}: token id {bad[:1]!s:.99} is outside the vocabulary, 0 to {cfg.vocab_size - 1}")
        _require(len(prompt) + max_tokens <= cfg.max_position_embeddings,
                 f"prompt {n} has {len(prompt)} tokens; with {max_tokens} new ones that is more than the model's "
                 f"{cfg.max_position_embeddings} positions: shorten it, or make fewer")  # fmt: skip


@dataclass
class Row:
    """One sequence while it is generated."""

    feed: list  # its tokens that the cache does not hold yet: the prompt at first, then the last token
    left: int  # how many tokens may still be made
    rng: np.random.Generator
    draft: int | None = None
    q_W: np.ndarray | None = None  # what the draft was drawn from

    def choose(self, logits_UW, sampling):
        """The next token, or the next two if there is a draft and it stands."""
        p_W = distribution(logits_UW[0], sampling)
        if self.draft is None:
            return [draw(p_W, self.rng)]
        stands, token = verify(p_W, self.q_W, self.draft, self.rng)
        return [token, draw(distribution(logits_UW[1], sampling), self.rng)] if stands else [token]


def generate(prompts, w, cfg, max_tokens, sampling=None, stop=(), speculate=True, cache=None, stats=None,
             progress=lambda done, tokens: None):  # fmt: skip
    """Continue each prompt; yields (row, token) as tokens are made. A row ends after max_tokens or a token in `stop`.

    prompts: lists of token ids, of any lengths; rows do not influence each other, and row b draws from its own random
    stream (seed, b). speculate: draft with the first MTP module, if there is one; this changes the speed, not the
    distribution, and not one token of greedy output (unless two logits, or two affinities, are equal but for rounding).
    cache: of an earlier call with as many prompts; what its tokens and the prompts have in common is not computed
    again. progress is called as the prompt goes through the model. Bad arguments raise InputError before any work.

    Speculation, with t_n the last token: the main model sees [t_n, draft of t_n+1] in one pass. If the draft stands
    (`verify`), both it and the token after it are known; if not, only the token in its place, and the draft's cache
    entry is left to be overwritten. The MTP module then sees the new pairs (h_i, t_i+1) and drafts again. Its pairs
    hold only verified tokens and states, so its cache is right after every accept and reject.
    """
    sampling, stats, B = sampling or Sampling(), stats or Stats(), len(prompts)
    check_prompts(prompts, cfg, max_tokens)
    cache = cache or Cache(B, max(map(len, prompts)) + max_tokens + 1)  # the last draft may stand one past the end
    _require(len(cache.tokens) == B, f"the cache has {len(cache.tokens)} rows, there are {B} prompts")
    speculate = speculate and mtp_depth(w, cfg) > 0
    rows = []
    for b, (held, prompt) in enumerate(zip(cache.tokens, map(list, prompts), strict=True)):
        common = len(os.path.commonprefix([held, prompt]))
        del held[max(0, common - 1) :]  # one less: the MTP module's last pair has the token after it
        rows.append(Row(prompt[len(held) :], max_tokens, np.random.default_rng([sampling.seed, b])))
    stats.prompt_tokens, stats.rows, stats.times = sum(len(row.feed) for row in rows), B, [time.perf_counter()]
    while True:
        start_B = np.array([len(held) for held in cache.tokens])
        token_BT = pad([row.feed if row.draft is None else [*row.feed, row.draft] for row in rows])
        h_BTD = in_chunks(
            lambda part: forward(token_BT[:, part], w, cfg, cache, start_B + part.start), token_BT, progress
        )
        progress = lambda *_: None  # the prompt is through  # noqa: E731
        choices = 2 if any(row.draft is not None for row in rows) else 1
        logits_BUW = logits_from([len(row.feed) - 1 for row in rows], choices, h_BTD, w, cfg)
        new = [row.choose(logits_BUW[b], sampling) if row.left else [] for b, row in enumerate(rows)]
        stats.cache_bytes = cache.nbytes
        for b, row in enumerate(rows):
            stats.drafted += bool(new[b]) and row.draft is not None
            stats.accepted += len(new[b]) == 2
            for token in new[b]:
                if row.left:
                    row.left = 0 if token in stop else row.left - 1
                    stats.new_tokens += 1
                    yield b, token
        done = not any(row.left for row in rows)
        if speculate and not done:
            draw_drafts(rows, new, h_BTD, w, cfg, cache, start_B, sampling)
        stats.times.append(time.perf_counter())
        if done:
            return
        for held, row, tokens in zip(cache.tokens, rows, new, strict=True):
            if tokens:
                held += row.feed + tokens[:-1]
                row.feed = tokens[-1:]


def speculation_pays(cfg):
    """Whether to speculate unless told otherwise. On NumPy only while a model is so small that calls cost more than
    arithmetic: in a larger one the second row of a product, and the MTP module, come nearly at their full price
    (`pytest -m benchmark -k round` measures it). On a GPU always, which nobody has measured yet."""
    return xp is not np or activated(cfg) <= 2**24


def draw_drafts(rows, new, h_BXD, w, cfg, cache, start_B, sampling):
    """Show the MTP module the pairs (h_i, t_i+1) that this round's new tokens complete; draw each live row's draft."""
    pairs = [(row.feed + tokens)[1:] for row, tokens in zip(rows, new, strict=True)]
    token_BT = pad(pairs)
    h_BTD = in_chunks(
        lambda part: mtp(1, h_BXD[:, part], token_BT[:, part], w, cfg, cache, start_B + part.start), token_BT
    )
    logits_BUW = logits_from([len(tokens) - 1 for tokens in pairs], 1, h_BTD, w, cfg)
    for b, row in enumerate(rows):
        row.q_W = distribution(logits_BUW[b, 0], sampling) if row.left else None
        row.draft = draw(row.q_W, row.rng) if row.left else None


def in_chunks(step, token_BT, progress=lambda done, tokens: None):
    """step(slice) -> (B, t, D) over CHUNK positions of token_BT at a time, joined to (B, T, D)."""
    T, parts = token_BT.shape[1], []
    for part in slices(T, CHUNK):
        parts.append(step(part))
        progress(part.stop, T)
    return join(parts, axis=1)


def logits_from(first, count, h_BTD, w, cfg):
    """The logits of `count` states of each row b, from h[b, first[b]] on, on the host: (B, count, W)."""
    B, T, _ = h_BTD.shape
    index = (np.array(first)[:, None] + np.arange(count)) % T  # rows that are done may point anywhere
    return to_host(head(h_BTD[xp.arange(B)[:, None], to_device(index)], w, cfg))


def trace(prompts, w, cfg):
    """Every named activation of the prompts' forward pass -> {name: NumPy array (T, ...)}, in the order of computation.

    The names are the paths of the checkpoint's modules; of several prompts, prefixed "{n}/". The MTP modules see the
    pairs within the prompt, so their arrays have T - k rows.
    """
    check_prompts(prompts, cfg, 0)
    token_BX = pad(prompts)
    (B, X), cache = token_BX.shape, Cache(len(prompts))
    with recording() as named:
        h_BTD = forward(token_BX, w, cfg, cache)
        record("lm_head", head(h_BTD, w, cfg))
        for k in range(1, min(mtp_depth(w, cfg), X - 1) + 1):
            h_BTD = mtp(k, h_BTD[:, : X - k], token_BX[:, k:], w, cfg, cache)
            record(f"model.layers.{cfg.num_hidden_layers + k - 1}.shared_head", head(h_BTD, w, cfg))
    named = {name: to_host(x) for name, x in named.items()}
    prefixes = [f"{n}/" if B > 1 else "" for n in range(B)]
    return {prefixes[n] + name: x[n, : max(0, x.shape[1] - X + len(prompt))]
            for n, prompt in enumerate(prompts) for name, x in named.items()}  # fmt: skip


TOLERANCE = {8: 1e-9, 4: 1e-3, 2: 5e-2}  # of a difference, relative to the array's rms, by the bytes of the dtype


def compare(ours, theirs, tolerance=TOLERANCE, mistakes=lambda name: ()):
    """Compare two traces in the order of computation. -> (whether they agree, one line that says so or names the first
    array that departs). Chosen experts are compared as sets, their gates in the order of the experts.

    mistakes: name -> pairs (what, a trace made with that mistake), such as `known_mistakes`. Those that give the array
    that departs are named with it.
    """
    worst, common = 0.0, [name for name in ours if name in theirs]
    _require(common, f"no array of the file has a name of the trace, such as {next(iter(ours))}")
    for name in common:
        size, text = difference(name, ours, theirs)
        limit = tolerance.get(min(ours[name].itemsize, np.asarray(theirs[name]).itemsize), tolerance[min(tolerance)])
        if not size <= limit:
            found = [what for what, wrong in mistakes(name) if difference(name, wrong, theirs)[0] <= min(1, size) / 100]
            return False, f"departs at {name}: {text}" + (f"; as if {' or '.join(found)}" if found else "")
        worst = max(worst, size)
    return True, f"agree: {len(common)} of {len(ours)} arrays, the largest difference {worst:.1e} of an array's rms"


def difference(name, ours, theirs):
    """How far their array of this name is from ours -> (the largest difference by our rms, in words). Other shapes and
    other experts are infinitely far."""
    a, b = ours[name], np.asarray(theirs[name])
    if b.dtype == "V2":  # how NumPy stores a bfloat16 that it does not know
        b = (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    _require(b.dtype.kind in "biuf", f"{name} in the file holds no real numbers but {b.dtype}")
    if a.shape != b.shape:
        return math.inf, f"shape {list(b.shape)} instead of {list(a.shape)}"
    if name.endswith(".gate.indices"):
        others = int((np.sort(a) != np.sort(b)).any(-1).sum())
        return math.inf if others else 0.0, f"{others} of {len(a)} tokens chose other experts"
    if name.endswith(".gate.weights") and (index := name.replace("weights", "indices")) in theirs:
        a = np.take_along_axis(a, np.argsort(ours[index]), -1)
        b = np.take_along_axis(b, np.argsort(theirs[index]), -1)
    rms = float(np.sqrt(np.mean(np.square(a, dtype=np.float64)))) if a.size else 0.0
    with np.errstate(invalid="ignore"):  # inf - inf: departs
        error = float(np.max(np.abs(a - b.astype(np.float64)), initial=0.0))
    size = error / rms if rms else math.inf if error else 0.0
    return size, f"by up to {error:.3g}, where its rms is {rms:.3g}"


def known_mistakes(name, ours, prompts, w, cfg):
    """What ports have got wrong before -> pairs (what, the trace that this makes of the prompts). Most are this file
    with other weights or another configuration, up to the layer of the array `name`."""
    yarn, last = cfg.rope_scaling, re.search(r"layers\.(\d+)", name)
    depth = int(last[1]) - cfg.num_hidden_layers if last else 0
    if depth < 0:
        cfg = replace(cfg, num_hidden_layers=int(last[1]) + 1, num_nextn_predict_layers=0)

    def run(w=w, **keys):
        return trace(prompts, w, replace(cfg, **keys))

    def swapped(part, heads, n):  # the first n rows of each head go behind the others
        return _changed(w, part, lambda x: xp.roll(x.reshape(heads, len(x) // heads, -1), -n, axis=1).reshape(x.shape))

    H, R, C = cfg.num_attention_heads, cfg.qk_rope_head_dim, cfg.kv_lora_rank
    if name.endswith("_rope"):
        permuted = np.concatenate([ours[name][..., 0::2], ours[name][..., 1::2]], axis=-1)
        yield "stored by halves (as in HF, no mistake: write the pairs as neighbours)", {name: permuted}
    yield "RoPE paired other elements", run(rope_interleave=not cfg.rope_interleave)
    if yarn:
        yield "YaRN were off", run(rope_scaling=None)
        for what, keys in {
            "YaRN's range were rounded otherwise": {"truncate": not yarn.truncate},
            "cos and sin lacked YaRN's factor": {"attention_factor": 1.0},
            "the softmax scale lacked mscale^2": {"mscale_all_dim": None, "attention_factor": rope_magnitude(cfg)},
        }.items():
            yield what, run(rope_scaling=replace(yarn, **keys))
    yield "the heads of q were [rope ; nope]", run(swapped("q_b_proj" if cfg.q_lora_rank else "q_proj", H, R))
    yield "kv_a_proj_with_mqa were [k_R ; c_KV]", run(swapped("kv_a_proj_with_mqa", 1, R))
    yield "the heads of kv_b_proj were [v ; k]", run(swapped("kv_b_proj", H, cfg.v_head_dim))
    shrink = math.sqrt(LATENT_EPS / cfg.rms_norm_eps)  # a smaller latent is a larger eps
    down = _changed(w, "q_a_proj", lambda x: x * shrink)
    down = _changed(down, "kv_a_proj_with_mqa", lambda x: xp.concatenate([x[:C] * shrink, x[C:]]))
    yield "the norms on the latents took rms_norm_eps", run(down)
    yield "the biases did not enter the choice", run(_changed(w, "e_score_correction_bias", lambda x: x * 0))
    yield "there were no groups", run(n_group=1, topk_group=1)
    yield "norm_topk_prob were the opposite", run(norm_topk_prob=not cfg.norm_topk_prob)
    yield "routed_scaling_factor were 1", run(routed_scaling_factor=1.0)
    if name.endswith(".gate.weights") and cfg.topk_method == "noaux_tc":
        gate = name.removesuffix("weights")
        biased = ours[f"{gate}scores"] + to_host(w[f"{gate.rpartition('/')[2]}e_score_correction_bias"])
        biased = np.take_along_axis(biased, ours[f"{gate}indices"], axis=-1)
        biased = biased / (biased.sum(axis=-1, keepdims=True) if cfg.norm_topk_prob else 1)
        yield "the biases entered the gates", ours | {name: biased * cfg.routed_scaling_factor}
    if last and depth >= 0:
        norm = f"model.layers.{int(last[1]) - 1}.shared_head.norm" if depth else "model.norm"
        halves = _changed(w, "eh_proj", lambda x: xp.roll(x, cfg.hidden_size, axis=1))
        yield "eh_proj took [state ; embedding]", run(halves)
        yield f"the MTP module took the state before {norm}", run(_changed(w, norm, lambda x: x * 0 + 1))


def _changed(w, part, change):
    """The weights with those of some modules changed, by the end of their names."""
    keys = [key for key in w if key.removesuffix(".weight").removesuffix(".bias").endswith(part)]
    return ChainMap({key: change(stack([w[key]])[0]) for key in keys}, w)


# ---- 10. Command line ----------------------------------------------------------------------------------------------
# Text goes to stdout, everything else to stderr, and what cannot be done is refused in one line.


OPENING = "Once upon a time"  # the prompt where none is given
WHAT_ELSE = """what else: --prompt "Tom had a kite" goes on from there, --temperature 0.7 --seed 1 tells it differently,
--weights DIR runs another checkpoint, --inspect counts parameters and cache, --help lists all flags"""


def choose_device(wanted):
    """(namespace, reason) for auto, cpu or gpu: auto takes the GPU if it works, gpu raises InputError otherwise."""

    def no(why, remedy):
        _require(wanted != "gpu", f"--device gpu: {why}; {remedy}")
        return np, f"cpu: {why}"

    if wanted == "cpu":
        return np, "cpu: asked for"
    wheel = 'pip install "cupy-cuda13x[ctk]", or cupy-cuda12x by the driver'
    try:
        import cupy
    except ModuleNotFoundError as e:
        return no("CuPy is not installed" if e.name == "cupy" else f"CuPy lacks {e.name}", wheel)
    except ImportError as e:
        return no(f"CuPy does not import ({_first_line(e)})", "install the one wheel that fits the driver")
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as e:
        if e.status == 35 and runtime.driverGetVersion() == 0:  # cudaErrorInsufficientDriver
            return no("no NVIDIA driver is installed", "install it: nvidia-smi should list the GPU")
        if e.status == 35:
            return no("the NVIDIA driver is older than CuPy's CUDA", "update it, or install the wheel that fits it")
        return no(f"CUDA answers {_first_line(e)}", "see nvidia-smi")
    if not count:
        return no("the driver sees no GPU", "see nvidia-smi and CUDA_VISIBLE_DEVICES")
    try:  # CUDA's libraries are loaded late: a kernel needs NVRTC, a product cuBLAS
        one = cupy.ones((2, 2), np.float32)
        float((one @ one).sum())
    except (ImportError, OSError, RuntimeError) as e:
        return no(f"CUDA's libraries do not load ({_first_line(e)})", wheel)
    return cupy, f"gpu: {runtime.getDeviceProperties(0)['name'].decode()}"


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def activated(cfg):
    """How many parameters of the main model a token meets, embedding and head included."""
    shapes = tensor_shapes(replace(cfg, num_nextn_predict_layers=0))
    sparse = sum(not cfg.is_dense(layer) for layer in range(cfg.num_hidden_layers))
    idle = sparse * (cfg.n_routed_experts - cfg.num_experts_per_tok)
    return sum(map(math.prod, shapes.values())) - idle * 3 * cfg.hidden_size * cfg.moe_intermediate_size


def inspect(cfg, checkpoint=None):
    """A table of parameters and of the cache, beside one that would keep MLA's own keys (N + R) and values (V) for all
    heads, for 8, for one. Of a checkpoint, only the MTP modules that it has."""
    if checkpoint:
        cfg = replace(cfg, num_nextn_predict_layers=mtp_depth(checkpoint, cfg))
    main = tensor_shapes(replace(cfg, num_nextn_predict_layers=0))
    total = sum(map(math.prod, main.values()))
    module = sum(map(math.prod, tensor_shapes(cfg).values())) - total
    latent, H = cfg.kv_lora_rank + cfg.qk_rope_head_dim, cfg.num_attention_heads
    pair = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim  # one head's key and value
    lines = [
        f"parameters of the main model  {total:>19,}",
        f"  activated for a token       {activated(cfg):>19,}  embedding and head included",
        f"parameters of MTP modules     {module:>19,}  beside the shared embedding and head",
        f"cache elements a token        {latent * cfg.num_hidden_layers:>19,}  "
        f"{2 * latent * cfg.num_hidden_layers:,} bytes in BF16",
    ]
    for label, heads in (("MHA", H), ("GQA, 8 key heads", 8), ("MQA", 1)):
        if H % heads == 0:
            elements = heads * pair * cfg.num_hidden_layers
            lines.append(f"  with {label:<22} {elements:>19,}  {heads * pair / latent:.1f} times as many")
    if checkpoint:
        sizes = {}
        for dtype, stored in checkpoint.stored.values():
            sizes[dtype] = sizes.get(dtype, 0) + stored.nbytes
        lines += [f"on disk in {dtype:<18} {size:>19,}  bytes" for dtype, size in sorted(sizes.items())]
    return "\n".join(lines)


class Text:
    """A checkpoint's tokenizer.json, with the BOS that its tokenizer_config.json may ask for."""

    def __init__(self, directory):
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        path, settings, template = (member(directory, name) for name in names)
        _require(path.exists(), f"{directory} has no tokenizer.json: give token ids with --tokens")
        try:
            import tokenizers
        except ImportError:
            raise InputError("text needs the tokenizers package: pip install tokenizers, or give --tokens") from None
        raw = read(path)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as e:  # the library raises bare Exception for a malformed file
            raise InputError(f"{path}: {_first_line(e)}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.new_stream = lambda: tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        self.settings = read_json(settings) if settings.exists() else {}
        self.chat_template = read(template) if template.exists() else self.settings.get("chat_template")
        self.special = {}
        for key in ("bos_token", "eos_token"):
            value = self.settings.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            _require(value is None or isinstance(value, str), f"{settings}: {key} must be a string, not {value!r}")
            self.special |= {key: value} if value else {}

    def encode(self, text, special=True):
        """Token ids of a prompt. special: begin with BOS, once, if the tokenizer or its configuration says so."""
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError):
            raise InputError("the prompt is not valid Unicode: it holds a lone surrogate, or was not UTF-8") from None
        bos = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        lacks_bos = special and self.settings.get("add_bos_token") and bos is not None and ids[:1] != [bos]
        return [bos, *ids] if lacks_bos else ids

    def render(self, messages):
        """A conversation in the checkpoint's chat template; that is untrusted input, so it runs in Jinja's sandbox."""
        _require(self.chat_template, "this checkpoint has no chat template; --prompt continues text")
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError("--chat needs the jinja2 package: pip install jinja2") from None
        try:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            source = self.chat_template.decode() if isinstance(self.chat_template, bytes) else self.chat_template
            template = environment.from_string(source)
            return template.render(messages=messages, add_generation_prompt=True, **self.special)
        except Exception as e:  # a template is a stranger's program: it may fail in any way
            raise InputError(f"the checkpoint's chat template fails: {_first_line(e)}") from None

    def encode_chat(self, messages):
        """Token ids of a conversation in the chat template. Special tokens are the template's alone: one that a message
        spells out stays text (while the template runs, a character of private use stands for it)."""
        added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        marks = {content: chr(0xF0000 + n) for n, content in enumerate(added)}
        spelled = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"\Z")
        hidden = [m | {"content": spelled.sub(lambda found: marks.get(found[0], ""), m["content"])} for m in messages]
        contents, ids = {mark: content for content, mark in marks.items()}, []
        for part in re.split("([\U000f0000-\U000ffffd])", self.render(hidden)):
            content = contents.get(part)
            self.tokenizer.encode_special_tokens = content is not None  # that is: as text
            for text in [part] if content is None else [content[:1], content[1:]]:  # in two halves it is no token
                ids += self.encode(text, special=False)
        return ids


def end_tokens(directory):
    """The ids that end a text, of generation_config.json or else of config.json, which give one id, a list or null."""
    for name in ("generation_config.json", "config.json"):
        if (path := member(directory, name)).exists():
            ids = read_json(path).get("eos_token_id")
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                _require(all(type(t) is int for t in ids), f"{path}: eos_token_id must be ids")
                return set(ids)
    return set()


def write_npz(path, arrays):
    """Write beside the path, then rename: what stands at the path is whole, or as it was."""
    path = os.path.realpath(path)
    try:
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as part:
            try:
                np.savez(part, **arrays)
                part.flush()
                os.chmod(part.name, 0o644)
                os.replace(part.name, path)
            except BaseException:
                os.unlink(part.name)
                raise
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror}") from None


def check_writable(path):
    """Refuse a path that `write_npz` could not write, before the work and not after it."""
    folder = os.path.dirname(os.path.realpath(path))
    _require(os.path.isdir(folder) and os.access(folder, os.W_OK), f"{path}: {folder} is no directory to write in")
    _require(not os.path.exists(path) or os.path.isfile(path), f"{path}: is there already and is no file")


def read_npz(path):
    """The arrays of an .npz file, by name; InputError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror or e}") from None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, OverflowError, MemoryError):
        raise InputError(f"{path}: not an .npz file of plain arrays that fit in memory") from None


class Parser(argparse.ArgumentParser):
    """Refuses in one line, as everything else does."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def parse_arguments(argv):
    """The flags, with what argparse does not check: ranges, and which exclude each other."""
    parser = Parser(prog="deepseek_v3.py", description="DeepSeek-V3 on NumPy and CuPy; without arguments, a story.")
    add = parser.add_argument
    add("-p", "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; - is stdin; repeatable")
    add("--tokens", action="append", default=[], metavar="IDS", help='token ids instead: "3 14 15"; repeatable')
    add("--weights", type=Path, default=Path(__file__).resolve().parent / "weights", metavar="DIR",
        help="checkpoint in the Hugging Face layout (default: weights/ beside this file)")  # fmt: skip
    add("-n", "--max-tokens", "--max-new-tokens", type=int, default=200, metavar="N",
        help="how many new tokens at most (default 200); 0: only the forward pass")  # fmt: skip
    add("--temperature", "--temp", type=float, default=0.0, metavar="T", help="default 0: always the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that together reach P")
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; default 0: all")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto (default): the GPU if there is one")
    add("--dtype", choices=["float32", "float64", "float16"], default="float32", help="of the computation (float32)")
    add("--memory", type=float, metavar="GB", help="for decoded weights; default: 70%% of what is free")
    add("--mtp", action=argparse.BooleanOptionalAction, help="speculate (default: on a GPU, and in a small model)")
    add("--chat", action="store_true", help="converse in the checkpoint's chat template, one line of stdin a turn")
    add("--trace", metavar="FILE.npz", help="write the named activations of the prompt's forward pass")
    add("--compare", metavar="FILE.npz", help="name the first of them where a port's trace departs, and the mistake if "
        "it is a known one (exit code 1)")  # fmt: skip
    add("--inspect", action="store_true", help="count parameters and cache, of a checkpoint or a bare config.json")
    args = parser.parse_args(argv)
    _require(args.memory is None or args.memory >= 0, f"--memory must be 0 or more, not {args.memory}")
    _require(args.max_tokens >= 0, f"--max-tokens must be 0 or more, not {args.max_tokens}")
    _require(not (args.prompt and args.tokens), "--prompt and --tokens exclude each other")
    _require("" not in (args.trace, args.compare), "--trace and --compare take the name of a file, not an empty one")
    alone = args.tokens or args.trace is not None or args.compare is not None
    _require(not (args.chat and alone), "--chat takes no --tokens, --trace or --compare")
    return args


def read_prompt(text):
    """A --prompt: itself, or for "-" what stdin holds, less one final newline."""
    if text != "-":
        return text
    _require(sys.stdin, "stdin is closed: there is no prompt to read")
    return sys.stdin.read().removesuffix("\n")


def read_ids(text):
    """A --tokens: integers, separated by spaces or commas."""
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--tokens takes integers separated by spaces, not {text!r:.99}") from None


def say(text, end="\n"):
    """Print to stderr, at once."""
    with contextlib.suppress(OSError):  # a stderr that is full: there is nowhere to say so
        if sys.stderr:  # None: it is closed, and print would take stdout
            print(text, end=end, file=sys.stderr, flush=True)


@dataclass
class Session:
    """One run of the command line: what answers every prompt alike."""

    w: Mapping
    cfg: Config
    text: Text | None
    stop: set
    sampling: Sampling
    max_tokens: int
    speculate: bool

    def make(self, prompts, cache=None):
        """Generate, printing the first sequence as it grows and the others after it, then the line of statistics, even
        when interrupted. -> the tokens of each."""
        check_prompts(prompts, self.cfg, self.max_tokens)
        stats, made, show = Stats(), [[] for _ in prompts], self.printer(len(prompts))
        try:
            for b, token in generate(prompts, self.w, self.cfg, self.max_tokens, self.sampling, self.stop,
                                     self.speculate, cache, stats, self.progress):  # fmt: skip
                made[b].append(token)
                if b == 0:
                    print(show(0, token, len(made[0]) == 1), end="", flush=True)
        finally:
            print(flush=True)
            for b in range(1, len(prompts)):
                print("".join(show(b, token, i == 0) for i, token in enumerate(made[b])), flush=True)
            say(stats.line())
        return made

    def progress(self, done, tokens):
        """How far a long prompt is, on a line that is taken back at its end; only where someone watches."""
        if tokens > 2 * CHUNK and sys.stderr and sys.stderr.isatty():
            say(f"\rprompt: {done:,} of {tokens:,} tokens" if done < tokens else "\r\033[K", end="")

    def printer(self, rows):
        """show(row, token, first) -> the text that a token completes, never half a character; or the id by itself."""
        if self.text is None:
            return lambda b, token, first: f"{'' if first else ' '}{token}"
        streams = [self.text.new_stream() for _ in range(rows)]
        return lambda b, token, first: "" if token in self.stop else streams[b].step(self.text.tokenizer, token) or ""

    def converse(self, turns):
        """Each of the given turns, then each line of stdin, is answered; the cache goes from turn to turn."""
        messages, cache = [], Cache(1)
        self.text.render([{"role": "user", "content": ""}])  # refuses a checkpoint that cannot chat, first of all
        lines = iter(lambda: say("> ", end="") or sys.stdin.readline(), "") if sys.stdin else ()
        for turn in itertools.chain(map(read_prompt, turns), lines):
            messages.append({"role": "user", "content": turn.strip()})
            made = self.make([self.text.encode_chat(messages)], cache)
            answer = self.text.tokenizer.decode([token for token in made[0] if token not in self.stop])
            messages.append({"role": "assistant", "content": answer})


def run(args):
    """Do what the arguments ask for; returns the exit code."""
    global xp
    if args.inspect:
        cfg = read_config(args.weights)
        there = args.weights.is_dir() and any(args.weights.glob("model.safetensors*"))
        print(inspect(cfg, Checkpoint(args.weights, cfg) if there else None))
        return 0
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.trace is not None:
        check_writable(args.trace)
    _require(args.weights.is_dir(), f"{args.weights}: no such directory; it must hold config.json and the weights")
    xp, _ = choose_device(args.device)
    cfg = read_config(args.weights)
    text = None if args.tokens else Text(args.weights)
    w = Checkpoint(args.weights, cfg, args.dtype, None if args.memory is None else args.memory * 1e9)
    if w.unused:
        say(f"note: {len(w.unused)} tensors have no place in the model and stay unread: {w.unused[0]!r:.99} ...")
    speculate = speculation_pays(cfg) if args.mtp is None else args.mtp
    if args.mtp is None and not speculate and mtp_depth(w, cfg):
        say("note: no speculation, which does not pay on NumPy in a model of this size; --mtp turns it on")
    if args.mtp and not mtp_depth(w, cfg):
        say("note: no speculation, for which this checkpoint lacks the MTP module")
    session = Session(w, cfg, text, end_tokens(args.weights), sampling, args.max_tokens, speculate)
    if args.chat:
        session.converse(args.prompt)
        return 0
    texts = args.prompt or [OPENING]
    prompts = [read_ids(ids) for ids in args.tokens] or [text.encode(read_prompt(t)) for t in texts]
    check_prompts(prompts, cfg, args.max_tokens)
    agree = True
    if args.trace is not None or args.compare is not None:
        theirs = read_npz(args.compare) if args.compare is not None else None
        ours = trace(prompts, w, cfg)
        if args.trace is not None:
            write_npz(args.trace, ours)
        if theirs is not None:
            agree, verdict = compare(ours, theirs, mistakes=lambda name: known_mistakes(name, ours, prompts, w, cfg))
            say(f"{args.compare}: {verdict}")
    asked = args.prompt or args.tokens
    if not asked:
        print(OPENING, end="", flush=True)
    session.make(prompts)
    if not asked:
        say(WHAT_ELSE)
    return 0 if agree else 1


def main(argv=None):
    """The command line. Exit codes: 0 done, 1 a compared trace departs, 2 refused in one line, 130 interrupted."""
    try:
        for stream, settings in (
            (sys.stdin, {"encoding": "utf-8", "errors": "surrogateescape"}),  # what is not UTF-8 is refused later
            (sys.stdout, {"errors": "replace"}),  # a terminal that cannot show a character shows "?"
            (sys.stderr, {"errors": "replace"}),
        ):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(**settings)
        return run(parse_arguments(argv))
    except InputError as e:
        say(f"deepseek_v3.py: {e}")
        return 2
    except KeyboardInterrupt:
        return 130
    except MemoryError as e:
        say(f"deepseek_v3.py: out of memory: {_first_line(e)}; a smaller --memory, batch or prompt may fit")
        return 2
    except OSError as e:  # stdout: its reader has gone, as in `| head -1`, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is flushed there at the exit
        if isinstance(e, BrokenPipeError):
            return 0
        say(f"deepseek_v3.py: {e}")
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, as Ctrl-C does: no half-written file is left
    sys.exit(main())
