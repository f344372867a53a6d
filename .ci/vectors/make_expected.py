"""Make index.json and expected.safetensors: the cases of the conformance kit, and what they must give.

    pip install numpy safetensors torch==2.13.0 transformers==5.23.0 mpmath
    python make_expected.py              # half a minute on one core
    python make_expected.py --shipped    # only the cases of the checkpoint in the directory above, when it changed

The judge is independent: nothing here imports the file under test. Hugging Face's model computes every operation in
float64, also those that its code asks to run in float32, so that another float64 implementation must agree to
rounding. What it leaves open or does not have stands here in plain Python: `stable_topk`, `verified`, `make_losses`,
`make_phases`, `make_update_bias`. The weights are those that a reader of the checkpoint gets: rounded, or quantised and
read back, both checked against torch.

cases.py says what index.json holds, and writes the checkpoints. The arrays of a trace are named by the module of the
checkpoint that puts them out. Most cases have those of the last layer, the first routing, and what comes after the
layers; of the MTP modules too, except for the rotated queries and keys, as a pair's position may be counted from 0 or
from 1. The modules are run by HF's own MtpModel, which hands the state after `.shared_head.norm` on to the next.

No choice of a case is a near tie, unless it is about ties: no expert and no token hangs on the last digits.
"""

import contextlib
import copy
import functools
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import mpmath
import numpy as np
import safetensors.torch
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, modeling_deepseek_v3

HERE = Path(__file__).resolve().parents[2] / "weights" / "vectors"
sys.path.insert(0, str(HERE))
from cases import unrounded, write  # noqa: E402

INDEX, EXPECTED, SHIPPED = HERE / "index.json", HERE / "expected.safetensors", HERE.parent
ROUTING_GAP, TOKEN_GAP = 1e-4, 1e-3  # by which the chosen stand out at least
SHIPPED_ROUTING_GAP = 4e-7  # trained affinities lie closer; float32 still tells them apart
UNSEEN = 1e-5  # and in its outputs, all that is compared, a smaller share of the gates is not seen
HALF_GAP = 2e-5
HF = f"Hugging Face transformers {transformers.__version__}"

# ---- The cases -----------------------------------------------------------------------------------------------------

TOLERANCE = {"8": 1e-9, "4": 2e-4, "2": 5e-2}  # HF's own float32 stays within 6e-5
TOKENS = {"8": 0, "4": 0}  # equal; half precision may well choose others


def yarn(key="type", factor=40.0, original=4096, **changes):
    return {key: "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0} | changes  # fmt: skip


RELEASED = dict(
    model_type="deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, vocab_size=129280,
    hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, attention_bias=False,
    intermediate_size=18432, first_k_dense_replace=3, moe_intermediate_size=2048, n_shared_experts=1,
    n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, norm_topk_prob=True,
    routed_scaling_factor=2.5, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=yarn(),
    max_position_embeddings=163840, tie_word_embeddings=False, num_nextn_predict_layers=1,
)  # fmt: skip
BASE = RELEASED | dict(
    vocab_size=48, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=14,
    kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, intermediate_size=40,
    first_k_dense_replace=1, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
    topk_group=2, num_nextn_predict_layers=0,
)  # fmt: skip
BIGGER = dict(n_routed_experts=16, num_experts_per_tok=4)
V3_YARN = BIGGER | dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)
ONE_GROUP = dict(n_group=1, topk_group=1, rope_theta=5e4)
MOONLIGHT = ONE_GROUP | dict(q_lora_rank=None, n_shared_experts=2, rms_norm_eps=1e-5, rope_scaling=None)
CROSSING = dict(qk_rope_head_dim=16, rope_theta=100.0, rope_scaling=yarn("type", 4.0, 24), max_position_embeddings=96)
MTP = dict(num_nextn_predict_layers=1)
SMALL_VOCAB = MTP | dict(vocab_size=6)  # some drafts are right by chance
ONE_LAYER = dict(num_hidden_layers=1, first_k_dense_replace=0)
SEVERAL_BLOCKS = dict(  # of 128 x 128, the last ones cropped; 138 rows of kv_a_proj_with_mqa, as the release's 576
    hidden_size=160, kv_lora_rank=130, intermediate_size=200,
    quantization_config=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]),
)  # fmt: skip

LAST = r"model\.layers\.\d+(\.self_attn|\.shared_head)?|model\.norm|lm_head"
ROTATED = r"model\.layers\.1\.self_attn\.[qk]_rope"
CASES = {}


def add(name, equation, why, *see, config=None, lengths=(14,), seed=0, spelling=None, **entry):
    """A case: its entry for index.json. The seed draws the prompts; where it leads to a near tie, take another."""
    config = BASE | (config or {})
    rng = np.random.default_rng(seed)
    prompts = entry.pop("prompts", [rng.integers(0, config["vocab_size"], n).tolist() for n in lengths])
    if spelling == 5:
        ours = "model_type", "scoring_func", "topk_method", "moe_layer_freq"
        keys = {key: x for key, x in config.items() if key not in ours}
        config = json.loads(DeepseekV3Config(**copy.deepcopy(keys)).to_json_string())
    dtype = {"F16": "float16", "F64": "float64", "BF16": "bfloat16", "F8_E4M3": "bfloat16"}
    key = "dtype" if spelling == 5 else "torch_dtype"
    config[key] = dtype.get(entry.get("stored", {}).get("dtype"), "float32")
    do = entry.pop("do", "trace")
    given = {"config": config} if do not in ("update_bias", "dequantize") else {}
    if do in ("trace", "generate", "losses"):
        given |= {"weights": entry.pop("weights", {}), "prompts": prompts}
    tolerance = TOKENS if do == "generate" else TOLERANCE
    CASES[name] = {"do": do, "equation": equation, "why": why, "see": list(see), "origin": f"{HF}, in float64",
                   **given, "tolerance": tolerance, **entry}  # fmt: skip


add("v3_yarn", "(1)-(16), 4.3",
    "The release's structure, every array: where does a port leave the path first? YaRN is static: 14 tokens, and it "
    "is on.",
    "deepseek-ai/DeepSeek-V3#305", "deepseek-ai/DeepSeek-V3#658", "pytorch/torchtitan#4117",
    config=V3_YARN, keep=".*")  # fmt: skip
add("one_token", "(1)-(16)",
    "At position 0 neither rotation nor softmax scale can be seen: what passes here and fails v3_yarn has its mistake "
    "there.",
    "onnxruntime/mobius#548", lengths=[1])  # fmt: skip
add("long", "(10)", "A softmax over 199 keys, then 200 in the absorbed form: tiles of keys that are averaged differ.",
    config=V3_YARN, lengths=[200], seed=10, chunks=[199, 1], keep="lm_head",
    tolerance={"8": 1e-9, "4": 2e-4})  # fmt: skip
add("chunks", "(1), (3), (10)",
    "Tokens enter the cache in chunks: positions go on, and a chunk sees all before it; then one token at a time, "
    "where absorbing is cheaper.",
    "ggml-org/llama.cpp#12801", config=BIGGER, chunks=[5, 1, 4, 1, 3])  # fmt: skip
add("chunks_of_three", "(10)",
    "A chunk's mask begins behind what the cache holds: query t of the chunk sees all of that, and t + 1 keys more.",
    "huggingface/candle#3743", "deepseek-ai/DeepSeek-V3#1536",
    config=V3_YARN, seed=1, chunks=[3, 3, 3, 3, 2], keep=LAST)  # fmt: skip
add("absorbed", "(1)-(5), (10), (11)",
    "Every token in a chunk of its own: the absorbed form throughout, W_UK on the query's side, W_UV behind the sum; "
    "in the end more keys than an entry has numbers.",
    "ml-explore/mlx-lm#1509", "lablup/mlxcel#907",
    config=V3_YARN, lengths=[24], seed=2, chunks=[1] * 24, keep=LAST)  # fmt: skip
add("absorbed_moonlight", "(9), (10)",
    "The absorbed form where queries are not compressed and RoPE is plain.",
    "ml-explore/mlx-lm#1509", config=MOONLIGHT, seed=3, chunks=[1] * 14, keep=LAST)  # fmt: skip
add("ragged", "(10)", "Prompts of unequal length: each gives what it gives alone.",
    config=BIGGER, lengths=[14, 5, 1])  # fmt: skip
add("ragged_chunks", "(10)",
    "The same in chunks of four: a row ends within a chunk, or before it, and in a batch padding enters no cache.",
    config=BIGGER, lengths=[10, 4, 1], seed=1, chunks=[4, 4, 2], keep=LAST)  # fmt: skip
add("hf5_spelling", "4.3",
    "config.json as transformers 5 writes it: rope_parameters, which hold rope_theta too, and dtype.",
    spelling=5,
    config=dict(rope_theta=25e3, rope_scaling=yarn("rope_type", 8.0, beta_fast=128.0, beta_slow=8.0,
                                                   mscale=0.5, mscale_all_dim=0.5)))  # fmt: skip
add("mscale_707", "4.3", "mscale^2 in the softmax scale, V2's 0.707, beyond the original context.",
    "huggingface/transformers#47435", "onnxruntime/mobius#548",
    config=dict(rope_scaling=yarn("type", 4.0, 8, mscale=0.707, mscale_all_dim=0.707)))  # fmt: skip
add("yarn_range", "4.3", "The ramp's upper end is held at R - 1, not at the last pair.",
    "ggml-org/llama.cpp#7416", config=dict(rope_theta=100.0))  # fmt: skip
add("yarn_crossing", "4.3",
    "A prompt of 40 tokens where the original context is 24: frequencies and softmax scale are the same before and "
    "after.",
    "pytorch/torchtitan#4117", config=CROSSING, lengths=[40], chunks=[20, 20], keep=rf"{LAST}|{ROTATED}")  # fmt: skip
add("far_out", "4.3",
    "A prompt that begins at position 163,000: angles in float32 are seen in the layers.",
    "sgl-project/sglang-jax#1473", lengths=[6], start=163000,
    keep=LAST + r"|model\.layers\.0\.self_attn\.[qk]_rope")  # fmt: skip
PHASES = dict(do="phases", origin="the equations, with 50 digits", tolerance={"8": 1e-9, "4": 1e-6, "2": 2e-3})
add("phases", "4.3",
    "cos and sin of the release at far positions: an angle in float32 is off by 5e-3 rad at 163,839.",
    "sgl-project/sglang-jax#1473", "Modalities/modalities#462",
    config=RELEASED, positions=[0, 1, 4095, 163839], **PHASES)  # fmt: skip
add("moonlight", "(9)", "Queries without compression, no groups, plain RoPE, eps 1e-5, two shared experts.",
    "huggingface/transformers#44346", config=MOONLIGHT, spelling=5,
    weights={"scale": {"kv_a_proj_with_mqa.weight": 0.01}})  # fmt: skip
add("latent_eps", "4.2", "The norms on the latents have eps 1e-6 though rms_norm_eps is 1e-5.",
    "huggingface/transformers#44346", "vllm-project/vllm#35515", config=dict(rms_norm_eps=1e-5),
    weights={"scale": {"kv_a_proj_with_mqa.weight": 0.01, "q_a_proj.weight": 0.01}})  # fmt: skip
add("eps", "4.2, (21)",
    "All other norms, on activations as small as the root of rms_norm_eps: eps is the config's, and added within the "
    "root.",
    "apache/tvm#15856", "tile-ai/tilelang#1243", "PaddlePaddle/FastDeploy#2797",
    config=MTP | dict(rms_norm_eps=1e-5), depth=1,
    weights={"scale": {"embed_tokens.weight": 2e-3, "o_proj.weight": 2e-3, "down_proj.weight": 2e-3,
                       "model.norm.weight": 2e-3, "eh_proj.weight": 2e-3}})  # fmt: skip
HALF = dict(dtype="float16", stored={"dtype": "F16"}, origin=f"{HF}, in float16", tolerance={"4": 1e-5, "2": 1e-5})
add("half", "4.2, (15)",
    "In float16 the normalised x is rounded before it meets the weight, and the router computes in float32.",
    "vllm-project/vllm#14027", "vllm-project/vllm#23640", config=ONE_LAYER, lengths=[8], **HALF,
    weights={"scale": {"o_proj.weight": 0.0, "e_score_correction_bias": 0.0}})  # fmt: skip
add("half_router", "(15)",
    "The same where a router in half precision takes other experts: the best affinities are closer to 1 than it can "
    "tell.",
    "vllm-project/vllm#14027", "vllm-project/vllm-ascend#9617",
    config=ONE_LAYER, prompts=[[14, 22, 23, 29, 33, 44]], **HALF,
    weights={"scale": {"o_proj.weight": 0.0, "e_score_correction_bias": 0.0, "mlp.gate.weight": 14.0}})  # fmt: skip
add("negative_bias", "(16)", "Experts outside the chosen groups masked with 0 win when all biases are negative.",
    "deepseek-ai/DeepSeek-V3#741", "vllm-project/vllm#13474", "huggingface/transformers#45441",
    weights={"shift": {"e_score_correction_bias": -5.0}})  # fmt: skip
add("group_scores", "2.1.2",
    "A group's score is the sum of its two best biased affinities: not its best, not all, not unbiased.",
    "vllm-project/vllm#13474", config=BIGGER,
    weights={"scale": {"e_score_correction_bias": 4.0}})  # fmt: skip
add("tiny_affinities", "(13)",
    "Affinities of 1e-7 beside biases of 12: taken as biased minus bias, or normalised with a large guard, they are "
    "lost.",
    "flashinfer-ai/flashinfer#3875", "vllm-project/vllm#12002", config=dict(num_experts_per_tok=2), seed=6,
    weights={"scale": {"mlp.gate.weight": 20.0},
             "set": {"e_score_correction_bias": [12.0, 0, 0, 0, 0, 13.0, 0, 0]}})  # fmt: skip
STABLE = f"{HF}, in float64, its topk replaced by a stable one"
add("ties_experts", "(16)", "Among equal experts the lowest index wins.",
    "vllm-project/vllm#52679", "vllm-project/vllm#55514", config=dict(n_group=1, topk_group=1), origin=STABLE,
    weights={"scale": {"mlp.gate.weight": 0.0}, "set": {"e_score_correction_bias": [0, 1, 0, 1, 1, 0, 1, 0]}},
)  # fmt: skip
add("ties_groups", "2.1.2", "Among equal groups the lowest index wins.", "vllm-project/vllm#55514", origin=STABLE,
    weights={"scale": {"mlp.gate.weight": 0.0},
             "set": {"e_score_correction_bias": [0.25, 0, 0.5, 0, 0.125, 0.125, 0, 0.25]}})  # fmt: skip
add("many_groups", "2.1.2", "8 groups of which 3, plain RoPE.", "vllm-project/vllm#13474",
    config=BIGGER | dict(n_group=8, topk_group=3, num_hidden_layers=3, first_k_dense_replace=2, rope_scaling=None),
)  # fmt: skip
add("k2_like", "(13)-(16)", "Kimi-K2: one group, scaling 2.827, YaRN of 32.", "NVIDIA/TensorRT-Model-Connect#669",
    config=BIGGER | ONE_GROUP | dict(model_type="kimi_k2", routed_scaling_factor=2.827, rope_scaling=yarn(factor=32.0)),
)  # fmt: skip
add("mtp", "(21)-(23)",
    "[embedding ; state] for the released weights, the state after model.norm, no embedding masked, shared_head.norm "
    "of its own.",
    "NVIDIA/Megatron-LM#1588", "deepseek-ai/DeepSeek-V3#839", "vllm-project/vllm#33299", "ROCm/ATOM#643",
    config=MTP, depth=1)  # fmt: skip
add("mtp_depth_2", "(21)-(23)", "Module 2 takes the state of module 1 after its shared_head.norm.",
    "ROCm/ATOM#1764", "vllm-project/vllm#47448", config=dict(num_nextn_predict_layers=2), depth=2)  # fmt: skip
add("mtp_chunks", "(22)",
    "Each of two modules has a latent cache of its own, and the pairs that span two chunks are in it.",
    "vllm-project/vllm#15153", config=dict(num_nextn_predict_layers=2), seed=8, depth=2,
    chunks=[4, 1, 5, 1, 3], keep=rf"{LAST}|.*\.eh_proj")  # fmt: skip
add("losses", "(17)-(20), (24), (25)",
    "As printed: f_i counts the plain top K_r; eq. (24) divides T - k terms by T; lambda / D; L_Bal is summed over "
    "layers.",
    "deepseek-ai/DeepSeek-V3#928", do="losses", lengths=[10, 10], mtp_weight=0.3, balance_weight=0.1,
    config=dict(num_hidden_layers=3, num_nextn_predict_layers=2),
    origin=f"the equations in plain Python, from the logits and affinities of {HF} in float64")  # fmt: skip

add("update_bias", "2.1.2", "sign(0) = 0, not centred, underloaded goes up.", "deepseek-ai/DeepSeek-V3#761",
    do="update_bias", gamma=0.25, origin="plain Python")  # fmt: skip
add("update_bias_counts", "2.1.2",
    "Loads of about 40,000, as a batch has, whose mean is no integer: an integer mean, or loads in half precision, "
    "move other biases.",
    "NVIDIA/Megatron-LM#7081", do="update_bias", gamma=0.25, origin="plain Python")  # fmt: skip
add("fp8", "3.3",
    "weight_scale_inv multiplies; blocks of 128 x 128, the last ones cropped; 0x7f and 0xff are NaN.",
    "tenstorrent/tt-metal#38127", do="dequantize", tolerance={"4": 0},
    origin=f"torch {torch.__version__}'s float8_e4m3fn, times the scale in float32")  # fmt: skip

add("bf16", "checkpoint", "BF16 is the upper half of a float32; the routing bias beside it is F32.",
    "safetensors/safetensors#598", "tinygrad/tinygrad#2453",
    lengths=[6], keep=LAST, stored={"dtype": "BF16"})  # fmt: skip
add("f16", "checkpoint",
    "F16, with shards and an index: each tensor from the file that the index names, whatever the shards before and "
    "after hold; numbers too small for F16's exponents (subnormal) are numbers.",
    lengths=[6], keep=LAST, weights={"scale": {"o_proj.weight": 2.0**-14}},
    stored={"dtype": "F16", "shards": 3,
            "stale": ["model.embed_tokens.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"]})  # fmt: skip
add("f64", "checkpoint", "F64: read as it is, not by way of float32.",
    lengths=[6], keep=LAST, stored={"dtype": "F64"})  # fmt: skip
add("fp8_checkpoint", "3.3",
    "The release's layout: F8_E4M3 matrices with a scale for each block of 128 x 128, the last ones cropped, some in "
    "another shard than their matrix; embedding, head, norms and gates BF16; the MTP layer's copies of embedding and "
    "head.",
    "deepseek-ai/DeepSeek-V3#2", "huggingface/transformers#36026", "vllm-project/vllm#21874",
    config=SEVERAL_BLOCKS | MTP, lengths=[6], depth=1, keep=LAST,
    stored={"dtype": "F8_E4M3", "shards": 4, "split_scales": True, "copies": True})  # fmt: skip
add("ue8m0_checkpoint", "3.3",
    "V3.1's scales, powers of two, still stored as F32 and multiplied; the last token in the absorbed form.",
    "huggingface/transformers#46763", "deepseek-ai/DeepSeek-V3#961", config=SEVERAL_BLOCKS, lengths=[6],
    chunks=[5, 1], keep=LAST, stored={"dtype": "F8_E4M3", "scales": "ue8m0"})  # fmt: skip

add("bf16_scales", "3.3", "FP8 scales that are stored as BF16.",
    config=SEVERAL_BLOCKS | ONE_LAYER, lengths=[4], keep=LAST,
    stored={"dtype": "F8_E4M3", "scales": "bf16"})  # fmt: skip

GENERATE = dict(do="generate", speculate=False)
SPECULATE = dict(do="generate", speculate=True)
add("generate", "(1)-(16)",
    "Greedy tokens from the latent cache are those that the whole sequence gives each time. The sixth is config.json's "
    "eos_token_id: the request names no end token, so it ends nothing.",
    "lablup/mlxcel#998", config=V3_YARN | dict(eos_token_id=33), max_tokens=24, **GENERATE)  # fmt: skip
add("generate_moonlight", "(9)", "The same where queries are not compressed and there are no groups.",
    config=MOONLIGHT, max_tokens=16, **GENERATE)  # fmt: skip
add("generate_ragged", "(10)", "Prompts of unequal length: each as if alone.",
    config=BIGGER, lengths=[9, 4, 1], max_tokens=16, **GENERATE)  # fmt: skip
add("generate_yarn", "4.3", "Generation that crosses the original context, 24: what the cache holds stays right.",
    "pytorch/torchtitan#4117", config=CROSSING, lengths=[16], max_tokens=24, **GENERATE)  # fmt: skip
add("generate_ties", "sampling", "All logits are equal: the lowest id.", lengths=[3], max_tokens=4,
    weights={"scale": {"lm_head.weight": 0.0}}, **GENERATE)  # fmt: skip
add("generate_mtp", "2.2", "Drafts change no token. Nearly all of these are wrong, so cached entries are overwritten.",
    "vllm-project/vllm#47087", config=MTP, max_tokens=24, **SPECULATE)  # fmt: skip
add("generate_mtp_small_vocab", "2.2",
    "Some drafts are right, by chance: then a pass makes two tokens, and the module sees both pairs.",
    "NVIDIA/TensorRT-LLM#5285", "vllm-project/vllm#14649",
    config=SMALL_VOCAB, seed=14, max_tokens=24, **SPECULATE)  # fmt: skip
add("generate_end", "2.2",
    "An end token is the last of what is made: one of the main model, an accepted draft, the one after a draft. Those "
    "in the prompt end nothing. The last row's limit falls on an accepted draft.",
    config=SMALL_VOCAB, prompts=[[4, 3, 5], [1, 2, 4, 3, 1], [4, 5, 2, 4, 5, 3], [4, 2]], max_tokens=16,
    end_tokens=[1, 4], **SPECULATE)  # fmt: skip
add("generate_mtp_ragged", "2.2",
    "Prompts of unequal length whose drafts are accepted at different times: in a batch, after the first pass no two "
    "rows are at one position. The last token of row 2 is an accepted draft.",
    config=SMALL_VOCAB, lengths=[7, 3, 1], seed=28, max_tokens=16, **SPECULATE)  # fmt: skip
add("generate_mtp_cache", "2.2",
    "The MTP module is layer L with a cache of its own: where it writes into the last main layer's, another text "
    "follows, though every trace is right.",
    "ml-explore/mlx-lm#1485", config=MTP | ONE_LAYER, seed=3, max_tokens=32,
    weights={"scale": {"o_proj.weight": 2.0}}, **SPECULATE)  # fmt: skip


# ---- Hugging Face in float64 ---------------------------------------------------------------------------------------


def stable_topk(x, k, dim=-1, largest=True, sorted=True):
    """Among equals the lowest index; torch.topk leaves it open."""
    values, index = x.sort(dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), index.narrow(dim, 0, k)


class Float64(TorchFunctionMode):
    """Within it a request for float32 gives float64, and an operation that yields a narrower float is an error. The
    largest of equals is the first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = {torch.Tensor.float: torch.Tensor.double, torch.topk: stable_topk, torch.Tensor.topk: stable_topk}.get(
            func, func)  # fmt: skip
        args = [torch.float64 if x is torch.float32 else x for x in args]
        out = func(*args, **{k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not torch.is_tensor(x) or not x.is_floating_point() or x.dtype == torch.float64, func
        return out


def checkpoint_name(path, layers):
    """The checkpoint's name of HF's module or tensor. MtpModel's own layers.0 is the layer after all."""
    path = re.sub(r"^layers\.(\d+)(\.mtp_block)?", lambda found: f"model.layers.{layers + int(found[1])}", path)
    return path.replace("post_norm", "shared_head.norm")


def fill(model, layers, weights):
    """Set all parameters. HF fuses experts to (E, rows, in), gate above up; the checkpoint has each by itself."""
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        name = checkpoint_name(path, layers)
        if "rotary_emb" in path or path.startswith(("embed_tokens", "shared_head")):  # MtpModel shares these
            continue
        assert tensor.dtype == torch.get_default_dtype(), name
        if tensor.dim() == 3:
            parts = ["gate", "up"] if name.endswith("gate_up_proj") else ["down"]
            names = [f"{name.rsplit('.', 1)[0]}.{e}.{part}_proj.weight" for e in range(len(tensor)) for part in parts]
            tensor.copy_(torch.stack([weights[name] for name in names]).reshape(tensor.shape))
        else:
            assert weights[name].shape == tensor.shape, name
            tensor.copy_(weights[name])


def gap(x, k):
    """How far the k-th largest of the last axis stands out from the next."""
    x = x.sort(descending=True)[0]
    return x[..., k - 1] - x[..., k] if k < x.shape[-1] else torch.full(x.shape[:-1], math.inf)


def watch(model, layers, kept, gaps, unseen):
    """From now on a call puts its modules' outputs into kept, by name, and into gaps how near a tie each token's
    choices were, infinitely far where its least gate is below the share `unseen` of their sum."""
    named = (r"lm_head|model\.(embed_tokens|norm|layers\.\d+(\.(eh_proj|input_layernorm|post_attention_layernorm|"
             r"mlp|mlp\.gate|mlp\.shared_experts|self_attn|self_attn\.kv_a_layernorm))?)")  # fmt: skip

    def keep(name, module, inputs, out):
        if not name.endswith(".gate"):
            kept[name.replace("kv_a_layernorm", "kv_latent")] = out[0][0] if isinstance(out, tuple) else out[0]
            return
        logits, gates, index = out
        kept[f"{name}.scores"] = score = logits.sigmoid()
        kept[f"{name}.indices"], order = index.sort()
        kept[f"{name}.weights"] = gates.gather(1, order)
        choice = (score + module.e_score_correction_bias).unflatten(-1, (module.num_group, -1))
        group = choice.topk(2)[0].sum(-1)
        lost = group < group.topk(module.topk_group)[0][:, -1:]
        choice = choice.masked_fill(lost[..., None], -math.inf).flatten(1)
        seen = gates.amin(-1) >= unseen * gates.sum(-1)
        gaps.append(torch.minimum(gap(group, module.topk_group), gap(choice, module.top_k)).where(seen, math.inf))

    for path, module in model.named_modules():
        name = checkpoint_name(path, layers)
        if re.fullmatch(named, name) and not re.fullmatch(r"layers\.\d+", path):  # HF's wrapper of an MTP module
            module.register_forward_hook(functools.partial(keep, name))
        if name.endswith(".self_attn"):
            module.register_forward_pre_hook(lambda module, inputs, name=name: rotating.append((name, kept)))


rotating = []  # the attention that runs last, and where its arrays are kept


def watch_rotations():
    """The rotation is a function, not a module. HF's returns pairs as halves: here they are neighbours."""
    rotate = modeling_deepseek_v3.apply_rotary_pos_emb_interleave

    def keep(*args, **kwargs):
        name, kept = rotating[-1]
        out = rotate(*args, **kwargs)
        q_HTR, k_TR = (x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for x in (out[0][0], out[1][0, 0]))
        kept[f"{name}.q_rope"], kept[f"{name}.k_rope"] = q_HTR.transpose(0, 1).clone(), k_TR.clone()
        return out

    modeling_deepseek_v3.apply_rotary_pos_emb_interleave = keep


class Judge:
    """HF's model of a config and its MTP modules, with the weights of a checkpoint; what they computed last."""

    def __init__(self, config, weights, unseen=0):
        apart = "model_type", "torch_dtype", "dtype", "quantization_config"
        hf = DeepseekV3Config(**copy.deepcopy({key: x for key, x in config.items() if key not in apart}))
        hf._attn_implementation = hf._experts_implementation = "eager"
        self.model = DeepseekV3ForCausalLM(hf).eval()
        self.layers, self.depth = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
        self.mtp = MtpModel(self.model, self.depth).eval() if self.depth else None
        self.kept, self.gaps = {}, []
        for part in [self.model, self.mtp][: 2 if self.depth else 1]:
            fill(part, self.layers, weights)
            watch(part, self.layers, self.kept, self.gaps, unseen)

    def logits(self, tokens, start=0):
        """(T, W) of a list of tokens, the whole sequence at once, nothing cached."""
        positions = torch.arange(start, start + len(tokens))[None]
        return self.model(torch.tensor([tokens]), position_ids=positions, use_cache=False).logits[0]

    def mtp_logits(self, tokens):
        """The logits of each MTP module, after `logits` of the same tokens. Row i of module k is the pair (state i,
        token i + k), whose position HF calls i + k."""
        state, logits = self.kept["model.norm"][None], []
        for k in range(1, self.depth + 1):
            positions = torch.arange(k, len(tokens))[None]
            state = self.mtp.forward_layer(k - 1, state[:, :-1], positions, None, torch.tensor([tokens[k:]]))
            logits.append(self.mtp.shared_head(state)[0])
        return logits

    def arrays(self, tokens, start=0):
        """All arrays of a trace, in the order of computation."""
        self.kept.clear()
        self.gaps.clear()
        self.logits(tokens, start)
        arrays = dict(self.kept)
        for k, logits in enumerate(self.mtp_logits(tokens) if len(tokens) > self.depth else []):
            name = f"model.layers.{self.layers + k}"
            own = rf"{name}(\.(?!self_attn\.._rope).*)?"  # not the rotated: HF's first pair is at position k, not 0
            arrays |= {name: x for name, x in self.kept.items() if re.fullmatch(own, name)}
            arrays[f"{name}.shared_head"] = logits
        return arrays

    def near_ties(self, least=ROUTING_GAP):
        """The positions at which the last calls chose experts by less than `least`."""
        return sorted({i for gaps_T in self.gaps for i in (gaps_T < least).nonzero().flatten().tolist()})


# ---- What each case must give --------------------------------------------------------------------------------------


def read_checkpoint(directory):
    """All tensors of a checkpoint, as stored, and as they are read: FP8 times the scale of its block in float32, then
    all in float64."""
    shards = {path.name: safetensors.torch.load_file(path) for path in Path(directory).glob("*.safetensors")}
    index = Path(directory) / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {
        name: shard for shard, held in shards.items() for name in held}  # fmt: skip
    stored = {name: shards[shard][name] for name, shard in weight_map.items()}
    read = dict(stored)
    for name, x in stored.items():
        if x.dtype == torch.float8_e4m3fn:
            read[name] = x.to(torch.float32) * spread(stored[f"{name}_scale_inv"].to(torch.float32), x.shape)
    return stored, {name: x.to(torch.float64) for name, x in read.items()}


def written(case):
    """The tensors of a case's checkpoint, as they are read; where cases.py rounds by itself, it must round as torch."""
    with tempfile.TemporaryDirectory() as directory:
        stored, read = read_checkpoint(write(case, directory))
    copies = r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight|.*_scale_inv"
    for name, x in stored.items():
        if x.dtype in (torch.bfloat16, torch.float8_e4m3fn) and not re.fullmatch(copies, name):
            exact = torch.from_numpy(unrounded(case, name, x.shape)).to(torch.float32)
            if x.dtype == torch.float8_e4m3fn:
                exact /= spread(stored[f"{name}_scale_inv"], x.shape)
            assert torch.equal(exact.to(x.dtype).to(torch.float64), x.to(torch.float64)), name
    return read


def spread(scale, shape):
    """The scale of each element, from those of the blocks of 128 x 128."""
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def make_trace(name, case, weights):
    first, last = case["config"]["first_k_dense_replace"], case["config"]["num_hidden_layers"] - 1
    stays = case.pop("keep", rf"model\.layers\.(0|{last}|{last + 1}|{last + 2})(\..*)?|"
                             rf"model\.layers\.{first}\.mlp\.gate.*|model\.norm|lm_head")  # fmt: skip
    judge, arrays = Judge(case["config"], weights), {}
    for n, prompt in enumerate(case["prompts"]):
        row = judge.arrays(prompt, case.get("start", 0))
        assert name.startswith("ties") or not judge.near_ties(), name
        arrays |= {(f"{n}/" if len(case["prompts"]) > 1 else "") + name: x for name, x in row.items()
                   if re.fullmatch(stays, name)}  # fmt: skip
    return arrays


def continued(judge, prompt, max_tokens, stop=()):
    """The prompt and the likeliest tokens after it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and not set(tokens[len(prompt) :][-1:]) & set(stop):
        tokens.append(int(stable_topk(judge.logits(tokens)[-1], 1)[1]))
    return tokens


def generated(judge, prompt, max_tokens, speculate, stop=(), gaps=(ROUTING_GAP, TOKEN_GAP)):
    """The arrays of one row, up to the first near tie, and how many tokens they are."""
    tokens, T = continued(judge, prompt, max_tokens, stop), len(prompt)
    judge.gaps.clear()
    choices = [judge.logits(tokens)]
    if speculate:  # row i: the guess of token i + 2 from the pair (state i, token i + 1)
        choices.append(judge.mtp_logits(tokens)[0])
    near = judge.near_ties(gaps[0])
    for logits in choices:
        near += [i for i in (gap(logits, 1) < gaps[1]).nonzero().flatten().tolist() if i >= T - 1]
    new = tokens[T:][: max(0, min(near, default=len(tokens)) - T + 1)]
    arrays = {"tokens": new}
    if speculate:
        arrays["drafts"], arrays["accepted"] = verified(prompt + new, choices[1].argmax(-1).tolist(), T)
    return {name: torch.tensor(x) for name, x in arrays.items()}, len(new)


def verified(tokens, drafts, T):
    """The drafts that the main model verifies, and whether each is right, while there are tokens to make. With token
    `last` known, the draft is of the next; if it is right, the token after it is known too."""
    made, accepted, last = [], [], T
    while last + 1 < len(tokens):
        made.append(drafts[last - 1])
        accepted.append(int(made[-1] == tokens[last + 1]))
        last += 1 + accepted[-1]
    return made, accepted


def make_generate(name, case, weights):
    judge, arrays = Judge(case["config"], weights), {}
    for n, prompt in enumerate(case["prompts"]):
        row, made = generated(judge, prompt, case["max_tokens"], case["speculate"], case.get("end_tokens", ()),
                              gaps=(ROUTING_GAP, 0 if name == "generate_ties" else TOKEN_GAP))  # fmt: skip
        assert made == case["max_tokens"] or "end_tokens" in case, (name, n, made)
        arrays |= {f"{n}/{key}": x for key, x in row.items()}
    return arrays


def make_half(name, case, weights):
    """The first norm and the first routing, in half precision. The normed embedding is no nearer to a point where
    float16 rounds the other way than float32 can miss."""
    torch.set_default_dtype(torch.float16)
    judge = Judge(case["config"], weights)
    arrays = judge.arrays(*case["prompts"])
    torch.set_default_dtype(torch.float64)
    x = arrays["model.embed_tokens"].double()
    x = x / (x.square().mean(-1, keepdim=True) + case["config"]["rms_norm_eps"]).sqrt()
    near = x.half()
    ulp = (torch.nextafter(near, torch.full_like(near, math.inf)) - near).double()
    assert ((x - near.double()).abs() / ulp - 0.5).abs().min() > 2e-3 and not judge.near_ties(HALF_GAP), name
    stays = ["model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
             *(f"model.layers.0.mlp.gate.{part}" for part in ("scores", "indices", "weights"))]  # fmt: skip
    return {name: arrays[name] for name in stays}


def make_losses(name, case, weights):
    """Eqs. (17)-(20) and (24), (25) term by term, from HF's logits and affinities. A row has T + 1 tokens."""
    E, K = case["config"]["n_routed_experts"], case["config"]["num_experts_per_tok"]
    judge, B, T = Judge(case["config"], weights), len(case["prompts"]), len(case["prompts"][0]) - 1
    depth = judge.depth
    main, of_depth, balance = 0.0, [0.0] * depth, 0.0
    for row in case["prompts"]:
        arrays = {name: x.tolist() for name, x in judge.arrays(row[:T]).items()}

        def cross_entropy(logits, target):
            return math.log(sum(math.exp(x) for x in logits)) - logits[target]

        main += sum(cross_entropy(arrays["lm_head"][i], row[i + 1]) for i in range(T)) / T / B
        for k in range(1, depth + 1):  # state i of module k predicts token i + k + 1
            logits = arrays[f"model.layers.{judge.layers + k - 1}.shared_head"]
            of_depth[k - 1] += sum(cross_entropy(logits[i], row[i + k + 1]) for i in range(T - k)) / T / B
        for scores in (x for name, x in arrays.items() if name.endswith(".gate.scores")):
            best = [sorted(range(E), key=lambda i: -s[i])[:K] for s in scores]
            for i in range(E):
                f = E / (K * len(scores)) * sum(i in chosen for chosen in best)
                balance += f * sum(s[i] / sum(s) for s in scores) / len(scores) / B
    total = main + case["mtp_weight"] / depth * sum(of_depth) + case["balance_weight"] * balance
    values = {"main": main} | {f"mtp.{k + 1}": x for k, x in enumerate(of_depth)} | {"balance": balance, "total": total}
    return {name: torch.tensor(x) for name, x in values.items()}


def make_phases(name, case, weights):
    """cos and sin of YaRN's angles, with 50 digits."""
    mpmath.mp.dps = 50
    R, theta, yarn = case["config"]["qk_rope_head_dim"], case["config"]["rope_theta"], case["config"]["rope_scaling"]

    def pair_that_turns(times):
        original = yarn["original_max_position_embeddings"]
        return R * mpmath.log(original / (2 * mpmath.pi * times)) / (2 * mpmath.log(theta))

    low = max(mpmath.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(mpmath.ceil(pair_that_turns(yarn["beta_slow"])), R - 1)
    rows = {"cos": [], "sin": []}
    for position in case["positions"]:
        angles = []
        for j in range(R // 2):
            ramp = min(max((j - low) / (high - low), 0), 1)
            frequency = mpmath.mpf(theta) ** (-mpmath.mpf(2 * j) / R)
            angles.append(position * frequency * (1 - ramp + ramp / yarn["factor"]))
        rows["cos"].append([float(mpmath.cos(x)) for x in angles])
        rows["sin"].append([float(mpmath.sin(x)) for x in angles])
    return {name: torch.tensor(x) for name, x in rows.items()}


def make_update_bias(name, case, weights):
    """arXiv:2408.15664, Algorithm 1: b_i += gamma sign(mean load - load_i)."""
    bias, load = [0.5, -0.25, 0.0, 1.0, 0.75, -0.5, 0.25, 2.0], [12.0, 3.0, 5.0, 5.0, 4.0, 4.0, 2.0, 5.0]
    if name == "update_bias_counts":
        load = [40000, 40001, 39999, 40003, 40000, 40000, 39998, 40001]
    mean = sum(load) / len(load)
    new = [b + case["gamma"] * ((n < mean) - (n > mean)) for b, n in zip(bias, load, strict=True)]
    return {name: torch.tensor(x) for name, x in (("given/bias", bias), ("given/load", load), ("bias", new))}


def make_dequantize(name, case, weights):
    code = (torch.arange(130 * 200) * 37 % 256).to(torch.uint8).reshape(130, 200)  # cropped blocks hold every code too
    scale = torch.tensor([[0.0123, 0.5], [1.7, 0.003]], dtype=torch.float32)
    value = code.view(torch.float8_e4m3fn).to(torch.float32) * spread(scale, code.shape)
    return {"given/weight": code, "given/weight_scale_inv": scale, "weight": value}


# ---- The checkpoint in the directory above -------------------------------------------------------------------------

OPENING = "Once upon a time, there was a little dog"  # the page's
TEXTS = (  # the first that holds no near tie
    'Once upon a time, a dog named Max sat in a café. "Hi!" said Lily,\n and 3 birds flew',
    'One day, Tim and his mom sat in a café. "Look!" said Tim.\n They saw 3 red birds',
    'There was a little girl named Lily. "I am 4 years old," she said.\n Her cat ate a jalapeño',
)


def make_shipped():
    """Entries and arrays of the cases that are about the trained checkpoint."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    weights = read_checkpoint(SHIPPED)[1]
    with Float64():
        judge = Judge(json.loads((SHIPPED / "config.json").read_text("utf-8")), weights, UNSEEN)
        for text in TEXTS:
            tokens = tokenizer(text).input_ids
            arrays = judge.arrays(tokens)
            if not judge.near_ties(SHIPPED_ROUTING_GAP):
                break
        else:
            raise SystemExit("each of TEXTS holds a near tie: write another")
        begun = tokenizer(OPENING).input_ids
        story, made = generated(judge, begun, 200, True, [tokenizer.eos_token_id], (SHIPPED_ROUTING_GAP, TOKEN_GAP))
    check_from_pretrained(tokens, arrays["lm_head"])
    about = {"equation": "(1)-(23)", "see": [], "origin": f"{HF}, in float64", "checkpoint": "shipped"}
    index = {
        "shipped": {"do": "trace", "why": "The trained checkpoint beside the kit, BF16, on a text.", **about,
                    "text": text, "prompts": [tokens], "arrays": ["model.norm", "lm_head"], "tolerance": TOLERANCE},
        "shipped_story": {"do": "generate", "why": "The story that the page tells without arguments, in tokens; most "
                          "drafts of a trained module are right.", **about, "text": OPENING,
                          "prompts": [begun], "max_tokens": made, "speculate": True,
                          "arrays": [f"0/{key}" for key in story], "tolerance": TOKENS},
    }  # fmt: skip
    print(f"shipped: {len(tokens)} tokens; a story of {made}, drafts {len(story['drafts'])}, "
          f"right {int(story['accepted'].sum())}")  # fmt: skip
    return index, {f"shipped/{key}": arrays[key] for key in index["shipped"]["arrays"]} | {
        f"shipped_story/0/{key}": x for key, x in story.items()}  # fmt: skip


def check_from_pretrained(tokens, logits):
    """Loaded as anyone would, in float32, the checkpoint gives the same."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    assert (model(torch.tensor([tokens])).logits[0] - logits).abs().max() < 1e-3


# ---- All of it -----------------------------------------------------------------------------------------------------

MAKE = {"trace": make_trace, "generate": make_generate, "losses": make_losses, "phases": make_phases,
        "update_bias": make_update_bias, "dequantize": make_dequantize}  # fmt: skip


def make_all():
    index, arrays = {}, {}
    for name, case in CASES.items():
        weights = written(case) if "weights" in case else None
        half = case.get("dtype") == "float16"
        make = make_half if half else MAKE[case["do"]]
        with contextlib.nullcontext() if half or case["do"] == "dequantize" else Float64():
            made = make(name, case, weights)
        given = [key.removeprefix("given/") for key in made if key.startswith("given/")]
        index[name] = case | ({"given": given} if given else {}) | {
            "arrays": [key for key in made if not key.startswith("given/")]}  # fmt: skip
        arrays |= {f"{name}/{key}": x for key, x in made.items()}
        print(f"{name:26} {len(made):3} arrays, {sum(x.nbytes for x in made.values()) / 1000:.0f} KB")
    return index, arrays


def main(shipped_only):
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    watch_rotations()
    index, arrays = {}, {}
    if shipped_only:
        index, arrays = json.loads(INDEX.read_text("utf-8")), safetensors.torch.load_file(EXPECTED)
        arrays = {name: x for name, x in arrays.items() if not name.startswith("shipped")}
    for make in [make_shipped] if shipped_only else [make_all, make_shipped]:
        more_index, more_arrays = make()
        index, arrays = index | more_index, arrays | more_arrays
    lines = [f"{json.dumps(name)}: {json.dumps(case, ensure_ascii=False)}" for name, case in index.items()]
    INDEX.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    EXPECTED.write_bytes(safetensors.torch.save({name: x.contiguous() for name, x in arrays.items()}))


if __name__ == "__main__":
    main("--shipped" in sys.argv[1:])
