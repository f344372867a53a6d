"""Make parity.npz: what Hugging Face's DeepSeek-V3 computes on tiny models, for a test that needs no Hugging Face.

    pip install numpy torch==2.13.0 transformers==5.23.0
    python make_parity.py        # some seconds on one core; writes parity.npz and shipped.npz beside this file

The judge is independent: nothing here imports the file under test. Every operation runs in float64, also those that
HF's modeling code asks to run in float32, so that another float64 implementation must agree to rounding.

Keys are "{case}/{name}". `config` (a config.json), `scale` and `shift` are JSON strings, `tokens` is the prompt (T,);
the rest are activations (T, ...), named by the module of the checkpoint that puts them out, such as
    model.layers.1.self_attn              attention, before the residual is added; likewise `.mlp`
    model.layers.1.self_attn.kv_latent    the normed latent, what a cache keeps
    model.layers.1.mlp.gate.indices       the chosen experts, sorted, and `.weights`, their gates in the same order
    model.layers.1                        the block, with the residual
    model.norm, lm_head                   the final states, the logits
v3_yarn has all of them. The other cases have the last layer, the first routing, and what comes after the layers; of
the MTP modules too, model.layers.2 and on: `.eh_proj`, the block, and the logits as `.shared_head`. Module k has
T - k rows, one for each pair (state i of the module before, token i + k). The modules are run by HF's own MtpModel,
which hands the state after `.shared_head.norm` on to the next. long has only `lm_head_tail`, its last 8 rows.

The cases in NEW also have `greedy`, so many tokens that continue the prompt; and with an MTP module `drafts`, where
drafts[i] is its guess of token i + 2 of s, the prompt and greedy: the likeliest of the pair (state i, s[i + 1]), for
all pairs of s at once.

Weights are not stored but made from their names by `formula`. Then tensors whose name ends with a key of `scale` are
multiplied by its value, and those whose name ends with a key of `shift` get its value added.

shipped.npz is what HF makes of the checkpoint in the directory above, loaded as anyone would, in float32: of a text its
token ids and logits (`text`, `tokens`, `lm_head`), and the greedy continuation of a prompt (`prompt`, `greedy`).
"""

import copy
import functools
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM


def yarn(key="type", factor=40.0, original=4096, **changes):
    return {key: "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0} | changes  # fmt: skip


T, LONG = 14, 200  # tokens of a prompt, and of the case long
NEW = {"v3_yarn": 12, "mtp": 24, "mtp_small_vocab": 24}
SEED = {"long": 10, "mtp_small_vocab": 14}  # draws the prompt, else 0; where it leads to a near tie, take another
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
    "negative_bias": {},  # see SHIFT
    "all_dense": dict(first_k_dense_replace=2),
    "k2_like": BIGGER | ONE_GROUP | dict(model_type="kimi_k2", routed_scaling_factor=2.827,
                                         rope_scaling=yarn(factor=32.0)),
    "mtp": dict(num_nextn_predict_layers=1),
    "mtp_small_vocab": dict(num_nextn_predict_layers=1, vocab_size=6),  # some drafts are right by chance
    "mtp_depth_2": dict(num_nextn_predict_layers=2),
    "v2_lite": V2 | dict(topk_method="greedy", q_lora_rank=None, n_group=1, topk_group=1, routed_scaling_factor=1.0),
    "v2": V2 | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
}  # fmt: skip
HF5 = "hf5_spelling", "moonlight"  # config.json as transformers 5 writes it: rope_parameters for rope_scaling
SCALE = {"moonlight": {"kv_a_proj_with_mqa.weight": 0.01}}  # latents so small that the eps of their norm shows
SHIFT = {"negative_bias": {"e_score_correction_bias": -5.0}}  # experts masked with 0 would win over all others


def formula(name, shape):
    """The tensor called name: u in [-1, 1), a 32-bit hash of name and index, scaled by the tensor's purpose."""
    h = (zlib.crc32(name.encode()) + np.arange(math.prod(shape), dtype=np.uint64) * 2654435769) & 0xFFFFFFFF
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    u = ((h ^ h >> 16) / 2**31 - 1).reshape(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * u
    if name.endswith("bias"):
        return u * (0.1 if name.endswith("e_score_correction_bias") else 0.3)
    return u * 1.7 if name.endswith("embed_tokens.weight") else u * math.sqrt(3 / shape[-1]) * 1.5


class Float64(TorchFunctionMode):
    """Within it a request for float32 gives float64, and an operation that yields a narrower float is an error."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if x is torch.float32 else x for x in args]
        out = func(*args, **{k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not torch.is_tensor(x) or not x.is_floating_point() or x.dtype == torch.float64, func
        return out


def checkpoint_name(path, layers):
    """The checkpoint's name of HF's module or tensor. MtpModel's own layers.0 is the layer after all."""
    path = re.sub(r"^layers\.(\d+)(\.mtp_block)?", lambda found: f"model.layers.{layers + int(found[1])}", path)
    return path.replace("post_norm", "shared_head.norm")


def fill(model, layers, scale, shift):
    """Set all weights. HF fuses experts to (E, rows, in), gate above up; the checkpoint has each matrix by itself."""

    def weight(name, shape):
        factor = math.prod(x for suffix, x in scale.items() if name.endswith(suffix))
        return torch.from_numpy(formula(name, shape) * factor + sum(x for s, x in shift.items() if name.endswith(s)))

    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        name, shape = checkpoint_name(path, layers), tuple(tensor.shape)
        assert tensor.dtype == torch.float64, name
        if tensor.dim() == 3:
            parts = ["gate", "up"] if name.endswith("gate_up_proj") else ["down"]
            names = [f"{name.rsplit('.', 1)[0]}.{e}.{part}_proj.weight" for e in range(shape[0]) for part in parts]
            shape_of_one = shape[1] // len(parts), shape[2]
            tensor.copy_(torch.stack([weight(name, shape_of_one) for name in names]).reshape(shape))
        elif "rotary_emb" not in path and not path.startswith(("embed_tokens", "shared_head")):  # shared by MtpModel
            tensor.copy_(weight(name, shape))


def gap(x, k):
    """How far the k-th largest of the last axis stands out from the next, at least."""
    x = x.sort(descending=True)[0]
    return float((x[..., k - 1] - x[..., k]).min()) if k < x.shape[-1] else math.inf


def watch(model, layers, kept, gaps):
    """From now on a call puts its modules' outputs into kept, by name, and into gaps how near a tie each choice was."""
    named = (r"lm_head|model\.(embed_tokens|norm|layers\.\d+(\.(eh_proj|input_layernorm|post_attention_layernorm|"
             r"mlp|mlp\.gate|self_attn|self_attn\.kv_a_layernorm))?)")  # fmt: skip

    def keep(name, module, inputs, out):
        if not name.endswith(".gate"):
            kept[name.replace("kv_a_layernorm", "kv_latent")] = out[0][0] if isinstance(out, tuple) else out[0]
            return
        logits, gates, index = out
        kept[f"{name}.indices"], order = index.sort()
        kept[f"{name}.weights"] = gates.gather(1, order)
        v2 = isinstance(model, DeepseekV2ForCausalLM)
        choice = logits.softmax(-1) if v2 else logits.sigmoid() + module.e_score_correction_bias
        choice = choice.unflatten(-1, (module.num_group, -1))
        group = choice.max(-1)[0] if v2 else choice.topk(2)[0].sum(-1)
        lost = group < group.topk(module.topk_group)[0][:, -1:]
        gaps.append(gap(group, module.topk_group))
        gaps.append(gap(choice.masked_fill(lost[..., None], -math.inf).flatten(1), module.top_k))

    for path, module in model.named_modules():
        name = checkpoint_name(path, layers)
        if re.fullmatch(named, name) and not re.fullmatch(r"layers\.\d+", path):  # HF's wrapper of an MTP module
            module.register_forward_hook(functools.partial(keep, name))


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


def make(case):
    """-> the case's arrays by name."""
    config, scale, shift = BASE | CASES[case], SCALE.get(case, {}), SHIFT.get(case, {})
    layers, first = config["num_hidden_layers"], config["first_k_dense_replace"]
    depth = config["num_nextn_predict_layers"]
    kind = DeepseekV2Config if config.get("model_type") == "deepseek_v2" else DeepseekV3Config
    hf = kind(**copy.deepcopy({k: v for k, v in config.items() if k != "model_type"}))
    config = json.loads(hf.to_json_string()) if case in HF5 else RELEASE | config
    hf._attn_implementation = hf._experts_implementation = "eager"
    causal_lm = DeepseekV2ForCausalLM if kind is DeepseekV2Config else DeepseekV3ForCausalLM
    model, kept, gaps = causal_lm(hf).eval(), {}, []
    mtp = MtpModel(model, depth).eval() if depth else None
    for part in [model, mtp] if mtp else [model]:
        fill(part, layers, scale, shift)
        watch(part, layers, kept, gaps)
    size = 1, LONG if case == "long" else T
    tokens = torch.from_numpy(np.random.default_rng(SEED.get(case, 0)).integers(0, config["vocab_size"], size))
    model(tokens, use_cache=False)
    arrays, modules = dict(kept), [f"model.layers.{layers + k}" for k in range(depth)]
    if mtp:  # it shares lm_head, whose entry in kept is the last module's from here on
        logits = mtp_logits(tokens, kept["model.norm"], mtp)
        arrays |= {name: x for name, x in kept.items() if name.startswith(tuple(modules))}
        arrays |= {f"{module}.shared_head": x for module, x in zip(modules, logits, strict=True)}
    if case == "long":
        arrays = {"lm_head_tail": arrays["lm_head"][-8:]}
    elif case != "v3_yarn":
        last = "|".join([f"model.layers.{layers - 1}", *modules])
        stays = rf"({last})(\..*)?|model\.layers\.{first}\.mlp\.gate.*|model\.norm|lm_head"
        arrays = {name: x for name, x in arrays.items() if re.fullmatch(stays, name)}
    if case in NEW:
        longer = continued(tokens, NEW[case], model)
        arrays["greedy"] = longer[0, T:]
        if mtp:
            model(longer, use_cache=False)
            logits = mtp_logits(longer, kept["model.norm"], mtp)[0]
            assert gap(logits[T - 1 :], 1) >= TOKEN_GAP
            arrays["drafts"] = logits.argmax(-1)
            right = arrays["drafts"][T - 1 : -1] == longer[0, T + 1 :]
            assert case != "mtp_small_vocab" or 3 <= right.sum() < len(right)
    assert min(gaps, default=1) >= ROUTING_GAP
    print(f"{case:18} {len(arrays)} arrays, least gap of routing {min(gaps, default=math.inf):.1e}")
    texts = {"config": json.dumps(config), "scale": json.dumps(scale), "shift": json.dumps(shift)}
    return texts | {name: x.numpy() for name, x in ({"tokens": tokens[0]} | arrays).items()}


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
    torch.set_default_dtype(torch.float64)
    with torch.no_grad(), Float64():
        cases = {case: make(case) for case in CASES}
    arrays = {f"{case}/{name}": x for case, arrays in cases.items() for name, x in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("parity.npz"), **arrays)
