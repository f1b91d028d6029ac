#!/usr/bin/env python3
"""Golden vectors for crates/codec, made without its code.

Written from the layouts that the crate documents, in plain Python with big integers, no reciprocals and no lookup tables; so an
error common to the crate's encoder and decoders still shows. Standard library only, no arguments, the same output every time:

    python3 tools/golden_codec.py          writes crates/codec/tests/golden/{chunks,tables}.json

chunks.json: a list of {codec, table, symbols, chunk}: table and chunk in hex. The table is chosen here, as some valid table, not the best one.
tables.json: a list of {codec, counts, least_bits}: the fewest bits that any table can have for the counts, found by trying all tables
(code bits, 8 for every escaped core symbol, and the table's own entries: 24 bits for rans, 16 for huffman).
"""

import itertools
import json
import math
import pathlib
import struct

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "crates/codec/tests/golden"
ESCAPE = 0


class Generator:
    """A linear congruential generator: the same numbers in every Python."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n


def weights(n, spread, seed):
    """Symbols shaped like weights: a bell, some outliers beyond -127..=127, both ends of i16."""
    generator = Generator(seed)
    out = []
    for _ in range(n):
        symbol = sum(generator.below(2 * spread + 1) - spread for _ in range(4)) // 2
        kind = generator.below(97)
        if kind == 0:
            symbol *= 40
        elif kind == 1:
            symbol = (-32768, 32767, 127, -127, 128, -128)[generator.below(6)]
        out.append(symbol)
    return out


def symbol_byte(symbol):
    return symbol + 128 if -127 <= symbol <= 127 else 0


def split(symbols, core):
    """(symbol byte or ESCAPE for each symbol, escape bytes, far list)"""
    codes, escapes, far = [], [], []
    for position, symbol in enumerate(symbols):
        byte = symbol_byte(symbol)
        if byte != 0 and byte in core:
            codes.append(byte)
            continue
        assert ESCAPE in core, "table without ESCAPE"
        codes.append(ESCAPE)
        escapes.append(byte)
        if byte == 0:
            far.append((position, symbol))
    return codes, escapes, far


def far_bytes(far):
    return b"".join(struct.pack("<Ih", position, symbol) for position, symbol in far)


def some_core(symbols, entries):
    """The symbol bytes of a table: the `entries` most frequent ones, and ESCAPE if that leaves some out."""
    counts = {}
    for symbol in symbols:
        byte = symbol_byte(symbol)
        counts[byte] = counts.get(byte, 0) + 1
    far = counts.pop(0, 0)
    ranked = sorted(counts, key=lambda byte: (-counts[byte], byte))
    core = {byte: counts[byte] for byte in ranked[:entries]}
    rest = far + sum(counts[byte] for byte in ranked[entries:])
    if rest:
        core[ESCAPE] = rest
    return core


def some_frequencies(core, prob_bits):
    """Frequencies in proportion, at least 1; the largest bear what does not add up."""
    total = sum(core.values())
    freqs = {byte: max(1, count * 2**prob_bits // total) for byte, count in core.items()}
    while sum(freqs.values()) != 2**prob_bits:
        largest = max(freqs, key=lambda byte: (freqs[byte], byte))
        freqs[largest] += 1 if sum(freqs.values()) < 2**prob_bits else -1
    return dict(sorted(freqs.items()))


def frequency_table(freqs):
    return struct.pack("<H", len(freqs)) + b"".join(struct.pack("<BH", byte, freq) for byte, freq in freqs.items())


def rans_push(state, words, byte, freqs, state_bits, word_bits, prob_bits):
    """Codes `byte`; the state must stay below 2^state_bits, so a word may have to leave it first."""
    freq = freqs[byte]
    cum = sum(other_freq for other, other_freq in freqs.items() if other < byte)

    def coded(x):
        return (x // freq) * 2**prob_bits + cum + x % freq

    # "would be too large" in units of the quotient, since cum + x % freq never reaches 2^prob_bits
    if state // freq >= 2 ** (state_bits - prob_bits):
        words.append(state % 2**word_bits)
        state //= 2**word_bits
    state = coded(state)
    assert 2 ** (state_bits - word_bits) <= state < 2**state_bits
    return state


def rans_chunk(symbols, freqs, state_bits, word_bits, prob_bits, lanes):
    codes, escapes, far = split(symbols, freqs)
    states = [2 ** (state_bits - word_bits)] * lanes
    words = []
    for i in reversed(range(len(codes))):
        lane = i % lanes
        states[lane] = rans_push(states[lane], words, codes[i], freqs, state_bits, word_bits, prob_bits)
    out = struct.pack("<II", len(escapes), len(far))
    if state_bits == 16:
        out += bytes(state % 256 for state in states) + bytes(state // 256 for state in states)
    else:
        out += b"".join(struct.pack("<I", state) for state in states)
    for word in reversed(words):
        out += word.to_bytes(word_bits // 8, "little")
    return out + bytes(escapes) + far_bytes(far)


def block_ans_chunk(symbols, freqs, state_bits, word_bits, prob_bits, block_symbols):
    codes, escapes, far = split(symbols, freqs)
    index, blocks, escapes_used = b"", b"", 0
    for start in range(0, len(codes), block_symbols):
        block = codes[start : start + block_symbols]
        state, words = 2 ** (state_bits - word_bits), []
        for byte in reversed(block):
            state = rans_push(state, words, byte, freqs, state_bits, word_bits, prob_bits)
        own = escapes[escapes_used : escapes_used + block.count(ESCAPE)]
        escapes_used += len(own)
        coded = state.to_bytes(state_bits // 8, "little")
        coded += b"".join(word.to_bytes(word_bits // 8, "little") for word in reversed(words))
        coded += bytes(reversed(own))
        index += struct.pack("<H", len(coded))
        blocks += coded
    return struct.pack("<I", len(far)) + index + blocks + far_bytes(far)


def some_code_lengths(core, bits_max):
    """A complete code: the textbook's two lightest nodes, flattened to equal lengths if it gets too deep."""
    if len(core) == 1:
        return {byte: 0 for byte in core}
    nodes = sorted((count, byte, [byte]) for byte, count in core.items())
    lengths = {byte: 0 for byte in core}
    while len(nodes) > 1:
        (count_a, tie, a), (count_b, _, b) = nodes[:2]
        for byte in a + b:
            lengths[byte] += 1
        nodes = sorted(nodes[2:] + [(count_a + count_b, tie, a + b)])
    if max(lengths.values()) > bits_max:
        depth = (len(core) - 1).bit_length()
        assert depth <= bits_max
        short = 2**depth - len(core)
        lengths = {byte: depth - (rank < short) for rank, byte in enumerate(sorted(core))}
    assert sum(2.0**-bits for bits in lengths.values()) == 1
    return dict(sorted(lengths.items()))


def huffman_codes(lengths):
    """Strings of 0 and 1, first bit first."""
    codes, code, length = {}, 0, 0
    for bits, byte in sorted((bits, byte) for byte, bits in lengths.items()):
        code <<= bits - length
        length = bits
        codes[byte] = format(code, f"0{bits}b") if bits else ""
        code += 1
    return codes


def huffman_table(lengths):
    return struct.pack("<H", len(lengths)) + b"".join(struct.pack("<BB", *entry) for entry in lengths.items())


def huffman_chunk(symbols, lengths, lanes):
    codes, escapes, far = split(symbols, lengths)
    words = huffman_codes(lengths)
    streams = []
    for lane in range(lanes):
        bits = "".join(words[byte] for byte in codes[lane::lanes])
        # Bit i of the lane has weight 2^i.
        streams.append(int(bits[::-1] or "0", 2).to_bytes((len(bits) + 7) // 8, "little"))
    out = struct.pack("<II", len(escapes), len(far))
    out += b"".join(struct.pack("<I", len(stream)) for stream in streams) + b"".join(streams)
    return out + bytes(escapes) + far_bytes(far)


def huffman_planes_chunk(symbols, lengths):
    codes, escapes, far = split(symbols, lengths)
    words = huffman_codes(lengths)
    # Inner nodes are the proper prefixes of the codes: by length, then from left to right.
    nodes = sorted({word[:i] for word in words.values() for i in range(len(word))}, key=lambda node: (len(node), node))
    out = struct.pack("<II", len(escapes), len(far))
    for node in nodes:
        bits = "".join(words[byte][len(node)] for byte in codes if words[byte].startswith(node))
        out += int(bits[::-1] or "0", 2).to_bytes((len(bits) + 7) // 8, "little")
    return out + bytes(escapes) + far_bytes(far)


def fixed_table(bits, base, has_escape):
    return struct.pack("<BBh", bits, has_escape, base)


def fixed_chunk(symbols, bits, base, has_escape):
    window = range(base, base + 2**bits - has_escape)
    core = {symbol + 128 for symbol in window} | ({ESCAPE} if has_escape else set())
    codes, escapes, far = split(symbols, core)
    fields = [0 if code == ESCAPE else code - 128 - base + has_escape for code in codes]
    tiles = [(fields[i : i + 64] + [0] * 64)[:64] for i in range(0, len(fields), 64)]
    if bits == 8:
        packed = bytes(fields)
    elif bits in (2, 4):
        together = 8 // bits
        packed = b""
        for i in range(0, len(tiles), together):
            group = tiles[i : i + together]
            packed += bytes(sum(tile[j] << (bits * t) for t, tile in enumerate(group)) for j in range(64))
    else:
        planes = [sum((tile[j] >> plane & 1) << j for j in range(64)) for tile in tiles for plane in range(bits)]
        packed = b"".join(struct.pack("<Q", plane) for plane in planes)
    return struct.pack("<II", len(escapes), len(far)) + packed + bytes(escapes) + far_bytes(far)


def tiered_tiers(pairs, widths):
    """By tier the pair bytes of the fields 1, 2, ...: the most frequent ones first; those that do not occur fill up."""
    counts = {byte: pairs.count(byte) for byte in range(1, 256)}
    ranked = sorted(counts, key=lambda byte: (-counts[byte], byte))
    tiers = []
    for bits in widths:
        tiers.append(sorted(ranked[: 2**bits - 1]))
        ranked = ranked[2**bits - 1 :]
    return tiers


def tiered_table(base, raw_bits, widths, tiers):
    return bytes([base, len(widths) + 16 * raw_bits, *widths]) + b"".join(bytes(tier) for tier in tiers)


# By width and tile of eight: where the bits of its fields lie, lowest first, as (line, bit).
TIERED_PLACES = {
    3: {t: [(t // 2, t % 2 * 3 + k) for k in range(3)] for t in range(6)} | {6: [(0, 6), (0, 7), (1, 6)], 7: [(2, 6), (2, 7), (1, 7)]},
    4: {t: [(t // 2, t % 2 * 4 + k) for k in range(4)] for t in range(8)},
    5: {t: [(t, k) for k in range(5)] for t in range(5)}
    | {5: [(0, 5), (0, 6), (0, 7), (1, 6), (1, 7)], 6: [(2, 5), (2, 6), (2, 7), (3, 6), (3, 7)], 7: [(4, 5), (4, 6), (4, 7), (1, 5), (3, 5)]},
    6: {4 * h + t: [(3 * h + t, k) for k in range(6)] for h in range(2) for t in range(3)}
    | {4 * h + 3: [(3 * h + k // 2, 6 + k % 2) for k in range(6)] for h in range(2)},
}


def tiered_lines(fields, bits):
    """Eight tiles of 64 fields to `bits` lines of 64 bytes; lines that no field touches are left out."""
    out = b""
    for start in range(0, len(fields), 512):
        lines = {}
        for i, field in enumerate(fields[start : start + 512]):
            tile, j = divmod(i, 64)
            for k, (line, bit) in enumerate(TIERED_PLACES[bits][tile]):
                lines.setdefault(line, [0] * 64)[j] |= (field >> k & 1) << bit
        out += b"".join(bytes(lines.get(line, [0] * 64)) for line in range(max(lines) + 1))
    return out


def split_pairs(symbols, base, raw_bits=0):
    """Pair bytes, raw bits of all symbols, and (position, symbol byte) of those outside the window, which are coded as its nibble 8."""
    places, listed = [], []
    for position, symbol in enumerate(symbols):
        place = symbol_byte(symbol) - base
        if symbol_byte(symbol) == 0 or not 0 <= place < 16 * 2**raw_bits:
            listed.append((position, symbol_byte(symbol)))
            place = 8 * 2**raw_bits
        places.append(place)
    pairs = []
    for position in range(len(symbols)):
        if position % 128 < 64:
            partner = places[position + 64] if position + 64 < len(symbols) else 0
            pairs.append(places[position] // 2**raw_bits + 16 * (partner // 2**raw_bits))
    return pairs, [place % 2**raw_bits for place in places], listed


def listed_bytes(listed):
    gaps = [position - before - 1 for (position, _), before in zip(listed, [-1] + [position for position, _ in listed])]
    return struct.pack(f"<{len(gaps)}H", *gaps) + bytes(byte for _, byte in listed)


def tiered_chunk(symbols, base, raw_bits, widths, tiers):
    pairs, raw, listed = split_pairs(symbols, base, raw_bits)
    counts, packed = [], []
    for bits, tier in zip(widths, tiers):
        fields = [tier.index(pair) + 1 if pair in tier else 0 for pair in pairs]
        counts.append(len(fields))
        packed.append(tiered_lines(fields, bits))
        pairs = [pair for pair, field in zip(pairs, fields) if field == 0]
    far = [(position, symbol) for position, symbol in enumerate(symbols) if symbol_byte(symbol) == 0]
    out = struct.pack(f"<{3 + len(counts[1:])}I", len(listed), len(far), len(pairs), *counts[1:])
    out += listed_bytes(listed) + bytes(pairs) + raw_lines(raw, raw_bits)
    return out + b"".join(reversed(packed)) + far_bytes(far)


def pair_frequencies(pairs, entries):
    """Frequencies of ESCAPE and the `entries` most frequent pair bytes, 256 in sum and none above 127; those that do not occur fill up."""
    counts = {byte: pairs.count(byte) for byte in range(1, 256)}
    ranked = sorted(counts, key=lambda byte: (-counts[byte], byte))[:entries]
    freqs = {ESCAPE: 1} | {byte: min(127, max(1, counts[byte] * 256 // len(pairs))) for byte in ranked}
    while sum(freqs.values()) != 256:
        step = 1 if sum(freqs.values()) < 256 else -1
        byte = max((byte for byte in freqs if freqs[byte] + step in range(1, 128)), key=lambda byte: (freqs[byte], byte))
        freqs[byte] += step
    return dict(sorted(freqs.items()))


def raw_lines(raw, raw_bits):
    """Bit `b` of a symbol's raw bits: the symbols of a lane follow each other, tile by tile, in the bits of the lane's bytes."""
    if raw_bits == 0:
        return b""
    tiles_per_line = 8 // raw_bits
    out = b""
    for start in range(0, len(raw), 64 * tiles_per_line):
        line = [0] * 64
        for i, value in enumerate(raw[start : start + 64 * tiles_per_line]):
            line[i % 64] += value * 2 ** (i // 64 * raw_bits)
        out += bytes(line)
    return out


def rans_pairs_table(base, raw_bits, freqs):
    return struct.pack("<BBH", base, raw_bits, len(freqs)) + b"".join(struct.pack("<BB", *entry) for entry in freqs.items())


def rans_pairs_chunk(symbols, base, raw_bits, freqs):
    pairs, raw, listed = split_pairs(symbols, base, raw_bits)
    codes = [pair if pair in freqs else ESCAPE for pair in pairs]
    escapes = [pair for pair, code in zip(pairs, codes) if code == ESCAPE]
    states, words = [256] * 64, []
    for i in reversed(range(len(codes))):
        states[i % 64] = rans_push(states[i % 64], words, codes[i], freqs, 16, 8, 8)
    far = [(position, symbol) for position, symbol in enumerate(symbols) if symbol_byte(symbol) == 0]
    out = struct.pack("<III", len(listed), len(far), len(escapes)) + listed_bytes(listed)
    out += bytes(state % 256 for state in states) + bytes(state // 256 for state in states)
    return out + bytes(escapes) + raw_lines(raw, raw_bits) + bytes(reversed(words)) + far_bytes(far)


def chunk_cases():
    seed = 0

    def case(codec, symbols, table, chunk):
        return {"codec": codec, "table": table.hex(), "symbols": symbols, "chunk": chunk.hex()}

    ans = [(16, 8, 7), (16, 8, 8), (16, 8, 3), (32, 16, 12), (32, 16, 9)]
    for state_bits, word_bits, prob_bits in ans:
        for n, spread, entries in [(1, 1, 4), (63, 2, 3), (300, 3, 7), (1000, 9, 31), (700, 30, 120), (200, 0, 1)]:
            entries = min(entries, 2**prob_bits - 1)
            seed += 1
            symbols = weights(n, spread, seed) if spread else [5] * n
            freqs = some_frequencies(some_core(symbols, entries), prob_bits)
            if state_bits == 16 and max(freqs.values()) > 255:
                freqs = {0: 1, 133: 255}
            widths = f"s{state_bits}-w{word_bits}-p{prob_bits}"
            for lanes in {1: (64,), 63: (1, 5), 300: (64,), 1000: (64, 32), 700: (8,), 200: (16,)}[n]:
                chunk = rans_chunk(symbols, freqs, state_bits, word_bits, prob_bits, lanes)
                yield case(f"rans/{widths}-l{lanes}", symbols, frequency_table(freqs), chunk)
            for block in (32, 256):
                chunk = block_ans_chunk(symbols, freqs, state_bits, word_bits, prob_bits, block)
                yield case(f"block-ans/{widths}-n{block}", symbols, frequency_table(freqs), chunk)
    for bits_max, lanes, n, spread, entries in [
        (12, 4, 1, 1, 4), (12, 4, 1000, 9, 31), (12, 1, 300, 3, 7), (8, 4, 700, 30, 100), (4, 3, 200, 3, 9), (1, 7, 100, 1, 1), (12, 64, 500, 20, 60), (5, 2, 64, 0, 1),
    ]:
        seed += 1
        symbols = weights(n, spread, seed) if spread else [-5] * n
        lengths = some_code_lengths(some_core(symbols, entries), bits_max)
        yield case(f"huffman/c{bits_max}-l{lanes}", symbols, huffman_table(lengths), huffman_chunk(symbols, lengths, lanes))
        yield case(f"huffman/c{bits_max}-planes", symbols, huffman_table(lengths), huffman_planes_chunk(symbols, lengths))
    for bits in range(2, 9):
        for n in (1, 64, 130, 333):
            seed += 1
            symbols = weights(n, 2 ** (bits - 2), seed)
            base = 1 - 2 ** (bits - 1)
            yield case(f"fixed/b{bits}", symbols, fixed_table(bits, base, 1), fixed_chunk(symbols, bits, base, 1))
            if bits < 8:
                symbols = [Generator(seed + i).below(2**bits) - 2 ** (bits - 1) for i in range(n)]
                base = -(2 ** (bits - 1))
                yield case(f"fixed/b{bits}", symbols, fixed_table(bits, base, 0), fixed_chunk(symbols, bits, base, 0))
    for widths in [(), (3,), (4,), (5,), (6,), (4, 3), (3, 5), (6, 6), (4, 4, 5), (5, 3, 4), (6, 5, 3)]:
        for n, base in [(1, 120), (64, 120), (67, 122), (200, 118), (640, 120), (1000, 120), (1200, 119)]:
            seed += 1
            symbols = weights(n, 2 + len(widths), seed)
            tiers = tiered_tiers(split_pairs(symbols, base)[0], widths)
            yield case("tiered", symbols, tiered_table(base, 0, widths, tiers), tiered_chunk(symbols, base, 0, widths, tiers))
    for raw_bits, base, spread in [(0, 120, 3), (0, 123, 4), (1, 112, 7), (1, 110, 9), (2, 96, 14), (2, 99, 20)]:
        for n, entries in [(1, 2), (63, 3), (67, 7), (128, 20), (200, 60), (640, 40), (1000, 255), (1200, 100)]:
            seed += 1
            symbols = weights(n, spread, seed)
            freqs = pair_frequencies(split_pairs(symbols, base, raw_bits)[0], entries)
            table = rans_pairs_table(base, raw_bits, freqs)
            yield case("rans-pairs", symbols, table, rans_pairs_chunk(symbols, base, raw_bits, freqs))
    for raw_bits, base, widths in [(1, 112, ()), (1, 110, (6, 5)), (1, 113, (4, 4, 5)), (2, 96, (3,)), (2, 99, (6, 6, 6))]:
        for n in [1, 64, 67, 200, 640, 1000, 1200]:
            seed += 1
            symbols = weights(n, 7 * raw_bits, seed)
            tiers = tiered_tiers(split_pairs(symbols, base, raw_bits)[0], widths)
            yield case("tiered", symbols, tiered_table(base, raw_bits, widths, tiers), tiered_chunk(symbols, base, raw_bits, widths, tiers))


def compositions(total, parts):
    """All ways to write `total` as an ordered sum of `parts` positive integers."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        ends = (0, *cuts, total)
        yield [b - a for a, b in zip(ends, ends[1:])]


def complete_lengths(parts, bits_max):
    if parts == 1:
        yield [0]
        return
    for lengths in itertools.product(range(1, bits_max + 1), repeat=parts):
        if sum(2 ** (bits_max - bits) for bits in lengths) == 2**bits_max:
            yield lengths


def least_bits(counts, entry_bits, prices):
    """The cheapest table over every core alphabet; `prices(weights)` yields the code bits of every possible table."""
    least = math.inf
    core_symbols = [symbol for symbol in counts if -127 <= symbol <= 127]
    for size in range(len(core_symbols) + 1):
        for core in itertools.combinations(core_symbols, size):
            escaped = sum(count for symbol, count in counts.items() if symbol not in core)
            escaped_core = sum(counts[symbol] for symbol in core_symbols if symbol not in core)
            far = escaped - escaped_core
            alphabet = [counts[symbol] for symbol in core] + ([escaped] if escaped else [])
            for code_bits in prices(alphabet):
                # A far symbol has an escape byte as well.
                least = min(least, code_bits + 8 * escaped_core + 8 * far + entry_bits * len(alphabet))
    return least


def table_cases():
    samples = [
        {0: 1000, 1: 500, -1: 480, 2: 20},
        {0: 10, 1: 9, -1: 9, 5: 1},
        {0: 100000, 3: 1, 4: 1},
        {-2: 300, -1: 700, 0: 1100, 1: 650, 2: 310},
        {0: 50, 1: 40, 300: 3},
        {0: 5000, 1: 4000, -1: 4100, 2: 900, -32768: 1},
        {7: 12},
        {400: 7, -400: 7},
        {-127: 8, 127: 8, 0: 9, 1: 7},
    ]
    for counts in samples:
        for prob_bits in (2, 3, 4):
            slots = 2**prob_bits

            def rans_prices(alphabet):
                if len(alphabet) > slots:
                    return
                for freqs in compositions(slots, len(alphabet)):
                    yield sum(n * (prob_bits - math.log2(freq)) for n, freq in zip(alphabet, freqs))

            codec = f"rans/s16-w8-p{prob_bits}-l64"
            yield {"codec": codec, "counts": sorted(counts.items()), "least_bits": least_bits(counts, 24, rans_prices)}
        for bits_max in (2, 3, 5):

            def huffman_prices(alphabet):
                for lengths in complete_lengths(len(alphabet), bits_max):
                    yield sum(n * bits for n, bits in zip(alphabet, lengths))

            codec = f"huffman/c{bits_max}-l4"
            yield {"codec": codec, "counts": sorted(counts.items()), "least_bits": least_bits(counts, 16, huffman_prices)}


def write(name, cases):
    path = GOLDEN / name
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    path.write_text(f"[\n{lines}\n]\n")
    print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    write("chunks.json", list(chunk_cases()))
    write("tables.json", list(table_cases()))
