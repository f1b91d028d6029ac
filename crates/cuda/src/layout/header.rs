//! What the kernels must know of the layouts, as CUDA C++.

use super::{
    ATTENTION_SPLITS, ATTENTION_WARPS, CODE_BITS_MAX, GROUP_WORDS, RING_GROUPS, STEP_FETCH_CYCLES, STEP_FETCHED, STEP_HIDDEN_MAX,
    STEP_PACE, STEP_SLOT, STEP_WARPS, STREAMS, SUPERSTEP_COLS, SUPERSTEPS_MAX, TILE_COLS_MAX, TILE_ROWS,
};

/// `constexpr` definitions of the constants that kernels share with this crate, to be put before their source.
pub fn header() -> String {
    let group_bytes = GROUP_WORDS * STREAMS * size_of::<u32>();
    let constants = [
        ("TILE_ROWS", TILE_ROWS, "rows of a tile"),
        ("SUPERSTEP", SUPERSTEP_COLS, "columns of a superstep"),
        ("SUPERSTEPS_MAX", SUPERSTEPS_MAX, "most supersteps in a tile"),
        ("TILE_COLS_MAX", TILE_COLS_MAX, "most columns of a tile"),
        ("GROUP_ROWS", GROUP_WORDS, "rows of 64 words in a group of the ring"),
        ("GROUP_BYTES", group_bytes, "bytes of a group"),
        ("RING_GROUPS", RING_GROUPS, "groups that the ring holds"),
        ("RING_BYTES", (RING_GROUPS + 1) * group_bytes, "bytes of a warp's ring: its first group is stored twice"),
        ("CODE_BITS_MAX", CODE_BITS_MAX as usize, "longest code"),
        ("SPLITS", ATTENTION_SPLITS, "blocks that share the positions of a head"),
        ("ATTENTION_WARPS", ATTENTION_WARPS, "warps of a crew of attention"),
        ("STEP_WARPS", STEP_WARPS, "warps of a block of step"),
        ("STEP_HIDDEN_MAX", STEP_HIDDEN_MAX, "widest residual stream that step was made for"),
        ("STEP_SLOT", STEP_SLOT, "supersteps in a slot of a warp of step"),
        ("STEP_PACE", STEP_PACE, "slots that a warp of step has ahead before it asks for one at a time"),
        ("STEP_FETCHED", STEP_FETCHED, "slots of a warp of step that wait in the L2 cache"),
        ("STEP_FETCH_CYCLES", STEP_FETCH_CYCLES, "between two of them"),
    ];
    let mut text = String::from("// generated from crates/cuda/src/layout: do not edit\n");
    for (name, value, meaning) in constants {
        text += &format!("constexpr int {name} = {value}; // {meaning}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn header_states_the_ring() {
        let header = super::header();
        for line in [
            "constexpr int GROUP_ROWS = 4;",
            "constexpr int GROUP_BYTES = 1024;",
            "constexpr int RING_BYTES = 5120;",
            "constexpr int TILE_COLS_MAX = 4096;",
        ] {
            assert!(header.contains(line), "{line} not in\n{header}");
        }
    }
}
