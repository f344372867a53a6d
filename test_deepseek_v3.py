"""The promises of deepseek_v3.py, as tests: absorption and cache equivalence first, then every other property.

    pytest                  the whole, some minutes on two cores
    pytest -m width -s      a checkpoint of the release's widths, 16 GB on disk, in 6 GB of memory
    pytest -m gpu -s        on an NVIDIA GPU: parity, the story, speed

Tests without a profile of their own try 25 examples; HYPOTHESIS_PROFILE=unshrunk repeats the same ones.
"""

import cmath
import contextlib
import doctest
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import tracemalloc
import types
import warnings
from collections import Counter
from dataclasses import asdict, fields, replace
from decimal import Decimal
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import tokenizers
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import deepseek_v3 as dsv3

HERE = Path(dsv3.__file__).resolve().parent
WEIGHTS = HERE / "weights"
settings.register_profile("default", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
unshrunk = {"derandomize": True, "database": None, "phases": [Phase.explicit, Phase.generate]}
settings.register_profile("unshrunk", settings.get_profile("default"), **unshrunk)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@st.composite
def configs(draw, mtp=(0, 2)):
    """Configurations of every structure: with and without compressed queries, groups, shared experts, YaRN, ties, of
    DeepSeek-V3 and V2. mtp: the least and the greatest number of MTP modules."""

    def upto(most, least=1):
        return draw(st.integers(least, most))

    def among(*values):
        return draw(st.sampled_from(values))

    groups, per_group, layers = upto(4), upto(4, 2), upto(3)
    kept, v3 = upto(groups), among(True, True, False)
    scaling = dsv3.Yarn(
        factor=among(1.0, 4.0, 40.0), original_max_position_embeddings=among(8, 4096), truncate=among(True, False),
        mscale=among(None, 0.707, 1.0), mscale_all_dim=among(None, 0.0, 0.707, 1.0),
    )  # fmt: skip
    return dsv3.Config(
        vocab_size=upto(30, 5), hidden_size=upto(20, 4), num_hidden_layers=layers, num_attention_heads=upto(4),
        q_lora_rank=among(None, 3, 5, 9), kv_lora_rank=upto(9, 2), qk_nope_head_dim=upto(9),
        qk_rope_head_dim=2 * upto(4), v_head_dim=upto(9), attention_bias=among(True, False),
        intermediate_size=upto(12, 3), first_k_dense_replace=among(0, 0, 1, layers + 1),
        moe_intermediate_size=upto(6, 2), n_shared_experts=upto(2, 0), n_routed_experts=groups * per_group,
        num_experts_per_tok=upto(kept * per_group), scoring_func="sigmoid" if v3 else "softmax",
        n_group=groups, topk_group=kept,
        topk_method="noaux_tc" if v3 else among("greedy", "group_limited_greedy"),
        norm_topk_prob=v3 and among(True, False), routed_scaling_factor=among(1.0, 2.5),
        rms_norm_eps=among(1e-6, 1e-2), rope_theta=among(100.0, 1e4, 5e4), rope_scaling=among(None, scaling),
        rope_interleave=among(True, False), max_position_embeddings=512, tie_word_embeddings=among(True, False),
        num_nextn_predict_layers=upto(mtp[1], mtp[0]),
    )  # fmt: skip


seeds = st.integers(0, 2**32 - 1)
SMALL = dsv3.Config(  # every letter of the key of axes has a size of its own
    vocab_size=31, hidden_size=22, num_hidden_layers=3, num_attention_heads=3, q_lora_rank=13, kv_lora_rank=10,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5, intermediate_size=17, first_k_dense_replace=1,
    moe_intermediate_size=9, n_routed_experts=12, num_experts_per_tok=6, n_group=4, topk_group=2,
    rope_scaling=dsv3.Yarn(mscale=1.0, mscale_all_dim=1.0), max_position_embeddings=512, num_nextn_predict_layers=2,
)  # fmt: skip


def make_weights(cfg, seed=0, dtype=np.float64):
    """Random weights of a size at which every part of the model matters."""
    rng, w = np.random.default_rng(seed), {}
    for name, shape in sorted(dsv3.tensor_shapes(cfg).items()):
        x = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif name.endswith(("e_score_correction_bias", ".bias")):
            x = 0.1 * x
        elif len(shape) == 2 and "embed_tokens" not in name:
            x = x * 1.5 / math.sqrt(shape[1])
        w[name] = x.astype(dtype)
    return w


def make_tokens(cfg, seed, *shape):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape)


def assert_close(got, expected, tolerance=1e-12):
    """Equal to `tolerance`, relative to the largest expected value (at least 1), of one shape, and finite."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.all(np.isfinite(got)) and np.all(np.isfinite(expected))
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    assert float(np.max(np.abs(got - expected), initial=0)) <= tolerance * scale


def generated(prompts, w, cfg, n, *args, **given):
    """What `generate` makes of each prompt."""
    rows = [[] for _ in prompts]
    for b, token in dsv3.generate(prompts, w, cfg, n, *args, **given):
        rows[b].append(token)
    return rows


def config_json(cfg):
    """The keys of a config.json that parse_config reads as cfg."""
    keys = asdict(cfg) | {"model_type": "deepseek_v3" if cfg.topk_method == "noaux_tc" else "deepseek_v2"}
    if cfg.rope_scaling:
        keys["rope_scaling"] = {"type": "yarn"} | asdict(cfg.rope_scaling)
    return keys


def write_checkpoint(directory, cfg, w, shards=1, dtype=np.float32):
    """A checkpoint in the Hugging Face layout: config.json; one file, or several and their index. dtype: of the
    tensors, a NumPy one or ml_dtypes.bfloat16."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(cfg)))
    stored = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in w.items()}
    if shards == 1:
        save_file(stored, directory / "model.safetensors")
        return directory
    names = sorted(stored)
    files = {f"model-{n + 1:05}-of-{shards:05}.safetensors": names[n::shards] for n in range(shards)}
    for file, held in files.items():
        save_file({name: stored[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


# ---- The equations once more, for one token, one head, one expert at a time ------------------------------------------
# They judge the page and share neither code nor form with it: loops over vectors, angles as complex numbers.


def plain_norm(x, weight, eps):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * weight


def plain_linear(x, w, name):
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)


def plain_mlp(x, w, name):
    gate, up = (plain_linear(x, w, f"{name}.{part}_proj") for part in ("gate", "up"))
    hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    return plain_linear(np.array(hidden), w, f"{name}.down_proj")


def plain_m(factor, mscale):
    return 1 + 0.1 * (mscale or 0) * math.log(factor)


def plain_frequency(j, cfg):
    """Radians per position of pair j: YaRN's ramp (arXiv:2309.00071) within the bounds of DeepSeek's code."""
    R, yarn, freq, ends = cfg.qk_rope_head_dim, cfg.rope_scaling, cfg.rope_theta ** (-2 * j / cfg.qk_rope_head_dim), []
    if yarn is None:
        return freq
    for beta in (yarn.beta_fast, yarn.beta_slow):
        length = yarn.original_max_position_embeddings / (2 * math.pi * beta)
        ends.append(R * math.log(length) / (2 * math.log(cfg.rope_theta)))
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if yarn.truncate else ends
    low, high = max(low, 0), min(high, R - 1)
    slowed = min(max((j - low) / (high - low if high != low else 0.001), 0), 1)
    return freq * (1 - slowed) + freq / yarn.factor * slowed


def plain_rope(x, position, cfg):
    """Pair j, as a complex number, times e^(i angle), and YaRN's magnitude."""
    yarn, magnitude, y = cfg.rope_scaling, 1.0, np.zeros(len(x))
    if yarn:
        m, all_dim = yarn.mscale, yarn.mscale_all_dim
        magnitude = plain_m(yarn.factor, m if m and all_dim else 1) / plain_m(yarn.factor, m and all_dim)
    for j in range(len(x) // 2):
        a, b = (2 * j, 2 * j + 1) if cfg.rope_interleave else (j, j + len(x) // 2)
        z = magnitude * complex(x[a], x[b]) * cmath.exp(1j * position * plain_frequency(j, cfg))
        y[a], y[b] = z.real, z.imag
    return y


def plain_scale(cfg):
    m = plain_m(cfg.rope_scaling.factor, cfg.rope_scaling.mscale_all_dim) if cfg.rope_scaling else 1
    return m * m / math.sqrt(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)


def plain_head(q, keys, values, scale):
    """Eq. (10), one query of one head: the mean of the values, weighted by e^score."""
    scores = [scale * sum(q * k) for k in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(e * v for e, v in zip(weights, values, strict=True)) / sum(weights)


def plain_mla(x, w, name, cfg):
    """Eqs. (1)-(11) -> what attention adds to each token."""
    N, V, C, out, latents, ropes = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank, [], [], []
    size = N + cfg.qk_rope_head_dim
    for t, x_t in enumerate(x):
        kv = plain_linear(x_t, w, f"{name}.kv_a_proj_with_mqa")
        latents.append(plain_norm(kv[:C], w[f"{name}.kv_a_layernorm.weight"], 1e-6))
        ropes.append(plain_rope(kv[C:], t, cfg))
        c_q, up_q = x_t, "q_proj"
        if cfg.q_lora_rank:
            c_q, up_q = plain_linear(x_t, w, f"{name}.q_a_proj"), "q_b_proj"
            c_q = plain_norm(c_q, w[f"{name}.q_a_layernorm.weight"], 1e-6)
        q, heads = plain_linear(c_q, w, f"{name}.{up_q}"), []
        for h in range(cfg.num_attention_heads):
            up = w[f"{name}.kv_b_proj.weight"][h * (N + V) :]
            w_uk, w_uv = up[:N], up[N : N + V]
            nope, rope = q[h * size :][:N], plain_rope(q[h * size :][N:size], t, cfg)
            keys = [np.array([*(w_uk @ c), *k_rope]) for c, k_rope in zip(latents, ropes, strict=True)]
            heads.append(plain_head(np.array([*nope, *rope]), keys, [w_uv @ c for c in latents], plain_scale(cfg)))
        out.append(plain_linear(np.concatenate(heads), w, f"{name}.o_proj"))
    return out


def plain_route(x, w, name, cfg):
    """Eqs. (13)-(16) with groups, for one token -> {expert: gate}, best first. A group's rank: its best two together,
    its best (DeepSeek-V2), or none at all (V2-Lite)."""
    e_to = [math.exp(float(row @ x)) for row in w[f"{name}.gate.weight"]]
    score = [e / (1 + e) if cfg.scoring_func == "sigmoid" else e / sum(e_to) for e in e_to]
    biased = list(score + w.get(f"{name}.gate.e_score_correction_bias", np.zeros(len(score))))
    count = {"noaux_tc": 2, "group_limited_greedy": 1, "greedy": 0}[cfg.topk_method]
    size = len(score) // cfg.n_group
    rank = [sum(sorted(biased[g * size : (g + 1) * size])[-count:]) if count else 0 for g in range(cfg.n_group)]
    kept = sorted(range(cfg.n_group), key=lambda g: (-rank[g], g))[: cfg.topk_group if count else None]
    candidates = [e for e in range(len(score)) if e // size in kept]
    chosen = sorted(candidates, key=lambda e: (-biased[e], e))[: cfg.num_experts_per_tok]
    total = sum(score[e] for e in chosen) if cfg.norm_topk_prob else 1
    return {e: score[e] / total * cfg.routed_scaling_factor for e in chosen}


def plain_moe(x, w, name, cfg):
    """Eq. (12) without its residual."""
    y = sum(gate * plain_mlp(x, w, f"{name}.experts.{e}") for e, gate in plain_route(x, w, name, cfg).items())
    return y + plain_mlp(x, w, f"{name}.shared_experts") if cfg.n_shared_experts else y


def plain_block(x, w, layer, cfg):
    name, eps = f"model.layers.{layer}", cfg.rms_norm_eps
    normed = [plain_norm(x_t, w[f"{name}.input_layernorm.weight"], eps) for x_t in x]
    x = [x_t + y for x_t, y in zip(x, plain_mla(normed, w, f"{name}.self_attn", cfg), strict=True)]
    normed = [plain_norm(x_t, w[f"{name}.post_attention_layernorm.weight"], eps) for x_t in x]
    if layer < min(cfg.first_k_dense_replace, cfg.num_hidden_layers):
        return [x_t + plain_mlp(y, w, f"{name}.mlp") for x_t, y in zip(x, normed, strict=True)]
    return [x_t + plain_moe(y, w, f"{name}.mlp", cfg) for x_t, y in zip(x, normed, strict=True)]


def plain_model(tokens, w, cfg):
    """The states of one sequence: h^0, then h^1, ... of the MTP modules, T - k of module k."""
    embedding, eps = w["model.embed_tokens.weight"], cfg.rms_norm_eps
    x = [embedding[token] for token in tokens]
    for layer in range(cfg.num_hidden_layers):
        x = plain_block(x, w, layer, cfg)
    states = [[plain_norm(x_t, w["model.norm.weight"], eps) for x_t in x]]
    for k in range(1, cfg.num_nextn_predict_layers + 1):
        layer, x = cfg.num_hidden_layers + k - 1, []
        name = f"model.layers.{layer}"
        for h, token in zip(states[-1], tokens[k:], strict=False):  # eq. (21): the state at i, the token at i + k
            embedded = plain_norm(embedding[token], w[f"{name}.enorm.weight"], eps)
            joined = np.concatenate([embedded, plain_norm(h, w[f"{name}.hnorm.weight"], eps)])
            x.append(plain_linear(joined, w, f"{name}.eh_proj"))
        x = plain_block(x, w, layer, cfg)
        states.append([plain_norm(x_t, w[f"{name}.shared_head.norm.weight"], eps) for x_t in x])
    return states


def plain_logits(states, w, cfg):
    matrix = w["model.embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"]
    return np.array([matrix @ h for h in states]).reshape(-1, cfg.vocab_size)


# ---- 1. Absorption: what one query meets is the same, whether keys are expanded or not -------------------------------


def latent_inputs(cfg, seed, T, past, dtype=np.float64):
    """What the forms of attention take. Row 0 has seen `past` tokens before its T, row 1 none."""
    rng, S, heads = np.random.default_rng(seed), past + T, cfg.num_attention_heads
    sizes = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    q_nope, q_rope = (rng.standard_normal((2, T, heads, size)).astype(dtype) for size in sizes)
    kv = rng.standard_normal((2, S, cfg.kv_lora_rank + cfg.qk_rope_head_dim)).astype(dtype)
    up = rng.standard_normal((heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank))
    w = {"a.kv_b_proj.weight": (up / math.sqrt(cfg.kv_lora_rank)).astype(dtype)}
    visible = np.arange(S) <= np.array([past, 0])[:, None, None] + np.arange(T)[:, None]
    return q_nope, q_rope, kv, w, "a", cfg, visible


TOKENS, PAST = st.integers(1, 5), st.integers(0, 5)


@given(configs(), seeds, TOKENS, PAST)
def test_absorption_equals_naive(cfg, seed, T, past):
    inputs = latent_inputs(cfg, seed, T, past)
    assert_close(dsv3.mla_absorbed(*inputs), dsv3.mla_naive(*inputs))


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float16, 1e-2)])
@given(cfg=configs(), seed=seeds, T=TOKENS, past=PAST)
def test_absorption_equals_naive_when_rounded(cfg, seed, T, past, dtype, tolerance):
    inputs = latent_inputs(cfg, seed, T, past, dtype)
    for form in (dsv3.mla_absorbed, dsv3.mla_computed):
        assert form(*inputs).dtype == dtype
        assert_close(form(*inputs), dsv3.mla_naive(*inputs), tolerance)


@pytest.mark.parametrize("T, past", [(1, 0), (1, 9), (2, 60), (5, 40), (8, 8), (9, 0), (30, 0), (10, 50), (11, 49)])
@pytest.mark.parametrize("C, N", [(11, 7), (3, 20)])
def test_absorption_is_chosen_where_it_multiplies_less(monkeypatch, C, N, T, past):
    """Per head: the sizes of the products of each form. And where expanded keys and values find no room."""
    cfg, S, R, V = replace(SMALL, kv_lora_rank=C, qk_nope_head_dim=N), T + past, 4, 5
    expanded = [(S, C, N + V), (T, N + R, S), (T, S, V)]
    absorbed = [(T, N, C), (T, C + R, S), (T, S, C + R), (T, C, V)]
    fewer = sum(map(math.prod, absorbed)) < sum(map(math.prod, expanded))
    room = 2 * S * 3 * (N + R + V)  # rows, positions, heads, a key and a value
    monkeypatch.setattr(dsv3, "mla_absorbed", lambda *_: "absorbed")
    for limit, absorbs in ((2**29, fewer), (room, fewer), (room - 1, True)):
        monkeypatch.setattr(dsv3, "EXPANDED", limit)
        assert isinstance(dsv3.mla_computed(*latent_inputs(cfg, 0, T, past)), str) == absorbs


# ---- 2. Cache: any pieces, any rows, the same arrays as without ------------------------------------------------------


@st.composite
def steps(draw):
    """For each of some rows and steps: how many of its tokens go in, how many that will be rejected follow them."""
    count = draw(st.integers(1, 5))
    row = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=count, max_size=count)
    return draw(st.lists(row, min_size=1, max_size=3))


@given(configs(), seeds, steps())
def test_cache_any_steps_equal_one_pass_without(cfg, seed, rows):
    """Rows go on by different numbers of tokens, some by none, and rejected tokens are written over by the next."""
    w, B = make_weights(cfg, seed), len(rows)
    text, wrong = make_tokens(cfg, seed, B, 21), make_tokens(cfg, seed + 1, B, 2)
    cache, start, got = dsv3.Cache(B, 30), np.zeros(B, int), [[] for _ in rows]
    for step in zip(*rows, strict=True):
        feed = [[*text[b, start[b] : start[b] + n], *wrong[b, :drafts]] for b, (n, drafts) in enumerate(step)]
        if any(feed):
            h = dsv3.forward(dsv3.pad(feed), w, cfg, cache, start)
            for b, (n, _) in enumerate(step):
                got[b] += list(h[b, :n])
                start[b] += n
    for b, states in enumerate(got):
        expected = dsv3.forward(text[b : b + 1, : start[b]], w, cfg)[0] if states else []
        assert_close(states, expected)


PROMPTS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=7), min_size=1, max_size=3)


@given(configs(), seeds, PROMPTS, st.sampled_from([1, 3, 2, 5, 100]))
def test_cache_every_named_array_in_chunks_and_batches(cfg, seed, prompts, chunk):
    """A batch of prompts of any lengths, in chunks, beside the definition of each prompt by itself."""
    w = make_weights(cfg, seed)
    got, whole = dsv3.trace(prompts, w, cfg, chunk), dsv3.trace(prompts, w, cfg, None)
    assert list(got) == list(whole)
    for n, prompt in enumerate(prompts):
        for name, x in dsv3.trace([prompt], w, cfg, None).items():
            name = f"{n}/{name}" if len(prompts) > 1 else name
            assert_close(got[name], x)
            assert_close(whole[name], x)


@given(configs(), seeds, st.sampled_from([1, 3, 100]))
def test_cache_in_float32(cfg, seed, chunk):
    """With all experts chosen, as which ones are may turn on float32's rounding."""
    cfg = replace(cfg, n_group=1, topk_group=1, num_experts_per_tok=cfg.n_routed_experts)
    w, prompts = make_weights(cfg, seed, np.float32), [make_tokens(cfg, seed, 9).tolist(), [1, 2]]
    for n, prompt in enumerate(prompts):
        got = dsv3.trace(prompts, w, cfg, chunk)[f"{n}/model.norm"]
        assert got.dtype == np.float32
        assert_close(got, dsv3.trace([prompt], w, cfg, None)["model.norm"], 1e-4)


def test_cache_holds_a_latent_and_a_rotated_key_per_token():
    cache = dsv3.Cache(2, 9)
    with dsv3.recording() as named:
        dsv3.forward(np.array([[1, 2, 3, 4], [5, 6, -1, -1]]), make_weights(SMALL), SMALL, cache)
    assert sorted(cache.layers) == [0, 1, 2]
    for layer, entries in cache.layers.items():
        made = [named[f"model.layers.{layer}.self_attn.{part}"] for part in ("kv_latent", "k_rope")]
        assert entries.shape == (2, 9, 10 + 4)
        for b, count in enumerate((4, 2)):  # padding leaves nothing in a cache
            assert np.array_equal(entries[b, :count], np.concatenate(made, axis=-1)[b, :count])
            assert not entries[b, count:].any()


@pytest.mark.parametrize("dtype, tolerance", [(np.float16, 1e-2), (np.float32, 1e-5)])
@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_cache_what_is_not_finite_behind_a_row(dtype, tolerance, poison):
    """A token that overflows is a rejected draft, and what padding reads. Behind a short row its entry would stand
    where a longer row has some, and 0 x inf is NaN."""
    w, results = make_weights(SMALL, 0, dtype), []
    for overflow in (0, poison):
        w["model.embed_tokens.weight"][-1] = overflow
        cache = dsv3.Cache(2, 12)
        with np.errstate(invalid="ignore"):  # in what the overflowing token itself comes to
            h = dsv3.forward(np.array([[1, 2, 3, 4, 5], [6, 7, -1, -1, -1]]), w, SMALL, cache)
            dsv3.forward(np.array([[30], [30]]), w, SMALL, cache, np.array([5, 2]))
            g = dsv3.forward(np.array([[1, 2], [3, -1]]), w, SMALL, cache, np.array([5, 2]))
        results.append(np.concatenate([h[0], h[1, :2], g[0], g[1, :1]]))
    assert_close(results[1], results[0], tolerance)


# ---- 3. Dispatch, products, attention in pieces ----------------------------------------------------------------------


def moe_inputs(cfg, seed):
    cfg = replace(cfg, first_k_dense_replace=0)
    w, name = make_weights(cfg, seed), f"model.layers.{cfg.num_hidden_layers - 1}.mlp"
    x = np.random.default_rng(seed).standard_normal((2, 4, cfg.hidden_size))
    return x, w, name, *dsv3.route(x, w, name, cfg)


@given(configs(), seeds)
def test_experts_chosen_equal_the_sum_over_all(cfg, seed):
    x, w, name, index, gate = moe_inputs(cfg, seed)
    expected = np.zeros(x.shape)
    for b, t, k in np.ndindex(index.shape):
        expected[b, t] += gate[b, t, k] * plain_mlp(x[b, t], w, f"{name}.experts.{index[b, t, k]}")
    assert_close(dsv3.moe_all(x, w, name, index, gate, cfg), expected)
    for each in (0, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dsv3, "EACH", each)
            assert_close(dsv3.moe_computed(x, w, name, index, gate, cfg), expected)
    for cache in (None, dsv3.Cache(2, 4)):
        assert_close(dsv3.moe(x, w, name, cfg, cache), [[plain_moe(x_t, w, name, cfg) for x_t in row] for row in x])


class Reads(dict):
    """Weights that note which experts are read, or which kinds of stacks."""

    def __getitem__(self, name):
        self.read = getattr(self, "read", set()) | set(re.findall(r"experts\.(\w+)\.", name))
        return super().__getitem__(name)


@pytest.mark.parametrize("each", [0, 1])
def test_experts_not_chosen_are_not_read(monkeypatch, each):
    x, w, name, index, gate = moe_inputs(SMALL, 0)
    w = Reads(w)
    monkeypatch.setattr(dsv3, "EACH", each)
    dsv3.moe_computed(x[:1, :1], w, name, index[:1, :1], gate[:1, :1], SMALL)
    assert w.read == set(map(str, index[0, 0]))


@pytest.mark.parametrize("rows, shape", [
    *itertools.product([1, 2, 4, 5], [(3, 2), (700, 200), (150, 4000), (2, 70_000), (2, 2, 450, 300), (2, 1, 9, 4)]),
    *itertools.product([192, 193], [(700, 200), (2, 2, 450, 300)])])  # fmt: skip
def test_products_of_every_form_are_one(rows, shape):
    """One row, a few, many, over matrices small and large, one pair or a batch of them."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal(shape), rng.standard_normal((*shape[:-2], rows, shape[-1]))
    expected = np.einsum("...mx,...yx->...my", x, w)
    assert_close(dsv3.product(x, w), expected)
    assert_close(dsv3.product(x.astype(np.float32), w.astype(np.float32)), expected, 1e-6 * math.sqrt(shape[-1]))


@given(seeds, st.lists(st.integers(1, 3), max_size=3), st.integers(1, 7), st.integers(1, 7))
def test_products_with_a_matrix_are_those_with_its_array(seed, shape, X, Y):
    rng = np.random.default_rng(seed)
    array, x, ids = rng.standard_normal((Y, X)), rng.standard_normal((*shape, X)), rng.integers(0, Y, shape)
    matrix = dsv3.Matrix(array)
    assert_close(x @ matrix.T, x @ array.T)
    assert (matrix.shape, matrix.dtype) == (array.shape, array.dtype)
    assert np.array_equal(matrix[ids], array[ids]) and np.array_equal(matrix.reshape(-1, 1, X), array[:, None])


def attention_inputs(seed, H, J, T, past):
    """Queries, keys, values of 2 rows; row 1 has seen a token less, so its last key is hidden from all of it."""
    rng, S = np.random.default_rng(seed), T + past
    shapes = (2, T, H, 5), (2, S, J, 5), (2, S, J, 3)
    start = np.array([past, max(past - 1, 0)])[:, None, None]
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    return q, k, v, np.arange(S) <= start + np.arange(T)[:, None]


HEADS = st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3), (6, 2), (1, 1)])  # multi-head, grouped-query, multi-query


@given(seeds, HEADS, TOKENS, PAST, st.integers(1, 300), st.integers(1, 4))
def test_attention_in_pieces_is_the_definition(seed, heads, T, past, scores, queries):
    inputs = attention_inputs(seed, *heads, T, past)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3, "SCORES", scores)
        patch.setattr(dsv3, "QUERIES", queries)
        assert_close(dsv3.attend(*inputs, 0.7), dsv3.attention(*inputs, 0.7))


def test_attention_in_pieces_is_wide_and_rounded_once():
    q, k, v, visible = (x.astype(np.float16) if x.dtype != bool else x for x in attention_inputs(0, 6, 3, 5, 4))
    wide = dsv3.attend(*(x.astype(np.float32) for x in (q, k, v)), visible, 0.7)
    assert np.array_equal(dsv3.attend(q, k, v, visible, 0.7), wide.astype(np.float16))


def test_attention_in_pieces_does_not_hold_all_scores():
    inputs = attention_inputs(0, 8, 1, 1024, 0)
    tracemalloc.start()
    dsv3.attend(*inputs, 0.7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 1024 * 1024 * 8 / 2


# ---- 4. Components ---------------------------------------------------------------------------------------------------


@given(configs(), seeds, st.sampled_from([None, 1, 3, 100]))
def test_model_is_the_equations(cfg, seed, chunk):
    """States and logits of the main model and the MTP modules; in chunks too."""
    w, tokens = make_weights(cfg, seed), make_tokens(cfg, seed, 6).tolist()
    named, states = dsv3.trace([tokens], w, cfg, chunk), plain_model(tokens, w, cfg)
    names = [f"model.layers.{cfg.num_hidden_layers + k}.shared_head" for k in range(cfg.num_nextn_predict_layers)]
    assert_close(named["model.norm"], states[0])
    for name, h in zip(["lm_head", *names], states, strict=True):
        assert_close(named[name], plain_logits(h, w, cfg))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_model_computes_in_the_dtype_of_its_weights(dtype, chunk):
    """Except for the router, which is in float32 or better."""
    for name, x in dsv3.trace([[1, 2, 3]], make_weights(SMALL, dtype=dtype), SMALL, chunk).items():
        wide = np.promote_types(dtype, np.float32) if ".gate." in name else dtype
        assert x.dtype == (np.int64 if name.endswith("indices") else wide), name


@given(configs(), seeds, st.integers(1, 7))
def test_model_future_never_changes_the_past(cfg, seed, t):
    w, token_BT = make_weights(cfg, seed), make_tokens(cfg, seed, 1, 8)
    changed = token_BT.copy()
    changed[:, t:] = (changed[:, t:] + 1) % cfg.vocab_size
    h, g = dsv3.forward(token_BT, w, cfg), dsv3.forward(changed, w, cfg)
    assert_close(h[:, :t], g[:, :t])
    for k in range(1, cfg.num_nextn_predict_layers + 1):  # state i of module k has seen tokens up to i + k
        h = dsv3.mtp(k, h[:, : 8 - k], token_BT[:, k:], w, cfg)
        g = dsv3.mtp(k, g[:, : 8 - k], changed[:, k:], w, cfg)
        assert_close(h[:, : max(0, t - k)], g[:, : max(0, t - k)])
        assert t < k or np.abs(h[:, t - k] - g[:, t - k]).max() > 1e-9


@given(configs(), seeds, st.sampled_from([40, 500]))
def test_model_positions_matter_by_their_differences(cfg, seed, shift):
    """The same tokens `shift` positions later, where no key before them is seen."""
    w, token_BT = make_weights(cfg, seed), make_tokens(cfg, seed, 1, 5)
    x_BTD = w["model.embed_tokens.weight"][token_BT]
    first, later = (dsv3.positions(token_BT, np.array([start]), cfg, np.float64) for start in (0, shift))
    later = later._replace(visible_BTS=later.visible_BTS[..., shift:])
    assert_close(dsv3.mla(x_BTD, w, 0, cfg, later, None), dsv3.mla(x_BTD, w, 0, cfg, first, None))


def test_model_records_nothing_outside_the_block():
    with pytest.raises(ZeroDivisionError), dsv3.recording():
        raise ZeroDivisionError
    dsv3.record("a", np.zeros((1, 1)))
    with dsv3.recording() as named:
        dsv3.record("b", np.ones((1, 2)))
        dsv3.record("b", np.zeros((1, 1)))
    dsv3.record("c", np.zeros((1, 1)))
    assert {name: x.tolist() for name, x in named.items()} == {"b": [[1, 1, 0]]}


@given(seeds, HEADS, TOKENS, PAST)
def test_attention_is_mha_gqa_or_mqa_by_its_key_heads(seed, heads, T, past):
    (H, J), (q, k, v, visible) = heads, attention_inputs(seed, *heads, T, past)
    got = dsv3.attention(q, k, v, visible, 0.7)
    for b, t, h in np.ndindex(2, T, H):
        seen, j = visible[b, t], h // (H // J)
        assert_close(got[b, t, h], plain_head(q[b, t, h], k[b, seen, j], v[b, seen, j], 0.7))


def test_norm_is_wide_and_rounded_once_before_the_weight():
    x, weight = np.array([300.0, -0.5], np.float16), np.array([1.0009765625, 3.0], np.float16)
    normed = x.astype(np.float32) / np.sqrt(np.float32(300.0**2 + 0.25) / 2 + np.float32(1e-6))  # overflows float16
    got = dsv3.rms_norm(x, weight, 1e-6)
    assert got.dtype == np.float16 and np.array_equal(got, normed.astype(np.float16) * weight)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_softmax_sigmoid_and_silu_never_overflow(dtype):
    extreme = np.array([-1e4, -100, -1, 0, 1, 100, 1e4], dtype)
    with np.errstate(all="raise", under="ignore"):
        y, z, p = dsv3.sigmoid(extreme), dsv3.silu(extreme), dsv3.softmax(extreme)
        even = dsv3.softmax(np.zeros(70000, dtype))  # their sum overflows float16
    exact = [1 / (1 + math.exp(-float(v))) if v > -700 else 0.0 for v in extreme]
    assert y.dtype == p.dtype == dtype and np.allclose(y, exact, rtol=0, atol=4 * np.finfo(dtype).eps)
    assert p[-1] == 1 and np.all(even == dtype(1 / 70000))
    assert z.dtype == dtype and np.allclose(z, extreme * exact, rtol=4 * np.finfo(dtype).eps, atol=1e-40)
    x = np.linspace(-9, 9, 300).astype(dtype)
    for function in (dsv3.sigmoid, dsv3.silu, dsv3.softmax):  # computed wide, rounded once
        assert np.array_equal(function(x), function(dsv3.wide(x)).astype(dtype))


def test_rope_phases_are_exact_at_the_last_position():
    """Angles of up to 163,839, reduced with pi to 60 digits; in float32 they are off by 5e-3."""
    pos = dsv3.positions(np.array([[0]]), [163839], dsv3.Config(rope_scaling=None), np.float64)
    turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
    angles = [float(163839 * Decimal(10000) ** (Decimal(-2 * j) / 64) % turn) for j in range(32)]
    assert_close(pos.rotation_BTP[0, 0].real, np.cos(angles), 1e-10)
    assert_close(pos.rotation_BTP[0, 0].imag, np.sin(angles), 1e-10)


def test_rope_of_what_a_large_matrix_gives():
    """Few rows times a large matrix are computed as (W x^T)^T; the pairs must lie side by side all the same."""
    cfg, rng = replace(SMALL, hidden_size=700, kv_lora_rank=196), np.random.default_rng(0)
    w = {"a.kv_a_proj_with_mqa.weight": rng.standard_normal((200, 700)), "a.kv_a_layernorm.weight": np.ones(196)}
    x, pos = rng.standard_normal((1, 6, 700)), dsv3.positions(np.ones((1, 6), int), None, cfg, np.float64)
    computed = {name: dsv3.Matrix(tensor) if tensor.ndim == 2 else tensor for name, tensor in w.items()}
    assert_close(dsv3.mla_latent(x, computed, "a", cfg, pos), dsv3.mla_latent(x, w, "a", cfg, pos))


def test_yarn_of_the_671b_model_in_numbers():
    """Frequencies of the ramp (factor 40, original context 4096), and mscale squared in the scale."""
    cfg = dsv3.Config()
    freq, plain = dsv3.rope_frequencies(cfg), dsv3.rope_frequencies(replace(cfg, rope_scaling=None))
    assert np.array_equal(freq[:11], plain[:11]) and np.allclose(freq[23:], plain[23:] / 40, rtol=1e-15)
    assert np.allclose(freq[[10, 11, 16, 22]], [0.05623413, 0.03900693, 0.0055, 1.7782794e-4], rtol=1e-6)
    assert math.isclose(dsv3.softmax_scale(cfg), 0.1352338, rel_tol=1e-6) and dsv3.rope_magnitude(cfg) == 1
    k2 = replace(cfg, rope_theta=5e4, rope_scaling=replace(cfg.rope_scaling, factor=32.0, beta_fast=1.0))
    assert math.isclose(dsv3.softmax_scale(k2), 0.1308608, rel_tol=1e-6)
    ramp = dsv3.rope_frequencies(k2) / dsv3.rope_frequencies(replace(k2, rope_scaling=None))
    assert np.allclose(ramp[[19, 20]], [1, 1 / 32])


@settings(max_examples=200)
@given(st.integers(1, 40), st.floats(1e2, 1e6), st.floats(1, 64), st.integers(8, 2**17), st.floats(1, 40), st.data())
def test_yarn_frequencies_pair_by_pair(pairs, theta, factor, original, beta, data):
    truncate = data.draw(st.booleans())
    yarn = dsv3.Yarn(factor, original, beta, beta / 8, truncate=truncate)
    cfg = replace(SMALL, qk_rope_head_dim=2 * pairs, rope_theta=theta, rope_scaling=yarn)
    assert np.allclose(dsv3.rope_frequencies(cfg), [plain_frequency(j, cfg) for j in range(pairs)], rtol=1e-12, atol=0)


def test_yarn_magnitude_follows_the_mscales():
    def magnitude(factor=40.0, **given):
        return dsv3.rope_magnitude(replace(SMALL, rope_scaling=dsv3.Yarn(factor=factor, **given)))

    m = 1.3688879454113936  # 0.1 ln(40) + 1
    assert magnitude(mscale=1.0, mscale_all_dim=1.0) == magnitude(1.0, mscale=0.5) == 1
    assert magnitude(mscale=1.0, mscale_all_dim=0.0) == magnitude(mscale=0.5) == magnitude() == pytest.approx(m)
    assert magnitude(mscale=0.5, mscale_all_dim=1.0) == pytest.approx((m + 1) / 2 / m)


def check_routing(x, w, cfg):
    index, gate = dsv3.route(x, w, "mlp", cfg)
    for b, t in np.ndindex(x.shape[:2]):
        expected = plain_route(x[b, t], w, "mlp", cfg)
        assert index[b, t].tolist() == list(expected)
        assert_close(gate[b, t], list(expected.values()))


@given(configs(), seeds, st.sampled_from([0.0, 3.0, -5.0]))
def test_routing_is_the_equations_token_by_token(cfg, seed, shift):
    """With biases about 0, and so negative that every biased affinity is."""
    rng = np.random.default_rng(seed)
    w = {"mlp.gate.weight": rng.standard_normal((cfg.n_routed_experts, cfg.hidden_size))}
    if cfg.topk_method == "noaux_tc":
        w["mlp.gate.e_score_correction_bias"] = 0.2 * rng.standard_normal(cfg.n_routed_experts) + shift
    check_routing(rng.standard_normal((2, 3, cfg.hidden_size)), w, cfg)


@given(configs(), st.lists(st.sampled_from([0.0, 0.25, -0.5]), min_size=16, max_size=16))
def test_routing_ties_of_experts_and_of_groups(cfg, values):
    """Equal affinities and few biases: the lowest index wins."""
    w = {"mlp.gate.weight": np.zeros((cfg.n_routed_experts, cfg.hidden_size))}
    if cfg.topk_method == "noaux_tc":
        w["mlp.gate.e_score_correction_bias"] = np.array(values[: cfg.n_routed_experts])
    check_routing(np.ones((1, 1, cfg.hidden_size)), w, cfg)


def test_routing_is_wide_in_half_precision():
    name, x = "model.layers.1.mlp", np.random.default_rng(0).standard_normal((2, 9, 22)).astype(np.float16)
    half = make_weights(SMALL, dtype=np.float16)
    wide = {name: tensor.astype(np.float32) for name, tensor in half.items()}
    got, expected = dsv3.route(x, half, name, SMALL), dsv3.route(x.astype(np.float32), wide, name, SMALL)
    assert np.array_equal(got[0], expected[0]) and np.array_equal(got[1], expected[1]) and got[1].dtype == np.float32


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.sampled_from([np.float32, np.float64]))
def test_balance_bias_update_and_max_violation_as_printed(loads, dtype):
    assume(sum(loads))
    mean, bias = sum(loads) / len(loads), np.linspace(-1, 1, len(loads)).astype(dtype)
    got = dsv3.update_bias(bias, np.array(loads), 0.125)
    steps = [0.125 if load < mean else -0.125 if load > mean else 0 for load in loads]
    assert got.dtype == dtype and np.array_equal(got, bias + np.array(steps, dtype))
    assert_close(dsv3.max_violation(np.array(loads)), (max(loads) - mean) / mean)


@given(configs(), seeds)
def test_balance_loss_as_printed(cfg, seed):
    """Eqs. (17)-(20), sequence by sequence; even affinities give exactly 1."""
    K, E, loss = cfg.num_experts_per_tok, cfg.n_routed_experts, 0.0
    score = np.random.default_rng(seed).random((3, 5, E))
    for sequence in score:
        chosen = [sorted(range(E), key=lambda i, s=s: (-s[i], i))[:K] for s in sequence]
        for e in range(E):
            f = E / (K * 5) * sum(e in each for each in chosen)
            loss += f * sum(s[e] / sum(s) for s in sequence) / 5 / 3
    assert_close(dsv3.balance_loss(score, cfg), loss)
    assert_close(dsv3.balance_loss(np.ones_like(score), cfg), 1.0)


@given(configs(mtp=(0, 3)), seeds)
def test_objective_as_printed(cfg, seed):
    """Eqs. (24), (25) term by term, of the plain equations' states: T - k cross-entropies divided by T; the loads."""
    w, tokens, T = make_weights(cfg, seed), make_tokens(cfg, seed, 2, 8), 7
    total, parts = dsv3.training_objective(w, tokens, cfg)
    losses = np.zeros(1 + cfg.num_nextn_predict_layers)
    for row in tokens.tolist():
        for k, states in enumerate(plain_model(row[:T], w, cfg)):
            for i, logits in enumerate(plain_logits(states, w, cfg)):  # state i of module k predicts token i + k + 1
                losses[k] += (math.log(sum(map(math.exp, logits))) - logits[row[i + k + 1]]) / T / 2
    assert_close([parts["main"], *parts["mtp"]], losses)
    named = [dsv3.trace([row], w, cfg, None) for row in tokens[:, :T].tolist()]
    gates = [name.removesuffix(".scores") for name in named[0] if name.endswith(".scores")]
    balance = sum(dsv3.balance_loss(np.stack([x[f"{gate}.scores"] for x in named]), cfg) for gate in gates)
    assert_close(parts["balance"], balance)
    modules = max(1, cfg.num_nextn_predict_layers)
    assert_close(total, losses[0] + 0.3 * losses[1:].sum() / modules + 1e-4 * balance)
    chosen = {gate: np.concatenate([x[f"{gate}.indices"].ravel() for x in named]) for gate in gates}
    loads = {gate: np.bincount(index, minlength=cfg.n_routed_experts).tolist() for gate, index in chosen.items()}
    assert {gate: load.tolist() for gate, load in parts["load"].items()} == loads


@pytest.mark.parametrize("absent, depth", [((), 2), ((3,), 0), ((4,), 1), ((3, 4), 0)])
def test_mtp_depth_ends_at_the_first_absent_module(absent, depth):
    w = {name: x for name, x in make_weights(SMALL).items() if not any(f"layers.{i}." in name for i in absent)}
    assert dsv3.mtp_depth(w, SMALL) == depth
    assert len([name for name in dsv3.trace([[1, 2, 3]], w, SMALL) if name.endswith("shared_head")]) == depth


CALL = "BTSJMXYZ"  # letters that a call sizes; each has one size within a function


def shapes_that_lie(run, cfg):
    """Run; look at every function of the page as it returns; list what does not fit its suffix. -> (lies, seen)"""
    sizes = [cfg.hidden_size, cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim,
             cfg.kv_lora_rank, cfg.q_lora_rank, cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.n_group,
             cfg.vocab_size, cfg.qk_rope_head_dim // 2, cfg.kv_lora_rank + cfg.qk_rope_head_dim, 1]  # fmt: skip
    fixed = dict(zip("DHNRVCQEKGWPL1", sizes, strict=True))
    lies, seen = [], set()

    def look(frame, event, _):
        if event != "return" or frame.f_code.co_filename != dsv3.__file__:
            return
        sizes = dict(fixed)
        for name, x in list(frame.f_locals.items()):
            suffix = re.fullmatch(r"\w+_([A-Z1]+)", name)
            if suffix and hasattr(x, "shape") and not name.isupper():
                seen.add(suffix[1])
                known = all(letter in fixed or letter in CALL for letter in suffix[1])
                pairs = zip(suffix[1], x.shape, strict=False)
                if not known or len(suffix[1]) != x.ndim or any(sizes.setdefault(a, n) != n for a, n in pairs):
                    lies.append(f"{frame.f_code.co_name}: {name} has shape {x.shape}, {sizes}")

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return lies, seen


def test_names_tell_the_shapes():
    w = make_weights(SMALL)

    def run():
        for chunk in (None, 1, 3):
            dsv3.trace([[1, 2, 3, 4, 5], [6, 7]], w, SMALL, chunk)
        prompts = [make_tokens(SMALL, 1, 40).tolist(), [3, 4]]
        generated(prompts, w, SMALL, 5, dsv3.Sampling(1.0, top_k=7, top_p=0.9))
        dsv3.training_objective(w, make_tokens(SMALL, 2, 2, 9), SMALL)
        np.ones((2, 22)) @ dsv3.Matrix(w["lm_head.weight"]).T

    lies, seen = shapes_that_lie(run, SMALL)
    assert not lies, "\n".join(lies[:5])
    key = set(re.findall(r"\b[A-Z]\b", dsv3.__doc__)) | {"1"}  # the header explains each letter
    assert len(seen) > 40 and set("".join(seen)) <= key


def test_names_that_lie_about_shapes_are_seen(monkeypatch):
    monkeypatch.setattr(dsv3, "top_k", lambda score, k, honest=dsv3.top_k: honest(score, k + 1))
    lies, _ = shapes_that_lie(lambda: dsv3.trace([[1, 2, 3]], make_weights(SMALL), SMALL, None), SMALL)
    assert any("route: index_BTK" in lie for lie in lies)


def test_jax_runs_the_definitions_in_jit_and_grad(monkeypatch):
    """The objective and its gradient under jax.numpy, against NumPy and its finite differences, all in float64. One
    line differs: jax.numpy always sorts stably and knows no `kind`."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    jax.config.update("jax_enable_x64", True)
    cfg = replace(SMALL, n_routed_experts=8, num_experts_per_tok=3, num_hidden_layers=2, num_nextn_predict_layers=1)
    w, tokens, rng = make_weights(cfg, 5), make_tokens(cfg, 3, 2, 7), np.random.default_rng(0)
    step = {name: 1e-6 * rng.standard_normal(x.shape) * (not name.endswith("correction_bias")) for name, x in w.items()}
    value, ahead, behind = (float(dsv3.training_objective({k: w[k] + sign * step[k] for k in w}, tokens, cfg)[0])
                            for sign in (0, 1, -1))  # fmt: skip
    monkeypatch.setattr(dsv3, "xp", jax.numpy)
    monkeypatch.setattr(dsv3, "top_k", lambda score, k: jax.numpy.argsort(-score, axis=-1)[..., :k])
    objective = jax.jit(jax.value_and_grad(lambda w: dsv3.training_objective(w, tokens, cfg)[0]))
    jax_value, grad = objective(w)
    assert_close(float(jax_value), value)
    slope = sum(float((grad[name] * step[name]).sum()) for name in w)
    assert slope == pytest.approx((ahead - behind) / 2, rel=1e-4)
    for name, g in grad.items():
        if ".experts." not in name:  # an expert that no token chose has none
            assert np.any(g) == (not name.endswith("e_score_correction_bias")), name


# ---- 5. Parity with Hugging Face -------------------------------------------------------------------------------------
# What transformers 5.23.0 computed for the cases of weights/vectors/index.json, and how, is said there.

VECTORS = WEIGHTS / "vectors"
sys.path.insert(0, str(VECTORS))
cases = importlib.import_module("cases")
INDEX = json.loads((VECTORS / "index.json").read_text("utf-8"))
EXPECTED = load_file(VECTORS / "expected.safetensors")


@functools.cache
def case_model(name, dtype):
    """Configuration and weights of a case, in the dtype of the computation."""
    if INDEX[name].get("checkpoint") == "shipped":
        cfg = dsv3.read_config(WEIGHTS)
        return cfg, dsv3.Checkpoint(WEIGHTS, cfg, dtype)
    cfg = dsv3.parse_config(INDEX[name]["config"])
    w = {tensor: cases.weight(INDEX[name], tensor, shape) for tensor, shape in dsv3.tensor_shapes(cfg).items()}
    wide = np.promote_types(dtype, np.float32)  # the router's, as Checkpoint decodes it
    return cfg, {tensor: x.astype(wide if ".mlp.gate." in tensor else dtype) for tensor, x in w.items()}


def named_cases(do, **fields):
    return [name for name, case in INDEX.items() if case["do"] == do and fields.items() <= case.items()]


HALF = named_cases("trace", dtype="float16")
PRECISIONS = [(name, *precision) for name in named_cases("trace") for precision in (
    [(np.float16, 1e-5)] if name in HALF else [(np.float64, 1e-12), (np.float32, 3e-5)])]  # fmt: skip


@pytest.mark.parametrize("chunk", [None, 1, 3, 1024])  # the definition; absorbed; mixed; what the program does
@pytest.mark.parametrize("name, dtype, tolerance", PRECISIONS)
def test_parity_of_named_arrays(name, dtype, tolerance, chunk):
    """Relative to an array's rms; the chosen experts are the same."""
    cfg, w = case_model(name, dtype)
    named = dsv3.trace(INDEX[name]["prompts"], w, cfg, chunk)
    for array in INDEX[name]["arrays"]:
        got, expected = named[array], EXPECTED[f"{name}/{array}"]
        if array.endswith((".gate.indices", ".gate.weights")):  # listed by expert
            order = np.argsort(named[array.replace("weights", "indices")], axis=-1)
            got = np.take_along_axis(got, order, axis=-1)
        rms = math.sqrt(np.mean(expected.astype(np.float64) ** 2))
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= (0 if array.endswith("indices") else tolerance * rms), array


@contextlib.contextmanager
def verdicts():
    """Yields [(a row's random stream, draft, accepted)] of every draft that is verified within this block."""
    seen, verify = [], dsv3.verify

    def watched(p_W, q_W, draft, rng):
        accepted, token = verify(p_W, q_W, draft, rng)
        seen.append((rng, draft, int(accepted)))
        return accepted, token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3, "verify", watched)
        yield seen


GENERATE = [(name, dtype, chunk) for name in named_cases("generate") for dtype in (np.float64, np.float32)
            for chunk in (1, 3, 1024) if "config" in INDEX[name] or (dtype, chunk) == (np.float32, 1024)]  # fmt: skip


@pytest.mark.parametrize("name, dtype, chunk", GENERATE)
def test_parity_of_greedy_tokens_drafts_and_acceptances(name, dtype, chunk):
    (cfg, w), case, prompts = case_model(name, dtype), INDEX[name], INDEX[name]["prompts"]
    tokens = [EXPECTED[f"{name}/{n}/tokens"].tolist() for n in range(len(prompts))]
    assert generated(prompts, w, cfg, case["max_tokens"], speculate=False, chunk=chunk) == tokens
    with verdicts() as seen:
        assert generated(prompts, w, cfg, case["max_tokens"], chunk=chunk) == tokens
    for n, stream in enumerate(dict.fromkeys(rng for rng, *_ in seen) if case["speculate"] else ()):
        drafts, accepted = zip(*((draft, stood) for rng, draft, stood in seen if rng is stream), strict=True)
        assert list(drafts) == EXPECTED[f"{name}/{n}/drafts"].tolist()
        assert list(accepted) == EXPECTED[f"{name}/{n}/accepted"].tolist()


# ---- 6. Generation ---------------------------------------------------------------------------------------------------

GUESSABLE = replace(SMALL, vocab_size=4, num_nextn_predict_layers=1)  # a draft is right one time in four by chance
TINY = replace(GUESSABLE, vocab_size=3, num_hidden_layers=1, first_k_dense_replace=0)


@given(configs(), seeds, PROMPTS, st.integers(0, 10), st.sampled_from([1, 3, 1024]))
def test_generation_greedy_speculation_changes_no_token(cfg, seed, prompts, n, chunk):
    cfg, stats = replace(cfg, vocab_size=5), Counter()
    w = make_weights(cfg, seed)
    plain = generated(prompts, w, cfg, n, speculate=False, chunk=chunk)
    with verdicts() as seen:
        assert generated(prompts, w, cfg, n, stats=stats, chunk=chunk) == plain
    assert (stats["drafted"], stats["accepted"]) == (len(seen), sum(accepted for *_, accepted in seen))
    assert (stats["drafted"] > 0) == (n > 1 and cfg.num_nextn_predict_layers > 0)
    for prompt, row in zip(prompts, plain, strict=True):  # and plain decoding takes the likeliest by the definition
        h = dsv3.forward(np.array([prompt + row]), w, cfg)
        assert np.argmax(dsv3.head(h, w, cfg)[0, len(prompt) - 1 : -1], axis=-1).tolist() == row


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("speculate", [False, True])
def test_generation_caches_are_right_after_every_round(monkeypatch, chunk, speculate):
    """Whenever either module is run, the entries before its tokens are those that the definition makes of the text so
    far: after accepted and after rejected drafts, in a ragged batch, beside rows that are done."""
    cfg, w, prompts = GUESSABLE, make_weights(GUESSABLE, 4), [[1, 2, 3, 0, 1], [3], [2, 0]]
    made, stats, seen = [[], [], []], Counter(), []

    def watched(run, layers):
        def look_and_run(*given):
            cache, start_B = given[-2:]
            for (b, start), layer in itertools.product(enumerate(start_B), layers):
                known = min(start, len(prompts[b] + made[b]) - 1)
                if layer in cache.layers:
                    seen.append((layer, b, cache.layers[layer][b, :known].copy()))
            return run(*given)

        return look_and_run

    monkeypatch.setattr(dsv3, "forward", watched(dsv3.forward, [0, 1, 2]))
    monkeypatch.setattr(dsv3, "mtp", watched(dsv3.mtp, [3]))
    for b, token in dsv3.generate(prompts, w, cfg, 30, dsv3.Sampling(2.0, seed=5), {0}, speculate, stats, chunk):
        made[b].append(token)
    monkeypatch.undo()
    whole = [dsv3.trace([prompt + row], w, cfg, None) for prompt, row in zip(prompts, made, strict=True)]
    for layer, b, entries in seen:
        parts = [whole[b][f"model.layers.{layer}.self_attn.{part}"] for part in ("kv_latent", "k_rope")]
        assert_close(entries, np.concatenate(parts, axis=-1)[: len(entries)])
    assert len(set(map(len, made))) > 1 and {layer for layer, *_ in seen} == set(range(3 + speculate))
    assert not speculate or 2 < stats["accepted"] < stats["drafted"] - 2


def paths(run):
    """Every sequence of choices that `run` can make through dsv3.draw -> (probability, result) of each."""
    waiting = [[]]
    while waiting:
        path, probability, at = waiting.pop(), [1.0], itertools.count()

        def choose(p, rng, path=path, probability=probability, at=at):
            p, i = np.asarray(p, float) / np.sum(p), next(at)
            options = np.flatnonzero(p)
            if i == len(path):
                waiting.extend([*path, int(option)] for option in options[1:])
                path.append(int(options[0]))
            probability[0] *= p[path[i]]
            return path[i]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dsv3, "draw", choose)
            result = run()
        yield probability[0], result


@pytest.mark.parametrize("sampling", [dsv3.Sampling(1.0), dsv3.Sampling(0.5, top_k=2), dsv3.Sampling(2.0, top_p=0.8)])
@pytest.mark.parametrize("prompts, n, stop", [([[1, 2]], 3, ()), ([[1, 2]], 4, {2}), ([[1, 2, 0], [1]], 2, ())])
def test_speculation_has_exactly_the_main_models_distribution(sampling, prompts, n, stop):
    """All ways in which a few tokens of a vocabulary of three can be made, with their probabilities, added up."""
    w, totals = make_weights(TINY, 4), [Counter(), Counter()]
    for total, speculate in zip(totals, (False, True), strict=True):
        for probability, rows in paths(lambda: generated(prompts, w, TINY, n, sampling, stop, speculate)):
            total[str(rows)] += probability
    assert set(totals[0]) == set(totals[1]) and len(totals[0]) > 4
    assert_close([totals[1][text] for text in totals[0]], list(totals[0].values()))
    assert_close(sum(totals[0].values()), 1.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), st.booleans(), st.data())
def test_speculation_verify_makes_p_of_q(weights, nearly, data):
    """From drafts drawn from any q, one that is p but for rounding too, it draws p (arXiv:2211.17192)."""
    p, q = np.array(weights, float).T + 1e-3 * (np.arange(len(weights)) == 0)
    p, q, total = p / p.sum(), q / q.sum(), np.zeros(len(weights))
    if nearly:
        ulps = data.draw(st.lists(st.integers(-2, 2), min_size=len(p), max_size=len(p)))
        q = np.array([x if x in (0, 1) else x + n * math.ulp(x) for x, n in zip(p, ulps, strict=True)])
    for draft in np.flatnonzero(q):
        for probability, (accepted, token) in paths(lambda draft=draft: dsv3.verify(p, q, draft, None)):
            assert token == draft if accepted else p[token] > 0
            total[token] += q[draft] * probability
    assert_close(total, p)


def test_speculation_where_p_and_q_differ_by_an_ulp():
    """Rejected by a hair's breadth, where max(p - q, 0) leaves nothing: it draws from p."""
    p, q = np.array([0.25, 0.75]), np.array([np.nextafter(0.25, 1), 0.75])
    outcomes = sorted(result for _, result in paths(lambda: dsv3.verify(p, q, 0, None)))
    assert outcomes == [(False, 0), (False, 1), (True, 0)]


class Chance:
    """A random stream of given values."""

    def __init__(self, *values):
        self.values = iter(values)

    def random(self):
        return next(self.values)


def test_draw_has_the_probabilities_it_is_given():
    rng, last = Chance(*(np.arange(1000) + 0.5) / 1000), 1 - 2**-53  # the largest that random() returns
    counts = np.bincount([dsv3.draw([0.25, 0, 0.625, 0.125, 0], rng) for _ in range(1000)], minlength=5)
    assert counts.tolist() == [250, 0, 625, 125, 0]
    assert dsv3.draw(np.array([0, 0.5, 0.5, 0]), Chance(0.0)) == 1
    assert dsv3.draw(np.array([0, 0.5, 0.5, 0]), Chance(last)) == 2
    assert dsv3.draw(np.array([1e-323, 0]), Chance(last)) == 0  # the product with the sum rounds up to the sum
    assert dsv3.draw(np.array([0.0, 1.0, 0.0]), Chance()) == 1  # what is certain takes no chance


@example([0.0, 1.0, 0.0, 0.0], 1.0, 2, 1)  # of equals as many as there is room for
@example([4.0, 3.0, 2.0, 1.0], 3.0, 2, 0.55)  # top-p of what top-k left: one token of two, two of all
@given(st.lists(st.floats(-20, 20) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=9), st.floats(0.1, 5),
       st.integers(0, 10), st.floats(0.01, 1))  # fmt: skip
def test_distribution_is_temperature_then_top_k_then_top_p(logits, temperature, k, top_p):
    p = dsv3.distribution(np.array(logits, np.float64), dsv3.Sampling(temperature, k, top_p))
    full = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-full[i], i))[: k or None]
    mass = [sum(full[i] for i in ranked[: n + 1]) / sum(full[i] for i in ranked) for n in range(len(ranked))]
    assume(top_p == 1 or min(abs(m - top_p) for m in mass) > 1e-9)
    kept = ranked[: 1 + sum(m < top_p for m in mass)] if top_p < 1 else ranked
    total = sum(full[i] for i in kept)
    assert_close(p, [full[i] / total if i in kept else 0 for i in range(len(logits))])


def test_distribution_at_its_ends():
    zeros, ties = np.zeros(9, np.float32), np.array([1.0, 2.0, 2.0])
    assert dsv3.distribution(zeros, dsv3.Sampling()).tolist() == [1] + [0] * 8  # of equals the lowest id
    assert dsv3.distribution(ties, dsv3.Sampling(1.0, top_k=1)).tolist() == [0, 1, 0]
    assert dsv3.distribution(ties, dsv3.Sampling(1e-320)).tolist() == [0, 0.5, 0.5]  # 1 / 1e-320 overflows
    p = dsv3.distribution(np.array([0.0, -40.0]), dsv3.Sampling(1.0))
    assert p[0] == 1 and p[1] == np.exp(-40)  # all tokens stay in, those too that rounding hides
    for n in range(1, 99):  # all together may be less than 1, rounded
        assert dsv3.distribution(np.zeros(n), dsv3.Sampling(1.0, top_p=1 - 2**-53)).all()
    for bad in (np.nan, np.inf):
        with pytest.raises(dsv3.InputError, match="not finite"):
            dsv3.distribution(np.array([0, bad]), dsv3.Sampling())


@pytest.mark.parametrize("bad", [
    {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0}, {"top_p": 1.1},
    {"top_p": math.nan}, {"top_k": -1}, {"seed": -1}])  # fmt: skip
def test_sampling_out_of_range_is_refused(bad):
    with pytest.raises(dsv3.InputError, match=next(iter(bad)).replace("_", "-")):
        dsv3.Sampling(**bad)


@pytest.mark.parametrize("speculate", [False, True])
def test_sampling_is_by_seed_and_by_row(speculate):
    """The same seed is the same text, in chunks of any size; a row's text is its own, whatever stands beside it."""
    w, hot, prompts = make_weights(SMALL), dsv3.Sampling(1.5, seed=7), [[1, 2, 3, 4, 5, 6, 7], [8]]

    def text(prompts, sampling=hot, chunk=1024):
        return generated(prompts, w, SMALL, 20, sampling, speculate=speculate, chunk=chunk)

    rows, same = text(prompts), text([[1, 2, 3], [1, 2, 3]])
    assert rows == text(prompts, hot, 1) == text(prompts, hot, 3)
    assert text(prompts[:1]) == rows[:1] and text([[9, 9], [8], [1]])[1] == rows[1]
    assert text(prompts[:1], replace(hot, seed=8)) != rows[:1]
    assert same[0] != same[1]  # each row has a random stream of its own


@given(PROMPTS, st.sets(st.integers(0, 3), max_size=2), st.booleans())
def test_generation_ends_at_stop_tokens_row_by_row(prompts, stop, speculate):
    w, hot, prompts = make_weights(GUESSABLE, 3), dsv3.Sampling(1.0), [[t % 4 for t in each] for each in prompts]
    free = generated(prompts, w, GUESSABLE, 12, hot, speculate=speculate)
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), 12) for row in free]
    rows = generated(prompts, w, GUESSABLE, 12, hot, stop, speculate)
    assert rows == [row[:end] for row, end in zip(free, ends, strict=True)]


@pytest.mark.parametrize("speculate, layers", [(False, 3), (True, 4)])
@pytest.mark.parametrize("n", [0, 1, 2, 20])
def test_generation_holds_one_cache_of_the_size_it_needs(speculate, layers, n):
    """One entry per layer and position of the longest row, and of at most two tokens past its end."""
    stats = Counter()
    rows = generated([[1, 2, 3], [4]], make_weights(SMALL), SMALL, n, speculate=speculate, stats=stats)
    assert [len(row) for row in rows] == [n, n]
    layers = layers if n > 1 else 3  # an MTP module is first run for a second token
    entries, rest = divmod(stats["cache_bytes"], layers * 2 * (10 + 4) * 8)
    assert rest == 0 and 3 + n - 1 <= entries <= 3 + n + 2


def test_generation_fills_the_context_to_its_last_position():
    cfg = replace(GUESSABLE, max_position_embeddings=12)
    w, prompts = make_weights(cfg), [[1] * 8, [2]]
    assert generated(prompts, w, cfg, 4) == generated(prompts, w, GUESSABLE, 4, speculate=False)
    assert generated([[1] * 12], w, cfg, 0) == [[]]
    assert dsv3.trace([[1] * 12], w, cfg)["lm_head"].shape == (12, 4)
    with pytest.raises(dsv3.InputError, match="prompt 0 has 9 tokens"):
        generated([[1] * 9], w, cfg, 4)


@pytest.mark.parametrize("prompts, n, said", [
    ([], 0, "a prompt"), ([[]], 0, "prompt 0 has 0 tokens"), ([[1], []], 0, "prompt 1 has 0 tokens"),
    ([[1], [31]], 0, "prompt 1: token id [31]"), ([[-1]], 0, "token id [-1]"), ([[1] * 513], 0, "513 tokens"),
    ([[1] * 500], 13, "500 tokens"), ([[1]], -1, "0 or more")])  # fmt: skip
def test_generation_refuses_before_any_work(prompts, n, said):
    with pytest.raises(dsv3.InputError, match=re.escape(said)):
        generated(prompts, {}, SMALL, n)
    with pytest.raises(dsv3.InputError if n == 0 else KeyError):
        dsv3.trace(prompts, {}, SMALL)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("factor", [0.0, 1.0, 1e4])
def test_generation_of_any_magnitude_makes_no_warning(dtype, factor):
    """The residual stream begins at up to 1e4; in float32 every normed activation is some 1e4 too."""
    w = make_weights(GUESSABLE, dtype=dtype)
    for name in w:
        if name == "model.embed_tokens.weight" or (dtype == np.float32 and name.endswith("norm.weight")):
            w[name] = w[name] * dtype(factor)
    w = {name: x.astype(np.float32 if ".mlp.gate." in name else dtype) for name, x in w.items()}
    rows = generated([[1], [2, 3, 1]], w, GUESSABLE, 6, dsv3.Sampling(1.0))
    assert [len(row) for row in rows] == [6, 6]
    for chunk in (None, 1):
        assert all(np.isfinite(x).all() for x in dsv3.trace([[1, 2, 3, 0], [3]], w, GUESSABLE, chunk).values())


def test_generation_statistics_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    """By a clock that shows 3 s, 5 s at the first token, and 6 s at the end."""
    w, stats = make_weights(GUESSABLE, dtype=np.float32), Counter()
    rows = generated([[1, 2, 3], [0, 1]], w, GUESSABLE, 8, stats=stats)
    monkeypatch.setattr(dsv3, "time", types.SimpleNamespace(perf_counter=Chance(3, 5, 6).random))
    flags = ["--device", "cpu", "--tokens", "1 2 3", "--tokens", "0 1", "-n", "8", "--mtp"]
    assert dsv3.main(["--weights", str(write_checkpoint(tmp_path, GUESSABLE, w)), *flags]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [" ".join(map(str, row)) for row in rows]
    made = f"drafted {stats['drafted']}, accepted {stats['accepted']} · cache {stats['cache_bytes'] / 1000:.0f} KB"
    line = rf"prompt: 5 tokens, 2.5 tok/s · new: 16 tokens, 14.0 tok/s · {made} · peak memory \d+ MB\n"
    assert stats["accepted"] > 0 and re.fullmatch(line, err)


# ---- 9. Configuration ----------------------------------------------------------------------------------------------

RELEASE = {  # the release's config.json, abridged to what matters
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "hidden_act": "silu",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": False,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "attention_bias": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}  # fmt: skip
YARN = RELEASE["rope_scaling"]
V2_LITE = {  # what its config.json says differently
    "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "q_lora_rank": None, "num_nextn_predict_layers": 0,
}  # fmt: skip


def without(keys, *names):
    return {key: value for key, value in keys.items() if key not in names}


def test_config_defaults_are_the_release():
    assert dsv3.parse_config(RELEASE) == dsv3.Config()
    assert dsv3.parse_config(RELEASE | {"model_type": "kimi_k2"}) == dsv3.Config()
    v31 = RELEASE["quantization_config"] | {"scale_fmt": "ue8m0"}  # its scales are powers of two, still F32
    assert dsv3.parse_config(RELEASE | {"quantization_config": v31}) == dsv3.Config()


def test_config_in_both_spellings_is_one():
    rope = without(YARN, "type") | {"rope_type": "yarn", "rope_theta": 10000, "partial_rotary_factor": None}
    hf5 = without(RELEASE, "rope_scaling", "rope_theta", "scoring_func", "topk_method", "model_type")
    assert dsv3.parse_config(hf5 | {"rope_parameters": rope}) == dsv3.Config()
    assert dsv3.parse_config(hf5 | {"rope_parameters": rope, "rope_scaling": rope}) == dsv3.Config()
    plain = dsv3.parse_config(hf5 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}})
    assert plain == replace(dsv3.Config(), rope_scaling=None, rope_theta=5e4)


def test_config_absent_keys_mean_one_thing_or_are_named():
    means = {"q_lora_rank": None, "attention_bias": False, "n_shared_experts": 0, "rope_theta": 1e4,
             "rope_interleave": True, "tie_word_embeddings": False, "rope_scaling": None, "scoring_func": "sigmoid",
             "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}  # fmt: skip
    for absent in (lambda *names: without(RELEASE, *names), lambda *names: RELEASE | dict.fromkeys(names)):
        ungrouped = replace(dsv3.Config(), n_group=1, topk_group=1)
        assert dsv3.parse_config(absent("n_group", "topk_group")) == ungrouped
        assert dsv3.parse_config(absent("num_key_value_heads", "quantization_config")) == dsv3.Config()
        for key in without({f.name: f for f in fields(dsv3.Config)}, "n_group", "topk_group"):
            if key in means:
                assert dsv3.parse_config(absent(key)) == replace(dsv3.Config(), **{key: means[key]})
            else:
                with pytest.raises(dsv3.InputError, match=key):
                    dsv3.parse_config(absent(key))


def test_config_of_deepseek_v2():
    cfg = dsv3.parse_config(RELEASE | V2_LITE)
    assert (cfg.scoring_func, cfg.topk_method, cfg.norm_topk_prob) == ("softmax", "greedy", False)
    assert not any(name.endswith("e_score_correction_bias") for name in dsv3.tensor_shapes(cfg))
    unsaid = without(RELEASE | V2_LITE, "scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group")
    assert dsv3.parse_config(unsaid) == cfg
    groups = RELEASE | V2_LITE | {"topk_method": "group_limited_greedy", "n_group": 256, "topk_group": 8}
    assert dsv3.parse_config(groups).topk_group == 8  # a group of one expert has a best one
    assert dsv3.parse_config(groups | {"topk_method": "greedy", "topk_group": 1}).num_experts_per_tok == 8


def test_config_of_a_dense_model_needs_no_experts():
    dense = {"first_k_dense_replace": 61, "n_routed_experts": 0, "num_nextn_predict_layers": 0}
    assert dsv3.parse_config(RELEASE | dense).is_dense(60)
    assert not replace(dsv3.Config(), first_k_dense_replace=99).is_dense(61)  # an MTP module has experts all the same


@pytest.mark.parametrize("change, key", [
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"model_type": "deepseek_v32"}, "deepseek_v32"),
    ({"model_type": ["deepseek_v3"]}, "model_type"),
    ({"model_type": "deepseek_v2"}, "scoring_func 'sigmoid'"),
    (V2_LITE | {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    (V2_LITE | {"norm_topk_prob": True}, "norm_topk_prob True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method 'greedy'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"rope_scaling": []}, "rope_scaling"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
    ({"rope_scaling": without(YARN, "factor")}, "factor"),
    ({"rope_scaling": YARN | {"factor": "40"}}, "factor"),
    ({"rope_scaling": YARN | {"factor": [40]}}, "factor"),
    ({"rope_scaling": YARN | {"truncate": 1}}, "truncate"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": YARN | {"attention_factor": 1.25}}, "attention_factor"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    ({"rope_theta": 1}, "rope_theta"),
    ({"rope_theta": "10000"}, "rope_theta"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"quantization_config": {"fmt": "e5m2"}}, "e5m2"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    ({"hidden_size": "7168"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": 7168.0}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"rms_norm_eps": 1e-300}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ({"num_nextn_predict_layers": 10**9}, "tensors"),
    ({"num_hidden_layers": 665}, "tensors"),
    ({"n_routed_experts": 0}, "n_routed_experts"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
    ({"n_group": 7}, "n_group"),
    ({"n_group": 256, "topk_group": 8}, "n_group"),
    ({"topk_group": 9}, "topk_group"),
    ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok"),
])  # fmt: skip
def test_config_refusal_names_the_key(change, key):
    with pytest.raises(dsv3.InputError) as refusal:
        dsv3.parse_config(RELEASE | change)
    assert key in str(refusal.value) and "\n" not in str(refusal.value)


def test_config_counts_of_the_671b_model_are_the_published(tmp_path, capsys):
    """671B parameters, 37B activated, 61 layers of 576 cached elements, 91,991 tensors in the release's index."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASE))
    for path in (tmp_path, tmp_path / "config.json"):
        assert dsv3.main(["--weights", str(path), "--inspect"]) == 0
        table = capsys.readouterr().out
        for number in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "35,136", "70,272", "71.1"):
            assert number in table
    assert "GQA" in table and dsv3.main(["--weights", str(WEIGHTS), "--inspect"]) == 0
    assert "GQA" not in capsys.readouterr().out  # of 4 heads there are no 8
    shapes = dsv3.tensor_shapes(dsv3.Config())
    scaled = sum(name.endswith(("_proj.weight", "with_mqa.weight")) for name in shapes) - 1  # not eh_proj
    assert len(shapes) + scaled + 2 == 91_991  # the MTP module's copies of embedding and head


# ---- 9. Checkpoints ------------------------------------------------------------------------------------------------


def quantised(w, power_of_two=False):
    """The FP8 release's form of weights: every projection except eh_proj in E4M3, with a scale for each block of
    128 x 128 that differs from its neighbours' by a factor; all else in BF16, the routers' biases in F32."""
    out = {}
    for name, x in w.items():
        if not name.endswith("_proj.weight") and "with_mqa" not in name or "eh_proj" in name:
            out[name] = x.astype(np.float32 if "bias" in name else ml_dtypes.bfloat16)
            continue
        grid = [-(-n // 128) for n in x.shape]
        out[name] = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
        out[f"{name}_scale_inv"] = scale = np.zeros(grid, np.float32)
        for i, j in np.ndindex(*grid):
            block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            least = np.abs(x[block]).max() / 448 * (1 + (i + 2 * j) % 3)
            scale[i, j] = 2 ** np.ceil(np.log2(least)) if power_of_two else least
            out[name][block] = (x[block] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return out


def decoded(stored):
    """What the tensors of an FP8 release are worth, in float32, by NumPy and ml_dtypes alone."""
    out = {}
    for name, x in stored.items():
        out[name] = x.astype(np.float32)
        if f"{name}_scale_inv" in stored:
            scale = stored[f"{name}_scale_inv"].astype(np.float32).repeat(128, 0).repeat(128, 1)
            out[name] = out[name] * scale[: x.shape[0], : x.shape[1]]
    return out


def write_stored(directory, cfg, stored, shards=2):
    """A checkpoint of tensors of several dtypes, each as it is, dealt out to shards in the order of their names: a
    scale comes to lie in another file than its weight."""
    write_checkpoint(directory, cfg, {})
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{n % shards + 1}-of-{shards}.safetensors" for n, name in enumerate(sorted(stored))}
    for shard in set(weight_map.values()):
        save_file({name: x for name, x in stored.items() if weight_map[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def whole(x):
    return dsv3.to_host(x.whole() if isinstance(x, dsv3.Matrix) else x)


def test_fp8_codes_are_those_of_ml_dtypes():
    code = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = code.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert dsv3.dequantize(code, np.ones((1, 1), np.float32)).tobytes() == expected.tobytes()


@given(st.integers(1, 300), st.integers(1, 300), seeds)
def test_fp8_is_code_times_scale_of_its_block(rows, columns, seed):
    rng = np.random.default_rng(seed)
    code = rng.choice(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), (rows, columns))  # all but the NaNs
    scale = rng.random((-(-rows // 128), -(-columns // 128)), np.float32) * 1e-3
    value, got = code.view(ml_dtypes.float8_e4m3fn).astype(np.float32), dsv3.dequantize(code, scale)
    expected = [[value[i, j] * scale[i // 128, j // 128] for j in range(columns)] for i in range(rows)]
    assert got.dtype == np.float32 and np.array_equal(got, expected)


def test_bf16_values_are_those_of_ml_dtypes(tmp_path):
    """All 65,536, as the embedding of a checkpoint; NaNs as NaNs."""
    cfg = replace(SMALL, vocab_size=256, hidden_size=256, num_nextn_predict_layers=0)
    stored = make_weights(cfg, dtype=ml_dtypes.bfloat16)
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    stored["model.embed_tokens.weight"] = bits.view(ml_dtypes.bfloat16)
    w = dsv3.Checkpoint(write_stored(tmp_path / "w", cfg, stored), cfg)
    got = whole(w["model.embed_tokens.weight"])
    expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    nan = np.isnan(expected)
    assert np.isnan(got[nan]).all() and got[~nan].tobytes() == expected[~nan].tobytes()


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoint_reads_back_as_written(tmp_path, stored, shards):
    w = make_weights(SMALL)
    directory = write_checkpoint(tmp_path / "w", SMALL, w, shards, stored)
    assert dsv3.read_config(directory) == dsv3.read_config(directory / "config.json") == SMALL
    for dtype in (np.float16, np.float32, np.float64):
        read = dsv3.Checkpoint(directory, SMALL, dtype)
        assert set(read.shapes) == set(w) and all(name in read for name in w) and "x" not in read
        for name in w:
            wide = np.promote_types(dtype, np.float32) if ".mlp.gate." in name else dtype  # routing
            expected = w[name].astype(stored).astype(np.float64).astype(wide)
            assert read[name].dtype == wide and np.array_equal(whole(read[name]), expected), name


@pytest.mark.parametrize("power_of_two", [False, True])
def test_checkpoint_of_the_fp8_release(tmp_path, power_of_two):
    """Ragged blocks, scales in other shards, the copies of embedding and head that MTP modules carry."""
    cfg = replace(SMALL, hidden_size=160, kv_lora_rank=140, moe_intermediate_size=130)
    stored = quantised(make_weights(cfg), power_of_two)
    for k in (3, 4):
        stored[f"model.layers.{k}.embed_tokens.weight"] = stored["model.embed_tokens.weight"]
        stored[f"model.layers.{k}.shared_head.head.weight"] = stored["lm_head.weight"]
    directory, expected = write_stored(tmp_path / "w", cfg, stored), decoded(stored)
    for dtype, memory in itertools.product((np.float32, np.float64), (None, 0)):
        read = dsv3.Checkpoint(directory, cfg, dtype, memory)
        for name in read.shapes:
            assert np.array_equal(whole(read[name]), expected[name].astype(dtype)), name
    named = dsv3.trace([[1, 2, 3]], read, cfg)
    plain = dsv3.trace([[1, 2, 3]], {name: x.astype(np.float64) for name, x in expected.items()}, cfg, None)
    for name in plain:
        assert_close(named[name], plain[name])


def test_memory_budgets_change_no_bit(tmp_path):
    """From no memory for decoded weights to more than all; what stays decoded is within the budget, and fills it."""
    cfg = replace(SMALL, vocab_size=300, hidden_size=96, intermediate_size=150, num_nextn_predict_layers=1)
    directory = write_stored(tmp_path / "w", cfg, quantised(make_weights(cfg)))
    prompts, seen, kept = [make_tokens(cfg, 0, 9).tolist(), [1]], [], {}
    for memory in (None, 10**8, 600_000, 100_000, 0):
        w = dsv3.Checkpoint(directory, cfg, memory=memory)
        tracemalloc.start()
        for name in w.shapes:
            w[name]
        kept[memory] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        seen.append([x.tobytes() for x in dsv3.trace(prompts, w, cfg).values()])
        seen[-1] += [generated(prompts, w, cfg, 9, dsv3.Sampling(t)) for t in (0, 1.0)]
    assert all(each == seen[0] for each in seen)
    for memory in (600_000, 100_000):
        assert 0.7 * memory < kept[memory] - kept[0] < 1.1 * memory < kept[10**8]


def test_memory_of_0_reads_bands_of_rows(tmp_path):
    """A head of several bands, the last one cropped within a block: the same bits as in memory."""
    cfg = replace(SMALL, vocab_size=140_064, hidden_size=64, num_nextn_predict_layers=0)
    stored = quantised(make_weights(cfg))
    codes = np.random.default_rng(1).integers(0, 127, (cfg.vocab_size, 64), np.uint8)
    stored["lm_head.weight"] = codes.view(ml_dtypes.float8_e4m3fn)
    stored["lm_head.weight_scale_inv"] = np.random.default_rng(2).random((1095, 1), np.float32)
    directory, bits = write_stored(tmp_path / "w", cfg, stored), []
    for memory in (None, 0):
        w = dsv3.Checkpoint(directory, cfg, memory=memory)
        bits.append([dsv3.trace([tokens], w, cfg)["lm_head"].tobytes() for tokens in ([1], [1, 2, 3])])
        assert np.array_equal(whole(w["lm_head.weight"]), decoded(stored)["lm_head.weight"])
    assert bits[0] == bits[1]


def test_memory_takes_no_more_threads_than_cores(tmp_path):
    """As many as this process may use, which in a container are fewer than the machine has."""
    cfg = replace(SMALL, vocab_size=400_000, hidden_size=64, num_nextn_predict_layers=0)
    directory = write_checkpoint(tmp_path / "w", cfg, make_weights(cfg), dtype=ml_dtypes.bfloat16)
    lines = f"""import os, threading
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import deepseek_v3 as dsv3
before = threading.active_count()
dsv3.main(["--weights", {str(directory)!r}, "--tokens", "1", "-n", "1", "--memory", "0", "--device", "cpu"])
print(threading.active_count() - before)"""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot bind a process to a core")
    done = subprocess.run([sys.executable, "-c", lines], cwd=HERE, capture_output=True, timeout=120)
    assert done.stdout.split()[-1] == b"1", done.stderr.decode()


def test_checkpoint_leaves_out_absent_mtp_modules(tmp_path):
    for present in (0, 1):
        w = make_weights(replace(SMALL, num_nextn_predict_layers=present))
        read = dsv3.Checkpoint(write_checkpoint(tmp_path / "w", SMALL, w), SMALL)
        assert set(read.shapes) == set(w) and read.cfg.num_nextn_predict_layers == present
        assert dsv3.mtp_depth(read, SMALL) == present


def edit_header(directory, change):
    """Write model.safetensors again with the header that `change` makes of its own, and the same data."""
    raw = (directory / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    text = json.dumps(change(header) or header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])


def edit_bytes(directory, change):
    path = directory / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index_says(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def restore(directory, **changes):
    """Write the tensors again, some of them changed or, if None, left out."""
    w = quantised(make_weights(SMALL)) | changes
    save_file({name: x for name, x in w.items() if x is not None}, directory / "model.safetensors")


def in_fp8(name, *shape):
    return {name: np.ones(shape, ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": np.ones([1] * len(shape), np.float32)}


NORM, O_PROJ = "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"
SCALE = f"{O_PROJ}_scale_inv"
DAMAGE = {  # what was done -> how, and the word that the refusal must have
    "empty": (lambda d: edit_bytes(d, lambda raw: b""), "model.safetensors"),
    "cut in the header": (lambda d: edit_bytes(d, lambda raw: raw[:100]), "model.safetensors"),
    "cut in the data": (lambda d: edit_bytes(d, lambda raw: raw[:-10]), "model.safetensors"),
    "more data": (lambda d: edit_bytes(d, lambda raw: raw + b"more"), "model.safetensors"),
    "absurd length": (lambda d: edit_bytes(d, lambda raw: b"\0" * 7 + b"@" + raw[8:]), "model.safetensors"),
    "binary header": (lambda d: edit_bytes(d, lambda raw: raw[:8] + b"\xff" * (len(raw) - 8)), "model.safetensors"),
    "a list": (lambda d: edit_header(d, lambda h: [1]), "model.safetensors"),
    "entry without a shape": (lambda d: edit_header(d, lambda h: h[NORM].pop("shape") and None), "model.safetensors"),
    "entry as a list": (lambda d: edit_header(d, lambda h: h | {NORM: list(h[NORM].values())}), "model.safetensors"),
    "dtype as an object": (lambda d: edit_header(d, lambda h: h[NORM].update(dtype={})), "model.safetensors"),
    "overlap": (lambda d: edit_header(d, lambda h: h[NORM].update(data_offsets=[0, 88])), "model.safetensors"),
    "shape beyond the data": (lambda d: edit_header(d, lambda h: h[NORM].update(shape=[23])), "model.safetensors"),
    "huge shape": (lambda d: edit_header(d, lambda h: h[NORM].update(shape=[0, 2**70])), "model.safetensors"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "missing tensor": (lambda d: restore(d, **{NORM: None}), NORM),
    "integers": (lambda d: restore(d, **{NORM: np.ones(22, np.int32)}), NORM),
    "wrong shape": (lambda d: restore(d, **{"lm_head.weight": np.ones((22, 31), np.float32)}), "lm_head.weight"),
    "larger shape": (lambda d: restore(d, **{"lm_head.weight": np.ones((32, 22), np.float32)}), "lm_head.weight"),
    "FP8 without scales": (lambda d: restore(d, **{SCALE: None}), SCALE),
    "scales of another grid": (lambda d: restore(d, **{SCALE: np.ones((2, 1), np.float32)}), SCALE),
    "scales in F64": (lambda d: restore(d, **{SCALE: np.ones((1, 1))}), SCALE),
    "scale NaN": (lambda d: restore(d, **{SCALE: np.full((1, 1), np.nan, np.float32)}), "scale_inv"),
    "scale infinite": (lambda d: restore(d, **{SCALE: np.full((1, 1), np.inf, np.float32)}), "scale_inv"),
    "scale negative": (lambda d: restore(d, **{SCALE: np.full((1, 1), -1e-3, ml_dtypes.bfloat16)}), "scale_inv"),
    "scale that overflows": (lambda d: restore(d, **{SCALE: np.full((1, 1), 7e35, np.float32)}), "scale_inv"),
    "FP8 norm": (lambda d: restore(d, **in_fp8(NORM, 22)), NORM),
    "FP8 embedding": (lambda d: restore(d, **in_fp8("model.embed_tokens.weight", 31, 22)), "embed_tokens"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config cut": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config in Latin-1": (lambda d: (d / "config.json").write_bytes(b'{"x": "\xe9"}'), "config.json"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "config nested": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json"),
    "config of a tokenizer": (lambda d: (d / "config.json").write_text('{"version": "1.0"}'), "hidden_size"),
    "config of another size": (lambda d: edit_config(d, hidden_size=44), "shape"),
    "a billion layers": (lambda d: edit_config(d, num_hidden_layers=10**9), "layers"),
    "a billion experts": (lambda d: edit_config(d, n_routed_experts=10**9), "experts"),
    "more experts": (lambda d: edit_config(d, n_routed_experts=4096), "mlp"),
    "shard elsewhere": (lambda d: index_says(d, {NORM: "../model.safetensors"}), "index.json"),
    "shard by its path": (lambda d: index_says(d, {NORM: str(d / "model.safetensors")}), "index.json"),
    "shard the parent": (lambda d: index_says(d, {NORM: ".."}), ".."),
    "shard without a name": (lambda d: index_says(d, {NORM: ""}), "safetensors"),
    "shard of two lines": (lambda d: index_says(d, {NORM: "a\n\x1b[31mb"}), "index.json"),
    "shard a number": (lambda d: index_says(d, {NORM: 1}), "index.json"),
    "tensor not in its shard": (lambda d: index_says(d, {"x": "model.safetensors"}), "lacks"),
    "index of a part": (lambda d: index_says(d, {"lm_head.weight": "model.safetensors"}), "model."),
    "index without a map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "weight_map"),
}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """SMALL as an FP8 checkpoint of one file, without a tokenizer."""
    directory = write_checkpoint(tmp_path_factory.mktemp("fp8") / "w", SMALL, {})
    save_file(quantised(make_weights(SMALL)), directory / "model.safetensors")
    assert dsv3.main(["--weights", str(directory), "--tokens", "1", "-n", "1", "--device", "cpu"]) == 0
    return directory


@pytest.mark.parametrize("how", DAMAGE)
def test_checkpoint_damaged_is_refused_in_one_line(fp8, tmp_path, capsys, how):
    directory = shutil.copytree(fp8, tmp_path / "w")
    damage, word = DAMAGE[how]
    damage(directory)
    capsys.readouterr()
    assert dsv3.main(["--weights", str(directory), "--tokens", "1", "-n", "1", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not out.strip() and len(err) < 600 and word in err
    assert [line for line in err.splitlines() if not line.startswith("prompt: ")] == [err.splitlines()[-1]]


VALUE = re.compile(rb'"[^"]*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null|\[[^][{}]*\]|\{[^{}]*\}')
STRANGE = [
    b"-1", b"0", b"1", b"1.5", b"1e3", b"1e999", b"null", b"true", b"false", b'"1"', b'""', b"[]", b"{}", b"[1]",
    b"4294967296", b"18446744073709551616", b"[0,4611686018427387904]", b'"F32"', b'"BF16"', b'"F4"', b'"I64"', b'"U8"',
    b'{"F32":null}', b'["F32",[22],[0,44]]', b'"__metadata__"', b'"model.norm.weight"', b'{"a":"b"}', b'".."', b"NaN",
    b"9" * 5000, b"[" * 2000, b'"\\ud800"', b'"\xff"', b"\xef\xbb\xbf", b"\n", b"\0", b",", b"}", b'"yarn"',
    b'"default"',
]  # fmt: skip


def spans(text, start, end):
    """Where the values of a JSON text lie, those within lists and objects too."""
    for found in VALUE.finditer(text, start, end):
        yield found.span()
        if found[0][:1] in b"[{":
            yield from spans(text, found.start() + 1, found.end() - 1)


@st.composite
def edited(draw, text):
    """The JSON of a sound file after one or two edits: a value replaced by another of the file or by a strange one, or
    doubled; something strange put in; some bytes written over; the rest cut off."""
    for _ in range(draw(st.integers(1, 2))):
        values = list(spans(text, 0, len(text))) or [(0, len(text))]
        (a, b), (c, d) = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        start, middle, end = draw(st.sampled_from([
            *[(text[:a], draw(st.sampled_from(STRANGE)), text[b:])] * 4, *[(text[:a], text[c:d], text[b:])] * 4,
            (text[:b], b"," + text[a:b], text[b:]), (text[:a], draw(st.sampled_from(STRANGE)), text[a:]),
            (text[:a], draw(st.binary(max_size=4)), text[a + 4 :]), (text[:a], b"", b""),
        ]))  # fmt: skip
        text = start + middle + end
    return text


@st.composite
def edited_safetensors(draw, raw):
    """A sound file with an edited header, its length set right or not; or with more bytes, or fewer."""
    n = int.from_bytes(raw[:8], "little")
    header = draw(edited(raw[8 : 8 + n]))
    length = draw(st.sampled_from([*[len(header)] * 5, n, len(raw), 2**63]))
    text = length.to_bytes(8, "little") + header + raw[8 + n :]
    return draw(st.sampled_from([*[text] * 6, text + b"more", text[: draw(st.integers(0, len(text)))]]))


def tensors_by_the_library(directory):
    """The decoded tensors of a directory of shards, by safetensors and ml_dtypes alone."""
    stored, kinds = {}, {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    for name, shard in json.loads((directory / "model.safetensors.index.json").read_bytes())["weight_map"].items():
        entry = dict(safetensors.deserialize((directory / shard).read_bytes()))[name]
        if entry["dtype"] in kinds:
            stored[name] = np.frombuffer(bytes(entry["data"]), kinds[entry["dtype"]]).reshape(entry["shape"])
    return decoded(stored)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound checkpoint of one layer: config.json, an index, two shards of FP8, BF16 and F32."""
    cfg = replace(SMALL, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=2, num_experts_per_tok=1,
                  n_group=1, topk_group=1, n_shared_experts=0, num_nextn_predict_layers=0)  # fmt: skip
    directory = tmp_path_factory.mktemp("sound") / "w"
    return write_stored(directory, cfg, quantised(make_weights(cfg)))


@settings(max_examples=int(os.environ.get("FUZZ", "300")))
@given(st.data())
def test_checkpoint_fuzzed_is_read_as_the_library_does_or_refused(sound, data):
    """FUZZ=20000 pytest -k fuzzed: of every file that differs from a sound one by a few edits."""
    path = sound / data.draw(st.sampled_from(sorted(path.name for path in sound.iterdir())))
    raw, begun = path.read_bytes(), time.process_time()
    try:
        path.write_bytes(data.draw(edited(raw) if path.suffix == ".json" else edited_safetensors(raw)))
        w = dsv3.Checkpoint(sound, dsv3.read_config(sound), memory=2**20)
        got = {name: np.array(whole(w[name])) for name in w.shapes}
        assert np.isfinite(dsv3.rope_frequencies(w.cfg)).all() and dsv3.softmax_scale(w.cfg) > 0
        expected = tensors_by_the_library(sound)
    except dsv3.InputError as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 1000
        return
    finally:
        path.write_bytes(raw)
        assert time.process_time() - begun < 10
    for name, x in got.items():
        assert x.dtype == np.float32 and np.array_equal(x, expected[name], equal_nan=True), name


def write_true_width(directory, layers, mtp):
    """A checkpoint in the release's form and widths, of random weights: FP8 except for embedding, head, norms and
    routers; an index, and one shard per layer, written a piece at a time."""
    cfg = replace(dsv3.Config(), num_hidden_layers=layers, first_k_dense_replace=1, num_nextn_predict_layers=mtp)
    rng, shards, weight_map = np.random.default_rng(0), {}, {}
    normal = rng.standard_normal(2**22, np.float32)
    halves, codes = normal.astype(ml_dtypes.bfloat16), (64 * normal).astype(ml_dtypes.float8_e4m3fn)
    for name, shape in dsv3.tensor_shapes(cfg).items():
        tensors = shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})
        if name.endswith("e_score_correction_bias") or len(shape) == 1:
            tensors[name] = ("F32", shape, np.full(shape, "norm" in name, np.float32))
        elif name.endswith(("_proj.weight", "with_mqa.weight")) and "eh_proj" not in name:
            scale = rng.uniform(0.5, 1.5, [-(-n // 128) for n in shape]).astype(np.float32) / 64 / math.sqrt(shape[1])
            tensors[name], tensors[f"{name}_scale_inv"] = ("F8_E4M3", shape, codes), ("F32", scale.shape, scale)
        else:
            small = halves if "embed" in name else (halves / np.sqrt(np.float32(shape[1]))).astype(halves.dtype)
            tensors[name] = ("BF16", shape, small)
    for shard, tensors in shards.items():
        header, end = {}, 0
        for name, (dtype, shape, x) in tensors.items():
            begin, end = end, end + math.prod(shape) * x.itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = f"model-{shard}.safetensors"
        with (directory / f"model-{shard}.safetensors").open("wb") as file:
            text = json.dumps(header).encode()
            file.write(len(text).to_bytes(8, "little") + text)
            for _, shape, x in tensors.values():
                for left in range(math.prod(shape), 0, -x.size):
                    file.write(x.ravel()[:left].tobytes())
    (directory / "config.json").write_text(json.dumps(config_json(cfg)))
    index_says(directory, weight_map)
    return cfg


@pytest.mark.width
@pytest.mark.parametrize("mtp", [0, 1])
def test_width_of_the_671b_model_runs_in_6_gb(tmp_path, mtp):
    """One dense layer and one with experts: the program's own statistics, the experts' sum in float32 against float64,
    and the time of each kind of layer with nothing kept, from which that of 61."""
    if shutil.disk_usage(tmp_path).free < (40e9 if mtp else 20e9):
        pytest.skip(f"needs {40 if mtp else 20} GB of disk at {tmp_path} (--basetemp DIR elsewhere)")
    try:
        cfg = write_true_width(tmp_path, 2, mtp)
        code, out, err = cli("--weights", tmp_path, "--tokens", "1 2 3 4 5", "--memory", 3, "-n", 5, "--mtp")
        print("\n" + err, end="")
        assert code == 0 and len(out.split()) == 5 and float(re.search(r"peak memory (\d+) MB", err)[1]) < 6000
        if not mtp:
            time_layers(tmp_path, cfg)
    finally:
        shutil.rmtree(tmp_path)


def time_layers(directory, cfg):
    x, name, sums = np.random.default_rng(1).standard_normal((1, 1, cfg.hidden_size)), "model.layers.1.mlp", []
    for dtype in (np.float64, np.float32):
        w = dsv3.Checkpoint(directory, cfg, dtype, memory=0)
        index, gate = dsv3.route(x.astype(dtype), w, name, cfg)
        sums.append(dsv3.moe_computed(x.astype(dtype), w, name, index, gate, cfg))
    assert_close(sums[1], sums[0], 1e-5)
    x, cache = x.astype(np.float32), dsv3.Cache(1, 1)
    pos, total = dsv3.positions(np.zeros((1, 1), int), np.zeros(1, int), cfg, np.float32), 0
    for label, count, step in (("dense layer", 3, lambda: dsv3.block(x, w, 0, cfg, pos, cache)),
                               ("layer with experts", 58, lambda: dsv3.block(x, w, 1, cfg, pos, cache)),
                               ("head", 1, lambda: dsv3.head(x, w, cfg))):  # fmt: skip
        start = time.perf_counter()
        for _ in range(3):
            step()
        seconds = (time.perf_counter() - start) / 3
        total += count * seconds
        print(f"{label:20} {seconds:7.3f} s  x {count}")
    print(f"{'a token, 61 layers':20} {total:7.1f} s")


# ---- 11. The program -----------------------------------------------------------------------------------------------

STATISTICS = re.compile(
    r"prompt: \d+ tokens, [\d.]+ tok/s · new: \d+ tokens, [\d.]+ tok/s · drafted \d+, accepted \d+"
    r" · cache \d+ KB · peak memory \d+ MB\n"
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content if m.role == 'user' else ' ' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %} said:{% endif %}"
)


@pytest.fixture
def program(capsys):
    """The program in this process: arguments -> (exit code, stdout, stderr)."""

    def call(*args):
        capsys.readouterr()
        code = dsv3.main([*map(str, args), *([] if "--device" in args else ["--device", "cpu"])])
        return code, *capsys.readouterr()

    return call


def cli(*args, **kwargs):
    """The program as a user runs it -> (exit code, stdout, stderr)."""
    env = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "error"} | kwargs.pop("env", {})
    command = [sys.executable, str(HERE / "deepseek_v3.py"), *map(str, args), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, env=env, timeout=600, check=False, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def scripted(monkeypatch):
    """In place of generation: `made`, the tokens that the first row gets, and `asked`, what generation was asked."""
    script = types.SimpleNamespace(made=[], asked=[])

    def generate(prompts, *args, **kwargs):
        script.asked.append((prompts, kwargs))
        yield from ((0, token) for token in script.made)

    monkeypatch.setattr(dsv3, "generate", generate)
    return script


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """SMALL as a checkpoint in float32, without a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("small") / "w", SMALL, make_weights(SMALL))


def shipped_with(directory, **files):
    """The shipped checkpoint with some files replaced (name_with_underscores=JSON or text; None leaves it out)."""
    directory.mkdir()
    for path in WEIGHTS.iterdir():
        if path.is_file():
            (directory / path.name).symlink_to(path)
    for name, content in files.items():
        path = directory / {"jinja": "chat_template.jinja"}.get(name, f"{name}.json")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_main_prints_token_ids_and_one_line_of_statistics(small, program):
    prompts = [[3, 14, 15], [9]]
    code, out, err = program(
        "--weights", small, "-n", 7, "--dtype", "float64", "--tokens", "3 14, 15", "--tokens", "9"
    )  # fmt: skip
    expected = generated(prompts, dsv3.Checkpoint(small, SMALL, np.float64), SMALL, 7)
    assert (code, out) == (0, "".join(" ".join(map(str, row)) + "\n" for row in expected))
    assert STATISTICS.fullmatch(err) and 10 < int(re.search(r"peak memory (\d+) MB", err)[1]) < 100_000
    assert "prompt: 4 tokens" in err and "new: 14 tokens" in err and "drafted 0" not in err


def test_main_makes_no_token_if_asked_for_none(small, program):
    code, out, err = program("--weights", small, "--tokens", "1 2", "-n", 0)
    assert (code, out.strip()) == (0, "") and STATISTICS.fullmatch(err) and "new: 0 tokens" in err


def test_main_passes_on_what_the_flags_say(small, program, monkeypatch, tmp_path):
    """--chunk bounds what goes through at a time, in a trace too; the flags of sampling choose the tokens."""
    sizes, forward = [], dsv3.forward
    monkeypatch.setattr(dsv3, "forward", lambda x_BT, *args: sizes.append(x_BT.shape) or forward(x_BT, *args))
    flags = ["--weights", small, "--tokens", "1 2 3 4 5 6 7", "-n", 3, "--no-mtp", "--dtype", "float64"]
    whole_prompt = program(*flags)[1]
    assert sizes == [(1, 7), (1, 1), (1, 1)]
    sizes.clear()
    assert program(*flags, "--chunk", 3)[1] == whole_prompt and sizes[:3] == [(1, 3), (1, 3), (1, 1)]
    sizes.clear()
    assert program(*flags, "-n", 0, "--chunk", 3, "--trace", tmp_path / "t.npz")[0] == 0
    assert sizes == [(1, 3), (1, 3), (1, 1)] * 2  # the trace, then the prompt of no new tokens
    drawn = program(*flags, "--temp", 2, "--top-k", 5, "--top-p", 0.9, "--seed", 4)[1]
    sampling = dsv3.Sampling(2.0, 5, 0.9, 4)
    w = dsv3.Checkpoint(small, SMALL, np.float64)
    expected = generated([[1, 2, 3, 4, 5, 6, 7]], w, SMALL, 3, sampling, speculate=False)
    assert [list(map(int, drawn.split()))] == expected != [list(map(int, whole_prompt.split()))]


@pytest.mark.parametrize("end", ["npz", "safetensors"])
def test_trace_is_written_and_nothing_generated(small, tmp_path, program, end):
    path, flags = tmp_path / f"t.{end}", ["--weights", small, "--dtype", "float64", "--tokens", "1 2 3"]
    code, out, err = program(*flags, "--trace", path)
    assert (code, out.strip()) == (0, "") and "new: 0 tokens" in err
    assert len(program(*flags, "--trace", path, "-n", 4)[1].split()) == 4
    read = dict(np.load(path)) if end == "npz" else load_file(path)
    expected = dsv3.trace([[1, 2, 3]], dsv3.Checkpoint(small, SMALL, np.float64), SMALL)
    assert read.keys() == expected.keys() and all(np.array_equal(read[name], expected[name]) for name in expected)
    assert list(read) == list(expected) or end != "npz"
    program(*flags, "--trace", path, "--chunk", 1)
    absorbed = dict(np.load(path)) if end == "npz" else load_file(path)
    for name, x in expected.items():
        assert_close(absorbed[name], x)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("end", ["npz", "safetensors"])
def test_trace_is_written_whole_or_not_at_all(small, tmp_path, program, monkeypatch, end):
    path = tmp_path / f"t.{end}"
    path.write_text("as it was")
    flags = ["--weights", small, "--tokens", "1", "--trace", path]

    def full_disk(file=None, *_, **__):
        if hasattr(file, "write"):
            file.write(b"half")
        raise OSError(28, "No space left on device")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for fault, code in ((full_disk, 2), (interrupted, 130)):
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", fault)
            patch.setattr(safetensors.numpy, "save", fault)
            got, out, err = program(*flags)
        assert (got, out, err.count("\n")) == (code, "", int(code == 2)) and ("No space left" in err) == (code == 2)
        assert path.read_text() == "as it was" and [each.name for each in tmp_path.iterdir()] == [path.name]
    (tmp_path / f"d.{end}").mkdir()
    for bad in (tmp_path / f"d.{end}", tmp_path / "none" / f"t.{end}", path / f"t.{end}"):
        code, out, err = program(*flags[:-1], bad)
        assert (code, out, err.count("\n")) == (2, "", 1) and str(bad) in err
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"d.{end}", path.name]


def test_inspect_counts_the_configurations_parameters(small, program):
    sizes = [x.size for x in make_weights(replace(SMALL, num_nextn_predict_layers=0)).values()]
    code, out, err = program("--weights", small, "--inspect")
    assert (code, err) == (0, "") and f"{sum(sizes):,}" in out


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        dsv3.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for flag in ("--prompt", "--tokens", "--weights", "--max-tokens", "--max-new-tokens", "--temperature", "--temp",
                 "--top-p", "--top-k", "--seed", "--device", "--dtype", "--mtp", "--no-mtp", "--memory", "--chunk",
                 "--chat", "--trace", "--inspect"):  # fmt: skip
        assert flag in out


@pytest.mark.parametrize("args, word", [
    (["--no-such-flag"], "--no-such-flag"), (["-n", "x"], "-n"), (["-n", "-1"], "--max-tokens"),
    (["--tokens", "1 a"], "--tokens"), (["--tokens", ""], "tokens"), (["--tokens", "1", "-p", "x"], "--prompt"),
    (["--tokens", "31"], "31"), (["--tokens=-1"], "-1"), (["--tokens", "9" * 30], "9" * 20),
    (["--tokens", "0 " * 513], "513"), (["--tokens", "1", "-n", "512"], "tokens"),
    (["--tokens", "1", "--weights", "no-such-directory"], "no-such-directory"),
    (["--tokens", "1", "--weights", "README.md"], "README.md"),
    (["--temperature", "-1"], "temperature"), (["--temp", "nan"], "temperature"), (["--top-p", "0"], "top"),
    (["--top-p", "1.01"], "top"), (["--top-p", "nan"], "top"), (["--top-k", "-1"], "top"), (["--seed", "-1"], "seed"),
    (["--dtype", "int8"], "--dtype"), (["--device", "tpu"], "--device"), (["--memory", "-1"], "--memory"),
    (["--memory", "nan"], "--memory"), (["--chunk", "0"], "--chunk"), (["--chat", "--tokens", "1"], "--chat"),
    (["--prompt", "x"], "--tokens"), (["--chat"], "--tokens"),
])  # fmt: skip
def test_request_refused_is_one_line_and_exit_code_2(small, program, args, word):
    code, out, err = program(*([] if "--weights" in args else ["--weights", small]), *args)
    assert (code, out, err.count("\n")) == (2, "", 1) and word in err and len(err) < 500


def test_request_too_large_for_the_memory_is_one_line(small, program, monkeypatch):
    def all_gone(*_, **__):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(dsv3, "forward", all_gone)
    code, _, err = program("--weights", small, "--tokens", "1")
    assert code == 2 and "Unable to allocate 9 GiB" in err.splitlines()[-1]


def test_memory_is_taken_freely_where_the_system_tells_nothing(small, program, monkeypatch):
    def no_proc(path, *_):
        raise FileNotFoundError(path)

    monkeypatch.setattr(dsv3.Path, "read_text", no_proc)  # as on Windows
    code, _, err = program("--weights", small, "--tokens", "1", "-n", 1, "--dtype", "float64")
    assert code == 0 and STATISTICS.fullmatch(err) and "peak memory 0 MB" in err
    w = dsv3.Checkpoint(small, SMALL, np.float64)
    assert w["lm_head.weight"] is w["lm_head.weight"] and not isinstance(w["lm_head.weight"], dsv3.Stored)


def test_logits_that_are_not_finite_are_refused(tmp_path, program):
    w = make_weights(SMALL) | {"lm_head.weight": np.full((31, 22), np.nan)}
    code, out, err = program("--weights", write_checkpoint(tmp_path / "w", SMALL, w), "--tokens", "1")
    assert code == 2 and not out.strip() and "finite" in err.splitlines()[-1]


@pytest.mark.parametrize("width, flags, drafts", [
    (512, [], True), (514, [], False), (512, ["--no-mtp"], False), (514, ["--mtp"], True),
])  # fmt: skip
def test_speculation_is_the_default_in_small_models(program, tmp_path, width, flags, drafts):
    cfg = replace(SMALL, hidden_size=width)
    write_checkpoint(tmp_path / "w", cfg, make_weights(cfg))
    code, _, err = program("--weights", tmp_path / "w", "--tokens", "1", "-n", 12, *flags)
    assert code == 0 and ("drafted 0" not in err) == drafts


@pytest.mark.parametrize("generation, config, ends", [
    (None, 1, [1]), (None, None, []), (None, [1, 2], [1, 2]), ([3, 4], 1, [3, 4]), (5, 1, [5]),
    ({}, 7, [7]),
])  # fmt: skip
def test_end_tokens_of_either_file_end_a_text(tmp_path, program, scripted, generation, config, ends):
    write_checkpoint(tmp_path / "w", SMALL, make_weights(SMALL))
    edit_config(tmp_path / "w", eos_token_id=config)
    if generation is not None:
        keys = generation if isinstance(generation, dict) else {"eos_token_id": generation}
        (tmp_path / "w" / "generation_config.json").write_text(json.dumps(keys))
    assert program("--weights", tmp_path / "w", "--tokens", "1")[0] == 0
    stop = scripted.asked[0][1]["stop"]
    assert [token for token in range(31) if token in stop] == ends


class Broken:
    """A CuPy that is there, but whose first kernel fails."""

    def __init__(self, error):
        self.error = error

    def ones(self, *_):
        raise self.error


@pytest.mark.parametrize("error", [
    ImportError("no reason in one line\nor two"), OSError("no reason in one line"),
    Exception("no reason in one line\n"),
    ModuleNotFoundError("no reason in one line", name="fastrlock"),
])  # fmt: skip
def test_device_auto_says_why_it_takes_the_cpu(small, program, monkeypatch, error):
    monkeypatch.setitem(sys.modules, "cupy", Broken(error))
    monkeypatch.setattr(dsv3, "xp", np)
    flags = ["--weights", small, "--tokens", "1 2", "-n", 3, "--device"]
    code, out, err = program(*flags, "auto")
    note, statistics = err.splitlines(keepends=True)
    assert (code, out) == (0, program(*flags, "cpu")[1]) and "no reason in one line\n" in note
    assert STATISTICS.fullmatch(statistics)
    code, out, err = program(*flags, "gpu")
    assert (code, out, err.count("\n")) == (2, "", 1) and "no reason in one line" in err


def test_device_auto_says_nothing_where_there_is_no_cupy(small, program, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(dsv3, "xp", np)
    flags = ["--weights", small, "--tokens", "1 2", "-n", 3, "--device"]
    assert STATISTICS.fullmatch(program(*flags, "auto")[2])
    code, out, err = program(*flags, "gpu")
    assert (code, out, err.count("\n")) == (2, "", 1) and "cupy" in err


def test_device_is_the_gpu_where_cupy_works(monkeypatch):
    works = types.SimpleNamespace(ones=np.ones)
    monkeypatch.setitem(sys.modules, "cupy", works)
    assert dsv3.choose_device("auto") is dsv3.choose_device("gpu") is works and dsv3.choose_device("cpu") is np


# ---- 11. Text and chat ---------------------------------------------------------------------------------------------


def test_text_is_never_printed_by_half_characters(program, scripted, monkeypatch):
    words = "na\u00efve caf\u00e9 \U0001f600 \u4f60\u597d."
    tokenizer = tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    scripted.made = [*tokenizer.encode(words, add_special_tokens=False).ids, 1]
    pieces = []
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=pieces.append, flush=lambda: None))
    assert program("-p", "x")[0] == 0
    assert len(scripted.made) > len(words) and "".join(pieces).strip() == words  # and the end token is no text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_begins_with_one_bos(program, scripted, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    bos = tokenizer.id_to_token(0)
    tokenizer.post_processor = tokenizers.processors.ByteLevel()  # as in releases, whose tokenizer adds none
    settings = {"add_bos_token": True, "bos_token": {"content": bos}}
    bare = shipped_with(tmp_path / "w", tokenizer=tokenizer.to_str(), tokenizer_config=settings)
    for directory in (WEIGHTS, bare):
        program("--weights", directory, "-p", "Tom", "-p", "", "-p", "Tom sat")
        tom, empty, sat = scripted.asked.pop()[0]
        assert empty == [0] and tom[0] == sat[0] == 0 and tom.count(0) == sat.count(0) == 1 and len(tom) > 1
    program("--weights", bare, "-p", f"{bos}Tom")
    assert scripted.asked.pop()[0] == [tom]
    none = shipped_with(tmp_path / "v", tokenizer=tokenizer.to_str(), tokenizer_config={"bos_token": bos})
    program("--weights", none, "-p", "Tom")
    assert scripted.asked.pop()[0] == [tom[1:]]


def test_text_is_not_cut_by_the_tokenizers_own_limits(program, scripted, tmp_path):
    tokenizer = json.loads((WEIGHTS / "tokenizer.json").read_text("utf-8"))
    tokenizer["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tokenizer["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    for directory in (WEIGHTS, shipped_with(tmp_path / "w", tokenizer=tokenizer)):
        program("--weights", directory, "-p", "Once upon a time there was a dog")
    assert scripted.asked[0][0] == scripted.asked[1][0]


@pytest.mark.parametrize("files, word", [
    ({"tokenizer": '{"model": 1}'}, "tokenizer.json"), ({"tokenizer": None}, "--tokens"),
    ({"tokenizer_config": "{"}, "tokenizer_config.json"), ({"generation_config": "[]"}, "generation_config.json"),
])  # fmt: skip
def test_text_files_malformed_are_refused_in_one_line(program, tmp_path, files, word):
    code, out, err = program("--weights", shipped_with(tmp_path / "w", **files), "-n", 1)
    assert (code, out, err.count("\n")) == (2, "", 1) and word in err


def test_chat_names_a_package_that_is_missing(program, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    code, out, err = program("--weights", shipped_with(tmp_path / "w", jinja=TEMPLATE), "--chat", "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1) and "jinja2.sandbox" in err


@pytest.mark.parametrize("flags", [["--chat", "-p", "x"], ["-p", "x"], ["--trace", "trace.npz"]])
def test_text_too_long_is_refused_in_one_line(program, tmp_path, monkeypatch, flags):
    """Before anything is printed or written, a conversation's turn too."""
    directory = shipped_with(tmp_path / "w", jinja=TEMPLATE)
    monkeypatch.chdir(tmp_path)
    code, out, err = program("--weights", directory, *flags, "-n", 1024)
    assert (code, out, err.count("\n")) == (2, "", 1) and "positions" in err and not Path("trace.npz").exists()


def test_chat_carries_the_conversation_in_the_template(program, scripted, tmp_path, monkeypatch):
    """From --prompt, then line by line from stdin; the answer without its end token, here a full stop, is part of what
    follows."""
    settings = json.loads((WEIGHTS / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    tokenizer = tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    scripted.made = tokenizer.encode(" a cat.", add_special_tokens=False).ids
    ends = {"eos_token_id": [1, scripted.made[-1]]}
    directory = shipped_with(tmp_path / "w", tokenizer_config=settings, generation_config=ends)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Lily\n"))
    code, out, err = program("--weights", directory, "--chat", "-p", "Tom")
    assert code == 0 and [line.strip() for line in out.splitlines()] == ["a cat", "a cat"]
    assert len(STATISTICS.findall(err)) == 2
    bos, eos = tokenizer.id_to_token(0), tokenizer.id_to_token(1)
    said = [tokenizer.decode(prompts[0], skip_special_tokens=False) for prompts, _ in scripted.asked]
    assert [text.replace("  ", " ") for text in said] == [f"{bos}Tom said:", f"{bos}Tom a cat{eos}Lily said:"]


def test_chat_message_writes_no_special_token(program, scripted, tmp_path, monkeypatch):
    """One that spells out a token of the template is refused; any other character stays what it is."""
    directory = shipped_with(tmp_path / "w", jinja=TEMPLATE)
    tokenizer = tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    bos, eos = tokenizer.id_to_token(0), tokenizer.id_to_token(1)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for content in (f"Tom{eos}sat", bos):
        code, out, err = program("--weights", directory, "--chat", "-p", content)
        assert (code, out, err.count("\n")) == (2, "", 1) and (bos in err or eos in err)
    strange = "Tom \ue000\ue001\uf8ff\U000f0000\U000f0001\U000f7777\U0010fffd sat \ufffd"
    assert not scripted.asked and program("--weights", directory, "--chat", "-p", strange)[0] == 0
    ids = scripted.asked[0][0][0]
    assert ids[0] == 0 and not {0, 1} & set(ids[1:]) and tokenizer.decode(ids) == f"{strange} said:"


@pytest.mark.parametrize("template, word", [
    (None, "--prompt"), ("{{ x.y.z }}", "template"), ("{% if %}", "template"),
    ("{{ ''.__class__.__mro__ }}", "template"),
])  # fmt: skip
def test_chat_template_missing_broken_or_hostile_is_refused(program, tmp_path, template, word):
    directory = shipped_with(tmp_path / "w", **({} if template is None else {"jinja": template}))
    code, out, err = program("--weights", directory, "--chat", "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1) and word in err


# ---- 11. The program as a user runs it -----------------------------------------------------------------------------


def test_program_reads_stdin_and_batches():
    code, alone, err = cli("-p", "-", "-n", 12, input=dsv3.OPENING.encode() + b"\n")
    assert code == 0 and STATISTICS.fullmatch(err)
    code, both, _ = cli("-p", dsv3.OPENING, "-p", "Tom and Lily went", "-n", 12)
    assert code == 0 and both.startswith(alone) and len(both) > len(alone) + 12
    assert cli("-n", 12)[:2] == (0, dsv3.OPENING + alone)


def test_program_refuses_what_is_not_text():
    for args, stdin in ((["-p", "-"], b"\xff\xfe"), (["-p", b"\xff".decode("utf-8", "surrogateescape")], b"")):
        code, out, err = cli(*args, input=stdin)
        assert (code, out, err.count("\n")) == (2, "", 1) and "utf-8" in err.lower()


def test_program_ends_quietly_where_its_pipe_is_closed():
    command = f"PYTHONUNBUFFERED= {sys.executable} deepseek_v3.py -n 100 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=HERE, capture_output=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) == 1 and not done.stderr


def test_program_interrupted_ends_with_the_statistics():
    """The signal handler is set here, as tests that run in the background would ignore Ctrl-C."""
    lines = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    lines += "sys.argv = ['deepseek_v3.py', '-n', '900']; runpy.run_path('deepseek_v3.py', run_name='__main__')"
    with subprocess.Popen([sys.executable, "-c", lines], cwd=HERE, stdout=-1, stderr=-1) as running:
        running.stdout.read(len(dsv3.OPENING) + 4)  # it has begun to generate
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and out.endswith(b"\n") and STATISTICS.fullmatch(err.decode())


def test_program_on_a_terminal_that_is_not_utf8_has_no_traceback():
    flags = ["-n", 100, "--temp", 9]
    assert not cli(*flags)[1].isascii()
    code, _, err = cli(*flags, env={"PYTHONIOENCODING": "ascii"})
    assert code == 2 and "ascii" in err.splitlines()[-1] and "Traceback" not in err


def test_program_has_no_traceback_where_its_streams_are_full():
    done = subprocess.run(["bash", "-c", f"{sys.executable} deepseek_v3.py -n 3 > /dev/full"], cwd=HERE,
                          capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode and b"Traceback" not in done.stderr and b"No space left" in done.stderr


# ---- The shipped checkpoint ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The shipped weights, and what Hugging Face transformers makes of them: index.json says how."""
    index = json.loads((WEIGHTS / "vectors" / "index.json").read_text("utf-8"))
    expected = load_file(WEIGHTS / "vectors" / "expected.safetensors")
    return types.SimpleNamespace(
        cfg=dsv3.read_config(WEIGHTS),
        story=index["shipped_story"],
        greedy=expected["shipped_story/0/tokens"].tolist(),
        text=index["shipped"],
        logits=expected["shipped/lm_head"],
    )


def test_shipped_model_has_all_of_the_structure(shipped):
    cfg, w = shipped.cfg, dsv3.Checkpoint(WEIGHTS, shipped.cfg)
    assert 0 < cfg.first_k_dense_replace < cfg.num_hidden_layers and cfg.q_lora_rank and cfg.rope_scaling
    assert cfg.n_shared_experts and 1 < cfg.topk_group < cfg.n_group and cfg.n_routed_experts >= 16
    assert dsv3.mtp_depth(w, cfg) == 1
    biases = [w[name] for name in w.shapes if name.endswith("e_score_correction_bias")]
    assert all(np.ptp(bias) > 0.01 for bias in biases)  # the balancing has moved them


def test_shipped_text_has_the_ids_of_hugging_face(shipped, program, scripted):
    program("-p", shipped.text["text"])
    program()
    assert [prompts for prompts, _ in scripted.asked] == [shipped.text["prompts"], shipped.story["prompts"]]


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("speculate", [False, True])
def test_shipped_story_is_that_of_hugging_face(shipped, speculate, chunk):
    """Token for token to its end, alone and in a batch, of which the other prompt ends earlier or later."""
    w, (prompt,), n = dsv3.Checkpoint(WEIGHTS, shipped.cfg), shipped.story["prompts"], len(shipped.greedy)
    stats = Counter()
    given = {"stop": [1], "speculate": speculate, "chunk": chunk}
    assert generated([prompt], w, shipped.cfg, 200, stats=stats, **given) == [shipped.greedy]
    assert (stats["accepted"] > 0.6 * stats["drafted"] > 0) == speculate
    assert generated([[0, 268], prompt], w, shipped.cfg, 60, **given)[1] == shipped.greedy[: min(60, n)]


def test_shipped_story_is_what_the_program_prints(shipped):
    tokenizer = tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    for flags in ([], ["--no-mtp", "--chunk", 3]):
        code, out, err = cli(*flags)
        assert (code, out) == (0, shipped.story["text"] + tokenizer.decode(shipped.greedy) + "\n")
        assert ("drafted 0," in err) == bool(flags)


# ---- Documents -----------------------------------------------------------------------------------------------------


def console_lines():
    """The README's commands, `$ ` taken off, each with the output shown below it."""
    for block in re.findall(r"```console\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S):
        for command in re.split(r"^\$ ", block, flags=re.M)[1:]:
            line, _, output = command.partition("\n")
            yield line, output


def test_readme_shows_what_its_commands_print(tmp_path):
    """Those of the page. config.json, where it is named, is the release's."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASE))
    shown = [(line.split("&& ")[-1], output) for line, output in console_lines() if output]
    shown = [(shlex.split(line), output) for line, output in shown if "python deepseek_v3.py" in line]
    assert shown
    for words, output in shown:
        code, out, err = cli(*(tmp_path / word if word == "config.json" else word for word in words[2:]))
        assert (code, out) == (0, output), err


def test_readme_names_what_exists():
    text, tests = (HERE / "README.md").read_text("utf-8"), (HERE / "test_deepseek_v3.py").read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (HERE / target).exists(), target
    for line, _ in console_lines():
        for path in re.findall(r"[\w./-]+\.(?:py|mjs|txt)\b", line):
            assert (HERE / path).exists(), line
    for selection in re.findall(r"-k \"?([\w ]+)", text):
        for word in set(selection.split()) - {"and", "or", "not"}:
            assert word == "NAME" or re.search(rf"^def test_\w*{word}", tests, re.M), word


def test_readme_python_runs(monkeypatch):
    monkeypatch.chdir(HERE)
    programs = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S)
    assert programs
    for program in programs:
        exec(program, {})


def test_docstring_examples_are_true():
    failed, attempted = doctest.testmod(dsv3)
    assert failed == 0 and attempted


def test_script_metadata_is_what_requirements_say():
    """What `uv run deepseek_v3.py` installs: the requirements above those of the tests."""
    source, required = (HERE / "deepseek_v3.py").read_text("utf-8"), (HERE / "requirements.txt").read_text("utf-8")
    metadata = re.match(r"# /// script\n(.*?)# ///\n", source, re.S)[1]
    needed = re.findall(r"^[\w>=.]+", required.partition("# Tests")[0], re.M)
    assert tomllib.loads(re.sub("^# ", "", metadata, flags=re.M))["dependencies"] == needed


def test_warnings_are_errors_except_in_hypothesis_own_report():
    """A failing property makes Hypothesis import packages that warn; an error there would end the whole run."""
    with pytest.raises(UserWarning):
        warnings.warn("any", UserWarning, stacklevel=1)
    warnings.warn("mypy_extensions.TypedDict is deprecated", DeprecationWarning, stacklevel=1)


# ---- A GPU: `pytest -m gpu -s`. The same checks run on a stand-in for CuPy in .ci/test_cupy.py ---------------------


@contextlib.contextmanager
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3, "xp", np)
        yield


def gpu_agrees_with_numpy_and_hugging_face(shipped, tmp_path):
    """float64 to 1e-12 of the largest value, float32 to 3e-5, over structures; the shipped model as HF computes it."""
    v2 = replace(SMALL, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
    plain = replace(SMALL, q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, rope_scaling=None)
    others = replace(SMALL, attention_bias=True, rope_interleave=False, tie_word_embeddings=True)
    precisions = [(np.float64, 1e-12), (np.float32, 3e-5)]
    for cfg, (dtype, tolerance) in itertools.product([SMALL, v2, plain, others], precisions):
        w = make_weights(cfg, dtype=dtype)
        prompts = [make_tokens(cfg, 0, 11).tolist(), [1]]
        with on_the_cpu():
            expected = dsv3.trace(prompts, w, cfg, None)
        for chunk in (1, 3, 1024):
            named = dsv3.trace(prompts, {name: dsv3.xp.asarray(x) for name, x in w.items()}, cfg, chunk)
            for name, x in expected.items():
                assert named[name].dtype == x.dtype
                assert_close(named[name], x, 0 if "indices" in name else tolerance)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-4)):
        named = dsv3.trace(shipped.text["prompts"], dsv3.Checkpoint(WEIGHTS, shipped.cfg, dtype), shipped.cfg)
        assert_close(named["lm_head"], shipped.logits, tolerance)


def gpu_tells_the_shipped_story(shipped, tmp_path):
    """Greedy: the tokens of Hugging Face. Sampled: those that NumPy draws from the same seed."""
    prompts, cfg = shipped.story["prompts"], shipped.cfg
    for speculate in (False, True):
        w, start = dsv3.Checkpoint(WEIGHTS, cfg), time.perf_counter()
        assert generated(prompts, w, cfg, len(shipped.greedy), speculate=speculate) == [shipped.greedy]
        print(f"the story, speculation {speculate}: {time.perf_counter() - start:.1f} s")
        sampled = generated([*prompts, [0]], w, cfg, 20, dsv3.Sampling(0.7, seed=3), speculate=speculate)
        with on_the_cpu():
            w = dsv3.Checkpoint(WEIGHTS, cfg)
            assert sampled == generated([*prompts, [0]], w, cfg, 20, dsv3.Sampling(0.7, seed=3), speculate=speculate)


def gpu_in_half_precision(shipped, tmp_path):
    """float16 is for speed: its logits are within 2 % of float64's, by their root mean square."""
    named = dsv3.trace(shipped.text["prompts"], dsv3.Checkpoint(WEIGHTS, shipped.cfg, np.float16), shipped.cfg)
    error = named["lm_head"] - shipped.logits
    assert named["lm_head"].dtype == np.float16
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(shipped.logits**2))


def gpu_streams_what_does_not_fit(shipped, tmp_path):
    directory = write_stored(tmp_path / "w", SMALL, quantised(make_weights(SMALL)))
    prompt = make_tokens(SMALL, 0, 9).tolist()
    with on_the_cpu():
        w = dsv3.Checkpoint(directory, SMALL, np.float64)
        logits, tokens = dsv3.trace([prompt], w, SMALL)["lm_head"], generated([prompt], w, SMALL, 9)
    for memory in (None, 40_000, 0):
        w = dsv3.Checkpoint(directory, SMALL, np.float64, memory)
        assert_close(dsv3.trace([prompt], w, SMALL)["lm_head"], logits)
        assert generated([prompt], w, SMALL, 9) == tokens


def gpu_decodes_at_the_speed_of_its_memory(shipped, tmp_path):
    """Prints how many kernels are launched per second; and the bytes of weights that decoding reads, beside what adding
    1 to a large array moves, for as many layers of a third of V3's width as fill a third of the memory. On the stand-in
    the small model, so that these lines run in every test."""
    xp, large = dsv3.xp, dsv3.xp.__name__ == "cupy"
    x, one = xp.zeros(2**28 if large else 2**8, np.float32), xp.zeros(1)
    for _ in range(2):  # the first time is for kernels to be compiled
        start = time.perf_counter()
        for _ in range(10):
            x = x + 1
        assert dsv3.to_host(x[:1]) >= 10
        memory = 20 * x.nbytes / (time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(1000):
            one = one + 1
        dsv3.to_host(one)
        launches = 1000 / (time.perf_counter() - start)
    print(f"\n{launches:,.0f} launches per second, {memory / 1e9:.0f} GB/s")
    for dtype in (np.float32, np.float16):
        cfg, w, n = replace(SMALL, num_nextn_predict_layers=0), {}, 50 if large else 6
        if large:
            xp.get_default_memory_pool().free_all_blocks()  # those of the dtype before
            cfg = dsv3.Config(vocab_size=32000, hidden_size=2048, num_hidden_layers=2, num_attention_heads=32,
                              moe_intermediate_size=1024, num_nextn_predict_layers=0, first_k_dense_replace=1)
            layer = 256 * 3 * 2048 * 1024 * np.dtype(dtype).itemsize  # bytes of one with experts
            cfg = replace(cfg, num_hidden_layers=int(xp.cuda.runtime.memGetInfo()[0] / 3 / layer) + 1)
        E = cfg.n_routed_experts
        for name, shape in dsv3.tensor_shapes(cfg).items():
            if ".experts.0." in name:
                w[name.replace(".0.", ".")] = xp.full((E, *shape), 0.01, dtype)
            elif ".experts." not in name:
                x = xp.full(shape, 0.01, np.float32 if ".mlp.gate." in name else dtype)
                w[name] = dsv3.Matrix(x) if len(shape) == 2 else x
        times = [time.perf_counter() for _ in dsv3.generate([[1]], w, cfg, n, speculate=False)]
        read = sum(math.prod(x.shape) * (cfg.num_experts_per_tok / E if ".experts." in name else 1)
                   for name, x in w.items() if "embed_tokens" not in name)  # fmt: skip
        rate = (n - 1 - n // 5) / (times[-1] - times[n // 5])
        share = rate * read * np.dtype(dtype).itemsize / memory
        print(f"{np.dtype(dtype)}, {cfg.num_hidden_layers} layers: {rate:.1f} tokens/s, {share:.1%} of that bandwidth")


GPU_CHECKS = [gpu_agrees_with_numpy_and_hugging_face, gpu_tells_the_shipped_story, gpu_in_half_precision,
              gpu_streams_what_does_not_fit, gpu_decodes_at_the_speed_of_its_memory]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("check", GPU_CHECKS)
def test_gpu(check, shipped, tmp_path, monkeypatch):
    try:
        monkeypatch.setattr(dsv3, "xp", dsv3.choose_device("gpu"))
    except dsv3.InputError as reason:
        pytest.skip(str(reason))
    dsv3.chosen_kernel.cache_clear()
    check(shipped, tmp_path)
