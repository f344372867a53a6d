"""A checkpoint in the release's form and widths, 16 GB on disk, in 6 GB of memory:
python -m pytest .ci/test_width.py -s
"""

import functools
import json
import math
import re
import shutil
import time
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import deepseek_v3 as dsv3
from test_deepseek_v3 import assert_close, cli, config_json, index_says, is_fp8


def write_true_width(directory, layers):
    """A checkpoint in the release's form and widths, of random weights, with an MTP module; an
    index, and one shard per layer, written a piece at a time."""
    cfg = replace(dsv3.Config(), num_hidden_layers=layers, first_k_dense_replace=1)
    rng, shards, weight_map = np.random.default_rng(0), {}, {}
    normal = rng.standard_normal(2**22, np.float32)
    half, code = normal.astype(ml_dtypes.bfloat16), (64 * normal).astype(ml_dtypes.float8_e4m3fn)
    for name, shape in dsv3.tensor_shapes(cfg).items():
        tensors = shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})
        norm = math.sqrt(shape[-1])
        if len(shape) == 1:
            tensors[name] = ("F32", shape, np.full(shape, "norm" in name, np.float32))
        elif is_fp8(name):
            grid = [-(-n // 128) for n in shape]
            scale = (rng.uniform(0.5, 1.5, grid) / 64 / norm).astype(np.float32)
            tensors[name] = ("F8_E4M3", shape, code)
            tensors[f"{name}_scale_inv"] = ("F32", scale.shape, scale)
        else:
            small = half if "embed" in name else (half / np.float32(norm)).astype(half.dtype)
            tensors[name] = ("BF16", shape, small)
    for shard, tensors in shards.items():
        header, end = {}, 0
        for name, (dtype, shape, x) in tensors.items():
            begin, end = end, end + math.prod(shape) * x.itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = f"model-{shard}.safetensors"
        with (directory / f"model-{shard}.safetensors").open("wb") as file:
            text = json.dumps(header).encode()
            file.write(len(text).to_bytes(8, "little") + text)
            for _, shape, x in tensors.values():
                for left in range(math.prod(shape), 0, -x.size):
                    file.write(x.ravel()[:left].tobytes())
    (directory / "config.json").write_text(json.dumps(config_json(cfg)))
    index_says(directory, weight_map)
    return cfg


def test_width_of_the_671b_model_runs_in_6_gb(tmp_path):
    """One dense layer, one with experts, an MTP module: the program's own statistics, the experts'
    sum in float32 against float64, and the time of each kind of layer with nothing kept."""
    if shutil.disk_usage(tmp_path).free < 40e9:
        pytest.skip(f"needs 40 GB of disk at {tmp_path} (--basetemp DIR elsewhere)")
    try:
        cfg = write_true_width(tmp_path, 2)
        flags = ["--tokens", "1 2 3 4 5", "--memory", 3, "-n", 5, "--mtp"]
        code, out, err = cli("--weights", tmp_path, *flags)
        print("\n" + err, end="")
        peak = float(re.search(r"peak memory (\d+) MB", err)[1])
        assert code == 0 and len(out.split()) == 5 and peak < 6000
        time_layers(tmp_path, cfg)
    finally:
        shutil.rmtree(tmp_path)


def time_layers(directory, cfg):
    x, sums = np.random.default_rng(1).standard_normal((1, cfg.hidden_size)), []
    for dtype in (np.float64, np.float32):
        w = dsv3.Checkpoint(directory, cfg, dtype, memory=0)
        sums.append(dsv3.moe(x.astype(dtype), w, "model.layers.1.mlp", cfg, dsv3.moe_chosen))
    assert_close(sums[1], sums[0], 1e-5)
    x, total = x.astype(np.float32), 0
    rotation = dsv3.rotations(0, 1, cfg, x.dtype)

    def block(layer):
        attend = functools.partial(dsv3.mla_cached, dsv3.Cache(1))
        return dsv3.block(x, w, layer, cfg, rotation, attend, dsv3.moe_chosen)

    for label, count, step in (("dense layer", 3, lambda: block(0)),
                               ("layer with experts", 58, lambda: block(1)),
                               ("head", 1, lambda: dsv3.head(x, w))):
        start = time.perf_counter()
        for _ in range(3):
            step()
        seconds = (time.perf_counter() - start) / 3
        total += count * seconds
        print(f"{label:20} {seconds:7.3f} s  x {count}")
    print(f"{'a token, 61 layers':20} {total:7.1f} s")
