"""The page under CuPy's rules, without a GPU:  python -m pytest .ci/test_cupy.py

`Strict` stands in for CuPy: NumPy's numbers, but only the names and parameters of CuPy 14.2
(cupy_api.json, taken from the real package), no host array that meets a device array, no order of
equal keys that CuPy leaves open. Stricter than CuPy, which lets np.exp(a) and a[[0]] through: they
upload or dispatch unseen. What passes here with the same bits asks nothing of CuPy that it lacks;
what a GPU does beyond that, `python -m pytest -m gpu -s` shows on one.
"""

import itertools
import json
import math
import operator
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
    make_tokens,
    make_weights,
    quantised,
    shipped,
    write_checkpoint,
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
        self.get_default_memory_pool = lambda: types.SimpleNamespace(total_bytes=lambda: 5 * 10**6)

    def __getattr__(self, name):
        if name.startswith("_") or name not in API["names"]:
            raise AttributeError(f"cupy has no {name}")
        value = getattr(np, name)
        return strict(name, value, API["names"][name]) if callable(value) and not isinstance(value, type) else value


@pytest.fixture
def device(monkeypatch):
    """`xp` is the stand-in, nothing counted yet; -> the counts."""
    monkeypatch.setattr(dsv3, "xp", Strict())
    Device.traffic.clear()
    return Device.traffic


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


# ---- The page under CuPy's rules --------------------------------------------------------------------


def everything(directory, cfg, prompts, dtype, memory):
    """Trace, greedy and sampled text with speculation, generation as defined, and the training
    objective of a checkpoint."""
    w, stats, tokens = dsv3.Checkpoint(directory, cfg, dtype, memory), Counter(), []
    named = [dsv3.trace(prompts[0], w, cfg, chunk) for chunk in (None, 1, 1024)]
    for prompt, t in itertools.product(prompts, (0, 1.0)):
        tokens.append(list(dsv3.generate(prompt, w, cfg, 12, dsv3.Sampling(t), stats=stats)))
    tokens.append(dsv3.generate_greedy(prompts[0], w, cfg, 2))
    loss, parts = dsv3.training_objective(w, make_tokens(cfg, 0, 7), cfg)
    gate = next(iter(parts["load"]))
    bias = dsv3.update_bias(w[f"{gate}.e_score_correction_bias"], parts["load"][gate], 0.5)
    return named, tokens, stats["accepted"], [dsv3.to_host(x).tolist() for x in (loss, bias)]


@pytest.mark.parametrize("name, memory, dtype", [
    *itertools.product(["fp8"], [None, 0], [np.float16, np.float32, np.float64]),
    ("shipped", None, np.float32),
])  # fmt: skip
def test_cupys_rules_leave_numpys_bits(tmp_path, monkeypatch, name, memory, dtype):
    """A checkpoint in FP8 and BF16, and the shipped one; all in memory or nothing."""
    directory, cfg, prompts = WEIGHTS, dsv3.read_config(WEIGHTS), [[0, 421, 433, 260, 395], [0]]
    if name == "fp8":
        cfg = replace(SMALL, vocab_size=4, num_nextn_predict_layers=1)
        prompts = [[1, 2, 3, 0, 1], [3]]
        directory = write_checkpoint(tmp_path / "w", cfg, quantised(make_weights(cfg)), 2, None)
    expected = everything(directory, cfg, prompts, dtype, memory)
    monkeypatch.setattr(dsv3, "xp", Strict())
    got = everything(directory, cfg, prompts, dtype, memory)
    assert expected[1:] == got[1:] and expected[2] > 0
    for ours, theirs in zip(got[0], expected[0], strict=True):
        for array, x in theirs.items():
            assert isinstance(ours[array], np.ndarray) and ours[array].tobytes() == x.tobytes(), array


@pytest.mark.parametrize("check", GPU_CHECKS)
def test_gpu_checks_on_the_stand_in(check, shipped, device, tmp_path):
    check(shipped, tmp_path)


def test_the_program_runs_and_tells_the_pools_memory(device, capsys, monkeypatch):
    monkeypatch.setattr(dsv3, "choose_device", lambda wanted, xp=dsv3.xp: xp)
    assert dsv3.main(["-n", "5"]) == 0
    on_device, said = capsys.readouterr()
    assert "drafted 0" not in said and said.endswith("peak memory 5 MB\n")
    monkeypatch.undo()
    assert dsv3.main(["-n", "5", "--device", "cpu"]) == 0 and capsys.readouterr().out == on_device


@pytest.mark.parametrize("speculate", [False, True])
def test_decoding_uploads_no_weights(device, speculate):
    """What goes up are tokens, frequencies and, for each layer, which expert a token chose."""
    cfg, n = dsv3.read_config(WEIGHTS), 40
    w = dsv3.Checkpoint(WEIGHTS, cfg)
    _ = [w[name] for name in w.shapes]  # all go up
    device.clear()
    assert len(list(dsv3.generate([0, 421], w, cfg, n, speculate=speculate))) == n
    print({name: round(count / n) for name, count in device.items()}, "per token")
    assert 0 < device["uploaded"] <= 1000 * n


TINY = dsv3.Config(
    vocab_size=64, hidden_size=64, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=64,
    moe_intermediate_size=8, num_nextn_predict_layers=0,
)  # fmt: skip


@pytest.mark.parametrize("context", [128, 2048])
def test_launches_of_a_token_with_v3s_structure(device, context):
    """61 layers, 8 of 256 experts; the widths are tiny, as they change no count."""
    numbers, w = np.random.default_rng(0).standard_normal(2**14).astype(np.float32) / 30, {}
    for name, shape in dsv3.tensor_shapes(TINY).items():
        w[name] = Device(numbers[: math.prod(shape)].reshape(shape))  # the same numbers in all
    cache = dsv3.Cache(context + 2)
    for tokens in (context, 1, 1):
        device.clear()
        h_TD = dsv3.cached_pass(dsv3.forward, [np.full(tokens, 3)], w, TINY, cache, dsv3.CHUNK)
        dsv3.to_host(dsv3.head(h_TD[-1:], w))
    print(dict(device))
    assert 61 < device["launches"] <= 9100


def test_no_result_hangs_on_the_last_bits(device, shipped, monkeypatch):
    """The order of a GPU's sums is its own: with every product, sum and exponential off by an ulp,
    greedy text, chosen experts and, to float32's precision, logits are the same."""
    monkeypatch.setattr(Device, "jitter", np.random.default_rng(0))
    w, cfg = dsv3.Checkpoint(WEIGHTS, shipped.cfg), shipped.cfg
    assert list(dsv3.generate(shipped.story["prompts"][0], w, cfg, 40)) == shipped.greedy[:40]
    logits = dsv3.trace(shipped.text["prompts"][0], w, cfg)["lm_head"]
    assert 0 < np.abs(logits - shipped.logits).max() < 1e-4
