"""Run a port in any language against every case of the conformance kit.

    python weights/vectors/check.py "node weights/vectors/port.mjs"

The command is called with a directory that holds a checkpoint and request.json, and writes answer.safetensors there
(README.md beside this file says what). One line per case: it agrees, or partly, if arrays are absent; or the first
array that departs, by how much, in which rows, and the mistake if it is a known one; or it is skipped, as the port says
that it lacks something (exit code 3). Exit codes: 0 none departs, 1 some do or none agrees, 2 it could not be checked.
For CI: --strict, by which whatever does not agree in all arrays departs, and --junit FILE.
"""

import argparse
import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import cases
import compare
import numpy as np

HALF = "float16", "bfloat16"


class Failed(Exception):
    """The port has no answer that could be compared. The message is one line."""


class Lacks(Exception):
    """The port says that it lacks what the case asks for."""


def said(file):
    """The first line and the last of what a port wrote, which may be long; its error stands in one of them."""
    ends = []
    for start in (0, max(0, file.seek(0, os.SEEK_END) - 2**16)):
        file.seek(start)
        ends.append([line.strip() for line in file.read(2**16).decode("utf-8", "replace").splitlines() if line.strip()])
    if not all(ends):
        return "it says nothing"
    return " ... ".join(line[:160] for line in dict.fromkeys([ends[0][0], ends[1][-1]]))


def run(command, directory, limit):
    """Call the port; Failed or Lacks unless it says that it is done."""
    with tempfile.TemporaryFile() as errors:  # no pipe, which a child of the port could keep open
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
        try:
            port = subprocess.Popen([*command, str(directory)], **quiet, start_new_session=True)
        except OSError as e:
            raise Failed(f"cannot be run: {e.strerror}") from None
        try:
            code = port.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"has no answer after {limit:g} s (--timeout)") from None
        finally:  # interrupted, too; and what the port left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(port.pid, signal.SIGKILL)
            port.wait()
        if code == 3:
            raise Lacks(said(errors))
        if code < 0:
            raise Failed(f"was ended by {signal.Signals(-code).name}: {said(errors)}")
        if code:
            raise Failed(f"ended with exit code {code}: {said(errors)}")


def prepare(name, case, expected, directory, dtype):
    """Write the case's files -> the request."""
    directory.mkdir(parents=True)
    if "given" in case:
        cases.write_given({key: expected[f"{name}/given/{key}"] for key in case["given"]}, directory)
    else:
        cases.write(case, directory)
    return cases.write_request(case, directory, dtype)


def judge(name, case, expected, answer, directory, request):
    """The verdict on an answer; the directory holds the case as it was asked, not as the port left it."""
    if not answer.is_file():
        raise Failed("wrote no answer.safetensors")
    reference = {array: expected[f"{name}/{array}"] for array in case["arrays"]}
    try:
        mine = compare.read_trace(answer)
    except compare.Unreadable as e:
        raise Failed(str(e).replace(f"{answer.parent}{os.sep}", "")) from None
    coarsest = compare.precision([x for array, x in mine.items() if array in reference])
    unasked = coarsest in HALF and request["dtype"] not in HALF
    if unasked or compare.allowed(coarsest, case["tolerance"]) is None:
        raise Failed(f"answers in {coarsest}, in which it cannot be judged: it was asked for {request['dtype']}")
    traced = case["do"] == "trace"
    needed = None if traced else [array for array in reference if array not in case.get("optional", [])]
    tolerance = tolerance_of(case, request["dtype"])
    if case["do"] == "component":
        verdict = judge_component(case, reference, mine, request["dtype"], needed)
    else:
        verdict = compare.compare(mine, reference, tolerance, directory if traced else None, needed)
    if verdict.agrees or verdict.at not in mine:
        return verdict
    right = case.get("shapes", {}).get(verdict.at, reference[verdict.at].shape)
    if mine[verdict.at].size != math.prod(right):
        return verdict
    try:
        sys.path.append(str(cases.HERE.parents[1] / ".ci" / "vectors"))
        from mistakes import diagnose
    except ImportError:  # in a copy of this folder alone mistakes have no names
        return verdict
    try:
        if not directory.exists():
            prepare(name, case, expected, directory, request["dtype"])
        hint = diagnose(mine, request, directory, verdict.at, list(reference), tolerance)
    except Exception as e:  # the verdict stands whatever becomes of its name
        hint = f"; no mistake was looked for, by a fault of the kit: {e!r:.160}"
    return verdict._replace(text=verdict.text + hint)


def tolerance_of(case, dtype):
    """A component is perhaps computed in half precision though the answer is of float32."""
    half = compare.allowed(dtype, case["tolerance"]) if case["do"] == "component" and dtype in HALF else None
    return case["tolerance"] | ({"8": half, "4": half} if half is not None else {})


def judge_component(case, reference, mine, dtype, needed):
    """The rows of an answer that the reference is a sample of, judged. dtype: in which it was to be computed."""
    mine = dict(mine)
    for array, shape in case["shapes"].items():
        if array in mine and list(mine[array].shape) != shape:
            text = f"departs at {array}: its shape is {list(mine[array].shape)} instead of {shape}"
            return compare.Verdict(False, text, array)
        if array in mine and array in case.get("sample", {}):
            mine[array] = mine[array].reshape(-1, shape[-1])[case["sample"][array]]
    verdict = compare.compare(mine, reference, tolerance_of(case, dtype), None, needed)
    text, shape = verdict.text, case["shapes"].get(verdict.at)
    if verdict.at in case.get("sample", {}):  # whose rows are those of all axes but the last
        rows = np.transpose(np.unravel_index(case["sample"][verdict.at], shape[:-1])).tolist()
        text = text.replace("token", "sampled row")
        text += "" if "every" in text else f"; sampled are {str(rows)[1:-1]} of {shape}"
    return verdict._replace(text=text.replace("element", "head") if verdict.at == "lse" else text)


def check(name, case, expected, command, args, base):
    """-> "agrees", "partly", "departs" or "skipped", and the line that says it."""
    directory = base / name
    request = prepare(name, case, expected, directory, args.dtype)
    try:
        run(command, directory, args.timeout)
        with tempfile.TemporaryDirectory() as own:
            if case["do"] != "component":  # of which only a diagnosis reads the files
                prepare(name, case, expected, Path(own, name), args.dtype)
            answer = directory / "answer.safetensors"
            verdict = judge(name, case, expected, answer, Path(own, name), request)
    except Failed as failure:
        return "departs", f"{failure}"
    except Lacks as lack:
        return "skipped", f"skipped: {lack}"
    if not verdict.agrees:
        return "departs", verdict.text
    return ("agrees" if verdict.at is None else "partly"), verdict.text


def main(argv=None):
    parser = argparse.ArgumentParser(description="Run a port in any language against every case.")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="how the port is called, without the directory")
    parser.add_argument("--case", action="append", metavar="NAME", help="this case; repeatable")
    parser.add_argument("--component", action="append", metavar="NAME", help="a component's cases; repeatable")
    parser.add_argument("--dtype", choices=["float64", "float32", "float16", "bfloat16"], default="float64",
                        help="to ask for (float64); half precision is meant for components")
    parser.add_argument("--timeout", type=int, default=60, metavar="S", help="seconds that a case may take (60)")
    parser.add_argument("--strict", action="store_true", help="skipped cases and absent arrays depart, too")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML, too")
    parser.add_argument("--keep", type=Path, metavar="DIR",
                        help="leave the cases' files there, a directory each; without COMMAND only these")
    parser.add_argument("--list", action="store_true", help="say what the cases are")
    args, index = parser.parse_args(argv), cases.read_index()
    if not 0 < args.timeout < 10**6:
        parser.error(f"--timeout must be from 1 to 999999 seconds, not {args.timeout}")
    named, components = args.case or [], args.component or []
    chosen = [name for name, case in index.items()
              if name in named or case.get("component") in components or not named + components]  # fmt: skip
    unknown = [name for name in named if name not in index]
    unknown += set(components) - {case.get("component") for case in index.values()}
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
    expected, counts = cases.read_expected(), dict.fromkeys(["agrees", "partly", "departs", "skipped"], 0)
    suite = ElementTree.Element("testsuite", name="DeepSeek-V3")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for name, case in chosen.items():
                if not command:
                    prepare(name, case, expected, args.keep / name, args.dtype)
                    inputs = args.keep / name / "inputs.safetensors"
                    shapes = compare.read_trace(inputs).items() if inputs.exists() else ()
                    print(f"{name:24}", *(f"{key} {list(x.shape)}" for key, x in shapes))
                    continue
                outcome, line = check(name, case, expected, command, args, args.keep or Path(scratch))
                outcome = "departs" if args.strict and outcome != "agrees" else outcome
                line = "".join(c if c.isprintable() else "?" for c in line)
                counts[outcome] += 1
                print(f"{name:24} {line}", flush=True)
                entry = ElementTree.SubElement(suite, "testcase", name=name, classname=case["do"])
                if outcome in ("departs", "skipped"):
                    verdict = "failure" if outcome == "departs" else "skipped"
                    ElementTree.SubElement(entry, verdict, message=line)
    finally:  # of a run that was ended, too
        if args.junit:
            suite.set("tests", str(len(suite)))
            suite.set("failures", str(counts["departs"]))
            suite.set("skipped", str(counts["skipped"]))
            ElementTree.ElementTree(suite).write(args.junit, encoding="utf-8", xml_declaration=True)
    if command:
        print(", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n or outcome != "partly"))
    return 1 if counts["departs"] or (command and not counts["agrees"] + counts["partly"]) else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the port, too
    try:
        sys.exit(main())
    except OSError as e:  # the kit's own files, or no room for a case's; not the port's fault
        if isinstance(e, BrokenPipeError):  # the reader has gone, as in `| head`
            os._exit(130)
        print(f"check.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        os._exit(130)
