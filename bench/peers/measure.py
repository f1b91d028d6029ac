#!/usr/bin/env python3
"""Measures what bench/peers/run has prepared, and prints the Reach table of issue 3 as Markdown. Run it through bench/peers/run.

Answers are checked before any clock starts: `tersor verify` on both models, bit-identical logits of all strategies and thread counts, the
quantized GGUF tensors against the unquantized weights, every kernel against its oracle, every bulk decoder against the plain bytes.
Contenders take turns within every round, the order rotates, figures are medians over rounds. Each section states the load average
and how much of the CPUs other processes took; a section above 15 % is repeated, up to --repeat-sections times, and its best attempt (the one
least disturbed) is the one shown. Ratios use medians of the same section; those of `auto` are what bench/auto_budgets.py says.
"""
import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import auto_budgets
TERSOR = ROOT / "target/release/tersor"
ENTROPIES = [2.25, 3.0, 3.7]
STRATEGIES = ["cached", "fused", "auto"]
# Our models: codec and bits per weight.
MODELS = {"rans 3.25": "ours-3.25", "rans 4.0": "ours-4.0", "rans-pairs 3.25": "pairs-3.25", "tiered 3.25": "tiered-3.25"}
MODELS_325 = ["rans 3.25", "rans-pairs 3.25", "tiered 3.25"]
CODECS = ["rans", "rans-pairs", "tiered"]
LLAMA = ["Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K"]
DISTURBED = 0.15


def say(text):
    print(time.strftime("%T"), text, file=sys.stderr, flush=True)


def command(*arguments, timeout=None):
    """Standard output of a command; None if it did not finish in time."""
    arguments = [str(a) for a in arguments]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)}: {done.stderr.strip()[-400:]}")
    return done.stdout


def busy_seconds():
    """CPU time of the whole machine so far, and of this process with its finished children; steal counts as taken by others."""
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _wait, irq, soft, steal = fields
    ours = os.times()
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"), sum(ours[:4])


class Bench:
    def __init__(self, options):
        self.options, self.cache = options, options.cache
        self.environment_note = {}
        self.results = {}
        # `auto` decides by the machine's profile: measured anew, with the machine as it is now.
        os.environ["XDG_CACHE_HOME"] = str(self.cache / "xdg")
        self.models = {model: self.cache / directory for model, directory in MODELS.items()}
        self.hashes = {}

    def section(self, name, measure):
        attempts = []
        for attempt in range(1 + (self.options.repeat_sections if name != "check" else 0)):
            say(f"{name}" + (f", attempt {attempt + 1}" if attempt else ""))
            began, (all_before, ours_before), load_before = time.monotonic(), busy_seconds(), os.getloadavg()[0]
            result = measure()
            (all_after, ours_after), seconds = busy_seconds(), time.monotonic() - began
            others = max(0.0, (all_after - all_before) - (ours_after - ours_before)) / (seconds * os.cpu_count())
            note = f"{name}: {seconds:.0f} s, load average {load_before:.1f} to {os.getloadavg()[0]:.1f}, others took {100 * others:.0f} % of the CPUs"
            say(note)
            attempts.append((others, note, result))
            if others <= DISTURBED:
                break
        others, note, result = min(attempts, key=lambda a: a[0])
        self.environment_note[name] = note + (" — DISTURBED" if others > DISTURBED else "")
        self.results[name] = result

    # Checks ----------------------------------------------------------------------------------------------------------------------------

    def check(self):
        lines = []
        for model, path in self.models.items():
            command(TERSOR, "verify", path)
            sizes = json.loads(command(TERSOR, "inspect", path, "--json"))
            lines.append({"model": f"tersor {model}, entropy {sizes['entropy_bits']:.3f}", "bpw": sizes["bpw"], "bytes": sizes["bytes"], "sqnr_db": None})
        import gguf
        import numpy as np

        plain = {t.name: t for t in gguf.GGUFReader(self.cache / "bf16.gguf").tensors}
        weights = sum(int(np.prod(t.shape)) for t in plain.values())
        for kind in LLAMA:
            path = self.cache / f"{kind}.gguf"
            error = power = 0.0
            for tensor in gguf.GGUFReader(path).tensors:
                if tensor.name not in ("blk.5.attn_q.weight", "blk.11.ffn_down.weight", "blk.17.ffn_up.weight"):
                    continue
                truth = (plain[tensor.name].data.view("<u2").astype(np.uint32) << 16).view(np.float32)
                got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                error += float(np.square(got.reshape(-1) - truth.reshape(-1), dtype=np.float64).sum())
                power += float(np.square(truth, dtype=np.float64).sum())
            sqnr = 10 * np.log10(power / error)
            if sqnr < 6:
                sys.exit(f"{path}: {sqnr:.1f} dB from the weights it was made of")
            size = os.path.getsize(path)
            lines.append({"model": f"llama.cpp {kind}", "bpw": 8 * size / weights, "bytes": size, "sqnr_db": sqnr})
        return lines

    # Kernels ---------------------------------------------------------------------------------------------------------------------------

    def kernels(self):
        samples, bulk, bandwidth = {}, {}, {}
        for _ in range(self.options.rounds):
            for entropy in ENTROPIES:
                for level, threads in (("avx512", "1,2"), ("avx2", "1")):
                    text = command(TERSOR, "kernels", "--codec", ",".join(CODECS), "--level", level, "--threads", threads, "--entropy", entropy,
                                   "--seconds", 0.15, "--json")
                    report = json.loads(text)
                    for key, value in report["machine"]["read_gb_per_second"].items():
                        bandwidth.setdefault(key, []).append(value)
                    for row in report["rows"]:
                        key = (row["codec"].split("/")[0], row["kernel"], row["level"], row["threads"], row["working_set"], entropy)
                        samples.setdefault(key, []).append((row["weights_per_second"], row["fraction_of_bandwidth"], row["bpw"]))
                if (self.cache / "bulk").exists():
                    for where, millions in (("cache", 0.5), ("memory", 64)):
                        for row in json.loads(command(self.cache / "bulk", entropy, millions, 0.2))["rows"]:
                            bulk.setdefault((row["name"], where, entropy), []).append((row["symbols_per_second"], row["bpw"]))
        median = lambda rows, i: statistics.median(r[i] for r in rows) if rows[0][i] is not None else None
        return {
            "bandwidth": {k: statistics.median(v) for k, v in bandwidth.items()},
            "rows": {k: (median(v, 0), median(v, 1), median(v, 2)) for k, v in samples.items()},
            "bulk": {k: (median(v, 0), median(v, 1)) for k, v in bulk.items()},
        }

    # Steps and prefill -----------------------------------------------------------------------------------------------------------------

    def ours(self, model, strategy, threads, prompt, tokens):
        text = command(TERSOR, "bench", self.models[model], "--strategy", strategy, "-p", prompt, "-n", tokens, "--threads", threads, "--repeat", 1, "--json")
        report = json.loads(text)
        expected = self.hashes.setdefault((model, prompt, tokens), report["logits_hash"])
        if report["logits_hash"] != expected:
            sys.exit(f"{model}, {strategy}, {threads} threads: other logits; timings of wrong answers are not shown")
        return report["runs"][0]

    def theirs(self, kind, threads, prompt, tokens):
        amx_free = self.cache / "no-amx/bin/llama-bench"
        program = amx_free if prompt and amx_free.exists() else self.cache / "native/bin/llama-bench"
        text = command(program, "-m", self.cache / f"{kind}.gguf", "-p", prompt, "-n", tokens, "-t", threads, "-r", 1, "-o", "json", timeout=300)
        return None if text is None else json.loads(text)[0]["avg_ts"]

    def turns(self, contenders, rounds):
        """Medians of every contender, which take turns in an order that rotates from round to round."""
        samples = {name: [] for name, _ in contenders}
        for turn in range(rounds):
            shift = turn * 3 % len(contenders)
            for name, run in contenders[shift:] + contenders[:shift]:
                rate = run()
                if rate is not None:
                    samples[name].append(rate)
        return {name: (statistics.median(s), min(s), max(s)) if s else None for name, s in samples.items()}

    def rates(self, prompt, tokens, kinds, key, rounds, models):
        contenders = []
        for threads in self.options.threads:
            for kind in kinds:
                contenders.append(((f"llama.cpp {kind}", threads), lambda k=kind, t=threads: self.theirs(k, t, 0 if key.startswith("step") else prompt,
                                                                                                          tokens if key.startswith("step") else 0)))
            for model in models:
                for strategy in STRATEGIES:
                    contenders.append(((f"tersor {model} {strategy}", threads), lambda m=model, s=strategy, t=threads: self.ours(m, s, t, prompt, tokens)[key]))
        return self.turns(contenders, rounds)

    def steps(self):
        return self.rates(1, self.options.tokens, LLAMA, "step_tokens_per_second", self.options.rounds, MODELS)

    def prefill(self):
        return self.rates(self.options.prompt, 2, ["Q4_0", "Q4_K_M"], "prefill_tokens_per_second", self.options.prefill_rounds, MODELS_325)

    # Cold load -------------------------------------------------------------------------------------------------------------------------

    def cold(self):
        model = self.models["rans 3.25"]
        decoded = self.ours("rans 3.25", "cached", os.cpu_count(), 1, 2)["resident_weight_bytes"]
        plain = self.cache / "decoded-bytes"
        if not plain.exists() or plain.stat().st_size != decoded:
            with open(plain, "wb") as file:
                for start in range(0, decoded, 1 << 24):
                    file.write(os.urandom(min(1 << 24, decoded - start)))
                file.flush()
                os.fsync(file.fileno())
        files, samples, left = list(model.glob("*.safetensors")), {"read": [], "load": [], "coded": [], "warm": []}, 0
        coded = sum(f.stat().st_size for f in files)
        for _ in range(max(3, self.options.rounds)):
            left = max(left, evict([plain]))
            samples["read"].append(timed_read([plain]))
            left = max(left, evict(files))
            samples["load"].append(self.ours("rans 3.25", "cached", os.cpu_count(), 1, 2)["load_seconds"])
            samples["warm"].append(self.ours("rans 3.25", "cached", os.cpu_count(), 1, 2)["load_seconds"])
            left = max(left, evict(files))
            samples["coded"].append(timed_read(files))
        return {k: statistics.median(v) for k, v in samples.items()} | {"decoded_bytes": decoded, "coded_bytes": coded, "left_cached": left}

    def auto(self):
        def budgets(model):
            # More rounds than for peers: two strategies that do the same work differ by more than the twentieth that is asked about.
            text = command(sys.executable, ROOT / "bench/auto_budgets.py", self.models[model], "--threads", max(self.options.threads), "--rounds",
                           max(self.options.rounds, auto_budgets.ROUNDS), "--percent", self.options.percent, "--json")
            return json.loads(text)
        return {model: budgets(model) for model in MODELS_325}


def evict(files):
    """Drops the files' clean pages from the page cache, only theirs; returns the fraction still there."""
    resident = pages = 0
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        out = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "PAGES", path], capture_output=True, text=True).stdout
        resident += int(out.split()[0]) if out.split() else 0
        pages += -(-path.stat().st_size // mmap.PAGESIZE)
    return resident / max(1, pages)


def timed_read(files):
    buffer, began = bytearray(8 << 20), time.monotonic()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.readinto(buffer):
                pass
    return time.monotonic() - began


# Report ------------------------------------------------------------------------------------------------------------------------------------


def reach(results, threads):
    """Rows (what, figure, least, aim, detail) of the Reach table."""
    rows = []
    if "kernels" in results:
        kernel = lambda *key: results["kernels"]["rows"][key]
        for codec in CODECS:
            ratios = [kernel(codec, "fused-gemv", "avx512", 1, "memory", h)[0] / kernel(codec, "gemv", "avx512", 1, "memory", h)[0] for h in ENTROPIES]
            rows.append((f"fused {codec} GEMV / our plain GEMV, 1 thread, memory", min(ratios), 0.60, 1.0, spread(ratios)))
        for codec in CODECS:
            rates = [kernel(codec, "fused-gemv", "avx512", 1, "cache", h)[0] / 1e9 for h in ENTROPIES]
            rows.append((f"fused {codec}, 1 thread, in cache, G weights/s", min(rates), 13, 20, spread(rates)))
        fractions = [kernel("rans", "gemv", "avx512", 2, "memory", h)[1] for h in ENTROPIES]
        rows.append(("plain GEMV, 2 threads / read bandwidth", min(fractions), 0.85, 0.95, spread(fractions)))
        for codec in CODECS:
            for where in ("cache", "memory"):
                rates = [kernel(codec, "decode", "avx512", 1, where, h)[0] / 1e9 for h in ENTROPIES]
                rows.append((f"bulk decode of {codec} to the decoded form, AVX-512, 1 core, {where}, G/s", min(rates), 10, 15, spread(rates)))
        for codec in CODECS:
            rates = [kernel(codec, "fused-gemv", "avx2", 1, "cache", h)[0] / 1e9 for h in ENTROPIES]
            rows.append((f"AVX2 fused {codec}, 1 core, in cache, G/s", min(rates), 4, 7, spread(rates)))
    # (row, section, ours, theirs, least, aim)
    for what, section, ours, theirs, least, aim in [
        ("step, cached, rans at 4.0 bpw / Q4_0", "steps", "tersor rans 4.0 cached", "llama.cpp Q4_0", 1.0, 1.1),
        ("step, cached, rans at 3.25 bpw / Q4_0", "steps", "tersor rans 3.25 cached", "llama.cpp Q4_0", 1.0, 1.1),
        ("step, fused, rans at 3.25 bpw / Q4_K_M", "steps", "tersor rans 3.25 fused", "llama.cpp Q4_K_M", 0.8, 1.2),
        ("step, fused, rans-pairs at 3.25 bpw / Q4_K_M", "steps", "tersor rans-pairs 3.25 fused", "llama.cpp Q4_K_M", 0.8, 1.2),
        ("step, fused, tiered at 3.25 bpw / Q4_K_M", "steps", "tersor tiered 3.25 fused", "llama.cpp Q4_K_M", 0.8, 1.2),
        ("prefill 512, cached, rans at 3.25 bpw / Q4_0", "prefill", "tersor rans 3.25 cached", "llama.cpp Q4_0", 0.5, 1.0),
        ("prefill 512, fused, rans at 3.25 bpw / Q4_0", "prefill", "tersor rans 3.25 fused", "llama.cpp Q4_0", 0.5, 1.0),
        ("prefill 512, fused, rans-pairs at 3.25 bpw / Q4_0", "prefill", "tersor rans-pairs 3.25 fused", "llama.cpp Q4_0", 0.5, 1.0),
        ("prefill 512, fused, tiered at 3.25 bpw / Q4_0", "prefill", "tersor tiered 3.25 fused", "llama.cpp Q4_0", 0.5, 1.0),
    ]:
        for count in threads if section in results else []:
            a, b = results[section].get((ours, count)), results[section].get((theirs, count))
            if a and b:
                rows.append((f"{what}, {count} thread{'s' if count > 1 else ''}", a[0] / b[0], least, aim, f"{a[0]:.1f} / {b[0]:.1f} tok/s"))
            else:
                rows.append((f"{what}, {count} threads", None, least, aim, "llama.cpp did not finish"))
    if "cold" in results:
        cold = results["cold"]
        detail = f"load {cold['load']:.2f} s, reading {cold['decoded_bytes'] / 1e6:.0f} MB {cold['read']:.2f} s, {cold['coded_bytes'] / 1e6:.0f} MB {cold['coded']:.2f} s"
        rows.append(("cold load: reading the decoded bytes / load of `cached`", cold["read"] / cold["load"], 1.0, cold["decoded_bytes"] / cold["coded_bytes"], detail))
    for model, report in results.get("auto", {}).items():
        ratios = [(row["ratio"], row["percent"]) for row in report["rows"] if row["ratio"] is not None]
        if ratios:
            worst = min(ratios)
            rows.append((f"auto / best fixed strategy under the same budget, {model}, worst", worst[0], 0.95, 1.0, f"at {worst[1]} % of the decoded size"))
    return rows


def spread(values):
    return "H " + ", ".join(f"{h}: {v:.2f}" for h, v in zip(ENTROPIES, values))


def report(bench):
    results, threads = bench.results, bench.options.threads
    out = ["| what | figure | at least | aim | verdict | detail |", "|---|---|---|---|---|---|"]
    for what, figure, least, aim, detail in reach(results, threads):
        verdict = "not measured" if figure is None else "aim reached" if figure >= aim else "reached" if figure >= least else "**short**"
        shown = "–" if figure is None else f"{figure:.2f}"
        out.append(f"| {what} | {shown} | {least:g} | {aim:.3g} | {verdict} | {detail} |")
    if "check" in results:
        out += ["", "Sizes; SQNR of three of llama.cpp's tensors against the plain weights (a check that they are the same weights):", "",
                "| model | bpw | MB | SQNR |", "|---|---|---|---|"]
        for line in results["check"]:
            out.append(f"| {line['model']} | {line['bpw']:.3f} | {line['bytes'] / 1e6:.0f} | {'' if line['sqnr_db'] is None else format(line['sqnr_db'], '.1f') + ' dB'} |")
    for section, title in (("steps", f"Steps, tok/s: median (least–most) of {bench.options.rounds} rounds of {bench.options.tokens} tokens"),
                           ("prefill", f"Prefill of {bench.options.prompt} tokens, tok/s: median (least–most) of {bench.options.prefill_rounds} rounds")):
        if section in results:
            out += ["", title + ":", "", "| | " + " | ".join(f"{t} thread{'s' if t > 1 else ''}" for t in threads) + " |", "|---" * (1 + len(threads)) + "|"]
            for name in dict.fromkeys(name for name, _ in results[section]):
                cells = [results[section][name, t] for t in threads]
                out.append(f"| {name} | " + " | ".join("did not finish" if c is None else f"{c[0]:.1f} ({c[1]:.1f}–{c[2]:.1f})" for c in cells) + " |")
    if "kernels" in results:
        kernels = results["kernels"]
        bandwidth = ", ".join(f"{v:.1f} GB/s with {k}" for k, v in sorted(kernels["bandwidth"].items()))
        out += ["", f"Kernels, G weights/s; read bandwidth by threads {bandwidth}:", "",
                "| codec | kernel | level | threads | from | " + " | ".join(f"H {h}" for h in ENTROPIES) + " |", "|---" * (5 + len(ENTROPIES)) + "|"]
        for key in dict.fromkeys(k[:5] for k in kernels["rows"]):
            out.append("| " + " | ".join(map(str, key)) + " | " + " | ".join(f"{kernels['rows'][*key, h][0] / 1e9:.2f}" for h in ENTROPIES) + " |")
        out += ["", "Bulk decode, 1 thread, G symbols/s (bpw). Ours writes nibbles with escapes, the others a byte per symbol; the same symbols:", "",
                "| decoder | from | " + " | ".join(f"H {h}" for h in ENTROPIES) + " |", "|---" * (2 + len(ENTROPIES)) + "|"]
        rows = {(f"tersor {codec}, {level}", where): [kernels["rows"][codec, "decode", level, 1, where, h] for h in ENTROPIES]
                for where in ("cache", "memory") for codec in CODECS for level in ("avx512", "avx2")}
        cells = lambda values, size: " | ".join(f"{v[0] / 1e9:.2f} ({v[size]:.3f})" for v in values)
        out += [f"| {name} | {where} | {cells(values, 2)} |" for (name, where), values in rows.items()]
        for name, where in dict.fromkeys(k[:2] for k in kernels["bulk"]):
            out.append(f"| {name} | {where} | {cells([kernels['bulk'][name, where, h] for h in ENTROPIES], 1)} |")
    if "cold" in results:
        cold = results["cold"]
        out += ["", f"Cold load: `cached` {cold['load']:.2f} s cold, {cold['warm']:.2f} s warm; plain reads {cold['read']:.2f} s (decoded bytes), {cold['coded']:.2f} s (coded "
                f"files). Pages dropped with POSIX_FADV_DONTNEED; at most {100 * cold['left_cached']:.1f} % stayed. A hypervisor may still cache the disk."]
    if "auto" in results:
        for model, report in results["auto"].items():
            out += ["", f"tersor {model}. {auto_budgets.table(report)}"]
    out += ["", "Disturbance:", ""] + [f"- {note}" for note in bench.environment_note.values()]
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--repeat-sections", type=int, default=1, help="attempts more for a section in which others took over 15 %% of the CPUs")
    parser.add_argument("--threads", default="1,2", type=lambda text: [int(t) for t in text.split(",")])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--percent", default="40,60,80,90,100,110,120")
    parser.add_argument("--sections", default="kernels,steps,prefill,cold,auto")
    parser.add_argument("--json", type=Path, help="also write all medians here")
    options = parser.parse_args()

    bench = Bench(options)
    bench.section("check", bench.check)
    command(TERSOR, "info", "--refresh", "--json")
    for name in options.sections.split(","):
        bench.section(name, getattr(bench, name))
    cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    print(f"{cpu}, {os.cpu_count()} CPUs, {time.strftime('%F')}\n")
    print(report(bench))
    if options.json:
        plain = lambda value: {" ".join(map(str, k)) if isinstance(k, tuple) else k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value
        options.json.write_text(json.dumps(plain(bench.results) | {"notes": bench.environment_note}, indent=1) + "\n")


if __name__ == "__main__":
    main()
