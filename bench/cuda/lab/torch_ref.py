# bf16 GEMV (cuBLAS) and torch's _weight_int4pack_mm, g128, batch 1 and more; weights rotated to defeat the L2
import torch, statistics
torch.manual_seed(0)
def bench(f, n=15, inner=6):
    for i in range(3): f(i)
    torch.cuda.synchronize(); ts = []
    for r in range(n):
        a = torch.cuda.Event(enable_timing=True); b = torch.cuda.Event(enable_timing=True); a.record()
        for i in range(inner): f(r * inner + i)
        b.record(); b.synchronize(); ts.append(a.elapsed_time(b) / inner)
    return statistics.median(ts)
for N, K in [(28672, 8192), (8192, 28672), (14336, 4096)]:
    c = int(400e6 // (N * K * 2)) + 1
    W = [torch.randn(N, K, device='cuda', dtype=torch.bfloat16) * 0.02 for _ in range(c)]
    ci = int(400e6 // (N * K // 2)) + 1
    wi = torch.randint(0, 255, (N, K // 2), device='cuda', dtype=torch.uint8)
    ws = [torch.ops.aten._convert_weight_to_int4pack(wi, 8) for _ in range(ci)]
    sz = torch.rand(K // 128, N, 2, device='cuda', dtype=torch.bfloat16)
    for B in (1, 8, 16) if N == 28672 else (1,):
        x = torch.randn(B, K, device='cuda', dtype=torch.bfloat16)
        ms = bench(lambda i: torch.nn.functional.linear(x, W[i % c]))
        print(f"{'torch bf16 linear B%d' % B:34s} {N:5d}x{K:<5d} {ms:8.4f} ms {N*K/ms/1e9:6.2f} Tw/s {N*K*2/ms/1e9:5.2f} TB/s", flush=True)
        ms = bench(lambda i: torch.ops.aten._weight_int4pack_mm(x, ws[i % ci], 128, sz))
        print(f"{'torch int4pack g128 B%d' % B:34s} {N:5d}x{K:<5d} {ms:8.4f} ms {N*K/ms/1e9:6.2f} Tw/s {N*K*0.5/ms/1e9:5.2f} TB/s", flush=True)
    del W, ws, wi; torch.cuda.empty_cache()
