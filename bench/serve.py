#!/usr/bin/env python3
"""What company is worth: tokens per second of `tersor serve` with one, two, four and eight requests at a time.

    bench/serve.py target/release/tersor DIR [options of `tersor serve`]

Greedy requests of 64 tokens each, of different prompts; every answer is compared with what its prompt gets alone before anything is timed. Prints the
median of five rounds, each of which takes all numbers of requests in turn.
"""

import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

TOKENS = 64
COUNTS = (1, 2, 4, 8)
ROUNDS = 5
PROMPTS = [f"Chapter {number}. It was" for number in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


def complete(url, prompt):
    """The text that follows a prompt."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(url + "/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["text"]


def together(url, count):
    """Texts of `count` requests at a time, and the seconds they took."""
    texts = [None] * count
    threads = [threading.Thread(target=lambda i=i: texts.__setitem__(i, complete(url, PROMPTS[i]))) for i in range(count)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts, time.perf_counter() - start


def main():
    program, model, *options = sys.argv[1:]
    command = [program, "serve", model, "--port", "0", "--sequences", str(max(COUNTS)), "--context", "512", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stderr.readline()
        url = re.search(r"http://\S+/v1", line)
        if not url:
            sys.exit(line.strip())
        alone = [complete(url[0], prompt) for prompt in PROMPTS]
        for count in COUNTS:
            if together(url[0], count)[0] != alone[:count]:
                sys.exit(f"{count} requests at a time give other texts than each alone")
        times = {count: [] for count in COUNTS}
        for _ in range(ROUNDS):
            for count in COUNTS:
                times[count].append(together(url[0], count)[1])
    finally:
        server.terminate()
        server.wait()
    print(line.strip())
    print("| requests at a time | tok/s together | of one |\n|---|---|---|")
    rates = {count: count * TOKENS / statistics.median(seconds) for count, seconds in times.items()}
    for count, rate in rates.items():
        print(f"| {count} | {rate:.1f} | {rate / rates[1]:.2f} |")


if __name__ == "__main__":
    main()
