"""Hugging Face transformers as a port that check.py can try: traces and greedy generation, in float32.

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
    torch.topk = torch.Tensor.topk = stable_topk
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


@torch.no_grad()
def main(directory):
    request = json.loads((directory / "request.json").read_text())
    do = {"trace": trace, "generate": generate}.get(request.pop("do")) or lacks("only traces and generation")
    if request.pop("dtype") == "float16":
        lacks("this port computes in float32")
    if len(request["prompts"]) > 1 and request.get("chunks"):
        lacks("rows go through one by one")
    arrays = do(directory, **request)
    safetensors.torch.save_file({name: x.contiguous().clone() for name, x in arrays.items()},
                                directory / "answer.safetensors")  # fmt: skip


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]))
