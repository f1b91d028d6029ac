// Bulk decode rates of zstd's Huff0 and of htscodecs' 32-way rANS, on the symbols that `tersor kernels` uses.
//
//     bulk ENTROPY_BITS MILLIONS_OF_SYMBOLS SECONDS      one JSON document
//
// The symbols are the same ones: SplitMix64 from the same seed, the polar method, rounding; byte = symbol + 128. Both are coded in blocks of
// 128 KiB (Huff0's largest), decoded once and compared with the plain bytes, then decoded for SECONDS; the figure is the median of the
// passes. One thread. Sizes count what each library writes, tables included.
#define _GNU_SOURCE
#include <htscodecs/rANS_static4x16.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// Huff0 is not part of zstd's public interface, but libzstd.a holds it (1.5.4 and later: the last argument is a set of flags, 1 = BMI2).
size_t HUF_compress4X_repeat(void *dst, size_t dst_size, const void *src, size_t src_size, unsigned symbol_max, unsigned table_log,
                             void *workspace, size_t workspace_size, size_t *table, int *repeat, int flags);
size_t HUF_decompress4X_hufOnly_wksp(uint32_t *table, void *dst, size_t dst_size, const void *src, size_t src_size, void *workspace,
                                     size_t workspace_size, int flags);
unsigned HUF_isError(size_t code);

enum { BLOCK = 128 * 1024, WORKSPACE = 64 * 1024 };

static uint64_t random_state = 0x746572736f72;

static double uniform(void) {
    random_state += 0x9e3779b97f4a7c15;
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (double)((z ^ (z >> 31)) >> 11) / (double)(1ull << 53);
}

static double gaussian(void) {
    for (;;) {
        double a = uniform() * 2 - 1, b = uniform() * 2 - 1, s = a * a + b * b;
        if (s > 0 && s < 1) return a * sqrt(-2 * log(s) / s);
    }
}

static double entropy_of_sigma(double sigma) {
    int reach = (int)ceil(sigma * 9) + 2;
    double total = 0, sum = 0;
    for (int s = -reach; s <= reach; s++) {
        double at[3] = {(s - 0.5) / sigma, s / sigma, (s + 0.5) / sigma};
        double p = (exp(-0.5 * at[0] * at[0]) + 4 * exp(-0.5 * at[1] * at[1]) + exp(-0.5 * at[2] * at[2])) / 6;
        total += p;
        if (p > 0) sum += p * log2(p);
    }
    return log2(total) - sum / total;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void die(const char *message) {
    fprintf(stderr, "error: bulk: %s\n", message);
    exit(1);
}

struct coded {
    unsigned char *bytes;
    size_t *at; // blocks + 1 offsets
    size_t blocks;
};

static _Alignas(64) uint32_t workspace[WORKSPACE / 4];
static uint32_t huff_table[1 + (1 << 12)];

static size_t huff0_encode(unsigned char *in, size_t n, unsigned char *out, size_t room, int variant) {
    (void)variant;
    static size_t table[512];
    int repeat = 0;
    size_t size = HUF_compress4X_repeat(out, room, in, n, 255, 11, workspace, sizeof workspace, table, &repeat, 1);
    if (HUF_isError(size) || size < 2) die("Huff0 cannot code a block");
    return size;
}

static void huff0_decode(unsigned char *in, size_t size, unsigned char *out, size_t n) {
    huff_table[0] = 12 * 0x01000001u;
    if (HUF_decompress4X_hufOnly_wksp(huff_table, out, n, in, size, workspace, sizeof workspace, 1) != n) die("Huff0 cannot decode a block");
}

static size_t hts_encode(unsigned char *in, size_t n, unsigned char *out, size_t room, int order) {
    unsigned size = (unsigned)room;
    if (!rans_compress_to_4x16(in, (unsigned)n, out, &size, order)) die("htscodecs cannot code a block");
    return size;
}

static void hts_decode(unsigned char *in, size_t size, unsigned char *out, size_t n) {
    unsigned got = (unsigned)n;
    if (!rans_uncompress_to_4x16(in, (unsigned)size, out, &got) || got != n) die("htscodecs cannot decode a block");
}

static int compare(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

int main(int argc, char **argv) {
    if (argc != 4) die("usage: bulk ENTROPY_BITS MILLIONS_OF_SYMBOLS SECONDS");
    double entropy = atof(argv[1]), seconds = atof(argv[3]);
    size_t blocks = (size_t)(atof(argv[2]) * 1e6 / BLOCK + 0.5), n;
    if (blocks == 0) blocks = 1;
    n = blocks * BLOCK;
    double low = 0.05, high = 64;
    for (int i = 0; i < 60; i++) {
        double middle = (low + high) / 2;
        if (entropy_of_sigma(middle) < entropy) low = middle;
        else high = middle;
    }
    unsigned char *plain = malloc(n), *out = malloc(n), *bytes = malloc(2 * n + (1 << 20));
    size_t *at = malloc((blocks + 1) * sizeof *at);
    if (!plain || !out || !bytes || !at) die("no memory");
    size_t histogram[256] = {0};
    for (size_t i = 0; i < n; i++) histogram[plain[i] = (unsigned char)((int)round(gaussian() * low) + 128)]++;
    double measured = 0;
    for (int s = 0; s < 256; s++)
        if (histogram[s]) measured -= (double)histogram[s] / (double)n * log2((double)histogram[s] / (double)n);

    static const struct {
        const char *name;
        size_t (*encode)(unsigned char *, size_t, unsigned char *, size_t, int);
        void (*decode)(unsigned char *, size_t, unsigned char *, size_t);
        int order, cpu;
    } contenders[] = {
        {"zstd Huff0 (4 streams)", huff0_encode, huff0_decode, 0, 0},
        {"htscodecs rANS 32x16, AVX2", hts_encode, hts_decode, RANS_ORDER_X32, RANS_CPU_DEC_AVX2},
        {"htscodecs rANS 32x16, AVX-512", hts_encode, hts_decode, RANS_ORDER_X32, RANS_CPU_DEC_AVX512},
        {"htscodecs rANS 32x16, packed, AVX2", hts_encode, hts_decode, RANS_ORDER_X32 | RANS_ORDER_PACK, RANS_CPU_DEC_AVX2},
        {"htscodecs rANS 32x16, packed, AVX-512", hts_encode, hts_decode, RANS_ORDER_X32 | RANS_ORDER_PACK, RANS_CPU_DEC_AVX512},
    };
    printf("{\"entropy_bits\":%.4f,\"symbols\":%zu,\"rows\":[", measured, n);
    for (size_t c = 0; c < sizeof contenders / sizeof *contenders; c++) {
        if (contenders[c].cpu) rans_set_cpu(contenders[c].cpu);
        at[0] = 0;
        for (size_t b = 0; b < blocks; b++)
            at[b + 1] = at[b] + contenders[c].encode(plain + b * BLOCK, BLOCK, bytes + at[b], BLOCK * 2, contenders[c].order);
        memset(out, 0xAA, n);
        double passes[4096], end = 0;
        int count = -1; // the first pass is the check
        do {
            double start = now();
            for (size_t b = 0; b < blocks; b++) contenders[c].decode(bytes + at[b], at[b + 1] - at[b], out + b * BLOCK, BLOCK);
            double stop = now();
            if (count < 0) {
                if (memcmp(plain, out, n)) die("decoded bytes differ: nothing was timed");
                end = now() + seconds;
            } else {
                passes[count] = stop - start;
            }
            count++;
        } while (count < 1 || (now() < end && count < 4096));
        qsort(passes, (size_t)count, sizeof *passes, compare);
        printf("%s{\"name\":\"%s\",\"bpw\":%.4f,\"symbols_per_second\":%.0f}", c ? "," : "", contenders[c].name, 8.0 * (double)at[blocks] / (double)n,
               (double)n / passes[count / 2]);
    }
    printf("]}\n");
    return 0;
}
