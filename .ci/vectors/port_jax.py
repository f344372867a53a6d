"""Part I of deepseek_v3.py under jax.numpy as a port that check.py can try: the definitions, which have no cache; that
of a component stands before the new latents. Components' experts are part II's `moe_chosen`.

    pip install jax
    python weights/vectors/check.py "python .ci/vectors/port_jax.py" --timeout 300
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weights" / "vectors"))
import port

jax.config.update("jax_enable_x64", True)
dsv3, load = port.dsv3, port.load
READ_BY_NUMPY = ("dequantize", "fp8_linear", "verify")


def under_jax(directory, dtype):
    """The checkpoint's tensors as arrays of JAX, read by NumPy."""
    dsv3.xp = np
    w, cfg = load(directory, dtype)
    arrays = {name: w[name] for name in w.shapes}
    arrays = {name: x.whole() if isinstance(x, dsv3.Stored) else x for name, x in arrays.items()}
    dsv3.xp = jnp
    return to_jax(arrays), cfg


def to_jax(arrays):
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def cached(w, cfg, name, cache, x):
    """The rotation of the new tokens, and attention as defined that sees the entries before them."""

    def attend(q_nope, q_rope, kv_TL, *rest):
        return dsv3.mla_naive(q_nope, q_rope, jnp.concatenate([cache, kv_TL]), *rest)

    return dsv3.rotations(len(cache), len(x), cfg, x.dtype), attend


def generate(directory, dtype, prompts, max_tokens, speculate):
    w, cfg = under_jax(directory, dtype)
    return {f"{n}/tokens": dsv3.generate_greedy(prompt, w, cfg, max_tokens) for n, prompt in enumerate(prompts)}


def main(directory):
    request = json.loads((directory / "request.json").read_text())
    numpy_alone = request["do"] == "dequantize" or request.get("component") in READ_BY_NUMPY
    if numpy_alone or request.get("chunks") or request.get("speculate"):
        print("the definitions have no cache or drafts, read no file, and quantise nothing", file=sys.stderr)
        return 3
    port.load, port.cached, dsv3.xp, dsv3.attention_in_pieces = under_jax, cached, jnp, dsv3.attention
    dsv3.top_k = lambda score, k: jnp.argsort(-score, axis=-1, stable=True)[..., :k]
    port.DO["generate"] = generate
    for name, part in list(port.COMPONENTS.items()):
        port.COMPONENTS[name] = lambda w, cfg, name, part=part, **given: part(to_jax(w), cfg, name, **to_jax(given))
    answer = port.answer(directory, request)
    dsv3.write_trace(directory / "answer.safetensors", answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
