"""Run a port in any language against every case of the conformance kit.

    python weights/vectors/check.py "node weights/vectors/port.mjs"
    python weights/vectors/check.py "python weights/vectors/port.py" --case mtp --case chunks --keep somewhere

The command is called with a directory that holds a checkpoint and request.json, and writes answer.safetensors there
(README.md beside this file says what). One line per case: it agrees; or the first array that departs, by how much, in
which rows, and the mistake if it is a known one; or it is skipped, as the port says that it lacks something (exit code
3). Exit codes: 0 none departs, 1 some do or none agrees, 2 the request cannot be used.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import cases
import compare


class Failed(Exception):
    """The port has no answer that could be compared. The message is one line."""


class Lacks(Exception):
    """The port says that it lacks what the case asks for."""


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "it says nothing"


def run(command, directory, limit):
    """Call the port; Failed or Lacks unless it says that it is done."""
    try:
        port = subprocess.Popen([*command, str(directory)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    except OSError as e:
        raise Failed(f"cannot be run: {e.strerror}") from None
    try:
        said = port.communicate(timeout=limit)[1].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        raise Failed(f"has no answer after {limit:g} s (--timeout)") from None
    finally:
        if port.poll() is None:  # interrupted, too
            os.killpg(port.pid, signal.SIGKILL)
            port.wait()
        port.stderr.close()
    if port.returncode == 3:
        raise Lacks(last_line(said))
    if port.returncode:
        raise Failed(f"ended with exit code {port.returncode}: {last_line(said)}")


def prepare(name, case, expected, directory, dtype):
    """Write the case's files -> the request."""
    directory.mkdir(parents=True)
    if "given" in case:
        cases.write_given({key: expected[f"{name}/given/{key}"] for key in case["given"]}, directory)
    else:
        cases.write(case, directory)
    return cases.write_request(case, directory, dtype)


def judge(name, case, expected, directory, request):
    """The verdict on the answer that lies in the directory."""
    path = directory / "answer.safetensors"
    if not path.is_file():
        raise Failed("wrote no answer.safetensors")
    reference = {array: expected[f"{name}/{array}"] for array in case["arrays"]}
    try:
        mine = compare.read_trace(path)
    except compare.Unreadable as e:
        raise Failed(str(e).replace(f"{directory}{os.sep}", "")) from None
    coarsest = compare.precision([x for array, x in mine.items() if array in reference])
    if compare.allowed(coarsest, case["tolerance"]) is None:
        raise Lacks(f"this case cannot be judged in {coarsest}")
    traced = case["do"] == "trace"
    needed = None if traced else [array for array in reference if array not in case.get("optional", [])]
    if case["do"] == "component":
        return judge_component(case, reference, mine, request["dtype"], needed)
    try:
        verdict = compare.compare(mine, reference, case["tolerance"], directory if traced else None, needed)
    except (OSError, ValueError) as e:
        raise Failed(f"left a checkpoint that cannot be read: {e}".replace(f"{directory}{os.sep}", "")) from None
    if verdict.agrees or verdict.at not in mine:
        return verdict
    try:
        from mistakes import diagnose
    except ImportError:  # without deepseek_v3.py, which makes the mistakes, they have no names
        return verdict
    hint = diagnose(mine, request, directory, verdict.at, list(reference), case["tolerance"])
    return verdict._replace(text=verdict.text + hint)


def judge_component(case, reference, mine, dtype, needed):
    """The rows of an answer that the reference is a sample of, judged. dtype: in which it was computed, perhaps in
    half precision though the answer is of float32."""
    mine, tolerance = dict(mine), case["tolerance"]
    for array, shape in case["shapes"].items():
        if array in mine and list(mine[array].shape) != shape:
            text = f"departs at {array}: its shape is {list(mine[array].shape)} instead of {shape}"
            return compare.Verdict(False, text, array)
        if array in mine and array in case.get("sample", {}):
            mine[array] = mine[array].reshape(-1, shape[-1])[case["sample"][array]]
    if dtype in ("float16", "bfloat16"):
        half = compare.allowed(dtype, tolerance)
        tolerance = {"8": half, "4": half, "2": tolerance["2"]}
    return compare.compare(mine, reference, tolerance, None, needed)


def check(name, case, expected, command, args, base):
    """-> "agrees", "departs" or "skipped", and the line that says it."""
    directory = base / name
    try:
        request = prepare(name, case, expected, directory, args.dtype)
        run(command, directory, args.timeout)
        verdict = judge(name, case, expected, directory, request)
    except Failed as failure:
        return "departs", f"{failure}"
    except Lacks as lack:
        return "skipped", f"skipped: {lack}"
    except OSError as e:  # no room, or the shipped checkpoint is not there
        return "skipped", f"skipped: its files cannot be written: {e}"
    return ("agrees" if verdict.agrees else "departs"), verdict.text


def main(argv=None):
    parser = argparse.ArgumentParser(description="Run a port in any language against every case.")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="how the port is called, without the directory")
    parser.add_argument("--case", action="append", metavar="NAME", help="this case only; repeatable")
    parser.add_argument("--component", action="append", metavar="NAME", help="a component's cases only; repeatable")
    parser.add_argument("--dtype", choices=["float64", "float32", "float16", "bfloat16"], default="float64", help="to ask for (float64); components in half precision too")
    parser.add_argument("--timeout", type=int, default=60, metavar="S", help="seconds that a case may take (60)")
    parser.add_argument("--keep", type=Path, metavar="DIR",
                        help="leave the cases' files there, a directory each; without COMMAND only these")
    parser.add_argument("--list", action="store_true", help="say what the cases are")
    args, index = parser.parse_args(argv), cases.read_index()
    chosen = args.case or [name for name, case in index.items()
                           if not args.component or case.get("component") in args.component]  # fmt: skip
    unknown = [name for name in chosen if name not in index]
    unknown += set(args.component or []) - {case.get("component") for case in index.values()}
    if unknown or not (args.command or args.list or args.keep):
        print(f"no case {unknown[0]!r}; --list names them" if unknown else "COMMAND is missing", file=sys.stderr)
        return 2
    if args.list:
        print(*(f"{name:24} {index[name]['equation']:20} {index[name]['why']}" for name in chosen), sep="\n")
        return 0
    try:
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            if any(args.keep.iterdir()):
                raise OSError(f"{args.keep} is not empty")
        command = shlex.split(args.command or "")
        if not command and not args.keep:
            raise OSError("COMMAND is empty")
    except (OSError, ValueError) as e:
        print(e, file=sys.stderr)
        return 2
    return check_all({name: index[name] for name in chosen}, command, args)


def check_all(chosen, command, args):
    """Check the chosen cases, or without a command leave their files alone -> the exit code."""
    expected, counts = cases.read_expected(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in chosen.items():
            if not command:
                prepare(name, case, expected, args.keep / name, args.dtype)
                continue
            outcome, line = check(name, case, expected, command, args, args.keep or Path(scratch))
            counts[outcome] = counts.get(outcome, 0) + 1
            print(f"{name:24} {''.join(c if c.isprintable() else '?' for c in line)}", flush=True)
    if command:
        print(", ".join(f"{counts.get(outcome, 0)} {outcome}" for outcome in ("agrees", "departs", "skipped")))
    return 1 if counts.get("departs") or (command and not counts.get("agrees")) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):  # the reader has gone, as in `| head`
        os._exit(130)
