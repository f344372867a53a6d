"""Train a model like the one in this directory by differentiating deepseek_v3.py itself.

    pip install jax optax tokenizers safetensors ml_dtypes tqdm
    python weights/train.py --text TinyStoriesV2-GPT4-train.txt --out my-weights

`xp` becomes jax.numpy, and the training step is `jax.grad` of `training_objective`, by `jax.vmap`
of all sequences of a batch: part I of the page, with equal forms of three of its functions, in
section 1: moe_all and softmax for speed, top_k since JAX's sort takes other words. test_train.py
shows them equal. The recipe is that of section 4.2 of the paper, with Muon for the matrices;
README.md has it beside the paper's.

A run that was stopped goes on from its last checkpoint when the same command is given again, and on a CPU ends as if it
had never been stopped: each step's batch depends on the seed and the step alone. Until the decay begins, --steps may be
changed on the way.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import deepseek_v3 as dsv3  # noqa: E402

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # ids 0 and 1, as in the release
MODEL = dsv3.Config(
    vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
    q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48,
    intermediate_size=512, first_k_dense_replace=1, moe_intermediate_size=64, n_shared_experts=1,
    n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    rope_scaling=dsv3.Yarn(factor=4.0, original_max_position_embeddings=256, mscale=1.0),
    max_position_embeddings=1024, num_nextn_predict_layers=1,
)  # fmt: skip
INIT_STD = 0.03
SEQUENCES, LENGTH = 8, 512  # of one batch
MUON, ADAM = 7.5e-3, 2.5e-3  # peak learning rates: of the matrices, and of embedding, head, routers and norms
NEWTON_SCHULZ = 5 * ((3.4445, -4.7750, 2.0315),)  # Muon's usual; given five times, optax loops, which compiles sooner
WARMUP, DECAY_FROM, FLOOR = 100, 0.6, 0.02  # steps; share of the steps; share of the peak that is left at the end
WEIGHT_DECAY, CLIP = 0.2, 1.0  # of the matrices; the gradient norm that is clipped to
GAMMA = 0.001  # speed of the bias update
GAMMA_UNTIL = 0.9  # the share of the steps after which it is frozen
ALPHA = 0.0001  # weight of the sequence-wise balance loss
LAMBDA, LAMBDA_LATE = 0.3, 0.1  # weight of the MTP loss, before and in the decay
VALIDATION = 0.02  # the last stories, never trained on
VALIDATE_EVERY, SAVE_EVERY = 500, 120  # steps; seconds
CAPACITY = 1.5  # how many times its fair share of tokens an expert may get before the slower form is taken


# ---- 1. Equal forms that are fast under JAX ------------------------------------------------------


def grouped_experts(x_TD, w, name, index_TK, gate_TK, cfg):
    """= dsv3.moe_all, where each layer's experts lie in one array: each expert sees only its own
    tokens, in three batched products over experts and capacity. If one has more tokens than that,
    the capacity is all of them. Under vmap the tokens of all sequences are grouped at once: a
    choice for each of them would compute both capacities."""
    K, E = cfg.num_experts_per_tok, cfg.n_routed_experts

    def experts(capacity, first_E, load_E, order_X, x_MD, gate_X, gate_EID, up_EID, down_EDI):
        slot_C = jnp.arange(capacity)
        choice_EC = order_X[jnp.minimum(first_E[:, None] + slot_C, order_X.size - 1)]
        gate_EC = jnp.where(slot_C < load_E[:, None], gate_X[choice_EC], 0)  # 0: the slot is empty
        token_EC = choice_EC // K
        x_ECD = x_MD[token_EC]
        hidden_ECI = jax.nn.silu(x_ECD @ gate_EID.mT) * (x_ECD @ up_EID.mT) * gate_EC[..., None]
        return jnp.zeros_like(x_MD).at[token_EC].add(hidden_ECI @ down_EDI.mT)

    def grouped(x_MD, index_MK, gate_MK, *parts):
        index_X = index_MK.ravel()  # X = M K choices
        order_X = jnp.argsort(index_X, stable=True)  # the choices by expert
        load_E = jnp.sum(dsv3.one_hot(index_X, E), axis=0)
        first_E = jnp.cumsum(load_E) - load_E
        capacity = min(len(x_MD), math.ceil(CAPACITY * index_X.size / E))
        few, all_ = partial(experts, capacity), jax.checkpoint(partial(experts, len(x_MD)))
        given = first_E, load_E, order_X, x_MD, gate_MK.ravel(), *parts
        return jax.lax.cond(jnp.max(load_E) <= capacity, few, all_, *given)

    def of_all_sequences(size, batched, *given):
        assert batched == [True] * 3 + [False] * 3  # the weights are shared
        merged = [x.reshape(-1, x.shape[-1]) for x in given[:3]]
        return grouped(*merged, *given[3:]).reshape(given[0].shape), True

    parts = [w[f"{name}.experts.{part}_proj.weight"] for part in ("gate", "up", "down")]
    by_sequence = jax.custom_batching.custom_vmap(grouped)
    by_sequence.def_vmap(of_all_sequences)
    return by_sequence(x_TD, index_TK, gate_TK, *parts)


def use_jax():
    """Put jax.numpy and the equal forms into the page."""
    dsv3.xp, dsv3.softmax = jnp, jax.nn.softmax
    dsv3.top_k = lambda score, k: jax.lax.top_k(score, k)[1]


def place(w):
    """Each tensor over all devices, an even number: heads over one axis of their mesh, experts and
    the width of MLPs over the other, the vocabulary over both; what is small lies on each."""
    mesh = Mesh(np.reshape(jax.devices(), (2, -1)), ("heads", "experts"))

    def spec(name, ndim):
        if ndim == 3 or name.endswith(("gate_proj.weight", "up_proj.weight")):
            return P("experts")
        if name.endswith("down_proj.weight"):
            return P(None, "experts")
        if name.endswith(("q_b_proj.weight", "kv_b_proj.weight")):
            return P("heads")
        if name.endswith("o_proj.weight"):
            return P(None, "heads")
        vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        return P(("heads", "experts")) if vocabulary else P()

    return {n: jax.device_put(x, NamedSharding(mesh, spec(n, x.ndim))) for n, x in w.items()}


# ---- 2. Text -------------------------------------------------------------------------------------------------------


def read_stories(path):
    """The stories of a text, and those at its end that are held out."""
    stories = [s.strip() for s in path.read_text(encoding="utf-8").split("<|endoftext|>") if s.strip()]
    trained_on = len(stories) - round(VALIDATION * len(stories))
    return stories[:trained_on], stories[trained_on:]


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


class Batches:
    """The stories one after the other, in another order in each pass over them, cut into windows; a batch depends on
    the seed and its number alone."""

    def __init__(self, stories, seed):
        self.stories, self.seed, self.current = stories, seed, None
        self.per_pass = sum(map(len, stories)) // (SEQUENCES * LENGTH)

    def __getitem__(self, i):
        """(SEQUENCES, LENGTH + 1); the last token of a sequence is the first of the next."""
        number, i = divmod(i, self.per_pass)
        if number != self.current:
            order = np.random.default_rng([self.seed, number]).permutation(len(self.stories))
            self.stream = np.concatenate([*(self.stories[s] for s in order), self.stories[order[0]][:1]])
            self.current = number
        start_B = LENGTH * (SEQUENCES * i + np.arange(SEQUENCES))
        return self.stream[start_B[:, None] + np.arange(LENGTH + 1)]


# ---- 3. One step ---------------------------------------------------------------------------------


def objective(params, biases, token_BX, mtp_weight):
    """Loss and parts of a batch: the means over its sequences, and the sums of their loads."""

    def objective_of(token_X):
        w = params | biases
        return dsv3.training_objective(w, token_X, MODEL, mtp_weight, ALPHA, grouped_experts)

    loss_B, parts = jax.vmap(objective_of)(token_BX)
    load = {name: jnp.sum(load_BE, axis=0) for name, load_BE in parts.pop("load").items()}
    return jnp.mean(loss_B), jax.tree.map(jnp.mean, parts) | {"load": load}


def joined(name):
    """The name under which all experts of a layer lie in one array."""
    return re.sub(r"experts\.\d+\.", "experts.", name)


def initial_weights(seed):
    """Matrices normal with INIT_STD, norms 1; apart from them the routers' biases, 0, which no gradient moves."""
    rng, params, biases = np.random.default_rng(seed), {}, {}
    for name, shape in dsv3.tensor_shapes(MODEL).items():
        if name.endswith("e_score_correction_bias"):
            biases[name] = jnp.zeros(shape, jnp.float32)
        elif name.endswith("norm.weight"):
            params[name] = jnp.ones(shape)
        elif joined(name) not in params:
            experts = () if joined(name) == name else (MODEL.n_routed_experts,)
            params[joined(name)] = jnp.asarray(rng.normal(0, INIT_STD, experts + shape), jnp.float32)
    return params, biases


def schedule(peak, steps):
    """Linear warm-up, constant, then from the decay's first step a cosine to FLOOR."""
    decay = decay_start(steps)
    warmup = optax.linear_schedule(peak / WARMUP, peak, WARMUP - 1)
    return optax.join_schedules([warmup, optax.cosine_decay_schedule(peak, steps - decay, FLOOR)], [decay])


def decay_start(steps):
    return round(DECAY_FROM * steps)


def make_optimiser(steps):
    """Muon for the matrices, with updates of rms 0.2 times the rate as in Moonlight (arXiv:2502.16982), each expert's
    for itself; Adam for embedding, head, routers and norms."""
    matrix = optax.contrib.MuonDimensionNumbers(-1, -2)

    def muon_or_adam(params):
        by_adam = re.compile(r"norm\.weight|embed_tokens|lm_head|mlp\.gate\.")
        return {name: None if by_adam.search(name) else matrix for name in params}

    muon = optax.contrib.muon(
        schedule(MUON, steps), ns_coeffs=NEWTON_SCHULZ, consistent_rms=0.2, weight_decay=WEIGHT_DECAY,
        muon_weight_dimension_numbers=muon_or_adam, adam_learning_rate=schedule(ADAM, steps), adam_b2=0.95,
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(CLIP), muon)


def make_step(optimiser):
    """One jitted step of training: (state, tokens, lambda, gamma) -> (state, figures)."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, token_BX, mtp_weight, gamma):
        params = state["params"]
        grad, parts = jax.grad(objective, has_aux=True)(params, state["biases"], token_BX, mtp_weight)
        update, moments = optimiser.update(grad, state["moments"], params)
        load = {f"{name}.e_score_correction_bias": load_E for name, load_E in parts["load"].items()}
        biases = {k: dsv3.update_bias(b, load[k], gamma) for k, b in state["biases"].items()}
        figures = {"main": parts["main"], "mtp": parts["mtp"][0], "balance": parts["balance"],
                   "norm": optax.tree.norm(grad), "load": jnp.stack([load[k] for k in sorted(load)])}  # fmt: skip
        params = optax.apply_updates(params, update)
        return {"params": params, "moments": moments, "biases": biases, "step": state["step"] + 1}, figures

    return step


# ---- 4. The run ----------------------------------------------------------------------------------------------------


@jax.jit
def story_loss(w, token_BX):
    def loss_of(token_X):
        h_TD = dsv3.forward(token_X[:-1], w, MODEL, experts=grouped_experts)
        return dsv3.cross_entropy(dsv3.head(h_TD, w), token_X[1:])

    return jax.vmap(loss_of)(token_BX)


def validation_bits(w, tokenizer, stories, length=512):
    """Bits per byte of whole stories, each after its own BOS, the end token's included; what goes past `length` is left
    out of both counts."""
    nats = count = 0
    for first in range(0, len(stories), 8):
        rows = [(tokenizer.encode(s).ids + [1])[: length + 1] for s in stories[first : first + 8]]
        token_BX = np.zeros((8, length + 1), np.int32)
        for b, ids in enumerate(rows):
            token_BX[b, : len(ids)] = ids
        loss_BT = np.asarray(story_loss(w, token_BX))
        nats += sum(float(loss_BT[b, : len(ids) - 1].sum()) for b, ids in enumerate(rows))
        count += sum(len(tokenizer.decode(ids).encode()) for ids in rows)
    return nats / math.log(2) / count


def write_checkpoint(out, params, biases):
    """The directory in the Hugging Face layout: matrices in BF16, the routers' biases in F32."""
    tensors = {name: np.asarray(x) for name, x in biases.items()}
    for name in dsv3.tensor_shapes(MODEL).keys() - biases.keys():
        expert = re.search(r"experts\.(\d+)\.", name)
        x = params[joined(name)][int(expert[1])] if expert else params[name]
        tensors[name] = np.asarray(x).astype(ml_dtypes.bfloat16)
    files, weight_map = {"model.safetensors": {}, "mtp.safetensors": {}}, {}
    for name in dsv3.tensor_shapes(MODEL):
        mtp = re.match(r"model\.layers\.(\d+)", name)  # apart, since many engines know no MTP module
        weight_map[name] = list(files)[bool(mtp) and int(mtp[1]) >= MODEL.num_hidden_layers]
        files[weight_map[name]][name] = tensors[name]
    for file, held in files.items():
        save_file(held, out / f"{file}.part", metadata={"format": "pt"})
        os.replace(out / f"{file}.part", out / file)
    size = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    yarn = asdict(MODEL.rope_scaling)
    config = json.loads(Path(__file__).with_name("config.json").read_text()) | asdict(MODEL) | {
        "rope_scaling": yarn | {"mscale_all_dim": yarn["mscale"], "type": "yarn"},
        "num_key_value_heads": MODEL.num_attention_heads, "initializer_range": INIT_STD,
    }  # fmt: skip
    tokens = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "add_eos_token": False,
              "model_max_length": MODEL.max_position_embeddings, "tokenizer_class": "PreTrainedTokenizerFast",
              "clean_up_tokenization_spaces": False}  # fmt: skip
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    for name, value in (("config", config), ("tokenizer_config", tokens), ("generation_config", generation)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_state(file, state):
    """The state that was saved, or the given one, whose structure it has."""
    if not file.exists():
        return state
    leaves, tree = jax.tree.flatten(state)
    with np.load(file) as kept:
        return tree.unflatten([jnp.asarray(kept[f"arr_{i}"]) for i in range(len(leaves))])


def save_state(file, state, entries):
    """The state whole or not at all, then the log of the steps since the last save."""
    part = file.with_name("part.npz")
    np.savez(part, *jax.tree.leaves(state))
    os.replace(part, file)
    with file.with_name("log.jsonl").open("a") as log:
        log.writelines(json.dumps(entry) + "\n" for entry in entries)


def print_acceptance(out, stories):
    """By the program's own statistics: drafts and acceptances in greedy continuations of first
    sentences."""
    prompts = [f"--prompt={story[: story.find('.') + 1]}" for story in stories]
    command = [sys.executable, ROOT / "deepseek_v3.py", "--weights", out, "-n", "150", "--mtp", "--device", "cpu"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    said = subprocess.run([*command, *prompts], **quiet, check=True).stderr
    pairs = re.findall(r"drafted (\d+), accepted (\d+)", said)
    drafted, accepted = np.array(pairs, int).sum(axis=0)
    print(f"drafted {drafted}, accepted {accepted}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="stories, each followed by a line <|endoftext|>")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for the checkpoint; state and log in OUT/state"
    )
    parser.add_argument("--steps", type=int, default=23500, help="may be changed until the decay begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-bias-update", action="store_true", help="the control: gamma 0 throughout")
    args = parser.parse_args(argv)
    saved = args.out / "state" / "state.npz"
    saved.parent.mkdir(parents=True, exist_ok=True)
    use_jax()

    stories, held_out = read_stories(args.text)
    tokenizer = make_tokenizer(stories, args.out / "tokenizer.json")
    batches = Batches([np.array([*e.ids, 1], np.int32) for e in tokenizer.encode_batch(stories)], args.seed)
    params, biases = initial_weights(args.seed)
    optimiser = make_optimiser(args.steps)
    state = {"params": params, "biases": biases, "moments": optimiser.init(params), "step": jnp.zeros((), int)}
    state = read_state(saved, state)
    if jax.device_count() % 2 == 0:
        state["params"] = place(state["params"])
    first, size = int(state["step"]), sum(x.size for x in params.values())
    print(f"{size:,} parameters, a pass over the text is {batches.per_pass} steps, from step {first}")

    step, entries, last_save = make_step(optimiser), [], time.monotonic()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", mininterval=5)
    for i in bar:
        mtp_weight = LAMBDA if i < decay_start(args.steps) else LAMBDA_LATE
        gamma = 0.0 if args.no_bias_update or i >= GAMMA_UNTIL * args.steps else GAMMA
        began = time.monotonic()
        state, figures = step(state, batches[i], mtp_weight, gamma)
        figures = {k: np.asarray(v).tolist() for k, v in figures.items()}
        bar.set_postfix(loss=f"{figures['main']:.3f}", tok_s=f"{SEQUENCES * LENGTH / (time.monotonic() - began):.0f}")
        entry = {"step": i + 1} | figures
        if (i + 1) % VALIDATE_EVERY == 0:
            bits = validation_bits(state["params"] | state["biases"], tokenizer, held_out[:64])
            entry["validation_bits_per_byte"] = bits
            tqdm.write(f"step {i + 1}: {bits:.4f} bits per byte on 64 held-out stories")
        entries.append(entry)
        if time.monotonic() - last_save > SAVE_EVERY or i + 1 == args.steps:
            save_state(saved, state, entries)
            entries, last_save = [], time.monotonic()

    params = {name: x.astype(jnp.bfloat16).astype(jnp.float32) for name, x in state["params"].items()}
    bits = validation_bits(params | state["biases"], tokenizer, held_out)
    write_checkpoint(args.out, params, state["biases"])
    print(f"{bits:.4f} bits per byte on {len(held_out)} held-out stories, weights rounded to BF16")
    print_acceptance(args.out, held_out[:60])


if __name__ == "__main__":
    main()
