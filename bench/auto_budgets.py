#!/usr/bin/env python3
"""`auto` against the best fixed strategy under the same memory budget, as a Markdown table.

    bench/auto_budgets.py DIR [--percent 40,60,80,90,100,110,120] [--threads 2] [-n 32] [--rounds 5] [--json]

Budgets are percentages of the decoded size (what `cached` holds). Every strategy runs once a round, in turn, each in a process of its own;
figures are medians of step rates. The best fixed strategy is that of the highest median, and the ratio to it the median of the rounds' ratios,
since a machine that others use is slower in one round than in the next. A run counts only if its logits are those of all the others. A
strategy that refuses a budget is left out of it; where all refuse, so must `auto`. Measures the machine's profile anew first, into a
directory of its own, because `auto` decides by it.
Needs `cargo build --release` and Python's standard library.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TERSOR = os.path.join(ROOT, "target", "release", "tersor")
STRATEGIES = ["auto", "fused", "cached", "prefetch", "lru"]
ROUNDS = 5  # fewer tell a twentieth from the machine's changes only by luck


def run(environment, *arguments):
    """The JSON document of a command, or its error line."""
    done = subprocess.run([TERSOR, *arguments, "--json"], capture_output=True, text=True, env=environment)
    return (json.loads(done.stdout), None) if done.returncode == 0 else (None, done.stderr.strip())


def measure(options, environment):
    shape = ["-p", "1", "-n", str(options.tokens), "--threads", str(options.threads), "--repeat", "1"]
    report, error = run(environment, "bench", options.directory, "--strategy", "cached", *shape)
    if error:
        sys.exit(error)
    decoded, expected = report["runs"][0]["resident_weight_bytes"], report["logits_hash"]
    rates, refusals, details = {}, {}, {}
    for turn in range(options.rounds):
        for percent in options.percent:
            budget = str(decoded * percent // 100)
            order = STRATEGIES[turn % len(STRATEGIES) :] + STRATEGIES[: turn % len(STRATEGIES)]
            for strategy in order:
                if (percent, strategy) in refusals:
                    continue
                report, error = run(environment, "bench", options.directory, "--strategy", strategy, "--memory-budget", budget, *shape)
                if error:
                    if "budget" not in error:
                        sys.exit(error)
                    refusals[percent, strategy] = error
                    continue
                if report["logits_hash"] != expected:
                    sys.exit(f"{strategy} under {percent} %: other logits; timings of wrong answers are not shown")
                rates.setdefault((percent, strategy), []).append(report["runs"][0]["step_tokens_per_second"])
                if strategy == "auto":
                    details[percent] = report["runs"][0]["strategy_detail"]
    rows = []
    for percent in options.percent:
        medians = {s: statistics.median(rates[percent, s]) for s in STRATEGIES if (percent, s) in rates}
        fixed = {s: rate for s, rate in medians.items() if s != "auto"}
        best = max(fixed, key=fixed.get, default=None)
        rows.append({
            "percent": percent,
            "tokens_per_second": medians,
            "best_fixed": best,
            "ratio": ratio(rates[percent, "auto"], rates[percent, best]) if best and "auto" in medians else (0.0 if best else None),
            "auto_detail": details.get(percent),
            "refusal": refusals.get((percent, "auto")),
        })
    return {"decoded_bytes": decoded, "threads": options.threads, "rows": rows}


def ratio(ours, others):
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def table(report):
    lines = [f"Decoded size {report['decoded_bytes'] / 1e6:.0f} MB, {report['threads']} threads, step tok/s.", ""]
    lines += ["| budget | " + " | ".join(STRATEGIES) + " | auto / best fixed |", "|---" * (len(STRATEGIES) + 2) + "|"]
    for row in report["rows"]:
        rates = row["tokens_per_second"]
        cells = [f"{rates[s]:.1f}" if s in rates else "refused" for s in STRATEGIES]
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f} ({row['best_fixed']})"
        lines.append(f"| {row['percent']} % | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--percent", default="40,60,80,90,100,110,120", type=lambda text: [int(p) for p in text.split(",")])
    parser.add_argument("--threads", default=os.cpu_count(), type=int)
    parser.add_argument("-n", "--tokens", default=32, type=int)
    parser.add_argument("--rounds", default=ROUNDS, type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as profiles:
        report = measure(options, os.environ | {"XDG_CACHE_HOME": profiles})
    print(json.dumps(report, indent=1) if options.json else table(report))


if __name__ == "__main__":
    main()
