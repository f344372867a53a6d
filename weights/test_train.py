"""The trainer: the forms it puts into the page equal the page's, and a run may stop and go on.

pip install jax optax tqdm ml_dtypes
pytest -m training
"""

import functools
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX looks for any
jax = pytest.importorskip("jax", reason="training needs jax")
optax = pytest.importorskip("optax", reason="training needs optax")
pytest.importorskip("tqdm", reason="training needs tqdm")

sys.path.insert(0, str(Path(__file__).parent))
import train  # noqa: E402
from train import dsv3  # noqa: E402

pytestmark = pytest.mark.training

REPLACED = ["xp", "top_k", "softmax"]
PAGE = {name: getattr(dsv3, name) for name in REPLACED}
TINY = replace(train.MODEL, vocab_size=304, hidden_size=16, num_hidden_layers=1, first_k_dense_replace=0,
               moe_intermediate_size=8)  # fmt: skip


@pytest.fixture(autouse=True)
def page_restored(monkeypatch):
    """The trainer writes into the page's module; this puts the page's own names back."""
    for name in REPLACED:
        monkeypatch.setattr(dsv3, name, PAGE[name])


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """What several runs share is compiled once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def equal_with_gradient(page, fast, *args):
    """Both forms' value, and the gradient of its sum with some weights, by every argument."""
    weights = normal(*np.shape(fast(*args)))

    def value_and_gradient(form):
        total = jax.value_and_grad(lambda *args: (form(*args) * weights).sum(), tuple(range(len(args))))
        return form(*args), *jax.tree.leaves(total(*args))

    for expected, actual in zip(value_and_gradient(page), value_and_gradient(fast), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def test_softmax_equals_the_page(float64):
    """Masked as attention masks it."""
    train.use_jax()
    seen = np.tril(np.ones((6, 6), bool))
    both = PAGE["softmax"], dsv3.softmax
    forms = [lambda x, f=f: f(jax.numpy.where(seen, x, -np.inf)) for f in both]
    equal_with_gradient(*forms, 5 * normal(4, 6, 6))


def test_top_k_equals_the_page():
    score = np.random.default_rng(0).integers(0, 4, (200, 8)).astype(float)  # many ties
    score[::3, ::2] = -np.inf
    expected = dsv3.top_k(score, 5)
    train.use_jax()
    np.testing.assert_array_equal(dsv3.top_k(score, 5), expected)


def apart(w):
    """Weights under the page's names, each expert's its own."""
    alone = {name: x for name, x in w.items() if ".experts." not in name}
    for name in w.keys() - alone.keys():
        alone |= {name.replace("experts.", f"experts.{e}."): x for e, x in enumerate(w[name])}
    return alone


@pytest.mark.parametrize(("busy", "over"), [(16, False), (3, True)], ids=["even", "beyond the capacity"])
def test_grouped_experts_equal_the_definition(busy, over, float64):
    """With even load, and where few experts get all tokens, more than their capacity, and the
    others none; of several sequences, in one product for all."""
    train.use_jax()
    B, T, D, I, E, K = 2, 12, 6, 5, 16, 3  # noqa: E741
    cfg = replace(TINY, hidden_size=D, moe_intermediate_size=I, num_experts_per_tok=K)
    index_BTK = np.stack([(np.arange(B * T) * K + k) % busy for k in range(K)], -1).reshape(B, T, K)
    load_E = np.bincount(index_BTK.ravel(), minlength=E)
    assert (load_E.max() > train.CAPACITY * B * T * K / E) == over
    shapes = {"gate": (E, I, D), "up": (E, I, D), "down": (E, D, I)}
    w = {f"mlp.experts.{part}_proj.weight": normal(*shape, seed=i) for i, (part, shape) in enumerate(shapes.items())}

    def definition(x_BTD, gate_BTK, w):
        rows = zip(x_BTD, index_BTK, gate_BTK, strict=True)
        return jax.numpy.stack([dsv3.moe_all(x, apart(w), "mlp", i, gate, cfg) for x, i, gate in rows])

    def grouped(x_BTD, gate_BTK, w):
        form = lambda x, index, gate: train.grouped_experts(x, w, "mlp", index, gate, cfg)  # noqa: E731
        return jax.vmap(form)(x_BTD, index_BTK, gate_BTK)

    given = normal(B, T, D), normal(B, T, K, seed=9), w
    assert "cond[" in str(jax.make_jaxpr(grouped)(*given))  # one of the two is computed, not both
    equal_with_gradient(definition, jax.jit(grouped), *given)


def test_the_objective_of_a_batch_is_the_mean_of_the_pages(monkeypatch, float64):
    """Value, gradient and loads, of two sequences."""
    monkeypatch.setattr(train, "MODEL", TINY)
    params, biases = jax.tree.map(np.float64, train.initial_weights(0))
    token_BX = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))
    train.use_jax()
    batch = jax.jit(jax.value_and_grad(train.objective, has_aux=True))
    (loss, parts), grad = batch(params, biases, token_BX, 0.3)

    @jax.jit
    def page(params, token_X):
        def loss_of(params):
            return dsv3.training_objective(apart(params | biases), token_X, TINY, 0.3, train.ALPHA)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    monkeypatch.setattr(dsv3, "softmax", PAGE["softmax"])
    pages = [page(params, token_X) for token_X in token_BX]
    (total, both), slope = jax.tree.map(jax.numpy.add, *pages)
    figures = {name: both[name] for name in ("main", "mtp", "balance")}
    expected = jax.tree.map(lambda x: x / 2, (total, slope, figures)), both["load"]
    got = (loss, grad, {name: parts[name] for name in figures}), parts["load"]
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(equal, got, expected)


def test_eight_devices_equal_one(monkeypatch, float64):
    """Logits of the definition, by NumPy; loss and gradient, by one device."""
    monkeypatch.setattr(train, "MODEL", TINY)
    params, biases = jax.tree.map(np.float64, train.initial_weights(0))
    token_BX = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))
    w = apart(params | biases)
    logits = dsv3.head(dsv3.forward(token_BX[0], w, TINY), w)
    train.use_jax()
    placed = train.place(params)
    held = [sum(s.data.nbytes for x in placed.values() for s in x.addressable_shards if s.device == d)
            for d in jax.devices()]
    assert len(held) == 8 and max(held) < sum(x.nbytes for x in params.values()) / 2

    @jax.jit
    def model(params):
        w = params | biases
        return dsv3.head(dsv3.forward(token_BX[0], w, TINY, experts=train.grouped_experts), w)

    equal = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    equal(model(placed), logits)
    gradient = jax.jit(jax.value_and_grad(train.objective, has_aux=True))
    jax.tree.map(equal, *(gradient(p, biases, token_BX, 0.3) for p in (placed, params)))


def test_the_configuration_is_the_shipped_one(tmp_path):
    train.write_checkpoint(tmp_path, *train.initial_weights(0))
    shipped = Path(train.__file__).parent
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()


def tiny(monkeypatch, tmp_path, **changed):
    values = {"MODEL": TINY, "SEQUENCES": 2, "LENGTH": 16, "WARMUP": 2, "SAVE_EVERY": -1,
              "VALIDATE_EVERY": 4, "place": dict} | changed  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(train, name, value)
    text = tmp_path / "text"
    text.write_text("".join(f"Once there was a cat. It had {i} mice.\n<|endoftext|>\n" for i in range(100)))
    return ["--text", str(text), "--out"]


def log_of(out):
    return [json.loads(line) for line in (out / "state" / "log.jsonl").read_text().splitlines()]


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch, capfd):
    """Stopped after its second save, begun for more steps than it then takes: it ends with the same bytes, since only
    the decay depends on the number of steps."""
    command = tiny(monkeypatch, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*command, str(whole), "--steps", "6"])

    save, saved = train.save_state, []

    def stop_after_two(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            train.main([*command, str(parts), "--steps", "9"])
    train.main([*command, str(parts), "--steps", "6"])
    said = capfd.readouterr().out
    assert "from step 2" in said
    assert len(re.findall(r"drafted [1-9]\d*, accepted \d+\n", said)) == 2  # when a run ends
    assert [entry["step"] for entry in log_of(parts)] == list(range(1, 7))
    assert log_of(parts) == log_of(whole) and "validation_bits_per_byte" in log_of(whole)[3]
    files = sorted(path.name for path in whole.iterdir() if path.is_file())
    assert len(files) == 7
    for name in files:
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert dsv3.read_config(whole) == TINY
    tensors = load_file(whole / "model.safetensors") | load_file(whole / "mtp.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == dsv3.tensor_shapes(TINY)
    assert all(np.isfinite(x.astype(np.float32)).all() for x in tensors.values())


def test_the_control_keeps_its_biases(tmp_path, monkeypatch):
    """The bias update moves them, except in the control and once gamma is frozen."""
    command = tiny(monkeypatch, tmp_path)
    cases = {"run": ([], True), "frozen": ([], False), "control": (["--no-bias-update"], False)}
    for name, (flags, moved) in cases.items():
        monkeypatch.setattr(train, "GAMMA_UNTIL", 0 if name == "frozen" else 0.9)
        train.main([*command, str(tmp_path / name), "--steps", "6", *flags])
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert any(x.any() for key, x in tensors.items() if key.endswith("correction_bias")) == moved


def test_a_pass_reads_every_story_once(monkeypatch):
    monkeypatch.setattr(train, "SEQUENCES", 2)
    monkeypatch.setattr(train, "LENGTH", 4)
    batches = train.Batches([np.array([0, s, s, 1]) for s in range(2, 12)], seed=0)
    windows = np.concatenate([batches[i] for i in range(10)])  # two passes
    for tokens in (windows[:10], windows[10:]):
        assert sorted(tokens[:, :-1].ravel()) == sorted([0, 1] * 10 + [*range(2, 12)] * 2)
        np.testing.assert_array_equal(tokens[:-1, -1], tokens[1:, 0])
    assert (windows[:10] != windows[10:]).any()
    np.testing.assert_array_equal(batches[3], windows[6:8])  # also after another pass


def test_the_schedule():
    rate = train.schedule(2.0, 1000)
    decay = train.decay_start(1000)
    assert float(rate(0)) == pytest.approx(2 / train.WARMUP)
    assert all(float(rate(i)) == 2 for i in (train.WARMUP, decay // 2, decay))
    assert float(rate((decay + 1000) // 2)) == pytest.approx(1 + train.FLOOR)
    assert float(rate(1000)) == pytest.approx(2 * train.FLOOR)
