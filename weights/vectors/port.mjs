// DeepSeek-V3 in plain JavaScript, written from deepseek_v3.py alone (parts I and II, dequantize, generate): a second
// opinion on whether that page says everything, and a port for the conformance kit beside it to be tried on.
//
//     node port.mjs DIRECTORY            answers DIRECTORY/request.json in DIRECTORY/answer.safetensors
//     node port.mjs --story WEIGHTS      tells the story of the small model in WEIGHTS
//
// All is computed in float64. Names are the page's; "(5)" is equation 5. A vector is a Float64Array. An activation is a
// list of vectors, one for each token, or of lists of them, one for each head; a matrix is a list of its rows. A batch
// is a loop over prompts with a cache each, so nothing is padded. What a query may not see is left out, not masked.

import fs from "node:fs";

/** Refuse what is not in this port: exit code 3. */
function only(key, value, values) {
  if (values.includes(value)) return;
  console.error(`this port lacks ${key} ${JSON.stringify(value)}, it has ${values.join(", ")}`);
  process.exit(3);
}

// ---- 1. Arrays -----------------------------------------------------------------------------------------------------
function dot(x, y) {
  let total = 0;
  for (let i = 0; i < x.length; i++) total += x[i] * y[i];
  return total;
}

/** The sum of weights[i] * vectors[i]; vectors beyond the last weight are left out. */
function weighted_sum(weights, vectors) {
  const total = new Float64Array(vectors[0].length);
  for (let i = 0; i < weights.length; i++) {
    for (let j = 0, x = vectors[i]; j < x.length; j++) total[j] += weights[i] * x[j];
  }
  return total;
}

const range = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);
const sum = (x) => x.reduce((a, b) => a + b, 0);
const add = (x, y) => x.map((value, i) => value + y[i]);
const add_rows = (x, y) => x.map((row, t) => add(row, y[t]));
const concatenate = (...vectors) => Float64Array.from(vectors.flatMap((x) => Array.from(x)));
const argmax = (x) => x.reduce((best, value, i) => (value > x[best] ? i : best), 0); // the lowest among equals

/** A vector, or the rows of a matrix, in n equal parts. Those of a vector are views. */
function split(x, n) {
  const size = x.length / n, part = (x.subarray ?? x.slice).bind(x);
  return range(0, n).map((i) => part(i * size, (i + 1) * size));
}
/** Indices of the k largest, largest first, the lowest among equals; two of -inf differ by NaN, so count as equal. */
const top_k = (score, k) => [...score.keys()].sort((a, b) => score[b] - score[a] || a - b).slice(0, k);

let recorded = null; // while recording: name -> one entry for each token, of all chunks

/** Keep x under its name, if recording -> x. */
function record(name, x) {
  if (recorded) (recorded[name] ??= []).push(...x);
  return x;
}

// ---- 2. Configuration ----------------------------------------------------------------------------------------------
const ABSENT = {
  model_type: "deepseek_v3", q_lora_rank: null, rope_theta: 10000, num_nextn_predict_layers: 1,
};
const ONLY = { // an absent key means the first
  model_type: ["deepseek_v3", "kimi_k2", "glm4_moe_lite"], scoring_func: ["sigmoid"], topk_method: ["noaux_tc"],
  norm_topk_prob: [true], attention_bias: [false], tie_word_embeddings: [false], rope_interleave: [true],
};
const read_json = (file) => (fs.existsSync(file) ? JSON.parse(fs.readFileSync(file, "utf8")) : null);
const present = (keys) => Object.fromEntries(Object.entries(keys ?? {}).filter(([, value]) => value !== null));

/** config.json in the release's spelling (rope_scaling, rope_theta) or that of transformers 5 (rope_parameters). */
function parse_config(keys) {
  const cfg = { ...ABSENT, ...present(keys) };
  const rope = present(cfg.rope_parameters ?? cfg.rope_scaling), type = rope.rope_type ?? rope.type ?? "default";
  for (const [key, values] of Object.entries(ONLY)) only(key, cfg[key] ?? values[0], values);
  only("rope_scaling.type", type, ["yarn", "default"]);
  cfg.rope_theta = rope.rope_theta ?? cfg.rope_theta;
  cfg.rope_scaling = type === "yarn" ? { beta_fast: 32, beta_slow: 1, ...rope } : null;
  only("truncate", cfg.rope_scaling?.truncate ?? true, [true]);
  only("mscale", cfg.rope_scaling?.mscale, [cfg.rope_scaling?.mscale_all_dim]);
  return cfg;
}

// ---- 3. Primitives -------------------------------------------------------------------------------------------------
/** W x */
function times(matrix, x) {
  const y = new Float64Array(matrix.length);
  for (let i = 0; i < y.length; i++) y[i] = dot(matrix[i], x);
  return y;
}

const linear = (x, w, name) => times(w.get(`${name}.weight`), x);

/** x / rms(x) * weight; eps stands inside the root. */
function rms_norm(x, weight, eps) {
  const rms = Math.sqrt(dot(x, x) / x.length + eps);
  return x.map((value, i) => rounded(rounded(value / rms) * weight[i]));
}

/** The nearest number of float16 if that is asked for: so much of half precision as the cases `half` see, the rounding
 * before a norm's weight and after it. All else is computed in float64. */
let rounded = (x) => x;
const to_float16 = (x) => to_small(x, 10, -14);

const sigmoid = (z) => 1 / (1 + Math.exp(-z)); // of a very negative z: 1 / inf, the 0 it should be

/** down_proj(silu(gate_proj(x)) * up_proj(x)) */
function swiglu(x, w, name) {
  const gate = linear(x, w, `${name}.gate_proj`), up = linear(x, w, `${name}.up_proj`);
  return linear(gate.map((z, i) => z * sigmoid(z) * up[i]), w, `${name}.down_proj`);
}

function softmax(x) {
  const max = x[argmax(x)], e = x.map((value) => Math.exp(value - max)), total = sum(e);
  return e.map((value) => value / total);
}

/** Radians per position of each pair j: theta^(-2j/R); YaRN divides those of slow pairs by the factor, with a ramp. */
function rope_frequencies({ qk_rope_head_dim: R, rope_theta: theta, rope_scaling: yarn }) {
  const freq = Float64Array.from(range(0, R / 2), (j) => theta ** ((-2 * j) / R));
  if (!yarn) return freq;
  const correction_dim = (turns) => // the pair, as a real number, that turns so many times within the original context
    (R * Math.log(yarn.original_max_position_embeddings / (2 * Math.PI * turns))) / (2 * Math.log(theta));
  const low = Math.max(Math.floor(correction_dim(yarn.beta_fast)), 0);
  const high = Math.min(Math.ceil(correction_dim(yarn.beta_slow)), R - 1);
  return freq.map((f, j) => {
    const ramp = Math.min(Math.max((j - low) / (high - low || 0.001), 0), 1);
    return f * (1 - ramp) + (f / yarn.factor) * ramp;
  });
}

/** 1 / sqrt(d_h + d_h^R) of (10), times YaRN's m^2, m = 0.1 mscale ln(s) + 1. */
function softmax_scale({ rope_scaling: yarn, qk_nope_head_dim: N, qk_rope_head_dim: R }) {
  return (yarn ? 0.1 * yarn.mscale * Math.log(yarn.factor) + 1 : 1) ** 2 / Math.sqrt(N + R);
}

/** cos and sin of each position, for each pair. */
function phases(positions, cfg) {
  const frequencies = rope_frequencies(cfg);
  const of = (f) => positions.map((position) => frequencies.map((radians) => f(position * radians)));
  return { cos: of(Math.cos), sin: of(Math.sin) };
}

/** Rotate pair j of x, the neighbours 2j and 2j + 1, by its angle. */
function rope(x, [cos, sin]) {
  const out = new Float64Array(x.length);
  for (let j = 0; j < cos.length; j++) {
    const [a, b] = [2 * j, 2 * j + 1];
    [out[a], out[b]] = [x[a] * cos[j] - x[b] * sin[j], x[a] * sin[j] + x[b] * cos[j]];
  }
  return out;
}

// ---- 4. Multi-head latent attention, and what section 8 makes of it ------------------------------------------------
/** (10): q[t][h], k[s][j], v[s][j] -> o[t][h]. Query t stands at position start + t and sees no later key. As many key
 * heads as heads is multi-head attention, one key head multi-query. */
function attention(q, k, v, start, scale) {
  return q.map((heads, t) => heads.map((query, h) => {
    const j = Math.floor((h * k[0].length) / heads.length); // its key head
    const p = softmax(range(0, start + t + 1).map((s) => scale * dot(query, k[s][j])));
    return weighted_sum(p, v.map((values) => values[j]));
  }));
}

/** Of section 4.2: eps is 1e-6, whatever rms_norm_eps says. */
const latent_norm = (c, w, name) => rms_norm(c, w.get(`${name}.weight`), 1e-6);

/** One token's queries: for each head {nope, rope}, the second rotated. */
function mla_query(x, w, name, cfg, phase) {
  const compressed = cfg.q_lora_rank !== null, N = cfg.qk_nope_head_dim;
  const latent = compressed ? latent_norm(linear(x, w, `${name}.q_a_proj`), w, `${name}.q_a_layernorm`) : x; // (6)
  const q = split(linear(latent, w, `${name}.${compressed ? "q_b_proj" : "q_proj"}`), cfg.num_attention_heads); // (7)
  return q.map((head) => ({ nope: head.slice(0, N), rope: rope(head.slice(N), phase) })); // (8)
}

/** What the cache keeps of one token: c_KV after its norm, and the rotated key of all heads, made from x. */
function mla_latent(x, w, name, cfg, phase) {
  const kv = linear(x, w, `${name}.kv_a_proj_with_mqa`), C = cfg.kv_lora_rank;
  const c = latent_norm(kv.slice(0, C), w, `${name}.kv_a_layernorm`); // (1)
  return concatenate(c, rope(kv.slice(C), phase)); // (3)
}

/** Definition: expand every entry to the keys (2) and values (5) of all heads, then multi-head attention. */
function mla_naive(q, entries, w, name, cfg, start) {
  const { num_attention_heads: H, qk_nope_head_dim: N, kv_lora_rank: C } = cfg;
  const kv = entries.map((entry) => split(linear(entry.slice(0, C), w, `${name}.kv_b_proj`), H)); // heads [k ; v]
  const k = kv.map((heads, s) => heads.map((head) => concatenate(head.slice(0, N), entries[s].slice(C)))); // (4)
  const v = kv.map((heads) => heads.map((head) => head.slice(N)));
  const joined = q.map((heads) => heads.map(({ nope, rope }) => concatenate(nope, rope))); // (9)
  return attention(joined, k, v, start, softmax_scale(cfg));
}

/** The same, no key expanded: q . (W_UK c) = (W_UK^T q) . c. An entry is the key of all heads, its c the value. */
function mla_absorbed(q, entries, w, name, cfg, start) {
  const { num_attention_heads: H, qk_nope_head_dim: N, kv_lora_rank: C } = cfg;
  const up = split(w.get(`${name}.kv_b_proj.weight`), H); // each head's rows [W_UK ; W_UV]; below W_UK^T q
  const absorbed = q.map((heads) => heads.map(({ nope, rope }, h) => concatenate(weighted_sum(nope, up[h]), rope)));
  const k = entries.map((entry) => [entry]), v = entries.map((entry) => [entry.subarray(0, C)]);
  const o = attention(absorbed, k, v, start, softmax_scale(cfg));
  return o.map((heads) => heads.map((head, h) => times(up[h].slice(N), head))); // W_UV o
}

/** cache[layer] is a list of entries [c_KV ; k_R], one for each position; what stands from `start` on, such as a
 * rejected draft, is replaced. Keys are expanded at position 0, else absorbed, so that the kit tries both forms. */
function mla(x, w, layer, cfg, cache, start) {
  const name = `model.layers.${layer}.self_attn`, C = cfg.kv_lora_rank;
  const first = (cache.first ?? 0) + start, { cos, sin } = phases(range(first, first + x.length), cfg);
  const q = x.map((row, t) => mla_query(row, w, name, cfg, [cos[t], sin[t]]));
  const entries = x.map((row, t) => mla_latent(row, w, name, cfg, [cos[t], sin[t]]));
  record(`${name}.q_rope`, q.map((heads) => heads.map(({ rope }) => rope)));
  record(`${name}.kv_latent`, entries.map((entry) => entry.slice(0, C)));
  record(`${name}.k_rope`, entries.map((entry) => entry.slice(C)));
  cache[layer] = [...(cache[layer] ?? []).slice(0, start), ...entries];
  const o = (start ? mla_absorbed : mla_naive)(q, cache[layer], w, name, cfg, start);
  return record(name, o.map((heads) => linear(concatenate(...heads), w, `${name}.o_proj`))); // (11)
}

// ---- 5. DeepSeekMoE ------------------------------------------------------------------------------------------------
/** One token's affinities, its experts, best first, and their gates. */
function route(x, w, name, cfg) {
  const scores = linear(x, w, `${name}.gate`).map(sigmoid); // (15)
  const biased = add(scores, w.get(`${name}.gate.e_score_correction_bias`)); // (16): to choose only
  const indices = top_k(keep_best_groups(biased, cfg), cfg.num_experts_per_tok);
  const chosen = Float64Array.from(indices, (e) => scores[e]), total = sum(chosen) + 1e-20; // (13)
  return { scores, indices, weights: chosen.map((score) => (score / total) * cfg.routed_scaling_factor) };
}

/** -inf except in the topk_group groups whose two highest sum highest. */
function keep_best_groups(choice, { n_group, topk_group }) {
  const group = split(choice, n_group).map((members) => sum(members.slice().sort().slice(-2)));
  const kept = top_k(group, topk_group), size = choice.length / n_group;
  return choice.map((value, e) => (kept.includes(Math.floor(e / size)) ? value : -Infinity));
}

/** (12) without its residual; only the chosen experts, as the other gates are 0. */
function moe(x, w, name, cfg) {
  const routes = x.map((row) => route(row, w, name, cfg));
  for (const part of ["scores", "indices", "weights"]) record(`${name}.gate.${part}`, routes.map((each) => each[part]));
  const experts = (row, indices) => indices.map((e) => swiglu(row, w, `${name}.experts.${e}`));
  const y = x.map((row, t) => weighted_sum(routes[t].weights, experts(row, routes[t].indices)));
  return add_rows(y, record(`${name}.shared_experts`, x.map((row) => swiglu(row, w, `${name}.shared_experts`))));
}

/** After a training step: down by gamma where overloaded, up where underloaded. */
const update_bias = (bias, load, gamma) => bias.map((b, e) => b + gamma * Math.sign(sum(load) / load.length - load[e]));

/** (17)-(20) of one sequence, without alpha; f counts the plain top K, with neither bias nor groups. */
function balance_loss(scores, { n_routed_experts: E, num_experts_per_tok: K }) {
  const f = new Float64Array(E), T = scores.length, p = weighted_sum(scores.map((row) => 1 / sum(row) / T), scores);
  for (const e of scores.flatMap((row) => top_k(row, K))) f[e] += E / (K * T); // (18); p: (19), (20)
  return dot(f, p); // (17)
}

// ---- 6. The model --------------------------------------------------------------------------------------------------
const norm = (x, w, name, cfg) => x.map((row) => rms_norm(row, w.get(`${name}.weight`), cfg.rms_norm_eps));
const embed = (tokens, w) => tokens.map((token) => w.get("model.embed_tokens.weight")[token]);
const head = (h, w) => h.map((row) => linear(row, w, "lm_head"));

function block(x, w, layer, cfg, cache, start) {
  const name = `model.layers.${layer}`, is_dense = layer < cfg.first_k_dense_replace;
  const recorded_norm = (x, which) => record(`${name}.${which}`, norm(x, w, `${name}.${which}`, cfg));
  x = add_rows(x, mla(recorded_norm(x, "input_layernorm"), w, layer, cfg, cache, start));
  const normed = recorded_norm(x, "post_attention_layernorm");
  const y = is_dense ? normed.map((row) => swiglu(row, w, `${name}.mlp`)) : moe(normed, w, `${name}.mlp`, cfg);
  return record(name, add_rows(x, record(`${name}.mlp`, y)));
}

/** Tokens from position `start` on continue what the cache holds -> their states h^0. */
function forward(tokens, w, cfg, cache, start) {
  let x = record("model.embed_tokens", embed(tokens, w));
  for (let layer = 0; layer < cfg.num_hidden_layers; layer++) x = block(x, w, layer, cfg, cache, start);
  return record("model.norm", norm(x, w, "model.norm", cfg));
}

// ---- 7. Multi-token prediction -------------------------------------------------------------------------------------
/** How many modules: those of the config before the first whose tensors are absent. */
const mtp_depth = (w, { num_hidden_layers: L, num_nextn_predict_layers: D }) =>
  [...range(L, L + D).map((layer) => w.has(`model.layers.${layer}.eh_proj.weight`)), false].indexOf(false);

/** (21) */
function mtp_input(h, tokens, w, name, cfg) {
  const state = norm(h, w, `${name}.hnorm`, cfg), embedded = norm(embed(tokens, w), w, `${name}.enorm`, cfg);
  return embedded.map((row, i) => linear(concatenate(row, state[i]), w, `${name}.eh_proj`));
}

/** (21), (22): pairs (h_i of module k - 1, token i + k), i from `start` on -> h_i of module k, after its norm. */
function mtp(k, h, tokens, w, cfg, cache, start) {
  const layer = cfg.num_hidden_layers + k - 1, name = `model.layers.${layer}`, x = mtp_input(h, tokens, w, name, cfg);
  return norm(block(record(`${name}.eh_proj`, x), w, layer, cfg, cache, start), w, `${name}.shared_head.norm`, cfg);
}

/** step(tokens, from) for chunks of these sizes, in turn, where null is one chunk; the last takes what is left. */
function in_chunks(tokens, sizes, step) {
  const ends = (sizes ?? []).map((_, i) => sum(sizes.slice(0, i + 1))).filter((end) => end < tokens.length);
  return [0, ...ends].flatMap((from, i) => step(tokens.slice(from, ends[i]), from));
}

/** All named activations of a prompt, also of `depth` modules, if it is long enough for them. first: its position. */
function trace(prompt, w, cfg, sizes, depth, first = 0) {
  const cache = Object.assign([], { first });
  recorded = {};
  let h = in_chunks(prompt, sizes, (tokens, from) => forward(tokens, w, cfg, cache, from));
  record("lm_head", head(h, w));
  for (let k = 1; k <= Math.min(depth, mtp_depth(w, cfg), prompt.length - 1); k++) {
    const before = h, states = (tokens, from) => before.slice(from, from + tokens.length);
    h = in_chunks(prompt.slice(k), sizes, (tokens, from) => mtp(k, states(tokens, from), tokens, w, cfg, cache, from));
    record(`model.layers.${cfg.num_hidden_layers + k - 1}.shared_head`, head(h, w)); // (23)
  }
  return recorded;
}

/** The loss of pre-training of one sequence of T + 1 tokens, and its parts. */
function training_objective(prompt, { mtp_weight, balance_weight }, w, cfg) {
  const T = prompt.length - 1, D = mtp_depth(w, cfg), named = trace(prompt.slice(0, T), w, cfg, null, D);
  const loss = (name, targets) => -sum(named[name].map((row, t) => Math.log(softmax(row)[targets[t]]))) / T;
  const parts = { main: loss("lm_head", prompt.slice(1)), balance: 0, total: 0 };
  for (let k = 1; k <= D; k++) { // (24): T - k terms, divided by T
    parts[`mtp.${k}`] = loss(`model.layers.${cfg.num_hidden_layers + k - 1}.shared_head`, prompt.slice(k + 1));
    parts.total += (mtp_weight * parts[`mtp.${k}`]) / D; // (25)
  }
  const gates = Object.keys(named).filter((name) => name.endsWith(".gate.scores")); // of all layers, MTP's too
  parts.balance = sum(gates.map((name) => balance_loss(named[name], cfg)));
  parts.total += parts.main + balance_weight * parts.balance;
  return parts;
}

// ---- 9. Checkpoints ------------------------------------------------------------------------------------------------
/** A float of 8 or 16 bits: sign, E bits of exponent, M of mantissa. The infinities of F16 are in no checkpoint. */
function small_float(code, E, M) {
  const bias = 2 ** (E - 1) - 1, exponent = (code >> M) % 2 ** E, mantissa = (code % 2 ** M) / 2 ** M;
  const size = exponent ? (1 + mantissa) * 2 ** (exponent - bias) : mantissa * 2 ** (1 - bias);
  return code >> (E + M) ? -size : size;
}

const NUMBER = {
  F16: (code) => small_float(code, 5, 10),
  BF16: (code) => new Float32Array(Uint32Array.of(code << 16).buffer)[0],
  F8_E4M3: (code) => (code % 128 < 127 ? small_float(code, 4, 3) : NaN),
};
const TABLES = {}; // the number of each code

function looked_up(codes, dtype) {
  const table = (TABLES[dtype] ??= Float64Array.from(range(0, 256 ** codes.BYTES_PER_ELEMENT), NUMBER[dtype]));
  const out = new Float64Array(codes.length);
  for (let i = 0; i < out.length; i++) out[i] = table[codes[i]];
  return out;
}

const DECODE = {
  I64: (bytes) => Array.from(new BigInt64Array(bytes), Number),
  F64: (bytes) => new Float64Array(bytes),
  F32: (bytes) => new Float32Array(bytes),
  F16: (bytes) => looked_up(new Uint16Array(bytes), "F16"),
  BF16: (bytes) => looked_up(new Uint16Array(bytes), "BF16"),
  F8_E4M3: (bytes) => looked_up(new Uint8Array(bytes), "F8_E4M3"),
};

/** One scale for each block of 128 x 128, the last ones cropped. It multiplies, rounded to float32. */
const dequantize = (rows, scale) =>
  rows.map((row, y) => row.map((value, x) => Math.fround(value * scale[y >> 7][x >> 7])));

const in_rows = (data, shape) =>
  shape.length < 2 ? data : split(data, shape[0]).map((part) => in_rows(part, shape.slice(1)));

/** The tensors of one file: 8 bytes, the length of the header; the header in JSON; the bytes of all tensors. */
function read_safetensors(file) {
  const bytes = fs.readFileSync(file), start = 8 + Number(bytes.readBigUInt64LE());
  const { __metadata__, ...header } = JSON.parse(bytes.toString("utf8", 8, start));
  return Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => [name, () => {
    only(`dtype of ${name}`, dtype, Object.keys(DECODE));
    const data = new Float64Array(DECODE[dtype](Uint8Array.prototype.slice.call(bytes, start + from, start + to).buffer));
    return { dtype, data: in_rows(data, shape) };
  }]);
}

/** has(name); get(name) -> a vector or matrix, decoded when first used. The index says in which shard a tensor is. */
function checkpoint(directory) {
  const index = read_json(`${directory}/model.safetensors.index.json`);
  const files = index ? [...new Set(Object.values(index.weight_map))] : ["model.safetensors"], kept = new Map();
  const held = (file) => read_safetensors(`${directory}/${file}`).filter(([name]) => !index || index.weight_map[name] === file);
  const stored = new Map(files.flatMap(held));
  const decode = ({ dtype, data }, name) => (dtype === "F8_E4M3" ? dequantize(data, get(`${name}_scale_inv`)) : data);
  const get = (name) => kept.get(name) ?? kept.set(name, decode(stored.get(name)(), name)).get(name);
  return { get, has: (name) => stored.has(name), stored };
}

/** A number, or vectors in lists of any depth -> a tensor to be written; lists of plain numbers are integers. */
function tensor(x) {
  const shape = [], flat = (y) => (y.length === undefined ? [y] : Array.from(y).flatMap(flat));
  let of = Float64Array;
  for (let y = x; y?.length !== undefined; y = y[0]) [of] = [y.constructor, shape.push(y.length)];
  if (of === Array) return { dtype: "I64", shape, data: BigInt64Array.from(flat(x), BigInt) };
  return { dtype: of === Float32Array ? "F32" : "F64", shape, data: of.from(flat(x)) };
}

function write_safetensors(file, named) {
  const header = {}, length = Buffer.alloc(8), tensors = named.map(([name, x]) => ({ name, ...tensor(x) }));
  let at = 0;
  for (const { name, dtype, shape, data } of tensors) {
    header[name] = { dtype, shape, data_offsets: [at, (at += data.byteLength)] };
  }
  const json = Buffer.from(JSON.stringify(header)), pad = Buffer.alloc(-json.length & 7, " ");
  length.writeBigUInt64LE(BigInt(json.length + pad.length));
  fs.writeFileSync(file, Buffer.concat([length, json, pad, ...tensors.map(({ data }) => Buffer.from(data.buffer))]));
}

// ---- 10. Generation, and the kit's requests ------------------------------------------------------------------------
/** Greedy. With drafts the main model sees [t_n, draft of t_n+1] in one pass; the MTP module then sees the pairs
 * (h_i, t_i+1) of verified tokens, and drafts again. A rejected draft's entry is overwritten by the next pass. */
function generate(prompt, { max_tokens, speculate, end_tokens = [] }, w, cfg) {
  const cache = [], tokens = [], drafts = [], accepted = [], likeliest = (state) => argmax(head([state], w)[0]);
  const drafting = speculate && mtp_depth(w, cfg) > 0;
  const ends = (token) => end_tokens.includes(token);
  let start = 0, feed = prompt, draft = [];
  while (tokens.length < max_tokens && !tokens.some(ends)) {
    const h = forward([...feed, ...draft], w, cfg, cache, start), made = [likeliest(h[feed.length - 1])];
    if (draft.length) {
      drafts.push(draft[0]);
      accepted.push(Number(draft[0] === made[0]));
      if (accepted.at(-1)) made.push(likeliest(h[feed.length]));
    }
    tokens.push(...made.slice(0, max_tokens - tokens.length));
    const pairs = [...feed, ...made].slice(1); // the tokens behind the verified states
    if (drafting) draft = [likeliest(mtp(1, h.slice(0, pairs.length), pairs, w, cfg, cache, start).at(-1))];
    [start, feed] = [start + pairs.length, made.slice(-1)];
  }
  if (tokens.some(ends)) tokens.length = tokens.findIndex(ends) + 1;
  return speculate ? { tokens, drafts, accepted } : { tokens };
}

/** The nearest number with so many bits of mantissa, the least exponent given; of two equally near ones the even. */
function to_small(x, bits, least) {
  const step = 2 ** (Math.max(Math.floor(Math.log2(Math.abs(x))), least) - bits), n = Math.abs(x) / step;
  const whole = Math.floor(n), up = n - whole > 0.5 || (n - whole === 0.5 && whole % 2 === 1);
  return Math.sign(x) * step * (whole + up);
}

const to_e4m3 = (x) => Math.max(-448, Math.min(to_small(x, 3, -6), 448));

/** y = W x as the release multiplies, which the page does not: x in tiles of 1 x 128, whose scale is largest / 448 in
 * float32, or the next power of two; codes times codes, then both scales. */
function fp8_linear(x, codes, scales, power_of_two) {
  const tiles = split(x, x.length / 128), quantised = tiles.map((tile) => {
    const exact = Math.fround(Math.fround(Math.max(1e-4, ...tile.map(Math.abs))) / 448);
    const scale = power_of_two ? 2 ** Math.ceil(Math.log2(exact)) : exact;
    return { scale, tile: tile.map((value) => to_e4m3(Math.fround(value / scale))) };
  });
  const part = (row, y) => ({ scale, tile }, i) =>
    dot(tile, row.subarray(128 * i, 128 * (i + 1))) * scale * scales[y >> 7][i];
  return { y: Float64Array.from(codes, (row, y) => sum(quantised.map(part(row, y)))),
           x_scale: Float64Array.from(quantised, ({ scale }) => scale) };
}

/** Accepted with probability min(1, p / q), else a token of max(p - q, 0), by two uniform numbers. */
function verify(p, q, draft, [first, second]) {
  if (first * q[draft] < p[draft]) return { accepted: 1, token: draft };
  const rest = p.map((value, i) => Math.max(value - q[i], 0)), wanted = second * sum(rest);
  let token = 0;
  for (let total = rest[0]; total <= wanted && token < rest.length - 1; total += rest[token]) token++;
  return { accepted: 0, token };
}

/** One answer for each token -> lists by name. */
const by_name = (rows) =>
  Object.fromEntries(Object.keys(rows[0]).map((name) => [name, rows.map((row) => row[name])]));

/** The only FP8 matrix of a case: its codes' numbers and scales. */
function fp8_matrix(w) {
  const name = [...w.stored.keys()].find((key) => w.has(`${key}_scale_inv`));
  return { name, codes: w.stored.get(name)().data, scales: w.get(`${name}_scale_inv`) };
}

/** The pieces of the model alone, as (inputs, weights, config, layer) -> the answer. */
const COMPONENTS = {
  rms_norm: ({ x }, w, cfg, layer) => ({ y: norm(x, w, `model.layers.${layer}.input_layernorm`, cfg) }),
  rope({ x, positions }, w, cfg) {
    const { cos, sin } = phases(Array.from(positions), cfg);
    return { y: x.map((heads, t) => heads.map((row) => rope(row, [cos[t], sin[t]]))) };
  },
  router: ({ x }, w, cfg, layer) => by_name(x.map((row) => route(row, w, `model.layers.${layer}.mlp`, cfg))),
  experts({ x, indices, weights }, w, cfg, layer) {
    const each = (row, chosen) => Array.from(chosen, (e) => swiglu(row, w, `model.layers.${layer}.mlp.experts.${e}`));
    return { y: x.map((row, t) => weighted_sum(weights[t], each(row, indices[t]))) };
  },
  moe: ({ x }, w, cfg, layer) => ({ y: moe(x, w, `model.layers.${layer}.mlp`, cfg) }),
  mla: ({ x, cache }, w, cfg, layer) => ({ y: mla(x, w, layer, cfg, held(cache, layer), cache.length) }),
  attention_core({ q, cache }, w, cfg) {
    const start = cache.length - q.length, scale = softmax_scale(cfg), v = cache.map((c) => [c.subarray(0, cfg.kv_lora_rank)]);
    const lse = (row, t) => {
      const score = cache.slice(0, start + t + 1).map((entry) => scale * dot(row, entry)), max = score[argmax(score)];
      return max + Math.log(sum(score.map((value) => Math.exp(value - max))));
    };
    return { o: attention(q, cache.map((entry) => [entry]), v, start, scale),
             lse: q.map((heads, t) => Float64Array.from(heads, (row) => lse(row, t))) };
  },
  mla_prologue({ x, start }, w, cfg, layer) {
    const { cos, sin } = phases(range(start[0], start[0] + x.length), cfg), C = cfg.kv_lora_rank;
    return by_name(x.map((row, t) => {
      const at = [w, `model.layers.${layer}.self_attn`, cfg, [cos[t], sin[t]]];
      const heads = mla_query(row, ...at), entry = mla_latent(row, ...at);
      return { q_nope: heads.map(({ nope }) => nope), q_rope: heads.map((head) => head.rope),
               kv_latent: entry.slice(0, C), k_rope: entry.slice(C) };
    }));
  },
  mtp_input: ({ h, tokens }, w, cfg, layer) =>
    ({ y: mtp_input(h, Array.from(tokens), w, `model.layers.${layer}`, cfg) }),
  block: ({ x, cache }, w, cfg, layer) => ({ y: block(x, w, layer, cfg, held(cache, layer), cache.length) }),
  dequantize: (given, w) => ({ weight: w.get(fp8_matrix(w).name).map((row) => Float32Array.from(row)) }),
  fp8_linear({ x }, w, cfg) {
    const { codes, scales } = fp8_matrix(w), power_of_two = cfg.quantization_config.scale_fmt === "ue8m0";
    return by_name(x.map((row) => fp8_linear(row, codes, scales, power_of_two)));
  },
  verify: ({ p, q, draft, uniform }) => by_name(p.map((row, n) => verify(row, q[n], draft[n], uniform[n]))),
};

/** A cache that holds these entries of one layer. */
function held(entries, layer) {
  const cache = [];
  cache[layer] = entries;
  return cache;
}

function component({ component, layer, directory }, w, cfg) {
  only("component", component, Object.keys(COMPONENTS));
  const given = read_safetensors(`${directory}/inputs.safetensors`).map(([name, read]) => [name, read().data]);
  return COMPONENTS[component](Object.fromEntries(given), w, cfg, layer);
}

const DO = {
  component,
  trace: ({ prompts, chunks, depth, start }, w, cfg) =>
    prompts.map((prompt) => trace(prompt, w, cfg, chunks, depth ?? 0, start)),
  generate: ({ prompts, ...how }, w, cfg) => prompts.map((prompt) => generate(prompt, how, w, cfg)),
  losses({ prompts, ...how }, w, cfg) { // the mean over the prompts, which are equally long
    const each = prompts.map((prompt) => training_objective(prompt, how, w, cfg));
    const mean = (name) => sum(each.map((losses) => losses[name])) / each.length;
    return Object.fromEntries(Object.keys(each[0]).map((name) => [name, mean(name)]));
  },
  phases: ({ positions }, w, cfg) => phases(positions, cfg),
  update_bias: ({ gamma }, w) => ({ bias: update_bias(w.get("bias"), w.get("load"), gamma) }),
  dequantize: (request, w) => ({ weight: w.get("weight").map((row) => Float32Array.from(row)) }),
};

function answer(directory) {
  const [request, config] = ["request.json", "config.json"].map((name) => read_json(`${directory}/${name}`));
  only("do", request.do, Object.keys(DO));
  only("dtype", request.dtype, ["float64", "float32", ...(request.do === "trace" ? ["float16"] : [])]);
  if (request.dtype === "float16") rounded = to_float16;
  const w = request.do === "phases" ? null : checkpoint(directory);
  const answers = [DO[request.do]({ directory, ...request }, w, config && parse_config(config))].flat(); // perhaps one for each prompt
  const prefix = (n) => (request.do === "generate" || answers.length > 1 ? `${n}/` : "");
  const single = (x) => (Array.isArray(x) ? x.map(single) : x instanceof Float64Array ? Float32Array.from(x) : x);
  const kept = request.dtype === "float16" ? single : (x) => x; // as float32, since float64 was not asked for
  const named = answers.flatMap((each, n) => Object.entries(each).map(([name, x]) => [prefix(n) + name, kept(x)]));
  write_safetensors(`${directory}/answer.safetensors`, named);
}

/** The page's opening, whose words are tokens, and the ASCII of what follows: so no tokenizer is needed. */
function story(directory) {
  const [config, tokenizer] = ["config.json", "tokenizer.json"].map((name) => read_json(`${directory}/${name}`));
  const words = Object.entries(tokenizer.model.vocab).sort(([, a], [, b]) => a - b).map(([word]) => word);
  const prompt = ["Once", "Ġupon", "Ġa", "Ġtime"].map((word) => words.indexOf(word));
  const how = { max_tokens: config.max_position_embeddings - 5, speculate: true, end_tokens: [config.eos_token_id] };
  const { tokens } = generate([config.bos_token_id, ...prompt], how, checkpoint(directory), parse_config(config));
  const text = [...prompt, ...tokens].map((id) => words[id]).join("").replace(words[how.end_tokens[0]], "");
  console.log(text.replaceAll("Ġ", " ").replaceAll("Ċ", "\n"));
}

if (process.argv[2] === "--story") story(process.argv[3]);
else answer(process.argv[2]);
