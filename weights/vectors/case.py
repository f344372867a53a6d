"""Write a case of the conformance kit as a checkpoint, config.json and model.safetensors, and print its command:

    python weights/vectors/case.py ID DIRECTORY        # without arguments, a list of the cases

index.json describes each case:
    function      what the port computes: trace, training_objective, dequantize or update_bias
    equation      of the paper, or the section
    why           the bug or dispute that the case guards against, and `see`, where it was met: owner/repository#number
    origin        where the expected values come from
    config        the config.json
    weights       how those of `formula` are changed: for each tensor whose name ends with the key, `scale` multiplies
                  it, then `shift` is added to it, or `set` gives its values; last, all are rounded to torch_dtype
    prompts       token ids, one list for each row of the batch
    arguments     if there: the function's further ones (of trace: how many tokens enter the cache at a time); where
                  there is no config, the names of all, in parity.npz as "{id}/arguments/{name}"
    arrays        the names of the expected arrays, in the order of computation; in parity.npz as "{id}/{name}"
    tolerance     of a difference, relative to the array's rms, by the bytes of the port's floating-point numbers
"""

import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np

INDEX = Path(__file__).with_name("index.json")
STORED = {"float32": "F32", "float16": "F16"}


def formula(name, shape):
    """The tensor called name: u in [-1, 1), a 32-bit hash of name and index, times what the tensor's purpose asks for.

    The hash: MurmurHash3's final mix of CRC-32(name) + 2654435769 index, modulo 2^32. From u on, double precision.
    """
    h = (zlib.crc32(name.encode()) + np.arange(math.prod(shape), dtype=np.uint64) * 2654435769) & 0xFFFFFFFF
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    u = ((h ^ h >> 16) / 2**31 - 1).reshape(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * u
    if name.endswith("bias"):
        return u * (0.1 if name.endswith("e_score_correction_bias") else 0.3)
    return u * 1.7 if name.endswith("embed_tokens.weight") else u * math.sqrt(3 / shape[-1]) * 1.5


def weight(case, name, shape):
    """One tensor of a case, in the dtype in which its checkpoint stores it."""
    x, changes = formula(name, shape), case["weights"]
    for how in ("scale", "shift", "set"):
        for suffix, value in changes.get(how, {}).items():
            if name.endswith(suffix):
                x = x * value if how == "scale" else x + value if how == "shift" else np.reshape(value, shape)
    return x.astype(case["config"]["torch_dtype"])


def write(case, directory):
    """A directory in the Hugging Face layout. deepseek_v3.py is asked for the names and shapes of the tensors only."""
    from deepseek_v3 import parse_config, tensor_shapes

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(case["config"], indent=1))
    header, data = {}, bytearray()
    for name, shape in tensor_shapes(parse_config(case["config"])).items():
        begin = len(data)
        data += weight(case, name, shape).tobytes()
        header[name] = {"dtype": STORED[case["config"]["torch_dtype"]], "shape": shape,
                        "data_offsets": [begin, len(data)]}  # fmt: skip
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return directory


def main(arguments):
    cases = json.loads(INDEX.read_text("utf-8"))
    if not arguments:
        print(*(f"{name:18} {case['equation']:24} {case['why']}" for name, case in cases.items()), sep="\n")
        return None
    if len(arguments) != 2 or "config" not in cases.get(arguments[0], {}):
        return "usage: case.py ID DIRECTORY, with the id of a case that has a checkpoint; without arguments, a list"
    name, directory = arguments
    try:
        write(cases[name], directory)
    except OSError as e:
        return f"{directory}: cannot be written: {e.strerror}"
    tokens = " ".join(f'--tokens "{" ".join(map(str, prompt))}"' for prompt in cases[name]["prompts"])
    dtype = "float16" if cases[name]["config"]["torch_dtype"] == "float16" else "float64"
    print(f"python deepseek_v3.py --weights {directory} {tokens} --dtype {dtype} -n 0 --compare yours.npz")
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where deepseek_v3.py is
    sys.exit(main(sys.argv[1:]))
