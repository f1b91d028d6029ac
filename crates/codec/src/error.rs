//! One error enum per operation; every field has its unit in its name or in its text.

use thiserror::Error;

/// A codec id or codec parameters that mean nothing here.
#[derive(Error, Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParamsError {
    /// The text is neither a full id nor a short name.
    #[error(
        "unknown codec {id:?}; known: rans, rans-precise, huffman, block-ans, tiered, rans-pairs, fixed, or a full id such as rans/s16-w8-p7-l64"
    )]
    UnknownId {
        /// The text as given.
        id: String,
    },
    /// A parameter outside the range that the layout can hold.
    #[error("codec parameter {parameter} is {value}, allowed is {allowed}")]
    OutOfRange {
        /// Name of the parameter.
        parameter: &'static str,
        /// Its value.
        value: u32,
        /// What would be allowed.
        allowed: &'static str,
    },
}

/// A table that cannot be built, or table bytes that describe none.
#[derive(Error, Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// The codec itself is impossible.
    #[error(transparent)]
    Params(#[from] ParamsError),
    /// A table needs at least one symbol.
    #[error("no symbols to build a table from")]
    EmptyHistogram,
    /// The bytes end too early.
    #[error("table needs {needed_bytes} bytes, {available_bytes} are there")]
    Truncated {
        /// Bytes that the header asks for.
        needed_bytes: usize,
        /// Bytes given.
        available_bytes: usize,
    },
    /// Bytes follow the table.
    #[error("{extra_bytes} bytes follow the table")]
    TrailingBytes {
        /// How many.
        extra_bytes: usize,
    },
    /// No entry, or more than the codec can number.
    #[error("table has {entries} entries, allowed is 1..={entries_max}")]
    EntryCount {
        /// Entries announced.
        entries: usize,
        /// Most that the codec can number.
        entries_max: usize,
    },
    /// Symbol bytes must ascend strictly.
    #[error("table entry {entry}: symbol bytes do not ascend")]
    NotAscending {
        /// Index of the offending entry.
        entry: usize,
    },
    /// A frequency of zero or above what the decoder's tables hold.
    #[error("table entry {entry}: frequency {freq}, allowed is 1..={freq_max}")]
    Frequency {
        /// Index of the offending entry.
        entry: usize,
        /// Its frequency.
        freq: u32,
        /// Largest frequency allowed.
        freq_max: u32,
    },
    /// Frequencies must sum to `2^prob_bits`.
    #[error("frequencies sum to {sum}, not to {expected}")]
    FrequencySum {
        /// Their sum.
        sum: u32,
        /// `2^prob_bits`.
        expected: u32,
    },
    /// A code length above `code_bits_max`, or zero with more than one entry.
    #[error("table entry {entry}: code of {code_bits} bits, allowed is 1..={code_bits_max} (0 for a lone entry)")]
    CodeBits {
        /// Index of the offending entry.
        entry: usize,
        /// Its code length.
        code_bits: u8,
        /// Longest code allowed.
        code_bits_max: u8,
    },
    /// The code lengths leave codes unused or use some twice.
    #[error("code lengths fill {sum} of {expected} leaves")]
    KraftSum {
        /// Sum of `2^(code_bits_max - code_bits)`.
        sum: u32,
        /// `2^code_bits_max`.
        expected: u32,
    },
    /// The window of a `fixed` table leaves the core symbols, or flags are impossible.
    #[error("fixed table: base {base} with escape flag {escape_flag} does not fit {bits} bits")]
    Window {
        /// First symbol of the window.
        base: i16,
        /// The flag byte.
        escape_flag: u8,
        /// Bits a field.
        bits: u8,
    },
    /// The `fixed` table was written for another field width.
    #[error("fixed table is for {stored} bits, the codec says {expected}")]
    BitsMismatch {
        /// Bits in the table.
        stored: u8,
        /// Bits in the codec.
        expected: u8,
    },
    /// A `tiered` table of more tiers than there can be.
    #[error("tiered table of {tiers} tiers, allowed is 0..={tiers_max}")]
    Tiers {
        /// Tiers announced.
        tiers: usize,
        /// Most tiers allowed.
        tiers_max: usize,
    },
    /// A window of `tiered` or `rans-pairs` that does not lie in the core alphabet.
    #[error("window begins with symbol byte {base}, allowed is 1..={base_max}")]
    PairWindow {
        /// Symbol byte of its first symbol.
        base: u8,
        /// The last one allowed.
        base_max: u8,
    },
    /// More raw bits than a window of `tiered` or `rans-pairs` can have.
    #[error("{raw_bits} raw bits a symbol, allowed is 0..={raw_bits_max}")]
    RawBits {
        /// Raw bits announced.
        raw_bits: u8,
        /// Most raw bits allowed.
        raw_bits_max: u8,
    },
    /// A `rans-pairs` table whose first entry is not ESCAPE.
    #[error("table has no entry for ESCAPE")]
    NoEscape,
    /// Fields that no layout is made for.
    #[error("tier {tier}: fields of {bits} bits, allowed is 3..=6")]
    TierBits {
        /// Index of the tier.
        tier: usize,
        /// Bits a field.
        bits: u8,
    },
    /// The pair bytes of a tier must ascend from 1 on, and occur in no other tier.
    #[error("tier {tier}: pair byte {pair_byte} of field {field} is 0, out of order, or in an earlier tier")]
    TierPair {
        /// Index of the tier.
        tier: usize,
        /// The field value.
        field: usize,
        /// Its pair byte.
        pair_byte: u8,
    },
}

/// Symbols that a table cannot code.
#[derive(Error, Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum EncodeError {
    /// Chunks hold at least one symbol.
    #[error("a chunk of no symbols")]
    Empty,
    /// Positions in a chunk are 32 bits wide, and so are the lengths of its parts.
    #[error("{symbols} symbols in one chunk, at most {symbols_max} are possible")]
    TooLong {
        /// Symbols given.
        symbols: usize,
        /// Most that a chunk may hold.
        symbols_max: usize,
    },
    /// A symbol without an entry, and the table has no escape.
    #[error("symbol {symbol} at position {position} is not in the table, which has no escape")]
    SymbolNotInTable {
        /// Index in the chunk, in symbols.
        position: usize,
        /// The symbol.
        symbol: i16,
    },
}

/// Chunk bytes that do not decode. All variants mean that the bytes are corrupt (or belong to
/// another table or length).
#[derive(Error, Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// Chunks hold at least one symbol.
    #[error("a chunk of no symbols")]
    Empty,
    /// More symbols asked for than a chunk can hold.
    #[error("{symbols} symbols in one chunk, at most {symbols_max} are possible")]
    TooLong {
        /// Symbols asked for.
        symbols: usize,
        /// Most that a chunk may hold.
        symbols_max: usize,
    },
    /// The parts announced by the header do not fit in the chunk.
    #[error("chunk needs {needed_bytes} bytes, {available_bytes} are there")]
    Truncated {
        /// Bytes that the header asks for.
        needed_bytes: u64,
        /// Bytes given.
        available_bytes: u64,
    },
    /// The parts announced by the header leave bytes unused.
    #[error("chunk has {extra_bytes} bytes more than its parts")]
    TrailingBytes {
        /// How many.
        extra_bytes: u64,
    },
    /// The words are not a whole number of `word_bits`.
    #[error("{words_bytes} bytes of words are no whole number of {word_bits}-bit words")]
    WordAlignment {
        /// Length of the words part.
        words_bytes: usize,
        /// Width of a word.
        word_bits: u8,
    },
    /// A symbol needs a word, and none is left.
    #[error("words exhausted: {available_words} there, one more needed")]
    WordsExhausted {
        /// Words in the stream.
        available_words: usize,
    },
    /// All symbols are decoded, and words are left.
    #[error("{left_words} words left after the last symbol")]
    WordsLeft {
        /// How many.
        left_words: usize,
    },
    /// A lane did not return to where its encoder began.
    #[error("lane {lane} ends in state {state}, not in {expected}")]
    FinalState {
        /// Lane; for `block-ans` the block in the chunk.
        lane: usize,
        /// Its final state.
        state: u32,
        /// `STATE_MIN`.
        expected: u32,
    },
    /// A lane's bits end elsewhere than its symbols.
    #[error("lane {lane}: symbols take {used_bits} bits, the lane has {available_bits}")]
    LaneBits {
        /// Lane.
        lane: usize,
        /// Bits that its symbols took.
        used_bits: u64,
        /// Bits that the lane has.
        available_bits: u64,
    },
    /// The bit planes end before one of them does.
    #[error("bit plane {plane} needs {needed_bytes} bytes, {available_bytes} are there")]
    PlaneTruncated {
        /// Inner node of the code tree.
        plane: usize,
        /// Bytes for the symbols that reach it.
        needed_bytes: usize,
        /// Bytes left for it.
        available_bytes: usize,
    },
    /// Bits that no symbol uses must be zero.
    #[error("unused bits are not zero")]
    PaddingNotZero,
    /// A symbol is escaped, and no escape byte is left.
    #[error("an escaped symbol at position {position}, and no escape byte is left")]
    EscapesExhausted {
        /// Index in the chunk, in symbols.
        position: usize,
    },
    /// All symbols are decoded, and escape bytes are left.
    #[error("{left_bytes} escape bytes left after the last symbol")]
    EscapesLeft {
        /// How many.
        left_bytes: usize,
    },
    /// A block without room for its state.
    #[error("block {block} of {block_bytes} bytes does not hold a state")]
    BlockTruncated {
        /// Block in the chunk.
        block: usize,
        /// Its length.
        block_bytes: usize,
    },
    /// The words and the escapes of a block do not meet.
    #[error("block {block}: words and escapes leave {gap_bytes} bytes between them")]
    BlockGap {
        /// Block in the chunk.
        block: usize,
        /// Bytes between the two.
        gap_bytes: usize,
    },
    /// A tier of a `tiered` chunk with more pairs than the tier before can escape.
    #[error("tier {tier} has {pairs} pairs, the one before {pairs_max}")]
    TierTooLong {
        /// Index of the tier.
        tier: usize,
        /// Its pairs.
        pairs: usize,
        /// Pairs of the tier before.
        pairs_max: usize,
    },
    /// A tier does not escape as many pairs as follow in the next one.
    #[error("tier {tier} escapes {escapes} pairs, behind it are {pairs}")]
    TierCount {
        /// Index of the tier.
        tier: usize,
        /// Pairs that it escapes.
        escapes: usize,
        /// Pairs of the next tier, or escape bytes.
        pairs: usize,
    },
    /// The last listed symbol of a chunk of pairs lies behind its end.
    #[error("listed symbol at position {position} of {symbols} symbols")]
    ListedOutside {
        /// Position in the chunk, in symbols.
        position: usize,
        /// Symbols of the chunk.
        symbols: usize,
    },
    /// A listed symbol of a chunk of pairs is not coded as one.
    #[error("listed symbol at position {position} is not coded as one")]
    ListedNibble {
        /// Position in the chunk, in symbols.
        position: usize,
    },
    /// A far entry out of order, outside the chunk, or with a symbol that is not far.
    #[error("far entry {entry}: position {position}, symbol {symbol} is out of order or not far")]
    FarEntry {
        /// Index in the far list.
        entry: usize,
        /// Its position in the chunk.
        position: u32,
        /// Its symbol.
        symbol: i16,
    },
    /// The far list and the escape bytes of value 0 do not name the same positions.
    #[error("far list and escape bytes disagree at position {position}")]
    FarMismatch {
        /// Index in the chunk, in symbols.
        position: usize,
    },
}
