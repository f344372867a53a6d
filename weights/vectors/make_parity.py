"""Make index.json and parity.npz, the cases of the conformance kit and what they must give.

    pip install numpy torch==2.13.0 transformers==5.23.0
    python make_parity.py        # some seconds on one core; writes shipped.npz too, beside this file

The judge is independent: nothing here imports the file under test. Hugging Face's model computes every operation in
float64, also those that its code asks to run in float32, so that another float64 implementation must agree to
rounding. What it leaves open or does not have, stands here in plain Python: `stable_topk`, `losses`, `update_bias`.

case.py says what index.json holds, and has the formula of the weights. Arrays (T, ...) are named by the module of the
checkpoint that puts them out, such as
    model.layers.1.self_attn              attention, before the residual is added; likewise `.mlp`
    model.layers.1.self_attn.kv_latent    the normed latent, what a cache keeps; `.q_rope`, `.k_rope`: rotated
    model.layers.1.mlp.gate.indices       the chosen experts, sorted, and `.weights`, their gates in the same order
    model.layers.1                        the block, with the residual
    model.norm, lm_head                   the final states, the logits
v3_yarn has all of them. The other cases have the last layer, the first routing, and what comes after the layers; of
the MTP modules too, model.layers.2 and on: `.eh_proj`, the block, and the logits as `.shared_head`. Module k has
T - k rows, one for each pair (state i of the module before, token i + k). The modules are run by HF's own MtpModel,
which hands the state after `.shared_head.norm` on to the next.

The cases in NEW also have, outside of the index, `greedy`, so many tokens that continue the prompt; and with an MTP
module `drafts`, where drafts[i] is its guess of token i + 2 of s, the prompt and greedy: the likeliest of the pair
(state i, s[i + 1]), for all pairs of s at once.

shipped.npz is what HF makes of the checkpoint in the directory above, loaded as anyone would, in float32: of a text its
token ids and logits (`text`, `tokens`, `lm_head`), and the greedy continuation of a prompt (`prompt`, `greedy`).
"""

import copy
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import transformers
from case import INDEX, weight
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM, modeling_deepseek_v2
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, modeling_deepseek_v3


def yarn(key="type", factor=40.0, original=4096, **changes):
    return {key: "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0} | changes  # fmt: skip


WHY = {  # case: equation, what it guards against, where that was met
    "v3_yarn": ("(1)-(16), 4.3",
        "The release's structure, every array: where does a port leave the path first? YaRN is static: 14 tokens, "
        "and it is on.",
        "deepseek-ai/DeepSeek-V3#305", "deepseek-ai/DeepSeek-V3#658"),
    "one_token": ("(1)-(16)",
        "At position 0 neither rotation nor softmax scale can be seen: what passes here and fails v3_yarn has its "
        "mistake there.",
        "onnxruntime/mobius#548"),
    "long": ("(10)",
        "A softmax over 200 keys.",
        "sgl-project/sglang#3716"),
    "chunks": ("(1), (3), (10)",
        "Tokens enter the cache in chunks: positions go on, and a chunk sees all before it; then one token at a "
        "time, where absorbing is cheaper.",
        "ggml-org/llama.cpp#12801"),
    "ragged": ("(10)",
        "Rows of unequal length in one batch give what each gives alone."),
    "hf5_spelling": ("4.3",
        "config.json as transformers 5 writes it: rope_parameters. mscale and mscale_all_dim differ: the softmax "
        "takes the second, cos and sin their quotient.",
        "NVIDIA/Megatron-LM#1429"),
    "mscale_707": ("4.3",
        "mscale^2 in the softmax scale, V2's 0.707, beyond the original context.",
        "huggingface/transformers#47435", "onnxruntime/mobius#548"),
    "mscale_all_dim_0": ("4.3",
        "Without mscale_all_dim cos and sin carry m(1) and the softmax nothing; and a ramp without width.",
        "ggml-org/llama.cpp#17945"),
    "truncate_false": ("4.3",
        "The ramp's ends are not rounded to whole pairs, as `truncate` asks.",
        "ggml-org/llama.cpp#7416"),
    "yarn_range": ("4.3",
        "The ramp's upper end is held at R - 1, not at the last pair.",
        "ggml-org/llama.cpp#7416"),
    "attention_bias": ("(1), (6), (11)",
        "Biases on the down and output projections; RoPE on halves.",
        "huggingface/transformers#39687"),
    "moonlight": ("(9)",
        "Queries without compression, no groups, plain RoPE, eps 1e-5, two shared experts.",
        "huggingface/transformers#44346"),
    "latent_eps": ("4.2",
        "The norms on the latents have eps 1e-6 though rms_norm_eps is 1e-5.",
        "huggingface/transformers#44346", "vllm-project/vllm#35515"),
    "half": ("4.2, (15)",
        "In float16 the normalised x is rounded before it meets the weight, and the router computes in float32.",
        "vllm-project/vllm#23640"),
    "negative_bias": ("(16)",
        "Experts outside the chosen groups masked with 0 win when all biases are negative.",
        "deepseek-ai/DeepSeek-V3#741", "vllm-project/vllm#13474", "huggingface/transformers#45441"),
    "group_scores": ("2.1.2",
        "A group's score is the sum of its two best biased affinities: not its best, not all, not unbiased.",
        "vllm-project/vllm#13474"),
    "tiny_affinities": ("(13)",
        "Affinities of 1e-7 beside biases of 12: taken as biased minus bias, or normalised with a large guard, "
        "they are lost.",
        "flashinfer-ai/flashinfer#3875", "vllm-project/vllm#12002"),
    "ties_experts": ("(16)",
        "Among equal experts the lowest index wins.",
        "vllm-project/vllm#52679", "vllm-project/vllm#55514"),
    "ties_groups": ("2.1.2",
        "Among equal groups the lowest index wins.",
        "vllm-project/vllm#55514"),
    "many_groups": ("2.1.2",
        "8 groups of which 3, plain RoPE.",
        "vllm-project/vllm#13474"),
    "unnormalised": ("(13)",
        "norm_topk_prob false: gates are not normalised, and still scaled. The official code normalises always."),
    "k2_like": ("(13)-(16)",
        "Kimi-K2: one group, scaling 2.827, YaRN of 32.",
        "NVIDIA/TensorRT-Model-Connect#669"),
    "all_dense": ("(12)",
        "No layer has experts."),
    "tied": ("(23)",
        "The head is the embedding."),
    "mtp": ("(21)-(23)",
        "[embedding ; state] for the released weights, the state after model.norm, no embedding masked, "
        "shared_head.norm of its own.",
        "NVIDIA/Megatron-LM#1588", "deepseek-ai/DeepSeek-V3#839", "vllm-project/vllm#33299", "ROCm/ATOM#643"),
    "mtp_small_vocab": ("(21)-(23)",
        "As mtp; some drafts are right by chance.",
        "vllm-project/vllm#14647"),
    "mtp_depth_2": ("(21)-(23)",
        "Module 2 takes the state of module 1 after its shared_head.norm.",
        "ROCm/ATOM#1764", "vllm-project/vllm#47448"),
    "losses": ("(17)-(20), (24), (25)",
        "As printed: f_i counts the plain top K_r; eq. (24) divides T - k terms by T; lambda / D; L_Bal is summed "
        "over layers.",
        "deepseek-ai/DeepSeek-V3#928"),
    "update_bias": ("2.1.2",
        "sign(0) = 0, not centred, underloaded goes up.",
        "deepseek-ai/DeepSeek-V3#761"),
    "fp8": ("3.3",
        "weight_scale_inv multiplies; blocks of 128 x 128, the last ones cropped; 0x7f and 0xff are NaN.",
        "tenstorrent/tt-metal#38127"),
    "v2_lite": ("V2 report",
        "Softmax affinities, greedy choice, not normalised.",
        "huggingface/transformers#47435"),
    "v2": ("V2 report",
        "Softmax affinities, groups ranked by their best one.",
        "huggingface/transformers#47435"),
}  # fmt: skip
T = 14  # tokens of a prompt
LENGTHS = {"long": [200], "one_token": [1], "ragged": [T, 5, 1], "half": [8], "losses": [10, 10]}  # others: [T]
CHUNKS = {"chunks": [5, 1, 4, 1, 3]}
NEW = {"v3_yarn": 12, "mtp": 24, "mtp_small_vocab": 24}
SEED = {
    "long": 10,
    "mtp_small_vocab": 14,
    "tiny_affinities": 6,
}  # draws the prompts, else 0; where it leads to a near tie, take another
ROUTING_GAP, TOKEN_GAP = 1e-4, 1e-3  # by which the chosen stand out at least: nothing hangs on the last digits
RELEASE = dict(model_type="deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
BASE = dict(
    vocab_size=48, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=14,
    kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, attention_bias=False, intermediate_size=40,
    first_k_dense_replace=1, moe_intermediate_size=12, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=3,
    n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, hidden_act="silu", rms_norm_eps=1e-6,
    rope_theta=1e4, rope_scaling=yarn(), max_position_embeddings=163840, tie_word_embeddings=False,
    num_nextn_predict_layers=0,
)  # fmt: skip
BIGGER = dict(n_routed_experts=16, num_experts_per_tok=4)
ONE_GROUP = dict(n_group=1, topk_group=1, rope_theta=5e4)
V2 = BIGGER | dict(
    model_type="deepseek_v2", scoring_func="softmax", norm_topk_prob=False, num_hidden_layers=3, n_shared_experts=2,
    rope_scaling=yarn("type", 4.0, 8, mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip
V3_YARN = BIGGER | dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)
CASES = {  # what differs from BASE
    "v3_yarn": V3_YARN,
    "long": V3_YARN,
    "hf5_spelling": dict(rope_theta=25e3, rope_scaling=yarn("rope_type", 8.0, beta_fast=128.0, beta_slow=8.0,
                                                            mscale_all_dim=0.5)),
    "moonlight": ONE_GROUP | dict(q_lora_rank=None, n_shared_experts=2, rms_norm_eps=1e-5, rope_scaling=None),
    "many_groups": BIGGER | dict(n_group=8, topk_group=3, num_hidden_layers=3, first_k_dense_replace=2,
                                 rope_scaling=None),
    "tied": dict(tie_word_embeddings=True),
    "unnormalised": dict(norm_topk_prob=False),
    "mscale_707": dict(rope_scaling=yarn("type", 4.0, 8, mscale=0.707, mscale_all_dim=0.707)),  # T > 8, the original
    "mscale_all_dim_0": dict(rope_scaling=yarn("type", 4.0, 6, mscale_all_dim=0.0)),  # and a ramp without width
    "truncate_false": dict(rope_scaling=yarn(truncate=False)),
    "attention_bias": dict(attention_bias=True, rope_interleave=False),
    "negative_bias": {},
    "all_dense": dict(first_k_dense_replace=2),
    "k2_like": BIGGER | ONE_GROUP | dict(model_type="kimi_k2", routed_scaling_factor=2.827,
                                         rope_scaling=yarn(factor=32.0)),
    "mtp": dict(num_nextn_predict_layers=1),
    "mtp_small_vocab": dict(num_nextn_predict_layers=1, vocab_size=6),  # some drafts are right by chance
    "mtp_depth_2": dict(num_nextn_predict_layers=2),
    "v2_lite": V2 | dict(topk_method="greedy", q_lora_rank=None, n_group=1, topk_group=1, routed_scaling_factor=1.0),
    "v2": V2 | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
    "one_token": {},
    "chunks": BIGGER,
    "ragged": BIGGER,
    "yarn_range": dict(rope_theta=100.0),
    "latent_eps": dict(rms_norm_eps=1e-5),
    "group_scores": BIGGER,
    "tiny_affinities": dict(num_experts_per_tok=2),
    "ties_experts": dict(n_group=1, topk_group=1),
    "ties_groups": {},
    "half": dict(num_hidden_layers=1, first_k_dense_replace=0),
    "losses": dict(num_hidden_layers=3, num_nextn_predict_layers=2),
}  # fmt: skip
HF5 = "hf5_spelling", "moonlight"  # config.json as transformers 5 writes it: rope_parameters for rope_scaling
WEIGHTS = {  # how they are changed after the formula
    "moonlight": {"scale": {"kv_a_proj_with_mqa.weight": 0.01}},  # latents so small that the eps of their norm shows
    "latent_eps": {"scale": {"kv_a_proj_with_mqa.weight": 0.01, "q_a_proj.weight": 0.01}},
    "negative_bias": {"shift": {"e_score_correction_bias": -5.0}},
    "group_scores": {"scale": {"e_score_correction_bias": 4.0}},  # as large as the affinities differ
    "tiny_affinities": {"scale": {"mlp.gate.weight": 20.0},  # of the two that the biases choose both may be 1e-8
                        "set": {"e_score_correction_bias": [12.0, 0, 0, 0, 0, 13.0, 0, 0]}},
    "ties_experts": {"scale": {"mlp.gate.weight": 0.0}, "set": {"e_score_correction_bias": [0, 1, 0, 1, 1, 0, 1, 0]}},
    "ties_groups": {"scale": {"mlp.gate.weight": 0.0},
                    "set": {"e_score_correction_bias": [0.25, 0, 0.5, 0, 0.125, 0.125, 0, 0.25]}},
    "half": {"scale": {"o_proj.weight": 0.0, "e_score_correction_bias": 0.0}},  # the router sees the normed embedding
}  # fmt: skip
TOLERANCE = {"8": 1e-9, "4": 1e-3, "2": 5e-2}
HF = f"Hugging Face transformers {transformers.__version__}"


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


def fill(model, layers, case):
    """Set all weights. HF fuses experts to (E, rows, in), gate above up; the checkpoint has each matrix by itself."""
    dtype = np.float16 if torch.get_default_dtype() == torch.float16 else np.float64
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        name, shape = checkpoint_name(path, layers), tuple(tensor.shape)
        assert tensor.dtype == torch.get_default_dtype() or "rotary_emb" in path, name
        if tensor.dim() == 3:
            parts = ["gate", "up"] if name.endswith("gate_up_proj") else ["down"]
            names = [f"{name.rsplit('.', 1)[0]}.{e}.{part}_proj.weight" for e in range(shape[0]) for part in parts]
            shape_of_one = shape[1] // len(parts), shape[2]
            matrices = [torch.from_numpy(weight(case, name, shape_of_one).astype(dtype)) for name in names]
            tensor.copy_(torch.stack(matrices).reshape(shape))
        elif "rotary_emb" not in path and not path.startswith(("embed_tokens", "shared_head")):  # shared by MtpModel
            tensor.copy_(torch.from_numpy(weight(case, name, shape).astype(dtype)))


def gap(x, k):
    """How far the k-th largest of the last axis stands out from the next, at least."""
    x = x.sort(descending=True)[0]
    return float((x[..., k - 1] - x[..., k]).min()) if k < x.shape[-1] else math.inf


def watch(model, layers, kept, gaps):
    """From now on a call puts its modules' outputs into kept, by name, and into gaps how near a tie each choice was."""
    named = (r"lm_head|model\.(embed_tokens|norm|layers\.\d+(\.(eh_proj|input_layernorm|post_attention_layernorm|"
             r"mlp|mlp\.gate|self_attn|self_attn\.kv_a_layernorm))?)")  # fmt: skip
    v2 = isinstance(model, DeepseekV2ForCausalLM)

    def keep(name, module, inputs, out):
        if not name.endswith(".gate"):
            kept[name.replace("kv_a_layernorm", "kv_latent")] = out[0][0] if isinstance(out, tuple) else out[0]
            return
        logits, gates, index = out
        kept[f"{name}.scores"] = score = logits.softmax(-1) if v2 else logits.sigmoid()
        kept[f"{name}.indices"], order = index.sort()
        kept[f"{name}.weights"] = gates.gather(1, order)
        choice = score if v2 else score + module.e_score_correction_bias
        choice = choice.unflatten(-1, (module.num_group, -1))
        group = choice.max(-1)[0] if v2 else choice.topk(2)[0].sum(-1)
        lost = group < group.topk(module.topk_group)[0][:, -1:]
        gaps.append(gap(group, module.topk_group))
        gaps.append(gap(choice.masked_fill(lost[..., None], -math.inf).flatten(1), module.top_k))

    for path, module in model.named_modules():
        name = checkpoint_name(path, layers)
        if re.fullmatch(named, name) and not re.fullmatch(r"layers\.\d+", path):  # HF's wrapper of an MTP module
            module.register_forward_hook(functools.partial(keep, name))
        if name.endswith(".self_attn"):
            module.register_forward_pre_hook(lambda module, inputs, name=name: rotating.append((name, kept)))


rotating = []  # the attention that runs last, and where its arrays are kept


def watch_rotations():
    """The rotations are functions, not modules. One of HF's returns its pairs as halves: here they are neighbours."""

    def watched(rotate, halves):
        def keep(*args, **kwargs):
            name, kept = rotating[-1]
            out = rotate(*args, **kwargs)
            q_HTR, k_TR = out[0][0], out[1][0, 0]
            if halves:
                q_HTR, k_TR = (x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for x in (q_HTR, k_TR))
            kept[f"{name}.q_rope"], kept[f"{name}.k_rope"] = q_HTR.transpose(0, 1).clone(), k_TR.clone()
            return out

        return keep

    for module, name, halves in ((modeling_deepseek_v3, "apply_rotary_pos_emb_interleave", True),
                                 (modeling_deepseek_v3, "apply_rotary_pos_emb", False),
                                 (modeling_deepseek_v2, "apply_rotary_emb", False)):  # fmt: skip
        setattr(module, name, watched(getattr(module, name), halves))


def continued(tokens, new, model):
    """tokens (1, T) and the new ones after them: the whole sequence again for each token, nothing cached."""
    for _ in range(new):
        logits = model(tokens, use_cache=False).logits[0, -1]
        assert gap(logits, 1) >= TOKEN_GAP
        tokens = torch.cat([tokens, logits.argmax().reshape(1, 1)], dim=1)
    return tokens


def mtp_logits(tokens, state, mtp):
    """The logits of each MTP module, from tokens (1, T) and the states (T, D) after model.norm."""
    state, logits = state[None], []
    for k in range(1, mtp.num_mtp_layers + 1):  # HF calls the position of the pair (state i, token i + k) i + k
        positions = torch.arange(k, tokens.shape[1])[None]
        state = mtp.forward_layer(k - 1, state[:, :-1], positions, None, tokens[:, k:])
        logits.append(mtp.shared_head(state)[0])
    return logits


def describe(name):
    """A case's entry in index.json, less its arrays."""
    keys = BASE | CASES[name]
    config = RELEASE | keys
    if name in HF5:
        config = json.loads(DeepseekV3Config(**copy.deepcopy(keys)).to_json_string())
    rng = np.random.default_rng(SEED.get(name, 0))
    prompts = [rng.integers(0, keys["vocab_size"], n).tolist() for n in LENGTHS.get(name, [T])]
    equation, why, *see = WHY[name]
    case = {"function": "trace", "equation": equation, "why": why, "see": see, "origin": f"{HF}, in float64",
            "config": config | {"torch_dtype": "float32"}, "weights": WEIGHTS.get(name, {}),
            "prompts": prompts}  # fmt: skip
    if name in CHUNKS:
        case["arguments"] = [CHUNKS[name]]
    if name.startswith("ties"):
        case["origin"] += ", its topk replaced by a stable one"
    return case | {"tolerance": TOLERANCE}


def build(case):
    """-> HF's model and its MTP modules or None, filled; the arrays that they will keep, and the gaps."""
    config = case["config"]
    kind = DeepseekV2Config if config.get("model_type") == "deepseek_v2" else DeepseekV3Config
    hf = kind(**copy.deepcopy({k: v for k, v in config.items() if k not in ("model_type", "torch_dtype", "dtype")}))
    hf._attn_implementation = hf._experts_implementation = "eager"
    causal_lm = DeepseekV2ForCausalLM if kind is DeepseekV2Config else DeepseekV3ForCausalLM
    model, kept, gaps = causal_lm(hf).eval(), {}, []
    depth = config.get("num_nextn_predict_layers", 0)
    mtp = MtpModel(model, depth).eval() if depth else None
    for part in [model, mtp] if mtp else [model]:
        fill(part, config["num_hidden_layers"], case)
        watch(part, config["num_hidden_layers"], kept, gaps)
    return model, mtp, kept, gaps


def run(model, mtp, kept, tokens, layers):
    """All arrays of tokens (1, T), in the order of computation."""
    kept.clear()
    model(tokens, use_cache=False)
    arrays = dict(kept)
    if mtp:  # it shares lm_head, whose entry in kept is the last module's from here on
        modules = [f"model.layers.{layers + k}" for k in range(mtp.num_mtp_layers)]
        logits = mtp_logits(tokens, kept["model.norm"], mtp)
        for module, x in zip(modules, logits, strict=True):
            own = rf"{module}(\.(?!self_attn\.._rope).*)?"  # not the rotated: HF's first pair is at position k, not 0
            arrays |= {name: y for name, y in kept.items() if re.fullmatch(own, name)}
            arrays[f"{module}.shared_head"] = x
    return arrays


def make(name, case):
    """-> the case's arrays by name, and those that the index does not list."""
    config = case["config"]
    layers, first = config["num_hidden_layers"], config["first_k_dense_replace"]
    model, mtp, kept, gaps = build(case)
    arrays, more = {}, {}
    for n, prompt in enumerate(case["prompts"]):
        tokens = torch.tensor([prompt])
        row = run(model, mtp, kept, tokens, layers)
        if name == "long":
            row = {"lm_head": row["lm_head"]}
        elif name != "v3_yarn":
            last = rf"model\.layers\.({'|'.join(str(i) for i in range(layers - 1, layers + 2))})"
            stays = rf"{last}(\..*)?|model\.layers\.{first}\.mlp\.gate.*|model\.norm|lm_head"
            row = {name: x for name, x in row.items() if re.fullmatch(stays, name)}
        arrays |= {(f"{n}/" if len(case["prompts"]) > 1 else "") + name: x for name, x in row.items()}
    if name in NEW:
        longer = continued(tokens, NEW[name], model)
        more["greedy"] = longer[0, T:]
        if mtp:
            model(longer, use_cache=False)
            logits = mtp_logits(longer, kept["model.norm"], mtp)[0]
            assert gap(logits[T - 1 :], 1) >= TOKEN_GAP
            more["drafts"] = logits.argmax(-1)
            right = more["drafts"][T - 1 : -1] == longer[0, T + 1 :]
            assert name != "mtp_small_vocab" or 3 <= right.sum() < len(right)
    assert (min(gaps, default=1) == 0) if name.startswith("ties") else (min(gaps, default=1) >= ROUTING_GAP)
    print(f"{name:18} {len(arrays)} arrays, least gap of routing {min(gaps, default=math.inf):.1e}")
    return {name: x.numpy() for name, x in arrays.items()}, {name: x.numpy() for name, x in more.items()}


def make_half(case):
    """The first norm and the first routing in half precision. The normed embedding is no nearer to a point where
    float16 rounds the other way than float32 can miss."""
    model, _, kept, gaps = build(case)
    model(torch.tensor(case["prompts"]), use_cache=False)
    x = kept["model.embed_tokens"].double()
    x = x / (x.square().mean(-1, keepdim=True) + case["config"]["rms_norm_eps"]).sqrt()
    near = x.half()
    ulp = (torch.nextafter(near, torch.full_like(near, math.inf)) - near).double()
    assert (((x - near.double()).abs() / ulp - 0.5).abs().min() > 2e-3) and min(gaps) > ROUTING_GAP
    stays = ["model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
             *(f"model.layers.0.mlp.gate.{part}" for part in ("scores", "indices", "weights"))]  # fmt: skip
    return {name: kept[name].numpy() for name in stays}


def make_losses(case):
    """Eqs. (17)-(20) and (24), (25) term by term, from HF's logits and affinities. A row has T + 1 tokens."""
    config, (mtp_weight, balance_weight) = case["config"], case["arguments"]
    E, K, layers = (config[key] for key in ("n_routed_experts", "num_experts_per_tok", "num_hidden_layers"))
    depth, B, T = config["num_nextn_predict_layers"], len(case["prompts"]), len(case["prompts"][0]) - 1
    model, mtp, kept, _ = build(case)
    main, of_depth, balance = 0.0, [0.0] * depth, 0.0
    for row in case["prompts"]:
        arrays = {name: x.tolist() for name, x in run(model, mtp, kept, torch.tensor([row[:T]]), layers).items()}

        def cross_entropy(logits, target):
            return math.log(sum(math.exp(x) for x in logits)) - logits[target]

        main += sum(cross_entropy(arrays["lm_head"][i], row[i + 1]) for i in range(T)) / T / B
        for k in range(1, depth + 1):  # state i of module k predicts token i + k + 1
            logits = arrays[f"model.layers.{layers + k - 1}.shared_head"]
            of_depth[k - 1] += sum(cross_entropy(logits[i], row[i + k + 1]) for i in range(T - k)) / T / B
        for name, scores in arrays.items():
            if name.endswith(".gate.scores"):
                best = [sorted(range(E), key=lambda i: -s[i])[:K] for s in scores]
                for i in range(E):
                    f = E / (K * len(scores)) * sum(i in chosen for chosen in best)
                    balance += f * sum(s[i] / sum(s) for s in scores) / len(scores) / B
    total = main + mtp_weight / depth * sum(of_depth) + balance_weight * balance
    values = {"main": main} | {f"mtp.{k + 1}": x for k, x in enumerate(of_depth)} | {"balance": balance, "total": total}
    return {name: np.float64(x) for name, x in values.items()}


def update_bias(bias, load, gamma):
    """arXiv:2408.15664, Algorithm 1: b_i += gamma sign(mean load - load_i)."""
    mean = sum(load) / len(load)
    return [b + gamma * ((n < mean) - (n > mean)) for b, n in zip(bias, load, strict=True)]


def functions():
    """The cases of single functions, index entries and arrays (arguments and results), by name."""
    load, bias, gamma = [12, 3, 5, 5, 4, 4, 2, 5], [0.5, -0.25, 0.0, 1.0, 0.75, -0.5, 0.25, 2.0], 0.25
    code = (np.arange(130 * 200) * 37 % 256).astype(np.uint8).reshape(130, 200)  # ragged blocks hold every code too
    scale = np.array([[0.0123, 0.5], [1.7, 0.003]], np.float32)
    scale_of_each = scale[np.arange(130) // 128][:, np.arange(200) // 128]
    value = torch.from_numpy(code).view(torch.float8_e4m3fn).float().numpy()
    arrays = {
        "update_bias": {"arguments": {"bias": bias, "load": load, "gamma": gamma},
                        "results": {"bias": update_bias(bias, load, gamma)}},
        "fp8": {"arguments": {"code": code, "scale": scale}, "results": {"weight": value * scale_of_each}},
    }  # fmt: skip
    index = {}
    for name, function, origin, tolerance in (
        ("update_bias", "update_bias", "plain Python", TOLERANCE),
        ("fp8", "dequantize", f"torch {torch.__version__}'s float8_e4m3fn, times the scale in float32", {"4": 0}),
    ):
        equation, why, *see = WHY[name]
        index[name] = {"function": function, "equation": equation, "why": why, "see": see, "origin": origin,
                       "arguments": list(arrays[name]["arguments"]), "arrays": list(arrays[name]["results"]),
                       "tolerance": tolerance}  # fmt: skip
    return index, {name: {f"arguments/{key}": np.asarray(x) for key, x in parts["arguments"].items()}
                   | {key: np.asarray(x) for key, x in parts["results"].items()}
                   for name, parts in arrays.items()}  # fmt: skip


def shipped():
    """The checkpoint in the directory above, through from_pretrained."""
    directory = Path(__file__).resolve().parents[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    text, prompt = (
        'Once upon a time, a dog named Max sat in a café. "Hi!" said Lily,\n and 3 birds flew',
        "Once upon a time",
    )
    tokens = tokenizer(text, return_tensors="pt").input_ids
    begun = tokenizer(prompt, return_tensors="pt").input_ids
    greedy = model.generate(begun, max_new_tokens=200, do_sample=False)[0, begun.shape[1] :]
    arrays = {"tokens": tokens[0], "lm_head": model(tokens).logits[0], "greedy": greedy}
    return {"text": text, "prompt": prompt} | {name: x.numpy() for name, x in arrays.items()}


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with torch.no_grad():
        np.savez_compressed(Path(__file__).with_name("shipped.npz"), **shipped())
    watch_rotations()
    index, arrays = functions()
    cases = {name: describe(name) for name in CASES}
    cases["half"]["config"]["torch_dtype"] = "float16"
    cases["half"] |= {"origin": f"{HF}, in float16", "tolerance": {"4": 1e-5, "2": 1e-5}}
    cases["losses"] |= {
        "function": "training_objective",
        "arguments": [0.3, 0.1],
        "origin": f"the equations in plain Python, from the logits and affinities of {HF} in float64",
    }
    torch.set_default_dtype(torch.float16)
    with torch.no_grad():
        arrays["half"] = make_half(cases["half"])
    torch.set_default_dtype(torch.float64)
    with torch.no_grad(), Float64():
        arrays["losses"] = make_losses(cases["losses"])
        for name, case in cases.items():
            if name not in arrays:
                arrays[name], more = make(name, case)
                case["arrays"] = list(arrays[name])
                arrays[name] |= more
            case.setdefault("arrays", list(arrays[name]))
    lines = [f"{json.dumps(name)}: {json.dumps(case, ensure_ascii=False)}" for name, case in (cases | index).items()]
    INDEX.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    arrays = {f"{case}/{name}": x for case in [*cases, *index] for name, x in arrays[case].items()}
    np.savez_compressed(Path(__file__).with_name("parity.npz"), **arrays)
