"""Every promise that deepseek_v3.py makes, as a test.

    pytest                  all of it, some minutes on two cores
    pytest -k absorbed      one property
    pytest -k test_vectors  the conformance kit; with DSV3_PORT=module a port's (the README says how)
    pytest -m long -s       ten thousand tokens
    pytest -m gpu -s        what a GPU can show: parity, generation, too little memory, speed

Properties run in float64 to TIGHT, relative to the largest value; where float32 has a tolerance of its own, it is
stated with the test. Parity is with Hugging Face transformers, whose activations are shipped as data.
"""

import doctest
import functools
import importlib
import inspect
import io
import itertools
import json
import math
import mmap
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
import typing
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import tokenizers
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import deepseek_v3 as dsv3

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
TIGHT = 1e-10
settings.register_profile("default", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("unshrunk", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# ---- Small models --------------------------------------------------------------------------------------------------


@st.composite
def configs(draw, mtp=(0, 2)):
    """Configurations of every structure: with and without compressed queries, groups, shared experts, YaRN, ties."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    yarn = dsv3.Yarn(
        factor=draw(st.sampled_from([1.0, 4.0, 40.0])),
        original_max_position_embeddings=draw(st.sampled_from([8, 4096])),
        mscale=draw(st.sampled_from([None, 0.707, 1.0])),
        mscale_all_dim=draw(st.sampled_from([None, 0.0, 0.707, 1.0])),
        truncate=draw(st.booleans()),
    )
    layers = draw(st.integers(1, 3))
    return dsv3.Config(
        vocab_size=draw(st.integers(5, 30)),
        hidden_size=draw(st.integers(4, 20)),
        num_hidden_layers=layers,
        num_attention_heads=draw(st.integers(1, 4)),
        q_lora_rank=draw(st.one_of(st.none(), st.integers(3, 9))),
        kv_lora_rank=draw(st.integers(2, 9)),
        qk_nope_head_dim=draw(st.integers(1, 9)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 9)),
        attention_bias=draw(st.booleans()),
        intermediate_size=draw(st.integers(3, 12)),
        first_k_dense_replace=draw(st.integers(0, layers - 1)),
        moe_intermediate_size=draw(st.integers(2, 6)),
        n_shared_experts=draw(st.integers(0, 2)),
        n_routed_experts=groups * per_group,
        num_experts_per_tok=draw(st.integers(1, kept * per_group)),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        rope_theta=draw(st.sampled_from([100.0, 1e4, 5e4])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_scaling=draw(st.one_of(st.none(), st.just(yarn))),
        rope_interleave=draw(st.booleans()),
        max_position_embeddings=512,
        tie_word_embeddings=draw(st.booleans()),
        num_nextn_predict_layers=draw(st.integers(*mtp)),
    )


seeds = st.integers(0, 2**32 - 1)
SMALL = dsv3.Config(  # every letter of the dimension key has a size of its own
    vocab_size=31, hidden_size=22, num_hidden_layers=3, num_attention_heads=3, q_lora_rank=13, kv_lora_rank=11,
    qk_nope_head_dim=7, qk_rope_head_dim=4, v_head_dim=5, intermediate_size=17, first_k_dense_replace=1,
    moe_intermediate_size=9, n_routed_experts=12, num_experts_per_tok=6, n_group=4, topk_group=2,
    rope_scaling=dsv3.Yarn(mscale=1.0, mscale_all_dim=1.0), max_position_embeddings=512, num_nextn_predict_layers=2,
)  # fmt: skip


def make_weights(cfg, seed=0, dtype=np.float64):
    """Random weights of a size at which every part of the model matters."""
    rng, w = np.random.default_rng(seed), {}
    for name, shape in dsv3.tensor_shapes(cfg).items():
        x = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif name.endswith("e_score_correction_bias"):
            x = 0.1 * x
        elif len(shape) == 2 and "embed_tokens" not in name:
            x = x * 1.5 / math.sqrt(shape[1])
        w[name] = x.astype(dtype)
    return w


def make_tokens(cfg, seed, *shape):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape)


def assert_close(a, b, tolerance=TIGHT):
    """Equal to `tolerance`, relative to the largest value (at least 1)."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.all(np.isfinite(a)) and np.all(np.isfinite(b))
    scale = max(1.0, float(np.max(np.abs(b), initial=0)))
    assert float(np.max(np.abs(a - b), initial=0)) <= tolerance * scale


# ---- 1. Arrays -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_top_k_is_sorted_and_ties_go_to_the_lowest_index(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert dsv3.top_k(np.array(values, float), k).tolist() == expected


def test_recording_is_off_outside_its_block():
    with dsv3.recording() as outer:
        dsv3.record("a", 1)
        with dsv3.recording() as inner:
            dsv3.record("b", 2)
        dsv3.record("c", 3)
    assert dsv3.record("d", 4) == 4
    assert (outer, inner) == ({"a": 1, "c": 3}, {"b": 2})


# ---- 2. Configuration ----------------------------------------------------------------------------------------------

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


V2_LITE = {  # what its config.json says differently
    "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "q_lora_rank": None, "num_nextn_predict_layers": 0,
}  # fmt: skip


def without(keys, *names):
    return {k: v for k, v in keys.items() if k not in names}


def test_the_defaults_are_the_release():
    assert dsv3.parse_config(RELEASE) == dsv3.Config()
    v31 = RELEASE["quantization_config"] | {"scale_fmt": "ue8m0"}  # its scales are powers of two, still F32
    assert dsv3.parse_config(RELEASE | {"quantization_config": v31}) == dsv3.Config()


def test_both_spellings_of_the_configuration_are_one():
    rope = without(RELEASE["rope_scaling"], "type") | {"rope_type": "yarn", "rope_theta": 10000}
    hf5 = without(RELEASE, "rope_scaling", "rope_theta", "scoring_func", "topk_method", "num_nextn_predict_layers")
    hf5 |= {"rope_parameters": rope, "num_mtp_layers": 1, "rope_interleave": True}
    assert dsv3.parse_config(hf5) == dsv3.Config()
    plain = dsv3.parse_config(hf5 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}})
    assert (plain.rope_scaling, plain.rope_theta) == (None, 5e4)
    assert dsv3.parse_config(without(RELEASE, "rope_scaling")).rope_scaling is None
    assert dsv3.parse_config(RELEASE | {"q_lora_rank": None}).q_lora_rank is None
    null = {"rope_type": None, "partial_rotary_factor": None, "rope_theta": None}
    assert dsv3.parse_config(RELEASE | {"rope_scaling": RELEASE["rope_scaling"] | null}) == dsv3.Config()
    assert dsv3.parse_config(without(RELEASE, "num_attention_heads")) == dsv3.Config()


def test_a_configuration_has_no_routing_of_an_unknown_name():
    for bad in ({"scoring_func": "tanh"}, {"topk_method": "best"}):
        with pytest.raises(dsv3.InputError, match=next(iter(bad))):
            replace(dsv3.Config(), **bad)


def test_what_deepseek_v2_leaves_unsaid():
    cfg = dsv3.parse_config(RELEASE | V2_LITE)
    assert (cfg.scoring_func, cfg.topk_method, cfg.norm_topk_prob) == ("softmax", "greedy", False)
    assert not any(name.endswith("e_score_correction_bias") for name in dsv3.tensor_shapes(cfg))
    bare = without(RELEASE | V2_LITE, *without(V2_LITE, "model_type", "q_lora_rank"))
    assert dsv3.parse_config(bare) == cfg
    groups = RELEASE | V2_LITE | {"topk_method": "group_limited_greedy", "n_group": 256, "topk_group": 8}
    assert dsv3.parse_config(groups).topk_group == 8  # a group of one expert has a best one
    assert dsv3.parse_config(groups | {"topk_method": "greedy", "topk_group": 1}).num_experts_per_tok == 8


def test_null_means_without():
    cfg = dsv3.parse_config(RELEASE | dict.fromkeys(("n_shared_experts", "n_group", "topk_group")))
    assert (cfg.n_shared_experts, cfg.n_group, cfg.topk_group) == (0, 1, 1)
    dense = dsv3.parse_config(RELEASE | {"n_routed_experts": None})
    assert dense.is_dense(60) and dense.num_nextn_predict_layers == 0
    assert dsv3.Config().is_dense(2) and not dsv3.Config().is_dense(3)
    all_dense = replace(dsv3.Config(), first_k_dense_replace=99)
    assert all_dense.is_dense(60) and not all_dense.is_dense(61)  # the MTP module has experts all the same


@pytest.mark.parametrize("change, said", [
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"model_type": "deepseek_v32"}, "model_type 'deepseek_v32'"),
    ({"model_type": ["deepseek_v3"]}, "model_type ['deepseek_v3']"),
    ({"model_type": "deepseek_v2"}, "scoring_func 'sigmoid'"),
    (V2_LITE | {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    (V2_LITE | {"norm_topk_prob": True}, "norm_topk_prob True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method 'greedy'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
    ({"moe_layer_freq": True}, "moe_layer_freq True"),
    ({"num_attention_heads": 1, "num_key_value_heads": True}, "num_key_value_heads"),
    ({"rope_scaling": RELEASE["rope_scaling"] | {"partial_rotary_factor": True}}, "partial_rotary_factor"),
    ({"rope_scaling": []}, "rope_scaling"),
    ({"rope_scaling": False}, "rope_scaling"),
    ({"rms_norm_eps": 1e-300}, "rms_norm_eps"),
    ({"num_nextn_predict_layers": 10**9}, "half a million tensors"),
    ({"num_hidden_layers": 665}, "666 layers of 256 experts are more than half a million tensors"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
    ({"rope_scaling": without(RELEASE["rope_scaling"], "factor")}, "factor"),
    ({"rope_scaling": RELEASE["rope_scaling"] | {"original_max_position_embeddings": 0}}, "original_max_position"),
    ({"rope_parameters": {"rope_type": "default"}}, "contradict"),
    ({"rope_theta": 1}, "rope_theta"),
    ({"num_mtp_layers": 3}, "num_mtp_layers"),
    ({"n_routed_experts": 0}, "n_routed_experts"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": RELEASE["rope_scaling"] | {"factor": "40"}}, "factor"),
    ({"rope_scaling": RELEASE["rope_scaling"] | {"factor": [40]}}, "factor"),
    ({"rope_scaling": RELEASE["rope_scaling"] | {"truncate": 1}}, "truncate"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size"),
    ({"quantization_config": []}, "quantization_config"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    ({"hidden_size": "7168"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size must be an integer from 1 to 1e12, not 0"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a number from 1e-12 to 1e12, not -1e-06"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
    ({"n_group": 7}, "n_group"),
    ({"n_group": 256, "topk_group": 8}, "n_group"),
    ({"topk_group": 9}, "topk_group"),
    ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok"),
])  # fmt: skip
def test_a_configuration_that_is_not_implemented_is_refused_by_name(change, said):
    with pytest.raises(dsv3.InputError) as refusal:
        dsv3.parse_config(RELEASE | change)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


# ---- 3. Primitives -------------------------------------------------------------------------------------------------


@given(seeds, st.floats(1e-2, 1e2))
def test_rms_norm_ignores_scale(seed, factor):
    x, weight = np.random.default_rng(seed).standard_normal((2, 3, 7))
    assert_close(dsv3.rms_norm(x * factor, weight[0], 1e-300), dsv3.rms_norm(x, weight[0], 1e-300))
    assert_close(dsv3.rms_norm(x, weight[0], 0.5), x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * weight[0])


@pytest.mark.parametrize("shape", [(3, 2), (700, 200), (200, 5000), (2, 600_000), (2, 3, 1100, 130), (2, 1, 9, 4)])
def test_products_of_every_form_are_one(shape):
    """One row, a few, some, many, over matrices of one piece and of several, one pair or a batch of them: x W^T."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape)
    for rows in (1, 2, 3, 4, 5, 192, 193):
        x = rng.standard_normal((*shape[:-2], rows, shape[-1]))
        assert_close(dsv3.product(x, w), np.einsum("...mx,...yx->...my", x, w), 1e-12)


@pytest.mark.parametrize("tokens", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("shape", [(3, 7, 5), (4, 128, 130)])
def test_each_head_has_a_matrix_of_its_own(tokens, shape):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal(shape), rng.standard_normal((*tokens, *shape[:2]))
    each = [x[:, :, h] @ w[h] for h in range(len(w))]
    assert_close(dsv3._per_head(x, w), np.stack(each, axis=2), 1e-12)


def test_batched_products_go_in_pieces_too():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 4, 1000)), rng.standard_normal((2, 3, 600, 1000))
    assert_close(dsv3.product(x, w), np.einsum("...mx,...yx->...my", x, w), 1e-12)


def test_half_precision_is_widened_for_statistics_and_rounded_once_before_the_weight():
    x = np.array([300.0, -0.5], np.float16)  # 300^2 overflows float16
    weight = np.array([1.0009765625, 3.0], np.float16)
    normed = (x.astype(np.float32) / np.sqrt(np.float32(300.0**2 + 0.25) / 2 + np.float32(1e-6))).astype(np.float16)
    got = dsv3.rms_norm(x, weight, 1e-6)
    assert got.dtype == np.float16 and np.array_equal(got, normed * weight)
    even = dsv3.softmax(np.zeros(70000, np.float16))  # their sum overflows float16
    assert even.dtype == np.float16 and np.all(even == np.float16(1 / 70000))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_no_activation_overflows(dtype):
    extreme = np.array([-1e4, -100, -1, 0, 1, 100, 1e4], dtype)
    with np.errstate(all="raise", under="ignore"):
        y = dsv3.sigmoid(extreme)
        p = dsv3.softmax(extreme)
        dsv3.rms_norm(extreme, np.ones(7, dtype), 1e-6)
    exact = [1 / (1 + math.exp(-float(v))) if v > -700 else 0.0 for v in extreme]
    assert y.dtype == dtype and np.allclose(y, exact, rtol=0, atol=4 * np.finfo(dtype).eps + 1e-38)
    assert p[-1] == 1


@given(configs(), seeds, st.integers(0, 200))
def test_rope_keeps_norms_and_its_scores_depend_on_distance_alone(cfg, seed, shift):
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 1, cfg.qk_rope_head_dim))

    def rotated(x, position):
        where = dsv3.positions([position], 1, cfg, np.float64)
        return dsv3.rope(x, where.cos_BTP, where.sin_BTP, cfg.rope_interleave)

    magnitude = dsv3.rope_magnitude(cfg)
    assert_close(np.linalg.norm(rotated(q, shift)), magnitude * np.linalg.norm(q))
    score = np.sum(rotated(q, 5 + shift) * rotated(k, 2 + shift))
    assert_close(score, np.sum(rotated(q, 5) * rotated(k, 2)))
    assert_close(score, np.sum(rotated(q, 3) * rotated(k, 0)))


@given(configs(), seeds)
def test_rope_layouts_are_one_rotation_of_permuted_weights(cfg, seed):
    R = cfg.qk_rope_head_dim
    x = np.random.default_rng(seed).standard_normal((1, 3, R))
    where = dsv3.positions([7], 3, cfg, np.float64)
    halves = np.concatenate([np.arange(0, R, 2), np.arange(1, R, 2)])
    neighbours = dsv3.rope(x, where.cos_BTP, where.sin_BTP, True)
    assert_close(neighbours[..., halves], dsv3.rope(x[..., halves], where.cos_BTP, where.sin_BTP, False))
    as_complex = (x[..., ::2] + 1j * x[..., 1::2]) * (where.cos_BTP + 1j * where.sin_BTP)
    assert_close(neighbours[..., ::2], as_complex.real)
    assert_close(neighbours[..., 1::2], as_complex.imag)


@given(configs())
def test_yarn_of_factor_1_is_rope(cfg):
    yarn = replace(cfg, rope_scaling=dsv3.Yarn(factor=1.0, mscale=1.0, mscale_all_dim=1.0))
    plain = replace(cfg, rope_scaling=None)
    assert_close(dsv3.rope_frequencies(yarn), dsv3.rope_frequencies(plain))
    assert dsv3.rope_magnitude(yarn) == dsv3.rope_magnitude(plain) == 1
    size = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    assert dsv3.softmax_scale(yarn) == dsv3.softmax_scale(plain) == size**-0.5


def test_yarn_of_the_671b_model_in_numbers():
    """The published constants: frequencies of the ramp (factor 40, original context 4096), mscale^2 in the scale."""
    cfg = dsv3.Config()
    freq, plain = dsv3.rope_frequencies(cfg), dsv3.rope_frequencies(replace(cfg, rope_scaling=None))
    assert np.array_equal(freq[:11], plain[:11]) and np.allclose(freq[23:], plain[23:] / 40, rtol=1e-15)
    assert np.allclose(freq[[10, 11, 16, 22]], [0.05623413, 0.03900693, 0.0055, 1.7782794e-4], rtol=1e-6)
    assert math.isclose(dsv3.softmax_scale(cfg), 0.1352338, rel_tol=1e-6)
    k2 = replace(cfg, rope_theta=5e4, rope_scaling=replace(cfg.rope_scaling, factor=32.0, beta_fast=1.0))
    assert math.isclose(dsv3.softmax_scale(k2), 0.1308608, rel_tol=1e-6)
    ramp = dsv3.rope_frequencies(k2) / dsv3.rope_frequencies(replace(k2, rope_scaling=None))
    assert np.allclose(ramp[[19, 20]], [1, 1 / 32])


@given(
    st.integers(1, 40), st.floats(1e2, 1e6), st.floats(1.5, 64), st.integers(8, 2**17), st.floats(1, 40), st.booleans()
)
def test_yarn_frequencies_pair_by_pair(pairs, theta, factor, original, beta_fast, truncate):
    """The ramp of arXiv:2309.00071 with the bounds of DeepSeek's code: rounded outwards, within [0, R - 1]."""
    R = 2 * pairs
    yarn = dsv3.Yarn(factor, original, beta_fast, beta_fast / 8, truncate=truncate)
    got = dsv3.rope_frequencies(replace(SMALL, qk_rope_head_dim=R, rope_theta=theta, rope_scaling=yarn))
    low, high = (R * math.log(original / (2 * math.pi * b)) / (2 * math.log(theta)) for b in (beta_fast, beta_fast / 8))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    width = high - low if high != low else 0.001
    for j in range(pairs):
        plain, slowed = theta ** (-2 * j / R), min(max((j - low) / width, 0), 1)
        assert math.isclose(got[j], plain * ((1 - slowed) + slowed / factor), rel_tol=1e-9)


def test_yarn_magnitude_follows_the_mscales():
    def magnitude(**settings):
        return dsv3.rope_magnitude(replace(SMALL, rope_scaling=dsv3.Yarn(factor=40.0, **settings)))

    m = 0.1 * math.log(40) + 1
    assert magnitude(mscale=1.0, mscale_all_dim=1.0) == 1
    assert magnitude(mscale=1.0, mscale_all_dim=0.0) == magnitude(mscale=0.5) == magnitude() == m
    assert magnitude(mscale=0.5, mscale_all_dim=1.0) == (0.05 * math.log(40) + 1) / m
    assert magnitude(attention_factor=1.25, mscale=1.0) == 1.25


def test_phases_are_exact_at_the_last_position():
    where = dsv3.positions([163839], 1, dsv3.Config(), np.float64)
    exact = [math.cos(163839 * f) for f in dsv3.rope_frequencies(dsv3.Config())]
    assert_close(where.cos_BTP[0, 0], exact, 1e-12)
    rounded = np.float32(163839) * dsv3.rope_frequencies(dsv3.Config()).astype(np.float32)
    assert 1e-3 < np.abs(rounded - 163839 * dsv3.rope_frequencies(dsv3.Config())).max() < 1e-2


# ---- 4. Attention --------------------------------------------------------------------------------------------------


def plain_attention(q, k, v, visible, scale):
    """Eq. (10) for every query and head by itself; k and v have a head for every query head."""
    B, T, H, _ = q.shape
    out = np.zeros((B, T, H, v.shape[-1]))
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        seen = np.flatnonzero(visible[b, t])
        e = np.exp([scale * (q[b, t, h] @ k[b, s, h]) for s in seen])
        out[b, t, h] = sum(p * v[b, s, h] for p, s in zip(e / e.sum(), seen, strict=True))
    return out


@given(seeds, st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3), (1, 1)]), st.integers(1, 4), st.integers(0, 3))
def test_attention_is_mha_gqa_or_mqa_by_its_key_heads(seed, heads, T, past):
    (H, J), rng, S = heads, np.random.default_rng(seed), T + past
    q, k, v = (rng.standard_normal((2, n, h, d)) for n, h, d in ((T, H, 5), (S, J, 5), (S, J, 3)))
    visible = np.arange(S) <= past + np.arange(T)[:, None] + np.zeros((2, 1, 1), int)
    repeated = np.repeat(k, H // J, axis=2), np.repeat(v, H // J, axis=2)
    few = dsv3.attention(q, k, v, visible, 0.7)
    assert_close(few, dsv3.attention(q, *repeated, visible, 0.7))
    assert_close(few, plain_attention(q, *repeated, visible, 0.7))


@pytest.mark.parametrize("scores", [1, 30, 100, 250])
def test_attention_some_rows_at_a_time_is_the_same(monkeypatch, scores):
    """With room for one row of scores, a few, a head; keys of all heads are expanded only where they fit."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 5, 6, 3), (2, 7, 2, 3), (2, 7, 2, 4)))
    visible = np.arange(7) <= np.array([[2], [0]])[:, None] + np.arange(5)[:, None]
    expected = plain_attention(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), visible, 0.3)
    monkeypatch.setattr(dsv3, "SCORES", scores)
    monkeypatch.setattr(dsv3, "FEW", 2)
    assert_close(dsv3.attention(q, k, v, visible, 0.3), expected)
    for limit in (3072, 3071):  # 64 positions of 3 heads of 7 + 4 + 5
        monkeypatch.setattr(dsv3, "EXPANDED", limit)
        assert dsv3.absorbing_is_cheaper(64, 64, SMALL) == (limit < 3072)
        assert dsv3.absorbing_is_cheaper(64, 64, SMALL, 2)


def attention_inputs(cfg, seed, T, past, dtype=np.float64):
    """Weights of layer 0 and what its two forms of attention take, for T queries after `past` tokens."""
    w, S = make_weights(cfg, seed, dtype), past + T
    x_BTD = np.random.default_rng(seed + 1).standard_normal((2, S, cfg.hidden_size)).astype(dtype)
    name, where = "model.layers.0.self_attn", dsv3.positions([0, 0], S, cfg, dtype)
    q_nope, q_rope = dsv3.mla_query(x_BTD, w, name, cfg, where)
    kv = dsv3.mla_latent(x_BTD, w, name, cfg, where)
    return q_nope[:, past:], q_rope[:, past:], kv, w, name, cfg, where.visible_BTS[:, past:]


@given(configs(), seeds, st.integers(1, 5), st.integers(0, 5))
def test_absorbed_attention_equals_naive(cfg, seed, T, past):
    inputs = attention_inputs(cfg, seed, T, past)
    assert_close(dsv3.mla_absorbed(*inputs), dsv3.mla_naive(*inputs))


@given(configs(), seeds, st.integers(1, 5), st.integers(0, 5))
def test_absorbed_attention_equals_naive_in_float32(cfg, seed, T, past):
    inputs = attention_inputs(cfg, seed, T, past, np.float32)
    absorbed = dsv3.mla_absorbed(*inputs)
    assert absorbed.dtype == np.float32
    assert_close(absorbed, dsv3.mla_naive(*inputs), 1e-4)


@given(configs(), seeds)
def test_naive_attention_equals_the_equations_head_by_head(cfg, seed):
    """Eqs. (2), (4), (5), (9), (10) with the matrices of each head sliced out of the checkpoint's tensors."""
    q_nope, q_rope, kv, w, name, _, visible = inputs = attention_inputs(cfg, seed, 3, 2)
    N, V, C = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank
    up, q, k, v = w[f"{name}.kv_b_proj.weight"], [], [], []
    for h in range(cfg.num_attention_heads):
        w_uk, w_uv = up[h * (N + V) :][:N], up[h * (N + V) + N :][:V]
        q.append(np.concatenate([q_nope[:, :, h], q_rope[:, :, h]], -1))
        k.append(np.concatenate([kv[..., :C] @ w_uk.T, kv[..., C:]], -1))
        v.append(kv[..., :C] @ w_uv.T)
    expected = plain_attention(*(np.stack(x, 2) for x in (q, k, v)), visible, dsv3.softmax_scale(cfg))
    assert_close(dsv3.mla_naive(*inputs), expected)


@given(configs(), seeds)
def test_absorbed_attention_is_multi_query_attention_over_the_entries_of_the_cache(cfg, seed):
    q_nope, q_rope, kv, w, name, _, visible = inputs = attention_inputs(cfg, seed, 3, 2)
    w_uk, w_uv = dsv3.kv_up(w, name, cfg)
    q = np.concatenate([np.einsum("bthn,hnc->bthc", q_nope, w_uk), q_rope], -1)
    rows = kv[:, :, None]
    o = dsv3.attention(q, rows, rows[..., : cfg.kv_lora_rank], visible, dsv3.softmax_scale(cfg))
    assert_close(dsv3.mla_absorbed(*inputs), np.einsum("bthc,hvc->bthv", o, w_uv))


def test_the_cheaper_form_is_the_one_with_fewer_multiplications(monkeypatch):
    """Count them: a decoding step absorbs, a long prompt expands, and between them the sizes of the products decide."""

    counted, chosen, matmul = [], set(), Device.__matmul__

    def counting(x, y):
        product = matmul(x, y)
        counted.append(product.host.size * x.shape[-1])
        return product

    def multiplications(form, *inputs):
        counted.clear()
        form(*(dsv3.to_device(x) if isinstance(x, np.ndarray) else x for x in inputs))
        return sum(counted)

    monkeypatch.setattr(Device, "__matmul__", counting)
    for T, past in [(1, 0), (1, 9), (2, 60), (5, 40), (8, 8), (9, 0), (30, 0), (40, 40), (10, 50), (11, 49)]:
        monkeypatch.setattr(dsv3, "xp", np)
        q_nope, q_rope, kv, w, name, cfg, visible = attention_inputs(SMALL, 0, T, past)
        monkeypatch.setattr(dsv3, "xp", Strict())
        w = {k: dsv3.to_device(v) for k, v in w.items()}
        forms = dsv3.mla_absorbed, dsv3.mla_naive
        costs = [multiplications(form, q_nope, q_rope, kv, w, name, cfg, visible) for form in forms]
        chosen.add(absorbs := dsv3.absorbing_is_cheaper(T, T + past, SMALL))
        assert absorbs == (costs[0] < costs[1]), (T, past, costs)
    assert chosen == {True, False}


def run_in_chunks(token_BT, sizes, w, cfg, start_B=None):
    """forward through a cache, in chunks of the given sizes, the last one taking what is left."""
    cache, start_B, parts, at = dsv3.Cache(len(token_BT)), np.zeros(len(token_BT), int), [], 0
    for size in [*sizes, token_BT.shape[1]]:
        if at < token_BT.shape[1]:
            parts.append(dsv3.forward(token_BT[:, at : at + size], w, cfg, cache, start_B + at))
            at += size
    return np.concatenate(parts, axis=1), cache


@given(configs(mtp=(0, 0)), seeds, st.lists(st.integers(1, 5), max_size=6))
def test_any_chunks_through_the_cache_equal_one_pass_without(cfg, seed, sizes):
    w, token_BT = make_weights(cfg, seed), make_tokens(cfg, seed, 2, 9)
    chunked, cache = run_in_chunks(token_BT, sizes, w, cfg)
    assert_close(chunked, dsv3.forward(token_BT, w, cfg))
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    assert all(rows.shape[0] == 2 and rows.shape[2] == latent for rows in cache.layers.values())
    assert len(cache.layers) == cfg.num_hidden_layers


@given(configs(mtp=(0, 0)), seeds)
def test_any_chunks_equal_one_pass_in_float32(cfg, seed):
    """In float32 a routing decision may flip where two affinities are closer than its rounding, so on the attention."""
    cfg = replace(cfg, num_hidden_layers=1, first_k_dense_replace=1)
    w, token_BT = make_weights(cfg, seed, np.float32), make_tokens(cfg, seed, 2, 9)
    assert_close(run_in_chunks(token_BT, [4, 1, 2], w, cfg)[0], dsv3.forward(token_BT, w, cfg), 3e-4)


@given(configs(), seeds, st.lists(st.integers(1, 7), min_size=2, max_size=4))
def test_a_padded_batch_equals_its_rows_alone(cfg, seed, lengths):
    w = make_weights(cfg, seed)
    prompts = [make_tokens(cfg, seed + b, n).tolist() for b, n in enumerate(lengths)]
    together = dsv3.trace(prompts, w, cfg)
    for n, prompt in enumerate(prompts):
        for name, alone in dsv3.trace([prompt], w, cfg).items():
            assert_close(together[f"{n}/{name}"], alone)


@given(configs(), seeds, st.integers(1, 7))
def test_the_future_never_changes_the_past(cfg, seed, t):
    w, token_BT = make_weights(cfg, seed), make_tokens(cfg, seed, 1, 8)
    changed = token_BT.copy()
    changed[:, t:] = (changed[:, t:] + 1) % cfg.vocab_size
    h, g = dsv3.forward(token_BT, w, cfg), dsv3.forward(changed, w, cfg)
    assert_close(h[:, :t], g[:, :t])
    for k in range(1, cfg.num_nextn_predict_layers + 1):  # state i of depth k has seen tokens up to i + k
        h = dsv3.mtp(k, h[:, : 8 - k], token_BT[:, k:], w, cfg)
        g = dsv3.mtp(k, g[:, : 8 - k], changed[:, k:], w, cfg)
        assert_close(h[:, : max(0, t - k)], g[:, : max(0, t - k)])
        if 0 <= t - k < 8 - k:
            assert np.abs(h[:, t - k] - g[:, t - k]).max() > 1e-12


@given(configs(mtp=(0, 0)), seeds)
def test_positions_matter_only_by_their_differences(cfg, seed):
    w, token_BT = make_weights(cfg, seed), make_tokens(cfg, seed, 1, 5)
    x_BTD = w["model.embed_tokens.weight"][token_BT]
    out = [dsv3.mla(x_BTD, w, 0, cfg, dsv3.positions([0], 5, cfg, np.float64), None)]
    shifted = dsv3.positions([40], 5, cfg, np.float64)
    out.append(dsv3.mla(x_BTD, w, 0, cfg, shifted._replace(visible_BTS=shifted.visible_BTS[..., 40:]), None))
    assert_close(*out)


# ---- 5. DeepSeekMoE ------------------------------------------------------------------------------------------------


def plain_route(score, bias, cfg):
    """Eqs. (13)-(16) with groups, for one token, in plain Python -> {expert: gate}. A group's rank: its best two
    together, its best (DeepSeek-V2), or none at all (V2-Lite)."""
    size = cfg.n_routed_experts // cfg.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(cfg.n_group)]
    count = {"noaux_tc": 2, "group_limited_greedy": 1, "greedy": 0}[cfg.topk_method]
    best = [sum(sorted((score[e] + bias[e] for e in group), reverse=True)[:count]) for group in groups]
    kept = sorted(range(cfg.n_group), key=lambda g: (-best[g], g))[: cfg.topk_group if count else None]
    candidates = sorted(e for g in kept for e in groups[g])
    chosen = sorted(candidates, key=lambda e: (-(score[e] + bias[e]), e))[: cfg.num_experts_per_tok]
    total = sum(score[e] for e in chosen) if cfg.norm_topk_prob else 1
    return {e: score[e] / total * cfg.routed_scaling_factor for e in chosen}


def gate_weights(cfg, seed, bias=0.0):
    rng = np.random.default_rng(seed)
    w = {"mlp.gate.weight": rng.standard_normal((cfg.n_routed_experts, cfg.hidden_size)),
         "mlp.gate.e_score_correction_bias": 0.2 * rng.standard_normal(cfg.n_routed_experts) + bias}  # fmt: skip
    return w, rng.standard_normal((2, 3, cfg.hidden_size))


def routed(x, w, cfg):
    """Dense gates (B, T, E)."""
    index, gate = dsv3.route(x, w, "mlp", cfg)
    dense = np.zeros((*x.shape[:2], cfg.n_routed_experts))
    np.put_along_axis(dense, index, gate, -1)
    return dense


@given(configs(), seeds, st.sampled_from([0.0, 3.0, -5.0]), st.sampled_from(["group_limited_greedy", "greedy", None]))
def test_routing_equals_the_equations_token_by_token(cfg, seed, bias, of_v2):
    w, x = gate_weights(cfg, seed, bias)
    logits = x @ w["mlp.gate.weight"].T
    score, bias = 1 / (1 + np.exp(-logits)), w["mlp.gate.e_score_correction_bias"]
    if of_v2:
        cfg = replace(cfg, scoring_func="softmax", topk_method=of_v2)
        score, bias = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), 0 * bias
    got = routed(x, w, cfg)
    for b, t in np.ndindex(2, 3):
        expected = plain_route(score[b, t], bias, cfg)
        assert_close(got[b, t], [expected.get(e, 0) for e in range(cfg.n_routed_experts)])


@given(configs(), seeds)
def test_routing_picks_k_experts_of_few_groups_and_its_gates_sum_to_the_scale(cfg, seed):
    w, x = gate_weights(cfg, seed)
    chosen = (dense := routed(x, w, cfg)) > 0
    assert (chosen.sum(-1) == cfg.num_experts_per_tok).all()
    assert (chosen.reshape(2, 3, cfg.n_group, -1).any(-1).sum(-1) <= cfg.topk_group).all()
    if cfg.norm_topk_prob:
        assert_close(dense.sum(-1), np.full((2, 3), cfg.routed_scaling_factor))


@given(configs(), seeds, st.floats(-8, 8))
def test_one_constant_on_all_biases_changes_nothing(cfg, seed, constant):
    w, x = gate_weights(cfg, seed)
    moved = w | {"mlp.gate.e_score_correction_bias": w["mlp.gate.e_score_correction_bias"] + constant}
    assert_close(routed(x, moved, cfg), routed(x, w, cfg))


@given(configs(), seeds)
def test_the_bias_never_enters_a_gate(cfg, seed):
    w, x = gate_weights(cfg, seed)
    dense, score = routed(x, w, cfg), 1 / (1 + np.exp(-x @ w["mlp.gate.weight"].T))
    chosen = dense != 0
    total = np.where(chosen, score, 0).sum(-1, keepdims=True) if cfg.norm_topk_prob else 1
    assert_close(dense, np.where(chosen, score / total * cfg.routed_scaling_factor, 0))


@given(configs(), seeds)
def test_permuting_experts_within_groups_or_whole_groups_permutes_the_routing(cfg, seed):
    w, x = gate_weights(cfg, seed)
    rng, experts = np.random.default_rng(seed), np.arange(cfg.n_routed_experts).reshape(cfg.n_group, -1)
    order = rng.permuted(experts, axis=1)[rng.permutation(cfg.n_group)].ravel()
    permuted = {name: tensor[order] for name, tensor in w.items()}
    assert_close(routed(x, permuted, cfg), routed(x, w, cfg)[..., order])


def test_ties_of_experts_and_groups_go_to_the_lowest_index():
    cfg = replace(SMALL, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
    w = {"mlp.gate.weight": np.zeros((8, cfg.hidden_size)), "mlp.gate.e_score_correction_bias": np.zeros(8)}
    index, gate = dsv3.route(np.ones((1, 1, cfg.hidden_size)), w, "mlp", cfg)
    assert index.tolist() == [[[0, 1, 2]]]
    assert_close(gate, np.full((1, 1, 3), 2.5 / 3))


def test_gates_of_tiny_affinities_are_still_normalised():
    """Affinities of e^-30 each: the guard against division by zero must not show."""
    cfg = replace(SMALL, n_group=1, topk_group=1, num_experts_per_tok=2)
    w = {"mlp.gate.weight": np.full((12, 22), -30 / 22), "mlp.gate.e_score_correction_bias": np.zeros(12)}
    _, gate = dsv3.route(np.ones((1, 1, 22)), w, "mlp", cfg)
    assert_close(gate, np.full((1, 1, 2), 1.25), 1e-6)


def test_routing_is_wide_even_in_half_precision():
    w, x = gate_weights(SMALL, 0)
    half = {name: tensor.astype(np.float16) for name, tensor in w.items()}
    _, gate = dsv3.route(x.astype(np.float16), half, "mlp", SMALL)
    assert gate.dtype == np.float32


@given(configs(), seeds)
def test_chosen_experts_equal_the_sum_over_all(cfg, seed):
    w, name = make_weights(cfg, seed), f"model.layers.{cfg.first_k_dense_replace}.mlp"
    x = np.random.default_rng(seed).standard_normal((2, 4, cfg.hidden_size))
    index, gate = dsv3.route(x, w, name, cfg)
    forms = (dsv3.moe_chosen, dsv3.moe_gathered, dsv3.moe_all)
    chosen, gathered, summed = (form(x, w, name, index, gate, cfg) for form in forms)
    assert_close(chosen, summed)
    assert_close(gathered, summed)

    def mlp(x, name):  # eq. (12), expert by expert
        gate = w[f"{name}.gate_proj.weight"] @ x
        return w[f"{name}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (w[f"{name}.up_proj.weight"] @ x))

    whole = dsv3.moe(x, w, name, cfg, dsv3.Cache(2))
    for b, t in np.ndindex(2, 4):
        y = sum(g * mlp(x[b, t], f"{name}.experts.{e}") for e, g in zip(index[b, t], gate[b, t], strict=True))
        assert_close(chosen[b, t], y)
        assert_close(whole[b, t], y + mlp(x[b, t], f"{name}.shared_experts") if cfg.n_shared_experts else y)


def test_chosen_experts_read_only_the_chosen_ones():
    class Reads(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    read, w = set(), Reads(make_weights(SMALL))
    x = np.random.default_rng(0).standard_normal((1, 1, 22))
    name = "model.layers.1.mlp"
    index, gate = dsv3.route(x, w, name, SMALL)
    chosen = set(index.ravel().tolist())
    dsv3.moe_chosen(x, w, name, index, gate, SMALL)
    assert {int(name.split(".")[5]) for name in read if ".experts." in name} == chosen and len(chosen) == 6


@given(seeds)
def test_the_bias_update_evens_skewed_loads(seed):
    """Routing fixed tokens again and again, the update alone brings the worst overload down."""
    cfg = replace(SMALL, hidden_size=8, num_experts_per_tok=2)
    w, _ = gate_weights(cfg, seed)
    rng = np.random.default_rng(seed)
    x = 0.5 * rng.standard_normal((4, 64, 8)) + 0.5  # alike, so that some experts suit them all
    bias, violations = np.zeros(12), []
    for _ in range(300):
        index, _ = dsv3.route(x, w | {"mlp.gate.e_score_correction_bias": bias}, "mlp", cfg)
        load = dsv3.expert_load(index, cfg)
        assert load.sum() == 4 * 64 * 2 and np.array_equal(load, np.bincount(index.ravel(), minlength=12))
        violations.append(dsv3.max_violation(load))
        bias = dsv3.update_bias(bias, load, 0.005)
    assume(violations[0] > 1)
    assert np.mean(violations[-20:]) < 0.5 * violations[0]


def test_the_bias_update_as_printed():
    bias = np.array([0.5, -0.25, 0.0, 1.0])
    assert dsv3.update_bias(bias, np.array([9, 1, 5, 5]), 0.001).tolist() == [0.499, -0.249, 0.0, 1.0]
    assert dsv3.max_violation(np.array([9, 1, 5, 5])) == pytest.approx(0.8)


@given(configs(), seeds)
def test_the_balance_loss_as_printed(cfg, seed):
    """Eqs. (17)-(20), sequence by sequence; perfectly even affinities give exactly 1 (times alpha)."""
    score, K, E = np.random.default_rng(seed).random((3, 5, cfg.n_routed_experts)), cfg.num_experts_per_tok, 0
    E, loss = cfg.n_routed_experts, 0.0
    for sequence in score:
        f, p = np.zeros(E), np.zeros(E)
        for s in sequence:
            for e in sorted(range(E), key=lambda e: (-s[e], e))[:K]:
                f[e] += E / (K * len(sequence))
            p += s / s.sum() / len(sequence)
        loss += f @ p / 3
    assert_close(dsv3.balance_loss(score, cfg), loss)
    assert_close(dsv3.balance_loss(np.ones_like(score), cfg), 1.0)


# ---- 6, 7. The model, multi-token prediction, the objective ----------------------------------------------------------


VECTORS = WEIGHTS / "vectors"
sys.path.insert(0, str(VECTORS))
kit = importlib.import_module("case")
INDEX, PARITY = json.loads(kit.INDEX.read_text("utf-8")), np.load(VECTORS / "parity.npz")
CASES = [
    name for name, case in INDEX.items() if case["function"] == "trace" and name not in ("chunks", "ragged", "half")
]


@functools.cache
def stored(case):
    """Configuration and weights of a case, as its checkpoint stores them."""
    cfg = dsv3.parse_config(INDEX[case]["config"])
    return cfg, {name: kit.weight(INDEX[case], name, shape) for name, shape in dsv3.tensor_shapes(cfg).items()}


def parity_case(case, dtype):
    """Configuration, weights, tokens, and what Hugging Face transformers computes in float64 under our names."""
    (cfg, w), (tokens,) = stored(case), INDEX[case]["prompts"]
    return cfg, {name: x.astype(dtype) for name, x in w.items()}, tokens, expected(case)


def expected(case):
    return {name: PARITY[f"{case}/{name}"] for name in INDEX[case]["arrays"]}


def check_parity(case, dtype, tolerance):
    """Every array that an independent implementation computed; the chosen experts exactly, in float32 too."""
    cfg, w, tokens, expected = parity_case(case, dtype)
    named = dsv3.trace([tokens], {name: dsv3.to_device(x) for name, x in w.items()}, cfg)
    for name, x in expected.items():
        got = named[name]
        if name.endswith((".gate.indices", ".gate.weights")):  # listed by expert
            order = np.argsort(named[name.replace("weights", "indices")], axis=-1)
            got = np.take_along_axis(got, order, axis=-1)
        if name.endswith("indices"):
            assert np.array_equal(got, x), name
        else:
            assert_close(got, x, tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 3e-5)])
def test_parity_with_hugging_face_transformers(case, dtype, tolerance):
    check_parity(case, dtype, tolerance)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", [case for case in CASES if f"{case}/greedy" in PARITY])
def test_greedy_tokens_are_those_of_hugging_face_transformers(case, dtype):
    cfg, w, tokens, _ = parity_case(case, dtype)
    greedy = PARITY[f"{case}/greedy"].tolist()
    for speculate in (False, True):
        assert generated([tokens], w, cfg, len(greedy), speculate=speculate) == [greedy]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", [case for case in CASES if f"{case}/drafts" in PARITY])
def test_drafts_and_acceptances_are_those_of_hugging_face_transformers(case, dtype, monkeypatch):
    """drafts[i] is what HF's MTP module, shown all true pairs up to (h_i, t_i+1), makes of t_i+2."""
    cfg, w, tokens, _ = parity_case(case, dtype)
    text, drafts = tokens + PARITY[f"{case}/greedy"].tolist(), PARITY[f"{case}/drafts"].tolist()
    verdicts, verify = [], dsv3.verify

    def watched(p_W, q_W, draft, rng):
        stands, token = verify(p_W, q_W, draft, rng)
        verdicts.append((draft, stands))
        return stands, token

    monkeypatch.setattr(dsv3, "verify", watched)
    generated([tokens], w, cfg, len(text) - len(tokens))
    at, expected = len(tokens) + 1, []  # the first token is the main model's, the first draft stands at this place
    while at < len(text):
        expected.append((drafts[at - 2], drafts[at - 2] == text[at]))
        at += 1 + expected[-1][1]
    assert verdicts[: len(expected)] == expected and len(verdicts) - len(expected) <= 1
    assert {stands for _, stands in expected} == {False, True}


@given(configs(), seeds)
def test_forward_with_a_cache_equals_the_definition_in_every_named_array(cfg, seed):
    w, tokens = make_weights(cfg, seed), make_tokens(cfg, seed, 6)
    computed = dsv3.trace([tokens.tolist()], w, cfg)
    with dsv3.recording() as defined:
        h = dsv3.forward(tokens[None], w, cfg)
        for k in range(1, cfg.num_nextn_predict_layers + 1):
            h = dsv3.mtp(k, h[:, : 6 - k], tokens[None, k:], w, cfg)
    for name, x in defined.items():
        assert_close(computed[name], x[0])


def test_the_trace_names_every_module_in_the_order_of_computation():
    cfg = replace(SMALL, num_hidden_layers=2, num_nextn_predict_layers=1)
    named = dsv3.trace([make_tokens(cfg, 0, 5).tolist()], make_weights(cfg), cfg)
    attention = ["input_layernorm", "self_attn.q_rope", "self_attn.kv_latent", "self_attn.k_rope", "self_attn"]
    gate = ["mlp.gate.scores", "mlp.gate.indices", "mlp.gate.weights"]
    parts = [*attention, "post_attention_layernorm", *gate, "mlp"]
    blocks = [[f"model.layers.{i}.{part}" for part in parts if i or ".gate." not in part] + [f"model.layers.{i}"]
              for i in range(3)]  # fmt: skip
    assert list(named) == ["model.embed_tokens", *blocks[0], *blocks[1], "model.norm", "lm_head",
                           "model.layers.2.eh_proj", *blocks[2], "model.layers.2.shared_head"]  # fmt: skip
    shapes = {"model.embed_tokens": (5, 22), "model.layers.0.self_attn.q_rope": (5, 3, 4), "lm_head": (5, 31),
              "model.layers.0.self_attn.k_rope": (5, 4), "model.layers.0.self_attn.kv_latent": (5, 11),
              "model.layers.1.mlp.gate.indices": (5, 6), "model.layers.2.shared_head": (4, 31)}  # fmt: skip
    assert {name: named[name].shape for name in shapes} == shapes
    ragged = dsv3.trace([[1], [1, 2, 3]], make_weights(cfg), cfg)
    assert ragged["0/lm_head"].shape == (1, 31) and ragged["0/model.layers.2.shared_head"].shape == (0, 31)
    assert ragged["1/model.layers.2.shared_head"].shape == (2, 31)


@given(configs(mtp=(0, 3)), seeds)
def test_the_training_objective_as_printed(cfg, seed):
    """Eqs. (24), (25) term by term: T - k cross-entropies divided by T, lambda / D; and the loads behind it."""
    w, tokens, T = make_weights(cfg, seed), make_tokens(cfg, seed, 2, 8), 7
    total, parts = dsv3.training_objective(w, tokens, cfg, 0.3, 0.01)

    def log_p(logits, target):
        return logits[target] - logits.max() - math.log(np.exp(logits - logits.max()).sum())

    def head(h):
        return h @ w["model.embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"].T

    h = dsv3.forward(tokens[:, :T], w, cfg)
    logits = head(h)
    assert_close(parts["main"], -np.mean([log_p(logits[b, i], tokens[b, i + 1]) for b in range(2) for i in range(T)]))
    for k in range(1, cfg.num_nextn_predict_layers + 1):
        h = dsv3.mtp(k, h[:, : T - k], tokens[:, k:T], w, cfg)
        logits = head(h)  # state i predicts token i + k + 1
        terms = [[log_p(logits[b, i], tokens[b, i + k + 1]) for i in range(T - k)] for b in range(2)]
        assert_close(parts["mtp"][k - 1], -np.mean([sum(row) / T for row in terms]))
    mtp = sum(parts["mtp"]) / max(1, cfg.num_nextn_predict_layers)
    assert_close(total, parts["main"] + 0.3 * mtp + 0.01 * parts["balance"])
    D, dense = cfg.num_nextn_predict_layers, cfg.first_k_dense_replace
    assert len(parts["load"]) == cfg.num_hidden_layers + D - dense
    for name, load in parts["load"].items():
        k = max(0, int(name.split(".")[2]) - cfg.num_hidden_layers + 1)
        assert load.sum() == 2 * (T - k) * cfg.num_experts_per_tok


def test_absent_mtp_modules_are_none():
    w = make_weights(SMALL)
    assert dsv3.mtp_depth(w, SMALL) == 2
    assert dsv3.mtp_depth({k: v for k, v in w.items() if "layers.4" not in k}, SMALL) == 1
    assert dsv3.mtp_depth(make_weights(replace(SMALL, num_nextn_predict_layers=0)), SMALL) == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_of_the_weights_is_the_dtype_of_the_computation(dtype):
    w = make_weights(SMALL, dtype=dtype)
    named = dsv3.trace([[1, 2, 3]], w, SMALL)
    wide = {np.float16: np.float32}.get(dtype, dtype)
    for name, x in named.items():
        if x.dtype.kind == "f":
            assert x.dtype == (wide if ".gate." in name else dtype), name


CALL = "BTSJZMUXY"  # letters that a call sizes; each has one size within a function


def shapes_that_lie(run, cfg):
    """Run; look at every function of the module as it returns; list what does not fit its suffix. -> (lies, seen)"""
    fixed = {"D": cfg.hidden_size, "H": cfg.num_attention_heads, "N": cfg.qk_nope_head_dim, "R": cfg.qk_rope_head_dim,
             "P": cfg.qk_rope_head_dim // 2, "V": cfg.v_head_dim, "C": cfg.kv_lora_rank, "Q": cfg.q_lora_rank,
             "L": cfg.kv_lora_rank + cfg.qk_rope_head_dim, "E": cfg.n_routed_experts, "K": cfg.num_experts_per_tok,
             "G": cfg.n_group, "W": cfg.vocab_size}  # fmt: skip
    lies, seen = [], set()

    def look(frame, event, _):
        if event != "return" or frame.f_code.co_filename != dsv3.__file__:
            return
        sizes = dict(fixed)
        for name, x in list(frame.f_locals.items()):
            suffix = re.fullmatch(r"\w+_([A-Z]+)", name)
            if not suffix or not hasattr(x, "shape") or name.isupper():
                continue
            letters = suffix[1]
            seen.add(letters)
            if len(letters) != len(x.shape) or any(
                letter not in fixed and letter not in CALL or sizes.setdefault(letter, n) != n
                for letter, n in zip(letters, x.shape, strict=False)
            ):
                lies.append(f"{frame.f_code.co_name}: {name} has shape {x.shape}, {sizes}")

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return lies, seen


def test_no_name_lies_about_its_shape():
    cfg = SMALL
    w = make_weights(cfg)

    def run():
        dsv3.trace([[1, 2, 3, 4, 5], [6, 7]], w, cfg)
        prompts = [make_tokens(cfg, 1, 40).tolist(), [3, 4]]
        list(dsv3.generate(prompts, w, cfg, 5, dsv3.Sampling(1.0, top_k=7, top_p=0.9)))
        dsv3.training_objective(w, make_tokens(cfg, 2, 2, 9), cfg)

    lies, seen = shapes_that_lie(run, cfg)
    assert not lies, "\n".join(lies[:5])
    key = re.findall(r"(?<= )([A-Z])(?:, ([A-Z]))?  \w", dsv3.__doc__.partition("of the call")[2])
    assert len(seen) > 40 and set("".join(seen)) == set("".join(map("".join, key)))  # the header explains each


def test_the_shape_check_sees_a_lie(monkeypatch):
    monkeypatch.setattr(dsv3, "top_k", lambda score, k, honest=dsv3.top_k: honest(score, k + 1))
    lies, _ = shapes_that_lie(lambda: dsv3.trace([[1, 2, 3]], make_weights(SMALL), SMALL), SMALL)
    assert lies


def test_the_definitions_run_under_jax_in_jit_and_grad(monkeypatch):
    """The objective and its gradient under jax.numpy, against NumPy and its finite differences, all in float64."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    cfg, tokens = SMALL, make_tokens(SMALL, 3, 2, 7)
    w = make_weights(cfg, 5)
    rng = np.random.default_rng(0)
    step = {name: 1e-6 * rng.standard_normal(x.shape) * (not name.endswith("correction_bias")) for name, x in w.items()}
    value = float(dsv3.training_objective(w, tokens, cfg)[0])
    ahead, behind = (
        float(dsv3.training_objective({k: w[k] + sign * step[k] for k in w}, tokens, cfg)[0]) for sign in (1, -1)
    )
    monkeypatch.setattr(dsv3, "xp", jax.numpy)
    objective = jax.jit(jax.value_and_grad(lambda w: dsv3.training_objective(w, tokens, cfg)[0]))
    jax_value, grad = objective(w)
    assert_close(float(jax_value), value)
    slope = sum(float((grad[name] * step[name]).sum()) for name in w)
    assert slope == pytest.approx((ahead - behind) / 2, rel=1e-4)
    for name, g in grad.items():
        if ".experts." not in name:  # an expert that no token chose has none
            assert np.any(g) == (not name.endswith("e_score_correction_bias")), name


# ---- 8. Checkpoints ------------------------------------------------------------------------------------------------


def write_checkpoint(directory, cfg, w, config=None, shards=1, dtype=None):
    """A directory in the Hugging Face layout, written with the safetensors library."""
    directory.mkdir(exist_ok=True)
    rope = cfg.rope_scaling and {k: v for k, v in vars(cfg.rope_scaling).items() if v is not None} | {"type": "yarn"}
    keys = vars(cfg) | {"model_type": "deepseek_v3", "rope_scaling": rope, "eos_token_id": None} | (config or {})
    (directory / "config.json").write_text(json.dumps(keys))
    w = {name: x.astype(dtype) if dtype and x.dtype.kind == "f" else x for name, x in w.items()}
    if shards == 1:
        save_file(w, directory / "model.safetensors")
        return directory
    files = {f"model-{i + 1:05}-of-{shards:06}.safetensors": list(w)[i::shards] for i in range(shards)}
    for file, names in files.items():
        save_file({name: w[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def quantised(w, ends="_proj.weight"):
    """The FP8 release's form of some weights: every projection but eh_proj in E4M3 with scales of 128x128 blocks."""
    out = {}
    for name, x in w.items():
        if not name.endswith(ends) or "eh_proj" in name:
            out[name] = x.astype(np.float32 if "bias" in name else ml_dtypes.bfloat16)
            continue
        rows, columns = -(-x.shape[0] // 128), -(-x.shape[1] // 128)
        scale = np.zeros((rows, columns), np.float32)
        code = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
        for i, j in np.ndindex(rows, columns):
            block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            scale[i, j] = np.abs(x[block]).max() / 448
            code[block] = (x[block] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
        out[name], out[f"{name}_scale_inv"] = code, scale
    return out


def test_every_fp8_code_reads_as_ml_dtypes_reads_it():
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert dsv3.e4m3_values().tobytes() == values.tobytes()


@given(st.integers(1, 300), st.integers(1, 300), seeds)
def test_fp8_blocks_are_code_times_scale_bit_for_bit(rows, columns, seed):
    rng = np.random.default_rng(seed)
    code = rng.choice(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), (rows, columns))  # all but the NaNs
    scale = rng.random((-(-rows // 128), -(-columns // 128)), np.float32) * 1e-3
    got = dsv3.decode("F8_E4M3", code, scale)
    values = code.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = np.array([[values[i, j] * scale[i // 128, j // 128] for j in range(columns)] for i in range(rows)])
    assert got.dtype == np.float32 and np.array_equal(got, expected)
    assert dsv3.dequantize(code, scale).tobytes() == got.tobytes()  # the definition


def test_every_bf16_value_reads_as_ml_dtypes_reads_it():
    bits = np.arange(2**16, dtype=np.uint16)
    expected, got = bits.view(ml_dtypes.bfloat16).astype(np.float32), dsv3.decode("BF16", bits)
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert got[~np.isnan(got)].tobytes() == expected[~np.isnan(expected)].tobytes()


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_reads_back_as_written(tmp_path, stored, shards):
    w = make_weights(SMALL)
    directory = write_checkpoint(tmp_path / "w", SMALL, w, shards=shards, dtype=stored)
    cfg = dsv3.read_config(directory)
    assert cfg == SMALL
    for dtype in (np.float32, np.float64):
        read = dsv3.Checkpoint(directory, cfg, dtype)
        assert set(read) == set(w) and len(read) == len(w) and not read.unused
        for name in w:
            expected = w[name].astype(stored).astype(np.float64)
            assert read[name].dtype == dtype and np.array_equal(read[name], expected.astype(dtype))


def test_the_fp8_release_layout_with_ragged_blocks_and_scales_in_other_shards(tmp_path):
    cfg = replace(SMALL, hidden_size=160, kv_lora_rank=140, moe_intermediate_size=130)
    stored = quantised(make_weights(cfg))
    for k in (3, 4):  # the release stores the shared embedding and head again with each MTP module
        stored[f"model.layers.{k}.embed_tokens.weight"] = stored["model.embed_tokens.weight"]
        stored[f"model.layers.{k}.shared_head.head.weight"] = stored["lm_head.weight"]
    directory = write_checkpoint(tmp_path / "w", cfg, stored, shards=5)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    apart = sum(index[name] != index[name.removesuffix("_scale_inv")] for name in index if name.endswith("_scale_inv"))
    assert apart > 10
    read = dsv3.Checkpoint(directory, cfg, np.float64)
    assert not read.unused
    for name in read:
        expected = stored[name].astype(np.float32)
        if f"{name}_scale_inv" in stored:
            scale = stored[f"{name}_scale_inv"].repeat(128, 0).repeat(128, 1)
            expected = expected * scale[: expected.shape[0], : expected.shape[1]]
        assert np.array_equal(read[name], expected.astype(np.float64)), name
    assert_close(dsv3.forward(np.array([[1, 2]]), read, cfg), dsv3.forward(np.array([[1, 2]]), dict(read), cfg))


def test_integers_beside_the_weights_are_ignored_and_half_precision_routes_in_float32(tmp_path):
    w = make_weights(SMALL, dtype=np.float32)
    directory = write_checkpoint(tmp_path / "w", SMALL, w | {"x.ids": np.arange(3)}, shards=2)
    read = dsv3.Checkpoint(directory, SMALL, np.float16)
    assert read.unused == ["x.ids"] and read["lm_head.weight"].dtype == np.float16
    for part in ("weight", "e_score_correction_bias"):
        name = f"model.layers.1.mlp.gate.{part}"
        assert read[name].dtype == np.float32 and np.array_equal(read[name], w[name])


def test_the_memory_given_changes_no_bit(tmp_path, monkeypatch):
    """FP8 (here the embedding too) and BF16, in several bands, ahead in threads; from no memory at all to enough."""
    monkeypatch.setattr(dsv3, "BAND", 2**8)
    cfg = replace(SMALL, vocab_size=300, intermediate_size=150, num_nextn_predict_layers=1)
    fp8 = quantised(make_weights(cfg), ("_proj.weight", "embed_tokens.weight"))
    directory = write_checkpoint(tmp_path / "w", cfg, fp8, shards=2)
    prompts, seen = [make_tokens(cfg, 0, 9).tolist(), [1]], []
    for memory in (None, 200_000, 80_000, 0):
        w = dsv3.Checkpoint(directory, cfg, memory=memory)
        named = dsv3.trace(prompts, w, cfg)
        made = [generated(prompts, w, cfg, 9, dsv3.Sampling(t)) for t in (0, 1.0)]
        seen.append(([x.tobytes() for x in named.values()], made))
        kept = sum(w._kept[name].nbytes for name in w._shapes if name in w._kept)
        assert kept == w._taken <= w.memory and (memory is None or kept >= 0.8 * memory)
    assert all(each == seen[0] for each in seen)


@pytest.mark.parametrize("rows, columns", [(1, 1), (576, 7168), (586, 7168), (18432, 7168), (300, 40_000), (129280, 9)])
def test_bands_are_of_whole_blocks_and_of_a_bounded_size(rows, columns):
    heights = [len(band) for band in dsv3.bands(np.broadcast_to(np.float32(0), (rows, columns)))]
    assert sum(heights) == rows and all(height % dsv3.BLOCK == 0 for height in heights[:-1])
    assert max(heights) * columns <= max(dsv3.BAND, dsv3.BLOCK * columns)
    assert len(heights) == 1 or 2 * heights[0] * columns > dsv3.BAND  # and not needlessly small


def test_the_pages_taken_back_are_those_of_the_tensor_alone():
    def place(data, **more):
        return types.SimpleNamespace(ctypes=types.SimpleNamespace(data=data), **more)

    told, page = [], mmap.PAGESIZE
    whole = place(16, base=types.SimpleNamespace(obj=types.SimpleNamespace(madvise=lambda *args: told.append(args))))
    dsv3._forget(place(16 + 5 * page + 100, nbytes=3 * page, base=whole))
    assert told == [(mmap.MADV_DONTNEED, 5 * page, 3 * page + 100)]


def test_no_memory_where_the_system_cannot_take_back_pages(small, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)  # as on Windows
    w = [dsv3.Checkpoint(small, SMALL, np.float64, memory) for memory in (0, None)]
    assert generated([[1, 2]], w[0], SMALL, 5) == generated([[1, 2]], w[1], SMALL, 5)


def test_what_is_used_most_stays_in_memory(small):
    """Of tensors used in turn, always the same stay; one that is used more often takes the place of another."""
    names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(8)]
    w = dsv3.Checkpoint(small, SMALL, np.float64, memory=0)
    size = 8 * math.prod(w._shapes[names[0]])
    w.memory = 4.2 * size
    for _ in range(5):
        for name in names:
            w[name]
        assert list(w._kept) == names[:4] and w._taken == 4 * size
    w[names[6]]
    assert names[6] in w._kept and len(w._kept) == 4 and w._taken == 4 * size
    assert 3.2 * size < 8 * math.prod(w._shapes["lm_head.weight"]) < 4 * size
    for use in range(1, 8):  # three were used five times, one six
        w["lm_head.weight"]
        assert list(w._kept) == (["lm_head.weight"] if use == 7 else [*names[1:4], names[6]])


def test_no_budget_makes_tensors_of_unequal_size_come_and_go(small):
    for memory in range(2_000, 60_000, 5_000):
        w = dsv3.Checkpoint(small, SMALL, np.float64, memory)
        kept = []
        for _ in range(4):
            generated([[1, 2, 3]], w, replace(SMALL, num_experts_per_tok=1, n_group=1, topk_group=1), 3)
            for name in w._shapes:
                w[name]
            kept.append(list(w._kept))
        assert kept[-1] == kept[-2]


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_matrix_of_the_releases_width_gives_the_same_bits_on_disk(tmp_path, rows):
    """kv_a_proj_with_mqa, 576 x 7168: just one band, of a height that is no multiple of a block; and very wide ones."""
    rng = np.random.default_rng(0)
    for shape in ((576, 7168), (300, 40_000)):
        save_file({"x": rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)}, tmp_path / "x")
        stored = dsv3.read_safetensors(tmp_path / "x")["x"]
        disk = dsv3.OnDisk(stored, None, np.dtype(np.float32))
        x = rng.standard_normal((rows, shape[1]), np.float32)
        out = [dsv3.linear(x, {"w.weight": each}, "w") for each in (disk, disk.whole(), disk)]
        assert out[0].tobytes() == out[1].tobytes() == out[2].tobytes()
        assert sum(buffer.nbytes for buffer in dsv3._threads()[1]) <= 4 * dsv3.BAND * (os.cpu_count() + 2)


def test_mtp_modules_that_the_files_lack_are_left_out(tmp_path):
    w = make_weights(replace(SMALL, num_nextn_predict_layers=0))
    read = dsv3.Checkpoint(write_checkpoint(tmp_path / "w", SMALL, w), SMALL)
    assert set(read) == set(w) and dsv3.mtp_depth(read, SMALL) == 0
    assert re.search(r"MTP modules +0 ", dsv3.inspect(SMALL, read))


def damaged(directory, how):
    """Damage a checkpoint of one file in a way that has a name; what the refusal must mention."""
    file, data = directory / "model.safetensors", bytearray((directory / "model.safetensors").read_bytes())
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])

    def rewrite(header):
        raw = json.dumps(header).encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + n :])

    if how == "empty":
        file.write_bytes(b"")
    elif how == "huge":
        header["model.norm.weight"]["shape"] = [0, 2**70]
        rewrite(header)
    elif how == "nothing":
        header["model.norm.weight"] |= {"shape": [2**47, 2**47, 0], "data_offsets": [0, 0]}
        rewrite(header)
    elif how == "digits":
        raw = b'{"a": ' + b"9" * 5000 + b"}"
        file.write_bytes(len(raw).to_bytes(8, "little") + raw)
    elif how == "short":
        file.write_bytes(data[: n // 2])
    elif how == "truncated":
        file.write_bytes(data[:-10])
    elif how == "length":
        file.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    elif how == "binary":
        file.write_bytes(data[:8] + b"\xff" * n + data[8 + n :])
    elif how == "array":
        rewrite([])
    elif how == "offsets":
        header["model.norm.weight"]["data_offsets"] = [-8, 8]
        rewrite(header)
    elif how in ("one offset", "three offsets"):
        offsets = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = offsets[1:] if how == "one offset" else [*offsets, offsets[1]]
        rewrite(header)
    elif how == "size":
        header["model.norm.weight"]["shape"] = [23]
        rewrite(header)
    elif how == "entry":
        header["model.norm.weight"] = {"dtype": "F32"}
        rewrite(header)
    elif how == "field":
        header["model.norm.weight"]["strides"] = [1]
        rewrite(header)
    elif how == "list":
        header["model.norm.weight"] = list(header["model.norm.weight"].values())
        rewrite(header)
    elif how == "boolean":  # false, which is 0 to Python
        (first,) = [entry for name, entry in header.items() if entry["data_offsets"][0] == 0]
        first["data_offsets"][0] = False
        rewrite(header)
    elif how == "missing":
        header["x"] = header.pop("model.norm.weight")
        rewrite(header)
    elif how == "dtype":
        header["model.norm.weight"]["dtype"] = "I32"
        rewrite(header)
    elif how == "shape":
        header["lm_head.weight"]["shape"] = [22, 31]
        rewrite(header)
    elif how == "gone":
        file.unlink()
    elif how == "overlap":
        header["model.norm.weight"]["data_offsets"] = header["lm_head.weight"]["data_offsets"]
        rewrite(header)
    elif how == "gap":
        file.write_bytes(data[: 8 + n] + b"gap" + data[8 + n :])
        header = {name: entry | {"data_offsets": [3 + at for at in entry["data_offsets"]]}
                  for name, entry in header.items()}  # fmt: skip
        data[8 + n : 8 + n] = b"gap"
        rewrite(header)
    elif how == "trailing":
        file.write_bytes(data + b"more")
    elif how == "twice":
        raw = data[8 : 8 + n].rstrip()[:-1] + b', "model.norm.weight": {}}'
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + n :])
    elif how == "metadata":
        header["__metadata__"] = {"format": 1}
        rewrite(header)
    elif how == "long":  # as long as it says, and sparse: reading it would take that much memory
        file.write_bytes((10**12).to_bytes(8, "little"))
        os.truncate(file, 2 * 10**12)
    elif how == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif how == "link":
        file.rename(directory.parent / "elsewhere")
        file.symlink_to(directory.parent / "elsewhere")
    elif how == "long config":
        os.truncate(directory / "config.json", 10**12)
    elif how == "linked config":
        (directory / "config.json").rename(directory.parent / "config")
        (directory / "config.json").symlink_to("../config")
    elif how == "layers":
        keys = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(keys | {"num_hidden_layers": 10**9}))
    elif how == "experts":
        keys = json.loads((directory / "config.json").read_text()) | {"n_routed_experts": 10**9}
        (directory / "config.json").write_text(json.dumps(keys))
    elif how == "more experts":  # than there are tensors, which costs no memory to see
        keys = json.loads((directory / "config.json").read_text()) | {"n_routed_experts": 4096}
        (directory / "config.json").write_text(json.dumps(keys))
    elif how == "surrogate":
        (directory / "config.json").write_text('{"model_type": "\\ud800"}')
    elif how == "config":
        (directory / "config.json").write_text("{")
    elif how == "other config":
        (directory / "config.json").write_text('{"version": "1.0", "vocab_size": 31, "model": {"type": "BPE"}}')
    elif how == "no config":
        (directory / "config.json").unlink()
    elif how == "index":
        (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    elif how == "no map":
        (directory / "model.safetensors.index.json").write_text("{}")
    elif how == "elsewhere":
        (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    elif how in ("dots", "nameless", "line"):
        shard = {"dots": "..", "nameless": "", "line": "a\n\x1b[31mb"}[how]
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    elif how == "linked shard":
        (directory / "x").symlink_to("/etc/hostname")
        (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x"}}')
    elif how == "two shards":
        shutil.copy(file, directory / "x")
        weight_map = dict.fromkeys(header, file.name) | {"lm_head.weight": "x"}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("how, said", [
    ("empty", "truncated"), ("short", "truncated"), ("truncated", "outside the file"), ("length", "truncated"),
    ("binary", "not JSON"), ("array", "JSON object"), ("offsets", "model.norm.weight"), ("size", "model.norm.weight"),
    ("huge", "model.norm.weight"), ("nothing", "model.norm.weight"), ("digits", "not JSON"),
    ("entry", "model.norm.weight"), ("field", "model.norm.weight' is malformed"),
    ("list", "model.norm.weight' is malformed"), ("boolean", "is malformed"),
    ("one offset", "model.norm.weight' is malformed"), ("three offsets", "model.norm.weight' is malformed"),
    ("missing", "model.norm.weight"), ("dtype", "model.norm.weight"),
    ("shape", "lm_head.weight"), ("gone", "No such file"), ("config", "not JSON"), ("no config", "No such file"),
    ("other config", "lacks hidden_size, num_hidden_layers"),
    ("index", "plain file name"), ("no map", "weight_map"), ("elsewhere", "lacks it"), ("overlap", "neither overlap"),
    ("gap", "nor leave a gap"), ("trailing", "4 bytes follow"), ("twice", "'model.norm.weight' is there twice"),
    ("metadata", "__metadata__"), ("long", "where 100000000 have room"), ("pipe", "no file"), ("link", "link out of"),
    ("long config", "too many"), ("linked config", "link out of"), ("layers", "num_hidden_layers"),
    ("experts", "n_routed_experts"), ("more experts", "49192 tensors or more"),
    ("surrogate", "surrogates not allowed"), ("dots", "link out of"),
    ("nameless", "no file"), ("line", "plain file name"), ("linked shard", "link out of"),
    ("two shards", "model.safetensors too has"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, capsys, how, said):
    directory = write_checkpoint(tmp_path / "w", SMALL, make_weights(SMALL, dtype=np.float32))
    assert dsv3.main(["--weights", str(directory), "--tokens", "1", "-n", "1"]) == 0
    capsys.readouterr()
    damaged(directory, how)
    assert dsv3.main(["--weights", str(directory), "--tokens", "1", "-n", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and str(directory) in err


def test_links_within_the_directory_and_those_of_hugging_faces_cache_are_followed(tmp_path):
    for home, target in (("w", "."), ("cache/snapshots/1234", "../../blobs")):
        directory = tmp_path / home
        directory.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(directory, SMALL, make_weights(SMALL, dtype=np.float32))
        (directory / target).mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (directory / name).rename(directory / target / f"{name}.blob")
            (directory / name).symlink_to(Path(target) / f"{name}.blob")
        (tmp_path / f"link to {directory.name}").symlink_to(directory)  # and any to the directory itself
        for each in (directory, tmp_path / f"link to {directory.name}"):
            assert len(dsv3.Checkpoint(each, dsv3.read_config(each))) == len(make_weights(SMALL))


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-3, 7e35])
def test_a_scale_that_is_no_scale_is_refused_where_it_is_used(tmp_path, stored, bad):
    scales, name = quantised(make_weights(SMALL)), "model.layers.0.self_attn.o_proj.weight"
    for value in (0.0, 2.0**119, bad):
        broken = {f"{name}_scale_inv": np.full((1, 1), value).astype(stored)}
        read = dsv3.Checkpoint(write_checkpoint(tmp_path / "w", SMALL, scales | broken), SMALL)
        if value is not bad:
            assert np.isfinite(read[name]).all()
            continue
        with pytest.raises(dsv3.InputError, match=rf"w: {name}_scale_inv must be from 0"):
            read[name]


def test_an_fp8_norm_is_refused(tmp_path):
    w = make_weights(SMALL) | {"model.norm.weight": np.ones(22, ml_dtypes.float8_e4m3fn),
                               "model.norm.weight_scale_inv": np.ones(1, np.float32)}  # fmt: skip
    with pytest.raises(dsv3.InputError, match="model.norm.weight is FP8"):
        dsv3.Checkpoint(write_checkpoint(tmp_path / "w", SMALL, w), SMALL)


def test_an_fp8_weight_without_its_scales_is_refused(tmp_path):
    stored = quantised(make_weights(SMALL))
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    for broken, said in (({}, "missing"), ({name: np.ones((2, 1), np.float32)}, "shape"),
                         ({name: np.ones((1, 1), np.float64)}, "F32 or BF16")):  # fmt: skip
        directory = write_checkpoint(tmp_path / "w", SMALL, without(stored, name) | broken)
        with pytest.raises(dsv3.InputError, match=said):
            dsv3.Checkpoint(directory, SMALL)


def test_the_tensors_of_the_671b_model_are_counted_as_published():
    """671B, 37B activated; 61 layers of 576 cached elements; 91,991 tensors in the release's index."""
    table = dsv3.inspect(dsv3.Config())
    for number in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "35,136", "70,272", "71.1"):
        assert number in table
    shapes = dsv3.tensor_shapes(dsv3.Config())
    scaled = sum(name.endswith(("_proj.weight", "with_mqa.weight")) for name in shapes) - 1  # not eh_proj
    assert len(shapes) + 2 + scaled == 91_991  # the MTP module's copies of embedding and head
    embedding, eh_proj, readme = 129_280 * 7168, 2 * 7168**2, (HERE / "README.md").read_text("utf-8")
    for size in (37_552_297_472 - embedding, 11_610_068_224 + 2 * embedding, 11_610_068_224 - eh_proj):
        assert f"{size:,}" in readme


def true_width(directory, cfg):
    """A checkpoint of cfg in the form of the release (FP8 but for embedding, head, norms and routers; an index, shards
    by layer), of random weights, written a piece at a time."""
    rng, shards, files = np.random.default_rng(0), {}, {}
    codes = (64 * rng.standard_normal(2**22, np.float32)).astype(ml_dtypes.float8_e4m3fn).tobytes()
    halves = rng.standard_normal(2**21, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)

    def tiled(block, nbytes):
        for left in range(nbytes, 0, -len(block)):
            yield block[:left]

    for name, shape in dsv3.tensor_shapes(cfg).items():
        tensors = shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})
        if name.endswith("_proj.weight") and "eh_proj" not in name:
            scale = rng.uniform(0.5, 1.5, [-(-n // 128) for n in shape]).astype("<f4") / 64 / math.sqrt(shape[1])
            tensors[name] = "F8_E4M3", shape, tiled(codes, math.prod(shape))
            tensors[f"{name}_scale_inv"] = "F32", scale.shape, [scale.tobytes()]
        elif name.endswith(("_proj.weight", ".gate.weight", "lm_head.weight")):
            small = (halves.view(ml_dtypes.bfloat16) / np.float32(math.sqrt(shape[1]))).astype(ml_dtypes.bfloat16)
            tensors[name] = "BF16", shape, tiled(small.tobytes(), 2 * math.prod(shape))
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = "F32", shape, [np.zeros(shape, "<f4").tobytes()]
        else:
            ones = np.ones(shape, ml_dtypes.bfloat16).tobytes() if len(shape) == 1 else halves.tobytes()
            tensors[name] = "BF16", shape, tiled(ones, 2 * math.prod(shape))
    for n, tensors in enumerate(shards.values(), 1):
        files |= dict.fromkeys(tensors, file := f"model-{n:05}-of-{len(shards):06}.safetensors")
        header, end = {}, 0
        for name, (dtype, shape, _) in tensors.items():
            begin, end = end, end + math.prod(shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        with (directory / file).open("wb") as out:
            text = json.dumps(header).encode()
            out.write(len(text).to_bytes(8, "little") + text)
            for _, _, pieces in tensors.values():
                out.writelines(pieces)
    keys = RELEASE | {"num_hidden_layers": cfg.num_hidden_layers, "first_k_dense_replace": cfg.first_k_dense_replace,
                      "num_nextn_predict_layers": cfg.num_nextn_predict_layers}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(keys))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.width
@pytest.mark.parametrize("mtp", [0, 1])
def test_at_the_width_of_the_671b_model(tmp_path, mtp):
    """One dense layer and one with experts, of DeepSeek-V3's own widths, in 6 GB of memory: the experts' sum against
    float64 and the time of each layer, from which a table for 61 layers; then the command line's own statistics."""
    cfg = replace(dsv3.Config(), num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=mtp)
    stored = sum(map(math.prod, dsv3.tensor_shapes(cfg).values())) + 2 * 2 * cfg.vocab_size * cfg.hidden_size
    if shutil.disk_usage(tmp_path).free < 1.2 * stored:
        pytest.skip(f"needs {1.2 * stored / 1e9:.0f} GB of disk at {tmp_path} (--basetemp DIR elsewhere)")
    try:
        true_width(tmp_path, cfg)
        command = ["--weights", str(tmp_path), "--tokens", "1 2 3 4 5", "--memory", "6", "-n", "5", "--mtp"]
        code, out, err = cli(*command)
        print("\n" + err, end="")
        assert code == 0 and len(out.split()) == 5
        assert float(re.search(r"peak memory (\d+) MB", err)[1]) < 6000 + 1500
        if not mtp:
            measure_layers(tmp_path, cfg)
    finally:
        shutil.rmtree(tmp_path)


def measure_layers(directory, cfg):
    w, x = dsv3.Checkpoint(directory, cfg, memory=0), np.random.default_rng(1).standard_normal((1, 1, cfg.hidden_size))
    x, name, read = x.astype(np.float32), "model.layers.1.mlp", Counter()
    index, gate = dsv3.route(x, w, name, cfg)
    expected = np.zeros(cfg.hidden_size)
    for e, g in zip(index[0, 0], gate[0, 0].astype(float), strict=True):

        def matrix(part, e=e):
            (_, codes), (_, scale) = (
                w.stored[f"{name}.experts.{e}.{part}_proj.weight{end}"] for end in ("", "_scale_inv")
            )
            wide = np.repeat(np.repeat(scale.astype(float), 128, 0), 128, 1)
            return codes.view(ml_dtypes.float8_e4m3fn).astype(float) * wide

        a = matrix("gate") @ x[0, 0]
        expected += g * (matrix("down") @ (a / (1 + np.exp(-a)) * (matrix("up") @ x[0, 0])))
    got = dsv3.moe_chosen(x, w, name, index, gate, cfg)
    print(f"one layer's experts against float64: {np.abs(got[0, 0] - expected).max() / np.abs(expected).max():.1e}")
    assert_close(got[0, 0], expected, 1e-5)

    rows = dsv3.OnDisk.rows

    def counted(self, part, out=None):
        read["bytes"] += self.stored[part].nbytes
        return rows(self, part, out)

    def timed(step):
        seconds = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dsv3.OnDisk, "rows", counted)
            for _ in range(3):
                read.clear()
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
        return np.median(seconds), read["bytes"]

    cache = dsv3.Cache(1)

    def layer(n):
        return lambda: dsv3.block(x, w, n, cfg, dsv3.positions([0], 1, cfg, np.float32), cache)

    parts = [
        ("dense layer", 3, layer(0)),
        ("layer with experts", 58, layer(1)),
        ("head", 1, lambda: dsv3.head(x, w, cfg)),
    ]
    total_seconds = total_bytes = 0
    for label, count, step in parts:
        seconds, size = timed(step)
        total_seconds, total_bytes = total_seconds + count * seconds, total_bytes + count * size
        print(f"{label:20} {seconds:7.3f} s  {size / 1e9:6.3f} GB  {size / seconds / 1e9:5.2f} GB/s  x {count}")
    print(f"{'a token, 61 layers':20} {total_seconds:7.1f} s  {total_bytes / 1e9:6.1f} GB")
    codes = w.stored["model.layers.0.mlp.gate_proj.weight"][1][:2048]
    scale = w.stored["model.layers.0.mlp.gate_proj.weight_scale_inv"][1][:16]
    for workers in (1, os.cpu_count()):
        out, seconds = [np.empty(codes.shape, np.float32) for _ in range(workers)], []
        with ThreadPoolExecutor(workers) as pool:
            for _ in range(15):
                start = time.perf_counter()
                list(pool.map(dsv3.dequantize_on_cpu, [codes] * workers, [scale] * workers, out))
                seconds.append(time.perf_counter() - start)
        rate = workers * codes.size / np.median(seconds) / 1e9
        print(f"FP8 decoded by {workers} threads: {rate:.2f} G elements/s")


# ---- 9. Generation -------------------------------------------------------------------------------------------------


def generated(prompts, w, cfg, n, *args, **kwargs):
    rows = [[] for _ in prompts]
    for b, token in dsv3.generate(prompts, w, cfg, n, *args, **kwargs):
        rows[b].append(token)
    return rows


GUESSABLE = replace(SMALL, vocab_size=4, num_nextn_predict_layers=1)  # a draft is right one time in four by chance


@given(configs(mtp=(1, 1)), seeds, st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_greedy_speculation_changes_no_token(cfg, seed, lengths):
    cfg = replace(cfg, vocab_size=5)
    w, stats = make_weights(cfg, seed), dsv3.Stats()
    prompts = [make_tokens(cfg, seed + b, n).tolist() for b, n in enumerate(lengths)]
    plain = generated(prompts, w, cfg, 12, speculate=False)
    assert generated(prompts, w, cfg, 12, stats=stats) == plain
    assert stats.drafted > 0 and stats.new_tokens == 12 * len(prompts)
    for prompt, row in zip(prompts, plain, strict=True):  # and plain decoding is the argmax of the definition
        h = dsv3.forward(np.array([prompt + row[:-1]]), w, cfg)
        assert np.argmax(dsv3.head(h, w, cfg)[0, len(prompt) - 1 :], -1).tolist() == row


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_both_caches_are_right_after_every_accept_and_reject(monkeypatch, chunk):
    monkeypatch.setattr(dsv3, "CHUNK", chunk)
    cfg, w, stats = GUESSABLE, make_weights(GUESSABLE, 1), dsv3.Stats()
    prompts, cache, made = [[1, 2, 3, 0, 1], [3]], dsv3.Cache(2), [[], []]
    for b, token in dsv3.generate(prompts, w, cfg, 30, dsv3.Sampling(1.0), stats=stats, cache=cache):
        made[b].append(token)
        for row, held in enumerate(cache.tokens):
            if len(held) < 2:
                continue
            assert held == (prompts[row] + made[row])[: len(held)]
            whole, known = dsv3.Cache(1), (prompts[row] + made[row])[: len(held) + 1]
            h = dsv3.forward(np.array([held]), w, cfg, whole)
            if len(known) > len(held):
                dsv3.mtp(1, h, np.array([known[1:]]), w, cfg, whole)
            for layer, rows in whole.layers.items():
                assert_close(cache.layers[layer][row, : len(held)], rows[0])
    assert 0 < stats.accepted < stats.drafted


def paths(run):
    """Every sequence of choices that `run` can make through dsv3.draw -> (probability, result) of each."""
    waiting, draw = [[]], dsv3.draw
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

        dsv3.draw = choose
        try:
            result = run()
        finally:
            dsv3.draw = draw
        yield probability[0], result


@pytest.mark.parametrize("sampling", [dsv3.Sampling(1.0), dsv3.Sampling(0.5, top_k=2), dsv3.Sampling(2.0, top_p=0.8)])
def test_speculative_sampling_has_exactly_the_main_models_distribution(sampling):
    """All ways that three tokens of a vocabulary of three can be made, with their probabilities, added up."""
    cfg = replace(GUESSABLE, vocab_size=3, num_hidden_layers=1, first_k_dense_replace=0)
    w = make_weights(cfg, 4)
    totals = [{}, {}]
    for total, speculate in zip(totals, (False, True), strict=True):
        for probability, text in paths(lambda: tuple(generated([[1, 2]], w, cfg, 3, sampling, speculate=speculate)[0])):
            total[text] = total.get(text, 0) + probability
    assert set(totals[0]) == set(totals[1]) and len(totals[0]) > 4
    assert sum(totals[0].values()) == pytest.approx(1)
    for text, probability in totals[0].items():
        assert totals[1][text] == pytest.approx(probability, abs=1e-12)


def test_draw_has_the_probabilities_it_is_given():
    class Grid:
        def __init__(self):
            self.values = iter((np.arange(1000) + 0.5) / 1000)

        def random(self):
            return next(self.values)

    rng = Grid()
    counts = np.bincount([dsv3.draw([0.25, 0, 0.625, 0.125, 0], rng) for _ in range(1000)], minlength=5)
    assert counts.tolist() == [250, 0, 625, 125, 0]


@example([4.0, 3.0, 2.0, 1.0], 3.0, 2, 0.55)  # top-p of what top-k left: one token of two, two of all
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=9), st.floats(0.1, 5), st.integers(0, 10), st.floats(0.01, 1))
def test_the_distribution_is_temperature_then_top_k_then_top_p(logits, temperature, k, top_p):
    p = dsv3.distribution(np.array(logits), dsv3.Sampling(temperature, k, top_p))
    full = np.exp((np.array(logits) - max(logits)) / temperature)
    full /= full.sum()
    ranked = sorted(range(len(logits)), key=lambda i: (-full[i], i))[: k or None]
    full /= full[ranked].sum()
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += full[i]
        if mass >= top_p:
            break
    expected = np.zeros(len(logits))
    expected[kept] = full[kept] / full[kept].sum()
    assume(abs(np.cumsum(full[ranked]) - top_p).min() > 1e-9 or top_p == 1)
    assert_close(p, expected)


def test_sampling_is_repeatable_and_a_row_draws_from_a_stream_of_its_own():
    w, hot = make_weights(SMALL), dsv3.Sampling(1.5, seed=7)
    one = generated([[1, 2, 3]], w, SMALL, 20, hot)
    assert generated([[1, 2, 3]], w, SMALL, 20, hot) == one
    assert generated([[1, 2, 3]], w, SMALL, 20, replace(hot, seed=8)) != one
    first, second = generated([[1, 2, 3], [1, 2, 3]], w, SMALL, 20, hot)
    assert [first] == one and second != first


def test_a_row_ends_at_any_stop_token_and_others_go_on():
    w, prompts = make_weights(SMALL), [[1, 2, 3], [4, 5]]
    free = generated(prompts, w, SMALL, 20)
    stop = {free[0][4], 30}
    rows = generated(prompts, w, SMALL, 20, stop=stop)
    for row, whole in zip(rows, free, strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in stop), 20)
        assert row == whole[:end]
    assert len(rows[0]) <= 5


def test_a_cache_of_an_earlier_turn_is_used_and_changes_nothing():
    cfg, w, cache, stats = GUESSABLE, make_weights(GUESSABLE, 2), dsv3.Cache(1), dsv3.Stats()
    prompt, history = [1, 2, 3, 1], []
    for turn in range(3):
        prompt = prompt + history + [turn, 2]
        stats = dsv3.Stats()
        history = generated([prompt], w, cfg, 6, cache=cache, stats=stats)[0]
        assert history == generated([prompt], w, cfg, 6)[0]
    assert stats.prompt_tokens < len(prompt) / 2
    assert generated([[3, 3]], w, cfg, 6, cache=cache) == generated([[3, 3]], w, cfg, 6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 12), st.lists(st.integers(0, 3), max_size=3))
def test_a_prompt_that_branches_off_anywhere_finds_a_cache_as_good_as_new(prompt, kept, more):
    """The same prompt again, less of it, more, or other tokens from some place on: text and drafts are the same."""
    cfg, w, cache, sampling = GUESSABLE, make_weights(GUESSABLE, 2), dsv3.Cache(1), dsv3.Sampling(1.0)
    made = generated([prompt], w, cfg, 6, sampling, cache=cache)[0]
    again = [*prompt, *made][:kept] + more or [0]
    results = []
    for each in (cache, None):
        stats = dsv3.Stats()
        results.append(
            (generated([again], w, cfg, 6, sampling, cache=each, stats=stats), stats.drafted, stats.accepted)
        )
    assert results[0] == results[1]


def test_a_long_prompt_reports_its_progress(small, monkeypatch, capsys):
    monkeypatch.setattr(dsv3, "CHUNK", 2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert dsv3.main(["--weights", str(small), "--tokens", "1 2 3 4 5", "-n", "1"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("\rprompt: 2 of 5 tokens\rprompt: 4 of 5 tokens\r\033[K")
    calls = []
    w = dsv3.Checkpoint(small, SMALL)
    list(dsv3.generate([[1, 2, 3]], w, SMALL, 5, progress=lambda *of: calls.append(of)))
    assert calls == [(2, 3), (3, 3)]
    assert dsv3.main(["--weights", str(small), "--tokens", "1 2 3 4", "-n", "1"]) == 0
    assert capsys.readouterr().err.startswith("prompt: 4 tokens")


def test_no_new_tokens_is_only_a_forward_pass():
    stats = dsv3.Stats()
    assert generated([[1, 2, 3]], make_weights(SMALL), SMALL, 0, stats=stats) == [[]]
    assert (stats.prompt_tokens, stats.new_tokens) == (3, 0) and stats.cache_bytes > 0
    assert STATISTICS.fullmatch(dsv3.Stats().line() + "\n") and dsv3.Stats().times is not dsv3.Stats().times


def test_the_line_of_statistics_is_rounded(monkeypatch):
    """The first token of each row is the prompt's, in tokens a second as in time."""
    monkeypatch.setattr(dsv3, "_peak_memory", lambda: 2_700_000)
    stats = dsv3.Stats(prompt_tokens=7, new_tokens=10, drafted=5, accepted=4, rows=2, cache_bytes=1600, times=[3, 5, 6])
    assert stats.line() == ("prompt: 7 tokens, 3.5 tok/s · new: 10 tokens, 8.0 tok/s · drafted 5, accepted 4"
                            " · cache 2 KB · peak memory 3 MB")  # fmt: skip


@pytest.mark.parametrize("speculate, layers", [(False, 3), (True, 4)])
def test_the_cache_is_made_once_for_all_positions_and_one_draft_past_the_end(speculate, layers):
    stats = dsv3.Stats()
    generated([[1, 2, 3], [4]], make_weights(SMALL), SMALL, 20, speculate=speculate, stats=stats)
    assert stats.cache_bytes == layers * 2 * (3 + 20 + 1) * (SMALL.kv_lora_rank + SMALL.qk_rope_head_dim) * 8


@pytest.mark.parametrize("prompts, n, said", [
    ([[]], 1, "empty"), ([[1], [31]], 1, "prompt 1: token id [31]"), ([[-1]], 1, "vocabulary"),
    ([[1] * 500], 13, "positions"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_continued_is_refused_before_any_work(prompts, n, said):
    with pytest.raises(dsv3.InputError, match=re.escape(said)):
        generated(prompts, {}, SMALL, n)
    with pytest.raises(dsv3.InputError, match="0 or more"):
        generated([[1]], {}, SMALL, -1)
    with pytest.raises(dsv3.InputError, match="the cache has 2 rows"):
        generated([[1]], {}, SMALL, 1, cache=dsv3.Cache(2))


@pytest.mark.parametrize("bad", [
    {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0}, {"top_p": 1.1},
    {"top_p": math.nan}, {"top_k": -1}, {"seed": -1}])  # fmt: skip
def test_sampling_out_of_range_is_refused(bad):
    with pytest.raises(dsv3.InputError, match=next(iter(bad)).replace("_", "-")):
        dsv3.Sampling(**bad)


def test_a_prompt_may_fill_the_context_to_its_last_position():
    dsv3.check_prompts([[1] * 500, [0]], SMALL, 12)
    dsv3.check_prompts([[30]], SMALL, 0)


def test_all_tokens_stay_in_even_those_that_rounding_hides():
    p = dsv3.distribution(np.array([0.0, -40.0]), dsv3.Sampling(1.0))
    assert p[0] == 1 and p[1] == np.exp(-40)


def test_peak_memory_where_the_system_has_no_proc(monkeypatch):
    monkeypatch.setattr(dsv3, "_number", lambda *_: None)
    usage = types.SimpleNamespace(RUSAGE_SELF=7, getrusage=lambda who: types.SimpleNamespace(ru_maxrss=3000 + who))
    monkeypatch.setitem(sys.modules, "resource", usage)
    for system, unit in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(sys, "platform", system)
        assert dsv3._peak_memory() == 3007 * unit
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert dsv3._peak_memory() == 0


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(dsv3.InputError, match="not finite"):
        dsv3.distribution(np.array([0, np.nan]), dsv3.Sampling())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", [0.0, 1.0, 30.0])
def test_weights_of_any_size_make_no_warning(factor):
    w = {name: (x * factor).astype(np.float32) for name, x in make_weights(GUESSABLE).items()}
    assert len(generated([[1], [2, 3]], w, GUESSABLE, 8, dsv3.Sampling(1e-300))[0]) == 8


# ---- CuPy's rules, without CuPy --------------------------------------------------------------------------------------
# A stand-in with NumPy's numbers: what runs under it, and gives the same bits, asks nothing of CuPy that CuPy lacks.

API = json.loads((WEIGHTS / "vectors" / "cupy_api.json").read_text())  # names and parameters of the real package


class Device:
    """An array that meets no host array, converts to none unless asked by `get`, and has CuPy's members only.

    `traffic` counts calls, uploads, their bytes and downloads; with `jitter`, a random generator, what a GPU computes
    in an order of its own differs in the last bits.
    """

    __array_ufunc__, __hash__ = None, None
    traffic, jitter = Counter(), None

    def __init__(self, host):
        self.host = host

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a host array")

    def __array_function__(self, function, *_):
        raise TypeError(f"numpy.{function.__name__} given a device array")

    def __getattr__(self, name):
        if name not in API["methods"]:
            raise AttributeError(f"cupy.ndarray has no {name}")
        if name == "get":
            return self.download
        value = getattr(self.host, name)
        return strict(name, value, API["methods"][name]) if callable(value) else to_strict(value)

    def download(self):
        self.traffic["downloads"] += 1
        return self.host.copy()

    def __len__(self):
        return len(self.host)

    def __bool__(self):
        raise TypeError("a truth value would wait for the device")

    __float__ = __int__ = __index__ = __iter__ = __bool__

    def __getitem__(self, index):
        return to_strict(self.host[to_index(index)])

    def __setitem__(self, index, value):
        index = to_index(index)
        touched = np.zeros(self.host.shape, int)
        np.add.at(touched, index, 1)
        assert touched.max(initial=0) <= 1, "an element assigned twice: on a GPU either value may stay"
        self.host[index] = to_numpy(value)


def operation(name):
    def call(self, *others):
        Device.traffic["calls"] += 1
        return jittered(name.strip("_").lstrip("r"), to_strict(getattr(self.host, name)(*map(to_numpy, others))))

    return call


def jittered(name, x):
    if (
        Device.jitter is not None
        and name in ("matmul", "sum", "mean", "exp", "log", "sqrt")
        and x.host.dtype.kind == "f"
    ):
        noise = Device.jitter.uniform(-1, 1, x.host.shape) * np.finfo(x.host.dtype).eps
        x = Device(np.asarray(x.host * (1 + noise), x.host.dtype))
    return x


for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul", "and", "or", "lshift", "rshift"):
    for form in (f"__{name}__", f"__r{name}__"):
        setattr(Device, form, operation(form))
for name in ("neg", "abs", "invert", "lt", "le", "eq", "ne", "gt", "ge"):
    setattr(Device, f"__{name}__", operation(f"__{name}__"))


def to_strict(value):
    return Device(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def to_numpy(value):
    """What a call was given, for NumPy: device arrays unwrapped, host arrays refused."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_numpy, value))
    if isinstance(value, np.ndarray):
        raise TypeError("a host array meets the device")
    return value.host if isinstance(value, Device) else value


def to_index(index):
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, (list, np.ndarray)) or (isinstance(part, Device) and part.host.dtype == bool):
            raise TypeError("an index that uploads, or waits for the device")
    return to_numpy(index)


def strict(name, function, parameters):
    """The function, called only with parameters that CuPy's has."""

    def call(*args, **kwargs):
        if parameters is not None:
            spread = any(parameter.startswith("*") for parameter in parameters)
            assert spread or len(args) <= len(parameters), f"cupy.{name} takes {parameters}"
            assert set(kwargs) <= set(parameters), f"cupy.{name} takes {parameters}, not {list(kwargs)}"
        if name == "argsort":
            assert kwargs.get("kind") == "stable", "the order of equal keys is NumPy's own"
        assert name not in ("argpartition", "partition"), "the order of equal keys is arbitrary"
        Device.traffic["calls"] += 1
        if name == "asarray":  # the upload
            if isinstance(args[0], Device):
                return args[0]
            x = np.array(args[0], **kwargs)
            Device.traffic.update(uploads=1, bytes=x.nbytes)
            return to_strict(x)
        x = to_strict(function(*to_numpy(args), **{key: to_numpy(value) for key, value in kwargs.items()}))
        if name in ("empty", "empty_like"):  # what stands there is anything
            x.host.view(np.uint8)[...] = 0xFF
        return jittered(name, x)

    return call


class Strict:
    def __init__(self, free=2**40):
        memory = types.SimpleNamespace(memGetInfo=lambda: (free, 2**40))
        self.cuda = types.SimpleNamespace(runtime=memory)

    def __getattr__(self, name):
        if name.startswith("_") or name not in API["names"]:
            raise AttributeError(f"cupy has no {name}")
        value = getattr(np, name)
        return strict(name, value, API["names"][name]) if callable(value) and not isinstance(value, type) else value


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request, monkeypatch):
    """`xp` under CuPy's rules: on the CPU in every run, and CuPy itself with `pytest -m gpu`, where there is a GPU."""
    if request.param == "stand-in":
        Device.traffic.clear()
        namespace = Strict()
    else:
        try:
            namespace, reason = dsv3.choose_device("gpu")
        except dsv3.InputError as e:
            pytest.skip(str(e))
        print(reason)
    monkeypatch.setattr(dsv3, "xp", namespace)
    return request.param == "gpu"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("memory", [None, 0])
def test_under_cupys_rules_the_bits_are_numpys(tmp_path, monkeypatch, dtype, memory):
    """Checkpoint (FP8 and BF16, all in memory or nothing), trace, generation with speculation and sampling, and the
    objective."""
    directory = write_checkpoint(tmp_path / "w", GUESSABLE, quantised(make_weights(GUESSABLE)))
    prompts, tokens = [[1, 2, 3, 0, 1], [3]], make_tokens(GUESSABLE, 0, 2, 7)
    monkeypatch.setattr(dsv3, "product", lambda x, w: x @ w.swapaxes(-1, -2))  # NumPy has forms of its own
    if memory == 0:  # nothing is kept on either side, so experts are not gathered on either
        monkeypatch.setattr(dsv3, "gathering_is_cheaper", lambda *_: False)

    def everything():
        w, stats = dsv3.Checkpoint(directory, GUESSABLE, dtype, memory), dsv3.Stats()
        named = dsv3.trace(prompts, w, GUESSABLE)
        rows = [generated(prompts, w, GUESSABLE, 12, dsv3.Sampling(t), stats=stats) for t in (0, 1.0)]
        loss, parts = dsv3.training_objective(w, tokens, GUESSABLE)
        gate = "model.layers.1.mlp.gate"
        bias = dsv3.update_bias(w[f"{gate}.e_score_correction_bias"], parts["load"][gate], 0.5)
        return named, rows, stats.accepted, [dsv3.to_host(x).tolist() for x in (loss, bias)]

    expected = everything()
    monkeypatch.setattr(dsv3, "xp", Strict())
    got = everything()
    assert expected[1:] == got[1:] and expected[2] > 0
    for name, x in expected[0].items():
        assert isinstance(got[0][name], np.ndarray) and got[0][name].tobytes() == x.tobytes()


def test_known_mistakes_under_cupys_rules(gpu):
    cfg, w = stored("mtp")
    w, prompts = {name: dsv3.to_device(x) for name, x in w.items()}, INDEX["mtp"]["prompts"]
    ours = dsv3.trace(prompts, w, cfg)
    for name in ("model.layers.0.self_attn.q_rope", "model.layers.1.mlp.gate.weights", "model.layers.2.eh_proj"):
        made = dict(dsv3.known_mistakes(name, ours, prompts, w, cfg))
        assert len(made) > 13 and all(isinstance(wrong[name], np.ndarray) for wrong in made.values())


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 3e-5)])
def test_a_gpu_agrees_with_hugging_face_transformers(gpu, dtype, tolerance):
    for case in CASES if gpu else ["v3_yarn", "mtp", "attention_bias", "v2"]:
        check_parity(case, dtype, tolerance)


@pytest.mark.parametrize("speculate", [False, True])
def test_a_gpu_tells_the_shipped_story(gpu, speculate):
    """Greedy: the tokens of Hugging Face transformers. Sampled: those that NumPy draws from the same seed."""
    cfg, theirs = dsv3.read_config(WEIGHTS), np.load(WEIGHTS / "vectors" / "shipped.npz")
    w, text = dsv3.Checkpoint(WEIGHTS, cfg), dsv3.Text(WEIGHTS)
    prompt = text.encode(str(theirs["prompt"]))
    greedy = theirs["greedy"].tolist() if gpu else theirs["greedy"].tolist()[:60]
    assert generated([prompt], w, cfg, len(greedy), speculate=speculate) == [greedy]
    sampled = generated([prompt, [0]], w, cfg, 20, dsv3.Sampling(0.7, seed=3), speculate=speculate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3, "xp", np)
        w = dsv3.Checkpoint(WEIGHTS, cfg)
        assert sampled == generated([prompt, [0]], w, cfg, 20, dsv3.Sampling(0.7, seed=3), speculate=speculate)


def test_a_gpu_in_half_precision(gpu):
    """float16 is for speed: its logits are within 2 % of float64's, by their root mean square."""
    cfg = dsv3.read_config(WEIGHTS)
    w = dsv3.Checkpoint(WEIGHTS, cfg, np.float16)
    theirs = np.load(WEIGHTS / "vectors" / "shipped.npz")
    got = dsv3.trace([theirs["tokens"].tolist()], w, cfg)["lm_head"]
    assert got.dtype == np.float16
    error = got - theirs["lm_head"]
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(theirs["lm_head"] ** 2))


def test_a_gpu_that_is_too_small_streams_what_does_not_fit(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(dsv3, "BAND", 100)  # elements; a GPU takes larger matrices too as they are
    directory = write_checkpoint(tmp_path / "w", SMALL, quantised(make_weights(SMALL)))
    prompt = make_tokens(SMALL, 0, 9).tolist()
    expected = None
    for memory in (None, 40_000, 0):
        w = dsv3.Checkpoint(directory, SMALL, np.float64, memory)
        got = dsv3.trace([prompt], w, SMALL)["lm_head"], generated([prompt], w, SMALL, 9)
        expected = expected or got
        assert_close(got[0], expected[0], 1e-12)
        assert got[1] == expected[1]
        assert ("model.layers.1.mlp.experts.gate_proj.weight" in w) == (memory is None)  # else it would be put together
        held = sum(x.nbytes for name, x in w._kept.items() if name in w._shapes)
        assert held == w._taken <= w.memory and (held > 30_000 if memory else not held or memory is None)
    size = sum(math.prod(shape) * (4 if ".mlp.gate." in name else 2) for name, shape in w._shapes.items())
    for memory in (size, size - 1):  # float16, but for the routers: all fits, or a byte does not
        w = dsv3.Checkpoint(directory, SMALL, np.float16, memory)
        assert ("model.layers.1.mlp.experts.gate_proj.weight" in w) == (memory == size)


@pytest.mark.parametrize("speculate, waits", [(False, 1), (True, 1.25)])
def test_decoding_waits_once_a_token_and_uploads_no_weights(monkeypatch, speculate, waits):
    """With the weights on the GPU: what comes down is one row of logits, what goes up the token, its place and angles.

    With speculation a round waits twice, for the main model's logits and for the draft's, and makes up to two tokens.
    """
    monkeypatch.setattr(dsv3, "xp", Strict())
    cfg = dsv3.read_config(WEIGHTS)
    w, seen = dsv3.Checkpoint(WEIGHTS, cfg), []
    for _ in dsv3.generate([[0, 427]], w, cfg, 40, speculate=speculate):
        seen.append(Counter(Device.traffic))
    spent, made = seen[-1] - seen[7], len(seen) - 8  # by the eighth token every weight has gone up
    assert 0 < spent["downloads"] <= waits * made
    assert spent["uploads"] <= 10 * made and spent["bytes"] <= 1000 * made
    print(f"{spent['calls'] / made:.0f} array calls a token" + " with speculation" * speculate)


def test_no_result_hangs_on_the_last_bits(monkeypatch):
    """The order of a GPU's sums is its own: with every product, sum and exponential off by an ulp, greedy text, chosen
    experts and, to float32's precision, logits are the same."""
    cfg, theirs = dsv3.read_config(WEIGHTS), np.load(WEIGHTS / "vectors" / "shipped.npz")
    monkeypatch.setattr(dsv3, "xp", Strict())
    monkeypatch.setattr(Device, "jitter", np.random.default_rng(0))
    w, prompt = dsv3.Checkpoint(WEIGHTS, cfg), dsv3.Text(WEIGHTS).encode(str(theirs["prompt"]))
    assert generated([prompt], w, cfg, 40) == [theirs["greedy"][:40].tolist()]
    logits = dsv3.trace([theirs["tokens"].tolist()], w, cfg)["lm_head"]
    assert 0 < np.abs(logits - theirs["lm_head"]).max() < 1e-4


def test_a_gpus_speed_beside_that_of_its_memory(gpu):
    """Prints the bytes of weights that decoding reads a second, beside what adding 1 to a large array reads and writes.

    Four layers about as wide as Moonlight's; on the stand-in the small model, so that these lines run in every test.
    """
    cfg = SMALL
    if gpu:
        cfg = dsv3.Config(vocab_size=32000, hidden_size=2048, num_hidden_layers=4, num_attention_heads=16,
                          q_lora_rank=None, intermediate_size=8192, first_k_dense_replace=1, n_routed_experts=64,
                          moe_intermediate_size=1024, n_group=1, topk_group=1, num_nextn_predict_layers=0)  # fmt: skip
    w, E = {}, cfg.n_routed_experts
    for name, shape in dsv3.tensor_shapes(cfg).items():
        if ".experts.0." in name:
            w[name.replace(".0.", ".")] = dsv3.xp.full((E, *shape), 0.01, np.float32)
        elif ".experts." not in name:
            w[name] = dsv3.xp.full(shape, 0.01, np.float32)
    w["lm_head.weight"][7] = 0.02
    n, x = 10, dsv3.xp.zeros(2**28 if gpu else 2**8, np.float32)
    for _ in range(2):  # the first time is for kernels to be compiled
        start = time.perf_counter()
        for _ in range(n):
            x = x + 1
        assert dsv3.to_host(x[:1]) >= n
        memory = 2 * n * x.nbytes / (time.perf_counter() - start)
    stats = dsv3.Stats()
    assert generated([[1]], w, cfg, 50, speculate=False, stats=stats) == [[7] * 50]
    main = dsv3.tensor_shapes(replace(cfg, num_nextn_predict_layers=0))
    read = 4 * sum(math.prod(shape) for name, shape in main.items() if ".experts." not in name and "embed" not in name)
    sparse = cfg.num_hidden_layers - cfg.first_k_dense_replace
    read += 4 * sparse * cfg.num_experts_per_tok * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    rate = 40 / (stats.times[50] - stats.times[10])
    print(f"{rate:.1f} tokens/s, {rate * read / memory:.1%} of the memory's {memory / 1e9:.0f} GB/s")


@pytest.mark.parametrize("breach", [
    lambda xp, a: np.asarray(a), lambda xp, a: np.exp(a), lambda xp, a: a + np.ones(3), lambda xp, a: np.ones(3) + a,
    lambda xp, a: xp.exp(np.ones(3)), lambda xp, a: xp.concatenate([a, np.ones(3)]), lambda xp, a: xp.vecdot(a, a),
    lambda xp, a: xp.argsort(a), lambda xp, a: xp.argpartition(a, 1), lambda xp, a: xp.argsort(a, stable=True),
    lambda xp, a: xp.sum(a, where=a > 0),
    lambda xp, a: xp.take(a, 0, mode="clip"), lambda xp, a: a[np.array([0])], lambda xp, a: a[[0]],
    lambda xp, a: a[a > 0], lambda xp, a: float(a[0]), lambda xp, a: bool(a[0] > 0), lambda xp, a: a.ctypes,
    lambda xp, a: a.__setitem__(xp.asarray(np.array([0, 0])), 1.0), lambda xp, a: list(a), lambda xp, a: xp.errstate,
])  # fmt: skip
def test_the_stand_in_refuses_what_cupy_refuses(breach):
    xp = Strict()
    with pytest.raises((TypeError, AttributeError, AssertionError)):
        breach(xp, xp.asarray(np.arange(3.0)))


def test_the_stand_in_knows_cupys_names():
    """Where CuPy is installed (importing it needs no GPU), the names and parameters shipped as data are its own."""
    cupy = pytest.importorskip("cupy")
    if cupy.__version__ != API["version"]:
        pytest.skip(f"the data is of CuPy {API['version']}, {cupy.__version__} is installed")
    for kind, owner in (("names", cupy), ("methods", cupy.ndarray)):
        for name, parameters in API[kind].items():
            member = getattr(owner, name)
            if parameters is not None and inspect.isfunction(member):
                own = [p.name for p in inspect.signature(member).parameters.values() if p.kind != p.VAR_KEYWORD]
                assert [parameter.lstrip("*") for parameter in parameters] == own, name


# ---- 10. Command line ------------------------------------------------------------------------------------------------

STATISTICS = re.compile(
    r"prompt: \d+ tokens, [\d.]+ tok/s · new: \d+ tokens, [\d.]+ tok/s · drafted \d+, accepted \d+"
    r" · cache \d+ KB · peak memory \d+ MB\n"
)


def cli(*args, **kwargs):
    """The program as a user runs it -> (exit code, stdout, stderr)."""
    env = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "error"} | kwargs.pop("env", {})
    done = subprocess.run([sys.executable, "deepseek_v3.py", *map(str, args)], capture_output=True, cwd=HERE, env=env,
                          timeout=120, **kwargs)  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def invocation(*args, before=""):
    """What runs the program after some lines of Python, such as bring about a fault. It heeds Ctrl-C, even where the
    tests are a job in the background, which would not."""
    lines = "import os, runpy, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    lines += f"{before}\nsys.argv = {['deepseek_v3.py', *map(str, args)]!r}\n"
    return [sys.executable, "-c", lines + "runpy.run_path('deepseek_v3.py', run_name='__main__')"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint directory of SMALL in float32, without a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("small") / "w", SMALL, make_weights(SMALL, dtype=np.float32))


def test_token_ids_in_token_ids_out_and_one_line_of_statistics(small, capsys):
    prompts = [[3, 14, 15], [9]]
    flags = [flag for p in prompts for flag in ("--tokens", " ".join(map(str, p)))]
    assert dsv3.main(["--weights", str(small), "-n", "7", "--dtype", "float64", *flags]) == 0
    out, err = capsys.readouterr()
    expected = generated(prompts, dsv3.Checkpoint(small, SMALL, np.float64), SMALL, 7)
    assert out == "".join(" ".join(map(str, row)) + "\n" for row in expected)
    assert STATISTICS.fullmatch(err) and 10 < int(re.search(r"peak memory (\d+) MB", err)[1]) < 100_000


def test_the_trace_is_written_and_compared(small, tmp_path, capsys):
    trace, flags = tmp_path / "t.npz", ["--weights", str(small), "-n", "0", "--dtype", "float64", "--tokens", "1 2 3"]
    assert dsv3.main([*flags, "--trace", str(trace)]) == 0
    expected = dsv3.trace([[1, 2, 3]], dsv3.Checkpoint(small, SMALL, np.float64), SMALL)
    with np.load(trace) as stored:
        assert list(stored) == list(expected)
        arrays = {name: stored[name] for name in stored}
    for name, x in expected.items():
        assert np.array_equal(arrays[name], x)
    capsys.readouterr()
    assert dsv3.main([*flags, "--compare", str(trace)]) == 0
    assert "agree" in capsys.readouterr().err
    order = np.random.default_rng(0).permutation(6)  # a port may list the chosen experts in any order
    for name in list(arrays):
        if name.endswith((".gate.indices", ".gate.weights")):
            arrays[name] = arrays[name][:, order]
    np.savez(trace, **without(arrays, "model.layers.1.mlp.gate.scores"))
    assert dsv3.main([*flags, "--compare", str(trace)]) == 0
    for broken in ("model.layers.1.self_attn", "model.layers.1.mlp.gate.indices", "model.layers.2.mlp.gate.weights"):
        np.savez(trace, **arrays | {broken: arrays[broken] + 1, "lm_head": arrays["lm_head"] + 1})
        capsys.readouterr()
        assert dsv3.main([*flags, "--compare", str(trace)]) == 1
        assert f"departs at {broken}:" in capsys.readouterr().err
    np.savez(trace, **arrays | {"model.norm": arrays["model.norm"][:2]})
    assert dsv3.main([*flags, "--compare", str(trace)]) == 1
    np.savez(trace, **arrays | {"model.norm": arrays["model.norm"] * np.nan})
    assert dsv3.main([*flags, "--compare", str(trace)]) == 1
    np.savez(trace, lm_head=arrays["lm_head"].astype(ml_dtypes.bfloat16))
    assert dsv3.main([*flags, "--compare", str(trace)]) == 0
    for strange in ({"other": 1}, {"lm_head": np.array(["text"])}, {"lm_head": arrays["lm_head"] * 1j}):
        np.savez(trace, **strange)
        assert dsv3.main([*flags, "--compare", str(trace)]) == 2
    trace.write_bytes(b"nothing")
    assert dsv3.main([*flags, "--compare", str(trace)]) == 2
    assert list(tmp_path.iterdir()) == [trace]


@pytest.mark.parametrize("how", ["encrypted", "compressed", "huge", "beyond counting"])
def test_an_archive_that_cannot_be_read_is_refused_in_one_line(tmp_path, small, capsys, how):
    """Encrypted, compressed by a method that nobody knows, or with an array larger than memory or than any number."""
    shape = {"huge": (10**15,), "beyond counting": (10**30,)}.get(how, (1,))
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as file:
        file.writestr("lm_head.npy", array.getvalue() + bytes(4))
    raw = bytearray((tmp_path / "t.npz").read_bytes())
    for header, flags in ((raw.index(b"PK\3\4"), 6), (raw.index(b"PK\1\2"), 8)):
        raw[header + flags] |= how == "encrypted"
        raw[header + flags + 2] = 99 if how == "compressed" else 0
    (tmp_path / "t.npz").write_bytes(raw)
    assert dsv3.main(["--weights", str(small), "--tokens", "1", "-n", "0", "--compare", str(tmp_path / "t.npz")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "t.npz: not an .npz file of plain arrays" in err


@pytest.mark.parametrize("theirs", [[[1, 3]], [[2, 4]]])
def test_experts_of_lower_and_of_higher_ids_are_other_experts(theirs):
    ours = {"model.layers.0.mlp.gate.indices": np.array([[3, 2]])}
    assert dsv3.compare(ours, ours)[0]
    assert not dsv3.compare(ours, {"model.layers.0.mlp.gate.indices": np.array(theirs)})[0]


@pytest.mark.parametrize("args, said", [
    (["--no-such-flag"], "--no-such-flag"),
    (["-n", "x"], "-n"),
    (["-n", "-1"], "--max-tokens"),
    (["--tokens", "1 a"], "--tokens"),
    (["--tokens", ""], "empty"),
    (["--tokens", "1", "--prompt", "x"], "exclude"),
    (["--tokens", "99999"], "vocabulary"),
    (["--weights", "no-such-directory"], "no-such-directory"),
    (["--temperature", "-1"], "temperature"),
    (["--temp", "nan"], "temperature"),
    (["--top-p", "0"], "top-p"),
    (["--dtype", "int8"], "--dtype"),
    (["--tokens", "1", "--trace", "no-such-directory/t.npz"], "t.npz"),
    (["--tokens", "1", "--compare", "no-such-file.npz"], "no-such-file"),
    (["--chat", "--tokens", "1"], "--chat"),
    (["--trace", ""], "name of a file"),
    (["--compare", ""], "name of a file"),
    (["--memory", "-1"], "--memory"),
    (["--memory", "nan"], "--memory"),
])  # fmt: skip
def test_a_bad_request_is_one_line_and_exit_code_2(small, capsys, args, said):
    assert dsv3.main([*([] if "--weights" in args else ["--weights", str(small)]), *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(dsv3.InputError, match="pip install jinja2"):
        dsv3.Text.render(types.SimpleNamespace(chat_template="x"), [])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert dsv3.main([]) == 2
    assert "pip install tokenizers, or give --tokens" in capsys.readouterr().err


def test_what_has_no_place_in_the_model_is_noted(tmp_path, capsys):
    w = make_weights(SMALL, dtype=np.float32) | {"more\x1b[31m\n": np.zeros(1)}
    write_checkpoint(tmp_path / "w", SMALL, w)
    assert dsv3.main(["--weights", str(tmp_path / "w"), "--tokens", "1", "-n", "0"]) == 0
    err = capsys.readouterr().err
    assert "note: 1 tensors have no place in the model" in err and r"'more\x1b[31m\n'" in err and err.count("\n") == 2


def test_text_without_a_tokenizer_points_to_token_ids(small, capsys):
    assert dsv3.main(["--weights", str(small), "--prompt", "x"]) == 2
    assert "--tokens" in capsys.readouterr().err


def test_inspect_takes_a_directory_or_a_bare_config(small, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(RELEASE))
    for path in (tmp_path, tmp_path / "config.json"):
        assert dsv3.main(["--weights", str(path), "--inspect"]) == 0
        assert "671,026,419,200" in capsys.readouterr().out
    assert dsv3.main(["--weights", str(small), "--inspect"]) == 0
    assert f"{4 * sum(x.size for x in make_weights(SMALL).values()):,}" in capsys.readouterr().out


@pytest.mark.parametrize("parameters, flags, drafts", [
    (2**24, [], True), (2**24 + 1, [], False), (2**24, ["--no-mtp"], False), (2**24 + 1, ["--mtp"], True),
])  # fmt: skip
def test_speculation_is_the_default_where_it_pays(parameters, flags, drafts, monkeypatch, capsys):
    monkeypatch.setattr(dsv3, "activated", lambda cfg: parameters)
    assert dsv3.main(["-n", "12", *flags]) == 0
    err = capsys.readouterr().err
    assert ("drafted 0" not in err) == drafts
    assert ("--mtp turns it on" in err) == (not drafts and not flags)


def test_speculation_without_the_module_is_said_to_be_none(tmp_path, capsys):
    w = make_weights(replace(SMALL, num_nextn_predict_layers=0), dtype=np.float32)
    write_checkpoint(tmp_path / "w", SMALL, w)
    flags = ["--weights", str(tmp_path / "w"), "--tokens", "1", "-n", "2"]
    for asked in ([], ["--mtp"]):
        assert dsv3.main([*flags, *asked]) == 0
        assert ("lacks the MTP module" in capsys.readouterr().err) == bool(asked)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        dsv3.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for flag in ("--prompt", "--tokens", "--weights", "--max-tokens", "--max-new-tokens", "--temperature", "--temp",
                 "--top-p", "--top-k", "--seed", "--device", "--dtype", "--mtp", "--no-mtp", "--chat", "--trace",
                 "--compare", "--inspect"):  # fmt: skip
        assert flag in out


@pytest.mark.parametrize("generation, config, ids", [
    (None, 1, {1}), (None, None, set()), (None, [1, 2], {1, 2}), ([3, 4], 1, {3, 4}), (5, 1, {5}), ("null", 1, {1}),
])  # fmt: skip
def test_any_of_the_end_tokens_of_both_files_ends_a_text(tmp_path, generation, config, ids):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        value = None if generation == "null" else generation
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert dsv3.end_tokens(tmp_path) == ids


def test_weights_stored_in_the_dtype_of_the_computation_stay_mapped(small):
    array = dsv3.Checkpoint(small, SMALL)["lm_head.weight"]
    assert isinstance(array.base.base.obj, mmap.mmap)


class FakeCUDAError(RuntimeError):
    def __init__(self, status, driver=None):
        super().__init__(f"cuda error {status}")
        self.status, self.driver = status, driver


@pytest.mark.parametrize("answer, said", [
    (ModuleNotFoundError("x", name="cupy"), "CuPy is not installed"),
    (ModuleNotFoundError("x", name="fastrlock"), "CuPy lacks fastrlock"),
    (ImportError("libx is missing\nlong story"), "CuPy does not import (libx is missing)"),
    (FakeCUDAError(35, driver=0), "no NVIDIA driver is installed"),
    (FakeCUDAError(35, driver=12020), "driver is older than CuPy's CUDA"),
    (FakeCUDAError(3), "CUDA answers cuda error 3"),
    (0, "the driver sees no GPU"),
    (1, "CUDA's libraries do not load (no cublas)"),
])  # fmt: skip
def test_each_reason_for_having_no_gpu_is_one_line_and_auto_takes_the_cpu(monkeypatch, answer, said):
    def count():
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ones(*_):
        raise OSError("no cublas")

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise answer

    calls = {"getDeviceCount": count, "driverGetVersion": lambda: answer.driver}
    runtime = types.SimpleNamespace(**calls, CUDARuntimeError=FakeCUDAError)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime), ones=ones)
    if isinstance(answer, ImportError):
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    else:
        monkeypatch.setitem(sys.modules, "cupy", cupy)
    namespace, reason = dsv3.choose_device("auto")
    assert namespace is np and reason.startswith("cpu: ") and said in reason
    assert dsv3.choose_device("cpu")[0] is np
    with pytest.raises(dsv3.InputError, match=re.escape(said)) as refusal:
        dsv3.choose_device("gpu")
    assert "\n" not in str(refusal.value)
    runtime.getDeviceCount, runtime.getDeviceProperties = lambda: 1, lambda _: {"name": b"a card"}
    cupy.ones = np.ones  # and none: a kernel and a product run
    if not isinstance(answer, ImportError):
        assert dsv3.choose_device("auto") == dsv3.choose_device("gpu") == (cupy, "gpu: a card")


# ---- The conformance kit ---------------------------------------------------------------------------------------------
# weights/vectors/case.py says what a case is. A port is a module with some of the functions of `as_port`.


def as_port(module, dtype=np.float64):
    """deepseek_v3.py, or a copy with a mistake, as a port."""

    def load(directory):
        cfg, config = module.read_config(directory), json.loads((directory / "config.json").read_text())
        return cfg, module.Checkpoint(directory, cfg, np.float16 if config["torch_dtype"] == "float16" else dtype)

    def trace(directory, prompts, chunks=None):
        cfg, w = load(directory)
        if chunks is None:
            return module.trace(prompts, w, cfg)
        cache, start, parts = module.Cache(1), 0, []
        for token_BT in np.split(np.array(prompts), np.cumsum(chunks)[:-1], axis=1):
            with module.recording() as named:
                h_BTD = module.forward(token_BT, w, cfg, cache, np.array([start]))
                module.record("lm_head", module.head(h_BTD, w, cfg))
            parts.append(named)
            start += token_BT.shape[1]
        return {name: np.concatenate([named[name][0] for named in parts]) for name in parts[0]}

    def training_objective(directory, prompts, mtp_weight, balance_weight):
        cfg, w = load(directory)
        total, parts = module.training_objective(w, np.array(prompts), cfg, mtp_weight, balance_weight)
        values = {"total": total, "main": parts["main"], "balance": parts["balance"]}
        values |= {f"mtp.{k}": x for k, x in enumerate(parts["mtp"], 1)}
        return {name: np.asarray(x, dtype) for name, x in values.items()}  # counts have made some of them float64

    def dequantize(code, scale):
        return module.decode("F8_E4M3", code, scale)

    return types.SimpleNamespace(trace=trace, training_objective=training_objective, dequantize=dequantize,
                                 update_bias=module.update_bias)  # fmt: skip


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """answer(port, case) -> the arrays that a port makes of a case; a case that it has no function for is skipped."""

    @functools.cache
    def directory(case):
        return kit.write(INDEX[case], tmp_path_factory.mktemp("cases") / case)

    def answer(port, case):
        it = INDEX[case]
        if not hasattr(port, it["function"]):
            pytest.skip(f"the port has no {it['function']}")
        function = getattr(port, it["function"])
        try:
            if "config" in it:
                return function(directory(case), it["prompts"], *it.get("arguments", []))
            result = function(*(PARITY[f"{case}/arguments/{name}"] for name in it["arguments"]))
            return {it["arrays"][0]: result}
        except NotImplementedError as e:
            pytest.skip(str(e))

    return answer


def judge(case, got):
    """(whether the arrays that a port returned are right, the verdict). It need not return all, but the last one."""
    it, want = INDEX[case], expected(case)
    if it["arrays"][-1] not in got:
        pytest.skip(f"the port returned no {it['arrays'][-1]}")
    got = {name: np.asarray(got[name]) for name in want if name in got}
    for name in got:  # a NaN where one belongs is right
        if got[name].shape == want[name].shape and np.isnan(want[name]).any():
            right = np.isnan(want[name]) & np.isnan(got[name])
            want[name], got[name] = (np.where(right, x.dtype.type(0), x) for x in (want[name], got[name]))
    return dsv3.compare(want, got, {int(size): limit for size, limit in it["tolerance"].items()})


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", INDEX)
def test_vectors(case, answer):
    """DSV3_PORT=module python -m pytest -k test_vectors: a port's verdict; without DSV3_PORT this file's."""
    port = importlib.import_module(os.environ["DSV3_PORT"]) if "DSV3_PORT" in os.environ else as_port(dsv3)
    agree, verdict = judge(case, answer(port, case))
    assert agree, f"{verdict}\n{INDEX[case]['why']} {' '.join(INDEX[case]['see'])}"


ROUTE, Q, K = "model.layers.1.mlp.gate", "model.layers.0.self_attn.q_rope", "model.layers.0.self_attn.k_rope"
LATENT, ATTENTION, EH = "model.layers.0.self_attn.kv_latent", "model.layers.0.self_attn", "model.layers.2.eh_proj"
MISTAKES = {  # what: edits, the vectors that must fail, where --compare must point, the hint that it must give
    "experts of other groups masked with 0, not -inf": (
        [("choice_BTGX, -xp.inf)", "choice_BTGX, 0)")], ["negative_bias"], f"{ROUTE}.indices", None),
    "group score: the best alone": (
        [("[..., -2 if biased else -1 :]", "[..., -1:]")], ["group_scores"], f"{ROUTE}.indices", None),
    "group score: the sum of all": (
        [("[..., -2 if biased else -1 :]", "")], ["group_scores"], f"{ROUTE}.indices", None),
    "group score from unbiased affinities": (
        [("xp.sort(choice_BTGX, ", "xp.sort(score_BTE.reshape(choice_BTGX.shape), ")],
        ["group_scores"], f"{ROUTE}.indices", None),
    "no groups": (
        [("if cfg.n_group > 1 and", "if cfg.n_group > 99 and")],
        ["v3_yarn", "many_groups"], f"{ROUTE}.indices", "there were no groups"),
    "V2's groups ranked by their two best": (
        [("-2 if biased else -1", "-2")], ["v2"], f"{ROUTE}.indices", None),
    "ties to the highest index": (
        [("argsort(-score, axis=-1, **stable)[..., :k]", "argsort(score, axis=-1, **stable)[..., ::-1][..., :k]")],
        ["ties_experts", "ties_groups"], f"{ROUTE}.indices", None),
    "ties of groups to the highest index": (
        [("one_hot(top_k(group_BTG, cfg.topk_group)",
          "one_hot(cfg.n_group - 1 - top_k(group_BTG[..., ::-1], cfg.topk_group)")],
        ["ties_groups"], f"{ROUTE}.indices", None),
    "the bias unused": (
        [('score_BTE + wide(w[f"{name}.gate.e_score_correction_bias"])', "score_BTE")],
        ["group_scores", "ties_experts"], f"{ROUTE}.indices", "the biases did not enter the choice"),
    "the bias in the gates": (
        [("gate_BTK = xp.take_along_axis(score_BTE,", "gate_BTK = xp.take_along_axis(choice_BTE,")],
        ["v3_yarn", "unnormalised"], f"{ROUTE}.weights", "the biases entered the gates"),
    "affinity as biased minus bias": (
        [("gate_BTK = xp.take_along_axis(score_BTE,",
          'gate_BTK = xp.take_along_axis(choice_BTE - wide(w[f"{name}.gate.e_score_correction_bias"]),')],
        ["tiny_affinities"], f"{ROUTE}.weights", None),
    "guard 1e-6 in the normalisation": ([("+ 1e-20)", "+ 1e-6)")], ["tiny_affinities"], f"{ROUTE}.weights", None),
    "gates not normalised": (
        [("if cfg.norm_topk_prob:", "if False:")], ["v3_yarn"], f"{ROUTE}.weights", "norm_topk_prob were the opposite"),
    "gates always normalised": (
        [("if cfg.norm_topk_prob:", "if True:")],
        ["unnormalised"], f"{ROUTE}.weights", "norm_topk_prob were the opposite"),
    "gates not scaled": (
        [("gate_BTK * cfg.routed_scaling_factor)", "gate_BTK)")],
        ["v3_yarn", "k2_like"], f"{ROUTE}.weights", "routed_scaling_factor were 1"),
    "gates scaled only where normalised": (
        [("gate_BTK * cfg.routed_scaling_factor)",
          "gate_BTK * (cfg.routed_scaling_factor if cfg.norm_topk_prob else 1))")],
        ["unnormalised"], f"{ROUTE}.weights", "routed_scaling_factor were 1"),
    "router in half precision": (
        [("affinity(wide(x_BTD) @ weight_ED.T)", "affinity(x_BTD @ weight_ED.astype(x_BTD.dtype).T)")],
        ["half"], "model.layers.0.mlp.gate.scores", None),
    "RMSNorm rounded once, after the weight": (
        [("normed.astype(x.dtype, copy=False) * weight", "(normed * weight).astype(x.dtype, copy=False)")],
        ["half"], "model.layers.0.input_layernorm", None),
    "rms_norm_eps in the norms on the latents": (
        [('kv_a_layernorm.weight"], LATENT_EPS', 'kv_a_layernorm.weight"], cfg.rms_norm_eps'),
         ('q_a_layernorm.weight"], LATENT_EPS', 'q_a_layernorm.weight"], cfg.rms_norm_eps')],
        ["latent_eps", "moonlight"], Q, "the norms on the latents took rms_norm_eps"),
    "rms_norm_eps in the norm on c_KV": (
        [('kv_a_layernorm.weight"], LATENT_EPS', 'kv_a_layernorm.weight"], cfg.rms_norm_eps')],
        ["moonlight", "latent_eps"], LATENT, "the norms on the latents took rms_norm_eps"),
    "RoPE on halves": (
        [("    if interleave:\n", "    if not interleave:\n")],
        ["v3_yarn", "attention_bias"], Q, "RoPE paired other elements"),
    "pairs left as halves, as in HF": (
        [("return xp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)",
          "return xp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)")],
        ["v3_yarn"], Q, "stored by halves (as in HF, no mistake: write the pairs as neighbours)"),
    "keys rotated backwards": (
        [("rope(k_rope_BTR, at.cos_BTP, at.sin_BTP,", "rope(k_rope_BTR, at.cos_BTP, -at.sin_BTP,")],
        ["v3_yarn"], K, None),
    "YaRN off within the original context": (
        [("is None:\n        return freq_P", "is None or True:\n        return freq_P")],
        ["v3_yarn", "yarn_range"], Q, "YaRN were off"),
    "YaRN on the key alone": (
        [("    cos_BTP, sin_BTP = at.cos_BTP, at.sin_BTP\n",
          "    plain = positions(at.start_B, x_BTD.shape[1], replace(cfg, rope_scaling=None), x_BTD.dtype)\n"
          "    cos_BTP, sin_BTP = plain.cos_BTP, plain.sin_BTP\n")],
        ["v3_yarn"], Q, "YaRN were off"),
    "all frequencies divided by the factor": (
        [("freq_P * (1 - slowed_P) + freq_P / yarn.factor * slowed_P", "freq_P / yarn.factor")], ["v3_yarn"], Q, None),
    "YaRN's range not rounded": (
        [("low, high = math.floor(low), math.ceil(high)", "pass")],
        ["v3_yarn", "yarn_range"], Q, "YaRN's range were rounded otherwise"),
    "YaRN's range held at the last pair": (
        [("min(high, cfg.qk_rope_head_dim - 1)", "min(high, freq_P.size - 1)")], ["yarn_range"], Q, None),
    "no factor on cos and sin": (
        [("rope_magnitude(cfg) * f(angle_BTP)", "f(angle_BTP)")],
        ["hf5_spelling", "mscale_all_dim_0"], Q, "cos and sin lacked YaRN's factor"),
    "no mscale^2 in the softmax scale": (
        [("** -0.5 * mscale**2", "** -0.5")],
        ["v3_yarn", "mscale_707"], ATTENTION, "the softmax scale lacked mscale^2"),
    "mscale, not its square": ([("* mscale**2", "* mscale")], ["v3_yarn", "mscale_707"], ATTENTION, None),
    "mscale for mscale_all_dim": (
        [("yarn_mscale(yarn.factor, yarn.mscale_all_dim) if yarn and yarn.mscale_all_dim",
          "yarn_mscale(yarn.factor, yarn.mscale) if yarn and yarn.mscale")],
        ["hf5_spelling", "mscale_all_dim_0"], ATTENTION, None),
    "1 / sqrt of the absorbed size": (
        [("(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) **", "(cfg.kv_lora_rank + cfg.qk_rope_head_dim) **")],
        ["v3_yarn"], ATTENTION, None),
    "the latent not normed": (
        [('rms_norm(c_BTC, w[f"{name}.kv_a_layernorm.weight"], LATENT_EPS)', "c_BTC")], ["v3_yarn"], LATENT, None),
    "heads of q as [rope ; nope]": (
        [("q_nope_BTHN, q_rope_BTHR = q_BTHY[..., : cfg.qk_nope_head_dim], q_BTHY[..., cfg.qk_nope_head_dim :]",
          "q_rope_BTHR, q_nope_BTHN = q_BTHY[..., : cfg.qk_rope_head_dim], q_BTHY[..., cfg.qk_rope_head_dim :]")],
        ["v3_yarn"], Q, "the heads of q were [rope ; nope]"),
    "kv_a as [k_R ; c_KV]": (
        [("c_BTC, k_rope_BTR = kv_BTL[..., : cfg.kv_lora_rank], kv_BTL[..., cfg.kv_lora_rank :]",
          "k_rope_BTR, c_BTC = kv_BTL[..., : cfg.qk_rope_head_dim], kv_BTL[..., cfg.qk_rope_head_dim :]")],
        ["v3_yarn"], LATENT, "kv_a_proj_with_mqa were [k_R ; c_KV]"),
    "heads of kv_b as [v ; k]": (
        [("k_nope_BSHN, v_BSHV = kv_BSHY[..., : cfg.qk_nope_head_dim], kv_BSHY[..., cfg.qk_nope_head_dim :]",
          "v_BSHV, k_nope_BSHN = kv_BSHY[..., : cfg.v_head_dim], kv_BSHY[..., cfg.v_head_dim :]")],
        ["v3_yarn"], ATTENTION, "the heads of kv_b_proj were [v ; k]"),
    "k_R for the first head alone": (
        [("xp.broadcast_to(k_rope_BSR[:, :, None], (",
          "xp.where(xp.arange(cfg.num_attention_heads)[:, None] > 0, 0, k_rope_BSR[:, :, None]) * xp.ones((")],
        ["v3_yarn"], ATTENTION, None),
    "positions start again in each chunk": (
        [("angle_BTP = position_BT[:, :, None]", "angle_BTP = np.arange(T)[None, :, None]")], ["chunks"], Q, None),
    "a chunk sees only itself": (
        [("visible_BTS = np.arange(start_B.max() + T) <= position_BT[:, :, None]",
          "visible_BTS = np.arange(start_B.max() + T) <= position_BT[:, :, None]\n"
          "    visible_BTS &= np.arange(start_B.max() + T) >= start_B[:, None, None]")], ["chunks"], ATTENTION, None),
    "absorbed values for keys": (
        [("return up_HXC[:, : cfg.qk_nope_head_dim], up_HXC[:, cfg.qk_nope_head_dim :]",
          "return up_HXC[:, -cfg.qk_nope_head_dim :], up_HXC[:, : -cfg.qk_nope_head_dim]")],
        ["chunks"], ATTENTION, None),
    "all rows cached as the first": (
        [("kept[b, start : start + T] = kv_BTL[b]", "kept[b, start : start + T] = kv_BTL[0]")],
        ["ragged"], "1/model.layers.0.self_attn", None),
    "MTP: [state ; embedding]": (
        [("xp.concatenate([embedded_BTD, state_BTD]", "xp.concatenate([state_BTD, embedded_BTD]")],
        ["mtp"], EH, "eh_proj took [state ; embedding]"),
    "MTP: the state before model.norm": (
        [('    return record("model.norm", ', '    global last\n    last = x_BTD\n    return record("model.norm", '),
         ("state_BTD = rms_norm(h_BTD,", "state_BTD = rms_norm(last[:, :T] if k == 1 else h_BTD,")],
        ["mtp"], EH, "the MTP module took the state before model.norm"),
    "MTP: the state before shared_head.norm": (
        [('    name = f"model.layers.{cfg.num_hidden_layers + k - 1}"\n',
          '    global last\n    name = f"model.layers.{cfg.num_hidden_layers + k - 1}"\n'),
         ("state_BTD = rms_norm(h_BTD,", "state_BTD = rms_norm(h_BTD if k == 1 else last[:, :T],"),
         ('return rms_norm(x_BTD, w[f"{name}.shared', 'last = x_BTD\n    return rms_norm(x_BTD, w[f"{name}.shared')],
        ["mtp_depth_2"], "model.layers.3.eh_proj",
        "the MTP module took the state before model.layers.2.shared_head.norm"),
    "MTP: embedding masked at position 0": (
        [("embedded_BTD = rms_norm(embedded_BTD,",
          "embedded_BTD = embedded_BTD * (xp.arange(T) > 0)[:, None].astype(h_BTD.dtype)\n"
          "    embedded_BTD = rms_norm(embedded_BTD,")], ["mtp"], EH, None),
    "MTP: model.norm for shared_head.norm": (
        [('w[f"{name}.shared_head.norm.weight"]', 'w["model.norm.weight"]')],
        ["mtp"], "model.layers.2.shared_head", None),
    "balance loss: f from the biased choice": (
        [("def balance_loss(score_BTE, cfg):", "def balance_loss(score_BTE, cfg, chosen):"),
         ("one_hot(top_k(score_BTE, K), E)", "one_hot(chosen, E)"),
         ("balance_loss(score_BTE, cfg) for score_BTE in scores.values()",
          'balance_loss(score_BTE, cfg, named[f"{name}.indices"]) for name, score_BTE in scores.items()')],
        ["losses"], "balance", None),
    "balance loss without the MTP modules": (
        [("for score_BTE in scores.values()", "for score_BTE in list(scores.values())[:-depth]")],
        ["losses"], "balance", None),
    "MTP loss divided by T - k": (
        [("xp.mean(xp.sum(loss_BT, axis=1)) / T", "xp.mean(loss_BT)")], ["losses"], "mtp.1", None),
    "MTP losses summed, not averaged": (
        [("sum(losses) / max(depth, 1)", "sum(losses)")], ["losses"], "total", None),
    "bias update: sign(0) = 1": (
        [("xp.sign(xp.mean(load_E) - load_E)", "xp.where(xp.mean(load_E) >= load_E, 1, -1)")],
        ["update_bias"], "bias", None),
    "bias update centred": (
        [("    return bias_E + gamma * xp.sign(xp.mean(load_E) - load_E).astype(bias_E.dtype)",
          "    step_E = xp.sign(xp.mean(load_E) - load_E)\n    return bias_E + gamma * (step_E - xp.mean(step_E))")],
        ["update_bias"], "bias", None),
    "FP8 divided by the scale": ([("part *= np.repeat(", "part /= np.repeat(")], ["fp8"], "weight", None),
    "FP8 blocks of columns / scales": (
        [("np.repeat(scale_X, BLOCK)[:columns]", "np.repeat(scale_X, -(-columns // len(scale_X)))[:columns]")],
        ["fp8"], "weight", None),
    "FP8 code 0x7f read as 480": ([("    value[code & 127 == 127] = np.nan\n", "")], ["fp8"], "weight", None),
}  # fmt: skip


def planted(edits):
    """A copy of deepseek_v3.py with a mistake. What an edit replaces must be there, once."""
    source = (HERE / "deepseek_v3.py").read_text("utf-8")
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} times in deepseek_v3.py, not once: {old}"
        source = source.replace(old, new)
    module = types.ModuleType("planted")
    exec(compile(source, "planted.py", "exec"), vars(module))
    return module


@pytest.mark.parametrize("what", MISTAKES)
def test_a_planted_mistake_is_caught_and_found(what, answer):
    """In float32, as most ports compute: its vectors fail, and --compare names where it is, and its kind if it can."""
    edits, vectors, where, hint = MISTAKES[what]
    port = as_port(planted(edits), np.float32)
    for vector in vectors:
        agree, verdict = judge(vector, answer(port, vector))
        assert not agree, f"{vector} does not show it: {verdict}"
        assert vector != vectors[0] or INDEX[vector]["function"] == "trace" or f"departs at {where}: " in verdict
    if "layers" in where:
        assert (where, hint or "") == found_by_compare(vectors[0], answer(port, vectors[0]))
    if "RoPE" in what or "YaRN" in what or "mscale" in what:
        assert judge("one_token", answer(port, "one_token"))[0] or "cos and sin" in what


def found_by_compare(case, theirs):
    """The array and the kind of mistake that --compare names."""
    it, (cfg, w) = INDEX[case], stored(case)
    dtype = np.float16 if case == "half" else np.float64
    w, prompts = {name: x.astype(dtype) for name, x in w.items()}, it["prompts"]
    ours, tolerance = dsv3.trace(prompts, w, cfg), {int(size): limit for size, limit in it["tolerance"].items()}
    mistakes = functools.partial(dsv3.known_mistakes, ours=ours, prompts=prompts, w=w, cfg=cfg)
    _, verdict = dsv3.compare(ours, theirs, tolerance, mistakes)
    return re.fullmatch(r"departs at (\S+): .*?(?:; as if (.*))?", verdict).groups("")


def test_an_untouched_copy_passes_in_float32_too(answer):
    port = as_port(planted([]), np.float32)
    for case in INDEX:
        agree, verdict = judge(case, answer(port, case))
        assert agree, f"{case}: {verdict}"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", INDEX)
def test_the_readmes_port_of_hugging_face_transformers(case, answer):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    if "ties_" in case or case == "k2_like":
        pytest.skip("torch.topk leaves ties open; model_type kimi_k2 is unknown to transformers")
    exec(programs()["import torch"], scope := {})
    agree, verdict = judge(case, answer(types.SimpleNamespace(trace=scope["trace"]), case))
    assert agree, verdict


@pytest.mark.parametrize("case", ["hf5_spelling", "mscale_707", "negative_bias", "latent_eps", "ties_groups"])
def test_the_readmes_port_to_jax(case, answer, monkeypatch):
    """Of one shape: a compilation each takes minutes for all."""
    pytest.importorskip("jax")
    monkeypatch.setattr(dsv3, "xp", np)  # and back to it at the end
    exec(programs()["import jax"], scope := {})
    agree, verdict = judge(case, answer(types.SimpleNamespace(trace=scope["trace"]), case))
    assert agree, verdict


def test_a_port_in_any_language_is_checked_as_the_readme_shows(tmp_path, capsys, monkeypatch):
    """A checkpoint from case.py, an .npz of a port without mscale^2, and the verdict, by the commands shown."""
    text, directory = (HERE / "README.md").read_text("utf-8"), tmp_path / "v3_yarn"
    commands = dict(console(text))
    made = subprocess.run([sys.executable, "weights/vectors/case.py", "v3_yarn", directory], cwd=HERE, check=True,
                          capture_output=True, text=True)  # fmt: skip
    shown = commands["python weights/vectors/case.py v3_yarn a_case"]
    assert made.stdout.replace(str(directory), "a_case") == shown
    port = as_port(planted(MISTAKES["no mscale^2 in the softmax scale"][0]))
    monkeypatch.chdir(tmp_path)
    np.savez("yours.npz", **port.trace(directory, INDEX["v3_yarn"]["prompts"]))
    assert dsv3.main(shlex.split(made.stdout)[2:]) == 1
    said = capsys.readouterr().err.partition("\n")[0]
    assert said.startswith("yours.npz: departs") and f"`{said.removeprefix('yours.npz: ')}`" in text
    np.savez("yours.npz", **as_port(dsv3).trace(directory, INDEX["v3_yarn"]["prompts"]))
    assert dsv3.main(shlex.split(made.stdout)[2:]) == 0


def test_the_formula_of_the_weights_needs_only_integers():
    def u(name, i):
        h = (zlib.crc32(name.encode()) + 2654435769 * i) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return (h ^ h >> 16) / 2**31 - 1

    name, (rows, columns) = "model.layers.1.mlp.gate.weight", (8, 24)
    plain = [[u(name, r * columns + c) * math.sqrt(3 / columns) * 1.5 for c in range(columns)] for r in range(rows)]
    assert np.array_equal(np.float32(plain), kit.weight(INDEX["mtp"], name, (rows, columns)))


def test_case_py_lists_the_cases_and_refuses_others(tmp_path, capsys):
    assert kit.main([]) is None and re.findall(r"^\w+", capsys.readouterr().out, re.M) == list(INDEX)
    for arguments in (["v3_yarn"], ["no_such_case", "x"], ["fp8", "x"], ["v3_yarn", kit.__file__]):
        assert "\n" not in kit.main(arguments)
    assert kit.main(["half", str(tmp_path)]) is None and "--dtype float16" in capsys.readouterr().out


def test_a_port_in_python_is_checked_by_the_command_shown(tmp_path):
    """A port of one function, which has it wrong: that vector fails, those of the others are skipped."""
    (tmp_path / "my_port.py").write_text("def update_bias(bias, load, gamma):\n    return bias - gamma\n")
    command = [sys.executable, "-m", "pytest", "-k", "test_vectors and (bias or fp8)", "-p", "no:cacheprovider"]
    env = os.environ | {"DSV3_PORT": "my_port", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed" in done.stdout and "3 skipped" in done.stdout, done.stdout
    assert "departs at bias: " in done.stdout and "deepseek-ai/DeepSeek-V3#761" in done.stdout


def test_every_case_says_why_and_every_row_of_the_readme_has_its_vector():
    text = (HERE / "README.md").read_text("utf-8")
    for name, case in INDEX.items():
        assert case["why"] and case["equation"] and case["origin"] and case["arrays"] and case["tolerance"], name
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", address) for address in case["see"]), name
    for number in (f"holds {len(INDEX)} cases", f"on {len(CASES)} structures", f"these {len(MISTAKES)} mistakes"):
        assert number in text
    rows = re.findall(r"^\|(?:[^|\n]+\|){4}([^|\n]+)\|$", text, re.M)[2:]
    assert len(rows) > 20
    for cell in rows:
        vectors = re.findall(r"`(\w+)`", cell)
        assert vectors and set(vectors) <= set(INDEX), cell


def mistakes_table():
    """The planted mistakes by the array at which they are found; bold are those that --compare names."""
    rows = {}
    for what, (_, vectors, where, hint) in MISTAKES.items():
        mark = "**" if hint else ""
        rows.setdefault(where, []).append(f"{mark}{what}{mark} ({' '.join(f'`{vector}`' for vector in vectors)})")
    table = [f"| `{where}` | {'; '.join(mistakes)} |\n" for where, mistakes in rows.items()]
    return "".join(["| found at | mistakes, and the vectors that catch them |\n", "|---|---|\n", *table])


def test_no_mistake_in_yarn_is_suspected_where_there_is_none():
    cfg = replace(SMALL, rope_scaling=None)
    w, prompts = make_weights(cfg), [[3, 1, 4, 1, 5]]
    ours = dsv3.trace(prompts, w, cfg)
    name = "model.layers.0.self_attn"
    mistakes = dict(dsv3.known_mistakes(name, ours, prompts, w, cfg))
    assert not any(re.search("YaRN|mscale", what) for what in mistakes)
    wrong = mistakes["the heads of kv_b_proj were [v ; k]"]
    _, verdict = dsv3.compare(ours, {name: wrong[name]}, mistakes=lambda name: mistakes.items())
    assert verdict.endswith("as if the heads of kv_b_proj were [v ; k]")


def test_the_readme_lists_the_planted_mistakes():
    print(mistakes_table())
    assert mistakes_table() in (HERE / "README.md").read_text("utf-8")


# ---- The shipped checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    cfg = dsv3.read_config(WEIGHTS)
    return dsv3.Checkpoint(WEIGHTS, cfg), cfg, dsv3.Text(WEIGHTS)


def console(markdown):
    """The commands that a README shows, `$ ` taken off, with the output that it shows for each."""
    for block in re.findall(r"```console\n(.*?)```", markdown, re.S):
        for command in re.split(r"^\$ ", block, flags=re.M)[1:]:
            line, _, output = command.partition("\n")
            yield line, output


def test_the_readme_shows_what_its_commands_print(tmp_path):
    pages = (HERE / "README.md").read_text("utf-8"), (WEIGHTS / "README.md").read_text("utf-8")
    shown = [(line, output) for page in pages for line, output in console(page) if output and "deepseek_v3.py" in line]
    assert len(shown) >= 7
    (tmp_path / "config.json").write_text(json.dumps(RELEASE))
    for line, output in shown:
        words = [tmp_path / "config.json" if word == "config.json" else word for word in shlex.split(line)]
        assert words[:2] == ["python", "deepseek_v3.py"]
        code, out, err = cli(*words[2:])
        assert (code, out) == (0, output), err


def test_the_examples_in_docstrings_are_true():
    failed, attempted = doctest.testmod(dsv3)
    assert failed == 0 and attempted >= 9


def test_the_script_metadata_is_what_requirements_say():
    """What `uv run deepseek_v3.py` installs: the requirements above those of the tests."""
    source, required = (HERE / "deepseek_v3.py").read_text("utf-8"), (HERE / "requirements.txt").read_text("utf-8")
    metadata = re.match(r"# /// script\n(.*?)# ///\n", source, re.S)[1]
    needed = re.findall(r"^[\w>=.]+", required.partition("# Tests.")[0], re.M)
    assert tomllib.loads(re.sub("^# ", "", metadata, flags=re.M)) == {
        "requires-python": ">=3.11", "dependencies": needed
    }  # fmt: skip


def test_the_readme_names_what_exists():
    text, tests = (HERE / "README.md").read_text("utf-8"), (HERE / "test_deepseek_v3.py").read_text("utf-8")
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\|$", text, re.M)
    for name in re.findall(r"`(\w+)`", " ".join(row[1] for row in rows)):
        assert hasattr(dsv3, name), name
    named = [re.findall(r"`(\w+)`", row[3]) for row in rows if "---" not in row[0] and "pytest" not in row[3]]
    assert len(named) > 15 and all(named)
    for name in itertools.chain(*named):
        assert re.search(rf"def test_\w*{name}", tests), name


def test_the_readmes_python_runs(monkeypatch):
    monkeypatch.chdir(HERE)
    exec(programs()["np.allclose"], {})


def programs():
    """The README's three Python programs, by a word of each."""
    found = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S)
    assert len(found) == 3 and all(program.count("\n") < 22 for program in found)
    return {word: next(program for program in found if word in program)
            for word in ("np.allclose", "import torch", "import jax")}  # fmt: skip


def test_the_shipped_model_has_all_of_the_structure(shipped):
    w, cfg, _ = shipped
    assert 0 < cfg.first_k_dense_replace < cfg.num_hidden_layers and cfg.q_lora_rank and cfg.rope_scaling
    assert cfg.n_shared_experts and 1 < cfg.topk_group < cfg.n_group and cfg.n_routed_experts >= 16
    assert dsv3.mtp_depth(w, cfg) == 1 and not w.unused
    biases = [w[name] for name in w if name.endswith("e_score_correction_bias")]
    assert all(np.ptp(bias) > 0.01 for bias in biases)  # the balancing has moved them


def test_hugging_face_reads_the_shipped_model_as_we_do(shipped):
    """Its token ids, its logits to 1e-4 in float32, the prompt of its greedy text; weights/vectors/make_parity.py."""
    w, cfg, text = shipped
    theirs = np.load(WEIGHTS / "vectors" / "shipped.npz")
    tokens = text.encode(str(theirs["text"]))
    assert tokens == theirs["tokens"].tolist()
    assert np.abs(dsv3.trace([tokens], w, cfg)["lm_head"] - theirs["lm_head"]).max() < 1e-4
    assert str(theirs["prompt"]) == "Once upon a time"


@pytest.mark.parametrize("chunk", [512, 2])
@pytest.mark.parametrize("speculate", [False, True])
def test_the_frozen_transcript_with_and_without_speculation_whole_and_in_chunks(shipped, monkeypatch, speculate, chunk):
    """The default command's tokens, to the end or 200, as Hugging Face transformers made them."""
    w, cfg, text = shipped
    theirs, stop, stats = np.load(WEIGHTS / "vectors" / "shipped.npz"), dsv3.end_tokens(WEIGHTS), dsv3.Stats()
    monkeypatch.setattr(dsv3, "CHUNK", chunk)
    prompt, greedy = text.encode("Once upon a time"), theirs["greedy"].tolist()
    assert generated([prompt], w, cfg, 200, stop=stop, speculate=speculate, stats=stats) == [greedy]
    assert (stats.accepted > 0.6 * stats.drafted > 0) == speculate
    assert generated([text.encode("Lily"), prompt], w, cfg, 100, stop=stop, speculate=speculate)[1] == greedy[:100]


def test_text_is_never_printed_by_half_characters(shipped):
    w, cfg, text = shipped
    session = dsv3.Session(w, cfg, text, {1}, dsv3.Sampling(), 0, True)
    show, words = session.printer(1), "na\u00efve caf\u00e9 \U0001f600 \u4f60\u597d."
    ids = text.encode(words)
    pieces = [show(0, token, False) for token in [*ids, 1]]
    assert len(ids) > len(words) and "".join(pieces).strip() == words
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_begins_with_one_bos(shipped):
    _, _, text = shipped
    bos = text.special["bos_token"]
    assert text.encode("Tom")[0] == 0 and text.encode("Tom").count(0) == 1
    assert text.encode("") == [0]
    text = dsv3.Text(WEIGHTS)
    text.tokenizer.post_processor = tokenizers.processors.ByteLevel()  # as in releases, whose tokenizer adds none
    assert text.encode("Tom").count(0) == text.encode(bos + "Tom").count(0) == 1
    assert text.encode("Tom", special=False).count(0) == 0


def test_prompts_from_stdin_and_in_batches():
    code, alone, err = cli("-p", "-", "-n", 12, input=b"Once upon a time\n")
    assert code == 0 and STATISTICS.fullmatch(err)
    code, both, _ = cli("-p", "Once upon a time", "-p", "Tom and Lily went", "-n", 12)
    assert code == 0 and both.startswith(alone) and len(both) > len(alone) + 12
    code, default, err = cli("-n", 12, "--no-mtp")
    assert (code, default) == (0, "Once upon a time" + alone) and "--help" in err
    code, out, err = cli("-p", "-", input=b"\xff\xfe")
    assert (code, out) == (2, "") and "UTF-8" in err and err.count("\n") == 1
    code, out, err = cli("-p", b"\xff".decode("utf-8", "surrogateescape"))
    assert (code, out) == (2, "") and "Unicode" in err and err.count("\n") == 1


def test_sampling_on_the_command_line_is_repeatable():
    flags = ["-n", 30, "--temp", 0.9, "--top-p", 0.9, "--top-k", 50]
    first, again, other = (cli(*flags, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} deepseek_v3.py -n 100 2>&1 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=HERE, capture_output=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) == 1 and not done.stderr


def test_an_interrupt_ends_cleanly_with_the_statistics():
    program = subprocess.Popen(invocation("-n", 900), cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.read(20)
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 130 and STATISTICS.fullmatch(err.decode())


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content if m.role == 'user' else ' ' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %} said:{% endif %}"
)


def test_a_chat_carries_the_conversation_in_the_checkpoints_template(tmp_path, monkeypatch, capsys):
    shutil.copytree(WEIGHTS, tmp_path / "w", ignore=shutil.ignore_patterns("vectors"))
    settings = tmp_path / "w" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tom\nLily\n"))
    rendered, render = [], dsv3.Text.render
    monkeypatch.setattr(dsv3.Text, "render", lambda self, m: rendered.append(render(self, m)) or rendered[-1])
    assert dsv3.main(["--weights", str(tmp_path / "w"), "--chat", "-n", "8"]) == 0
    out, err = capsys.readouterr()
    assert len(re.findall(STATISTICS, err)) == 2
    first = out.split("\n")[0]
    assert rendered[1].endswith("Tom said:") and rendered[2].count("said:") == 1
    assert rendered[2].startswith(rendered[1].removesuffix(" said:")) and first.strip() in rendered[2]
    assert "Lily" in rendered[2]
    fresh = dsv3.Text(tmp_path / "w").encode(rendered[2], special=False)
    w, cfg = dsv3.Checkpoint(tmp_path / "w", dsv3.read_config(tmp_path / "w")), dsv3.read_config(tmp_path / "w")
    answer = generated([fresh], w, cfg, 8, stop={1})[0]
    assert dsv3.Text(tmp_path / "w").tokenizer.decode(answer).strip() in out


def test_a_message_writes_no_special_token(tmp_path):
    """The template's are parsed; those that a message spells out are text, and come back as they were."""
    shutil.copytree(WEIGHTS, tmp_path / "w", ignore=shutil.ignore_patterns("vectors"))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "w" / "chat_template.jinja").write_text(template)
    text = dsv3.Text(tmp_path / "w")
    bos, eos = text.special["bos_token"], text.special["eos_token"]
    for content in ("Tom sat.", f"Tom{eos}sat{bos}{eos}", eos, "\U000f0001 \U000f7777", ""):
        ids = text.encode_chat([{"role": "user", "content": content}] * 2)
        assert (ids[0], ids.count(0), ids.count(1), ids[-1]) == (0, 1, 2, 1)
        if "\U000f0001" not in content:
            assert text.tokenizer.decode(ids[1 : ids.index(1)], skip_special_tokens=False) == content
    plain = [{"role": "user", "content": "Tom sat."}]
    assert text.encode_chat(plain) == text.encode(text.render(plain), special=False)


def test_a_message_writes_no_special_token_whose_half_is_one(tmp_path):
    vocab = {"<": 0, "x": 1, ">": 2, "<unk>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "<<x>", "<x>", "§"])  # 4 to 7
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    text = dsv3.Text(tmp_path)
    for _ in range(2):
        assert text.encode("<<x>§") == [5, 7]  # a prompt may hold them
        assert text.encode_chat([{"role": "user", "content": "<<x>"}]) == [4, 0, 0, 1, 2]
        assert text.encode_chat([{"role": "user", "content": "x§"}]) == [4, 1, 3]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
@pytest.mark.parametrize("how, said", [("pipe", "is no file"), ("link", "link out of"), ("directory", "is no file"),
                                       ("long", "too many")])  # fmt: skip
def test_the_files_of_the_text_are_plain_ones(tmp_path, capsys, name, how, said):
    shutil.copytree(WEIGHTS, tmp_path / "w", ignore=shutil.ignore_patterns("vectors"))
    (path := tmp_path / "w" / name).unlink(missing_ok=True)
    if how == "long":  # and sparse
        path.touch()
        os.truncate(path, 10**12)
    else:
        {"pipe": os.mkfifo, "directory": os.mkdir, "link": lambda path: path.symlink_to("/etc/hostname")}[how](path)
    assert dsv3.main(["--weights", str(tmp_path / "w"), "-n", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{name}: " in err and said in err


@pytest.mark.parametrize("template, said", [(None, "no chat template"), ("{{ x.y.z }}", "chat template fails"),
                                            ("{% if %}", "chat template fails"),
                                            ("{{ ''.__class__.__mro__ }}", "chat template fails")])  # fmt: skip
def test_a_template_that_is_missing_broken_or_hostile_is_refused(tmp_path, capsys, template, said):
    shutil.copytree(WEIGHTS, tmp_path / "w", ignore=shutil.ignore_patterns("vectors"))
    settings = tmp_path / "w" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    assert dsv3.main(["--weights", str(tmp_path / "w"), "--chat"]) == 2
    assert said in capsys.readouterr().err


def test_a_malformed_tokenizer_is_refused_in_one_line_and_its_truncation_is_ignored(tmp_path, capsys):
    shutil.copytree(WEIGHTS, tmp_path / "w", ignore=shutil.ignore_patterns("vectors"))
    file = tmp_path / "w" / "tokenizer.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(settings))
    assert len(dsv3.Text(tmp_path / "w").encode("Once upon a time there was a dog")) > 4
    file.write_text('{"model": 1}')
    assert dsv3.main(["--weights", str(tmp_path / "w")]) == 2
    err = capsys.readouterr().err
    assert str(file) in err and err.count("\n") == 1
    shutil.copy(WEIGHTS / "tokenizer.json", file)
    for strange in ('{"x": 1}', '{"content": 5}', "5", '["<s>"]'):
        file.with_name("tokenizer_config.json").write_text(f'{{"bos_token": {strange}}}')
        code = dsv3.main(["--weights", str(tmp_path / "w"), "-n", "1"])
        assert (code, capsys.readouterr().err.count("bos_token")) == ((0, 0) if "x" in strange else (2, 1))


def test_too_little_memory_is_one_line(small, monkeypatch, capsys):
    def all_gone(*_):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(dsv3, "forward", all_gone)
    assert dsv3.main(["--weights", str(small), "--tokens", "1", "-n", "1"]) == 2
    assert "out of memory: Unable to allocate 9 GiB" in capsys.readouterr().err


def test_free_memory_is_the_machines_within_the_containers_limit(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:     8000 kB\n"}

    def read(path):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(dsv3.Path, "read_text", read)
    assert dsv3.free_memory() == 8000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.stat": "anon 1000\nfile 9\n"}
    assert dsv3.free_memory() == 8000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "5000\n"
    assert dsv3.free_memory() == 4000
    files.clear()
    assert dsv3.free_memory() == math.inf


def test_an_unwritable_trace_is_refused_before_the_work_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    (tmp_path / "t.npz").mkdir()
    for path in (tmp_path / "t.npz", tmp_path / "none" / "t.npz", WEIGHTS / "config.json" / "t.npz", os.devnull, ""):
        assert dsv3.main(["--trace", str(path), "-n", "0"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "kept.npz").write_text("as it was")

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    assert dsv3.main(["--trace", str(tmp_path / "kept.npz"), "-n", "0"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.npz", "t.npz"]
    assert (tmp_path / "kept.npz").read_text() == "as it was"


def test_closed_or_full_standard_streams_make_no_traceback():
    for command, said, code in (
        ("-p - <&-", "stdin is closed", 2),
        ("-n 3 > /dev/full", "No space left", 2),
        ("--inspect >&-", "", 0),
        ("-n 3 2>&-", "", 0),
        ("-n 3 2>/dev/full", "", 0),
        ("--temp nan 2>/dev/full", "", 2),
    ):
        command = f"{sys.executable} deepseek_v3.py {command}"
        done = subprocess.run(["bash", "-c", command], cwd=HERE, capture_output=True, timeout=60)
        assert said in done.stderr.decode() and b"Traceback" not in done.stderr
        assert done.returncode == code and b"tok/s" not in done.stdout


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch, capsys):
    """weights/train.py on a tiny model: stopped after a save and started again, it ends with the same bytes."""
    pytest.importorskip("jax")
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(WEIGHTS)
    monkeypatch.setattr(dsv3, "xp", np)  # the trainer sets jax.numpy; this puts NumPy back afterwards
    train = importlib.import_module("train")
    cfg = replace(train.MODEL, vocab_size=300, hidden_size=16, num_hidden_layers=2, intermediate_size=16)
    for name, value in {
        "MODEL": cfg,
        "CYCLES": ((3, 1e-3), (2, 1e-3)),
        "SEQUENCES": 2,
        "LENGTH": 16,
        "SAVE_EVERY": -1,
        "VALIDATE_EVERY": 3,
    }.items():
        monkeypatch.setattr(train, name, value)
    (tmp_path / "text").write_text("Once upon a time there was a cat. It sat.\n<|endoftext|>\n" * 60)
    common = ["--text", str(tmp_path / "text")]
    train.main([*common, "--out", str(tmp_path / "whole")])

    saves, replace_file = itertools.count(1), os.replace

    def stop_after_two_saves(source, target):
        replace_file(source, target)
        if next(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.os, "replace", stop_after_two_saves)
        with pytest.raises(KeyboardInterrupt):
            train.main([*common, "--out", str(tmp_path / "parts")])
    train.main([*common, "--out", str(tmp_path / "parts")])
    assert "going on from step 2" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.is_file())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    monkeypatch.setattr(dsv3, "xp", np)
    loaded = dsv3.Checkpoint(tmp_path / "whole", dsv3.read_config(tmp_path / "whole"))
    assert dsv3.read_config(tmp_path / "whole") == cfg and np.isfinite(loaded["lm_head.weight"]).all()


# ---- Strangers' files and faults -------------------------------------------------------------------------------------
# FUZZ=20000 pytest -k fuzz: what may be said of every file that differs from a sound one by a few edits.

FUZZ = settings(max_examples=int(os.environ.get("FUZZ", "150")))
TINY = replace(SMALL, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=2, num_experts_per_tok=1,
               n_group=1, topk_group=1, n_shared_experts=0, num_nextn_predict_layers=0)  # fmt: skip
VALUE = re.compile(rb'"[^"]*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null|\[[^][{}]*\]|\{[^{}]*\}')
STRANGE = [
    b"-1", b"-0", b"0", b"1", b"2", b"1.5", b"1e3", b"1e999", b"null", b"true", b"false", b'"1"', b'""', b"[]", b"{}",
    b"[1]", b"4294967296", b"9007199254740993", b"18446744073709551616", b"[0,4611686018427387904]", b'"\\u0000"',
    b'"F32"', b'"BF16"', b'"F4"', b'"I64"', b'"U8"', b'"__metadata__"', b'"model.norm.weight"', b'{"a":"b"}', b'".."',
]  # fmt: skip
BROKEN = [
    b"NaN",
    b"-Infinity",
    b"9" * 5000,
    b"[" * 2000,
    b'"\\ud800"',
    b'"\xff"',
    b"\xef\xbb\xbf",
    b"\n",
    b"\0",
    b",",
    b"}",
]


@st.composite
def edited(draw, text):
    """The JSON of a sound file after one or two edits: mostly a value replaced by another, of the file or a strange
    one, or two swapped; else a value dropped or doubled, something inserted, bytes overwritten, the rest cut off."""
    for _ in range(draw(st.integers(1, 2))):
        spans = [span for found in VALUE.finditer(text) for span in inner_spans(found)]
        (a, b), (c, d) = sorted(draw(st.sampled_from(spans or [(0, len(text))])) for _ in range(2))
        kind = draw(
            st.sampled_from(["strange"] * 5 + ["copy"] * 2 + ["swap"] * 4 + ["double", "insert", "bytes", "cut"])
        )
        if kind == "strange":
            text = text[:a] + draw(st.sampled_from(STRANGE)) + text[b:]
        elif kind == "copy":
            text = text[:a] + text[c:d] + text[b:]
        elif kind == "swap" and b <= c:
            text = text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]
        elif kind == "double":
            text = text[:d] + b"," + text[a:d] + text[d:]
        elif kind == "insert":
            text = text[:a] + draw(st.sampled_from(BROKEN)) + text[a:]
        elif kind == "bytes":
            text = text[:a] + draw(st.binary(max_size=4)) + text[min(b, a + 4) :]
        elif kind == "cut":
            text = text[:a]
    return text


def inner_spans(found):
    """The span of a value, and those of the values within it."""
    start, end = found.span()
    inside = VALUE.finditer(found.string, start + 1, end - 1) if found[0][:1] in b"[{" else ()
    return [(start, end), *(span for each in inside for span in inner_spans(each))]


@st.composite
def edited_safetensors(draw, raw):
    """A sound file with an edited header, its length set right or not; or with other bytes, missing ones, or more."""
    n = int.from_bytes(raw[:8], "little")
    length, header, data = raw[:8], raw[8 : 8 + n], raw[8 + n :]
    kind = draw(st.sampled_from(["header", "header", "header", "length", "cut", "data", "more"]))
    if kind == "header":
        header = draw(edited(header))
        length = len(header).to_bytes(8, "little")
    elif kind == "length":
        length = draw(
            st.one_of(st.binary(min_size=8, max_size=8), st.integers(0, 2 * n).map(lambda n: n.to_bytes(8, "little")))
        )
    elif kind == "data":
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(min_size=1, max_size=1)) + data[at + 1 :]
    elif kind == "more":
        data = data + draw(st.binary(max_size=9))
    whole = length + header + data
    return whole[: draw(st.integers(0, len(whole)))] if kind == "cut" else whole


def outcome(read, size):
    """What reading gives, or the one line of the refusal; neither may take long, or much more memory than the files."""
    begun = time.process_time()
    tracemalloc.start()
    try:
        got = read()
    except dsv3.InputError as refusal:
        got = str(refusal)
        assert got.isprintable() and len(got) < 1000, got
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20 + 100 * size and time.process_time() - begun < 10, peak
    return got


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound checkpoint: config.json, index, two shards of FP8, BF16 and F32; beside it a copy, to be "fuzzed"."""
    directory = write_checkpoint(tmp_path_factory.mktemp("sound") / "w", TINY, quantised(make_weights(TINY)), shards=2)
    shutil.copytree(directory, directory.parent / "fuzzed")
    return directory


def strict_header(raw):
    """Whether a header that the library accepts is one that we accept too. Ours is stricter where readers may differ,
    or NumPy has no such array: a tensor named twice; entries with more than the three fields, or in other JSON types
    (the library takes an array for an object, and {"F32": null} for "F32"); over 64 axes, or 2^60 elements, zeros not
    counted."""

    def entry(pairs):
        keys = [key for key, _ in pairs]
        return dict(pairs) if len(set(keys)) == len(keys) else {"twice": True}

    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")], object_pairs_hook=entry)
    header.pop("__metadata__", None)
    return all(
        isinstance(e, dict) and set(e) == {"dtype", "shape", "data_offsets"} and isinstance(e["dtype"], str)
        and len(e["shape"]) <= 64 and math.prod(n or 1 for n in e["shape"]) < 2**60
        for e in header.values()
    )  # fmt: skip


@FUZZ
@given(st.data())
def test_fuzzed_safetensors_are_read_or_refused_as_the_safetensors_library_does(sound, data):
    raw = data.draw(edited_safetensors((sound / "model-00001-of-000002.safetensors").read_bytes()))
    path = sound.parent / "fuzzed.safetensors"
    path.write_bytes(raw)
    ours = outcome(lambda: dsv3.read_safetensors(path), len(raw))
    try:
        theirs = dict(safetensors.deserialize(raw))
    except safetensors.SafetensorError:
        n = int.from_bytes(raw[:8], "little")
        assert isinstance(ours, str) or b"-0" in raw[8 : 8 + n]  # -0, which JSON has and Python reads as 0
        return
    if isinstance(ours, str):
        assert str(path) in ours and not strict_header(raw), ours
        return
    assert ours.keys() == theirs.keys()
    for name, (dtype, stored) in ours.items():
        assert dtype == theirs[name]["dtype"] and stored.tobytes() == bytes(theirs[name]["data"])
        assert dtype not in dsv3.STORED or list(stored.shape) == theirs[name]["shape"]


@pytest.mark.parametrize("dtype", sorted(dsv3.BITS))
def test_every_dtype_has_the_size_that_the_safetensors_library_gives_it(tmp_path, dtype):
    size = dsv3.BITS[dtype]  # bytes of eight elements
    header = json.dumps({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    ((name, entry),) = safetensors.deserialize((tmp_path / "x").read_bytes())
    assert dsv3.read_safetensors(tmp_path / "x")[name][0] == entry["dtype"] == dtype


def tensors_by_the_library(directory):
    """The decoded tensors of a directory of shards, by safetensors and ml_dtypes alone."""
    stored, kinds = {}, {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    for name, shard in json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].items():
        entry = dict(safetensors.deserialize((directory / shard).read_bytes()))[name]
        if entry["dtype"] in kinds:
            stored[name] = np.frombuffer(bytes(entry["data"]), kinds[entry["dtype"]]).reshape(entry["shape"])
    decoded = {name: x.astype(np.float32) for name, x in stored.items()}
    return {name: x * decoded.get(f"{name}_scale_inv", np.float32(1)) for name, x in decoded.items()}  # one block each


@FUZZ
@given(st.data())
def test_fuzzed_checkpoints_load_the_same_tensors_or_are_refused(sound, data):
    files, directory = {path.name: path.read_bytes() for path in sound.iterdir()}, sound.parent / "fuzzed"
    name = data.draw(st.sampled_from(sorted(files)))
    raw = data.draw(edited(files[name]) if name.endswith(".json") else edited_safetensors(files[name]))

    def read():
        w = dsv3.Checkpoint(directory, dsv3.read_config(directory), memory=2**20)
        return {name: np.array(w[name]) for name in w}  # copies: the file is written over below

    try:
        (directory / name).write_bytes(raw)
        with np.errstate(over="ignore", invalid="ignore"):  # FP8's NaN, or scales that are out of proportion
            got = outcome(read, sum(map(len, files.values())))
            expected = tensors_by_the_library(directory) if isinstance(got, dict) else {}
    finally:
        (directory / name).write_bytes(files[name])
    assert isinstance(got, dict) or str(directory) in got
    for each in got if isinstance(got, dict) else ():
        assert got[each].dtype == np.float32 and np.array_equal(got[each], expected[each], equal_nan=True), each


FEW = {"num_hidden_layers": 3, "first_k_dense_replace": 2}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**12, 10**30, 1e-300, 1e300, "1", "yarn", "default", "greedy"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["type", "factor", "rope_theta"]), inner),
    max_leaves=4,
)  # fmt: skip


@FUZZ
@given(st.sampled_from([RELEASE | FEW, RELEASE | V2_LITE | FEW]), st.data())
def test_fuzzed_configurations_are_a_model_or_are_refused(keys, data):
    """Of those accepted, every number is of the type and in the range that the model needs, so that all can be said of
    it that is said without weights: names and shapes, angles, parameters."""
    changed = data.draw(
        st.dictionaries(st.sampled_from([*keys, "rope_parameters", "num_mtp_layers"]), values, min_size=1)
    )
    yarn = data.draw(
        st.dictionaries(st.sampled_from([*RELEASE["rope_scaling"], "attention_factor", "truncate"]), values)
    )
    if yarn:
        changed |= {"rope_scaling": RELEASE["rope_scaling"] | yarn}

    def read():
        cfg = dsv3.parse_config(keys | changed)
        for name, kind in typing.get_type_hints(dsv3.Config).items():
            value = getattr(cfg, name)
            assert isinstance(value, kind) or (kind is float and type(value) is int)
            assert type(value) is not bool or kind is bool
        assert np.isfinite(dsv3.rope_frequencies.__wrapped__(replace(cfg, qk_rope_head_dim=64))).all()
        assert math.isfinite(dsv3.rope_magnitude(cfg)) and dsv3.softmax_scale(cfg) > 0
        if cfg.num_hidden_layers < 100:
            assert "parameters" in dsv3.inspect(cfg)

    outcome(read, 3 * 10**6)


@pytest.mark.parametrize("args, said", [
    (["--tokens", ""], "empty"),
    (["--tokens", "0 " * 1025], "1024 positions"),
    (["-p", "x " * 3000], "1024 positions"),
    (["-n", "1020"], "1024 positions"),
    (["--tokens", "2048"], "0 to 2047"),
    (["--tokens=-1"], "0 to 2047"),
    (["--tokens", "9" * 5000], "integers"),
    (["--temp", "-0.1"], "temperature"),
    (["--temp", "nan"], "temperature"),
    (["--top-p", "0"], "top-p"),
    (["--top-p", "1.01"], "top-p"),
    (["--top-p", "nan"], "top-p"),
    (["-p", b"\xff".decode("utf-8", "surrogateescape")], "lone surrogate"),
    (["-p", "-", b"Tom \xed\xa0\x80"], "not UTF-8"),
    (["--chat", b"\xff"], "no chat template"),
    (["--trace", "none/t.npz"], "none is no directory"),
    (["--weights", "README.md"], "no such directory"),
])  # fmt: skip
def test_the_program_refuses_a_bad_request_in_one_line(args, said):
    """As a user sees it: nothing on stdout, one line on stderr, exit code 2. Bytes are stdin."""
    stdin = args.pop() if isinstance(args[-1], bytes) else b""
    code, out, err = cli(*args, input=stdin)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err and len(err) < 500, err


def test_an_empty_prompt_is_its_bos():
    assert cli("-p", "", "-n", 5)[1] == cli("-p", "-", "-n", 5, input=b"\n")[1] != ""


@pytest.mark.parametrize("signal_name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_loading_or_writing_ends_quietly_and_leaves_nothing(tmp_path, signal_name, code):
    ends = f"(lambda *_, **__: os.kill(os.getpid(), signal.{signal_name}))"
    half = f"import numpy; numpy.savez = lambda file, **_: (file.write(b'half'), file.flush(), {ends}())"
    (tmp_path / "t.npz").write_text("as it was")
    for line in (invocation(before=f"import mmap; mmap.mmap = {ends}"),
                 invocation("--trace", tmp_path / "t.npz", "-n", 0, before=half)):  # fmt: skip
        done = subprocess.run(line, capture_output=True, cwd=HERE, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")
        assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
        assert (tmp_path / "t.npz").read_text() == "as it was"


def test_a_termination_ends_cleanly_with_the_statistics():
    command = [sys.executable, "deepseek_v3.py", "-n", "900", "-p", "x"]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.read(20)
        running.terminate()
        _, err = running.communicate(timeout=60)
    assert running.returncode == 143 and STATISTICS.fullmatch(err.decode())


def test_a_full_disk_leaves_no_half_written_trace(tmp_path):
    (tmp_path / "t.npz").write_text("as it was")
    limited = f"ulimit -f 999; exec {sys.executable} deepseek_v3.py -n 0 -p '{'x ' * 300}' --trace {tmp_path / 't.npz'}"
    done = subprocess.run(["bash", "-c", limited], cwd=HERE, capture_output=True, timeout=60)
    assert done.returncode == 2 and b"cannot be written: File too large" in done.stderr
    assert done.stderr.count(b"\n") == 1 and not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"] and (tmp_path / "t.npz").read_text() == "as it was"


def test_a_terminal_that_is_not_utf8_sees_question_marks():
    flags = ["-n", 60, "--temp", 9, "--seed", 3]
    _, whole, _ = cli(*flags)
    code, out, err = cli(
        *flags, env={"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    )
    assert not whole.isascii() and (code, out) == (0, whole.encode("ascii", "replace").decode())
    assert err.isascii() and " ? new: " in err


def test_neither_home_nor_writable_weights_are_needed(tmp_path):
    shutil.copytree(WEIGHTS, tmp_path / "w", ignore=shutil.ignore_patterns("vectors"))
    for path in (*(tmp_path / "w").iterdir(), tmp_path / "w"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()}
    command = ["env", "-i", sys.executable, str(HERE / "deepseek_v3.py"), "-n", "5", "--weights", str(tmp_path / "w")]
    done = subprocess.run(command, cwd="/", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.decode()) == (0, cli("-n", 5)[1])
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "w").iterdir()} == before
    (tmp_path / "w").chmod(0o755)


def test_weights_replaced_under_the_program_are_read_as_they_were(tmp_path, small):
    shutil.copytree(small, tmp_path / "w")
    command = [sys.executable, "deepseek_v3.py", "--weights", str(tmp_path / "w"), "--tokens", "1 2 3", "-n", "100",
               "--memory", "0", "--dtype", "float64"]  # fmt: skip
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as running:
        begun = running.stdout.read(10)
        write_checkpoint(tmp_path / "other", SMALL, make_weights(SMALL, 1, np.float32))
        os.replace(tmp_path / "other" / "model.safetensors", tmp_path / "w" / "model.safetensors")
        rest, _ = running.communicate(timeout=60)
    flags = ["--tokens", "1 2 3", "-n", "100", "--dtype", "float64", "--weights"]
    assert (0, (begun + rest).decode()) == cli(*flags, small)[:2]
    assert cli(*flags, tmp_path / "w")[1] != (begun + rest).decode()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_activations_of_ten_thousand_overflow_nothing(dtype):
    """The residual stream begins at 1e4; in float32 and float64 every normed activation is some 1e4 too."""
    w = make_weights(SMALL, dtype=np.float32)
    for name in w:
        if name == "model.embed_tokens.weight" or (dtype != np.float16 and name.endswith("norm.weight")):
            w[name] = w[name] * 1e4
    wide = re.compile(r".*mlp\.gate\..*")  # as Checkpoint decodes them
    w = {name: x if wide.fullmatch(name) else x.astype(dtype) for name, x in w.items()}
    named = dsv3.trace([[1, 2, 3, 4], [5]], w, SMALL)
    assert all(np.isfinite(x).all() for x in named.values())
    assert (
        np.abs(named["0/model.embed_tokens"]).max() > 1e4 and np.isfinite(dsv3.forward(np.array([[6]]), w, SMALL)).all()
    )
    assert [len(row) for row in generated([[1], [2, 3]], w, SMALL, 5, dsv3.Sampling(1.0))] == [5, 5]


def test_equal_scores_are_a_mean_and_equal_logits_the_lowest_id():
    rng = np.random.default_rng(0)
    q, k, v = np.zeros((2, 3, 4, 5)), rng.standard_normal((2, 6, 2, 5)), rng.standard_normal((2, 6, 2, 7))
    visible = np.arange(6) <= np.array([[3, 4, 5], [0, 1, 2]])[:, :, None]  # the first query of row 1 sees one key
    for b, t in np.ndindex(2, 3):
        expected = v[b, visible[b, t]].mean(axis=0).repeat(2, axis=0)
        assert_close(dsv3.attention(q, k, v, visible, 1.0)[b, t], expected)
    assert dsv3.distribution(np.zeros(9), dsv3.Sampling()).tolist() == [1] + [0] * 8
    assert_close(dsv3.distribution(np.zeros(9), dsv3.Sampling(0.5)), np.full(9, 1 / 9))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.integers(1, 9))
def test_every_query_sees_a_key_the_padding_too(starts, T):
    visible_BTS = dsv3.positions(starts, T, SMALL, np.float32).visible_BTS
    assert visible_BTS[:, :, 0].all() and visible_BTS.shape == (len(starts), T, max(starts) + T)


def test_the_same_seed_is_the_same_text_in_chunks_of_any_size(monkeypatch):
    w, made = make_weights(SMALL), []
    for chunk in (1, 3, 512):
        monkeypatch.setattr(dsv3, "CHUNK", chunk)
        made.append(generated([[1, 2, 3, 4, 5, 6, 7], [8]], w, SMALL, 30, dsv3.Sampling(1.0, seed=3)))
    assert made[0] == made[1] == made[2]


def test_any_number_of_threads_tells_the_same_story(shipped):
    """The logit of each greedy token is ahead of the next one's by over a hundred times what float32 moves it (8e-3
    beside 2e-5), so the order in which threads add cannot matter. Nor does it for these tokens drawn by a seed."""
    w, cfg, text = shipped
    prompt = text.encode("Once upon a time")
    greedy = np.load(WEIGHTS / "vectors" / "shipped.npz")["greedy"].tolist()
    exact = dsv3.trace([prompt + greedy], dsv3.Checkpoint(WEIGHTS, cfg, np.float64), cfg)["lm_head"][
        len(prompt) - 1 : -1
    ]
    noise = np.abs(dsv3.trace([prompt + greedy], w, cfg)["lm_head"][len(prompt) - 1 : -1] - exact).max()
    best = np.sort(exact, axis=-1)
    margin = (best[:, -1] - best[:, -2]).min()
    print(f"margin {margin:.1e}, float32's noise {noise:.1e}")
    assert exact.argmax(-1).tolist() == greedy and margin > 100 * noise
    for flags in (["-n", 100], ["-n", 60, "--temp", 0.8, "--seed", 5]):
        told = {cli(*flags, env={"OPENBLAS_NUM_THREADS": n, "OMP_NUM_THREADS": n})[1] for n in ("1", "2", "5")}
        assert len(told) == 1


@pytest.mark.long
def test_ten_thousand_tokens_in_flat_memory(shipped):
    """Twenty requests of 500 tokens, sampled with drafts, each on the end of the text before it; the last one is the
    second again and must give the same tokens by as many calls. Once two are through, memory may grow by 1 MB."""
    w, cfg, text = shipped
    first = text.encode("Once upon a time")
    prompts, made, calls, seconds, memory = [first], [], [], [], []
    for n in range(20):
        counted, begun = Counter(), time.process_time()
        if n in (1, 19):
            sys.setprofile(lambda frame, event, _, counted=counted: counted.update([(event, frame.f_code.co_filename)]))
        try:
            made += generated([prompts[n]], w, cfg, 500, dsv3.Sampling(0.8, seed=7))
        finally:
            sys.setprofile(None)
        seconds.append(time.process_time() - begun)
        calls.append(counted["call", dsv3.__file__])
        memory.append(dsv3._number("/proc/self/status", r"VmRSS:\s*(\d+) kB"))
        prompts.append(prompts[1] if n == 18 else first[:1] + made[-1][-200:])
    rates = [1000 / sum(seconds[part]) for part in (slice(2, 4), slice(-3, -1))]
    print(f"{sum(map(len, made))} tokens, {rates[0]:.0f} a CPU second at first and {rates[1]:.0f} at last, "
          f"{memory[1] / 1000:.1f} MB after the first tenth and {memory[-1] / 1000:.1f} MB at the end")  # fmt: skip
    assert sum(map(len, made)) == 10_000 and len(set(map(tuple, made))) == 19
    assert made[-1] == made[1] and calls[-1] == calls[1] > 10_000
    assert memory[-1] - memory[1] <= 1000


# ---- Benchmark -------------------------------------------------------------------------------------------------------
# pytest -m benchmark -s: ratios taken in one run, both sides in turn; no time is asserted.

MID = dsv3.Config(
    vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, q_lora_rank=384, kv_lora_rank=256,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=2048, first_k_dense_replace=1,
    moe_intermediate_size=256, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
    max_position_embeddings=8192, num_nextn_predict_layers=0,
)  # fmt: skip
WIDE = replace(MID, vocab_size=16000, hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, q_lora_rank=1024,
               kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=6144,
               moe_intermediate_size=1024, n_routed_experts=16, n_group=4)  # fmt: skip


def random_weights(cfg):
    rng, w = np.random.default_rng(0), {}
    for name, shape in dsv3.tensor_shapes(cfg).items():
        x = rng.standard_normal(shape, np.float32)
        w[name] = x / np.float32(math.sqrt(shape[1])) if len(shape) == 2 else 1 + x / 10
    return w


def in_turn(*steps, n=15, repeat=1):
    """Seconds (n, steps) of each step, taken in turn after once for warming up: `repeat` times on end, with a pause
    before, since the threads of one side's libraries wait for more work for some time, at the other's cost."""
    seconds = []
    for _ in range(n + 1):
        seconds.append([])
        for step in steps:
            time.sleep(0.2)
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            seconds[-1].append((time.perf_counter() - start) / repeat)
    return np.array(seconds[1:])


def times_faster(seconds):
    """How many times faster the first step is than the second: the median over the turns, whose two sides the machine
    treats alike."""
    return np.median(seconds[:, 1] / seconds[:, 0])


def decoding(w, cfg, context, batch=1):
    """-> a step that decodes one more token of each row, after random ones."""
    cache = dsv3.Cache(batch, context + 256)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (batch, context))
    for t in range(0, context, 512):
        dsv3.forward(tokens[:, t : t + 512], w, cfg, cache, np.full(batch, t))
    return one_more(w, cfg, cache, context)


def one_more(w, cfg, cache, start):
    """-> a step that decodes one more token of each row, the first at position `start`."""
    at, token_B1 = itertools.count(start), np.full((len(cache.tokens), 1), 3)

    def step():
        return dsv3.head(dsv3.forward(token_B1, w, cfg, cache, np.full(len(token_B1), next(at))), w, cfg)

    return step


def touched(cfg):
    """Bytes in float32 of the weights that one token meets, and of a cached position."""
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    sparse = cfg.num_hidden_layers - cfg.first_k_dense_replace
    every = sum(map(math.prod, dsv3.tensor_shapes(cfg).values())) - cfg.vocab_size * cfg.hidden_size
    idle = sparse * (cfg.n_routed_experts - cfg.num_experts_per_tok) * expert
    return 4 * (every - idle), 4 * cfg.num_hidden_layers * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)


@pytest.mark.benchmark
def test_speed_beside_the_machines_limits():
    """`wide`, some 450 M parameters: decoding beside reading as many bytes in matrix-vector products, prefill beside as
    many multiplications in square matrix products."""
    cfg, w, rng = WIDE, random_weights(WIDE), np.random.default_rng(2)
    matrix, vector = rng.standard_normal((16384, 4096), np.float32), rng.standard_normal(4096, np.float32)
    square = rng.standard_normal((2048, 2048), np.float32)
    weights, row = touched(cfg)
    print(f"\n{sum(x.size for x in w.values()) / 1e6:.0f} M parameters, {weights / 1e9:.2f} GB a token")
    for context in (128, 4096):
        seconds = in_turn(decoding(w, cfg, context), lambda: matrix @ vector, repeat=8)
        ours, limit = np.median(seconds, axis=0)
        share = (weights + row * context) / matrix.nbytes * times_faster(seconds)
        print(f"decode, context {context:5}   {1 / ours:6.1f} tok/s   {share:4.0%} of sgemv's "
              f"{matrix.nbytes / limit / 1e9:.0f} GB/s", flush=True)  # fmt: skip
    for T in (512, 4096):
        tokens = rng.integers(0, cfg.vocab_size, (1, T))
        multiplications = T * (weights / 4 - cfg.vocab_size * cfg.hidden_size)
        pair = cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
        multiplications += cfg.num_hidden_layers * pair * T * T / 2

        def prefill(tokens=tokens, T=T):
            cache = dsv3.Cache(1, T)
            for t in range(0, T, dsv3.CHUNK):
                dsv3.forward(tokens[:, t : t + dsv3.CHUNK], w, cfg, cache, np.array([t]))

        seconds = in_turn(prefill, lambda: square @ square, n=3 if T > 512 else 15)
        ours, limit = np.median(seconds, axis=0)
        share = multiplications / 2048**3 * times_faster(seconds)
        print(f"prefill {T:14}   {T / ours:6.0f} tok/s   {share:4.0%} of sgemm's "
              f"{2 * 2048**3 / limit / 1e9:.0f} GFLOP/s", flush=True)  # fmt: skip


@pytest.mark.benchmark
def test_speed_beside_hugging_face_transformers(tmp_path):
    """`mid`, 292 M parameters, and the shipped model, both in float32 with as many threads as there are cores."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count())
    torch.set_grad_enabled(False)
    w = {name: x.astype(ml_dtypes.bfloat16) for name, x in random_weights(MID).items()}
    directory = write_checkpoint(tmp_path / "mid", MID, w)

    def row(label, seconds, tokens):
        ours, theirs = tokens / np.median(seconds, axis=0)
        print(f"{label:32} {ours:8.1f} tok/s   HF {theirs:8.1f}   {times_faster(seconds):5.2f}x", flush=True)

    def load(path):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def hf_decoding(model, context, batch=1):
        tokens = torch.from_numpy(np.random.default_rng(1).integers(0, model.config.vocab_size, (batch, context)))
        out = model(tokens, use_cache=True, logits_to_keep=1)

        def step():
            model(tokens[:, :1], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)

        return step

    print()
    first = np.array([[1, 2, 3, 4]])

    def ours_loaded():
        w = dsv3.Checkpoint(directory, MID)
        dsv3.head(dsv3.forward(first, w, MID, dsv3.Cache(1)), w, MID)

    seconds = in_turn(ours_loaded, lambda: load(directory)(torch.from_numpy(first)), n=5)
    ours, theirs = np.median(seconds, axis=0)
    print(f"{'load to first token, warm':32} {ours:8.2f} s       HF {theirs:8.2f} s {times_faster(seconds):7.2f}x")
    w, model = dsv3.Checkpoint(directory, MID), load(directory)
    for name in w:
        w[name]  # decoded beforehand, as HF has
    for context, batch, repeat in ((128, 1, 8), (128, 8, 8), (4096, 1, 1)):
        pair = in_turn(decoding(w, MID, context, batch), hf_decoding(model, context, batch), repeat=repeat)
        row(f"decode, context {context}, batch {batch}", pair, batch)
    for T, n in ((512, 15), (4096, 2)):
        tokens = np.random.default_rng(3).integers(0, MID.vocab_size, (1, T))

        def prefill(tokens=tokens, T=T):
            cache = dsv3.Cache(1, T)
            for t in range(0, T, dsv3.CHUNK):
                h = dsv3.forward(tokens[:, t : t + dsv3.CHUNK], w, MID, cache, np.array([t]))
            dsv3.head(h[:, -1:], w, MID)

        theirs = torch.from_numpy(tokens)
        pair = in_turn(prefill, lambda: model(theirs, use_cache=True, logits_to_keep=1), n=n)
        row(f"prefill {T}", pair, T)
    cfg = dsv3.read_config(WEIGHTS)
    w, model = dsv3.Checkpoint(WEIGHTS, cfg), load(WEIGHTS)
    pair = in_turn(decoding(w, cfg, 64), hf_decoding(model, 64), repeat=40)
    row("shipped weights, decode", pair, 1)


PEAK_OF_OURS = """
import numpy as np, deepseek_v3 as dsv3
cfg = dsv3.read_config({directory!r})
w, cache = dsv3.Checkpoint({directory!r}, cfg), dsv3.Cache(1, 4097)
tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 4097))
for t in range(0, 4097, dsv3.CHUNK):
    h = dsv3.forward(tokens[:, t : t + dsv3.CHUNK], w, cfg, cache, np.array([t]))
dsv3.head(h[:, -1:], w, cfg)
print(dsv3._peak_memory(), sum(w[name].nbytes for name in w), cache.nbytes)
"""
PEAK_OF_HF = """
import numpy as np, torch, transformers, deepseek_v3 as dsv3
torch.set_grad_enabled(False)
model = transformers.AutoModelForCausalLM.from_pretrained({directory!r}, dtype=torch.float32).eval()
tokens = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 4097)))
out = model(tokens[:, :4096], use_cache=True, logits_to_keep=1)
model(tokens[:, 4096:], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
print(dsv3._peak_memory())
"""


def printed(program, **given):
    """The numbers that a Python program prints."""
    command = [sys.executable, "-c", program.format(**given)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [float(x) for x in done.stdout.split()]


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["mid", "wide"])
def test_memory_at_4096_tokens(name, tmp_path):
    """The peak of a process that reads the checkpoint, takes in 4,096 tokens and decodes one more."""
    cfg = {"mid": MID, "wide": WIDE}[name]
    w = {name: x.astype(ml_dtypes.bfloat16) for name, x in random_weights(cfg).items()}
    directory = str(write_checkpoint(tmp_path / name, cfg, w))
    del w
    peak, weights, cache = printed(PEAK_OF_OURS, directory=directory)
    print(f"\n{name}: peak {peak / 1e9:.2f} GB, {peak / (weights + cache):.2f}x its weights in float32 "
          f"({weights / 1e9:.2f}) and cache ({cache / 1e9:.2f})")  # fmt: skip
    if name == "mid" and importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        (theirs,) = printed(PEAK_OF_HF, directory=directory)
        print(f"{name}: HF {theirs / 1e9:.2f} GB, {theirs / peak:.2f}x ours")


def test_the_memory_of_a_prompt_grows_with_its_length_not_with_its_square():
    """In chunks, and within a chunk: half of one layer's scores would be more than all that is ever held."""
    w, scores = random_weights(SMALL), 4 * SMALL.num_attention_heads * 2048**2
    assert prefill_memory(w, SMALL, 2048, chunk=512) < 2.1 * prefill_memory(w, SMALL, 1024, chunk=512)
    assert prefill_memory(w, SMALL, 2048, chunk=2048) < scores / 2


@pytest.mark.benchmark
@pytest.mark.parametrize("name, T", [("mid", 4096), ("mid", 1), ("wide", 1), ("shipped", 1)])
def test_where_the_time_goes(name, T, shipped, monkeypatch):
    """The share of each function of sections 3 to 6 in taking in a prompt or decoding a token, without what it calls:
    `product` is BLAS on all cores (but for the second product of `attention`), the others run on one."""
    cfg = replace({"mid": MID, "wide": WIDE, "shipped": shipped[1]}[name], num_nextn_predict_layers=0)
    w, spent, inner = shipped[0] if name == "shipped" else random_weights(cfg), Counter(), [0.0]

    def timed(key, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            inner.append(0.0)
            result = function(*args, **kwargs)
            took = time.perf_counter() - start
            spent[key] += took - inner.pop()
            inner[-1] += took
            return result

        return call

    step = decoding(w, cfg, 128) if T == 1 else partial(decoding, w, cfg, T)
    lines = Path(dsv3.__file__).read_text("utf-8").split("# ---- ")
    names = re.findall(r"^def (\w+)", "".join(part for part in lines if part[:1] in "3456"), re.M)
    for key in names:
        monkeypatch.setattr(dsv3, key, timed(key, getattr(dsv3, key)))
    for warm in (True, False):
        for _ in range(20 if T == 1 else 1):
            step()
        if warm:
            spent.clear()
    whole = sum(spent.values())
    shares = [f"{key} {time / whole:.0%}" for key, time in spent.most_common(7)]
    print(f"\n{name}, {f'prompt of {T}' if T > 1 else 'decoding'}: {', '.join(shares)}")


@pytest.mark.benchmark
def test_growth():
    """Decoding against the context and against the experts there are; memory of a prompt against its length."""
    cfg = replace(MID, num_hidden_layers=4, vocab_size=2000, max_position_embeddings=2**16)
    w, contexts = random_weights(cfg), [2**n for n in range(7, 16)]
    steps = [one_more(w, cfg, full_cache(cfg, S), S) for S in contexts]
    ms = np.median(in_turn(*steps, repeat=4), axis=0) * 1e3
    slope, base = np.polyfit(contexts, ms, 1)
    print(f"\ndecoding, 4 layers: {base:.2f} ms + {slope * 1e3:.3f} ms for each 1,000 positions, "
          f"{touched(cfg)[1] / slope / 1e6:.1f} GB/s of cache")  # fmt: skip
    for S, measured in zip(contexts, ms, strict=True):
        print(f"  context {S:6}: {measured:6.2f} ms, on the line {base + slope * S:6.2f}")
    models = [replace(cfg, n_routed_experts=E) for E in (8, 32, 128)]
    ms = np.median(in_turn(*[decoding(random_weights(c), c, 128) for c in models], repeat=8), axis=0) * 1e3
    for c, measured in zip(models, ms, strict=True):
        print(
            f"  {c.n_routed_experts:3} experts, 4 activated: {measured:6.2f} ms, {touched(c)[0] / 1e6:.0f} MB touched"
        )
    for T in (1024, 2048, 4096, 8192):
        print(f"  prompt of {T:5} tokens: {prefill_memory(w, cfg, T) / 1e6:6.1f} MB beside the weights")


def full_cache(cfg, context):
    """A cache with random latents for `context` positions and room for more."""
    cache, rng = dsv3.Cache(1), np.random.default_rng(0)
    row = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    for layer in range(cfg.num_hidden_layers):
        cache.layers[layer] = rng.standard_normal((1, context + 256, row), np.float32)
    return cache


def prefill_memory(w, cfg, T, chunk=dsv3.CHUNK):
    """Bytes, at most, that NumPy holds for taking in T tokens, the cache included."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, T))
    tracemalloc.start()
    cache = dsv3.Cache(1, T)
    for t in range(0, T, chunk):
        dsv3.forward(tokens[:, t : t + chunk], w, cfg, cache, np.array([t]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.benchmark
def test_starting_up():
    """The whole command, up to the first token, beside the imports that it cannot do without."""
    steps = [["deepseek_v3.py", "--prompt", "Once upon a time", "-n", "1"], ["-c", "import numpy, tokenizers"]]
    run = [partial(subprocess.run, [sys.executable, *step], cwd=HERE, capture_output=True) for step in steps]
    seconds = in_turn(*run)
    ours, imports = np.median(seconds, axis=0)
    print(
        f"\nfirst token after {ours:.2f} s; import numpy, tokenizers {imports:.2f} s: {1 / times_faster(seconds):.2f}x"
    )


@pytest.mark.benchmark
def test_speed_of_speculation(shipped):
    """Tokens a second with the MTP module against without, on the shipped weights, at the acceptance there is."""
    w, cfg, text = shipped
    prompts = [text.encode(start) for start in ("Once upon a time", "Tom had a red ball.", "The cat was sad because")]
    stats = dsv3.Stats()

    def tell(speculate):
        for prompt in prompts:
            generated([prompt], w, cfg, 120, speculate=speculate, stats=stats)

    seconds = in_turn(lambda: tell(True), lambda: tell(False))
    made = sum(len(generated([prompt], w, cfg, 120)[0]) for prompt in prompts)
    with_mtp, plain = made / np.median(seconds, axis=0)
    print(f"\nplain {plain:.0f} tok/s, with MTP {with_mtp:.0f} tok/s: {times_faster(seconds):.2f}x, "
          f"{stats.accepted / stats.drafted:.0%} of the drafts accepted")  # fmt: skip


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["shipped", "mid", "wide"])
def test_what_a_round_of_speculation_costs(name, shipped):
    """The main model on a token and its draft, and the MTP module on two pairs, beside a token decoded plainly."""
    cfg = replace({"shipped": shipped[1], "mid": MID, "wide": WIDE}[name], num_nextn_predict_layers=1)
    w, rng, at, cache = random_weights(cfg), np.random.default_rng(0), itertools.count(128), dsv3.Cache(1, 256)

    def take_in(token_BT, start):
        h = dsv3.forward(token_BT, w, cfg, cache, start)
        dsv3.head(h, w, cfg)
        dsv3.head(dsv3.mtp(1, h, token_BT, w, cfg, cache, start)[:, -1:], w, cfg)

    take_in(rng.integers(0, cfg.vocab_size, (1, 128)), np.array([0]))
    seconds = in_turn(
        decoding(w, cfg, 128), lambda: take_in(rng.integers(0, cfg.vocab_size, (1, 2)), np.array([next(at)])), repeat=8
    )
    cost = times_faster(seconds)
    print(f"\n{name}: a round costs {cost:.2f} tokens: it pays if {cost - 1:.0%} of the drafts are accepted")
