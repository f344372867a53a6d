"""The kit is right: the page and the JavaScript port pass it, planted mistakes do not, and bad answers are one line."""

import contextlib
import functools
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

HERE = Path(__file__).resolve().parents[2] / "weights" / "vectors"
sys.path[:0] = [str(HERE), str(Path(__file__).parent)]
import cases  # noqa: E402
import check  # noqa: E402
import compare  # noqa: E402
import mistakes  # noqa: E402
import port  # noqa: E402

INDEX, EXPECTED = cases.read_index(), cases.read_expected()
DIRECTORY = Path(tempfile.mkdtemp())


@pytest.fixture(scope="module", autouse=True)
def scratch():
    yield
    shutil.rmtree(DIRECTORY)


@functools.cache
def files(name, dtype):
    """A case's files -> (directory, request)."""
    directory = DIRECTORY / f"{name}-{dtype}"
    return directory, check.prepare(name, INDEX[name], EXPECTED, directory, dtype)


def judge(name, mine):
    case = INDEX[name]
    reference = {array: EXPECTED[f"{name}/{array}"] for array in case["arrays"]}
    if case["do"] == "component":
        return check.judge_component(case, reference, mine, "float64", list(reference))
    traced = case["do"] == "trace"
    directory = files(name, "float64")[0] if traced else None
    return compare.compare(mine, reference, case["tolerance"], directory, None if traced else list(reference))


def checked(*args):
    """check.py with these arguments -> (exit code, lines)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = check.main([str(arg) for arg in args])
    return code, out.getvalue().splitlines()


# ---- The cases -----------------------------------------------------------------------------------------------------


LARGE = {"experts.release", "mla_prologue.heads_16", "mla_prologue.release", "mla.heads_16", "mla.heads_128",
         "dequantize.release", "mtp_input.release", "block.heads_16", "moe.experts_256"}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.kit) if n in LARGE else n for n in INDEX])
def test_page_passes(name, dtype):
    directory, request = files(name, dtype)
    verdict = judge(name, port.answer(directory, request))
    assert verdict.agrees, verdict.text


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.kit)])
def test_port_in_javascript_passes(whole):
    chosen = [f"--case={name}" for name, case in INDEX.items() if whole or case["do"] != "component"]
    code, lines = checked("--strict", f"node {HERE / 'port.mjs'}", *chosen)
    assert code == 0 and lines[-1] == f"{len(chosen)} agrees, 0 departs, 0 skipped", lines


def test_cases_say_what_they_are():
    for name, case in INDEX.items():
        assert case["why"] and case["origin"] and case["equation"] and case["arrays"], name
        assert all(f"{name}/{array}" in EXPECTED for array in case["arrays"])
    assert checked("--list")[1][0].startswith("v3_yarn")
    assert sum(path.stat().st_size for path in HERE.iterdir() if path.is_file()) < 4e6


def test_stored_numbers_are_those_of_ml_dtypes():
    x = np.random.default_rng(0).standard_normal(4000) * np.exp(np.linspace(-12, 6, 4000))
    x[:4] = 0, -0.0, 448, -464  # the last one is nearest to 448 of what there is
    assert np.array_equal(cases.e4m3(x), np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    assert np.array_equal(cases.bf16(x), x.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16))


# ---- Planted mistakes ----------------------------------------------------------------------------------------------


@functools.cache
def wrong_answer(what, name, dtype):
    directory, request = files(name, dtype)
    return mistakes.wrong_answer(what, request, directory)


SMALL = "eps", "half", "latent_eps", "phases", "tiny_affinities", "yarn_range"  # float32 must show these too


@pytest.mark.parametrize("what", mistakes.MISTAKES)
def test_mistake_is_caught_where_it_is(what):
    """And named, by components, which is quick; by all cases in test_no_mistake_is_named_wrongly."""
    for n, (name, _, dtype) in enumerate(shown.partition("/") for shown in mistakes.MISTAKES[what].cases):
        for precision in ["float64", "float32"] if name in SMALL else [dtype or "float64"]:
            verdict = judge(name, wrong_answer(what, name, precision))
            assert not verdict.agrees and (n or verdict.at.endswith(mistakes.MISTAKES[what].where)), verdict.text
            if INDEX[name]["do"] == "component":
                assert what in named(what, name, precision, verdict.at)


def named(what, name, dtype, at):
    """The mistakes that a case finds in the answer of the page with one of them."""
    (directory, request), case = files(name, dtype), INDEX[name]
    order = list(dict.fromkeys(compare.split(array)[1] for array in case["arrays"]))
    mistakes.suspects.clear()
    mistakes.in_vain.clear()
    return mistakes.explanations(wrong_answer(what, name, dtype), request, directory, at, order, case["tolerance"],
                                 lambda other, *_: wrong_answer(other, name, dtype))[0]  # fmt: skip


@pytest.mark.kit
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [name for name, case in INDEX.items() if name not in LARGE
                                  and case.get("checkpoint") != "shipped"])  # fmt: skip
def test_no_mistake_is_named_wrongly(name, dtype, monkeypatch):
    """Every mistake that the case can show is named, perhaps among others that look the same here."""
    directory, request = files(name, dtype)
    if not mistakes.small(request, directory):
        pytest.skip("too large to be searched")
    reached = mistakes.reaching(request, directory)
    monkeypatch.setattr(mistakes, "reaching", lambda *_: reached)
    for what in reached:
        mine = wrong_answer(what, name, dtype)
        verdict = judge(name, mine) if mine else None
        if verdict and not verdict.agrees and verdict.at in mine:
            found = named(what, name, dtype, verdict.at)
            assert what in found, found
    wrong_answer.cache_clear()


def test_a_loss_of_shape_1_is_named_too(tmp_path):
    what, (directory, request) = "the main loss is in bits", files("losses", "float64")
    mine = {array: np.reshape(x, -1) for array, x in wrong_answer(what, "losses", "float64").items()}
    safetensors.numpy.save_file(mine, tmp_path / "answer.safetensors")
    answer = tmp_path / "answer.safetensors"
    assert what in check.judge("losses", INDEX["losses"], EXPECTED, answer, directory, request).text


def test_no_mistake_is_named_that_does_not_explain():
    """Noise, and a mistake with a second one behind it."""
    directory, request = files("v3_yarn", "float64")
    names, at, mine = INDEX["v3_yarn"]["arrays"], "model.layers.0.self_attn.q_rope", trace_of()
    what = "YaRN slows the fast pairs and keeps the slow ones"
    mine[at] = mine[at] * (1 + 1e-7)
    mistakes.suspects.clear()
    assert mistakes.diagnose(mine, request, directory, at, names) == ""
    mine = {**wrong_answer(what, "v3_yarn", "float64")}
    assert mistakes.diagnose(mine, request, directory, at, names) == f"; as if {what}"
    mine["model.norm"] = mine["model.norm"] + 1
    assert mistakes.diagnose(mine, request, directory, at, names) == f"; as if {what}, though not from model.norm on"
    mine["model.layers.0.self_attn.k_rope"] = mine["model.layers.0.self_attn.k_rope"] + 1
    hint = mistakes.diagnose(mine, request, directory, at, names)
    assert hint == f"; as if {what}, though not from model.layers.0.self_attn.k_rope on"


def test_a_part_of_a_generation_names_nothing(monkeypatch):
    what, (directory, request) = "all drafts are accepted", files("generate_mtp", "float64")
    mine, names = wrong_answer(what, "generate_mtp", "float64"), INDEX["generate_mtp"]["arrays"]
    monkeypatch.setattr(mistakes, "suspects", {what: None})
    monkeypatch.setattr(mistakes, "in_vain", [""] * 5)  # so that no other is tried
    assert what in mistakes.diagnose(mine, request, directory, "0/tokens", names)
    other = mine | {"0/drafts": mine["0/drafts"][:-1]}
    assert mistakes.diagnose(other, request, directory, "0/tokens", names) == ""


# ---- Ports that fail -----------------------------------------------------------------------------------------------

HEADER = ("import json, os, pathlib, struct, sys, time\n"
          "d = pathlib.Path(sys.argv[1]); answer = d / 'answer.safetensors'\n")  # fmt: skip
WRITE = HEADER + '''
def write(arrays):
    header, data = {}, b""
    for name, (kind, shape, raw) in arrays.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    answer.write_bytes(len(text).to_bytes(8, "little") + text + data)
'''
FAULTS = {  # a port in a few lines -> what the line must say
    "crash": (HEADER + "1 / 0", "exit code 1: Traceback (most recent call last): ... ZeroDivisionError"),
    "silent": (HEADER + "sys.exit(7)", "exit code 7: it says nothing"),
    "no answer": (HEADER, "wrote no answer"),
    "hang": (HEADER + "time.sleep(60)", "no answer after 1 s"),
    "nonsense": (HEADER + "answer.write_bytes(b'nonsense' * 9)", "not a whole"),
    "half a file": (WRITE + "write({'lm_head': ('F64', [1, 48], b'0' * 384)})\n"
                            "answer.write_bytes(answer.read_bytes()[:-99])", "not a whole"),
    "10 GB": (WRITE + "write({'lm_head': ('F64', [14, 10**9], b'')})", "not a whole"),
    "another shape": (WRITE + "write({'lm_head': ('F64', [2, 48], bytes(768))})", "shape is [2, 48]"),
    "not finite": (WRITE + "write({'lm_head': ('F64', [1, 48], struct.pack('d', float('nan')) * 48)})", "not finite"),
    "10 GB that are there": (WRITE + "write({'lm_head': ('F64', [14, 10**8], b'')})\n"
        "data = answer.read_bytes().replace(b'[0, 0]', b'[0, %d]' % (14 * 8 * 10**8)); n = len(data) - 8\n"
        "answer.write_bytes(n.to_bytes(8, 'little') + data[8:]); os.truncate(answer, 8 + n + 14 * 8 * 10**8)",
        "shape is [14, 100000000]"),
    "an entry as a list": (HEADER + "text = json.dumps({'lm_head': ['F64', [1, 48], [0, 384]]}).encode()\n"
        "answer.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(384))", "lm_head is ['F64'"),
    "a name of two lines": (WRITE + "write({'lm\\nhead': ('F64', [1, 48], bytes(384))})", "lm?head, for lm_head?"),
    "no checkpoint any more": (WRITE + "(d / 'model.safetensors').unlink()\n"
                                       "write({'lm_head': ('F64', [1, 48], bytes(384))})", "departs at lm_head"),
    "ended by a signal": (HEADER + "os.kill(os.getpid(), 9)", "was ended by SIGKILL: it says nothing"),
    "two lines": (HEADER + "print('what\\nis\\nit', file=sys.stderr); sys.exit(1)", "code 1: what ... it"),
    "a child that stays": (HEADER + "import subprocess; subprocess.Popen(['sleep', '99']); sys.exit(7)", "code 7"),
    "another precision": (WRITE + "write({'lm_head': ('F16', [1, 48], bytes(96))})", "answers in float16"),
    "another dtype": (WRITE + "write({'lm_head': ('C64', [1, 48], bytes(384))})", "C64"),
    "integers": (WRITE + "write({'lm_head': ('I64', [1, 48], bytes(384))})", "departs at lm_head"),
    "unknown names": (WRITE + "write({'logits': ('F64', [1, 48], bytes(384))})", "logits, for lm_head?"),
    "no last array": (WRITE + "write({'model.norm': ('F64', [1, 24], bytes(192))})", "model.norm"),
    "it lacks this": (HEADER + "print('no such thing', file=sys.stderr); sys.exit(3)", "skipped: no such thing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_port_that_fails_is_one_line(fault, tmp_path):
    program, word = FAULTS[fault]
    (tmp_path / "port.py").write_text(program)
    limit = 1 if fault == "hang" else 60
    code, lines = checked(f"{sys.executable} {tmp_path / 'port.py'}", "--case", "one_token", "--timeout", limit)
    assert len(lines) == 2 and word in lines[0], lines
    assert code == 1


def test_strict_fails_what_is_not_answered_whole(tmp_path):
    """A skipped case, an absent array; each in the report, too."""
    part = f"import sys; sys.path.insert(0, {str(HERE)!r}); import port, pathlib, safetensors.numpy as st\n"
    part += "d = pathlib.Path(sys.argv[1]); port.main(d); path = d / 'answer.safetensors'\n"
    part += "x = st.load_file(path); x.pop('model.norm'); st.save_file(x, path)\n"
    (tmp_path / "part.py").write_text(part)
    (tmp_path / "lacks.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "whole.py").write_text(part.splitlines()[0] + "\nport.main(pathlib.Path(sys.argv[1]))")
    for name, codes, word in (("whole", (0, 0), "1 agrees"), ("part", (0, 1), "21 of 22 arrays agree"),
                              ("lacks", (1, 1), "skipped")):  # fmt: skip
        for strict, code in zip(([], ["--strict"]), codes, strict=True):
            flags = ["--case", "one_token", "--junit", tmp_path / "report.xml", *strict]
            got, lines = checked(f"{sys.executable} {tmp_path / name}.py", *flags)
            assert got == code and word in " ".join(lines)
            suite = ElementTree.parse(tmp_path / "report.xml").getroot()
            assert suite.get("tests") == "1" and int(suite.get("failures")) == bool(strict and code)


def test_a_run_that_is_ended_leaves_its_report(monkeypatch, tmp_path):
    def run(command, directory, limit):
        if "mtp" in str(directory):
            raise KeyboardInterrupt
        raise check.Lacks("this")

    monkeypatch.setattr(check, "run", run)
    with pytest.raises(KeyboardInterrupt):
        checked("port", "--case", "one_token", "--case", "mtp", "--junit", tmp_path / "report.xml")
    assert ElementTree.parse(tmp_path / "report.xml").getroot().get("tests") == "1"


def test_the_kits_own_faults_end_no_run(monkeypatch, capsys):
    """A diagnosis that fails says so, and the verdict stands."""
    monkeypatch.setattr(mistakes, "diagnose", lambda *_: 1 / 0)
    program = WRITE + "write({'lm_head': ('F64', [1, 48], bytes(384))})"
    zeros = [sys.executable, "-c", program]
    monkeypatch.setattr(check, "run", lambda _, directory, __: subprocess.run([*zeros, directory], check=True))
    assert check.main(["port", "--case", "one_token"]) == 1
    out = capsys.readouterr().out
    assert "departs at lm_head" in out and "by a fault of the kit: ZeroDivisionError" in out


def test_request_that_cannot_be_used_is_one_line(tmp_path):
    for args in (["--case", "no_such_case"], [], ["x", "--keep", HERE], ["x", "--keep", __file__], ["'"], [" "]):
        code, lines = checked(*args)
        assert code == 2 and len(lines) == 1
    assert checked("no-such-program", "--case", "one_token")[1][0].endswith("No such file or directory")


def test_cases_and_components_add_up():
    code, lines = checked("--list", "--case", "one_token", "--component", "rope")
    ropes = [name for name, case in INDEX.items() if case.get("component") == "rope"]
    assert code == 0 and sorted(line.split()[0] for line in lines) == sorted(["one_token", *ropes]) != ["one_token"]


def test_keep_leaves_the_files(tmp_path):
    assert checked(f"{sys.executable} {HERE / 'port.py'}", "--case", "fp8_checkpoint", "--keep", tmp_path / "k")[0] == 0
    kept = tmp_path / "k" / "fp8_checkpoint"
    assert json.loads((kept / "request.json").read_text())["do"] == "trace" and (kept / "answer.safetensors").exists()


def test_keep_without_a_command_writes_the_files(tmp_path):
    code, lines = checked("--case", "mtp", "--case", "fp8", "--case", "router.small", "--keep", tmp_path)
    assert (code, lines[0].split(), lines[1].split()[0]) == (0, ["mtp"], "fp8")
    assert lines[2].split(maxsplit=1) == ["router.small", "x [14, 24]"]
    assert (tmp_path / "mtp" / "request.json").exists() and (tmp_path / "fp8" / "model.safetensors").exists()


def test_half_a_port_hears_what_is_right_so_far(tmp_path):
    """The embedding and layer 0 are there."""
    source = (HERE / "port.py").read_text().replace("sys.path.insert(0, str(Path(__file__).resolve().parents[2]))",
                                                    f"sys.path[:0] = {[str(HERE.parents[1]), str(HERE)]!r}")
    kept = "{k: v for k, v in arrays.items() if 'layers.0' in k or 'embed' in k}"
    source = source.replace("answer(directory, request))", f"(lambda arrays: {kept})(answer(directory, request)))")
    (tmp_path / "port.py").write_text(source)
    code, lines = checked(f"{sys.executable} {tmp_path / 'port.py'}", "--case", "v3_yarn")
    assert code == 1 and "9 of 35 arrays agree in float64; lacks 26, the first is model.layers.1.inp" in lines[0], lines


# ---- Two traces ----------------------------------------------------------------------------------------------------


def trace_of(name="v3_yarn"):
    return {array: EXPECTED[f"{name}/{array}"] for array in INDEX[name]["arrays"]}


def test_compare_says_which_rows(tmp_path):
    reference = trace_of()
    for rows, words in ((slice(5, None), "from token 5 on"), (slice(None, -1), "all but the last token"),
                        (slice(None), "every token"), (slice(3, 4), "token 3 alone")):  # fmt: skip
        mine = {name: x.copy() for name, x in reference.items()}
        mine["model.layers.1.self_attn"][rows] += 1
        assert words in compare.compare(mine, reference).text
    mine = {name: x for name, x in reference.items() if not name.endswith("mlp")}
    assert "lacks 3" in compare.compare(mine, reference).text


def test_compare_undoes_a_harmless_layout():
    reference, directory = trace_of(), files("v3_yarn", "float64")[0]
    mine = dict(reference)
    for name, x in reference.items():
        if name.endswith("_rope"):
            mine[name] = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    assert compare.compare(mine, reference, directory=directory).agrees
    mine["lm_head"] = mine["lm_head"] + 1
    assert compare.compare(mine, reference, directory=directory).at == "lm_head"


def test_compare_norms_a_latent_under_a_name_that_says_so():
    reference, directory, name = trace_of(), files("v3_yarn", "float64")[0], "model.layers.0.self_attn."
    weight = compare.numbers(compare.read_weights(directory)[f"{name}kv_a_layernorm.weight"])
    mine = dict(reference)
    latent = 0.5 * mine.pop(f"{name}kv_latent") / weight
    mine[f"{name}kv_a_proj_with_mqa"] = np.concatenate([latent, mine[f"{name}k_rope"]], axis=-1)
    half = {"8": 1e-4}  # eps is not the same for a latent that was made smaller
    verdict = compare.compare(mine, reference, half, directory)
    assert verdict.agrees and "was normed" in verdict.text
    mine[f"{name}kv_a_proj_with_mqa"] = mine[f"{name}kv_a_proj_with_mqa"] + 1
    assert compare.compare(mine, reference, half, directory).at == f"{name}kv_latent"


def test_compare_says_which_rows_of_the_batch():
    reference = trace_of("ragged")
    mine = dict(reference)
    for n in (1, 2):
        mine[f"{n}/model.norm"] = mine[f"{n}/model.norm"] + 1
    verdict = compare.compare(mine, reference)
    assert verdict.at == "1/model.norm" and "rows 1 and 2 of the batch, every token" in verdict.text


@pytest.mark.parametrize("name", ["v3_yarn", "k2_like"])
def test_experts_are_forgiven_only_where_rounding_may_decide(name):
    """Token 3's last expert gives way to the best that was not chosen of the groups that were."""
    reference, directory, config = trace_of(name), files(name, "float64")[0], INDEX[name]["config"]
    gate = next(array for array in reference if array.endswith("gate.indices")).removesuffix(".indices")
    scores, chosen = reference[f"{gate}.scores"].copy(), reference[f"{gate}.indices"].copy()
    bias = compare.read_weights(directory).get(f"{gate}.e_score_correction_bias", np.zeros(scores.shape[1]))
    group = np.arange(scores.shape[1]) * config.get("n_group", 1) // scores.shape[1]
    left = [e for e in range(scores.shape[1]) if e not in chosen[3] and group[e] in group[chosen[3]]]
    last = min(chosen[3], key=lambda e: scores[3, e] + bias[e])
    new = max(left, key=lambda e: scores[3, e] + bias[e])
    mine = {array: np.float32(x) if x.dtype.kind == "f" else x for array, x in reference.items()}
    chosen[3, chosen[3] == last] = new
    mine[f"{gate}.indices"] = chosen
    far = compare.compare(mine, reference, directory=directory)
    assert far.at == f"{gate}.indices" and "token 3 alone: other experts" in far.text
    for gap, agrees in ((0, False), (1e-2, False), (1e-6, True)):
        scores[3, new] = scores[3, last] + bias[last] - bias[new] - gap
        mine[f"{gate}.scores"], near = np.float32(scores), reference | {f"{gate}.scores": scores}
        assert compare.compare(mine, near, directory=directory).agrees == agrees
    for token, agrees in ((3, True), (2, False)):  # tokens after the other experts are not compared
        mine["lm_head"] = np.float32(reference["lm_head"] + (np.arange(14) >= token)[:, None])
        assert compare.compare(mine, near, directory=directory).agrees == agrees


def test_compare_takes_the_tolerance_of_the_coarsest_dtype():
    reference = trace_of()
    half = {name: x.astype(np.float16) if x.dtype.kind == "f" else x for name, x in reference.items()}
    assert compare.compare(half, reference).agrees
    mixed = half | {"lm_head": half["lm_head"].astype(np.float64)}
    assert compare.compare(mixed, reference).agrees
    assert not compare.compare({name: x.astype(np.float64) for name, x in half.items()}, reference).agrees
    rms = np.sqrt(np.mean(reference["lm_head"] ** 2))
    for noise, agrees in ((0.1, True), (0.5, False)):  # bfloat16's own tolerance is 8 times that of float16
        x = cases.bf16(reference["lm_head"] + noise * rms).view("V2")
        assert compare.compare(reference | {"lm_head": x}, reference).agrees == agrees


def test_compare_is_a_program(tmp_path, capsys):
    from safetensors.numpy import save_file

    right, wrong, broken = (str(tmp_path / f"{name}.safetensors") for name in ("right", "wrong", "broken"))
    reference = trace_of()
    save_file(reference, right)
    save_file(reference | {"lm_head": reference["lm_head"] + 1}, wrong)
    Path(broken).write_bytes(b"PK\3\4 no")
    assert [compare.main([mine, right]) for mine in (right, wrong, broken)] == [0, 1, 2]
    assert len(capsys.readouterr().err.splitlines()) == 1
