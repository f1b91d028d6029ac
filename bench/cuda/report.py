"""Makes one table of what bench/cuda/run.sh measured, with what was asked and whether it was reached.

usage: report.py OUT"""

import json
import pathlib
import sys


class Results:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.rows = []
        self.failed = False

    def load(self, name):
        try:
            return json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None

    def row(self, what, least, seen, detail=""):
        """`least`: number to reach, or None where nothing was asked; `seen`: number, or None where it was not measured."""
        verdict = "not measured" if seen is None else "" if least is None else "reached" if seen >= least else "SHORT"
        self.rows.append((what, "" if least is None else f"{least:g}", "-" if seen is None else f"{seen:.3g}", verdict, detail))

    def check(self, what, good, detail=""):
        self.failed |= not good
        self.rows.append((what, "yes", "yes" if good else "NO", "" if good else "FAILED", detail))

    def print(self):
        table = [("what", "at least", "seen", "", "figures"), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        for row in table:
            print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]).rstrip())


def kernels(results, shape, kind):
    """Rates of `tersor kernels`, weights/s by kernel, and its read bandwidth in bytes/s. `kind`: entropy, and codec if it is not `rans`."""
    document = results.load(f"kernels-{shape}-{kind}")
    if document is None:
        return {}, None
    rates = {row["kernel"]: row["weights_per_second"] for row in document["rows"]}
    bpw = {row["kernel"]: row["bpw"] for row in document["rows"]}
    bandwidth = next(iter(document["machine"]["read_gb_per_second"].values())) * 1e9
    return {"rates": rates, "bpw": bpw}, bandwidth


def ratio(a, b):
    return a / b if a and b else None


def tera(x):
    return f"{x / 1e12:.2f} T/s" if x else "-"


def load_row(results, name, rates, asked):
    get = rates.get
    results.row(
        name + "load: PCIe copy time / decode time",
        1 / 1.05 if asked else None,
        ratio(get("file-decode"), get("copy")),
        f"copy {(get('copy') or 0) / 1e9:.0f}, decode {(get('file-decode') or 0) / 1e9:.0f}, with gathering from the file, one after the other: "
        f"{(get('copy+decode') or 0) / 1e9:.0f} G weights/s",
    )


def kernel_rows(results):
    torch = results.load("torch") or {}
    for shape, entropy in [("28672x8192", "2.25"), ("8192x28672", "2.25"), ("14336x4096", "2.25"), ("28672x8192", "3.0")]:
        found, bandwidth = kernels(results, shape, entropy)
        rates, bpw = found.get("rates", {}), found.get("bpw", {})
        get = rates.get
        asked = shape != "14336x4096" and entropy == "2.25"
        name = f"{shape}, H {entropy}: "
        peers = torch.get(shape, {})
        fused, plain = get("fused-gemv"), get("gemv")
        seen = f"fused {tera(fused)} at {bpw.get('fused-gemv', 0):.2f} bpw, plain {tera(plain)}"
        results.row(name + "fused / torch int4pack", 1.0 if asked else None, ratio(fused, peers.get("int4pack")), f"{seen}, int4pack {tera(peers.get('int4pack'))}")
        results.row(name + "fused / cuBLAS bf16", 1.6 if asked else None, ratio(fused, peers.get("bf16")), f"bf16 {tera(peers.get('bf16'))}")
        results.row(name + "fused / our plain 4-bit", 0.5 if asked else None, ratio(fused, plain))
        read = plain * bpw["gemv"] / 8 if plain else None
        results.row(name + "plain / read bandwidth", 0.75 if asked else None, ratio(read, bandwidth), f"{(bandwidth or 0) / 1e12:.2f} TB/s")
        results.row(name + "bulk decode, T weights/s", 2.5 if asked else None, ratio(get("decode"), 1e12))
        results.row(name + "fused, batch 4, per token / batch 1", 2.0 if asked else None, ratio(get("fused-gemv/4"), fused))
        results.row(name + "fused, batch 16, per token / batch 1", 4.0 if asked else None, ratio(get("fused-gemv/16"), fused))
        load_row(results, name, rates, asked)
        if asked:
            pairs, _ = kernels(results, shape, f"{entropy}-pairs")
            load_row(results, f"{shape}, H {entropy}, rans-pairs: ", pairs.get("rates", {}), asked)
    return bandwidth


def bench(results, name):
    document = results.load(f"bench-8b-{name}")
    return document and document["runs"][0]


def model_rows(results):
    _, bandwidth = kernels(results, "28672x8192", "2.25")
    found, _ = kernels(results, "28672x8192", "2.25")
    runs = {s: bench(results, s) for s in ["cached", "fused", "gpu-async", "auto"]}
    step = {s: run["step_tokens_per_second"] for s, run in runs.items() if run}
    if "cached" in step and bandwidth:
        size = runs["cached"]["resident_weight_bytes"]
        detail = f"{step['cached']:.0f} tok/s; {size / 1e9:.2f} GB, ideal {bandwidth / size:.0f}; prefill {runs['cached']['prefill_tokens_per_second']:.0f}"
        results.row("8 B, cached step / (bandwidth / decoded bytes)", 0.6, step["cached"] * size / bandwidth, detail)
    short = bench(results, "cached-short")
    if short and bandwidth:
        step_rate, size = short["step_tokens_per_second"], short["resident_weight_bytes"]
        results.row("8 B, the same behind 16 tokens instead of 512", None, step_rate * size / bandwidth, f"{step_rate:.0f} tok/s")
    for s in ["fused", "gpu-async"]:
        if s in step:
            detail = f"{step[s]:.0f} tok/s, prefill {runs[s]['prefill_tokens_per_second']:.0f}, {runs[s]['resident_weight_bytes'] / 1e9:.2f} GB"
            results.row(f"8 B, {s} step / cached", None, ratio(step[s], step.get("cached")), detail)
    if len(step) == 4:
        results.row("8 B, auto / best fixed", 0.95, step["auto"] / max(v for k, v in step.items() if k != "auto"), runs["auto"]["strategy_detail"])
    for budget in ["1100MB", "2600MB"]:
        strategies = ["prefetch", "auto"] if budget == "1100MB" else ["fused", "lru", "gpu-async", "auto"]
        runs = {s: bench(results, f"{budget}-{s}") for s in strategies}
        step = {s: run["step_tokens_per_second"] for s, run in runs.items() if run}
        if "auto" in step and len(step) > 1:
            fixed = {k: v for k, v in step.items() if k != "auto"}
            detail = ", ".join(f"{k} {v:.1f}" for k, v in step.items()) + " tok/s"
            results.row(f"8 B, budget {budget}: auto / best fixed", 0.95, step["auto"] / max(fixed.values()), detail)
        if "prefetch" in step:
            words = runs["prefetch"]["strategy_detail"].split()
            streamed = next((int(words[i]) for i in range(len(words) - 1) if words[i + 1] == "bytes"), None)
            copy = found["rates"]["copy"] * found["bpw"]["copy"] / 8 if found else None
            ideal = ratio(copy, streamed)
            detail = f"{step['prefetch']:.1f} tok/s; {(streamed or 0) / 1e9:.3f} GB a step at {(copy or 0) / 1e9:.1f} GB/s"
            results.row(f"8 B, prefetch in {budget}: step / (PCIe / coded bytes)", 0.9, ratio(step["prefetch"], ideal), detail)


def timeline_rows(results):
    for name in ["prompt", "step"]:
        document = results.load(f"timeline-{name}")
        spans = document["runs"][0].get("timeline", []) if document else []
        busy = [(s["from_us"], s["until_us"]) for s in spans if s["computing"]]
        fills = [(s["from_us"], s["until_us"]) for s in spans if not s["computing"]]
        if not fills:
            continue
        total = sum(b - a for a, b in fills)
        beside = sum(max(0.0, min(b, until) - max(a, since)) for a, b in fills for since, until in busy)
        compute = sum(b - a for a, b in busy)
        detail = f"{len(fills)} layers decoded in {total:.0f} us, computing {compute:.0f} us, pass {max(b for _, b in busy + fills):.0f} us"
        results.row(f"gpu-async, {name}: part of decoding beside computing", None, beside / total, detail)


def same_rows(results):
    for model in ["demo", "books"]:
        names = [f"generate-{model}-{s}" for s in ["fused", "cached", "prefetch", "lru", "gpu-async", "auto"]]
        names += ["generate-books-lru-mru"] if model == "books" else []
        documents = [results.load(name) for name in names]
        good = all(documents) and len({(d["logits_hash"], d["text"]) for d in documents}) == 1
        results.check(f"{model}: one hash of the logits of {len(names)} strategies, 100 tokens", good, documents[0]["logits_hash"] if all(documents) else "")
    eval_ = results.load("eval-books")
    if eval_:
        detail = f"perplexity {eval_['perplexity']:.4f} (GPU), {eval_['reference_perplexity']:.4f} (CPU), top-1 {eval_['top1_agreement']:.4f}"
        results.check(f"books: mean KL from the CPU {eval_['kl_mean']:.2g} nats, at most 0.005", eval_["kl_mean"] <= 0.005, detail)


def main():
    results = Results(sys.argv[1])
    results.check("every kernel equals the oracle", not (results.folder / "kernels_are_exact.json").read_text().count("FAILED"))
    results.check("strategies, slices and several sequences change no bit", "3 passed; 0 failed" in (results.folder / "runners.json").read_text())
    for tool, clean in [("memcheck", "ERROR SUMMARY: 0 errors"), ("synccheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "RACECHECK SUMMARY: 0 hazards")]:
        text = (results.folder / f"{tool}.json").read_text()
        results.check(f"compute-sanitizer {tool}", clean in text, next((line for line in text.splitlines() if "SUMMARY" in line), "").strip("= "))
    same_rows(results)
    kernel_rows(results)
    model_rows(results)
    timeline_rows(results)
    print((results.folder / "gpu.txt").read_text().strip())
    results.print()
    sys.exit(results.failed)


if __name__ == "__main__":
    main()
