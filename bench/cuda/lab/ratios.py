# Ratios from one run's table (argument: the table file run.sh writes).
import re, sys
t = {}
for line in open(sys.argv[1]):
    m = re.match(r"(.*?)\s+(\d+)x(\d+)\s+([\d.]+) ms", line)
    if m: t.setdefault((" ".join(m[1].split()), f"{m[2]}x{m[3]}"), float(m[4]))
def get(name, shape): return t.get((name, shape))
rows = [("quad H2.25 r0 W14 x1 NT1 wpb28", "28672x8192", "2048"), ("quad H2.25 r0 W14 x1 NT1 wpb28", "8192x28672", "2048"), ("quad H2.25 r0 W14 x1 NT1 wpb14", "14336x4096", "1024"),
        ("quad H3.00 r1 W14 x1 NT1 wpb28", "28672x8192", "2048"), ("quad H3.00 r1 W14 x1 NT1 wpb28", "8192x28672", "2048"), ("quad H3.70 r2 W13 x1 NT1 wpb28", "28672x8192", "2048"), ("quad H3.70 r2 W13 x1 NT1 wpb28", "8192x28672", "2048")]
print(f"\n{'speed ratios, fused / ':34s} {'shape':>11s} int4pack   bf16  plain4 (mma)  plain4 (dp4a)   pdl/plain pdl")
for name, sh, tc in rows:
    f = get(name, sh)
    if not f: continue
    r = [get("torch int4pack g128 B1", sh), get("torch bf16 linear B1", sh), get(f"plain 4-bit mma NT1 tc{tc} U4", sh), get("plain 4-bit dp4a (prototype)", sh)]
    p = get(name + " pdl", sh); q = get(f"plain 4-bit mma NT1 tc{tc} U4 pdl", sh)
    print(f"{name:34s} {sh:>11s} {r[0]/f:8.2f} {r[1]/f:6.2f} {r[2]/f:13.2f} {r[3]/f:14.2f} {q/p:15.2f}")
for sh, tc in (("28672x8192", "2048"), ("8192x28672", "2048"), ("14336x4096", "1024")):
    rd = get("read 4-bit bytes only", sh); a = get(f"plain 4-bit mma NT1 tc{tc} U4", sh); b = get(f"plain 4-bit mma NT1 tc{tc} U4 pdl", sh)
    print(f"plain 4-bit / read bandwidth       {sh:>11s} {rd/a:8.2f}   with programmatic launches {rd/b:.2f}")
one = get("quad H2.25 r0 W13 x1 NT1 wpb28", "28672x8192"); e = get("quad H2.25 r0 W13 x1 NT8 wpb28", "28672x8192")
if one and e: print(f"per token against batch 1: batch 4 (kernel for 8) {4*one/e:.2f}x, batch 8 {8*one/e:.2f}x", end="")
s = get("quad H2.25 r0 W13 x1 NT16 wpb28", "28672x8192")
if one and s: print(f", batch 16 {16*one/s:.2f}x;  batch 8 / torch bf16 {get('torch bf16 linear B8','28672x8192')/e:.2f}, batch 16 {get('torch bf16 linear B16','28672x8192')/s:.2f}")
