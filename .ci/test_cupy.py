"""The page under CuPy's rules, without a GPU:  python -m pytest .ci/test_cupy.py

`Strict` stands in for CuPy: NumPy's numbers, but only the names and parameters of CuPy 14.2 (cupy_api.json, taken from
the real package), no host array that meets a device array, no order of equal keys that CuPy leaves open. Stricter than
CuPy, which lets np.exp(a) and a[[0]] through: they upload or dispatch unseen. What passes here with the same bits asks
nothing of CuPy that it lacks; what a GPU does beyond that, `python -m pytest -m gpu -s` shows on one.
"""

import ctypes
import itertools
import json
import math
import operator
import shutil
import subprocess
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import deepseek_v3 as dsv3
from test_deepseek_v3 import (
    GPU_CHECKS,
    SMALL,
    WEIGHTS,
    generated,
    make_tokens,
    make_weights,
    quantised,
    shipped,
    write_stored,
)

API = json.loads(Path(__file__).with_name("cupy_api.json").read_text())


# ---- The stand-in --------------------------------------------------------------------------------------------------


class Device:
    """A device array: meets no host array, becomes none unless by `get`, and has the members of CuPy's alone.

    `traffic` counts what a GPU does: launches of kernels (one per call that makes new values; views are free), bytes
    that are only moved (by gathers, joins, casts, and by products before they begin), uploads and their bytes, and
    waits of the host for the device.
    With `jitter`, a random generator, what a GPU adds up in an order of its own differs in the last bits.
    """

    __array_ufunc__, __hash__ = None, None
    traffic, jitter = Counter(), None

    def __init__(self, host):
        self.host = host

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a host array")

    def __array_function__(self, function, *_):
        raise TypeError(f"numpy.{function.__name__} given a device array")

    def __getattr__(self, name):
        if name not in API["methods"]:
            raise AttributeError(f"cupy.ndarray has no {name}")
        value = getattr(self.host, name)
        return strict(name, value, API["methods"][name], self) if callable(value) else to_device(value)

    def get(self):
        self.traffic["waits"] += 1
        return self.host.copy()

    def __len__(self):
        return len(self.host)

    def __getitem__(self, index):
        return counted("getitem", self.host[to_index(index)], self)

    def __setitem__(self, index, value):
        index = to_index(index)
        touched = np.zeros(self.host.shape, int)
        np.add.at(touched, index, 1)
        assert touched.max(initial=0) <= 1, "an element assigned twice: on a GPU either value may stay"
        self.host[index] = to_host(value)
        self.traffic["launches"] += 1


def binary(name, reflected):
    function = getattr(operator, f"__{name}__")

    def call(self, other):
        if not isinstance(other, Device) and getattr(other, "__array_ufunc__", self) is None:
            return NotImplemented  # as NumPy and CuPy do: what opts out multiplies by a method of its own
        a, b = (other, self) if reflected else (self, other)
        return counted(name, function(to_host(a), to_host(b)), a, b)

    return call


def in_place(name):
    def call(self, other):
        getattr(operator, f"__i{name}__")(self.host, to_host(other))
        self.traffic["launches"] += 1
        return self

    return call


def scalar(kind):
    def call(self):
        self.traffic["waits"] += 1
        return kind(self.host)

    return call


for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "lshift", "rshift"):
    setattr(Device, f"__{name}__", binary(name, False))
    setattr(Device, f"__r{name}__", binary(name, True))
    setattr(Device, f"__i{name}__", in_place(name))
for name in ("lt", "le", "eq", "ne", "gt", "ge"):
    setattr(Device, f"__{name}__", binary(name, False))
for name in ("neg", "abs", "invert"):
    function = getattr(operator, name)
    setattr(Device, f"__{name}__", lambda self, f=function: counted("elementwise", f(self.host), self))
for kind in (bool, int, float):
    setattr(Device, f"__{kind.__name__}__", scalar(kind))


def to_device(value):
    return Device(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def to_host(value):
    """What a call was given, for NumPy: device arrays unwrapped, host arrays refused."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_host, value))
    if isinstance(value, np.ndarray):
        raise TypeError("a host array meets the device")
    return value.host if isinstance(value, Device) else value


def to_index(index):
    """An index for NumPy. CuPy takes integers that lie on the host, and uploads them."""
    if isinstance(index, np.ndarray) and index.dtype.kind == "i":
        Device.traffic.update(uploads=1, uploaded=index.nbytes)
        return index
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, list):
            raise TypeError("an index that uploads")
        if isinstance(part, Device) and part.host.dtype == bool:
            Device.traffic["waits"] += 1  # for how many are true
    return to_host(index)


def counted(name, value, *operands):
    """The result of a call on the device, after its launch, if it is no view, and its copies have been counted."""
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    arrays = [x.host for x in operands if isinstance(x, Device)]
    launched = name != "empty" and not any(np.may_share_memory(value, x) for x in arrays)
    joined = len(operands) if name in ("concatenate", "stack") and len(operands) <= 8 else 1  # a few parts: one by one
    Device.traffic["launches"] += launched * joined
    if name == "matmul":
        Device.traffic["copied"] += sum(copied(x, max(y.ndim for y in arrays)) for x in arrays)
    if name in ("getitem", "take", "astype", "reshape", "repeat", "concatenate", "stack"):
        Device.traffic["copied"] += launched * value.nbytes
    if Device.jitter and value.dtype.kind == "f" and name in ("matmul", "sum", "mean", "einsum", "exp", "log", "sqrt"):
        noise = Device.jitter.uniform(-1, 1, value.shape) * np.finfo(value.dtype).eps
        value = np.asarray(value * (1 + noise), value.dtype)
    return to_device(value)


def copied(x, ndim):
    """Bytes that CuPy's matmul writes anew of an operand: two matrices are taken as they lie, in either order; with
    more axes operands are made contiguous, and float16 becomes float32."""
    if ndim <= 2:
        return 0 if x.flags.forc else x.nbytes
    return 2 * x.nbytes if x.dtype == np.float16 else 0 if x.flags.c_contiguous else x.nbytes


def strict(name, function, parameters, *owner):
    """The function, called only with parameters that CuPy's has."""

    def call(*args, **kwargs):
        if parameters is not None:
            spread = any(parameter.startswith("*") for parameter in parameters)
            assert spread or len(args) <= len(parameters), f"cupy.{name} takes {parameters}"
            assert set(kwargs) <= set(parameters), f"cupy.{name} takes {parameters}, not {list(kwargs)}"
        if name in ("sort", "argsort") and not (name == "sort" or kwargs.get("kind") == "stable"):
            raise TypeError("the order of equal keys is NumPy's own")
        if name in ("argpartition", "partition"):
            raise TypeError("the order of equal keys is arbitrary")
        if name == "asarray" and not isinstance(args[0], Device):  # the upload
            x = np.array(*args, **kwargs)
            Device.traffic.update(uploads=1, uploaded=x.nbytes)
            return to_device(x)
        if name == "matmul" and "out" in kwargs:  # else CuPy makes a copy
            assert kwargs["out"].host.flags.c_contiguous and kwargs["out"].host.dtype == args[0].host.dtype
        x = function(*to_host(args), **{key: to_host(value) for key, value in kwargs.items()})
        if name == "view" and x.dtype.kind == "c":  # a kernel reads a complex number at once
            aligned = x.ctypes.data % x.itemsize == 0 and not any(step % x.itemsize for step in x.strides)
            assert aligned, "a misaligned address"
        if name == "copyto" or any(kwargs.get("out") is x for x in args):  # what `counted` takes for a view
            Device.traffic["launches"] += 1
        if name in ("concatenate", "stack") and len(args[0]) > 8:
            equal = len({part.host.shape for part in args[0]}) == 1
            Device.traffic["uploads"] += 1 if equal else 3  # the addresses of small parts, their sizes and strides
        if name in ("empty", "empty_like"):  # what stands there is anything
            x.view(np.uint8)[...] = 0xFF
        return counted(name, x, *owner, *(args[0] if name in ("concatenate", "stack") else args))

    return call


class Strict:
    """The namespace: `dsv3.xp = Strict()`."""

    __name__ = "the stand-in"

    def __init__(self, free=2**40):
        self.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(memGetInfo=lambda: (free, 2**40)))
        self.get_default_memory_pool = lambda: types.SimpleNamespace(total_bytes=lambda: 0)

    def RawKernel(self, source, name):
        """The page's one kernel, by what it means."""

        def launch(grid, block, args):
            x, w, index, out = map(to_host, args[:4])
            assert args[4:6] == w.shape[1:] and args[6] == len(index) / len(x)
            assert block == (32, 4) and grid == (math.ceil(w.shape[1] / 4), len(index))
            assert out.dtype == x.dtype == w.dtype and index.dtype == np.int64
            assert all(a.flags.c_contiguous for a in (x, w, index, out))
            out[...] = plain_chosen(index, x, {".weight": w}, "")
            Device.traffic["launches"] += 1

        return launch

    def __getattr__(self, name):
        if name.startswith("_") or name not in API["names"]:
            raise AttributeError(f"cupy has no {name}")
        value = getattr(np, name)
        return strict(name, value, API["names"][name]) if callable(value) and not isinstance(value, type) else value


@pytest.fixture
def device(monkeypatch):
    """`xp` is the stand-in, nothing counted yet; -> the counts."""
    monkeypatch.setattr(dsv3, "xp", Strict())
    dsv3.chosen_kernel.cache_clear()
    Device.traffic.clear()
    return Device.traffic


def plain_chosen(index_X, x, w, name):
    """`linear_chosen`, for NumPy."""
    share, w_EZY = len(index_X) // len(x), w[f"{name}.weight"]
    return np.concatenate([x[c // share, None] @ w_EZY[e].T for c, e in enumerate(index_X)])


# ---- The stand-in is as strict as CuPy -----------------------------------------------------------------------------


@pytest.mark.parametrize("breach", [
    lambda xp, a: np.asarray(a), lambda xp, a: np.exp(a), lambda xp, a: a + np.ones(3), lambda xp, a: np.ones(3) + a,
    lambda xp, a: xp.exp(np.ones(3)), lambda xp, a: xp.concatenate([a, np.ones(3)]), lambda xp, a: xp.vecdot(a, a),
    lambda xp, a: xp.argsort(a), lambda xp, a: xp.argpartition(a, 1), lambda xp, a: xp.argsort(a, stable=True),
    lambda xp, a: xp.sum(a, where=a > 0), lambda xp, a: xp.take(a, 0, mode="clip"), lambda xp, a: xp.max(a, initial=0),
    lambda xp, a: xp.clip(a, min=0), lambda xp, a: a[np.array([True])], lambda xp, a: a[[0]], lambda xp, a: a.ctypes,
    lambda xp, a: a.__setitem__(xp.asarray(np.array([0, 0])), 1.0), lambda xp, a: a.__setitem__(0, np.ones(())),
    lambda xp, a: a.__iadd__(np.ones(3)), lambda xp, a: xp.errstate, lambda xp, a: range(xp.asarray(3)),
    lambda xp, a: xp.arange(3.0)[1:].view(np.complex128),
])  # fmt: skip
def test_stand_in_refuses_what_cupy_refuses(breach):
    xp = Strict()
    with pytest.raises((TypeError, AttributeError, AssertionError)):
        breach(xp, xp.asarray(np.arange(3.0)))


@pytest.mark.parametrize("counts, call", [
    ({"uploads": 1, "uploaded": 8}, lambda xp, a: xp.asarray(np.ones(1))),
    ({}, lambda xp, a: a[:1].swapaxes(1, 2).reshape(1, 4, 3)[..., None]),
    ({"launches": 2, "copied": 96}, lambda xp, a: a[xp.arange(1)]),
    ({"launches": 1, "copied": 96, "uploads": 1, "uploaded": 8}, lambda xp, a: a[np.array([0])]),
    ({}, lambda xp, a: xp.empty(3)),
    ({"launches": 2}, lambda xp, a: a.__iadd__(a * 2)),
    ({"waits": 1}, lambda xp, a: a.get()),
    ({"launches": 2, "waits": 1}, lambda xp, a: bool((a == a).all())),
    ({"launches": 1}, lambda xp, a: a @ a.reshape(2, 4, 3)),
    ({"launches": 1, "copied": 192}, lambda xp, a: a @ a.swapaxes(1, 2)),
    ({"launches": 1}, lambda xp, a: a[0] @ a[1].T),
    ({"launches": 1, "copied": 48}, lambda xp, a: a[0, :, :2] @ a[0, :2]),
    ({"launches": 3, "copied": 288}, lambda xp, a: a.astype(np.float16) @ a.astype(np.float16).swapaxes(1, 2)),
])  # fmt: skip
def test_stand_in_counts_what_a_gpu_does(device, counts, call):
    a = dsv3.xp.asarray(np.arange(24.0).reshape(2, 3, 4))
    device.clear()
    call(dsv3.xp, a)
    assert +device == counts


# ---- The page under CuPy's rules -----------------------------------------------------------------------------------


def everything(directory, cfg, prompts, dtype, memory):
    """Trace, greedy and sampled text with speculation, and the training objective of a checkpoint."""
    w, stats = dsv3.Checkpoint(directory, cfg, dtype, memory), Counter()
    named = [dsv3.trace(prompts, w, cfg, chunk) for chunk in (1, 1024)]
    rows = [generated(prompts, w, cfg, 12, dsv3.Sampling(t), stats=stats) for t in (0, 1.0)]
    loss, parts = dsv3.training_objective(w, dsv3.xp.asarray(make_tokens(cfg, 0, 2, 7)), cfg)
    gate = next(iter(parts["load"]))
    bias = dsv3.update_bias(w[f"{gate}.e_score_correction_bias"], parts["load"][gate], 0.5)
    return named, rows, stats["accepted"], [dsv3.to_host(x).tolist() for x in (loss, bias)]


@pytest.mark.parametrize("name, memory, dtype", [
    *itertools.product(["fp8"], [None, 0], [np.float16, np.float32, np.float64]), ("shipped", None, np.float32),
])  # fmt: skip
def test_cupys_rules_leave_numpys_bits(tmp_path, monkeypatch, name, memory, dtype):
    """A checkpoint in FP8 and BF16, and the shipped one; all in memory or nothing."""
    directory, cfg, prompts = WEIGHTS, dsv3.read_config(WEIGHTS), [[0, 421, 433, 260, 395], [0, 421]]
    if name == "fp8":
        cfg, prompts = replace(SMALL, vocab_size=4, num_nextn_predict_layers=1), [[1, 2, 3, 0, 1], [3]]
        directory = write_stored(tmp_path / "w", cfg, quantised(make_weights(cfg)))
    monkeypatch.setattr(dsv3, "product", lambda x, w: x @ w.swapaxes(-1, -2))  # NumPy has forms of its own
    monkeypatch.setattr(dsv3, "EACH", dsv3.FEW if memory is None else 0)  # so a GPU, with experts in one array or not
    expected = everything(directory, cfg, prompts, dtype, memory)
    monkeypatch.setattr(dsv3, "xp", Strict())
    got = everything(directory, cfg, prompts, dtype, memory)
    assert expected[1:] == got[1:] and expected[2] > 0
    for ours, theirs in zip(got[0], expected[0], strict=True):
        for array, x in theirs.items():
            assert isinstance(ours[array], np.ndarray) and ours[array].tobytes() == x.tobytes(), array


WARP = r"""
#include <barrier>
#include <thread>
#include <vector>
struct Index { long long x, y; };
thread_local Index blockIdx, threadIdx;
std::barrier lanes(32);
double lane[32];
template <class T> T __shfl_down_sync(unsigned, T value, int by) {
    lane[threadIdx.x] = value;
    lanes.arrive_and_wait();
    T other = threadIdx.x + by < 32 ? T(lane[threadIdx.x + by]) : value;
    lanes.arrive_and_wait();
    return other;
}
#define __global__
KERNEL
extern "C" void launch(long long columns, long long rows, const real* x, const real* w, const long long* index,
                       real* out, long long Z, long long Y, long long share) {
    for (Index block{0, 0}; block.y < rows; block.y++)
        for (block.x = 0; block.x < columns; block.x++)
            for (long long y = 0; y < 4; y++) {
                std::vector<std::thread> warp;
                for (long long x_ = 0; x_ < 32; x_++) warp.emplace_back([=] {
                    blockIdx = block, threadIdx = {x_, y};
                    chosen(x, w, index, out, Z, Y, share);
                });
                for (auto& thread : warp) thread.join();
            }
}
"""  # a GPU's warp, by 32 threads that meet at each exchange


@pytest.mark.skipif(not shutil.which("g++"), reason="compiles the kernel for the CPU, with g++")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_kernel_is_what_the_stand_in_takes_it_for(tmp_path, monkeypatch, dtype):
    """Its source, run by threads on the CPU, for sizes that fill no block and no warp."""
    monkeypatch.setattr(dsv3, "xp", types.SimpleNamespace(RawKernel=lambda source, name: source))
    (tmp_path / "cuda_fp16.h").write_text("typedef _Float16 __half;")
    source = dsv3.chosen_kernel.__wrapped__(np.dtype(dtype))
    (tmp_path / "warp.cpp").write_text(WARP.replace("KERNEL", source))
    build = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-I.", "warp.cpp", "-o", "warp.so"]
    subprocess.run(build, cwd=tmp_path, check=True)
    launch = ctypes.CDLL(str(tmp_path / "warp.so")).launch
    rng = np.random.default_rng(0)
    for share, (E, Z, Y) in ((1, (3, 6, 70)), (2, (4, 5, 31)), (2, (1, 4, 32))):
        w, x = rng.standard_normal((E, Z, Y)).astype(dtype), rng.standard_normal((3, Y)).astype(dtype)
        index, out = rng.integers(0, E, 3 * share), np.full((3 * share, Z), np.nan, dtype)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, w, index, out)]
        launch(*map(ctypes.c_longlong, (-(-Z // 4), len(index))), *pointers, *map(ctypes.c_longlong, (Z, Y, share)))
        expected = (w.astype(float)[index] @ np.repeat(x, share, axis=0).astype(float)[:, :, None])[..., 0]
        assert np.abs(out - expected).max() < 30 * np.finfo(dtype).eps


@pytest.mark.parametrize("check", GPU_CHECKS)
def test_gpu_checks_on_the_stand_in(check, shipped, device, tmp_path):
    check(shipped, tmp_path)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_waits_little_and_uploads_no_weights(device, speculate, batch):
    """What comes down are logits: of the main model, and of the draft with speculation, which makes up to two tokens a
    round; what goes up is the token, its place and angles."""
    cfg = dsv3.read_config(WEIGHTS)
    w, seen, made = dsv3.Checkpoint(WEIGHTS, cfg), [], 0
    for _ in dsv3.generate([[0, 421]] * batch, w, cfg, 40, speculate=speculate):
        made += 1
        seen.append(Counter(device))
    begun = 8 * batch  # by then every weight has gone up
    spent, rounds = seen[-1] - seen[begun - 1], (made - begun) / batch
    print({name: round(count / rounds) for name, count in spent.items()}, "per token")
    assert 0 < spent["waits"] <= (1.3 if speculate else 1) * rounds
    assert spent["uploads"] <= 6 * rounds and spent["uploaded"] <= 300 * rounds


TINY = dict(vocab_size=64, hidden_size=64, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, intermediate_size=64, moe_intermediate_size=8)  # fmt: skip
EIGHTH = dict(vocab_size=64, hidden_size=896, num_hidden_layers=2, first_k_dense_replace=0, num_attention_heads=16,
              q_lora_rank=192, kv_lora_rank=64, qk_nope_head_dim=128, qk_rope_head_dim=8, v_head_dim=128,
              moe_intermediate_size=256, n_routed_experts=32, num_nextn_predict_layers=0)  # fmt: skip


def on_the_device(cfg, dtype):
    """Weights as a Checkpoint lays them on a GPU, all of them the same numbers."""
    most = cfg.n_routed_experts * cfg.hidden_size * cfg.moe_intermediate_size
    numbers, w = (np.random.default_rng(0).standard_normal(most) / 30).astype(dtype), {}

    def layout(shape, dtype=dtype):
        return Device(numbers[: math.prod(shape)].reshape(shape).astype(dtype, copy=False))

    for name, shape in dsv3.tensor_shapes(cfg).items():
        x = layout(shape, np.float32 if ".mlp.gate." in name else dtype)
        w[name] = dsv3.Matrix(x) if len(shape) == 2 else x
        if ".experts.0." in name:
            w[name.replace(".experts.0.", ".experts.")] = layout((cfg.n_routed_experts, *shape))
    return w


def decoded(cfg, w, batch, context):
    """One token for each row, after `context` others, as `generate` decodes it."""
    cache = dsv3.Cache(batch, context + 100)
    h = dsv3.forward_in_chunks(np.full((batch, 1), 3), w, cfg, cache, np.full(batch, context), dsv3.CHUNK)
    return dsv3.logits_from([0] * batch, 1, h, w, cfg)


@pytest.mark.parametrize("batch, context", [*itertools.product([1, 3, 8], [128, 2048])])
def test_launches_and_traffic_of_a_token_with_v3s_structure(device, batch, context):
    """61 layers, 8 of 256 experts; the widths are tiny, as they change no count."""
    cfg = dsv3.Config(**TINY)
    w = on_the_device(cfg, np.float32)
    device.clear()
    decoded(cfg, w, batch, context)
    print(dict(device))
    assert device["launches"] - 61 <= 5500 and device["waits"] == 1  # 61 make the cache, once
    assert device["uploads"] <= 6 and device["uploaded"] <= 1000


def test_launches_and_uploads_of_a_chunk_with_v3s_structure(device, monkeypatch):
    """1,024 tokens at 61 layers, of which each of the 256 experts has its share."""
    cfg = dsv3.Config(**TINY)
    w, even, route = on_the_device(cfg, np.float32), np.arange(8 * 1024).reshape(1, 1024, 8) % 256, dsv3.route
    even = dsv3.xp.asarray(even)
    monkeypatch.setattr(dsv3, "route", lambda *given: (even, route(*given)[1]))
    device.clear()
    dsv3.forward_in_chunks(np.full((1, 1024), 3), w, cfg, dsv3.Cache(1, 1024), np.zeros(1, int), 1024)
    print(dict(device))
    assert device["launches"] <= 60_000 and device["waits"] <= 61
    assert device["uploads"] <= 4


@pytest.mark.parametrize("tokens", [1, 8, dsv3.FEW, dsv3.FEW + 1])
def test_chosen_experts_are_read_where_they_lie(device, shipped, tokens):
    """= the definition, with one call for each kind of matrix up to FEW tokens, whatever they chose."""
    cfg, name = shipped.cfg, "model.layers.1.mlp"
    w = dsv3.Checkpoint(WEIGHTS, cfg)
    x = dsv3.xp.asarray(np.random.default_rng(0).standard_normal((1, tokens, cfg.hidden_size)).astype(np.float32))
    given = x, w, name, *dsv3.route(x, w, name, cfg), cfg
    expected = dsv3.moe_all(*given).get()
    device.clear()
    got = dsv3.moe_computed(*given)
    assert (device["waits"] == 0) == (tokens <= dsv3.FEW)
    assert np.abs(got.get() - expected).max() < 1e-5 * np.abs(expected).max()


def test_experts_lie_in_one_array_where_all_fits(shipped, monkeypatch):
    size = 4 * sum(map(math.prod, dsv3.tensor_shapes(shipped.cfg).values()))
    for free, fits in ((size, False), (2 * size, True)):  # of which 70 % are taken
        monkeypatch.setattr(dsv3, "xp", Strict(free))
        assert ("model.layers.1.mlp.experts.gate_proj.weight" in dsv3.Checkpoint(WEIGHTS, shipped.cfg)) == fits


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("batch, context", [*itertools.product([1, 3, 8], [128, 4096])])
def test_a_token_moves_little_beside_weights_and_cache(device, batch, context, dtype):
    """In layers of an eighth of V3's widths (the heads are fewer, not narrower: so kv_b_proj keeps its share), where
    4,096 tokens are to the weights what 32,768 are to V3's."""
    cfg = dsv3.Config(**EIGHTH)
    w = on_the_device(cfg, dtype)
    device.clear()
    decoded(cfg, w, batch, context)
    chosen = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    weights = sum(math.prod(s) for name, s in dsv3.tensor_shapes(cfg).items() if ".experts." not in name)
    weights += cfg.num_hidden_layers * batch * cfg.num_experts_per_tok * chosen
    cache = cfg.num_hidden_layers * batch * context * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    share = device["copied"] / ((weights + cache) * np.dtype(dtype).itemsize)
    print(f"{share:.3f} of weights and cache are moved, the cache is {cache / (weights + cache):.3f} of them")
    assert share <= 0.15


def test_no_result_hangs_on_the_last_bits(device, shipped, monkeypatch):
    """The order of a GPU's sums is its own: with every product, sum and exponential off by an ulp, greedy text, chosen
    experts and, to float32's precision, logits are the same."""
    monkeypatch.setattr(Device, "jitter", np.random.default_rng(0))
    w, cfg = dsv3.Checkpoint(WEIGHTS, shipped.cfg), shipped.cfg
    assert generated(shipped.story["prompts"], w, cfg, 40) == [shipped.greedy[:40]]
    logits = dsv3.trace(shipped.text["prompts"], w, cfg)["lm_head"]
    assert 0 < np.abs(logits - shipped.logits).max() < 1e-4
