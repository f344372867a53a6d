"""Part I of deepseek_v3.py under jax.numpy as a port that check.py can try: the definitions have no cache.

    pip install jax
    python weights/vectors/check.py "python .ci/vectors/port_jax.py" --timeout 300
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weights" / "vectors"))
import port

jax.config.update("jax_enable_x64", True)
dsv3, load = port.dsv3, port.load


def under_jax(directory, dtype):
    """The checkpoint's tensors as arrays of JAX, read by NumPy; from now on the page runs under jax.numpy."""
    w, cfg = load(directory, dtype)
    arrays = {name: w[name] for name in w.shapes}
    arrays = {name: jnp.asarray(x.whole() if isinstance(x, dsv3.Stored) else x) for name, x in arrays.items()}
    dsv3.xp, dsv3.top_k = jnp, lambda score, k: jnp.argsort(-score, axis=-1, stable=True)[..., :k]
    return arrays, cfg


def main(directory):
    request = json.loads((directory / "request.json").read_text())
    if request["do"] not in ("trace", "losses") or request.get("chunks"):
        print("the definitions have neither a cache nor generation", file=sys.stderr)
        return 3
    port.load = under_jax
    answer = port.answer(directory, request)
    dsv3.write_trace(directory / "answer.safetensors", answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
