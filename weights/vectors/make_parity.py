"""Make parity.npz: what Hugging Face's DeepSeek-V3 computes on tiny models, for a test that needs no Hugging Face.

    pip install torch transformers numpy        # made with transformers 5.23.0, torch 2.13.0
    python make_parity.py [parity.npz]          # a minute on one core

The judge is independent: nothing here imports the file under test. Every operation runs in float64, also those that
the modeling code asks to run in float32, so that an implementation in float64 must agree to rounding, about 1e-12.

Keys are "{case}/{name}". `config` (config.json), `scale` and `shift` are JSON strings, `tokens` is the prompt (T,);
then activations (T, ...), named by the checkpoint's module that puts them out, as in
    model.layers.1.self_attn              the attention, before the residual is added; likewise `.mlp`
    model.layers.1.self_attn.kv_latent    the normed latent, what a cache keeps
    model.layers.1.mlp.gate.indices       the chosen experts, sorted, and `.weights`, their gates in that order
    model.layers.1                        the block, with the residual
    model.norm, lm_head                   the final states, the logits
Case v3_yarn has them all and `greedy`, the prompt's continuation; the others have the last layer, the first routing,
and what is above the layers. Case mtp adds the MTP module, layer 2: eh_proj, the block, `shared_head` (its logits).

Weights are not stored: `formula` makes them from their names. Tensors whose name ends with a key of `scale` are
multiplied by its value, then those that end with a key of `shift` get its value added.
"""

import json
import math
import re
import sys
import zlib

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

YARN = dict(type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
            mscale=1.0, mscale_all_dim=1.0)  # fmt: skip
BASE = dict(
    model_type="deepseek_v3", vocab_size=48, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=3, q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
    attention_bias=False, intermediate_size=40, first_k_dense_replace=1, moe_intermediate_size=12, n_shared_experts=1,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, norm_topk_prob=True,
    routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, hidden_act="silu",
    rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=YARN, max_position_embeddings=163840,
    tie_word_embeddings=False, num_nextn_predict_layers=0,
)  # fmt: skip
PLAIN = dict(n_group=1, topk_group=1)  # no groups
CASES = {  # what differs from BASE
    "v3_yarn": dict(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                    n_routed_experts=16, num_experts_per_tok=4),
    "hf5_spelling": dict(rope_theta=25000.0, rope_scaling=YARN | dict(
        factor=8.0, original_max_position_embeddings=64, beta_fast=16, beta_slow=2, mscale_all_dim=0.5)),
    "moonlight": PLAIN | dict(q_lora_rank=None, n_shared_experts=2, rms_norm_eps=1e-5, rope_theta=50000.0,
                              rope_scaling=None, routed_scaling_factor=2.446, max_position_embeddings=8192),
    "many_groups": dict(num_hidden_layers=3, first_k_dense_replace=2, n_routed_experts=16, n_group=8, topk_group=3,
                        num_experts_per_tok=4, rope_scaling=None),
    "tied": dict(tie_word_embeddings=True),
    "unnormalised": dict(norm_topk_prob=False),
    "mscale_707": dict(rope_scaling=YARN | dict(factor=4.0, original_max_position_embeddings=8, mscale=0.707,
                                                mscale_all_dim=0.707)),  # longer than the original context
    "mscale_all_dim_0": dict(rope_scaling=YARN | dict(factor=4.0, original_max_position_embeddings=6,
                                                      mscale_all_dim=0.0)),  # a ramp of no width, too
    "truncate_false": dict(rope_scaling=YARN | dict(truncate=False)),
    "attention_bias": dict(attention_bias=True, rope_interleave=False),
    "negative_bias": {},  # see SHIFT
    "all_dense": dict(first_k_dense_replace=2),
    "k2_like": PLAIN | dict(model_type="kimi_k2", n_routed_experts=16, num_experts_per_tok=4, rope_theta=50000.0,
                            routed_scaling_factor=2.827, rope_scaling=YARN | dict(factor=32.0)),
    "mtp": dict(num_nextn_predict_layers=1),
}  # fmt: skip
HF5 = "hf5_spelling", "moonlight"  # config.json as transformers 5 writes it: rope_parameters instead of rope_scaling
SCALE = {"moonlight": {"kv_a_proj_with_mqa.weight": 0.01}}  # small latents: the eps of their norm shows
SHIFT = {"negative_bias": {"e_score_correction_bias": -5.0}}  # masking with 0 instead of -inf shows
T, NEW, LEAST_ROUTING_GAP, LEAST_TOKEN_GAP = 12, 12, 1e-4, 1e-3  # no choice may hang on the last digits


def formula(name, shape):
    """The weights called name: u in [-1, 1), a 32-bit hash of name and index, scaled by what the tensor is for."""
    h = (zlib.crc32(name.encode()) + np.arange(math.prod(shape), dtype=np.uint64) * 2654435769) & 0xFFFFFFFF
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    u = ((h ^ h >> 16) / 2**31 - 1).reshape(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * u
    if name.endswith("e_score_correction_bias"):
        return 0.1 * u
    if name.endswith(".bias"):
        return 0.3 * u
    if name.endswith("embed_tokens.weight"):
        return 1.7 * u
    return u * math.sqrt(3 / shape[-1]) * 1.5


class Float64(TorchFunctionMode):
    """Within it a request for float32 gives float64; an operation that yields a narrower float is an error."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        widen = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        func = torch.Tensor.double if func is torch.Tensor.float else func
        out = func(*map(widen, args), **{key: widen(x) for key, x in (kwargs or {}).items()})
        for x in out if isinstance(out, tuple) else [out]:
            assert not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64), func
        return out


def checkpoint_name(path, layers):
    """The checkpoint's name of a module or tensor of HF's model or, where layers come first, of its MtpModel."""
    path = path.replace("post_norm", "shared_head.norm")
    return re.sub(r"^layers\.(\d+)(\.mtp_block)?", lambda m: f"model.layers.{layers + int(m[1])}", path)


def fill(model, case, layers):
    """Set the model's weights. HF holds experts fused, gate above up, where the checkpoint has a matrix of each."""

    def weight(name, shape):
        w = formula(name, tuple(shape))
        for suffix, factor in SCALE.get(case, {}).items():
            w = w * factor if name.endswith(suffix) else w
        for suffix, term in SHIFT.get(case, {}).items():
            w = w + term if name.endswith(suffix) else w
        return torch.from_numpy(w)

    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        name = checkpoint_name(path, layers)
        assert tensor.dtype == torch.float64, name
        if path.startswith(("embed_tokens", "shared_head")) or "rotary_emb" in path:
            continue  # MtpModel's, shared with the main model; frequencies
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stem, part = name.rsplit(".", 1)
            parts, (E, rows, columns) = part.removesuffix("_proj").split("_"), tensor.shape
            rows = rows // len(parts)
            w = [weight(f"{stem}.{e}.{p}_proj.weight", (rows, columns)) for e in range(E) for p in parts]
            tensor.copy_(torch.cat(w).reshape(tensor.shape))
        else:
            tensor.copy_(weight(name, tensor.shape))


def gap(values, k):
    """How far the k-th largest of the last axis stands above the next, in the closest row."""
    ordered = torch.sort(values, descending=True)[0]
    return math.inf if k >= values.shape[-1] else float((ordered[..., k - 1] - ordered[..., k]).min())


def watch(model, layers, kept, gaps):
    """Hook the modules whose outputs are named in this file's docstring: kept[name] = output; gaps, of the routings."""
    wanted = (r"lm_head|model\.(embed_tokens|norm|layers\.\d+(\.(eh_proj|input_layernorm|post_attention_layernorm|"
              r"self_attn|self_attn\.kv_a_layernorm|mlp|mlp\.gate))?)")  # fmt: skip

    def hook(module, _, out, name):
        if not name.endswith(".gate"):
            kept[name.replace("kv_a_layernorm", "kv_latent")] = (out[0] if isinstance(out, tuple) else out)[0].numpy()
            return
        logits, gates, index = out
        choice = (logits.sigmoid() + module.e_score_correction_bias).unflatten(-1, (module.num_group, -1))
        group = choice.topk(2)[0].sum(-1)
        masked = group < group.topk(module.topk_group)[0][:, -1:]
        gaps.append(gap(group, module.topk_group))
        gaps.append(gap(choice.masked_fill(masked[..., None], -math.inf).flatten(-2), module.top_k))
        index, order = index.sort()
        kept[f"{name}.indices"], kept[f"{name}.weights"] = index.numpy(), gates.gather(1, order).numpy()

    for path, module in model.named_modules():
        name = checkpoint_name(path, layers)
        if re.fullmatch(wanted, name) and not (path.startswith("layers") and re.fullmatch(r"layers\.\d+", path)):
            module.register_forward_hook(lambda *call, name=name: hook(*call, name))


def build(case):
    """-> the case's config.json as a dict, HF's model, and HF's MTP model or None."""
    config = BASE | CASES[case]
    hf = DeepseekV3Config(**{k: v for k, v in json.loads(json.dumps(config)).items() if k != "model_type"})
    if case in HF5:
        config = json.loads(hf.to_json_string())
    hf._attn_implementation, hf._experts_implementation = "eager", "eager"
    model = DeepseekV3ForCausalLM(hf).eval()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config["tie_word_embeddings"]
    mtp = MtpModel(model, 1).eval() if config["num_nextn_predict_layers"] else None
    for part in (model, mtp):
        if part:
            fill(part, case, hf.num_hidden_layers)
    return config, model, mtp


def run(case, config, model, mtp, tokens):
    """One prompt -> its arrays by name, and the smallest gaps of its routings and (v3_yarn) of its greedy tokens."""
