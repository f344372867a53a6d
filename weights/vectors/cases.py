"""The cases of the conformance kit, on NumPy alone: what index.json says, the weights that it means, a case as files.

A case of index.json, in the order in which a porter should take them, has
    do            what the port is asked for: trace, generate, losses, phases, update_bias, dequantize or component
    equation      of the paper, or the section
    why           the bug or dispute that the case guards against, and `see`, where it was met: owner/repository#number
    origin        where the expected values come from
    config        the config.json
    weights       how those of `formula` are changed: for each tensor whose name ends with the key, `scale` multiplies
                  it, then `shift` is added to it, or `set` gives its values
    stored        how the checkpoint stores them, in F32 if nothing is said: dtype, shards, scales, split_scales,
                  copies; stale: of these tensors every other shard, too, holds one, which is wrong; repeat: a matrix
                  of more rows has them again, each time all moved on by one column
    checkpoint    "shipped", instead of these three: the trained checkpoint in the directory above
    given         or the names of tensors that stand in model.safetensors alone
    arrays        the names of the expected arrays, in the order of computation; in expected.safetensors "{case}/{name}"
    tolerance     of a difference, relative to the array's rms, by the bytes of the coarsest floating-point number
and what its request needs: prompts, chunks, depth, max_tokens and so on (README.md says what a request is).

That of a component has instead of prompts
    component     which, and layer, whose tensors it reads
    reads         how the names of the tensors in its model.safetensors begin
    inputs        for each array its shape and `scale`, or `set`; seed draws them (`given_inputs`)
    shapes        of the arrays of the answer, and sample, the rows of some that expected.safetensors holds, counted
                  with all axes but the last as one; optional, the arrays that an answer may lack
"""

import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy

HERE = Path(__file__).resolve().parent
REQUEST = ("prompts", "chunks", "depth", "start", "max_tokens", "speculate", "end_tokens", "mtp_weight",
           "balance_weight", "positions", "gamma", "component", "layer")  # fmt: skip
IN_FP8 = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj",
          "down_proj")  # fmt: skip
BLOCK = 128  # a scale of an FP8 tensor is that of 128 x 128 elements
ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}


def read_index():
    """{name of the case: what index.json says of it}"""
    return json.loads((HERE / "index.json").read_text("utf-8"))


def read_expected():
    """All arrays of expected.safetensors, "{case}/{name}" or "{case}/given/{name}"."""
    return safetensors.numpy.load_file(HERE / "expected.safetensors")


def uniform(name, shape):
    """u in [-1, 1), of a 32-bit hash of name and index: MurmurHash3's final mix of CRC-32(name) + 2654435769 index,
    modulo 2^32. From u on, double precision."""
    h = np.arange(math.prod(shape), dtype=np.uint32)  # whose products and sums are modulo 2^32
    h *= np.uint32(2654435769)
    h += np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    return ((h ^ h >> np.uint32(16)) / 2**31 - 1).reshape(shape)


def formula(name, shape):
    """The tensor called name: u times what the tensor's purpose asks for."""
    u = uniform(name, shape)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * u
    if name.endswith("e_score_correction_bias"):
        return u * 0.1
    return u * 1.7 if name.endswith("embed_tokens.weight") else u * math.sqrt(3 / shape[-1]) * 1.5


def given_inputs(case):
    """A component's inputs, {name: array}. Of the formula: u times scale, rounded to BF16, so that a kernel of half
    precision reads them as they are; "largest": in each tile of 1 x 128 the first number is this; "power":
    (1 + u)^power, divided by the sum of the row, a distribution."""
    arrays = {}
    for name, how in case["inputs"].items():
        if "set" in how:
            x = np.array(how["set"])
            arrays[name] = x.reshape(how.get("shape", x.shape))
            continue
        x = uniform(f"inputs.{name}.{case['seed']}", how["shape"])
        if "power" in how:
            x = (1 + x) ** how["power"]
            arrays[name] = x / x.sum(-1, keepdims=True)
        else:
            x = x * how.get("scale", 3**0.5) + how.get("shift", 0)
            if "largest" in how:
                x[..., ::BLOCK] = how["largest"]
            arrays[name] = from_bf16(bf16(x))
    return arrays


def unrounded(case, name, shape):
    """One tensor of a case, in float64, before it is stored."""
    x, changes = formula(name, shape), case.get("weights", {})
    for how in ("scale", "shift", "set"):
        for suffix, value in changes.get(how, {}).items():
            if name.endswith(suffix):
                x = x * value if how == "scale" else x + value if how == "shift" else np.reshape(value, shape)
    return np.asarray(x, np.float64)


def tensor_shapes(config):
    """{name: shape} of every tensor that a config.json asks for."""
    D, H, C = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    N, R, V = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    Q, W, layers = config["q_lora_rank"], config["vocab_size"], config["num_hidden_layers"]
    shapes = {"model.embed_tokens.weight": (W, D), "model.norm.weight": (D,), "lm_head.weight": (W, D)}
    for layer in range(layers + config["num_nextn_predict_layers"]):
        of_layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        if Q is None:
            of_layer["self_attn.q_proj.weight"] = (H * (N + R), D)
        else:
            of_layer |= {"self_attn.q_a_proj.weight": (Q, D), "self_attn.q_a_layernorm.weight": (Q,)}
            of_layer |= {"self_attn.q_b_proj.weight": (H * (N + R), Q)}
        of_layer |= {"self_attn.kv_a_proj_with_mqa.weight": (C + R, D), "self_attn.kv_a_layernorm.weight": (C,)}
        of_layer |= {"self_attn.kv_b_proj.weight": (H * (N + V), C), "self_attn.o_proj.weight": (D, H * V)}
        if layer >= layers:
            of_layer |= {"enorm.weight": (D,), "hnorm.weight": (D,), "shared_head.norm.weight": (D,)}
            of_layer["eh_proj.weight"] = (D, 2 * D)
        dense = layer < config["first_k_dense_replace"]
        of_layer |= mlp_shapes("mlp", D, config["intermediate_size"]) if dense else expert_shapes(config)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes


def mlp_shapes(name, size, width):
    return {f"{name}.gate_proj.weight": (width, size), f"{name}.up_proj.weight": (width, size),
            f"{name}.down_proj.weight": (size, width)}  # fmt: skip


def expert_shapes(config):
    D, E, width = config["hidden_size"], config["n_routed_experts"], config["moe_intermediate_size"]
    shapes = {"mlp.gate.weight": (E, D), "mlp.gate.e_score_correction_bias": (E,)}
    shapes |= mlp_shapes("mlp.shared_experts", D, config["n_shared_experts"] * width)
    for e in range(E):
        shapes |= mlp_shapes(f"mlp.experts.{e}", D, width)
    return shapes


# ---- How tensors are stored ----------------------------------------------------------------------------------------


def kind(case, name):
    """The dtype, in the format's spelling, in which the case's checkpoint stores a tensor."""
    dtype = case.get("stored", {}).get("dtype", "F32")
    if dtype == "F8_E4M3" and not name.removesuffix(".weight").endswith(IN_FP8):
        dtype = "BF16"
    routing_bias = name.endswith("e_score_correction_bias")
    return "F32" if routing_bias and dtype != "F64" else dtype


def bf16(x):
    """The upper halves of float32 numbers, rounded to nearest, ties to even, as uint16."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def from_bf16(code):
    return (code.astype(np.uint32) << 16).view(np.float32)


def e4m3_values():
    """The numbers of the codes 0 to 126, all positive and growing; bit 7 is the sign, and 127 is NaN."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


def e4m3(x):
    """The codes of the nearest numbers, of two equally near ones the even code; nothing exceeds 448."""
    values = e4m3_values()
    code = np.searchsorted((values[1:] + values[:-1]) / 2, np.abs(x))  # a tie goes to the lower code
    tie = code < 126
    tie[tie] = np.abs(x)[tie] == (values[code[tie] + 1] + values[code[tie]]) / 2
    code += tie & (code % 2 == 1)
    return (code | np.signbit(x) << 7).astype(np.uint8)


def to_fp8(x, scales=None):
    """FP8 codes and the scale of each block. A scale need not be the least one: here they differ by whole factors, so
    that a block's neighbour is seen when it is taken. scales: "ue8m0" for powers of two, "bf16" for numbers of BF16."""
    scale = np.empty([-(-n // BLOCK) for n in x.shape], np.float32)
    for i, j in np.ndindex(*scale.shape):
        largest = np.abs(x[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]).max()
        scale[i, j] = largest / 448 * (1 + (i + 2 * j) % 3)
    if scales == "ue8m0":
        scale = np.exp2(np.ceil(np.log2(scale)))
    if scales == "bf16":
        scale = from_bf16(bf16(scale))
    return e4m3((x.astype(np.float32) / each_element(scale, x.shape)).astype(np.float64)), scale


def each_element(scale, shape):
    return scale.repeat(BLOCK, 0).repeat(BLOCK, 1)[: shape[0], : shape[1]]


def from_fp8(code, scale):
    """The product in float32 that a code and its scale mean; without a scale the code's number."""
    value = np.concatenate([e4m3_values(), [np.nan]]).astype(np.float32)
    value = np.concatenate([value, -value])[code]
    return value if scale is None else value * each_element(scale, code.shape)


def stored(case, name, shape):
    """{name: (dtype, array)} of a tensor as it is stored: FP8 has a second one, its scales."""
    how, dtype = case.get("stored", {}), kind(case, name)
    if "repeat" in how and len(shape) == 2 and shape[0] > how["repeat"]:
        few = stored(case, name, (how["repeat"], shape[1]))[name][1]
        again = [np.roll(few, i, axis=1) for i in range(-(-shape[0] // len(few)))]
        return {name: (dtype, np.concatenate(again)[: shape[0]])}
    x = unrounded(case, name, shape)
    if case["do"] == "component" and dtype == "F32" and not name.endswith("e_score_correction_bias"):
        x = from_bf16(bf16(x))  # a kernel of half precision, too, reads it as it is
    if dtype == "F8_E4M3":
        code, scale = to_fp8(x, how.get("scales"))
        kept = ("BF16", bf16(scale)) if how.get("scales") == "bf16" else ("F32", scale)
        return {name: (dtype, code), f"{name}_scale_inv": kept}
    if dtype == "BF16":
        return {name: (dtype, bf16(x))}
    return {name: (dtype, x.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]))}


def weight(case, name, shape):
    """What a reader of the checkpoint gets for a tensor, in float64."""
    read = {"BF16": from_bf16, "F8_E4M3": lambda code: code}
    x, *scale = (read.get(dtype, np.asarray)(x) for dtype, x in stored(case, name, shape).values())
    return (from_fp8(x, scale[0]) if scale else x).astype(np.float64)


# ---- A case as files -----------------------------------------------------------------------------------------------


def write_safetensors(path, tensors):
    """tensors: {name: (dtype, array)}. The largest numbers come first, so that all lie on multiples of their size."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    in_order = sorted(tensors.items(), key=lambda item: -ITEMSIZE[item[1][0]])
    for name, (dtype, x) in in_order:
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (_, x) in in_order:
            file.write(np.ascontiguousarray(x).data)


def all_tensors(case):
    """{name: (dtype, array)} of a case's checkpoint."""
    shapes, tensors = tensor_shapes(case["config"]), {}
    if "reads" in case:
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(tuple(case["reads"]))}
    for name, shape in shapes.items():
        tensors |= stored(case, name, shape)
    if case.get("stored", {}).get("copies"):
        for name in [name.removesuffix(".enorm.weight") for name in shapes if name.endswith(".enorm.weight")]:
            tensors[f"{name}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
            tensors[f"{name}.shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors


def place(tensors, count, split_scales):
    """In which of `count` shards each tensor lies: as many in each, in order; every other scale is in the next one."""
    shard = {name: i * count // len(tensors) for i, name in enumerate(tensors)}
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    for name in scales[::2] if split_scales else []:
        shard[name] = (shard[name] + 1) % count
    return shard


def write(case, directory):
    """Write a case's config.json and weights in the Hugging Face layout -> the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if case.get("checkpoint") == "shipped":
        for path in [HERE.parent / "config.json", *HERE.parent.glob("*.safetensors*")]:
            shutil.copy(path, directory)
        return directory
    (directory / "config.json").write_text(json.dumps(case["config"], indent=1))
    if case["do"] == "component":
        write_given(given_inputs(case), directory, "inputs.safetensors")
    if case["do"] == "phases":
        return directory
    tensors, how = all_tensors(case), case.get("stored", {})
    if "shards" not in how:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    count, weight_map = how["shards"], {}
    shard = place(tensors, count, how.get("split_scales"))
    for i in range(count):
        file, part = f"model-{i + 1:05}-of-{count:05}.safetensors", [name for name in tensors if shard[name] == i]
        stale = {name: (tensors[name][0], tensors[name][1] * 0) for name in how.get("stale", []) if name not in part}
        write_safetensors(directory / file, {name: tensors[name] for name in part} | stale)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for _, x in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return directory


def write_given(given, directory, file="model.safetensors"):
    """Write a file of tensors alone: FP8 codes come as uint8, whose dtype is to be F8_E4M3."""
    kinds = {"uint8": "F8_E4M3", "float32": "F32", "float64": "F64", "int64": "I64"}
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / file, {name: (kinds[x.dtype.name], x) for name, x in given.items()})


def write_request(case, directory, dtype="float64"):
    """Write request.json -> the request."""
    request = {"do": case["do"], "dtype": case.get("dtype", dtype)}
    if case["do"] == "trace":
        request |= {"chunks": None, "depth": 0}
    request |= {key: case[key] for key in REQUEST if key in case}
    (Path(directory) / "request.json").write_text(json.dumps(request))
    return request
