"""Train the checkpoint in this directory by differentiating deepseek_v3.py itself.

    pip install jax tokenizers safetensors ml_dtypes tqdm
    python weights/train.py --text TinyStories-valid.txt --out my-weights

`xp` becomes jax.numpy, and `jax.value_and_grad` of `training_objective` is the training step: there is no second copy
of the model. The recipe is that of section 4.2 of the paper, each part on; the table in README.md beside this file says
where its numbers depart. A run that was stopped goes on from its last checkpoint when the same command is given again,
and ends as if it had never been stopped: each step's batch depends on the seed and the step alone.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.flatten_util import ravel_pytree
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import deepseek_v3 as dsv3  # noqa: E402

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # ids 0 and 1, as in the release
MODEL = dsv3.Config(
    vocab_size=2048, hidden_size=192, num_hidden_layers=4, num_attention_heads=4,
    q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48,
    intermediate_size=512, first_k_dense_replace=1, moe_intermediate_size=48, n_shared_experts=1,
    n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    rope_scaling=dsv3.Yarn(factor=4.0, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=1.0),
    max_position_embeddings=1024, num_nextn_predict_layers=1,
)  # fmt: skip
INIT_STD = 0.03
SEQUENCES, LENGTH = 16, 256  # of one batch
CYCLES = (
    (2400, 2.5e-3),
    (1000, 1.25e-3),
    (1600, 1.25e-3),
)  # steps and peak learning rate; the schedules below run in each
FLOOR, WARMUP = 0.05, 100  # the share of the peak that is left at the end, steps of warm-up
BETA1, BETA2, DECAY, CLIP = 0.9, 0.95, 0.1, 1.0  # AdamW, and the gradient norm that is clipped to
GAMMA, GAMMA_UNTIL = 0.001, 0.9  # speed of the bias update, and the share of a cycle after which it is frozen
ALPHA = 0.0001  # weight of the sequence-wise balance loss
LAMBDA, LAMBDA_LATE, LATE_FROM = 0.3, 0.1, 0.67  # weight of the MTP loss, first and from this share of a cycle on
VALIDATION = 0.02  # the last stories, never trained on
VALIDATE_EVERY, SAVE_EVERY = 250, 120  # steps; seconds


def make_tokenizer(stories, path):
    """A byte-level BPE with BOS and EOS; it puts BOS before each text. Saved at path, returned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.save(str(path))
    return tokenizer


def initial_weights(seed):
    """Matrices normal with INIT_STD, norms 1; apart from them the routers' biases, 0, which no gradient moves."""
    rng, params, biases = np.random.default_rng(seed), {}, {}
    for name, shape in dsv3.tensor_shapes(MODEL).items():
        if name.endswith("e_score_correction_bias"):
            biases[name] = np.zeros(shape, np.float32)
        elif name.endswith("norm.weight"):
            params[name] = np.ones(shape, np.float32)
        else:
            params[name] = rng.normal(0, INIT_STD, shape).astype(np.float32)
    return params, biases


def make_step(unravel, decayed):
    """One jitted step of training: (state, tokens, learning rate, lambda, gamma) -> (state, figures)."""

    def loss_of(theta, biases, token_BX, mtp_weight):
        return dsv3.training_objective(unravel(theta) | biases, token_BX, MODEL, mtp_weight, ALPHA)

    @partial(jax.jit, donate_argnums=0)
    def step(state, token_BX, rate, mtp_weight, gamma):
        objective = jax.value_and_grad(loss_of, has_aux=True)
        (_, parts), grad = objective(state["theta"], state["biases"], token_BX, mtp_weight)
        norm = jnp.linalg.norm(grad)
        grad = grad * jnp.minimum(1, CLIP / norm)
        count = state["step"] + 1
        m = BETA1 * state["m"] + (1 - BETA1) * grad
        v = BETA2 * state["v"] + (1 - BETA2) * grad**2
        update = m / (1 - BETA1**count) / (jnp.sqrt(v / (1 - BETA2**count)) + 1e-8)
        theta = state["theta"] - rate * (update + DECAY * decayed * state["theta"])
        load = {f"{name}.e_score_correction_bias": load_E for name, load_E in parts["load"].items()}
        biases = {k: dsv3.update_bias(b, load[k], gamma) for k, b in state["biases"].items()}
        figures = {"main": parts["main"], "mtp": parts["mtp"][0], "balance": parts["balance"], "norm": norm,
                   "load": jnp.stack([load[k] for k in sorted(load)])}  # fmt: skip
        return {"theta": theta, "m": m, "v": v, "biases": biases, "step": count}, figures

    return step


def schedule(step):
    """Learning rate (linear warm-up, then a cosine to FLOOR), lambda and gamma of a step."""
    for steps, peak in CYCLES:  # noqa: B007
        if step < steps:
            break
        step -= steps
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    rate = (step + 1) / WARMUP if step < WARMUP else FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
    late, frozen = step >= LATE_FROM * steps, step >= GAMMA_UNTIL * steps
    return peak * rate, LAMBDA_LATE if late else LAMBDA, 0.0 if frozen else GAMMA


def validation_bits(w, tokenizer, stories, length=512):
    """Bits a byte of whole stories, each after its own BOS, the end token's included; what goes past `length` is left
    out of both counts."""

    @jax.jit
    def story_loss(w, token_BX):
        return dsv3.cross_entropy(dsv3.head(dsv3.forward(token_BX[:, :-1], w, MODEL), w, MODEL), token_BX[:, 1:])

    nats = count = 0
    for first in range(0, len(stories), 8):
        rows = [tokenizer.encode(s).ids + [1] for s in stories[first : first + 8]]
        token_BX = np.zeros((8, length + 1), np.int32)
        for b, ids in enumerate(rows):
            token_BX[b, : len(ids)] = ids[: length + 1]
        loss_BT = np.asarray(story_loss(w, token_BX))
        for b, ids in enumerate(rows):
            kept = ids[: length + 1]
            nats += float(loss_BT[b, : len(kept) - 1].sum())
            count += len(tokenizer.decode(kept).encode())
    return nats / math.log(2) / count


def write_checkpoint(out, params, biases):
    """The directory in the Hugging Face layout: matrices in BF16, the routers' biases in F32."""
    tensors = {name: np.asarray(x).astype(ml_dtypes.bfloat16) for name, x in params.items()}
    tensors |= {name: np.asarray(x) for name, x in biases.items()}
    order = {name: tensors[name] for name in dsv3.tensor_shapes(MODEL)}
    save_file(order, out / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.part", out / "model.safetensors")
    config = asdict(MODEL)
    rope = {k: v for k, v in config.pop("rope_scaling").items() if v is not None and k != "truncate"} | {"type": "yarn"}
    config |= {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu",
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_scaling": rope,
        "num_key_value_heads": MODEL.num_attention_heads, "initializer_range": INIT_STD, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    tokens = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "add_eos_token": False,
              "model_max_length": MODEL.max_position_embeddings, "tokenizer_class": "PreTrainedTokenizerFast",
              "clean_up_tokenization_spaces": False}  # fmt: skip
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    for name, value in (("config", config), ("tokenizer_config", tokens), ("generation_config", generation)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="stories, each followed by a line <|endoftext|>")
    parser.add_argument("--out", type=Path, required=True, help="directory for the finished checkpoint")
    parser.add_argument("--state", type=Path, help="directory for the state and the log (default: OUT/state)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-bias-update", action="store_true", help="the control: gamma 0 throughout")
    args = parser.parse_args(argv)
    state_dir = args.state or args.out / "state"
    state_dir.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    dsv3.xp = jnp

    stories = [s.strip() for s in args.text.read_text(encoding="utf-8").split("<|endoftext|>") if s.strip()]
    held_out = stories[len(stories) - round(VALIDATION * len(stories)) :]
    stories = stories[: len(stories) - len(held_out)]
    tokenizer = make_tokenizer(stories, args.out / "tokenizer.json")
    stream = np.array([t for e in tokenizer.encode_batch(stories) for t in (*e.ids, 1)], np.int32)
    params, biases = initial_weights(args.seed)
    theta, unravel = ravel_pytree(params)
    decayed, _ = ravel_pytree({name: np.full(x.shape, float(x.ndim > 1), np.float32) for name, x in params.items()})
    state = {"theta": theta, "m": jnp.zeros_like(theta), "v": jnp.zeros_like(theta), "biases": biases, "step": 0}
    print(f"{theta.size:,} parameters, {stream.size:,} tokens of training text, {len(held_out)} stories held out")

    saved = state_dir / "state.npz"
    if saved.exists():
        with np.load(saved) as kept:
            state |= {k: kept[k] for k in ("theta", "m", "v")} | {"step": int(kept["step"])}
            state["biases"] = {name: kept[name] for name in biases}
        print(f"going on from step {state['step']}")

    def save(entries):
        """The state whole or not at all, then the log of the steps since the last save."""
        part = state_dir / "part.npz"
        np.savez(part, **{k: v for k, v in state.items() if k != "biases"}, **state["biases"])
        os.replace(part, saved)
        with (state_dir / "log.jsonl").open("a") as log:
            log.writelines(json.dumps(entry) + "\n" for entry in entries)

    step, entries, last_save = make_step(unravel, decayed), [], time.monotonic()
    first, last = int(state["step"]), sum(steps for steps, _ in CYCLES)
    bar = tqdm(range(first, last), initial=first, total=last, unit="step", mininterval=5)
    for i in bar:
        rate, mtp_weight, gamma = schedule(i)
        gamma = 0.0 if args.no_bias_update else gamma
        start = np.random.default_rng([args.seed, i]).integers(0, stream.size - LENGTH, SEQUENCES)
        token_BX = stream[start[:, None] + np.arange(LENGTH + 1)]
        began = time.monotonic()
        state, figures = step(state, token_BX, rate, mtp_weight, gamma)
        figures = {k: np.asarray(v).tolist() for k, v in figures.items()}
        bar.set_postfix(loss=f"{figures['main']:.3f}", tok_s=f"{SEQUENCES * LENGTH / (time.monotonic() - began):.0f}")
        entry = {"step": i + 1} | figures
        if (i + 1) % VALIDATE_EVERY == 0:
            w = unravel(state["theta"]) | state["biases"]
            entry["validation_bits_per_byte"] = validation_bits(w, tokenizer, held_out[:64])
            tqdm.write(f"step {i + 1}: {entry['validation_bits_per_byte']:.4f} bits a byte on 64 held-out stories")
        entries.append(entry)
        if time.monotonic() - last_save > SAVE_EVERY or i + 1 == last:
            save(entries)
            entries, last_save = [], time.monotonic()

    params = {name: x.astype(jnp.bfloat16).astype(jnp.float32) for name, x in unravel(state["theta"]).items()}
    bits = validation_bits(params | state["biases"], tokenizer, held_out)
    write_checkpoint(args.out, params, state["biases"])
    print(f"{bits:.4f} bits a byte on {len(held_out)} held-out stories, weights rounded to BF16")


if __name__ == "__main__":
    main()
