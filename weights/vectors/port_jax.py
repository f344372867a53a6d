"""Part I of deepseek_v3.py under jax.numpy as a port that check.py can try: the definitions have no cache.

    pip install jax
    python weights/vectors/check.py "python weights/vectors/port_jax.py" --timeout 300
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import port

jax.config.update("jax_enable_x64", True)
dsv3 = port.dsv3


def arrays_of(directory, dtype):
    """The checkpoint's tensors as arrays of JAX, read by NumPy."""
    w, cfg = port.load(directory, dtype)
    whole = {name: w[name] for name in w.shapes}
    return {name: jnp.asarray(x.whole() if isinstance(x, dsv3.Matrix) else x) for name, x in whole.items()}, cfg


def under_jax():
    dsv3.xp, dsv3.top_k = jnp, lambda score, k: jnp.argsort(-score, axis=-1, stable=True)[..., :k]


def trace(directory, dtype, prompts, chunks, depth):
    (w, cfg), arrays = arrays_of(directory, dtype), {}
    under_jax()
    for n, prompt in enumerate(prompts):
        with dsv3.recording() as named:
            h_BTD = dsv3.forward(np.array([prompt]), w, cfg)
            dsv3.record("lm_head", dsv3.head(h_BTD, w, cfg))
            for k in range(1, depth + 1):
                h_BTD = dsv3.mtp(k, h_BTD[:, :-1], np.array([prompt[k:]]), w, cfg)
                dsv3.record(f"model.layers.{cfg.num_hidden_layers + k - 1}.shared_head", dsv3.head(h_BTD, w, cfg))
        arrays |= {(f"{n}/" if len(prompts) > 1 else "") + name: np.asarray(x[0]) for name, x in named.items()}
    return arrays


def losses(directory, dtype, prompts, mtp_weight, balance_weight):
    w, cfg = arrays_of(directory, dtype)
    under_jax()
    total, parts = dsv3.training_objective(w, np.array(prompts), cfg, mtp_weight, balance_weight)
    named = {"main": parts["main"], "balance": parts["balance"], "total": total}
    return {name: np.asarray(x) for name, x in (named | {f"mtp.{k}": x for k, x in enumerate(parts["mtp"], 1)}).items()}


def main(directory):
    request = json.loads((directory / "request.json").read_text())
    if request["do"] not in ("trace", "losses") or request.get("chunks"):
        print("the definitions have neither a cache nor generation", file=sys.stderr)
        return 3
    port.DO |= {"trace": trace, "losses": losses}
    answer = port.answer(directory, request)
    dsv3.xp = np
    dsv3.write_trace(str(directory / "answer.safetensors"), answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
