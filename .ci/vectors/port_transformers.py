"""Hugging Face transformers as a port that check.py can try: traces, greedy generation, components.

    pip install torch transformers
    python weights/vectors/check.py "python .ci/vectors/port_transformers.py"

It lacks MTP modules (it runs them outside of the model), reads FP8 otherwise on a CPU, and does not know Kimi-K2's
model_type. Ties, which torch.topk leaves open, go to the lowest index here.
"""

import json
import sys
from pathlib import Path

import safetensors.torch
import torch
import transformers
from transformers.generation.utils import _speculative_sampling
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


def load(directory):
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] == "kimi_k2" or "quantization_config" in config:
        lacks("transformers on a CPU reads neither kimi_k2 nor FP8 as the release means it")
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    return from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()


def trace(directory, prompts, chunks, depth):
    if depth:
        lacks("transformers has its MTP modules outside of the model")
    model, arrays = load(directory), {}

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
        for chunk in torch.tensor([prompt]).split([c for c in chunks if c] if chunks else len(prompt), dim=1):
            model(chunk, past_key_values=cache)
    return arrays


def generate(directory, prompts, max_tokens, speculate):
    if speculate:
        lacks("transformers finds MTP modules at layer 61 alone")
    model = load(directory)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    ids = [model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)[0] for prompt in prompts]
    return {f"{n}/tokens": x[len(prompt) :] for n, (x, prompt) in enumerate(zip(ids, prompts, strict=True))}


# ---- Components: what a module of transformers answers, of the checkpoint's tensors by name ------------------------


def component(directory, component, layer, dtype):
    if component not in COMPONENTS:
        lacks(LACKS[component])
    config = hf.DeepseekV3Config.from_pretrained(directory)  # kimi_k2's, too
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    given = safetensors.torch.load_file(directory / "inputs.safetensors")
    if component not in ("dequantize", "verify"):
        dtype = torch.float32 if dtype == torch.float64 and component != "experts" else dtype  # as most do inside
        weights = {name: x if name.endswith("_bias") else x.to(dtype) for name, x in weights.items()}
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    answer = COMPONENTS[component](config, weights, f"model.layers.{layer}", **given)
    return answer if isinstance(answer, dict) else {"y": answer}


def filled(weights, name, module, *args):
    """module(*args) with the tensors of that name; those of the experts are one tensor, as after loading."""
    weights = {key.removeprefix(f"{name}."): x for key, x in weights.items() if key.startswith(f"{name}.")}
    prefix = {hf.DeepseekV3DecoderLayer: "mlp.experts.", hf.DeepseekV3MoE: "experts."}.get(module, "")
    if prefix and f"{prefix}0.up_proj.weight" in weights:
        experts = {key: weights.pop(key) for key in list(weights) if key.startswith(prefix)}
        weights |= {prefix + part: x for part, x in merged(experts, prefix).items()}
    with torch.device("meta"):
        module = module(*args)
    module.load_state_dict(weights, assign=True)
    return module.eval()


def merged(weights, prefix):
    """Of the experts that are there, in order."""
    numbers = sorted({int(key.removeprefix(prefix).split(".")[0]) for key in weights})
    gate, up, down = (torch.stack([weights[f"{prefix}{e}.{part}_proj.weight"] for e in numbers])
                      for part in ("gate", "up", "down"))  # fmt: skip
    return {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}


def rms_norm(config, weights, layer, x):
    return filled(weights, f"{layer}.input_layernorm", hf.DeepseekV3RMSNorm, config.hidden_size, config.rms_norm_eps)(x)


def rope(config, weights, layer, x, positions):
    cos, sin = hf.DeepseekV3RotaryEmbedding(config)(x, positions[None])
    return neighbours(hf.apply_rotary_pos_emb_interleave(x[None], x[None], cos, sin, unsqueeze_dim=2)[0][0])


def halves(x):
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def neighbours(x):
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def router(config, weights, layer, x):
    scores, gates, indices = filled(weights, f"{layer}.mlp.gate", hf.DeepseekV3TopkRouter, config)(x)
    return {"scores": scores.sigmoid(), "indices": indices, "weights": gates}


def experts(config, weights, layer, x, indices, **given):
    """Experts that are not there are left out, and the others' numbers move up."""
    numbers = sorted({int(name.split(".")[5]) for name in weights})
    config.n_routed_experts = len(numbers)
    parts = merged(weights, f"{layer}.mlp.experts.")
    module = filled({f"experts.{part}": x for part, x in parts.items()}, "experts", hf.DeepseekV3Experts, config)
    return module(x, torch.searchsorted(torch.tensor(numbers), indices), given["weights"])


def moe(config, weights, layer, x):
    return filled(weights, f"{layer}.mlp", hf.DeepseekV3MoE, config)(x[None])[0]


def behind(config, x, cache, start):
    """What attention gets beside x: the positions from start on, and the entries before, whose keys it has as halves."""
    past, positions = transformers.DynamicCache(config=config), torch.arange(start, start + len(x))[None]
    if len(cache):
        latent, key = cache.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        past.update(latent[None, None], halves(key)[None, None], 0)
    return {"position_embeddings": hf.DeepseekV3RotaryEmbedding(config)(x, positions), "past_key_values": past,
            "attention_mask": create_causal_mask(config, x[None], None, past, position_ids=positions)}  # fmt: skip


def mla(config, weights, layer, x, cache):
    attention = filled(weights, f"{layer}.self_attn", hf.DeepseekV3Attention, config, 0)
    return attention(x[None], **behind(config, x, cache, len(cache)))[0][0]


def block(config, weights, layer, x, cache):
    module = filled(weights, layer, hf.DeepseekV3DecoderLayer, config, 0)
    return module(x[None], **behind(config, x, cache, len(cache)))[0]


def mla_prologue(config, weights, layer, x, start):
    """Attention that hands on its queries; the cache has the rest."""
    given = behind(config, x, x[:0], int(start))
    transformers.AttentionInterface.register("query", lambda module, query, *rest, **more: (query.transpose(1, 2), None))
    config._attn_implementation = "query"

    def without_output(*args):
        attention = hf.DeepseekV3Attention(*args)
        attention.kv_b_proj = attention.o_proj = torch.nn.Identity()
        attention.expand_kv = lambda latent, key: (key, latent)
        return attention

    name = f"{layer}.self_attn"
    weights = {key: x for key, x in weights.items() if not key.startswith((f"{name}.kv_b_proj", f"{name}.o_proj"))}
    query = filled(weights, name, without_output, config, 0)(x[None], **given)[0]
    q_nope, q_rope = query.view(len(x), config.num_attention_heads, -1).split(
        [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)  # fmt: skip
    held = given["past_key_values"].layers[0]
    return {"q_nope": q_nope, "q_rope": neighbours(q_rope), "kv_latent": held.keys[0, 0],
            "k_rope": neighbours(held.values[0, 0])}  # fmt: skip


def mtp_input(config, weights, layer, h, tokens):
    """An MTP layer around a block that does nothing."""
    class Through(torch.nn.Identity):
        def forward(self, x, **kwargs):
            return x

    module = filled(weights, layer, MtpLayer, config, Through, hf.DeepseekV3RMSNorm, 0, False)
    return module(weights["model.embed_tokens.weight"][tokens][None], h[None], None, None, None, None)[0]


def dequantize(config, weights, layer):
    matrix, scale = sorted(weights.values(), key=lambda x: x.itemsize)
    try:
        return {"weight": Fp8Dequantize(None).convert({"weight": matrix, "weight_scale_inv": scale})["weight"]}
    except ValueError as e:
        lacks(e)


def verify(config, weights, layer, p, q, draft, uniform):
    """Its two random choices get the given numbers."""
    def row(p, q, draft, uniform):
        torch.rand_like = lambda x: uniform[:1]
        torch.multinomial = lambda x, num_samples: torch.searchsorted(x.cumsum(-1), uniform[None, 1:], right=True)
        tokens, accepted = _speculative_sampling(draft[None, None], q.log()[None, None], 1, torch.stack([p, p]).log()[None])
        return accepted, tokens[0, 0]

    accepted, token = zip(*map(row, p, q, draft, uniform), strict=True)
    return {"accepted": torch.stack(accepted), "token": torch.stack(token)}


COMPONENTS = {f.__name__: f for f in (rms_norm, rope, router, experts, moe, mla, block, mla_prologue, mtp_input,
                                      dequantize, verify)}  # fmt: skip
LACKS = {"attention_core": "transformers expands the cached latents: it has no absorbed form",
         "fp8_linear": "transformers multiplies FP8 by kernels from the Hub, on a GPU"}  # fmt: skip


@torch.no_grad()
def main(directory):
    request = json.loads((directory / "request.json").read_text())
    do, dtype = request.pop("do"), getattr(torch, request.pop("dtype"))
    torch.topk = torch.Tensor.topk = stable_topk
    if do == "component":
        arrays = component(directory, dtype=dtype, **request)
    else:
        do = {"trace": trace, "generate": generate}.get(do) or lacks("only traces, generation and components")
        if dtype == torch.float16:
            lacks("this port computes traces in float32")
        if len(request["prompts"]) > 1 and request.get("chunks"):
            lacks("rows go through one by one")
        arrays = do(directory, **request)
    safetensors.torch.save_file({name: x.contiguous().clone() for name, x in arrays.items()},
                                directory / "answer.safetensors")  # fmt: skip


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]))
