"""PyTorch's GEMVs at batch 1 on the GPU: cuBLAS bf16 and the int4 kernel of torch (`_weight_int4pack_mm`, groups of 128). Prints one JSON document:
{"ROWSxCOLS": {"bf16": weights/s, "int4pack": weights/s}}. Copies of the weights rotate, so that they come from memory."""

import json
import sys

import torch


def median_seconds(work, copies, windows=15, inner=6):
    for i in range(3):
        work(i % copies)
    torch.cuda.synchronize()
    times = []
    for window in range(windows):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(inner):
            work((window * inner + i) % copies)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner * 1e-3)
    return sorted(times)[windows // 2]


def main():
    result = {}
    for shape in sys.argv[1:]:
        rows, cols = map(int, shape.split("x"))
        weights = rows * cols
        x = torch.randn(1, cols, device="cuda", dtype=torch.bfloat16)
        copies = max(2, int(400e6 / (2 * weights)) + 1)
        dense = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        bf16 = weights / median_seconds(lambda i: torch.nn.functional.linear(x, dense[i]), copies)
        del dense
        copies = max(2, int(400e6 / (weights / 2)) + 1)
        nibbles = torch.randint(0, 256, (rows, cols // 2), device="cuda", dtype=torch.uint8)
        packed = [torch.ops.aten._convert_weight_to_int4pack(nibbles, 8).clone() for _ in range(copies)]
        scales = torch.randn(cols // 128, rows, 2, device="cuda", dtype=torch.bfloat16)
        int4 = weights / median_seconds(lambda i: torch.ops.aten._weight_int4pack_mm(x, packed[i], 128, scales), copies)
        result[shape] = {"bf16": bf16, "int4pack": int4}
        del packed
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
