"""Mistakes that ports make, each an edit of deepseek_v3.py or of weights/vectors/port.py, which answers the kit's
requests by it. They name what compare.py finds, and show that the cases find them.

    python .ci/vectors/mistakes.py     # the table: the mistake, where it shows first, the cases that show it

An edit is "what stands there once => what stands there then".
"""

import functools
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "weights" / "vectors")]
import compare  # noqa: E402

SOURCES = {path: path.read_text("utf-8") for path in (ROOT / "deepseek_v3.py", ROOT / "weights/vectors/port.py")}
# The definition computes attention, so that an edit of it is one of part II, too.
PLAIN = "    (T, H, X), (S, J, Y) = q_THX.shape, v_SJY.shape => return attention(q_THX, k_SJX, v_SJY, scale)"
FINAL = 'h_TD = rms_norm(x_TD, w, "model.norm", cfg.rms_norm_eps) =>'
RAMP = "return freq_P * (1 - ramp_P) + freq_P / yarn.factor * ramp_P =>"
ANGLES = "angle_TP = xp.arange(start, start + T)[:, None] * xp.asarray(rope_frequencies(cfg)) =>"
ROOT_OF = "math.sqrt(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) =>"
QUERIES = "q_THX = q_TY.reshape(len(x_TD), cfg.num_attention_heads, -1) =>"
KEYS = "k_rope_TR = rope(kv_TL[:, cfg.kv_lora_rank :], rotation_TP) =>"
LATENT = 'c_TC = rms_norm(c_TC, w, f"{name}.kv_a_layernorm", LATENT_EPS) =>'
UP = 'up_SHY = linear(c_SC, w, f"{name}.kv_b_proj").reshape(S, H, -1) =>'
UP_ABSORBED = 'w[f"{name}.kv_b_proj.weight"].reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank) =>'
SPLIT = "up_HXC[:, : cfg.qk_nope_head_dim], up_HXC[:, cfg.qk_nope_head_dim :] =>"
MASK = "visible_TS = xp.arange(S) <= xp.arange(S - T, S)[:, None] =>"
WRITE = "self.layers[name][self.length : end] = kv_TL =>"
BIASED = 'biased_TE = score_TE + w[f"{name}.gate.e_score_correction_bias"] =>'
RANKED = "xp.sort(biased_TGX, axis=-1)[..., -2:].sum(axis=-1) =>"
NORMED = "gate_TK = gate_TK / (gate_TK.sum(axis=-1, keepdims=True) + 1e-20) =>"
SCALED = "gate_TK = gate_TK * cfg.routed_scaling_factor =>"
SUM = "return routed_TD + shared_TD =>"
STATE = 'state_TD = rms_norm(h_TD, w, f"{name}.hnorm", cfg.rms_norm_eps) =>'
MTP_END = 'return rms_norm(x_TD, w, f"{name}.shared_head.norm", cfg.rms_norm_eps) =>'
UPDATE = "return bias_E + gamma * xp.sign(load_E.mean() - load_E).astype(bias_E.dtype) =>"
VALUES = "value = xp.asarray(np.concatenate([value, -value]).astype(np.float32)) =>"
BLOCKS = "zip(slices(len(code), BLOCK), scale, strict=True) =>"
SHARD = "{name: shards[s][name] for name, s in weight_map.items() if name in shards[s]} =>"
SCORED = "balance_loss(named[f'{name}.scores'], cfg) =>".replace("'", '"')

TABLE = [  # where it shows first, in these cases (of the first one, at that array): {the mistake: its edits}
    ("input_layernorm", "eps", {
        "eps is left out of the norms": "xp.sqrt(mean_square + eps) => xp.sqrt(mean_square)",
        "eps stands outside the root": "xp.sqrt(mean_square + eps) => (xp.sqrt(mean_square) + eps)",
        "eps is 1e-6 whatever rms_norm_eps says": "xp.sqrt(mean_square + eps) => xp.sqrt(mean_square + 1e-6)",
        "eps bounds the mean square from below": "xp.sqrt(mean_square + eps) => xp.sqrt(xp.maximum(mean_square, eps))",
    }),
    ("input_layernorm", "v3_yarn one_token", {
        "the norms' weights are 1 + what is stored": '* w[f"{name}.weight"] => * (1 + w[f"{name}.weight"])',
        "the norms subtract the mean": "    mean_square = => x = x - x.mean(axis=-1, keepdims=True); mean_square =",
        "the norms divide by the root of the sum": "keepdims=True) / x.shape[-1] => keepdims=True)",
        "the norms' weights are not applied": '* w[f"{name}.weight"] =>',
    }),
    ("input_layernorm", "half", {
        "the norms round once, after the weight": 'normed.astype(x.dtype, copy=False) * w[f"{name}.weight"] '
                                                  '=> (normed * w[f"{name}.weight"]).astype(x.dtype)',
    }),
    ("input_layernorm", "v3_yarn", {
        "input_layernorm and post_attention_layernorm are swapped": [
            'w, f"{name}.input_layernorm" => w, f"{name}.post_attention_layernorm"',
            'w, f"{name}.post_attention_layernorm" => w, f"{name}.input_layernorm"'],
    }),
    ("model.embed_tokens", "v3_yarn", {
        "embeddings are multiplied by the root of hidden_size": [
            'x_TD = w["model.embed_tokens.weight"] => x_TD = cfg.hidden_size**0.5 * w["model.embed_tokens.weight"]',
            "rms_norm(embedded_TD, => rms_norm(embedded_TD * cfg.hidden_size**0.5,"],
    }),
    ("mlp", "v3_yarn", {
        "gate_proj and up_proj are swapped": "silu(gate) * up => silu(up) * gate",
        "gelu in place of silu":
            "silu(gate) * up => 0.5 * gate * (1 + xp.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up",
        "a sigmoid in place of silu": "silu(gate) * up => sigmoid(gate) * up",
        "silu of gate times up": "silu(gate) * up => silu(gate * up)",
    }),
    ("y", "experts.silu/float32", {
        "silu is x e^x / (1 + e^x)": "wide(x) * sigmoid(wide(x)) => wide(x) * xp.exp(wide(x)) / (1 + xp.exp(wide(x)))",
    }),
    ("post_attention_layernorm", "v3_yarn", {
        "no residual around the attention": "x_TD = x_TD + mla(normed_TD => x_TD = mla(normed_TD",
        "the attention's residual is the normed x": "x_TD = x_TD + mla(normed_TD => x_TD = normed_TD + mla(normed_TD",
    }),
    ("model.layers.0", "v3_yarn", {"no residual around the MLP": "x_TD = x_TD + y_TD => x_TD = y_TD"}),
    ("model.norm", "v3_yarn one_token", {
        "model.norm is left out": f"{FINAL} h_TD = x_TD",
        "model.norm is applied twice": f"{FINAL} h_TD = [x_TD := rms_norm(x_TD, w, 'model.norm', cfg.rms_norm_eps) "
                                       "for _ in range(2)][1]",
    }),
    ("lm_head", "v3_yarn", {
        "the head is the embedding, as if they were tied":
            'linear(h_TD, w, "lm_head") => linear(h_TD, w, "model.embed_tokens")',
    }),
    # ---- Rotation and YaRN
    ("self_attn.q_rope", "v3_yarn rope.small", {
        "RoPE pairs the elements of two halves, not neighbours": [
            "z = (wide(x[..., 0::2]) + 1j * wide(x[..., 1::2])) => a, b = xp.split(wide(x), 2, -1); z = (a + 1j * b)",
            "return z.view(z.real.dtype) => return xp.concatenate([z.real, z.imag], axis=-1)"],
        "RoPE turns the other way": "wide(x[..., 1::2])) * rotation => wide(x[..., 1::2])) * rotation.conj()",
        "nothing is rotated": "wide(x[..., 1::2])) * rotation => wide(x[..., 1::2])) * abs(rotation)",
        "positions count from 1": "xp.arange(start, start + T)[:, None] => 1 + xp.arange(start, start + T)[:, None]",
        "frequencies are theta^(-j/R)": "theta ** -(np.arange(0, R, 2) / R) => theta ** -(np.arange(R // 2) / R)",
        "frequencies are kept in bfloat16": "xp.asarray(rope_frequencies(cfg)) => (rope_frequencies(cfg).astype('f4')"
            ".view('u4') + 0x8000 & 0xFFFF0000).view('f4').astype(float)",
        "YaRN is off": "if yarn is None: => if True:",
        "all frequencies are divided by YaRN's factor": f"{RAMP} return freq_P / yarn.factor",
        "YaRN's range is not rounded to whole pairs": [
            "math.floor(pair(yarn.beta_fast)) => pair(yarn.beta_fast)",
            "math.ceil(pair(yarn.beta_slow)) => pair(yarn.beta_slow)"],
        "beta_fast and beta_slow are swapped": [
            "pair(yarn.beta_fast) => pair(yarn.beta_slow)", "pair(yarn.beta_slow) => pair(yarn.beta_fast)"],
        "YaRN slows the fast pairs and keeps the slow ones":
            f"{RAMP} return freq_P * ramp_P + freq_P / yarn.factor * (1 - ramp_P)",
        "YaRN's original context is taken for max_position_embeddings":
            "length = yarn.original_max_position_embeddings => length = cfg.max_position_embeddings",
        "cos and sin carry YaRN's m": "return xp.exp(1j * angle_TP) => it = cfg.rope_scaling; return "
            "(0.1 * it.mscale * math.log(it.factor) + 1 if it else 1) * xp.exp(1j * angle_TP)",
    }),
    ("self_attn.q_rope", "v3_yarn mla_prologue.small", {
        "queries are rotated the other way": "rotation_TP[:, None])  # eq. (8) => rotation_TP[:, None].conj())",
        "queries are not rotated": "rotation_TP[:, None])  # eq. (8) => abs(rotation_TP[:, None]))",
        "YaRN is off for the queries alone": [
            "    angle_TP = => global WITHOUT; WITHOUT = xp.exp(1j * xp.arange(start, start + T)[:, None] "
            "* rope_frequencies(replace(cfg, rope_scaling=None))); angle_TP =",
            "rotation_TP[:, None])  # eq. (8) => WITHOUT[:, None])"],
    }),
    ("self_attn.k_rope", "v3_yarn mla_prologue.small", {
        "keys are rotated the other way": f"{KEYS} k_rope_TR = rope(kv_TL[:, cfg.kv_lora_rank :], rotation_TP.conj())",
        "keys are not rotated": f"{KEYS} k_rope_TR = kv_TL[:, cfg.kv_lora_rank :]",
        "k_R is normed": f"{KEYS} k_rope_TR = rope(rms_norm(kv_TL[:, cfg.kv_lora_rank :], "
                         "{'k.weight': 1}, 'k', LATENT_EPS), rotation_TP)",
    }),
    ("self_attn.k_rope", "v3_yarn", {
        "keys are rotated as halves, queries as neighbours": f"{KEYS} a, b = xp.split(kv_TL[:, cfg.kv_lora_rank :], 2, "
            "-1); z = (a + 1j * b) * rotation_TP; k_rope_TR = xp.concatenate([z.real, z.imag], -1).astype(x_TD.dtype)",
    }),
    ("self_attn.q_rope", "yarn_range", {"YaRN's range is held at the last pair": "R - 1)  # as HF => R // 2 - 1)  #"}),
    ("self_attn", "yarn_crossing", {
        "YaRN begins only beyond the original context": f"{ANGLES} pos = xp.arange(start, start + T)[:, None]; "
            "angle_TP = pos * xp.where(pos >= getattr(cfg.rope_scaling, 'original_max_position_embeddings', 0), "
            "rope_frequencies(cfg), rope_frequencies(replace(cfg, rope_scaling=None)))",
    }),
    ("y", "rope.small", {
        "RoPE rotates neighbours and writes halves":
            "return z.view(z.real.dtype) => return xp.concatenate([z.real, z.imag], axis=-1)",
    }),
    ("self_attn.q_rope", "hf5_spelling", {
        "YaRN's beta_fast and beta_slow are 32 and 1 whatever the configuration says": [
            "pair(yarn.beta_fast) => pair(32)", "pair(yarn.beta_slow) => pair(1)"],
    }),
    ("self_attn.q_rope", "hf5_spelling moonlight rope.plain", {
        "rope_theta is 10,000 whatever the configuration says": "R, theta, yarn = cfg.qk_rope_head_dim, cfg.rope_theta "
                                                                "=> R, theta, yarn = cfg.qk_rope_head_dim, 1e4",
    }),
    ("cos", "phases far_out", {
        "angles are computed in float32": f"{ANGLES} angle_TP = (xp.arange(start, start + T, dtype='f4')[:, None] "
                                          "* rope_frequencies(cfg).astype('f4')).astype(float)",
    }),
    # ---- Attention
    ("self_attn", "v3_yarn mscale_707 attention_core.small mla.small", {
        "the softmax scale lacks mscale^2": "return m**2 / => return 1 /",
        "the softmax scale has mscale, not its square": "return m**2 / => return m /",
        "the softmax scale has mscale^2 twice": "return m**2 / => return m**4 /",
        "the softmax scale is 1 / sqrt(qk_nope_head_dim)": f"{ROOT_OF} cfg.qk_nope_head_dim**0.5",
        "the softmax scale is 1 / sqrt(v_head_dim)": f"{ROOT_OF} cfg.v_head_dim**0.5",
        "the softmax scale is that of the absorbed keys": f"{ROOT_OF} (cfg.kv_lora_rank + cfg.qk_rope_head_dim)**0.5",
        "the softmax scale is left out": f"return m**2 / {ROOT_OF} return 1.0",
    }),
    ("self_attn", "mscale_707", {
        "the softmax scale's m ignores mscale": "0.1 * yarn.mscale * math.log => 0.1 * math.log",
    }),
    ("self_attn.q_rope", "v3_yarn mla_prologue.small", {
        "the heads of q are read as [rope ; nope]": [
            "q_THX[..., : cfg.qk_nope_head_dim] => q_THX[..., cfg.qk_rope_head_dim :]",
            "q_THX[..., cfg.qk_nope_head_dim :] => q_THX[..., : cfg.qk_rope_head_dim]"],
        "q is split over all heads at once": f"{QUERIES} H = cfg.num_attention_heads; q_THX = xp.concatenate("
            "[x.reshape(len(x), H, -1) for x in xp.split(q_TY, [H * cfg.qk_nope_head_dim], axis=-1)], axis=-1)",
        "q's rows are read with the heads last":
            f"{QUERIES} q_THX = q_TY.reshape(len(x_TD), -1, cfg.num_attention_heads).swapaxes(1, 2).copy()",
        "the queries' latent is not normed": 'c_TQ = rms_norm(c_TQ, w, f"{name}.q_a_layernorm", LATENT_EPS) =>',
    }),
    ("self_attn.q_rope", "latent_eps", {
        "the norm on the queries' latent takes rms_norm_eps":
            'q_a_layernorm", LATENT_EPS => q_a_layernorm", cfg.rms_norm_eps',
    }),
    ("self_attn.kv_latent", "latent_eps moonlight mla_prologue.moonlight", {
        "the norm on c_KV takes rms_norm_eps": 'kv_a_layernorm", LATENT_EPS => kv_a_layernorm", cfg.rms_norm_eps',
        "the norms on both latents take rms_norm_eps": [
            'kv_a_layernorm", LATENT_EPS => kv_a_layernorm", cfg.rms_norm_eps',
            '.q_a_layernorm", LATENT_EPS => .q_a_layernorm", cfg.rms_norm_eps'],
    }),
    ("self_attn.kv_latent", "v3_yarn mla_prologue.small", {
        "kv_a_proj_with_mqa is read as [k_R ; c_KV]": [
            "c_TC = kv_TL[:, : cfg.kv_lora_rank] => c_TC = kv_TL[:, cfg.qk_rope_head_dim :]",
            f"{KEYS} k_rope_TR = rope(kv_TL[:, : cfg.qk_rope_head_dim], rotation_TP)"],
        "the norm on c_KV reaches over k_R": f"{LATENT} c_TC = c_TC / xp.sqrt((kv_TL**2).mean(axis=-1, keepdims=True)"
                                             ' + LATENT_EPS) * w[f"{name}.kv_a_layernorm.weight"]',
        "c_KV is not normed": LATENT,
        "c_KV is normed without its weight": LATENT + 'c_TC = rms_norm(c_TC, {"c.weight": 1}, "c", LATENT_EPS)',
    }),
    ("self_attn", "v3_yarn absorbed mla.small", {
        "the heads of kv_b_proj are read as [v ; k]": [
            "up_SHY[..., :N], up_SHY[..., N:] => up_SHY[..., -N:], up_SHY[..., :-N]",
            f"{SPLIT} up_HXC[:, -cfg.qk_nope_head_dim :], up_HXC[:, : -cfg.qk_nope_head_dim]"],
        "the values are the first rows of kv_b_proj's heads": [
            "up_SHY[..., :N], up_SHY[..., N:] => up_SHY[..., :N], up_SHY[..., : cfg.v_head_dim]",
            f"{SPLIT} up_HXC[:, : cfg.qk_nope_head_dim], up_HXC[:, : cfg.v_head_dim]"],
        "kv_b_proj is split over all heads at once": [
            UP + 'up_SHY = xp.concatenate([x.reshape(S, H, -1) for x in '
                 'xp.split(linear(c_SC, w, f"{name}.kv_b_proj"), [H * N], axis=-1)], axis=-1)',
            UP_ABSORBED + 'xp.concatenate([x.reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank) for x in xp.split('
                'w[f"{name}.kv_b_proj.weight"], [cfg.num_attention_heads * cfg.qk_nope_head_dim])], axis=1)'],
        "kv_b_proj's rows are read with the heads last": [
            UP + 'up_SHY = linear(c_SC, w, f"{name}.kv_b_proj").reshape(S, -1, H).swapaxes(1, 2)',
            UP_ABSORBED + 'w[f"{name}.kv_b_proj.weight"].reshape(-1, cfg.num_attention_heads, cfg.kv_lora_rank)'
                          '.swapaxes(0, 1)'],
        "o_proj takes the heads' elements in another order": "linear(o_THV. => linear(o_THV.swapaxes(1, 2).",
        "k_R is left out of the keys": [
            "[k_nope_SHN, k_rope_SHR] => [k_nope_SHN, 0 * k_rope_SHR]",
            "[q_HTC.swapaxes(0, 1), q_rope_THR] => [q_HTC.swapaxes(0, 1), 0 * q_rope_THR]"],
    }),
    ("self_attn", "v3_yarn", {
        "k_R is the first head's alone":
            "xp.broadcast_to(k_rope_SR[:, None] => k_rope_SR[:, None] * (xp.arange(H)[:, None] == 0)  # (",
        "keys are joined as [rope ; nope], queries as [nope ; rope]":
            "[k_nope_SHN, k_rope_SHR] => [k_rope_SHR, k_nope_SHN]",
    }),
    ("self_attn", "v3_yarn long attention_core.small", {
        "no causal mask": [f"{MASK} visible_TS = xp.arange(S) >= 0", PLAIN],
        "the mask lets a token see the next one": [
            f"{MASK} visible_TS = xp.arange(S) <= xp.arange(S - T, S)[:, None] + 1", PLAIN],
        "the mask hides a token from itself": [
            f"{MASK} s = xp.arange(S); visible_TS = (s < xp.arange(S - T, S)[:, None]) | (s == 0)", PLAIN],
    }),
    ("self_attn", "v3_yarn mla.small", {
        "the softmax runs over the heads": [
            "p_HTS = softmax(xp.where(visible_TS, score_HTS, -xp.inf)) => "
            "p_HTS = softmax(score_HTS.swapaxes(0, 2)).swapaxes(0, 2) * visible_TS", PLAIN],
    }),
    ("o", "attention_core.large_scores/float32", {
        "the softmax lacks its maximum": ["- wide(x).max(axis=-1, keepdims=True)) => )",
                                          "score -= score.max(axis=-1, keepdims=True) =>"],
    }),
    ("lse", "attention_core.small", {
        "the log-sum-exp is to base 2": '"lse": lse_TH => "lse": lse_TH / np.log(2)',
        "the log-sum-exp is of scores that are not scaled": "scale * dsv3.wide(q @ cache.T) => dsv3.wide(q @ cache.T)",
    }),
    # ---- The cache and the absorbed form
    ("self_attn.q_rope", "chunks", {
        "positions start again in each chunk": "xp.arange(start, start + T)[:, None] => xp.arange(T)[:, None]",
        "positions of later chunks are one too far":
            "xp.arange(start, start + T)[:, None] => (xp.arange(start, start + T) + (start > 0))[:, None]",
    }),
    ("self_attn", "chunks chunks_of_three", {
        "a chunk sees only itself": [f"{MASK} s = xp.arange(S); visible_TS = (S - T <= s) & (s <= s[S - T :, None])",
                                     PLAIN],
        "a chunk sees all of itself": [
            f"{MASK} s = xp.arange(S); visible_TS = (s <= s[S - T :, None]) | (s >= S - T) & (S > T)", PLAIN],
        "a later chunk's mask begins at 0": [f"{MASK} visible_TS = xp.arange(S) <= xp.arange(T)[:, None]", PLAIN],
        "each chunk is cached one entry too late": f"{WRITE} held = self.layers[name][self.length - 1 : self.length]; "
            f"kv_TL = xp.concatenate([held, kv_TL[:-1]]) if self.length and len(kv_TL) > 1 else kv_TL; {WRITE[:-3]}",
    }),
    ("self_attn", "absorbed absorbed_moonlight", {
        "absorbed: W_UV is read where W_UK is, and the reverse":
            f"{SPLIT} up_HXC[:, -cfg.qk_nope_head_dim :], up_HXC[:, : -cfg.qk_nope_head_dim]",
        "absorbed: the scale is that of its longer keys": "softmax_scale(cfg))  # of N + R, not L => softmax_scale("
            "replace(cfg, qk_nope_head_dim=cfg.kv_lora_rank)))",
        "absorbed: k_R is left out of the scores":
            "[q_HTC.swapaxes(0, 1), q_rope_THR] => [q_HTC.swapaxes(0, 1), 0 * q_rope_THR]",
        "absorbed: all heads take the first one's W_UK": "swapaxes(0, 1) @ w_uk_HNC => swapaxes(0, 1) @ w_uk_HNC[:1]",
    }),
    ("self_attn", "absorbed", {
        "absorbed: the scale lacks mscale^2":
            "softmax_scale(cfg))  # of N + R, not L => softmax_scale(replace(cfg, rope_scaling=None)))",
    }),
    ("self_attn", "absorbed attention_core.small", {
        "absorbed: the values are the last C elements of an entry": [
            "o_THL[..., : cfg.kv_lora_rank].swapaxes => o_THL[..., -cfg.kv_lora_rank :].swapaxes",
            '"o": o_THL[..., : cfg.kv_lora_rank] => "o": o_THL[..., -cfg.kv_lora_rank :]'],
    }),
    ("o", "attention_core.tiles", {
        "what fills the last tile of 64 keys counts as a score of 0": [
            "score -= score.max(axis=-1, keepdims=True) => top = score.max(axis=-1, keepdims=True); score -= top",
            "/ score.sum(axis=-1, keepdims=True) => / (score.sum(axis=-1, keepdims=True) + -seen % 64 * xp.exp(-top))",
            '"lse": lse_TH => "lse": np.logaddexp(lse_TH, np.log(-S % 64))'],
    }),
    ("o", "attention_core.tiles attention_core.splits long", {
        "tiles of 64 keys are averaged, not merged by log-sum-exp": PLAIN[: PLAIN.index("return")]
            + "parts = [[attention(q_THX[t : t + 1], k_SJX[s], v_SJY[s], scale) for s in slices(len(k_SJX) - "
              "len(q_THX) + t + 1, 64)] for t in range(len(q_THX))]; "
              "return xp.concatenate([sum(part) / len(part) for part in parts])",
    }),
    # ---- Routing and experts
    ("mlp.gate.scores", "v3_yarn router.small", {
        "affinities are a softmax": "= sigmoid(linear(wide(x_TD) => = softmax(linear(wide(x_TD)",
        "affinities are not squashed": "= sigmoid(linear(wide(x_TD) => = (linear(wide(x_TD)",
    }),
    ("mlp.gate.scores", "half", {
        "the router computes in half precision": 'sigmoid(linear(wide(x_TD), w, f"{name}.gate")) => wide(sigmoid('
            'x_TD @ w[f"{name}.gate.weight"].T.astype(x_TD.dtype)))',
    }),
    ("mlp.gate.indices", "group_scores", {
        "the bias is not used": f"{BIASED} biased_TE = score_TE",
        "the bias is subtracted": f'{BIASED} biased_TE = score_TE - w[f"{{name}}.gate.e_score_correction_bias"]',
        "the bias is added before the sigmoid": f"{BIASED} biased_TE = sigmoid(linear(wide(x_TD), w, "
            'f"{name}.gate") + w[f"{name}.gate.e_score_correction_bias"])',
        "the bias chooses groups alone": "top_k(keep_best_groups(biased_TE, cfg) => top_k(xp.where("
            "keep_best_groups(biased_TE, cfg) > -xp.inf, score_TE, -xp.inf)",
        "a group's score is its three best": "axis=-1)[..., -2:] => axis=-1)[..., -3:]",
        "expert e is of group e mod n_group": [
            "biased_TE.reshape(len(biased_TE), cfg.n_group, -1) => "
            "biased_TE.reshape(len(biased_TE), -1, cfg.n_group).swapaxes(1, 2)",
            "biased_TGX, -xp.inf).reshape => biased_TGX, -xp.inf).swapaxes(1, 2).reshape"],
        "a group's score is its best affinity": f"{RANKED} biased_TGX.max(axis=-1)",
        "a group's score is the sum of all its affinities": f"{RANKED} biased_TGX.sum(axis=-1)",
        "a group's score is from unbiased affinities": [
            "def keep_best_groups(biased_TE, cfg): => def keep_best_groups(biased_TE, score_TE, cfg):",
            "top_k(keep_best_groups(biased_TE, cfg) => top_k(keep_best_groups(biased_TE, score_TE, cfg)",
            f"{RANKED} xp.sort(score_TE.reshape(biased_TGX.shape), axis=-1)[..., -2:].sum(axis=-1)"],
    }),
    ("indices", "router.bias_precision", {
        "the bias is rounded to BF16": f'{BIASED} biased_TE = score_TE + (w[f"{{name}}.gate.e_score_correction_bias"]'
                                       ".astype('f4').view('u4') + 0x8000 & 0xFFFF0000).view('f4')",
    }),
    ("mlp.gate.indices", "mtp eps", {
        "the MTP layer's bias is lost": f"{BIASED} biased_TE = score_TE; biased_TE = biased_TE + w[f"
            '"{name}.gate.e_score_correction_bias"] * (int(name.split(".")[2]) < cfg.num_hidden_layers)',
    }),
    ("mlp.gate.indices", "v3_yarn many_groups router.small", {
        "groups are not limited": "top_k(keep_best_groups(biased_TE, cfg) => top_k(biased_TE",
    }),
    ("mlp.gate.indices", "negative_bias router.negative_bias", {
        "experts of the other groups are masked with 0": "biased_TGX, -xp.inf) => biased_TGX, 0)",
    }),
    ("mlp.gate.indices", "ties_experts router.ties", {
        "of equal experts the highest index wins": "index_TK = top_k(keep_best_groups(biased_TE, cfg) => "
            "index_TK = cfg.n_routed_experts - 1 - top_k(keep_best_groups(biased_TE, cfg)[:, ::-1]",
    }),
    ("mlp.gate.indices", "ties_groups", {
        "of equal groups the highest index wins":
            "one_hot(top_k(score_TG, => one_hot(cfg.n_group - 1 - top_k(score_TG[:, ::-1],",
        "groups are kept by a threshold": "    keep_TG = => worst_TG = xp.sort(score_TG)[:, [-cfg.topk_group]]; "
                                          "keep_TG = (score_TG >= worst_TG) |",
    }),
    ("mlp.gate.weights", "v3_yarn router.small", {
        "the bias is in the gates": "xp.take_along_axis(score_TE, => xp.take_along_axis(biased_TE,",
        "gates are not normalised": NORMED,
        "gates are normalised over all experts": f"{NORMED} gate_TK = gate_TK / xp.sum(score_TE, -1, keepdims=True)",
        "gates are a softmax of the chosen affinities": f"{NORMED} gate_TK = softmax(gate_TK)",
        "gates are not scaled, or before they are normalised": SCALED,
        "gates are scaled twice": f"{SCALED} gate_TK = gate_TK * cfg.routed_scaling_factor**2",
    }),
    ("weights", "router.one_expert", {
        "gates are normalised only where K > 1": f"{NORMED} gate_TK = gate_TK if cfg.num_experts_per_tok == 1 else "
                                                 "gate_TK / xp.sum(gate_TK, -1, keepdims=True)",
    }),
    ("weights", "router.guard", {"gates are normalised without a guard": "keepdims=True) + 1e-20 => keepdims=True)"}),
    ("mlp.gate.weights", "tiny_affinities router.tiny_affinities", {
        "the normalisation's guard is 1e-6": "keepdims=True) + 1e-20 => keepdims=True) + 1e-6",
        "affinities are got back as biased minus bias": "xp.take_along_axis(score_TE, => xp.take_along_axis("
                                                        'biased_TE - w[f"{name}.gate.e_score_correction_bias"],',
    }),
    ("mlp", "v3_yarn moe.small", {
        "no shared expert": f"{SUM} return routed_TD",
        "no routed experts": f"{SUM} return shared_TD",
        "the shared expert is scaled too": f"{SUM} return routed_TD + shared_TD * cfg.routed_scaling_factor",
        "the shared expert is scaled down": f"{SUM} return routed_TD + shared_TD / cfg.routed_scaling_factor",
    }),
    ("mlp", "v3_yarn experts.small", {
        "gates multiply the experts' inputs": [
            "gate_T[:, None] * swiglu(x_TD, => swiglu(gate_T[:, None] * x_TD,",
            "    y_XD = swiglu(x_TD[ => gate_X = gate_TK.ravel()[order_X].astype(x_TD.dtype); "
            "y_XD = swiglu(gate_X[:, None] * x_TD[",
            "(gate_TK[:, None].astype(x_TD.dtype, copy=False) @ y_TKD)[:, 0] => y_TKD.sum(axis=1)"],
        "gates go to the chosen experts in another order": [
            "index_TK == e, gate_TK, 0) => index_TK == e, gate_TK[:, ::-1], 0)",
            "(gate_TK[:, None].astype => (gate_TK[:, None, ::-1].astype"],
        "gates are not applied": [
            "index_TK == e, gate_TK, 0) => index_TK == e, 1, 0)",
            "(gate_TK[:, None].astype => (xp.ones_like(gate_TK[:, None]).astype"],
    }),
    ("y", "experts.crowded", {
        "an expert's rows beyond 128 are lost": "    return (gate_TK[:, None].astype => "
            "y_XD[[i for r in rows.values() for i in range(r.start + 128, r.stop)]] = 0; "
            "y_TKD = y_XD[order_X.argsort()].reshape(len(x_TD), K, -1); return (gate_TK[:, None].astype",
    }),
    ("mlp", "moonlight moe.two_shared", {
        "shared experts are averaged": f"{SUM} return routed_TD + shared_TD / cfg.n_shared_experts",
    }),
    # ---- Multi-token prediction
    ("eh_proj", "mtp mtp_input.small", {
        "MTP joins [state ; embedding]": ["[embedded_TD, state_TD] => [state_TD, embedded_TD]",
                                          "[embedded, state] => [state, embedded]"],
        "MTP swaps enorm and hnorm": [
            'rms_norm(embedded_TD, w, f"{name}.enorm" => rms_norm(embedded_TD, w, f"{name}.hnorm"',
            'rms_norm(h_TD, w, f"{name}.hnorm" => rms_norm(h_TD, w, f"{name}.enorm"',
            '[tokens], w, f"{name}.enorm" => [tokens], w, f"{name}.hnorm"',
            'rms_norm(h, w, f"{name}.hnorm" => rms_norm(h, w, f"{name}.enorm"'],
        "MTP does not norm the state": [f"{STATE} state_TD = h_TD", "state = dsv3.rms_norm(h, => state = h  #"],
    }),
    ("eh_proj", "mtp", {
        "MTP reads the state before model.norm": [
            'record("model.norm", h_TD) => record("model.norm", h_TD); global BEFORE; BEFORE = x_TD',
            "rms_norm(h_TD, w, => rms_norm(BEFORE[: len(h_TD)] if k == 1 else h_TD, w,"],
        "MTP masks the embedding at position 0": "rms_norm(embedded_TD, => rms_norm(embedded_TD * (xp.arange(start, "
                                                 "start + len(token_T)) > 0)[:, None],",
        "MTP norms its state by model.norm again":
            "rms_norm(h_TD, w, => rms_norm(rms_norm(h_TD, w, 'model.norm', cfg.rms_norm_eps), w,",
        "MTP reads the state one token too late": "rms_norm(h_TD, w, => rms_norm(xp.roll(h_TD, -1, axis=0), w,",
        "MTP pairs a state with its own token": [
            "h_XD[:-1], token_T[k:]) => h_XD[:-1], token_T[k - 1 : -1])",
            "token_X[k:T], w => token_X[k - 1 : T - 1], w",
            "pair_Y = np.array(tokens[start + 1 :]) => pair_Y = np.array(tokens[start : -1])"],
    }),
    ("shared_head", "mtp", {
        "MTP ends with model.norm": f'{MTP_END} return rms_norm(x_TD, w, "model.norm", cfg.rms_norm_eps)',
        "MTP lacks its last norm": f"{MTP_END} return x_TD",
    }),
    ("model.layers.3.eh_proj", "mtp_depth_2", {
        "MTP module 2 reads the main model's state": [
            "h_XD = run(forward, token_T) => h_XD = main_XD = run(forward, token_T)",
            "h_XD = run(dsv3.forward, token_T) => h_XD = main_XD = run(dsv3.forward, token_T)",
            "h_XD[:-1], token_T[k:]) => main_XD[:-k], token_T[k:])"],
        "MTP module 2 reads module 1's state before its norm": [
            "    layer = cfg.num_hidden_layers + k - 1 => global BEFORE; layer = cfg.num_hidden_layers + k - 1",
            f"{MTP_END} BEFORE = x_TD; {MTP_END[:-3]}",
            "rms_norm(h_TD, w, => rms_norm(BEFORE[: len(h_TD)] if k > 1 else h_TD, w,"],
    }),
    ("model.layers.3.eh_proj", "mtp_depth_2", {
        "MTP module 2 has module 1's weights": "    layer = cfg.num_hidden_layers + k - 1 => layer = "
            "cfg.num_hidden_layers + k - 1; w = type('', (), {'__getitem__': lambda _, name, w=w: w[name.replace("
            "f'layers.{layer}.', f'layers.{cfg.num_hidden_layers}.')]})()",
    }),
    ("eh_proj", "mtp_chunks", {
        "MTP pairs the last state of a chunk with its first token": "parts.append(dsv3.cached_pass( => "
            "part[1:] = [np.append(x[:-1], x[0]) if cache.length + size < len(arrays[0]) else x for x in part[1:]]; "
            "parts.append(dsv3.cached_pass(",
    }),
    ("0/tokens", "generate_mtp_cache generate_mtp", {
        "MTP writes into the last layer's cache": [
            "    cache, mtp_cache = caches = [Cache(end), Cache(end)] => "
            "cache, mtp_cache = caches = [Cache(end), Cache(end)]; mtp_cache.main = cache.layers",
            "self.layers[name] = xp.empty( => self.layers[name] = list(self.main.values())[-1] "
            "if hasattr(self, 'main') else xp.empty("],
    }),
    ("0/tokens", "generate_mtp", {
        "after an accepted draft the next token is read one position early":
            "[token, draw(predict(h_TD[-1]) => [token, draw(predict(h_TD[-2])",
    }),
    ("0/drafts", "generate_mtp", {
        "MTP drafts from the state of a rejected draft": "h_TD[: len(pair_Y)], pair_Y => h_TD[-len(pair_Y) :], pair_Y",
    }),
    ("0/drafts", "generate_mtp", {
        "the MTP module's cache is empty in each round": "w, cfg, mtp_cache, chunk) => w, cfg, Cache(end), chunk)",
    }),
    ("0/tokens", "generate_mtp", {
        "a rejected draft stays in the cache": [
            "start = cache.length => start = len(tokens) - 1 if cache.length else 0",
            "cache.length = len(tokens) - 1  # forgets a rejected draft =>",
            "[Cache(end), Cache(end)] => [Cache(9 * end), Cache(end)]"],
    }),
    ("2/tokens", "generate_mtp_ragged", {
        "two tokens are made where one is left": ["for token in new[: end - len(tokens)]: => for token in new:",
                                                  "if len(tokens) == end: => if len(tokens) >= end:"],
    }),
    ("0/tokens", "generate_mtp verify.rules", {
        "all drafts are accepted": "if rng.random() * q_W[draft] < p_W[draft]: => if True:",
    }),
    ("0/drafts", "generate_mtp_small_vocab verify.rules", {
        "all drafts are rejected": "if rng.random() * q_W[draft] < p_W[draft]: => if False:",
    }),
    ("token", "verify.rules", {
        "a rejected draft is drawn anew from p": "rest_W = np.maximum(p_W - q_W, 0) => rest_W = p_W",
        "a rejected draft is drawn anew from p without it":
            "rest_W = np.maximum(p_W - q_W, 0) => rest_W = p_W * (np.arange(p_W.size) != draft)",
        "what is left of p - q is not divided by its sum": "draw(rest_W / rest_W.sum(), rng) => draw(rest_W, rng)",
    }),
    ("accepted", "verify.rules", {
        "a draft is accepted only if it is the likeliest": "if rng.random() * q_W[draft] < p_W[draft]: => "
                                                           "if draft == np.argmax(p_W):",
        "a draft of probability 0 is accepted by the number 0":
            "() * q_W[draft] < p_W[draft]: => () * q_W[draft] <= p_W[draft]:",
        "a draft is accepted by q / p": "() * q_W[draft] < p_W[draft]: => () * p_W[draft] < q_W[draft]:",
    }),
    # ---- Losses, balancing, FP8
    ("mtp.1", "losses", {
        "the MTP loss is divided by its T - k terms": "loss_T.sum() / T) => loss_T.mean())",
        "module k's targets are those of module k - 1": "token_X[k + 1 :]) => token_X[k:-1])",
    }),
    ("total", "losses", {"MTP losses are summed, not averaged": "sum(losses) / max(depth, 1) => sum(losses)"}),
    ("main", "losses", {
        "the main loss is in bits": "    main = => main = 1 / math.log(2) *",
    }),
    ("balance", "losses", {
        "the balance loss is averaged over layers": "for name in routers)\n    chosen = => for name in routers) / "
                                                    "len(routers); chosen =",
        "the balance loss lacks E / K": "axis=0) * (E / K) => axis=0)",
        "f counts the experts that were chosen": [
            SCORED + 'balance_loss(named[f"{name}.scores"], named[f"{name}.indices"], cfg)',
            "def balance_loss(score_TE, cfg): => def balance_loss(score_TE, index_TK, cfg):",
            "one_hot(top_k(score_TE, K), E) => one_hot(index_TK, E)"],
        "f counts the top K of the best groups":
            "one_hot(top_k(score_TE, K) => one_hot(top_k(keep_best_groups(score_TE, cfg), K)",
        "the balance loss leaves out the MTP layers":
            "cfg) for name in routers)\n    chosen => cfg) for name in routers[: len(routers) - depth]); chosen",
        "P is of affinities that are not normalised":
            "(score_TE / score_TE.sum(axis=-1, keepdims=True)).mean(axis=0) => score_TE.mean(axis=0)",
    }),
    ("bias", "update_bias", {
        "an expert with the mean load gets more":
            f"{UPDATE} return bias_E + gamma * xp.where(load_E <= load_E.mean(), 1, -1)",
        "the biases are centred": f"{UPDATE} step = gamma * xp.sign(load_E.mean() - load_E); "
                                  "return bias_E + step - step.mean()",
        "overloaded experts get more": "return bias_E + gamma => return bias_E - gamma",
        "the bias moves by the load's error": f"{UPDATE} return bias_E + gamma * (load_E.mean() - load_E)",
    }),
    ("bias", "update_bias_counts", {
        "the mean load is an integer": "xp.sign(load_E.mean() => xp.sign(load_E.sum() // len(load_E)",
        "loads are in half precision":
            f"{UPDATE} n_E = load_E.astype(np.float16); return bias_E + gamma * xp.sign(n_E.mean() - n_E)",
    }),
    ("self_attn", "f16", {
        "F16 numbers below 2^-14 are 0": "return part.astype(self.dtype, copy=False) => return xp.where("
            "(abs(part) < 2**-14) & (self.kind == 'F16'), 0, part).astype(self.dtype)",
        "a tensor is taken from the last shard that has it":
            f"{SHARD} {{k: x for _, held in sorted(shards.items()) for k, x in held.items()}}",
    }),
    ("model.layers.1", "f16", {
        "a tensor is taken from the first shard that has it":
            f"{SHARD} {{k: x for _, held in sorted(shards.items())[::-1] for k, x in held.items()}}",
    }),
    ("tokens", "generate_end", {
        "an accepted draft ends nothing": "if token in stop: => if token in stop and token is not new[0]:",
    }),
    ("0/tokens", "generate", {
        "config.json's eos_token_id ends a request": "if token in stop: => if token == 33:",  # that case's
    }),
    ("weight", "fp8 dequantize.cropped bf16_scales", {
        "FP8 is divided by its scale": "xp.take(value, code[rows]) * => xp.take(value, code[rows]) /",
        "FP8 is read as E4M3FNUZ": ["value[127] = np.nan => value = value / 2",
                                    f"{VALUES} {VALUES[:-3].replace('-value', 'np.where(byte == 0, np.nan, -value)')}"],
        "FP8's last blocks take the scale before":
            f"{BLOCKS} zip(slices(len(code), BLOCK), xp.concatenate([scale[:-1], scale[-2:-1]]))",
    }),
    ("weight", "fp8", {
        "FP8's blocks are rows / scales high": [
            f"{BLOCKS} zip(slices(len(code), -(-len(code) // len(scale))), scale)",
            "xp.repeat(scale_X, BLOCK) => xp.repeat(scale_X, -(-code.shape[1] // len(scale_X)))"],
        "FP8 has no NaN": "value[127] = np.nan =>",
        "FP8's subnormals are 0": "== 0, mantissa / 64, => == 0, 0 * mantissa,",
        "FP8's subnormals have exponent -7": "== 0, mantissa / 64, => == 0, mantissa / 128,",
        "FP8's product with the scale is rounded to BF16": [
            "out[rows] = xp.take(value, code[rows]) => part = xp.take(value, code[rows])",
            "xp.repeat(scale_X, BLOCK)[: code.shape[1]] => xp.repeat(scale_X, BLOCK)[: code.shape[1]]; out[rows] = "
            "(part.view('u4') + 0x7FFF + (part.view('u4') >> 16 & 1) & 0xFFFF0000).view('f4')"],
        "FP8's scales are transposed": f"{BLOCKS} zip(slices(len(code), BLOCK), scale.T)",
    }),
    ("y", "fp8_linear.tiles", {
        "fp8_linear: activations are not quantised": "code = cases.from_fp8( => code = x / x_scale.repeat(128, 1)  #",
        "fp8_linear: activations have one scale per token":
            "np.abs(tiles).max(-1), => 0 * tiles[..., 0] + abs(x).max(-1)[:, None],",
        "fp8_linear: activations have one scale":
            "np.abs(tiles).max(-1), => 0 * tiles[..., 0] + abs(x).max(),",
        "fp8_linear: a tile's scale is its largest / 240": "/ np.float32(448) => / np.float32(240)",
        "fp8_linear: the weights' scales are left out": "* scale[:, i].repeat(cases.BLOCK)[: len(rows)] =>",
    }),
    ("y", "fp8_linear.powers_of_two", {
        "fp8_linear: a scale is the power of two below": "np.ceil(np.log2(x_scale)) => np.floor(np.log2(x_scale))",
        "fp8_linear: ties go away from zero":
            ".astype(np.float64)), None) => .astype(np.float64) * (1 + 2**-20)), None)",
        "fp8_linear: scales are no powers of two": '.get("scale_fmt") == "ue8m0": => .get("scale_fmt") == 0:',
    }),
]  # fmt: skip


class Mistake(NamedTuple):
    edits: list  # [(old, new)]
    cases: list  # that must fail, perhaps with "/float32"; the first one shows it at `where`
    where: str  # the part of the layer, or the array


def parsed(edits):
    return [tuple(edit.partition("=>")[::2]) for edit in ([edits] if isinstance(edits, str) else edits)]


MISTAKES = {what: Mistake(parsed(edits), shown.split(), where)
            for where, shown, group in TABLE for what, edits in group.items()}  # fmt: skip
compiled = functools.cache(lambda block: compile(block, "deepseek_v3.py, edited", "exec"))


def spans(source, edits):
    """[(where, the new text)] of those that this source has, the last one first."""
    found = [(list(re.finditer(re.escape(old.strip()), source)), new.strip()) for old, new in edits]
    assert all(len(there) < 2 for there, _ in found), f"stands more than once: {edits}"
    return sorted(((*there[0].span(), new) for there, new in found if there), reverse=True)


@functools.cache
def edited(what):
    """port.py, which makes the mistake, and the names of the functions and classes that were edited."""
    edits, names, modules = MISTAKES[what].edits if what else [], set(), []
    assert all(any(spans(source, [edit]) for source in SOURCES.values()) for edit in edits), f"not found: {what}"
    for path, source in SOURCES.items():
        for start, end, new in spans(source, edits):
            names.add(re.findall(r"^(?:def|class) (\w+)", source[:end], re.MULTILINE)[-1])
            statement = source[:start].endswith("\n    ")
            source = source[:start] + (new or "pass" * statement) + source[end:]
        modules.append(types.ModuleType(path.stem))
        modules[-1].__file__ = str(path)
        for block in source.split("\n\n\n"):  # those that are as they were are compiled once
            exec(compiled(block), vars(modules[-1]))
    modules[1].dsv3 = modules[0]
    del sys.path[0]  # where port.py finds the page
    return modules[1], names


def wrong_answer(what, request, directory):
    """What the page answers with a mistake; None if the checkpoint has nothing that it could change."""
    try:
        with np.errstate(all="ignore"):
            return edited(what)[0].answer(directory, request)
    except (ArithmeticError, LookupError, ValueError, AttributeError, TypeError, AssertionError):
        return None


# ---- The diagnosis -------------------------------------------------------------------------------------------------

MANY, LARGE = 60, 4e6  # tokens, bytes: of longer prompts and larger checkpoints no mistake is sought
suspects, in_vain = {}, []  # the mistakes named so far are tried first; after a few searches in vain there is no other


def reaching(request, directory):
    """The mistakes in what the page calls for such a request."""
    called, right = set(), edited.__wrapped__(None)[0]  # without what it cached before
    sys.setprofile(lambda frame, *_: called.add(frame.f_code.co_qualname.split(".")[0]))
    try:
        right.answer(directory, request)
    finally:
        sys.setprofile(None)
    return [what for what in MISTAKES if edited(what)[1] & called]


def small(request, directory):
    """Whether a mistake is sought at all."""
    tokens = request.get("max_tokens", 0) + sum(map(len, request.get("prompts", [])))
    return tokens <= MANY and sum(path.stat().st_size for path in Path(directory).iterdir()) <= LARGE


def explanations(mine, request, directory, at, order, tolerance, answers=wrong_answer):
    """The mistakes with which the page answers as `mine` does, at `at` and as far beyond as any mistake explains, and
    up to which array of the order that is."""
    reach, all_of_them = {}, small(request, directory) and len(in_vain) < 5
    for search in (suspects, reaching(request, directory) if all_of_them else []):
        reach |= {what: explained(mine, answers(what, request, directory), at, order, tolerance)
                  for what in search if what not in reach}  # fmt: skip
        furthest = max(reach.values(), default=0)
        if furthest == len(order):
            break
    return [what for what in reach if furthest and reach[what] == furthest], furthest


def diagnose(mine, request, directory, at, names, tolerance=compare.TOLERANCE):
    """"; as if ...", or "" where no mistake explains it. names: of the expected arrays, in the order of computation."""
    order = list(dict.fromkeys(compare.split(name)[1] for name in names))
    if request["do"] == "component":  # a kernel of half precision is judged by numbers that are not rounded
        request = request | {"dtype": "float64" if request["dtype"] == "float64" else "float32"}
    found, furthest = explanations(mine, request, directory, at, order, tolerance)
    if not found:
        in_vain.append(at)
        return ""
    suspects.update(dict.fromkeys(found))
    more = f" or {len(found) - 3} more" if len(found) > 3 else ""
    upto = f", though not from {order[furthest]} on" if furthest < len(order) else ""
    return f"; as if {' or '.join(found[:3])}{more}{upto}"


def explained(mine, wrong, at, order, tolerance):
    """Up to which array of the order the page's wrong answer is `mine`, 0 if not even up to the one that departs."""
    if not wrong or at not in wrong or not compare.compare(mine, {at: wrong[at]}, tolerance).agrees:
        return 0
    wrong = {name: wrong[name] for base in order for name in wrong if compare.split(name)[1] == base}
    verdict = compare.compare(mine, wrong, tolerance, needed=[])
    end = len(order) if verdict.agrees else order.index(compare.split(verdict.at)[1])
    if end < len(order) and at.endswith(("tokens", "drafts", "accepted")):
        return 0  # a part of a generation agrees by chance
    return end if end > order.index(compare.split(at)[1]) else 0


def main():
    for what, it in MISTAKES.items():
        print(f"{what:66} {it.where:32} {' '.join(it.cases)}")


if __name__ == "__main__":
    main()
