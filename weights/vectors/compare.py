"""Compare two traces, .safetensors: the first array that departs, by how much, in which rows.

    python weights/vectors/compare.py MINE REFERENCE
    python weights/vectors/compare.py MINE REFERENCE --weights DIRECTORY --tokens "3 14 15"

With the checkpoint, experts are forgiven whose biased affinities are nearly equal; with the prompt too (--tokens, once
for each), the mistake is named if it is one of those in mistakes.py. Exit codes: 0 they agree, 1 not, 2 unreadable.
"""

import argparse
import difflib
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors

# How far an array may be from the reference, by its rms, for the coarsest floating-point numbers in either trace.
TOLERANCE = {"8": 1e-9, "4": 2e-4, "2": 0.05}
BF16 = np.dtype("V2")  # NumPy has no bfloat16
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": BF16, "F8_E4M3": "|u1", "I64": "<i8", "I32": "<i4",
         "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}  # fmt: skip
PARTS = ["eh_proj", "input_layernorm", "self_attn.q_rope", "self_attn.kv_latent", "self_attn.k_rope", "self_attn",
         "post_attention_layernorm", "mlp.gate.scores", "mlp.gate.indices", "mlp.gate.weights", "mlp.shared_experts",
         "mlp", "", "shared_head"]  # of a layer, in the order of computation; fmt: skip
NAMES = re.compile(r"model\.embed_tokens|model\.norm|lm_head|model\.layers\.(\d+)\.?(.*)")


class Unreadable(ValueError):
    """A trace that cannot be read. The message is one line."""


# ---- Traces --------------------------------------------------------------------------------------------------------


def read_trace(path):
    """A file's arrays, {name: array}, which stay on disk until they are used."""
    try:
        return read_safetensors(path)
    except OSError as e:
        raise Unreadable(f"{path}: {e.strerror or e}") from None


def read_safetensors(path):
    """The library says whether the header fits the file; its NumPy side has no bfloat16, so the bytes are read here."""
    try:
        safetensors.safe_open(path, "np")
    except safetensors.SafetensorError as e:
        raise Unreadable(f"{path} is not a whole .safetensors file: {str(e).splitlines()[0]:.120}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry["dtype"] not in KINDS:
            raise Unreadable(f"{path}: {name:.99} is {entry!s:.99}, its dtype none of {', '.join(KINDS)}")
        kind, shape, start = KINDS[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        try:
            empty = math.prod(shape) == 0  # there is nothing to map
            arrays[name] = np.zeros(shape, kind) if empty else np.memmap(path, kind, "r", start, shape)
        except ValueError as e:  # a shape that NumPy cannot have
            raise Unreadable(f"{path}: {name:.99} has shape {shape!s:.99}: {e}") from None
    return arrays


def read_weights(directory):
    """A checkpoint's tensors, {name: array}; FP8 as codes."""
    index = Path(directory) / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {"": "model.safetensors"}
    files = sorted(set(weight_map.values()))
    return {name: x for file in files for name, x in read_trace(index.with_name(file)).items()}


def numbers(x):
    """An array of real numbers in float64, one number as an array of one; Unreadable if it holds something else."""
    x = np.atleast_1d(x)
    if x.dtype == BF16:
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if x.dtype.kind not in "biuf":
        raise Unreadable(f"no real numbers but {x.dtype}")
    return x.astype(np.float64)


def precision(arrays):
    """The coarsest floating-point dtype of some arrays: "bfloat16", "float16", "float32", "float64" or None."""
    found = ["bfloat16" if x.dtype == BF16 else x.dtype.name for x in arrays if x.dtype == BF16 or x.dtype.kind == "f"]
    return next((name for name in ("bfloat16", "float16", "float32") if name in found), "float64" if found else None)


def allowed(dtype, tolerance=TOLERANCE):
    """The tolerance for a dtype, None if there is none for it. bfloat16 has 3 bits less than float16."""
    if dtype == "bfloat16":
        return 8 * tolerance["2"] if "2" in tolerance else None
    return tolerance.get({"float16": "2", "float32": "4"}.get(dtype, "8"))


def split(name):
    """"1/model.norm" -> ("1/", "model.norm"): the row of the batch, if it is said, and the rest."""
    row, slash, rest = name.partition("/")
    return (row + slash, rest) if slash and row.isdecimal() else ("", name)


def in_order(names):
    """Names of a trace in the order of computation: the MTP modules' layers come after lm_head."""
    found = {name: NAMES.fullmatch(split(name)[1]) for name in names}
    mtp = {m[1] for m in found.values() if m and m[2] in ("eh_proj", "shared_head")}

    def key(name):
        m, rest = found[name], split(name)[1]
        if not m or not m[1]:
            return ["model.embed_tokens", "", "model.norm", "lm_head"].index(rest) if m else 9, 0, 0
        return 4 if m[1] in mtp else 1, int(m[1]), PARTS.index(m[2]) if m[2] in PARTS else 99

    return sorted(names, key=key)


# ---- One array -----------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """How an array departs: where in it (True), and how, in words."""

    bad: np.ndarray | None
    text: str


def which(bad, noun):
    """True entries in words: "every token", "from token 5 on", "all but the last token"."""
    n, at = len(bad), np.flatnonzero(bad)
    if len(at) == n:
        return f"every {noun}" if n > 1 else ""
    if len(at) == 1:
        return f"{noun} {at[0]} alone"
    if len(at) == at[-1] - at[0] + 1:  # without a gap
        if at[-1] == n - 1:
            return f"from {noun} {at[0]} on"
        return f"all but the last {noun}" if len(at) == n - 1 else f"{noun}s {at[0]} to {at[-1]}"
    more = f" and {len(at) - 6} more" if len(at) > 7 else ""
    return f"{noun}s {', '.join(map(str, at[: 6 if more else 7]))}{more}"


def places(bad):
    """Which tokens, and if it is not all of them which heads and elements."""
    found = []
    for axis, noun in enumerate(("token", "head", "element") if bad.ndim == 3 else ("token", "element")[: bad.ndim]):
        along = bad.any(tuple(i for i in range(bad.ndim) if i != axis))
        if axis == 0 or not along.all():
            found.append(which(along, noun))
    return ", ".join(words for words in found if words and not ("element" in words and "more" in words))


def differ(mine, want, limit):
    """Where two arrays of numbers differ by more than limit times the second one's rms -> a Difference or None. NaN
    where a NaN belongs is right."""
    rms = math.sqrt(np.mean(np.square(want[np.isfinite(want)]))) if np.isfinite(want).any() else 0.0
    with np.errstate(invalid="ignore"):
        error = np.abs(mine - want)
    error[np.isnan(mine) & np.isnan(want) | (mine == want)] = 0
    bad = ~(error <= limit * rms)
    if not bad.any():
        return None
    lost = ~np.isfinite(mine) & np.isfinite(want)
    if lost.any():
        return Difference(lost, "is not finite")
    if not np.isfinite(error[bad]).any():
        return Difference(bad, "is a number where none belongs")
    largest = float(np.nanmax(error, initial=0))
    text = f"by up to {largest / rms:.2g} of its rms" if rms else f"by up to {largest:.2g}, where it is 0"
    if limit < 1e-8 and largest < 5e-7 * rms:
        text += ", as much as float32 rounds"
    return Difference(bad, text)


def differ_in_list(mine, want):
    """For tokens, drafts and acceptances: the first entry that differs, or another length."""
    n = min(mine.size, want.size)
    at = np.flatnonzero(mine[:n] != want[:n])
    if at.size:
        return Difference(None, f"entry {at[0]} is {mine[at[0]]:.12g} instead of {want[at[0]]:.12g}")
    return Difference(None, f"has {mine.size} entries instead of {want.size}") if mine.size != want.size else None


def differ_in_experts(mine, want):
    """Chosen experts are compared as sets."""
    bad = (np.sort(mine) != np.sort(want)).any(-1)
    if not bad.any():
        return None
    t = int(np.flatnonzero(bad)[0])
    return Difference(bad, f"other experts, for token {t} {experts(mine[t])} instead of {experts(want[t])}")


def experts(chosen):
    return "{" + ", ".join(f"{e:.12g}" for e in np.sort(chosen)) + "}"


def by_expert(gates, chosen):
    """Gates in the order of the experts, where it is known who they are."""
    return np.sort(gates) if chosen is None else np.take_along_axis(gates, np.argsort(chosen, axis=-1), -1)


# ---- Two traces ----------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    agrees: bool
    text: str
    at: str | None = None  # the first array that departs, or is absent


class Comparison:
    """mine against reference, {name: array} in the order of computation. directory: of the checkpoint, if it is known.
    needed: the names that must be there; by default the last of each row of the batch."""

    def __init__(self, mine, reference, tolerance=TOLERANCE, directory=None, needed=None):
        self.mine, self.reference, self.notes = dict(mine), reference, []
        seen, self.limits = [], {}
        for name, want in reference.items():  # rounding goes on: an array is judged as the coarsest up to it
            seen += [want, mine[name]] if name in mine else [want]
            self.limits[name] = allowed(precision(seen), tolerance)
        self.dtype = precision(seen)
        self.weights, self.config = {}, None
        if directory and (Path(directory) / "config.json").exists():
            self.weights = read_weights(directory)
            self.config = json.loads((Path(directory) / "config.json").read_text())
        rows = {row: base for row, base in map(split, reference)}  # its last array
        self.needed = [row + base for row, base in rows.items()] if needed is None else needed
        self.known = {}  # row of the batch -> how many of its tokens have the same experts so far

    def verdict(self):
        """The first array that departs; if there is none, what is missing."""
        bases = list(dict.fromkeys(split(name)[1] for name in self.reference))
        common = [name for name in self.reference if name in self.mine]
        if not common:
            first = next(iter(self.reference))
            return Verdict(False, f"has none of the {len(self.reference)} arrays{self.strangers()}", first)
        self.latents_before_their_norm()
        for base in bases:
            of_base = [name for name in self.reference if split(name)[1] == base]
            found = {name: d for name in of_base if name in self.mine and (d := self.compare_array(name))}
            if found:
                name, d = next(iter(found.items()))
                return Verdict(False, f"departs at {name}{self.where(of_base, found)}: {d.text}{self.said()}", name)
        return self.complete(common)

    def complete(self, common):
        missing = [name for name in self.reference if name not in self.mine]
        lacks = f"; lacks {len(missing)}, the first is {missing[0]}" if missing else ""
        dtype = f" in {self.dtype}" if self.dtype else ""
        right = f"{len(common)} of {len(self.reference)} arrays agree{dtype}{lacks}{self.strangers()}{self.said()}"
        gone = [name for name in self.needed if name not in self.mine]
        if gone:
            return Verdict(False, f"lacks {gone[-1]}, which must be there; {right}", missing[0])
        return Verdict(True, right, missing[0] if missing else None)

    def where(self, of_base, found):
        """Which rows of the batch, which tokens."""
        text = "" if next(iter(found.values())).bad is None else places(next(iter(found.values())).bad)
        if len(of_base) > 1:
            rows = [split(name)[0][:-1] for name in found]
            some = f"row{'s' * (len(rows) > 1)} {' and '.join(rows)}"
            text = ", ".join(filter(None, [f"{'every row' if len(rows) == len(of_base) else some} of the batch", text]))
        return f", {text}" if text else ""

    def said(self):
        return "".join(f" ({note})" for note in dict.fromkeys(self.notes))

    def strangers(self):
        """Names that no trace has, with those that may be meant."""
        real = [split(name)[1] for name in self.reference]
        strange = [name for name in self.mine if name not in self.reference and not NAMES.fullmatch(split(name)[1])]
        strange += [name for name in self.mine if (m := NAMES.fullmatch(split(name)[1])) and m[2] and m[2] not in PARTS]
        if not strange:
            return ""
        meant = difflib.get_close_matches(strange[0], real, 1) or ["lm_head"] * ("logit" in strange[0])
        hint = f", for {meant[0]}?" if meant else ""
        return f"; {len(strange)} unknown names, such as {strange[0]:.60}{hint}"

    def compare_array(self, name):
        """-> a Difference or None. Where experts were forgiven, later tokens are not compared any more."""
        row, base = split(name)
        shape, right = self.mine[name].shape or (1,), self.reference[name].shape or (1,)
        listed = base in ("tokens", "drafts", "accepted") and len(shape) == 1 and shape[0] < 10**6
        if shape != right and not listed:  # seen before it is read: it may be huge
            return Difference(None, f"its shape is {list(shape)} instead of {list(right)}")
        try:
            mine, want = numbers(self.mine[name]), numbers(self.reference[name])
        except Unreadable as e:
            return Difference(None, f"it holds {e}")
        if listed:
            return differ_in_list(mine, want)
        upto = self.known.get(row)
        mine, want = mine[:upto] if mine.ndim else mine, want[:upto] if want.ndim else want
        if base.endswith(".gate.indices") or base == "indices":  # of a trace, of a component
            return self.forgive(name, mine, want, differ_in_experts(mine, want))
        if base.endswith(".gate.weights") or base == "weights":
            mine, want = (by_expert(x, self.chosen(name, trace, x)) for x, trace in
                          ((mine, self.mine), (want, self.reference)))  # fmt: skip
        d = differ(mine, want, self.limits[name])
        if d and base.endswith("_rope"):
            halves = np.concatenate([want[..., 0::2], want[..., 1::2]], axis=-1)
            if differ(mine, halves, self.limits[name]) is None:
                self.notes.append("its rotated pairs stand as halves, as in HF: harmless if queries' and keys' both do")
                return None
        return d

    def chosen(self, name, trace, gates):
        """The experts of some gates, if the trace says them."""
        index = name.removesuffix("weights") + "indices"
        known = all(index in each and each[index].shape == trace[name].shape for each in (self.mine, self.reference))
        return numbers(trace[index])[: len(gates)] if known else None

    def forgive(self, name, mine, want, d):
        """Other experts count only if their biased affinities differ by more than the tolerance: not where rounding
        decides. An exact tie does count, since the lowest index is to win it."""
        gate, row = split(name)[1].removesuffix(".indices"), split(name)[0]
        scores = self.reference.get(f"{row}{gate}.scores")
        if d is None or d.bad is None or scores is None or self.config is None:
            return d
        scores = numbers(scores)
        bias = self.weights.get(f"{gate}.e_score_correction_bias")
        choice = scores if bias is None else scores + numbers(bias)
        room = self.limits[name] * math.sqrt(np.mean(np.square(scores)))
        near = [0 < self.gap(choice[t], set(mine[t]), set(want[t])) <= room for t in np.flatnonzero(d.bad)]
        if not all(near):
            return d
        self.known[row] = first = int(np.flatnonzero(d.bad)[0])
        self.notes.append(f"token {first} chose other experts of nearly equal affinity, so it and those "
                          "after it are not compared from there on")  # fmt: skip
        return None

    def gap(self, choice, mine, want):
        """How far from the threshold the experts are that only one of the two chose."""
        E, G = len(choice), self.config.get("n_group") or 1
        if not all(0 <= e < E for e in mine) or len(mine) < len(want):
            return math.inf
        gained, lost = [int(e) for e in mine - want], [int(e) for e in want - mine]
        if G > 1:
            group = np.sort(choice.reshape(G, -1))[:, -2:].sum(-1)
            kept = np.argsort(-group, kind="stable")[: self.config["topk_group"]]
            other = [group[kept[-1]] - group[e * G // E] for e in gained if e * G // E not in kept]
            if other:
                return max(other)
        return max(choice[lost]) - min(choice[gained])

    def latents_before_their_norm(self):
        """kv_a_proj_with_mqa is c_KV before its norm, and k_R before its rotation: with the norm's weight it is as good
        as kv_latent."""
        for name in [name for name in self.mine if name.endswith(".self_attn.kv_a_proj_with_mqa")]:
            latent = name.removesuffix("kv_a_proj_with_mqa") + "kv_latent"
            weight = self.weights.get(split(name)[1].removesuffix("kv_a_proj_with_mqa") + "kv_a_layernorm.weight")
            if weight is None or latent in self.mine or latent not in self.reference:
                continue
            x = numbers(self.mine.pop(name))[..., : len(weight)]
            rms = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)
            self.mine[latent] = x / rms * numbers(weight)
            self.notes.append("kv_a_proj_with_mqa was normed, to compare it as kv_latent")


def compare(mine, reference, tolerance=TOLERANCE, directory=None, needed=None):
    """-> Verdict"""
    return Comparison(mine, reference, tolerance, directory, needed).verdict()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compare two traces, .safetensors.")
    parser.add_argument("mine", metavar="MINE")
    parser.add_argument("reference", metavar="REFERENCE")
    parser.add_argument("--weights", metavar="DIRECTORY", help="the checkpoint")
    parser.add_argument("--tokens", action="append", metavar="IDS", help="the prompt's ids; once for each prompt")
    args = parser.parse_args(argv)
    try:
        mine, reference = read_trace(args.mine), read_trace(args.reference)
        reference = {name: reference[name] for name in in_order(reference)}
        prompts = [[int(token) for token in text.replace(",", " ").split()] for text in args.tokens or []]
        verdict = compare(mine, reference, directory=args.weights)
    except (OSError, ValueError) as e:  # Unreadable among them, or a config.json that is no JSON
        print(e, file=sys.stderr)
        return 2
    hint = ""
    if not verdict.agrees and verdict.at in mine and args.weights and prompts:
        sys.path.append(str(Path(__file__).resolve().parents[2] / ".ci" / "vectors"))
        from mistakes import diagnose

        depth = len({split(name)[1] for name in reference if name.endswith(".shared_head")})
        request = {"do": "trace", "dtype": "float64", "prompts": prompts, "chunks": None, "depth": depth}
        hint = diagnose(mine, request, args.weights, verdict.at, list(reference))
    print(f"{verdict.text}{hint}")
    return 0 if verdict.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
