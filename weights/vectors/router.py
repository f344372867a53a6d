"""The shortest port: a router, which answers the cases of `check.py --component router`. To copy for a kernel."""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

directory = Path(sys.argv[1])
request, cfg = (json.loads((directory / file).read_text()) for file in ("request.json", "config.json"))
if request.get("component") != "router":
    sys.exit(print("only the router", file=sys.stderr) or 3)
w, x_TD = load_file(directory / "model.safetensors"), load_file(directory / "inputs.safetensors")["x"]
gate = f"model.layers.{request['layer']}.mlp.gate."
s_TE = 1 / (1 + np.exp(-x_TD.astype(float) @ w[gate + "weight"].astype(float).T))
choice_TE = s_TE + w[gate + "e_score_correction_bias"]
(T, E), G, K = s_TE.shape, cfg["n_group"], cfg["num_experts_per_tok"]
group_TG = np.sort(choice_TE.reshape(T, G, -1), axis=-1)[..., -2:].sum(axis=-1)
best_TM = np.argsort(-group_TG, axis=-1, kind="stable")[:, : cfg["topk_group"]]
kept_TE = (best_TM[..., None] == np.arange(G)).any(axis=1).repeat(E // G, axis=1)
index_TK = np.argsort(-np.where(kept_TE, choice_TE, -np.inf), axis=-1, kind="stable")[:, :K]
gate_TK = np.take_along_axis(s_TE, index_TK, axis=-1)
gate_TK *= cfg["routed_scaling_factor"] / (gate_TK.sum(axis=-1, keepdims=True) + 1e-20)
answer = {"scores": s_TE, "indices": np.ascontiguousarray(index_TK), "weights": gate_TK}  # save_file asks for it
save_file(answer, directory / "answer.safetensors")
