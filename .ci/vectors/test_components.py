"""Of each component a right kernel of half precision passes, and planted mistakes depart.

    pip install torch && pytest -m kit .ci/vectors/test_components.py

The right kernels are reference.py's in float32, with what they hand on rounded; a mistake is such a
kernel given another configuration, other weights or inputs, or its answer changed.
"""

import functools
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the right kernels need torch")
pytestmark = pytest.mark.kit
import reference  # noqa: E402

VECTORS = Path(__file__).resolve().parents[2] / "weights" / "vectors"
sys.path.insert(0, str(VECTORS))
import cases  # noqa: E402
import check  # noqa: E402
import make_components  # noqa: E402
import port  # noqa: E402
from test_vectors import LARGE  # noqa: E402

EXPECTED = cases.read_expected()
CASES = {name: case for name, case in cases.read_index().items() if case["do"] == "component"}
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SILENT = {("angles in float32", "bfloat16")}  # off by 5e-3, which BF16 rounds away


@functools.lru_cache(4)
def files(name, dtype):
    """A case's weights and inputs -> two dicts of tensors."""
    with tempfile.TemporaryDirectory() as directory:
        return make_components.read(cases.write(CASES[name], directory), dtype)


def verdict(name, arrays, dtype):
    case = CASES[name]
    mine = {array: x.numpy() if torch.is_tensor(x) else x for array, x in arrays.items()}
    wanted = {array: EXPECTED[f"{name}/{array}"] for array in case["arrays"]}
    return check.judge_component(case, wanted, mine, dtype, case["arrays"])


def kernel(name, dtype):
    """-> run(config, weights, inputs) in that precision, and the three."""
    case, half = CASES[name], HALF.get(dtype)
    weights, given = files(name, torch.float64 if dtype == "float64" else torch.float32)
    rnd = (lambda x: x.to(half).to(x.dtype)) if half else reference.exact
    function = reference.COMPONENTS[case["component"]]
    return lambda cfg, w, x: function(cfg, w, x, case["layer"], rnd), case["config"], weights, given


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_right_kernel_passes(name, dtype):
    run, *rest = kernel(name, dtype)
    found = verdict(name, run(*rest), dtype)
    assert found.agrees, found.text


@pytest.mark.parametrize("name", CASES)
def test_the_page_passes(name, tmp_path):
    request = check.prepare(name, CASES[name], EXPECTED, tmp_path / name, "float64")
    found = verdict(name, port.answer(tmp_path / name, request), "float64")
    assert found.agrees, found.text


# ---- Planted mistakes ----------------------------------------------------------------------------


def config(**changes):
    return lambda run, cfg, w, x: run(cfg | changes, w, x)


def weights(suffix, change):
    def planted(run, cfg, w, x):
        return run(cfg, {name: change(v) if name.endswith(suffix) else v for name, v in w.items()}, x)
    return planted


def inputs(name, change):
    return lambda run, cfg, w, x: run(cfg, w, x | {name: change(x[name])})


def output(name, change):
    def planted(run, cfg, w, x):
        arrays = run(cfg, w, x)
        return arrays | {name: change(arrays[name])}
    return planted


def zero(x):
    return x * 0


def halves(x):
    """Pairs (j, j + R/2) put side by side, as a kernel reads that takes the other layout."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


def halves_rotated(run, cfg, w, x):
    y = run(cfg, w, x | {"x": halves(x["x"])})["y"]
    return {"y": torch.cat([y[..., 0::2], y[..., 1::2]], -1)}


def rope_in_float32(run, cfg, w, x):
    frequency = reference.frequencies(cfg).float()
    angle = (x["positions"].float()[:, None] * frequency).double()[:, None]
    z = torch.view_as_complex(x["x"].double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    return {"y": torch.view_as_real(z).flatten(-2).to(x["x"].dtype)}


def softmax_gates(run, cfg, w, x):
    arrays = run(cfg, w, x)
    logits = torch.logit(arrays["scores"].double())
    gate = logits.softmax(-1).gather(-1, arrays["indices"])
    return arrays | {"weights": gate / gate.sum(-1, keepdim=True) * cfg["routed_scaling_factor"]}


def biased_gates(run, cfg, w, x):
    """Gates from the biased affinities."""
    arrays = run(cfg, w, x)
    bias = next(v for name, v in w.items() if name.endswith("e_score_correction_bias"))
    gate = (arrays["scores"] + bias).gather(-1, arrays["indices"])
    return arrays | {"weights": gate / gate.sum(-1, keepdim=True) * cfg["routed_scaling_factor"]}


def large_guard(run, cfg, w, x):
    arrays = run(cfg, w, x)
    gate = arrays["scores"].gather(-1, arrays["indices"])
    scaling = cfg["routed_scaling_factor"]
    return arrays | {"weights": gate / (gate.sum(-1, keepdim=True) + 1e-6) * scaling}


def masked_with_zero(run, cfg, w, x):
    """Groups that are left out get 0 in place of -inf."""
    arrays = run(cfg, w, x)
    bias = next(v for name, v in w.items() if name.endswith("e_score_correction_bias"))
    biased, G = arrays["scores"] + bias, cfg["n_group"]
    group = biased.unflatten(-1, (G, -1)).sort(-1).values[..., -2:].sum(-1)
    kept = group.sort(dim=-1, descending=True, stable=True).indices[:, : cfg["topk_group"], None]
    kept = (kept == torch.arange(G)).any(1).repeat_interleave(biased.shape[-1] // G, -1)
    order = biased.masked_fill(~kept, 0).sort(dim=-1, descending=True, stable=True).indices
    return arrays | {"indices": order[:, : cfg["num_experts_per_tok"]]}


def gates_not_normed(run, cfg, w, x):
    arrays = run(cfg, w, x)
    gate = arrays["scores"].gather(-1, arrays["indices"])
    return arrays | {"weights": gate * cfg["routed_scaling_factor"]}


def normed_beyond_one(run, cfg, w, x):
    return gates_not_normed(run, cfg, w, x) if cfg["num_experts_per_tok"] == 1 else run(cfg, w, x)


def highest_index(run, cfg, w, x):
    """Of equals the highest index: all axes of experts turned round."""
    w = {name: v.flip(0) for name, v in w.items()}
    arrays = run(cfg, w, x)
    return arrays | {"indices": cfg["n_routed_experts"] - 1 - arrays["indices"]}


def silu_overflows(run, cfg, w, x):
    """x e^x / (1 + e^x) in float32."""
    y = run(cfg, w, x)["y"]
    for t, chosen in enumerate(x["indices"].tolist()):
        for e in chosen:
            name = f"model.layers.0.mlp.experts.{e}.gate_proj.weight"
            z = (x["x"][t].float() @ w[name].float().T).exp()
            y[t] += (0 * z / (1 + z)).sum().to(y.dtype)
    return {"y": y}


def last_of_expert_lost(run, cfg, w, x):
    """Rows of an expert in tiles of 128: what is beyond the first tile is dropped."""
    gates = x["weights"].clone()
    for e in x["indices"].unique():
        for t, k in (x["indices"] == e).nonzero()[128:].tolist():
            gates[t, k] = 0
    return run(cfg, w, x | {"weights": gates})


def swapped(run, cfg, w, x):
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    named = {name: next((name.replace(a, b) for a, b in other.items() if a in name), name) for name in w}
    return run(cfg, {name: w[named[name]] for name in w}, x)


def next_expert(run, cfg, w, x):
    there = x["indices"].unique()
    return run(cfg, w, x | {"indices": there[(torch.searchsorted(there, x["indices"]) + 1) % len(there)]})


def scale_of(numbers):
    """As if the softmax's scale were 1 / sqrt(numbers), YaRN's m^2 kept."""
    def planted(run, cfg, w, x):
        R = cfg["qk_rope_head_dim"]
        right = cfg["qk_nope_head_dim"] + R
        return run(cfg, w, x | {"q": x["q"] * math.sqrt(right / numbers(cfg))})
    return planted


def in_tiles(tile, merge):
    """Attention in tiles of keys, whose answers are merged."""
    def planted(run, cfg, w, x):
        rows = []
        for t in range(len(x["q"])):
            seen = x["cache"][: len(x["cache"]) - len(x["q"]) + t + 1]
            parts = [run(cfg, w, {"q": x["q"][t : t + 1], "cache": part}) for part in seen.split(tile)]
            o, lse = (torch.cat([part[key] for part in parts]) for key in ("o", "lse"))
            rows.append((merge(o, lse), lse.logsumexp(0)))
        return {"o": torch.stack([o for o, _ in rows]), "lse": torch.stack([lse for _, lse in rows])}
    return planted


def merged(o, lse):
    return (o * lse.softmax(0)[..., None]).sum(0)


def mean(o, lse):
    return o.mean(0)


def all_seen(run, cfg, w, x):
    """Every query sees all entries."""
    rows = [run(cfg, w, {"q": q[None], "cache": x["cache"]}) for q in x["q"]]
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def no_maximum(run, cfg, w, x):
    arrays = run(cfg, w, x)
    e = arrays["lse"].to(torch.float32).exp()
    return arrays | {"o": arrays["o"] * (e / e)[..., None].to(arrays["o"].dtype)}


def base_2(run, cfg, w, x):
    return output("lse", lambda lse: lse / math.log(2))(run, cfg, w, x)


def without_yarn(run, cfg, w, x):
    return run(cfg | {"rope_scaling": None}, w, x) if cfg["rope_scaling"] else run(cfg, w, x)


def without_mscale(run, cfg, w, x):
    yarn = cfg["rope_scaling"]
    return run(cfg | {"rope_scaling": yarn and yarn | {"mscale_all_dim": 0.0}}, w, x)


def joined_in_reverse(run, cfg, w, x):
    return weights("eh_proj.weight", lambda v: torch.cat(v.chunk(2, -1)[::-1], -1))(run, cfg, w, x)


def norms_swapped(run, cfg, w, x):
    names = {"model.layers.1.enorm.weight": "model.layers.1.hnorm.weight"}
    names |= {b: a for a, b in names.items()}
    return run(cfg, {name: w[names.get(name, name)] for name in w}, x)


def state_not_normed(run, cfg, w, x):
    h, weight = x["h"], w["model.layers.1.hnorm.weight"]
    more = h - reference.norm(h, weight, cfg["rms_norm_eps"], reference.exact)
    return {"y": run(cfg, w, x)["y"] + more @ w["model.layers.1.eh_proj.weight"].chunk(2, -1)[1].T}


def fp8_scales(change):
    return weights("_scale_inv", change)


def next_column(x):
    return x.roll(1, 1)


def other_quantiser(scales, nearest=lambda x: x.to(reference.E4M3).double()):
    """The product with other activations: scales(tiles) -> the scale of each, nearest(x) -> codes."""
    def planted(run, cfg, w, x):
        code, scale = reference.fp8_matrix(w)
        tiles = x["x"].float().unflatten(-1, (-1, 128))
        own = scales(tiles, reference.quantised(x["x"], cfg)[1])
        quantised = (nearest(tiles / own) * own).flatten(-2).double()
        return run(cfg, w, x) | {
            "y": quantised @ (code.double() * reference.spread(scale, code.shape)).T}
    return planted


def truncated(x):
    """E4M3 towards zero."""
    near = x.to(reference.E4M3).double()
    step = torch.exp2(near.abs().clamp(min=2**-6).log2().floor() - 3)
    return torch.where(near.abs() > x.abs(), near - near.sign() * step, near)


def half_up(x):
    """E4M3 with ties away from zero."""
    return (x * (1 + 2**-20)).to(reference.E4M3).double()


def redrawn_from_p(run, cfg, w, x):
    arrays = run(cfg, w, x)
    rows = torch.stack([torch.searchsorted(p.cumsum(0), u[1], right=True)
                        for p, u in zip(x["p"], x["uniform"], strict=True)])  # fmt: skip
    return arrays | {"token": torch.where(arrays["accepted"] == 1, arrays["token"], rows)}


def greedy_only(run, cfg, w, x):
    accepted = (x["draft"] == x["p"].argmax(-1)).to(torch.int64)
    return run(cfg, w, x) | {"accepted": accepted}


MISTAKES = [
    ("rms_norm", "no eps", config(rms_norm_eps=0.0)),
    ("rms_norm", "1 + weight", weights("norm.weight", lambda v: 1 + v)),
    ("rms_norm", "sum in place of mean", output("y", lambda y: y / y.shape[-1] ** 0.5)),
    ("rope", "halves in place of neighbours", halves_rotated),
    ("rope", "YaRN is lost", without_yarn),
    ("rope", "the other direction", inputs("positions", lambda p: -p)),
    ("rope", "one position further", inputs("positions", lambda p: p + 1)),
    ("rope", "angles in float32", rope_in_float32),
    ("router", "no bias", weights("bias", zero)),
    ("router", "gates from biased affinities", biased_gates),
    ("router", "softmax in place of sigmoid", softmax_gates),
    ("router", "no groups", config(n_group=1, topk_group=1)),
    ("router", "no scaling", config(routed_scaling_factor=1.0)),
    ("router", "scaling twice", output("weights", lambda v: v * 2.5)),
    ("router", "gates not normed", gates_not_normed),
    ("router", "normed only where K > 1", normed_beyond_one),
    ("router", "a guard of 1e-6", large_guard),
    ("router", "masked with 0", masked_with_zero),
    ("router", "bias in BF16", weights("bias", lambda v: v.bfloat16().to(v.dtype))),
    ("router", "the highest index of equals", highest_index),
    ("experts", "no gates", inputs("weights", torch.ones_like)),
    ("experts", "gates in another order", inputs("weights", lambda v: v.flip(-1))),
    ("experts", "gate_proj and up_proj swapped", swapped),
    ("experts", "the next expert", next_expert),
    ("experts", "one tile of 128 rows", last_of_expert_lost),
    ("experts", "silu overflows", silu_overflows),
    ("moe", "no shared expert", weights("shared_experts.down_proj.weight", zero)),
    ("moe", "the shared expert scaled", weights("shared_experts.down_proj.weight", lambda v: v * 2.5)),
    ("moe", "the shared expert scaled down", weights("shared_experts.down_proj.weight", lambda v: v / 2.5)),
    ("moe", "no scaling", config(routed_scaling_factor=1.0)),
    ("moe", "no bias", weights("bias", zero)),
    ("moe", "no groups", config(n_group=1, topk_group=1)),
    ("mla", "no mscale", without_mscale),
    ("mla", "YaRN is lost", without_yarn),
    ("mla", "an entry of the cache is lost", inputs("cache", lambda c: c[1:])),
    ("mla", "cached keys not rotated", inputs("cache", lambda c: torch.cat([c[:, :-8], halves(c[:, -8:])], -1))),
    ("mla", "the cache is not read", inputs("cache", zero)),
    ("mla", "no norm weight on the latent", weights("kv_a_layernorm.weight", torch.ones_like)),
    ("mla", "no norm weight on the query", weights("q_a_layernorm.weight", torch.ones_like)),
    ("attention_core", "no mscale", without_mscale),
    ("attention_core", "scale of 576", scale_of(lambda cfg: cfg["kv_lora_rank"] + cfg["qk_rope_head_dim"])),
    ("attention_core", "scale of 128", scale_of(lambda cfg: cfg["qk_nope_head_dim"])),
    ("attention_core", "tiles are averaged", in_tiles(64, mean)),
    ("attention_core", "all entries are seen", all_seen),
    ("attention_core", "no maximum", no_maximum),
    ("attention_core", "log-sum-exp to base 2", base_2),
    ("attention_core", "the last entry is lost", inputs("cache", lambda c: torch.cat([c[:-1], c[-1:] * 0]))),
    ("attention_core", "k_R is not scored", inputs("q", lambda q: torch.cat([q[..., :-64], q[..., -64:] * 0], -1))),
    ("mla_prologue", "one position further", inputs("start", lambda s: s + 1)),
    ("mla_prologue", "positions from 0", inputs("start", zero)),
    ("mla_prologue", "YaRN is lost", without_yarn),
    ("mla_prologue", "no norm weight on the latent", weights("kv_a_layernorm.weight", torch.ones_like)),
    ("mla_prologue", "k_rope as halves", output("k_rope", halves)),
    ("mtp_input", "[state ; embedding]", joined_in_reverse),
    ("mtp_input", "norms swapped", norms_swapped),
    ("mtp_input", "tokens of the next pair", inputs("tokens", lambda t: t.roll(1))),
    ("mtp_input", "the state not normed", state_not_normed),
    ("block", "no residual", lambda run, cfg, w, x: {"y": run(cfg, w, x)["y"] - x["x"]}),
    ("block", "no mscale", without_mscale),
    ("block", "no shared expert", weights("shared_experts.down_proj.weight", zero)),
    ("block", "the cache is not read", inputs("cache", zero)),
    ("dequantize", "divided by the scale", fp8_scales(lambda v: 1 / v)),
    ("dequantize", "the next column's scale", fp8_scales(next_column)),
    ("dequantize", "the next row's scale", fp8_scales(lambda v: v.roll(1, 0))),
    ("dequantize", "FNUZ", output("weight", lambda v: v / 2)),
    ("fp8_linear", "activations not quantised", other_quantiser(lambda tiles, own: own, lambda x: x.double())),
    ("fp8_linear", "one scale per token", other_quantiser(lambda tiles, own: own.amax(1, keepdim=True))),
    ("fp8_linear", "one scale per tensor", other_quantiser(lambda tiles, own: own.amax())),
    ("fp8_linear", "scales not powers of two",
     other_quantiser(lambda tiles, own: tiles.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)),
    ("fp8_linear", "towards zero", other_quantiser(lambda tiles, own: own, truncated)),
    ("fp8_linear", "ties away from zero", other_quantiser(lambda tiles, own: own, half_up)),
    ("fp8_linear", "the next column's scale", fp8_scales(next_column)),
    ("fp8_linear", "FNUZ", output("y", lambda y: y / 2)),
    ("verify", "drawn from p", redrawn_from_p),
    ("verify", "accepted if likeliest", greedy_only),
    ("verify", "p / q turned round", lambda run, cfg, w, x: run(cfg, w, x | {"p": x["q"], "q": x["p"]})),
]  # fmt: skip


def shows(component, plant, dtype):
    """The small cases of a component that a mistake departs in."""
    found = []
    for name, case in CASES.items():
        if case["component"] == component and name not in LARGE:
            run, *rest = kernel(name, dtype)
            with np.errstate(all="ignore"):
                if not verdict(name, plant(run, *rest), dtype).agrees:
                    found.append(name)
    return found


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("component,mistake,plant", MISTAKES)
def test_a_planted_mistake_departs(component, mistake, plant, dtype):
    silent = (mistake, dtype) in SILENT
    assert bool(shows(component, plant, dtype)) != silent, f"{mistake} agrees everywhere"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attention_core")])
def test_split_keys_merged_by_log_sum_exp_pass(name):
    run, *rest = kernel(name, "bfloat16")
    assert verdict(name, in_tiles(64, merged)(run, *rest), "bfloat16").agrees


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_mistake_of_a_component_is_named(dtype, tmp_path, capsys):
    source = (VECTORS / "router.py").read_text().replace(' + w[gate + "e_score', ' - w[gate + "e_score')
    (tmp_path / "router.py").write_text(source)
    check.main([f"{sys.executable} {tmp_path / 'router.py'}", "--case", "router.small", "--dtype", dtype])
    assert capsys.readouterr().out.splitlines()[0].endswith("; as if the bias is subtracted")


def test_rows_of_a_sample_are_called_so():
    name = "attention_core.around_64"
    o = np.zeros(CASES[name]["shapes"]["o"])
    assert "departs at o, every sampled row: " in verdict(name, {"o": o}, "float64").text
    named = {array: EXPECTED[f"{name}/{array}"] for array in CASES[name]["arrays"]}
    o.reshape(-1, 512)[CASES[name]["sample"]["o"]] = named["o"]
    o[1, 15] = 0
    text = verdict(name, {"o": o}, "float64").text
    assert "departs at o, sampled row 3 alone: " in text
    assert text.endswith("; sampled are [0, 0], [0, 15], [1, 0], [1, 15], [2, 0], [2, 15] of [3, 16, 512]")
    lse = named["lse"] + (np.arange(16) == 15)
    o[1, 15] = named["o"][3]
    assert "departs at lse, every token, head 15 alone: " in verdict(name, {"o": o, "lse": lse}, "float64").text


def test_the_shortest_port_passes(capsys):
    command = f"{sys.executable} {VECTORS / 'router.py'}"
    assert check.main([command, "--strict", "--component", "router"]) == 0
    assert check.main([command, "--case", "rope.small"]) == 1, "it only lacks, and nothing agrees"
    assert "1 skipped" in capsys.readouterr().out
