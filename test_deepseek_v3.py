"""The promises of deepseek_v3.py, as tests: absorption and cache equivalence first, then the rest.

    pytest                  the whole, some minute on two cores
    pytest -m gpu -s        on an NVIDIA GPU: parity, the story, speed

Properties try 25 examples; HYPOTHESIS_PROFILE=unshrunk repeats the same ones.
"""

import contextlib
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
import tracemalloc
import types
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
slow = [HealthCheck.too_slow]
settings.register_profile("default", max_examples=25, deadline=None, suppress_health_check=slow)
unshrunk = {"derandomize": True, "database": None, "phases": [Phase.explicit, Phase.generate]}
settings.register_profile("unshrunk", settings.get_profile("default"), **unshrunk)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@st.composite
def configs(draw, mtp=(0, 2)):
    """Configurations of every structure; mtp: the least and the greatest number of modules."""
    def upto(most, least=1):
        return draw(st.integers(least, most))
    def among(*values):
        return draw(st.sampled_from(values))
    groups, per_group, layers = upto(4), upto(4, 2), upto(3)
    kept = upto(groups)
    scaling = dsv3.Yarn(factor=among(1.0, 4.0, 40.0), mscale=among(0.707, 1.0),
                        original_max_position_embeddings=among(8, 4096))
    return dsv3.Config(
        vocab_size=upto(30, 5), hidden_size=upto(20, 4), num_hidden_layers=layers,
        num_attention_heads=upto(4), q_lora_rank=among(None, 3, 5, 9), kv_lora_rank=upto(9, 2),
        qk_nope_head_dim=upto(9), qk_rope_head_dim=2 * upto(4), v_head_dim=upto(9),
        intermediate_size=upto(12, 3), first_k_dense_replace=upto(layers - 1, 0),
        moe_intermediate_size=upto(6, 2), n_shared_experts=upto(2),
        n_routed_experts=groups * per_group, num_experts_per_tok=upto(kept * per_group),
        n_group=groups, topk_group=kept, routed_scaling_factor=among(1.0, 2.5),
        rms_norm_eps=among(1e-6, 1e-2), rope_theta=among(100.0, 1e4, 5e4),
        rope_scaling=among(None, scaling), max_position_embeddings=512,
        num_nextn_predict_layers=upto(mtp[1], mtp[0]),
    )


seeds = st.integers(0, 2**32 - 1)
SMALL = dsv3.Config(  # every letter of the key of axes has a size of its own
    vocab_size=31, hidden_size=22, num_hidden_layers=3, num_attention_heads=3, q_lora_rank=13,
    kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5, intermediate_size=17,
    first_k_dense_replace=1, moe_intermediate_size=9, n_routed_experts=12, num_experts_per_tok=6,
    n_group=4, topk_group=2, max_position_embeddings=512, num_nextn_predict_layers=2,
)


def make_weights(cfg, seed=0, dtype=np.float64):
    """Random weights of a size at which every part of the model matters."""
    rng, w = np.random.default_rng(seed), {}
    for name, shape in sorted(dsv3.tensor_shapes(cfg).items()):
        x = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif name.endswith("bias"):
            x = 0.1 * x
        elif len(shape) == 2 and "embed_tokens" not in name:
            x = x * 1.5 / math.sqrt(shape[1])
        w[name] = x.astype(dtype)
    return w


def make_tokens(cfg, seed, *shape):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape)


def assert_close(got, expected, tolerance=1e-12):
    """Finite, of one shape, and equal to `tolerance` of the largest expected value (at least 1)."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.all(np.isfinite(got)) and np.all(np.isfinite(expected))
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    assert float(np.max(np.abs(got - expected), initial=0)) <= tolerance * scale


def config_json(cfg):
    """The keys of a config.json that parse_config reads as cfg."""
    keys = asdict(cfg) | {"model_type": "deepseek_v3"}
    if cfg.rope_scaling:
        scaling = asdict(cfg.rope_scaling)
        keys["rope_scaling"] = scaling | {"type": "yarn", "mscale_all_dim": scaling["mscale"]}
    return keys


def write_checkpoint(directory, cfg, w, shards=1, dtype=np.float32):
    """A checkpoint in the Hugging Face layout: config.json; one file, or several and their index.
    dtype: of the tensors, a NumPy one or ml_dtypes.bfloat16; None: each as it is."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(cfg)))
    stored = {name: np.ascontiguousarray(x.astype(dtype or x.dtype)) for name, x in w.items()}
    if shards == 1:
        save_file(stored, directory / "model.safetensors")
        return directory
    names = sorted(stored)  # dealt out in turn, a scale to another file than its weight
    weight_map = {name: f"model-{n % shards + 1}.safetensors" for n, name in enumerate(names)}
    for file in set(weight_map.values()):
        held = {name: x for name, x in stored.items() if weight_map[name] == file}
        save_file(held, directory / file)
    index_says(directory, weight_map)
    return directory


def index_says(directory, weight_map):
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


# ---- Absorption: what a query meets is the same, whether keys are expanded or not ----------------
# Here and in the next part one form is compared with another. A fault that they share (m^2 left
# out, a latent without its norm, queries rotated wrongly) is caught by the parity, below.


def latent_inputs(cfg, seed, T, past, dtype=np.float64):
    """What the forms of MLA take: queries of T tokens, behind `past` others."""
    rng, H, C = np.random.default_rng(seed), cfg.num_attention_heads, cfg.kv_lora_rank
    sizes = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    q_nope, q_rope = (rng.standard_normal((T, H, size)).astype(dtype) for size in sizes)
    kv = rng.standard_normal((past + T, C + cfg.qk_rope_head_dim)).astype(dtype)
    up = rng.standard_normal((H * (cfg.qk_nope_head_dim + cfg.v_head_dim), C)) / math.sqrt(C)
    return q_nope, q_rope, kv, {"a.kv_b_proj.weight": up.astype(dtype)}, "a", cfg


ROUNDED = [(np.float64, 1e-12), (np.float32, 1e-5), (np.float16, 1e-2)]
TOKENS, PAST = st.integers(1, 5), st.integers(0, 5)


@pytest.mark.parametrize("dtype, tolerance", ROUNDED)
@given(cfg=configs(), seed=seeds, T=TOKENS, past=PAST)
def test_absorption_equals_naive(cfg, seed, T, past, dtype, tolerance):
    inputs = latent_inputs(cfg, seed, T, past, dtype)
    expected = dsv3.mla_naive(*inputs)
    for got in (dsv3.mla_absorbed(*inputs), dsv3.mla_naive(*inputs, dsv3.attention_in_pieces)):
        assert got.dtype == dtype
        assert_close(got, expected, tolerance)


@given(configs(), st.integers(1, 40), st.integers(0, 60))
def test_absorption_is_chosen_where_it_multiplies_less(cfg, T, past):
    """Of each form the products of one head. And where expanded keys and values find no room."""
    N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    C, S = cfg.kv_lora_rank, T + past
    naive = [(S, C, N + V), (T, N + R, S), (T, S, V)]
    absorbed = [(T, N, C), (T, C + R, S), (T, S, C + R), (T, C, V)]
    fewer = sum(map(math.prod, absorbed)) < sum(map(math.prod, naive))
    room = S * cfg.num_attention_heads * (N + R + V)
    for limit, absorbs in ((2**29, fewer), (room, fewer), (room - 1, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dsv3, "MAX_EXPANDED", limit)
            assert dsv3.absorbing_pays(T, S, cfg) == absorbs


@pytest.mark.parametrize("absorbs", [True, False])
def test_absorption_is_what_the_cache_runs_where_it_pays(monkeypatch, absorbs):
    monkeypatch.setattr(dsv3, "absorbing_pays", lambda T, S, cfg: (T, S) == (2, 2) and absorbs)
    monkeypatch.setattr(dsv3, "mla_absorbed", lambda *_: True)
    monkeypatch.setattr(dsv3, "mla_naive", lambda *_: False)
    q_nope, q_rope, kv, *rest = latent_inputs(SMALL, 0, 2, 0)
    assert dsv3.mla_cached(dsv3.Cache(2), q_nope, q_rope, kv, *rest) == absorbs


# ---- Cache: in any chunks, with any tokens rejected, the same arrays as without ------------------


@contextlib.contextmanager
def forced(absorbs):
    """Within the block not the cheaper form of attention runs, but the one asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3, "absorbing_pays", lambda *_: absorbs)
        yield


FORMS = pytest.mark.parametrize("absorbs", [True, False])
STEPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=5)


@FORMS
@given(cfg=configs(), seed=seeds, steps=STEPS, chunk=st.integers(1, 7))
def test_cache_any_steps_equal_one_pass_without(absorbs, cfg, seed, steps, chunk):
    """Of a step's tokens the last ones are wrong, and rejected; whatever they leave is not read."""
    w, cache, parts = make_weights(cfg, seed), dsv3.Cache(22), []
    text, wrong = make_tokens(cfg, seed, 21), make_tokens(cfg, seed + 1, 2)
    for count, rejected in steps:
        start, fed = cache.length, [*text[cache.length :][:count], *wrong[:rejected]]
        if fed:
            with forced(absorbs):
                h = dsv3.cached_pass(dsv3.forward, [np.array(fed)], w, cfg, cache, chunk)
            assert cache.length == start + len(fed)
            parts.append(h[:count])
            cache.length = start + count
            for entries in cache.layers.values():
                entries[cache.length :] = np.nan
    assume(cache.length)
    assert_close(np.concatenate(parts), dsv3.forward(text[: cache.length], w, cfg))


PROMPT = st.lists(st.integers(0, 4), min_size=1, max_size=7)
CHUNKS = [1, 2, 3, 5, 100]


@FORMS
@given(cfg=configs(), seed=seeds, prompt=PROMPT)
def test_cache_every_named_array_in_any_chunks(absorbs, cfg, seed, prompt):
    w = make_weights(cfg, seed)
    expected = dsv3.trace(prompt, w, cfg, None)
    for chunk in CHUNKS:
        with forced(absorbs):
            got = dsv3.trace(prompt, w, cfg, chunk)
        assert list(got) == list(expected)
        for name, x in got.items():
            assert_close(x, expected[name])


@FORMS
@given(cfg=configs(), seed=seeds, chunk=st.sampled_from(CHUNKS))
def test_cache_in_float32(absorbs, cfg, seed, chunk):
    """With all experts chosen, as which ones are may turn on float32's rounding."""
    cfg = replace(cfg, n_group=1, topk_group=1, num_experts_per_tok=cfg.n_routed_experts)
    w, prompt = make_weights(cfg, seed, np.float32), make_tokens(cfg, seed, 9).tolist()
    with forced(absorbs):
        got = dsv3.trace(prompt, w, cfg, chunk)["model.norm"]
    assert got.dtype == np.float32
    assert_close(got, dsv3.trace(prompt, w, cfg, None)["model.norm"], 1e-4)


@pytest.mark.parametrize("tokens", [[1], [1, 2]])
def test_cache_never_overflows_in_silence(tokens):
    cache, w = dsv3.Cache(2), make_weights(SMALL)
    dsv3.cached_pass(dsv3.forward, [np.array([3, 4])], w, SMALL, cache, 2)
    with pytest.raises(AssertionError):
        dsv3.cached_pass(dsv3.forward, [np.array(tokens)], w, SMALL, cache, 2)


def test_cache_holds_a_latent_and_a_rotated_key_per_token():
    cache, token_T = dsv3.Cache(9), np.array([1, 2, 3, 4])
    with dsv3.recording() as named:
        dsv3.cached_pass(dsv3.forward, [token_T], make_weights(SMALL), SMALL, cache, 3)
    assert list(cache.layers) == [f"model.layers.{layer}.self_attn" for layer in range(3)]
    for name, entries in cache.layers.items():
        made = [named[f"{name}.{part}"] for part in ("kv_latent", "k_rope")]
        assert entries.shape == (9, 10 + 4)
        assert np.array_equal(entries[:4], np.concatenate(made, axis=-1))


# ---- Attention in pieces, chosen experts ---------------------------------------------------------


def attention_inputs(seed, H, J, T, past):
    rng, S = np.random.default_rng(seed), T + past
    return [rng.standard_normal(shape) for shape in ((T, H, 5), (S, J, 5), (S, J, 3))]


def plain_head(q, keys, values, scale):
    """Eq. (10), one query of one head: the mean of the values, weighted by e^score."""
    scores = [scale * sum(q * k) for k in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(e * v for e, v in zip(weights, values, strict=True)) / sum(weights)


HEADS = st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3), (6, 2), (1, 1)])


@given(seeds, HEADS, TOKENS, PAST)
def test_attention_is_mha_gqa_or_mqa_by_its_key_heads(seed, heads, T, past):
    """Eq. (10) in each: the token at `past` + t sees as many positions before it."""
    (H, J), (q, k, v) = heads, attention_inputs(seed, *heads, T, past)
    got = dsv3.attention(q, k, v, 0.7)
    assert got.shape == (T, H, 3)
    for t, h in np.ndindex(T, H):
        seen, j = past + t + 1, h // (H // J)
        assert_close(got[t, h], plain_head(q[t, h], k[:seen, j], v[:seen, j], 0.7))


@given(seeds, HEADS, TOKENS, PAST, st.integers(1, 300), st.integers(1, 4))
def test_attention_in_pieces_is_the_definition(seed, heads, T, past, scores, queries):
    inputs = attention_inputs(seed, *heads, T, past)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3, "MAX_SCORES", scores)
        patch.setattr(dsv3, "MIN_QUERIES", queries)
        assert_close(dsv3.attention_in_pieces(*inputs, 0.7), dsv3.attention(*inputs, 0.7))


def test_attention_in_pieces_is_wide_and_rounded_once():
    half = [x.astype(np.float16) for x in attention_inputs(0, 6, 3, 5, 4)]
    wide = dsv3.attention_in_pieces(*(x.astype(np.float32) for x in half), 0.7)
    assert np.array_equal(dsv3.attention_in_pieces(*half, 0.7), wide.astype(np.float16))


@pytest.mark.parametrize("J", [1, 8])
def test_attention_in_pieces_does_not_hold_all_scores(J):
    inputs = attention_inputs(0, 8, J, 1024, 0)
    tracemalloc.start()
    dsv3.attention_in_pieces(*inputs, 0.7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 1024 * 1024 * 8 / 6


def moe_inputs(cfg, seed):
    """x of four tokens, weights, an MLP of experts, and its choice."""
    w, name = make_weights(cfg, seed), f"model.layers.{cfg.num_hidden_layers - 1}.mlp"
    x = np.random.default_rng(seed).standard_normal((4, cfg.hidden_size))
    return x, w, name, *dsv3.route(x, w, name, cfg)


@given(configs(), seeds)
def test_experts_chosen_equal_the_sum_over_all(cfg, seed):
    x, w, name, index, gate = moe_inputs(cfg, seed)
    expected = np.zeros(x.shape)
    for t, k in np.ndindex(index.shape):
        expected[t] += gate[t, k] * dsv3.swiglu(x[t], w, f"{name}.experts.{index[t, k]}")
    for experts in (dsv3.moe_all, dsv3.moe_chosen):
        assert_close(experts(x, w, name, index, gate, cfg), expected)


def test_experts_not_chosen_are_not_read():
    x, w, name, index, gate = moe_inputs(SMALL, 0)
    given, unread = (x[:1], w, name, index[:1], gate[:1], SMALL), set(range(12)) - {*index[0]}
    expected, gone = dsv3.moe_all(*given), [f"{name}.experts.{e}." for e in unread]
    for tensor in [tensor for tensor in w if tensor.startswith(tuple(gone))]:
        del w[tensor]
    assert_close(dsv3.moe_chosen(*given), expected)


# ---- Components ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_model_computes_in_the_dtype_of_its_weights(dtype, chunk):
    """Except for the router, which is in float32 or better."""
    for name, x in dsv3.trace([1, 2, 3], make_weights(SMALL, dtype=dtype), SMALL, chunk).items():
        wide = np.promote_types(dtype, np.float32) if ".gate." in name else dtype
        assert x.dtype == (np.int64 if name.endswith("indices") else wide), name


@given(configs(), seeds, st.integers(1, 7))
def test_model_future_never_changes_the_past(cfg, seed, t):
    w, tokens = make_weights(cfg, seed), make_tokens(cfg, seed, 8)
    changed = tokens.copy()
    changed[t:] = (changed[t:] + 1) % cfg.vocab_size
    h, g = dsv3.forward(tokens, w, cfg), dsv3.forward(changed, w, cfg)
    assert_close(h[:t], g[:t])
    for k in range(1, cfg.num_nextn_predict_layers + 1):  # state i has seen tokens up to i + k
        h = dsv3.mtp(k, h[: 8 - k], tokens[k:], w, cfg)
        g = dsv3.mtp(k, g[: 8 - k], changed[k:], w, cfg)
        assert_close(h[: max(0, t - k)], g[: max(0, t - k)])
        assert t < k or np.abs(h[t - k] - g[t - k]).max() > 1e-9


@given(configs(), seeds, st.sampled_from([40, 500]))
def test_model_positions_matter_by_their_differences(cfg, seed, shift):
    """The same tokens `shift` positions later, where no key before them is seen."""
    w, name = make_weights(cfg, seed), "model.layers.0.self_attn"
    x = w["model.embed_tokens.weight"][make_tokens(cfg, seed, 5)]
    first, later = (dsv3.rotations(start, 5, cfg, np.float64) for start in (0, shift))
    assert_close(dsv3.mla(x, w, name, cfg, later), dsv3.mla(x, w, name, cfg, first))


def test_model_recording_nests_and_stops():
    with dsv3.recording() as outer:
        dsv3.record("a", np.array([1]))
        with dsv3.recording() as inner:
            dsv3.record("a", np.array([2]))
            dsv3.record("a", np.array([3]))
        with pytest.raises(ZeroDivisionError), dsv3.recording():
            raise ZeroDivisionError
        dsv3.record("a", np.array([4]))
    dsv3.record("a", np.array([5]))
    assert inner["a"].tolist() == [2, 3] and outer["a"].tolist() == [1, 4]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_softmax_sigmoid_and_silu_never_overflow(dtype):
    extreme = np.array([-1e4, -100, -1, 0, 1, 100, 1e4], dtype)
    with np.errstate(all="raise", under="ignore"):
        y, z, p = dsv3.sigmoid(extreme), dsv3.silu(extreme), dsv3.softmax(extreme)
        even = dsv3.softmax(np.zeros(70000, dtype))  # their sum overflows float16
    exact = [1 / (1 + math.exp(-float(v))) if v > -700 else 0.0 for v in extreme]
    eps = 4 * np.finfo(dtype).eps
    assert y.dtype == p.dtype == z.dtype == dtype and np.allclose(y, exact, rtol=0, atol=eps)
    assert p[-1] == 1 and np.all(even == dtype(1 / 70000))
    assert np.allclose(z, extreme * exact, rtol=eps, atol=1e-40)
    x = np.linspace(-9, 9, 300).astype(dtype)
    for function in (dsv3.sigmoid, dsv3.silu, dsv3.softmax):  # computed wide, rounded once
        assert np.array_equal(function(x), function(dsv3.wide(x)).astype(dtype))
    tiny = dsv3.wide(np.linspace(-80, 80, 999).astype(dtype))  # gates are quotients of affinities
    exact = [1 / (1 + math.exp(-float(v))) for v in tiny]
    assert np.allclose(dsv3.sigmoid(tiny), exact, rtol=4 * np.finfo(tiny.dtype).eps, atol=0)


def test_rope_phases_are_exact_at_the_last_position():
    """Angles of up to 163,839, reduced with pi to 60 digits; in float32 they are off by 5e-3."""
    rotation_P = dsv3.rotations(163839, 1, dsv3.Config(rope_scaling=None), np.float64)[0]
    turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
    angles = [float(163839 * Decimal(10000) ** (Decimal(-2 * j) / 64) % turn) for j in range(32)]
    assert_close(rotation_P, np.exp(1j * np.array(angles)), 1e-10)


def test_yarn_of_the_671b_model_in_numbers():
    """Frequencies of the ramp (factor 40, original context 4096), and mscale squared."""

    def ramp(cfg):
        plain = dsv3.rope_frequencies(replace(cfg, rope_scaling=None))
        return dsv3.rope_frequencies(cfg) / plain

    cfg, wanted = dsv3.Config(), [0.05623413, 0.03900693, 0.0055, 1.7782794e-4]
    assert np.all(ramp(cfg)[:11] == 1) and np.allclose(ramp(cfg)[23:], 1 / 40, rtol=1e-15)
    assert np.allclose(dsv3.rope_frequencies(cfg)[[10, 11, 16, 22]], wanted, rtol=1e-6)
    assert math.isclose(dsv3.softmax_scale(cfg), 0.1352338, rel_tol=1e-6)
    yarn = replace(cfg.rope_scaling, factor=32.0, beta_fast=1.0)
    k2 = replace(cfg, rope_theta=5e4, rope_scaling=yarn)  # a ramp without width
    assert math.isclose(dsv3.softmax_scale(k2), 0.1308608, rel_tol=1e-6)
    assert np.allclose(ramp(k2)[[19, 20]], [1, 1 / 32])
    yarn = dsv3.Yarn(4.0, 2**17, beta_fast=4096.0)  # its range, 1 to 9, is held at R - 1 = 7
    held = replace(cfg, qk_rope_head_dim=8, rope_theta=100.0, rope_scaling=yarn)
    assert np.allclose(ramp(held), [1, 1, 1 - 0.75 / 6, 1 - 0.75 / 3])


def plain_route(x, w, name, cfg):
    """Eqs. (13)-(16) with groups, for one token -> {expert: gate}, best first."""
    score = [1 / (1 + math.exp(-float(row @ x))) for row in w[f"{name}.gate.weight"]]
    biased = list(score + w[f"{name}.gate.e_score_correction_bias"])
    size = len(score) // cfg.n_group
    rank = [sum(sorted(biased[g * size :][:size])[-2:]) for g in range(cfg.n_group)]
    kept = sorted(range(cfg.n_group), key=lambda g: (-rank[g], g))[: cfg.topk_group]
    candidates = [e for e in range(len(score)) if e // size in kept]
    chosen = sorted(candidates, key=lambda e: (-biased[e], e))[: cfg.num_experts_per_tok]
    total = sum(score[e] for e in chosen)
    return {e: score[e] / total * cfg.routed_scaling_factor for e in chosen}


def check_routing(x, w, cfg):
    index, gate = dsv3.route(x, w, "mlp", cfg)
    for x_t, index_t, gate_t in zip(x, index, gate, strict=True):
        expected = plain_route(x_t, w, "mlp", cfg)
        assert index_t.tolist() == list(expected)
        assert_close(gate_t, list(expected.values()))


@given(configs(), seeds, st.sampled_from([0.0, 3.0, -5.0]))
def test_routing_is_the_equations_token_by_token(cfg, seed, shift):
    """With biases about 0, and so negative that every biased affinity is."""
    rng, E = np.random.default_rng(seed), cfg.n_routed_experts
    bias = 0.2 * rng.standard_normal(E) + shift
    gate = rng.standard_normal((E, cfg.hidden_size))
    w = {"mlp.gate.weight": gate, "mlp.gate.e_score_correction_bias": bias}
    check_routing(rng.standard_normal((6, cfg.hidden_size)), w, cfg)


@given(configs(), st.lists(st.sampled_from([0.0, 0.25, -0.5]), min_size=16, max_size=16))
def test_routing_ties_of_experts_and_of_groups(cfg, values):
    """Equal affinities and few biases: the lowest index wins."""
    w = {"mlp.gate.weight": np.zeros((cfg.n_routed_experts, cfg.hidden_size))}
    w["mlp.gate.e_score_correction_bias"] = np.array(values[: cfg.n_routed_experts])
    check_routing(np.ones((1, cfg.hidden_size)), w, cfg)


@given(st.lists(st.integers(0, 9), min_size=1), st.sampled_from([np.float32, np.float64]))
def test_balance_bias_update_as_printed(loads, dtype):
    mean, bias = sum(loads) / len(loads), np.linspace(-1, 1, len(loads)).astype(dtype)
    got = dsv3.update_bias(bias, np.array(loads), 0.125)
    steps = [0.125 if load < mean else -0.125 if load > mean else 0 for load in loads]
    assert got.dtype == dtype and np.array_equal(got, bias + np.array(steps, dtype))


def plain_balance(score, K):
    """Eqs. (17)-(20) of one sequence."""
    T, E, loss = len(score), len(score[0]), 0.0
    chosen = [sorted(range(E), key=lambda e, s=s: (-s[e], e))[:K] for s in score]
    for e in range(E):
        f = E / (K * T) * sum(e in each for each in chosen)
        loss += f * sum(s[e] / sum(s) for s in score) / T
    return loss


@given(configs(), seeds)
def test_balance_loss_as_printed(cfg, seed):
    """Even affinities give exactly 1."""
    score = np.random.default_rng(seed).random((5, cfg.n_routed_experts))
    assert_close(dsv3.balance_loss(score, cfg), plain_balance(score, cfg.num_experts_per_tok))
    assert_close(dsv3.balance_loss(np.ones_like(score), cfg), 1.0)


@given(configs(mtp=(0, 3)), seeds)
def test_objective_as_printed(cfg, seed):
    """Eqs. (24), (25) term by term, of the logits of a trace; and the loads."""
    w, tokens, T = make_weights(cfg, seed), make_tokens(cfg, seed, 8).tolist(), 7
    total, parts = dsv3.training_objective(w, tokens, cfg, 0.4, 0.1)
    named, balance = dsv3.trace(tokens[:T], w, cfg, None), 0
    logits = [x for name, x in named.items() if name.endswith(("lm_head", "shared_head"))]
    losses = np.zeros(1 + cfg.num_nextn_predict_layers)
    for k, i in ((k, i) for k, logits_k in enumerate(logits) for i in range(len(logits_k))):
        row, target = logits[k][i], tokens[i + k + 1]  # the state i of module k predicts it
        losses[k] += (math.log(sum(map(math.exp, row))) - row[target]) / T
    assert_close([parts["main"], *parts["mtp"]], losses)
    routers = [name.removesuffix(".scores") for name in named if name.endswith(".gate.scores")]
    assert list(parts["load"]) == routers
    for router in routers:
        balance += plain_balance(named[f"{router}.scores"], cfg.num_experts_per_tok)
        load = Counter(named[f"{router}.indices"].ravel().tolist())
        assert parts["load"][router].tolist() == [load[e] for e in range(cfg.n_routed_experts)]
    assert_close(parts["balance"], balance)
    mtp_loss = losses[1:].sum() / max(1, cfg.num_nextn_predict_layers)
    assert_close(total, losses[0] + 0.4 * mtp_loss + 0.1 * balance)
    default = losses[0] + 0.3 * mtp_loss + 1e-4 * balance
    assert_close(dsv3.training_objective(w, tokens, cfg)[0], default)


# ---- Names tell the shapes -----------------------------------------------------------------------

CALL = "TSJXY"  # letters that a call sizes; each has one size within a function
LETTERS = replace(SMALL, qk_rope_head_dim=18)  # every other letter has a size of its own


def test_names_tell_the_shapes():
    """As each function of the page returns, its arrays have the shapes that their names tell."""
    cfg, w, lies, seen = LETTERS, make_weights(LETTERS), [], set()
    sizes = [cfg.hidden_size, cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim,
             cfg.v_head_dim, cfg.kv_lora_rank, cfg.q_lora_rank, cfg.n_routed_experts,
             cfg.num_experts_per_tok, cfg.n_group, cfg.vocab_size, cfg.qk_rope_head_dim // 2,
             cfg.kv_lora_rank + cfg.qk_rope_head_dim]
    fixed = dict(zip("DHNRVCQEKGWPL", sizes, strict=True))
    assert len(set(sizes)) == len(sizes)

    def look(frame, event, _):
        if event != "return" or frame.f_code.co_filename != dsv3.__file__:
            return
        sizes = dict(fixed)
        for name, x in list(frame.f_locals.items()):
            suffix = re.fullmatch(r"\w+_([A-Z]+)", name)
            if suffix and hasattr(x, "shape"):
                seen.add(suffix[1])
                known = all(letter in fixed or letter in CALL for letter in suffix[1])
                pairs, fits = zip(suffix[1], x.shape, strict=False), len(suffix[1]) == x.ndim
                if not (known and fits and all(sizes.setdefault(a, n) == n for a, n in pairs)):
                    lies.append(f"{frame.f_code.co_name}: {name} has shape {x.shape}, {sizes}")

    sys.setprofile(look)
    try:
        for chunk in (None, 1, 3):
            dsv3.trace([1, 2, 3, 4, 5], w, cfg, chunk)
        prompt = make_tokens(cfg, 1, 40).tolist()
        list(dsv3.generate(prompt, w, cfg, 5, dsv3.Sampling(1.0, top_k=7, top_p=0.9)))
        load = dsv3.training_objective(w, make_tokens(cfg, 2, 9), cfg)[1]["load"]
        dsv3.update_bias(np.zeros(12), next(iter(load.values())), 0.1)
    finally:
        sys.setprofile(None)
    assert not lies, "\n".join(lies[:5])
    key = set(re.findall(r"\b[A-Z](?=  |, Y  )", dsv3.__doc__))  # the header's
    assert len(seen) > 40 and set("".join(seen)) == key


# ---- The definitions under JAX -------------------------------------------------------------------


@pytest.fixture
def jax(monkeypatch):
    """The page's namespace is jax.numpy, in which a sort is always stable and knows no `kind`."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    jax.config.update("jax_enable_x64", True)
    monkeypatch.setattr(dsv3, "xp", jax.numpy)
    stable = lambda score, k: jax.numpy.argsort(-score, axis=-1)[..., :k]  # noqa: E731
    monkeypatch.setattr(dsv3, "top_k", stable)
    return jax


def test_jax_runs_the_definitions_in_jit_grad_and_vmap(jax, monkeypatch):
    """The objective of two sequences and its gradient, against NumPy and finite differences, in
    float64."""
    cfg = replace(SMALL, n_routed_experts=4, n_group=2, num_experts_per_tok=3,
                  num_hidden_layers=2, num_nextn_predict_layers=1)
    w, tokens, rng = make_weights(cfg, 5), make_tokens(cfg, 3, 2, 7), np.random.default_rng(0)

    def objective(w, token_X):
        return dsv3.training_objective(w, token_X, cfg)[0]

    both = jax.vmap(objective, (None, 0))
    value, grad = jax.jit(jax.value_and_grad(lambda w: both(w, tokens).mean()))(w)
    monkeypatch.undo()
    step = {name: 1e-6 * rng.standard_normal(x.shape) for name, x in w.items()}
    step |= {name: 0 for name in w if name.endswith("correction_bias")}
    moved = [{name: w[name] + sign * step[name] for name in w} for sign in (0, 1, -1)]
    here, ahead, behind = (np.mean([objective(w, row) for row in tokens]) for w in moved)
    assert_close(value, here)
    slope = sum(np.sum(np.asarray(grad[name]) * step[name]) for name in w)
    assert slope == pytest.approx((ahead - behind) / 2, rel=1e-4)
    for name, g in grad.items():
        assert np.asarray(g).any() == (not name.endswith("e_score_correction_bias")), name


def test_jax_gradients_of_sigmoid_silu_and_softmax_are_finite(jax):
    x = np.array([-100, -80, -1, 0, 1, 100], np.float32)
    s = 1 / (1 + np.exp(-x.astype(np.float64)))
    right = {dsv3.sigmoid: s * (1 - s), dsv3.silu: s + x * s * (1 - s)}
    for function, expected in right.items():
        got = jax.grad(lambda x: function(x).sum())(x)
        assert got.dtype == np.float32
        assert np.allclose(got, expected, rtol=1e-5, atol=1e-37)
    p, weights = np.exp(x.astype(np.float64) - 100), np.arange(6, dtype=np.float32)
    got = jax.grad(lambda x: (dsv3.softmax(x) * weights).sum())(x)
    assert np.allclose(got, p * (weights - (p * weights).sum() / p.sum()) / p.sum(), atol=1e-6)


# ---- Parity with Hugging Face --------------------------------------------------------------------
# What transformers 5.23.0 computed for the cases of weights/vectors/index.json is said there.

VECTORS = WEIGHTS / "vectors"
sys.path.insert(0, str(VECTORS))
cases = importlib.import_module("cases")
INDEX, EXPECTED = cases.read_index(), cases.read_expected()


@functools.cache
def case_model(name, dtype):
    """Configuration and weights of a case, in the dtype of the computation."""
    if INDEX[name].get("checkpoint") == "shipped":
        cfg = dsv3.read_config(WEIGHTS)
        return cfg, dsv3.Checkpoint(WEIGHTS, cfg, dtype)
    cfg, wide = dsv3.parse_config(INDEX[name]["config"]), np.promote_types(dtype, np.float32)
    w = {t: cases.weight(INDEX[name], t, shape) for t, shape in dsv3.tensor_shapes(cfg).items()}
    return cfg, {t: x.astype(wide if ".mlp.gate." in t else dtype) for t, x in w.items()}


def named_cases(do, **given):
    given["do"] = do
    return [name for name, case in INDEX.items() if given.items() <= case.items()]


HALF = named_cases("trace", dtype="float16")
PRECISIONS = [(name, np.float16, 1e-5) for name in HALF]
for name in (n for n in named_cases("trace") if n not in HALF and "start" not in INDEX[n]):
    PRECISIONS += [(name, np.float64, 1e-12), (name, np.float32, 3e-5)]


@pytest.mark.parametrize("name, dtype, tolerance", PRECISIONS)
def test_parity_of_named_arrays(name, dtype, tolerance):
    """Relative to an array's rms; the chosen experts are the same. Whole, token by token, in parts,
    and as the program runs it."""
    (cfg, w), prompts = case_model(name, dtype), INDEX[name]["prompts"]
    for chunk in (None, 1, 3, 1024):
        named = {}
        for n, prompt in enumerate(prompts):
            row = f"{n}/" if len(prompts) > 1 else ""
            named |= {f"{row}{key}": x for key, x in dsv3.trace(prompt, w, cfg, chunk).items()}
        for array in INDEX[name]["arrays"]:
            got, expected = named[array], EXPECTED[f"{name}/{array}"]
            if array.endswith((".gate.indices", ".gate.weights")):  # listed by expert
                order = np.argsort(named[array.replace("weights", "indices")], axis=-1)
                got = np.take_along_axis(got, order, axis=-1)
            rms = math.sqrt(np.mean(expected.astype(np.float64) ** 2))
            most = 0 if array.endswith("indices") else tolerance * rms
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() <= most, (array, chunk)


@contextlib.contextmanager
def verdicts():
    """Yields a list, of (draft, accepted) for every draft that is verified within this block."""
    seen, verify = [], dsv3.verify

    def watched(p_W, q_W, draft, rng):
        accepted, token = verify(p_W, q_W, draft, rng)
        seen.append((draft, int(accepted)))
        return accepted, token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3, "verify", watched)
        yield seen


GENERATE = [(name, dtype, chunk) for name in named_cases("generate")
            for dtype in (np.float64, np.float32) for chunk in (1, 3, 1024)
            if "config" in INDEX[name] or (dtype, chunk) == (np.float32, 1024)]


@pytest.mark.parametrize("name, dtype, chunk", GENERATE)
def test_parity_of_greedy_tokens_drafts_and_acceptances(name, dtype, chunk):
    (cfg, w), case = case_model(name, dtype), INDEX[name]
    for n, prompt in enumerate(case["prompts"]):
        given = prompt, w, cfg, case["max_tokens"], None, case.get("end_tokens", ())
        tokens = EXPECTED[f"{name}/{n}/tokens"].tolist()
        assert list(dsv3.generate(*given, speculate=False, chunk=chunk)) == tokens
        with verdicts() as seen:
            assert list(dsv3.generate(*given, chunk=chunk)) == tokens
        if case["speculate"]:
            drafts, accepted = (EXPECTED[f"{name}/{n}/{key}"] for key in ("drafts", "accepted"))
            assert seen == list(zip(drafts, accepted, strict=True))


# ---- Generation ----------------------------------------------------------------------------------

GUESSABLE = replace(SMALL, vocab_size=4, num_nextn_predict_layers=1)  # one draft in four is right
TINY = replace(GUESSABLE, vocab_size=3, num_hidden_layers=1, first_k_dense_replace=0)


@given(configs(), seeds, PROMPT, st.integers(0, 10), st.sampled_from([1, 3, 1024]))
def test_generation_greedy_speculation_changes_no_token(cfg, seed, prompt, n, chunk):
    cfg, stats = replace(cfg, vocab_size=5), Counter()
    w = make_weights(cfg, seed)
    expected = dsv3.generate_greedy(prompt, w, cfg, n)
    assert list(dsv3.generate(prompt, w, cfg, n, speculate=False, chunk=chunk)) == expected
    with verdicts() as seen:
        assert list(dsv3.generate(prompt, w, cfg, n, stats=stats, chunk=chunk)) == expected
    accepted = sum(accepted for _, accepted in seen)
    assert (stats["drafted"], stats["accepted"]) == (len(seen), accepted)
    assert (stats["drafted"] > 0) == (n > 1 and cfg.num_nextn_predict_layers > 0)


class Chance:
    """A random stream of which only `random() * q < p` is asked: true with probability p / q."""

    def __init__(self, choose):
        self.choose = choose

    def random(self):
        return self

    def __mul__(self, q):
        self.q = q
        return self

    def __lt__(self, p):
        accepts = min(1.0, p / self.q)
        return bool(self.choose([1 - accepts, accepts]))


def paths(run):
    """Every sequence of choices that `run`, given a random stream, can make by it and by dsv3.draw
    -> (probability, result) of each."""
    waiting = [[]]
    while waiting:
        path, probability, at = waiting.pop(), [1.0], itertools.count()

        def choose(p, rng=None, path=path, probability=probability, at=at):
            i, options = next(at), np.flatnonzero(p)
            if i == len(path):
                waiting.extend([*path, int(option)] for option in options[1:])
                path.append(int(options[0]))
            probability[0] *= p[path[i]]
            return path[i]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dsv3, "draw", choose)
            patch.setattr(np.random, "default_rng", lambda seed: Chance(choose))
            result = run(Chance(choose))
        yield probability[0], result


@pytest.mark.parametrize("sampling", [
    dsv3.Sampling(1.0), dsv3.Sampling(0.5, top_k=2), dsv3.Sampling(2.0, top_p=0.8)])
@pytest.mark.parametrize("n, stop", [(2, ()), (4, {2})])
def test_speculation_has_exactly_the_main_models_distribution(sampling, n, stop):
    """All ways in which a few tokens of a vocabulary of three can be made, their probabilities
    added up."""
    w, totals = make_weights(TINY, 4), [Counter(), Counter()]
    for total, speculate in zip(totals, (False, True), strict=True):
        made = paths(lambda _: list(dsv3.generate([1, 2], w, TINY, n, sampling, stop, speculate)))
        for probability, tokens in made:
            total[str(tokens)] += probability
    assert set(totals[0]) == set(totals[1]) and len(totals[0]) > 3
    assert_close([totals[1][text] for text in totals[0]], list(totals[0].values()))
    assert_close(sum(totals[0].values()), 1.0)


NUMBERS = st.integers(0, 9)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=5))
def test_speculation_verify_makes_p_of_q(weights):
    p, q = np.array(weights, float).T + 1e-3 * (np.arange(len(weights)) == 0)
    p, q, total = p / p.sum(), q / q.sum(), np.zeros(len(weights))
    for draft in np.flatnonzero(q):
        for chance, (accepted, token) in paths(lambda rng: dsv3.verify(p, q, draft, rng)):
            assert token == draft if accepted else p[token] > 0
            total[token] += q[draft] * chance
    assert_close(total, p)


def test_speculation_where_p_and_q_differ_by_an_ulp():
    """Rejected by a hair's breadth, where max(p - q, 0) leaves nothing: it draws from p."""
    p, q = np.array([0.25, 0.75]), np.array([np.nextafter(0.25, 1), 0.75])
    made = {result: chance for chance, result in paths(lambda rng: dsv3.verify(p, q, 0, rng))}
    assert sorted(made) == [(False, 0), (False, 1), (True, 0)]
    assert made[False, 1] == pytest.approx(3 * made[False, 0], abs=0)


def test_sampling_draws_with_the_probabilities_given():
    rng, p = np.random.default_rng(0), np.array([0.25, 0, 0.625, 0.125, 0])
    drawn = np.bincount([dsv3.draw(p, rng) for _ in range(20_000)], minlength=5) / 20_000
    assert np.abs(drawn - p).max() < 0.01 and not drawn[p == 0].any()
    assert dsv3.draw(np.array([0.0, 1.0, 0.0]), None) == 1  # what is certain takes no chance


@example([0.0, 1.0, 0.0, 0.0], 1.0, 2, 1)  # of equals as many as there is room for
@example([4.0, 3.0, 2.0, 1.0], 3.0, 2, 0.55)  # top-p of what top-k left: one token of two
@given(st.lists(st.floats(-20, 20) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=9),
       st.floats(0.1, 5), st.integers(0, 10), st.floats(0.01, 1))
def test_sampling_is_temperature_then_top_k_then_top_p(logits, temperature, k, top_p):
    p = dsv3.distribution(np.array(logits, np.float64), dsv3.Sampling(temperature, k, top_p))
    full = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-full[i], i))[: k or None]
    total = sum(full[i] for i in ranked)
    mass = [sum(full[i] for i in ranked[: n + 1]) / total for n in range(len(ranked))]
    assume(top_p == 1 or min(abs(m - top_p) for m in mass) > 1e-9)
    kept = ranked[: 1 + sum(m < top_p for m in mass)] if top_p < 1 else ranked
    total = sum(full[i] for i in kept)
    assert_close(p, [full[i] / total if i in kept else 0 for i in range(len(logits))])


def test_sampling_at_its_ends():
    zeros, ties = np.zeros(9, np.float32), np.array([1.0, 2.0, 2.0])
    assert dsv3.distribution(zeros, dsv3.Sampling()).tolist() == [1] + [0] * 8  # the lowest id
    assert dsv3.distribution(ties, dsv3.Sampling(1.0, top_k=1)).tolist() == [0, 1, 0]
    tiny = dsv3.Sampling(1e-320)  # 1 / 1e-320 overflows
    assert dsv3.distribution(ties, tiny).tolist() == [0, 0.5, 0.5]
    p = dsv3.distribution(np.array([0.0, -40.0]), dsv3.Sampling(1.0))
    assert p[0] == 1 and p[1] == np.exp(-40)  # all tokens stay in, those too that rounding hides
    for n in range(1, 99):  # all together may be less than 1, rounded
        assert dsv3.distribution(np.zeros(n), dsv3.Sampling(1.0, top_p=1 - 2**-53)).all()
    for bad in (np.nan, np.inf):
        with pytest.raises(dsv3.InputError, match="not finite"):
            dsv3.distribution(np.array([0, bad]), dsv3.Sampling())


@pytest.mark.parametrize("speculate", [False, True])
def test_sampling_is_by_seed(speculate):
    w, texts = make_weights(SMALL), []
    for seed, chunk in ((7, 1024), (7, 1), (7, 3), (8, 1024)):
        given = [1, 2, 3, 4, 5, 6, 7], w, SMALL, 20, dsv3.Sampling(1.5, seed=seed)
        texts.append(list(dsv3.generate(*given, speculate=speculate, chunk=chunk)))
    assert texts[0] == texts[1] == texts[2] != texts[3]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.sets(st.integers(0, 3), max_size=2),
       st.booleans())
def test_generation_ends_at_stop_tokens(prompt, stop, speculate):
    given = prompt, make_weights(GUESSABLE, 3), GUESSABLE, 12, dsv3.Sampling(1.0)
    free = list(dsv3.generate(*given, speculate=speculate))
    end = next((i + 1 for i, token in enumerate(free) if token in stop), 12)
    assert list(dsv3.generate(*given, stop, speculate)) == free[:end] and len(free) == 12


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 20])
def test_generation_holds_a_cache_entry_per_token(speculate, n):
    """In each layer; the MTP module's is first run for a second token."""
    stats, w = Counter(), make_weights(SMALL)
    assert len(list(dsv3.generate([1, 2, 3], w, SMALL, n, None, (), speculate, stats))) == n
    layers = 4 if speculate and n > 1 else 3
    assert stats["cache_bytes"] == layers * (3 + n) * (10 + 4) * 8


def test_generation_fills_the_context_to_its_last_position():
    cfg = replace(GUESSABLE, max_position_embeddings=12)
    w, prompt = make_weights(cfg), [1] * 8
    assert list(dsv3.generate(prompt, w, cfg, 4)) == dsv3.generate_greedy(prompt, w, cfg, 4)
    assert list(dsv3.generate([1] * 12, w, cfg, 0)) == []
    assert dsv3.trace([1] * 12, w, cfg)["lm_head"].shape == (12, 4)


@pytest.mark.parametrize("prompt, n, said", [
    ([], 0, "0 tokens"), ([1, 31], 0, "token id [31]"), ([-1], 0, "token id [-1]"),
    ([1] * 513, 0, "513 tokens"), ([1] * 500, 13, "500 tokens"), ([1], -1, "-1 new")])
def test_generation_refuses_before_any_work(prompt, n, said):
    with pytest.raises(dsv3.InputError, match=re.escape(said)):
        list(dsv3.generate(prompt, {}, SMALL, n))
    with pytest.raises(dsv3.InputError if n == 0 else KeyError):
        dsv3.trace(prompt, {}, SMALL)


# ---- 9. Configuration ----------------------------------------------------------------------------

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}
RELEASE = {  # the release's config.json, abridged to what matters
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
    "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "tie_word_embeddings": False, "rope_scaling": YARN,
    "attention_bias": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "bos_token_id": 0, "eos_token_id": 1,
    "quantization_config": FP8,
}
GLM_4_7_FLASH = {  # likewise
    "model_type": "glm4_moe_lite", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 10240, "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536, "topk_method": "noaux_tc", "norm_topk_prob": True,
    "num_attention_heads": 20, "n_group": 1, "topk_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 1, "routed_scaling_factor": 1.8, "num_experts_per_tok": 4,
    "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "dtype": "bfloat16",
    "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "vocab_size": 154880, "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
}


def without(keys, *names):
    return {key: value for key, value in keys.items() if key not in names}


def test_config_of_the_released_models():
    assert dsv3.parse_config(RELEASE) == dsv3.Config()
    assert dsv3.parse_config(RELEASE | {"model_type": "kimi_k2"}) == dsv3.Config()
    glm = dsv3.parse_config(GLM_4_7_FLASH)
    assert glm.rope_scaling is None and glm.rope_theta == 1e6 and glm.rms_norm_eps == 1e-5
    assert asdict(glm).items() - {("rope_scaling", None)} <= without(
        GLM_4_7_FLASH, "eos_token_id").items()


def test_config_in_both_spellings_is_one():
    rope = without(YARN, "type") | {"rope_type": "yarn", "rope_theta": 5e4, "truncate": None}
    hf5 = without(RELEASE, "rope_scaling", "rope_theta", "scoring_func", "topk_method",
                  "model_type")
    expected = replace(dsv3.Config(), rope_theta=5e4)
    assert dsv3.parse_config(hf5 | {"rope_parameters": rope}) == expected
    assert dsv3.parse_config(hf5 | {"rope_parameters": rope, "rope_scaling": rope}) == expected
    plain = hf5 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    assert dsv3.parse_config(plain) == replace(expected, rope_scaling=None)


def test_config_absent_keys_mean_what_v3_has_or_are_named():
    means = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 163840,
             "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "q_lora_rank": None,
             "rope_scaling": None}
    implied = [*dsv3.SUPPORTED, "num_key_value_heads", "quantization_config"]
    for absent in (without, lambda keys, *names: keys | dict.fromkeys(names)):
        assert dsv3.parse_config(absent(RELEASE, *implied)) == dsv3.Config()
        for f in fields(dsv3.Config):
            if f.name in means:
                expected = replace(dsv3.Config(), **{f.name: means[f.name]})
                assert dsv3.parse_config(absent(RELEASE, f.name)) == expected
            else:
                with pytest.raises(dsv3.InputError, match=f.name):
                    dsv3.parse_config(absent(RELEASE, f.name))
    official = {"vocab_size": 129280, "dim": 7168, "n_layers": 61}  # keys of the inference code
    with pytest.raises(dsv3.InputError, match="Hugging Face.*hidden_size, num_hidden_layers"):
        dsv3.parse_config(official)
    yarn = dsv3.parse_config(RELEASE | {"rope_scaling": without(YARN, "beta_fast", "beta_slow")})
    assert yarn == dsv3.Config()


def yarn_with(**changes):
    return {"rope_scaling": YARN | changes}


@pytest.mark.parametrize("change, word", [
    ({"model_type": "deepseek_v2"}, "model_type 'deepseek_v2'"),
    ({"model_type": "deepseek_v32"}, "model_type 'deepseek_v32'"),
    ({"model_type": ["deepseek_v3"]}, "model_type"),
    ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method 'greedy'"),
    ({"norm_topk_prob": False}, "norm_topk_prob False"),
    ({"n_shared_experts": 0}, "n_shared_experts"),
    ({"first_k_dense_replace": 61}, "first_k_dense_replace"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"rope_interleave": False}, "rope_interleave False"),
    (yarn_with(truncate=False), "truncate False"),
    (yarn_with(attention_factor=1.25), "attention_factor 1.25"),
    (yarn_with(mscale=0.707), "mscale_all_dim"),
    ({"rope_scaling": without(YARN, "mscale")}, "mscale"),
    ({"rope_scaling": without(YARN, "mscale_all_dim")}, "mscale_all_dim"),
    ({"rope_scaling": without(YARN, "type")}, "type"),
    ({"rope_scaling": without(YARN, "factor")}, "factor"),
    ({"rope_scaling": without(YARN, "original_max_position_embeddings")}, "original_max"),
    (yarn_with(type="linear"), "linear"),
    (yarn_with(factor="40"), "factor"), (yarn_with(factor=0.5), "factor"),
    (yarn_with(original_max_position_embeddings=0), "original_max_position_embeddings"),
    ({"rope_scaling": "yarn"}, "rope_scaling"), ({"rope_scaling": []}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    ({"rope_theta": 1}, "rope_theta"),
    ({"hidden_size": "7168"}, "hidden_size"), ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"), ({"hidden_size": 7168.0}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"rms_norm_eps": 1e-300}, "rms_norm_eps"), ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"num_nextn_predict_layers": 10**9}, "tensors"), ({"num_hidden_layers": 665}, "tensors"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
    ({"n_group": 7}, "n_group"), ({"n_group": 256, "topk_group": 8}, "n_group"),
    ({"topk_group": 9}, "topk_group"),
    ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok"),
])
def test_config_refusal_names_the_key(tmp_path, capsys, change, word):
    (tmp_path / "config.json").write_text(json.dumps(RELEASE | change))
    assert dsv3.main(["--weights", str(tmp_path), "--inspect"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and word in err and len(err) < 300


def test_inspect_counts_what_is_published_of_the_671b_model(tmp_path, program):
    """671B parameters, 37B activated, 61 layers of 576 cached elements; 91,991 tensors in the
    release's index. A quantization that cannot be read can be counted."""
    for quantization in (RELEASE["quantization_config"], {"bits": 4}):
        keys = RELEASE | {"quantization_config": quantization}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        for path in (tmp_path, tmp_path / "config.json"):
            code, table, err = program("--weights", path, "--inspect")
            assert (code, err) == (0, "")
            for number in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "35,136", "71.1"):
                assert number in table
    shapes = dsv3.tensor_shapes(dsv3.Config())
    scaled = [name for name in shapes if is_fp8(name)]
    assert len(shapes) + len(scaled) + 2 == 91_991  # the MTP module's copies of embedding and head


ABSENT = "model.layers.3.eh_proj.weight"


@pytest.mark.parametrize("present, shards", [(0, 1), (1, 2), (2, 1)])
def test_mtp_modules_are_those_that_are_there(tmp_path, program, present, shards):
    cfg = replace(SMALL, num_nextn_predict_layers=present)
    directory = write_checkpoint(tmp_path / "w", SMALL, make_weights(cfg), shards)
    w = dsv3.Checkpoint(directory, SMALL)
    assert w.shapes == dsv3.tensor_shapes(cfg) and w.cfg == cfg
    assert dsv3.mtp_depth(w, SMALL) == present
    logits = [name for name in dsv3.trace([1, 2, 3], w, SMALL) if name.endswith("shared_head")]
    assert len(logits) == present and dsv3.mtp_depth(w.shapes.keys() - {ABSENT}, SMALL) == 0
    code, out, err = program("--weights", directory, "--inspect")
    sizes = {name: math.prod(shape) for name, shape in w.shapes.items()}
    modules = sum(n for name, n in sizes.items() if re.match(r"model\.layers\.[34]\.", name))
    main = sum(sizes.values()) - modules
    assert (code, err) == (0, "") and re.search(rf"MTP modules +{modules:,} ", out)
    assert re.search(rf"main model +{main:,}\n", out)


# ---- 9. Checkpoints ------------------------------------------------------------------------------


def is_fp8(name):
    """Whether the FP8 release stores a tensor so: the projections except eh_proj."""
    return name.endswith(("_proj.weight", "with_mqa.weight")) and "eh_proj" not in name


def quantised(w):
    """The FP8 release's form of weights: E4M3 with a scale for each block of 128 x 128 that differs
    from its neighbours'; all else in BF16, the routers' biases in F32."""
    out = {}
    for name, x in w.items():
        if not is_fp8(name):
            out[name] = x.astype(np.float32 if "bias" in name else ml_dtypes.bfloat16)
            continue
        grid = [-(-n // 128) for n in x.shape]
        out[name] = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
        out[f"{name}_scale_inv"] = scale = np.zeros(grid, np.float32)
        for i, j in np.ndindex(*grid):
            block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            scale[i, j] = np.abs(x[block]).max() / 448 * (1 + (i + 2 * j) % 3)
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


def whole(x):
    return dsv3.to_host(x.whole() if isinstance(x, dsv3.Stored) else x)


def test_fp8_codes_are_those_of_ml_dtypes():
    code = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = code.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = dsv3.dequantize(code, np.ones((1, 1), np.float32))
    assert got.tobytes() == expected.tobytes()


def test_bf16_values_are_those_of_ml_dtypes(tmp_path):
    """All 65,536, as the embedding of a checkpoint; NaNs as NaNs."""
    cfg = replace(SMALL, vocab_size=256, hidden_size=256, num_nextn_predict_layers=0)
    stored = make_weights(cfg, dtype=ml_dtypes.bfloat16)
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    stored["model.embed_tokens.weight"] = bits.view(ml_dtypes.bfloat16)
    w = dsv3.Checkpoint(write_checkpoint(tmp_path / "w", cfg, stored, 2, None), cfg)
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
        assert read.shapes == {name: x.shape for name, x in w.items()} and "x" not in read
        for name in w:  # routing is never in half precision
            least = np.promote_types(dtype, np.float32) if ".mlp.gate." in name else dtype
            expected = w[name].astype(stored).astype(np.float64).astype(least)
            assert name in read and read[name].dtype == least, name
            assert np.array_equal(whole(read[name]), expected), name


def test_checkpoint_of_the_fp8_release(tmp_path):
    """Ragged blocks, scales in other shards, scales in BF16, the copies of embedding and head that
    MTP modules carry."""
    cfg = replace(SMALL, hidden_size=160, kv_lora_rank=140, moe_intermediate_size=130)
    stored = quantised(make_weights(cfg))
    halved = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    stored[halved] = stored[halved].astype(ml_dtypes.bfloat16)
    for k in (3, 4):
        stored[f"model.layers.{k}.embed_tokens.weight"] = stored["model.embed_tokens.weight"]
        stored[f"model.layers.{k}.shared_head.head.weight"] = stored["lm_head.weight"]
    directory, expected = write_checkpoint(tmp_path / "w", cfg, stored, 2, None), decoded(stored)
    for dtype, memory in itertools.product((np.float32, np.float64), (None, 0)):
        read = dsv3.Checkpoint(directory, cfg, dtype, memory)
        for name in read.shapes:
            assert np.array_equal(whole(read[name]), expected[name].astype(dtype)), name


def test_memory_budgets_change_no_bit(tmp_path):
    """From no memory for decoded weights to more than all; what stays decoded is within the budget,
    and fills it."""
    cfg = replace(SMALL, vocab_size=300, hidden_size=96, intermediate_size=150,
                  num_nextn_predict_layers=1)
    directory = write_checkpoint(tmp_path / "w", cfg, quantised(make_weights(cfg)), 2, None)
    prompt, seen, kept = make_tokens(cfg, 0, 9).tolist(), [], {}
    for memory in (None, 10**8, 600_000, 100_000, 0):
        w = dsv3.Checkpoint(directory, cfg, memory=memory)
        tracemalloc.start()
        for name in w.shapes:
            w[name]
        kept[memory] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        seen.append([x.tobytes() for x in dsv3.trace(prompt, w, cfg).values()])
        seen[-1] += [list(dsv3.generate(prompt, w, cfg, 9, dsv3.Sampling(t))) for t in (0, 1.0)]
    assert all(each == seen[0] for each in seen)
    for memory in (600_000, 100_000):
        assert 0.7 * memory < kept[memory] - kept[0] < 1.1 * memory < kept[10**8]


def test_memory_of_0_decodes_few_rows_at_a_time(tmp_path, monkeypatch):
    """Whole blocks of 128 rows, the last one cropped; of FP8, unlike the release's head."""
    cfg, bands, decode = replace(SMALL, vocab_size=300), [], dsv3.dequantize
    head = quantised({"o_proj.weight": make_weights(cfg)["lm_head.weight"]})
    stored = {name.replace("o_proj", "lm_head"): x for name, x in head.items()}
    directory = write_checkpoint(tmp_path / "w", cfg, make_weights(cfg) | stored, 2, None)
    monkeypatch.setattr(dsv3, "dequantize", lambda *it: bands.append(len(it[0])) or decode(*it))
    head = dsv3.Checkpoint(directory, cfg, memory=0)["lm_head.weight"]
    x, expected = np.eye(22, dtype=np.float32)[:3], decoded(stored)["lm_head.weight"]
    for most, rows in ((1, [128, 128, 44]), (22 * 300, [256, 44]), (22 * 400, [300])):
        monkeypatch.setattr(dsv3, "MAX_DECODED", most)
        bands.clear()
        assert np.array_equal(x @ head.T, x @ expected.T) and bands == rows


def edit(name, change):
    """Damage: a file's bytes, changed."""
    def damage(directory):
        path = directory / name
        path.write_bytes(change(path.read_bytes()))
    return damage


def edit_config(**changes):
    return edit("config.json", lambda raw: json.dumps(json.loads(raw) | changes).encode())


def tensors(change):
    """Damage: other tensors, of what `change` makes of the dict of the sound ones."""
    def damage(directory):
        save_file(change(quantised(make_weights(SMALL))), directory / "model.safetensors")
    return damage


def store(**changes):
    return tensors(lambda w: w | changes)


def renamed(change):
    return tensors(lambda w: {change(name): x for name, x in w.items()})


def entry_as_a_list(raw):
    """That of model.norm.weight, in as many bytes: the library reads it."""
    entry = rb'(norm.weight":)\{"dtype":("\w+"),"shape":(\[22\]),"data_offsets":(\[[\d,]+\])\}'
    return re.sub(entry, lambda it: (b"%s[%s,%s,%s]" % it.groups()).ljust(len(it[0])), raw)


def fused(name):
    """As transformers 5 holds them in memory."""
    name = re.sub(r"experts\.\d+\.(gate|up)_proj.*", "experts.gate_up_proj", name)
    return re.sub(r"experts\.\d+\.down_proj.*", "experts.down_proj", name)


def in_fp8(name, *shape):
    scale = np.ones([1] * len(shape), np.float32)
    return store(**{name: np.ones(shape, ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": scale})


NORM, O_PROJ = "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SCALE, FILE, EMBED = f"{O_PROJ}_scale_inv", "model.safetensors", "model.embed_tokens.weight"
DAMAGE = {  # what was done -> how, and what the refusal says
    "empty": (edit(FILE, lambda raw: b""), FILE),
    "cut": (edit(FILE, lambda raw: raw[:-10]), FILE),
    "entry as a list": (edit(FILE, entry_as_a_list), "is no object"),
    "no weights": (lambda d: (d / FILE).unlink(), "config.json"),
    "shards without an index": (lambda d: (d / FILE).rename(d / "model-1-of-1.safetensors"),
                                "model-1-of-1.safetensors"),
    "PyTorch's format": (lambda d: (d / FILE).rename(d / "pytorch_model.bin"), "pytorch_model.bin"),
    "missing tensor": (tensors(lambda w: without(w, NORM)), f"lack {NORM}"),
    "a prefix": (renamed(lambda name: f"language_model.{name}"), "have is language_model."),
    "no prefix": (renamed(lambda name: name.removeprefix("model.")), f"lack {EMBED}"),
    "fused experts": (renamed(fused), "have is model.layers.1.mlp.experts."),
    "integers": (store(**{NORM: np.ones(22, np.int32)}), f"{NORM} has dtype I32"),
    "wrong shape": (store(**{"lm_head.weight": np.ones((22, 31), np.float32)}), "lm_head.weight"),
    "FP8 without scales": (tensors(lambda w: without(w, SCALE)), SCALE),
    "scales of another grid": (store(**{SCALE: np.ones((2, 1), np.float32)}), SCALE),
    "scales in F64": (store(**{SCALE: np.ones((1, 1))}), SCALE),
    "scale NaN": (store(**{SCALE: np.float32([np.nan])}), "scale_inv"),
    "scale negative": (store(**{SCALE: np.float32([-1e-3])}), "scale_inv"),
    "FP8 norm": (in_fp8(NORM, 22), NORM),
    "FP8 embedding": (in_fp8(EMBED, 31, 22), EMBED),
    "bias NaN": (store(**{BIAS: np.float32([0] * 11 + [np.nan])}), f"{BIAS} is not finite"),
    "bias infinite": (store(**{BIAS: np.float32([0] * 11 + [np.inf])}), f"{BIAS} is not finite"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config in Latin-1": (edit("config.json", lambda raw: b'{"x": "\xe9"}'), "config.json"),
    "config a list": (edit("config.json", lambda raw: b"[]"), "config.json"),
    "config nested": (edit("config.json", lambda raw: b"[" * 100_000), "config.json"),
    "config of another size": (edit_config(hidden_size=44), "config.json says"),
    "other quantization": (edit_config(quantization_config={"quant_method": "awq"}), "'awq'"),
    "unnamed quantization": (edit_config(quantization_config={"fmt": "e4m3"}), "quant_method"),
    "quantization a string": (edit_config(quantization_config="fp8"), "quant"),
    "shard elsewhere": (lambda d: index_says(d, {NORM: "../model.safetensors"}), "index.json"),
    "shard the parent": (lambda d: index_says(d, {NORM: ".."}), ".."),
    "shard of two lines": (lambda d: index_says(d, {NORM: "a\n\x1b[31mb"}), "index.json"),
    "shard a number": (lambda d: index_says(d, {NORM: 1}), "index.json"),
    "shard missing": (lambda d: index_says(d, {NORM: "no.safetensors"}), "no.safetensors"),
    "tensor not in its shard": (lambda d: index_says(d, {"x": FILE}), "lack"),
    "index without a map": (lambda d: (d / f"{FILE}.index.json").write_text("{}"), "weight_map"),
}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """SMALL as an FP8 checkpoint of one file, without a tokenizer."""
    directory = write_checkpoint(tmp_path_factory.mktemp("fp8") / "w", SMALL, {})
    store()(directory)
    assert dsv3.main(["--weights", str(directory), "--tokens", "1", "-n", "1"]) == 0
    return directory


@pytest.mark.parametrize("how", DAMAGE)
def test_checkpoint_damaged_is_refused_in_one_line(fp8, tmp_path, program, how):
    directory = shutil.copytree(fp8, tmp_path / "w")
    damage, word = DAMAGE[how]
    damage(directory)
    code, out, err = program("--weights", directory, "--tokens", "1", "-n", "1")
    assert code == 2 and not out.strip() and len(err) < 600 and word in err
    lines = [line for line in err.splitlines() if not line.startswith("prompt: ")]
    assert lines == [err.splitlines()[-1]]


SCALAR = re.compile(rb'"[^"]*"|-?[\d.]+(?:[eE][-+]?\d+)?|true|false|null')
STRANGE = [b"-1", b"0", b"1.5", b"1e999", b"null", b"true", b'"1"', b"[]", b"{}", b"[1]", b"NaN",
           b"18446744073709551616", b'"BF16"', b'"I64"', b'"__metadata__"', b'"model.norm.weight"',
           b'".."', b"9" * 5000, b"[" * 2000, b'"\\ud800"', b'"\xff"', b"\n", b"\0", b"}"]


@st.composite
def edited(draw, text):
    """A JSON text with another of its values, or a strange one, in place of one or two."""
    for _ in range(draw(st.integers(1, 2))):
        spans = [found.span() for found in SCALAR.finditer(text)] or [(0, len(text))]
        (a, b), (c, d) = draw(st.sampled_from(spans)), draw(st.sampled_from(spans))
        text = text[:a] + draw(st.sampled_from([text[c:d], *STRANGE])) + text[b:]
    return text


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of one layer: config.json, an index, two shards of FP8, BF16 and F32."""
    cfg = replace(SMALL, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=2,
                  num_experts_per_tok=1, n_group=1, topk_group=1, num_nextn_predict_layers=0)
    directory = tmp_path_factory.mktemp("sound") / "w"
    return write_checkpoint(directory, cfg, quantised(make_weights(cfg)), 2, None)


@settings(max_examples=int(os.environ.get("FUZZ", "100")))
@given(st.data())
def test_checkpoint_fuzzed_is_read_as_the_library_does_or_refused(sound, data):
    """FUZZ=20000 pytest -k fuzzed: of every file that differs from a sound one by a few edits."""
    path = sound / data.draw(st.sampled_from(sorted(path.name for path in sound.iterdir())))
    raw, kinds = path.read_bytes(), {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
    kinds["F8_E4M3"], stored = ml_dtypes.float8_e4m3fn, {}
    n = int.from_bytes(raw[:8], "little") if path.suffix == ".safetensors" else None
    text = data.draw(edited(raw if n is None else raw[8 : 8 + n]))
    path.write_bytes(text if n is None else len(text).to_bytes(8, "little") + text + raw[8 + n :])
    try:
        w = dsv3.Checkpoint(sound, dsv3.read_config(sound), memory=2**20)
        got = {name: np.array(whole(w[name])) for name in w.shapes}
        weight_map = json.loads((sound / "model.safetensors.index.json").read_bytes())["weight_map"]
        for name, shard in weight_map.items():
            entry = dict(safetensors.deserialize((sound / shard).read_bytes())).get(name)
            if entry and entry["dtype"] in kinds:
                x = np.frombuffer(bytes(entry["data"]), kinds[entry["dtype"]])
                stored[name] = x.reshape(entry["shape"])
    except dsv3.InputError as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 1000
        return
    finally:
        path.write_bytes(raw)
    for name, x in got.items():
        expected = decoded(stored)[name]
        assert x.dtype == np.float32 and np.array_equal(x, expected, equal_nan=True), name


# ---- 11. The program -----------------------------------------------------------------------------

STATISTICS = re.compile(
    r"prompt: \d+ tokens, [\d.]+ tok/s · new: \d+ tokens, [\d.]+ tok/s · drafted \d+, accepted \d+"
    r" · cache \d+ KB · peak memory \d+ MB\n"
)


@pytest.fixture
def program(capsys):
    """The program in this process: arguments -> (exit code, stdout, stderr)."""

    def call(*args):
        capsys.readouterr()
        device = [] if "--device" in args else ["--device", "cpu"]
        return dsv3.main([*map(str, args), *device]), *capsys.readouterr()

    return call


def cli(*args, **kwargs):
    """The program as a user runs it -> (exit code, stdout, stderr)."""
    env = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(HERE / "deepseek_v3.py"), *map(str, args), "--device", "cpu"]
    env |= kwargs.pop("env", {})
    done = subprocess.run(command, capture_output=True, env=env, timeout=600, check=False, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def raising(error):
    def call(*_, **__):
        raise error

    return call


@pytest.fixture
def scripted(monkeypatch):
    """In place of generation: `made`, the tokens it gives, and `asked`, what it was asked."""
    script = types.SimpleNamespace(made=[], asked=[])

    def generate(prompt, *args, **kwargs):
        script.asked.append((prompt, kwargs))
        yield from script.made

    monkeypatch.setattr(dsv3, "generate", generate)
    return script


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """SMALL as a checkpoint in float32, without a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("small") / "w", SMALL, make_weights(SMALL))


def shipped_with(directory, **files):
    """The shipped checkpoint with some files replaced (name=JSON or text; None leaves it out)."""
    directory.mkdir()
    for path in WEIGHTS.iterdir():
        if path.is_file():
            (directory / path.name).symlink_to(path)
    for name, content in files.items():
        path = directory / f"{name}.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_main_answers_several_prompts_in_turn(small, program):
    flags, prompts = ["--weights", small, "-n", 7, "--dtype", "float64"], [[3, 14, 15], [9]]
    code, out, err = program(*flags, "--tokens", "3 14, 15", "--tokens", "9")
    w = dsv3.Checkpoint(small, SMALL, np.float64)
    rows = [list(dsv3.generate(prompt, w, SMALL, 7)) for prompt in prompts]
    assert (code, out) == (0, "".join(" ".join(map(str, row)) + "\n" for row in rows))
    first, second = err.splitlines(keepends=True)
    for line, T in ((first, 3), (second, 1)):
        assert STATISTICS.fullmatch(line) and f"prompt: {T} tokens" in line
        assert "new: 7 tokens" in line and "drafted 0" not in line
        assert 10 < int(re.search(r"peak memory (\d+) MB", line)[1]) < 100_000
    texts = ["Tom and Lily went", dsv3.OPENING]
    code, out, err = program("-n", 9, *itertools.chain(*(["-p", text] for text in texts)))
    alone = [program("-n", 9, "-p", text)[1] for text in texts]
    assert (code, out) == (0, "".join(alone)) and len(STATISTICS.findall(err)) == 2
    assert program("-n", 9)[1] == dsv3.OPENING + alone[1]


def test_statistics_are_told_by_the_clock(small, program, monkeypatch):
    """By one that shows 3 s, 5 s at the first token, and 6 s at the end."""
    stats, w = Counter(), dsv3.Checkpoint(small, SMALL)
    made = list(dsv3.generate([1, 2], w, SMALL, 15, stats=stats))
    clock = types.SimpleNamespace(perf_counter=iter((3, 5, 6)).__next__)
    monkeypatch.setattr(dsv3, "time", clock)
    code, out, err = program("--weights", small, "--tokens", "1 2", "-n", 15, "--mtp")
    assert (code, out) == (0, " ".join(map(str, made)) + "\n")
    rest = f"drafted {stats['drafted']}, accepted {stats['accepted']}"
    rest += f" · cache {stats['cache_bytes'] / 1000:.0f} KB"
    assert err.startswith(f"prompt: 2 tokens, 1.0 tok/s · new: 15 tokens, 14.0 tok/s · {rest} · ")
    assert stats["drafted"] > 0 and STATISTICS.fullmatch(err)


def test_main_passes_on_what_the_flags_say(small, program, monkeypatch, tmp_path):
    """--chunk bounds what goes through at a time, in a trace too; sampling chooses the tokens."""
    sizes, forward, prompt = [], dsv3.forward, [1, 2, 3, 4, 5, 6, 7]

    def seen(token_T, *args):
        sizes.append(len(token_T))
        return forward(token_T, *args)

    monkeypatch.setattr(dsv3, "forward", seen)
    tokens = " ".join(map(str, prompt))
    flags = ["--weights", small, "--tokens", tokens, "-n", 3, "--no-mtp", "--dtype", "float64"]
    greedy = program(*flags)[1]
    assert sizes == [7, 1, 1]
    sizes.clear()
    assert program(*flags, "--chunk", 3)[1] == greedy and sizes == [3, 3, 1, 1, 1]
    sizes.clear()
    trace = ["-n", 0, "--chunk", 3, "--trace", tmp_path / "t.safetensors"]
    assert program(*flags, *trace)[0] == 0 and sizes == [3, 3, 1] * 2
    drawn = program(*flags, "--temp", 2, "--top-k", 5, "--top-p", 0.9, "--seed", 4)[1]
    w = dsv3.Checkpoint(small, SMALL, np.float64)
    sampling = dsv3.Sampling(2.0, 5, 0.9, 4)
    expected = dsv3.generate(prompt, w, SMALL, 3, sampling, speculate=False)
    assert list(map(int, drawn.split())) == list(expected) and drawn != greedy


def test_trace_is_written_and_nothing_generated(small, tmp_path, program):
    path = tmp_path / "t.safetensors"
    flags = ["--weights", small, "--dtype", "float64", "--tokens", "1 2 3", "--trace", path]
    code, out, err = program(*flags)
    assert (code, out.strip()) == (0, "") and "new: 0 tokens" in err
    read = load_file(path)
    expected = dsv3.trace([1, 2, 3], dsv3.Checkpoint(small, SMALL, np.float64), SMALL)
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[name], x) for name, x in expected.items())
    assert len(program(*flags, "-n", 4)[1].split()) == 4
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_trace_is_written_whole_or_not_at_all(small, tmp_path, program, monkeypatch):
    def half(self, data):
        self.write_text("half")
        raise OSError(28, "No space left")

    path = tmp_path / "t.safetensors"
    path.write_text("as it was")
    flags = ["--weights", small, "--tokens", "1", "--trace"]
    code, out, err = program(*flags, tmp_path / "none" / "t.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1) and "none" in err
    monkeypatch.setattr(dsv3.Path, "write_bytes", half)
    code, out, err = program(*flags, path)
    assert (code, out, err.count("\n")) == (2, "", 1) and "No space left" in err
    assert path.read_text() == "as it was" and list(tmp_path.iterdir()) == [path]


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        dsv3.main(["--help"])
    assert {"--prompt", "--no-mtp", "70%", "(1024)"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("args, word", [
    (["--no-such-flag"], "--no-such-flag"), (["--chat"], "--chat"), (["-n", "x"], "-n"),
    (["-n", "-1"], "--max-tokens"), (["--tokens", "1 a"], "--tokens"),
    (["--tokens", ""], "0 tokens"),
    (["--tokens", "1", "-p", "x"], "--prompt"), (["--tokens", "31"], "31"),
    (["--tokens=-1"], "-1"), (["--tokens", "9" * 30], "9" * 20), (["--tokens", "0 " * 513], "513"),
    (["--tokens", "1", "-n", "512"], "tokens"), (["--tokens", "1", "--tokens", "31"], "31"),
    (["--tokens", "1", "--weights", "no-such-directory"], "no-such-directory"),
    (["--tokens", "1", "--weights", __file__], ".py is no directory"),
    (["--temperature", "-1"], "temperature"), (["--temp", "nan"], "temperature"),
    (["--temp", "inf"], "temperature"),
    (["--top-p", "0"], "top"), (["--top-p", "1.01"], "top"), (["--top-p", "nan"], "top"),
    (["--top-k", "-1"], "top"), (["--top-p", "-1"], "top"), (["--seed", "-1"], "seed"),
    (["--dtype", "int8"], "--dtype"), (["--device", "tpu"], "--device"),
    (["--memory", "-1"], "--memory"), (["--memory", "nan"], "--memory"),
    (["--chunk", "0"], "--chunk"), (["--prompt", "x"], "--tokens"),
    (["--tokens", "1", "--trace", "t.npz"], ".safetensors"),
    (["--tokens", "1", "--tokens", "2", "--trace", "t.safetensors"], "one prompt"),
])
def test_request_refused_is_one_line_and_exit_code_2(small, program, args, word):
    code, out, err = program(*([] if "--weights" in args else ["--weights", small]), *args)
    assert (code, out, err.count("\n")) == (2, "", 1) and word in err and len(err) < 500


def test_request_too_large_for_the_memory_is_one_line(small, program, monkeypatch):
    for error, word in ((MemoryError("Unable to allocate"), "allocate"), (MemoryError(), "memory")):
        monkeypatch.setattr(dsv3, "forward", raising(error))
        code, _, err = program("--weights", small, "--tokens", "1")
        assert code == 2 and word in err.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_was_freed_is_reused_without_page_faults():
    use = "x = [np.ones(750_000, np.float32) for _ in range(15)]; del x"  # 11,000 pages
    program = f"import deepseek_v3, numpy as np, resource as r; {use}; n = r.getrusage(0).ru_minflt"
    program += f"; {use}; print(r.getrusage(0).ru_minflt - n)"
    assert int(subprocess.check_output([sys.executable, "-c", program], cwd=HERE)) < 2000


def test_memory_is_taken_freely_where_the_system_tells_nothing(small, program, monkeypatch):
    system_bytes = dsv3.system_bytes  # of a file that is not there, as on Windows
    monkeypatch.setattr(dsv3, "system_bytes", lambda _, key: system_bytes("/none", key))
    code, _, err = program("--weights", small, "--tokens", "1", "-n", 1, "--dtype", "float64")
    assert code == 0 and STATISTICS.fullmatch(err) and "peak memory 0 MB" in err
    w = dsv3.Checkpoint(small, SMALL, np.float64)
    assert isinstance(w["lm_head.weight"], np.ndarray)


@pytest.mark.parametrize("width, flags, drafts", [
    (512, [], True), (514, [], False), (512, ["--no-mtp"], False), (514, ["--mtp"], True),
])
def test_speculation_is_the_default_in_small_models(program, tmp_path, width, flags, drafts):
    cfg = replace(SMALL, hidden_size=width)
    write_checkpoint(tmp_path / "w", cfg, make_weights(cfg))
    code, _, err = program("--weights", tmp_path / "w", "--tokens", "1", "-n", 8, *flags)
    assert code == 0 and ("drafted 0" not in err) == drafts


@pytest.mark.parametrize("generation, config, ends", [
    (None, 1, [1]), (None, None, []), (None, [1, 2], [1, 2]),
    ({"eos_token_id": [3, 4]}, 1, [3, 4]), ({"eos_token_id": 5}, 1, [5]), ({}, 7, [7]),
])
def test_end_tokens_of_either_file_end_a_text(fp8, tmp_path, program, scripted, generation, config,
                                              ends):
    directory = shutil.copytree(fp8, tmp_path / "w")
    edit_config(eos_token_id=config)(directory)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    assert program("--weights", directory, "--tokens", "1")[0] == 0
    stop = scripted.asked[0][1]["stop"]
    assert [token for token in range(31) if token in stop] == ends


@pytest.mark.parametrize("error", [
    ImportError("no reason in one line\nor two"), Exception("no reason in one line\n"),
    ModuleNotFoundError("no reason in one line", name="fastrlock"), None,
])
def test_device_auto_says_why_it_takes_the_cpu(small, program, monkeypatch, error):
    """None: there is no CuPy, and no word about it."""
    broken = types.SimpleNamespace(ones=raising(error))
    monkeypatch.setitem(sys.modules, "cupy", error and broken)
    flags = ["--weights", small, "--tokens", "1 2", "-n", 3, "--device"]
    code, out, err = program(*flags, "auto")
    *note, statistics = err.splitlines(keepends=True)
    assert (code, out) == (0, program(*flags, "cpu")[1]) and STATISTICS.fullmatch(statistics)
    assert not note if error is None else "no reason in one line\n" in note[0]
    code, out, err = program(*flags, "gpu")
    assert (code, out, err.count("\n")) == (2, "", 1) and "cupy" in err
    works = types.SimpleNamespace(ones=np.ones)
    monkeypatch.setitem(sys.modules, "cupy", works)
    assert dsv3.choose_device("auto") is dsv3.choose_device("gpu") is works


# ---- 11. Text ------------------------------------------------------------------------------------


def shipped_tokenizer():
    return tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))


def test_text_is_never_printed_by_half_characters(program, scripted, monkeypatch):
    words = "na\u00efve caf\u00e9 \U0001f600 \u4f60\u597d."
    ids = shipped_tokenizer().encode(words, add_special_tokens=False).ids
    scripted.made, pieces = [*ids, 1], []
    stdout = types.SimpleNamespace(write=pieces.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert program("-p", "x")[0] == 0
    assert len(ids) > len(words) and "".join(pieces) == words + "\n"  # the end token is no text
    assert not any("\ufffd" in piece for piece in pieces) and pieces[0] == words[0]


@example(shipped_tokenizer().encode("x\U0001f600", add_special_tokens=False).ids[:-1])
@given(ids=st.lists(st.integers(2, 2047), max_size=30))
def test_text_is_that_of_all_its_tokens(ids):
    """Whatever the model says, invalid UTF-8 too."""
    tokenizer, out = shipped_tokenizer(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(dsv3, "generate", lambda *_, **__: iter(ids))
        with contextlib.redirect_stderr(io.StringIO()):
            dsv3.respond(tokenizer, [0], {"stop": [1]})
    assert out.getvalue() == tokenizer.decode(ids) + "\n"


def test_text_begins_with_one_bos(program, scripted, tmp_path):
    tokenizer = shipped_tokenizer()
    bos = tokenizer.id_to_token(0)
    tokenizer.post_processor = tokenizers.processors.ByteLevel()  # as in releases, which add none
    config = {"add_bos_token": True, "bos_token": {"content": bos}}
    bare = shipped_with(tmp_path / "w", tokenizer=tokenizer.to_str(), tokenizer_config=config)
    for directory in (WEIGHTS, bare):
        program("--weights", directory, "-p", "Tom", "-p", "", "-p", f"{bos}Tom")
        tom, empty, twice = [prompt for prompt, _ in scripted.asked[-3:]]
        assert empty == [0] and tom[0] == 0 and tom.count(0) == 1 and len(tom) > 1
    assert twice == tom
    none = shipped_with(tmp_path / "v", tokenizer=tokenizer.to_str(),
                        tokenizer_config={"bos_token": bos})
    program("--weights", none, "-p", "Tom")
    assert scripted.asked[-1][0] == tom[1:]


def test_text_is_not_cut_by_the_tokenizers_own_limits(program, scripted, tmp_path):
    tokenizer = shipped_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    limited = shipped_with(tmp_path / "w", tokenizer=tokenizer.to_str())
    for directory in (WEIGHTS, limited):
        program("--weights", directory, "-p", "Once upon a time there was a dog")
    assert scripted.asked[0][0] == scripted.asked[1][0]


@pytest.mark.parametrize("files, word", [
    ({"tokenizer": '{"model": 1}'}, "tokenizer.json"), ({"tokenizer": None}, "--tokens"),
    ({"tokenizer_config": "{"}, "tokenizer_config.json"),
    ({"generation_config": "[]"}, "generation_config.json"),
])
def test_text_files_malformed_are_refused_in_one_line(program, tmp_path, files, word):
    code, out, err = program("--weights", shipped_with(tmp_path / "w", **files), "-n", 1)
    assert (code, out, err.count("\n")) == (2, "", 1) and word in err


# ---- 11. The program as a user runs it -----------------------------------------------------------


def test_program_reads_stdin():
    code, out, err = cli("-p", "-", "-n", 12, input=dsv3.OPENING.encode() + b"\n")
    assert code == 0 and STATISTICS.fullmatch(err)
    assert cli("-n", 12)[:2] == (0, dsv3.OPENING + out)


def test_program_refuses_what_is_not_text():
    bad = b"\xff".decode("utf-8", "surrogateescape")
    for args, stdin in ((["-p", "-"], b"\xff\xfe"), (["-p", bad], b"")):
        code, out, err = cli(*args, input=stdin)
        assert (code, out, err.count("\n")) == (2, "", 1) and "utf-8" in err.lower()


def test_program_ends_quietly_where_its_pipe_is_closed():
    command = f"set -o pipefail; {sys.executable} -E deepseek_v3.py -n 100 | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, capture_output=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) == 1 and not done.stderr


def test_program_interrupted_ends_with_the_statistics():
    """The handler is set here, as tests that run in the background would ignore Ctrl-C."""
    lines = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    lines += "sys.argv = ['deepseek_v3.py', '-n', '900']\n"
    lines += "runpy.run_path('deepseek_v3.py', run_name='__main__')"
    command = [sys.executable, "-c", lines]
    with subprocess.Popen(command, cwd=HERE, stdout=-1, stderr=-1) as running:
        running.stdout.read(len(dsv3.OPENING) + 4)  # it has begun to generate
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and out.endswith(b"\n") and STATISTICS.fullmatch(err.decode())


def test_program_has_no_traceback_where_its_output_cannot_be_written():
    code, _, err = cli("-n", 100, "--temp", 9, env={"PYTHONIOENCODING": "ascii"})
    assert code == 2 and "ascii" in err.splitlines()[-1] and "Traceback" not in err
    command = f"{sys.executable} deepseek_v3.py -n 3 > /dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, capture_output=True, timeout=60)
    assert done.returncode and b"Traceback" not in done.stderr and b"No space left" in done.stderr


# ---- The shipped checkpoint ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The shipped weights, and what Hugging Face transformers makes of them, as index.json says."""
    index = json.loads((WEIGHTS / "vectors" / "index.json").read_text("utf-8"))
    expected = load_file(WEIGHTS / "vectors" / "expected.safetensors")
    return types.SimpleNamespace(
        cfg=dsv3.read_config(WEIGHTS), story=index["shipped_story"], text=index["shipped"],
        greedy=expected["shipped_story/0/tokens"].tolist(), logits=expected["shipped/lm_head"],
    )


def test_shipped_model_has_all_of_the_structure(shipped):
    cfg, w = shipped.cfg, dsv3.Checkpoint(WEIGHTS, shipped.cfg)
    assert cfg.first_k_dense_replace and cfg.q_lora_rank and cfg.rope_scaling
    assert 1 < cfg.topk_group < cfg.n_group and dsv3.mtp_depth(w, cfg) == 1
    biases = [w[name] for name in w.shapes if name.endswith("e_score_correction_bias")]
    assert all(np.ptp(bias) > 0.01 for bias in biases)  # the balancing has moved them


def test_shipped_text_has_the_ids_of_hugging_face(shipped, program, scripted):
    program("-p", shipped.text["text"])
    program()
    prompts = [*shipped.text["prompts"], *shipped.story["prompts"]]
    assert [prompt for prompt, _ in scripted.asked] == prompts


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("speculate", [False, True])
def test_shipped_story_is_that_of_hugging_face(shipped, speculate, chunk):
    w, stats, (prompt,) = dsv3.Checkpoint(WEIGHTS, shipped.cfg), Counter(), shipped.story["prompts"]
    options = {"stop": [1], "speculate": speculate, "chunk": chunk, "stats": stats}
    assert list(dsv3.generate(prompt, w, shipped.cfg, 200, **options)) == shipped.greedy
    assert (stats["accepted"] > 0.6 * stats["drafted"] > 0) == speculate


def test_shipped_story_is_what_the_program_prints(shipped, program):
    story = shipped.story["text"] + shipped_tokenizer().decode(shipped.greedy) + "\n"
    for flags in ([], ["--no-mtp", "--chunk", 3, "--memory", 0]):
        code, out, err = program(*flags)
        assert (code, out) == (0, story) and ("drafted 0," in err) == bool(flags)


# ---- Documents -----------------------------------------------------------------------------------


def readme():
    return (HERE / "README.md").read_text("utf-8")


def console_lines():
    """The README's commands, `$ ` taken off, each with the output shown below it."""
    for block in re.findall(r"```console\n(.*?)```", readme(), re.S):
        for command in re.split(r"^\$ ", block, flags=re.M)[1:]:
            line, _, output = command.partition("\n")
            yield line, output


def test_readme_shows_what_its_commands_print(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASE))
    shown = [(line.split("&& ")[-1], output) for line, output in console_lines() if output]
    shown = [(shlex.split(line), output) for line, output in shown if "deepseek_v3.py" in line]
    assert shown
    for words, output in shown:
        words = words[words.index("deepseek_v3.py") + 1 :]
        words = [tmp_path / word if word == "config.json" else word for word in words]
        code, out, err = cli(*words)
        assert (code, out) == (0, output), err


def test_readme_names_what_exists():
    text, tests = readme(), (HERE / "test_deepseek_v3.py").read_text("utf-8")
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
    programs = re.findall(r"```python\n(.*?)```", readme(), re.S)
    assert programs
    for program in programs:
        exec(program, {})


# ---- A GPU: `pytest -m gpu -s`. The same checks run on a stand-in for CuPy in .ci/test_cupy.py ---


@contextlib.contextmanager
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3, "xp", np)
        yield


def gpu_agrees_with_numpy_and_hugging_face(shipped, tmp_path):
    """float64 to 1e-12 of the largest value, float32 to 3e-5; the shipped model as HF has it."""
    plain = replace(SMALL, q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2,
                    rope_scaling=None)
    precisions, prompt = [(np.float64, 1e-12), (np.float32, 3e-5)], make_tokens(SMALL, 0, 11)
    for cfg, (dtype, tolerance) in itertools.product([SMALL, plain], precisions):
        w = make_weights(cfg, dtype=dtype)
        with on_the_cpu():
            expected = dsv3.trace(prompt.tolist(), w, cfg, None)
        for chunk in (None, 1, 3, 1024):
            on_device = {name: dsv3.xp.asarray(x) for name, x in w.items()}
            named = dsv3.trace(prompt.tolist(), on_device, cfg, chunk)
            for name, x in expected.items():
                assert named[name].dtype == x.dtype
                assert_close(named[name], x, 0 if "indices" in name else tolerance)
    scale = np.sqrt(np.mean(shipped.logits**2))
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-4), (np.float16, 0.02)):
        w = dsv3.Checkpoint(WEIGHTS, shipped.cfg, dtype)
        logits = dsv3.trace(shipped.text["prompts"][0], w, shipped.cfg)["lm_head"]
        if dtype == np.float16:  # for speed: by the root mean square
            assert np.sqrt(np.mean((logits - shipped.logits) ** 2)) < tolerance * scale
        else:
            assert_close(logits, shipped.logits, tolerance)


def gpu_tells_the_shipped_story(shipped, tmp_path):
    """Greedy: the tokens of Hugging Face. Sampled: those that NumPy draws from the same seed."""
    (prompt,), cfg = shipped.story["prompts"], shipped.cfg
    def run(n, **options):
        w = dsv3.Checkpoint(WEIGHTS, cfg)
        return list(dsv3.generate(prompt, w, cfg, n, **options))
    for speculate in (False, True):
        start = time.perf_counter()
        assert run(len(shipped.greedy), speculate=speculate) == shipped.greedy
        print(speculate, (time.perf_counter() - start) / len(shipped.greedy), "s per token")
        options = {"sampling": dsv3.Sampling(0.7, seed=3), "speculate": speculate}
        sampled = run(20, **options)
        with on_the_cpu():
            assert sampled == run(20, **options)


def gpu_streams_what_does_not_fit(shipped, tmp_path):
    w = quantised(make_weights(SMALL))
    directory = write_checkpoint(tmp_path / "w", SMALL, w, 2, None)
    prompt = make_tokens(SMALL, 0, 9).tolist()

    def run(memory):
        w = dsv3.Checkpoint(directory, SMALL, np.float64, memory)
        return dsv3.trace(prompt, w, SMALL)["lm_head"], list(dsv3.generate(prompt, w, SMALL, 9))

    with on_the_cpu():
        logits, tokens = run(None)
    for got_logits, got_tokens in map(run, (None, 40_000, 0)):
        assert_close(got_logits, logits)
        assert got_tokens == tokens


GPU_CHECKS = [gpu_agrees_with_numpy_and_hugging_face, gpu_tells_the_shipped_story,
              gpu_streams_what_does_not_fit]


@pytest.mark.gpu
@pytest.mark.parametrize("check", GPU_CHECKS)
def test_gpu(check, shipped, tmp_path, monkeypatch):
    try:
        monkeypatch.setattr(dsv3, "xp", dsv3.choose_device("gpu"))
    except dsv3.InputError as reason:
        pytest.skip(str(reason))
    check(shipped, tmp_path)
