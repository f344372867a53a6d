"""Hugging Face transformers as a port that check.py can try: traces, greedy generation, components.

    pip install torch transformers
    python weights/vectors/check.py "python .ci/vectors/port_transformers.py"

It lacks MTP modules (it runs them outside of the model), reads FP8 otherwise on a CPU, and does not know Kimi-K2's
model_type. Ties, which torch.topk leaves open, go to the lowest index here. Of float64 all but `experts` compute in
float32, angles too: hence far_out, rope.release and mla_prologue's heads_16 and release depart. So does f16: it takes a
tensor from the last shard that has it, whatever the index says; and both of `dequantize`: to Fp8Dequantize, which
divides rows by scales, 138 rows with 2 scales are blocks of 69, and 576 with 5 are an error.
"""

import json
import sys
from pathlib import Path

import safetensors.torch
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf


def lacks(what):
    print(what, file=sys.stderr)
    sys.exit(3)


def stable_topk(x, k, dim=-1, largest=True, sorted=True):
    values, index = x.sort(dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), index.narrow(dim, 0, k)


def load(directory, dtype):
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] == "kimi_k2" or "quantization_config" in config:
        lacks("transformers on a CPU reads neither kimi_k2 nor FP8 as the release means it")
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    return from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()


def trace(directory, dtype, prompts, chunks, depth, start=0):
    if depth:
        lacks("transformers has its MTP modules outside of the model")
    if len(prompts) > 1 and chunks:
        lacks("rows go through one by one")
    model, arrays = load(directory, dtype), {}

    def keep(name, out):
        if name.endswith(".gate"):
            scores, weights, indices = out
            for part, x in (("scores", scores.sigmoid()), ("indices", indices), ("weights", weights)):
                keep(f"{name}.{part}", x[None])
        elif torch.is_tensor(x := out[0] if isinstance(out, tuple) else out) and x.dim() == 3 and not x.is_complex():
            name = (f"{n}/" if len(prompts) > 1 else "") + name.replace("kv_a_layernorm", "kv_latent")
            arrays[name] = torch.cat([arrays[name], x[0]]) if name in arrays else x[0]

    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, out, name=name: keep(name, out))
    for n, prompt in enumerate(prompts):  # noqa: B007
        cache = transformers.DynamicCache(config=model.config)
        sizes, positions = [c for c in chunks if c] if chunks else len(prompt), start + torch.arange(len(prompt))
        for chunk, position in zip(torch.tensor([prompt]).split(sizes, dim=1), positions.split(sizes), strict=True):
            model(chunk, position_ids=position[None], past_key_values=cache)
    return arrays


def generate(directory, dtype, prompts, max_tokens, speculate, end_tokens=()):
    if speculate or end_tokens:
        lacks("transformers finds MTP modules at layer 61 alone; end tokens come with drafts here")
    model = load(directory, dtype)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    ids = [model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)[0] for prompt in prompts]
    return {f"{n}/tokens": x[len(prompt) :] for n, (x, prompt) in enumerate(zip(ids, prompts, strict=True))}


def component(directory, dtype, component, layer):
    """The answer of a module that has the checkpoint's tensors."""
    cfg = hf.DeepseekV3Config.from_pretrained(directory)  # kimi_k2's, too
    cfg._attn_implementation, cfg._experts_implementation = "sdpa", "eager"
    w = safetensors.torch.load_file(directory / "model.safetensors")
    w = {name.removeprefix(f"model.layers.{layer}."): x for name, x in w.items()}
    given = safetensors.torch.load_file(directory / "inputs.safetensors")
    if component == "dequantize":
        matrix, scale = sorted(w.values(), key=lambda x: x.itemsize)
        return Fp8Dequantize(None).convert({"weight": matrix, "weight_scale_inv": scale})
    w = {name: x if name.endswith("_bias") else x.to(dtype) for name, x in w.items()}
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    there = sorted({int(name.split(".")[2]) for name in w if name.startswith("mlp.experts.")})
    if there:  # of 256 perhaps two; one tensor, as after loading
        cfg.n_routed_experts = len(there)
        gate, up, w["mlp.experts.down_proj"] = (torch.stack([w[f"mlp.experts.{e}.{part}_proj.weight"] for e in there])
                                                for part in ("gate", "up", "down"))  # fmt: skip
        w["mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
    x, cache = given.get("x"), given.get("cache")
    if component == "rms_norm":
        y = filled(w, "input_layernorm.", hf.DeepseekV3RMSNorm, cfg.hidden_size, cfg.rms_norm_eps)(x)
    elif component == "rope":
        cos, sin = hf.DeepseekV3RotaryEmbedding(cfg)(x, given["positions"][None])
        y = neighbours(hf.apply_rotary_pos_emb_interleave(x[None], x[None], cos, sin, unsqueeze_dim=2)[0][0])
    elif component == "router":
        logits, gates, indices = filled(w, "mlp.gate.", hf.DeepseekV3TopkRouter, cfg)(x)
        return {"scores": logits.sigmoid(), "weights": gates, "indices": indices}
    elif component == "experts":
        indices = torch.searchsorted(torch.tensor(there), given["indices"])
        y = filled(w, "mlp.experts.", hf.DeepseekV3Experts, cfg)(x, indices, given["weights"])
    elif component == "moe":
        y = filled(w, "mlp.", hf.DeepseekV3MoE, cfg)(x[None])[0]
    elif component == "mla":
        y = filled(w, "self_attn.", hf.DeepseekV3Attention, cfg, 0)(x[None], **behind(cfg, x, cache))[0][0]
    elif component == "block":
        y = filled(w, "", hf.DeepseekV3DecoderLayer, cfg, 0)(x[None], **behind(cfg, x, cache))[0]
    elif component == "mla_prologue":
        return mla_prologue(filled(w, "self_attn.", hf.DeepseekV3Attention, cfg, 0), cfg, x, int(given["start"]))
    elif component == "mtp_input":
        module = filled(w, "", MtpLayer, cfg, torch.nn.Identity, hf.DeepseekV3RMSNorm, 0, False)
        module.mtp_block.forward = lambda x, **kwargs: x
        y = module(w["model.embed_tokens.weight"][given["tokens"]][None], given["h"][None], *[None] * 4)[0]
    else:
        lacks("transformers expands cached latents, multiplies FP8 on a GPU, verifies with its own random numbers")
    return {"y": y}


def filled(w, prefix, module, *args):
    """module(*args); a tensor that is not there stays without numbers, and whoever reads it fails."""
    with torch.device("meta"):
        module = module(*args)
    w = {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
    module.load_state_dict(w, strict=False, assign=True)
    return module.eval()


def neighbours(x):
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def behind(cfg, x, cache, start=0):
    """What attention gets beside x: the positions, and a cache, whose keys have their pairs as halves."""
    past, positions = transformers.DynamicCache(config=cfg), start + len(cache) + torch.arange(len(x))[None]
    latent, key = cache.tensor_split([cfg.kv_lora_rank], dim=-1)
    past.update(latent[None, None], torch.cat([key[:, 0::2], key[:, 1::2]], dim=-1)[None, None], 0)
    return {"position_embeddings": hf.DeepseekV3RotaryEmbedding(cfg)(x, positions), "past_key_values": past,
            "attention_mask": create_causal_mask(cfg, x[None], None, past, position_ids=positions)}  # fmt: skip


def mla_prologue(attention, cfg, x, start):
    """Attention that does nothing but hand on its queries; the rest is in its cache."""
    given, N = behind(cfg, x, x.new_empty(0, cfg.kv_lora_rank + cfg.qk_rope_head_dim), start), cfg.qk_nope_head_dim
    attention.expand_kv, attention.o_proj = lambda *latent_and_key: latent_and_key, torch.nn.Identity()
    transformers.AttentionInterface.register("none", lambda module, q, *rest, **kwargs: (q.transpose(1, 2), None))
    cfg._attn_implementation = "none"
    q = attention(x[None], **given)[0].view(len(x), cfg.num_attention_heads, -1)
    latent, key = given["past_key_values"].layers[0].keys[0, 0], given["past_key_values"].layers[0].values[0, 0]
    return {"q_nope": q[..., :N], "q_rope": neighbours(q[..., N:]), "kv_latent": latent, "k_rope": neighbours(key)}


@torch.no_grad()
def main(directory):
    request = json.loads((directory / "request.json").read_text())
    do, dtype = request.pop("do"), getattr(torch, request.pop("dtype"))
    dtype = torch.float32 if dtype == torch.float64 and request.get("component") != "experts" else dtype
    do = {"trace": trace, "generate": generate, "component": component}.get(do) or lacks(f"no {do}")
    torch.topk = torch.Tensor.topk = stable_topk
    arrays = {name: x.contiguous().clone() for name, x in do(directory, dtype, **request).items()}
    safetensors.torch.save_file(arrays, directory / "answer.safetensors")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]))
