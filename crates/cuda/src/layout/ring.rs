//! The ring in shared memory through which a warp reads its tile, simulated.
//!
//! Word `w` of all 64 streams is *row* `w`. Rows arrive in groups of four; the ring holds four groups, all asked for at the start, and two
//! have arrived before superstep 0. At the head of each superstep the warp may wait for one more group, and then ask for one more, which
//! takes the place of the oldest. Both are decided here, once and for all, and stored: bit 1 of a superstep's two bits says wait, bit 0 ask.
//! So lanes need not vote.
//!
//! A stream holds three words in registers and has loaded 3 + bits / 32 rows when it has consumed that many bits; loads beyond its end read
//! whatever lies there, and nobody looks at it.

use super::{GROUP_WORDS, RING_GROUPS, STREAMS};

/// Groups that have arrived before superstep 0: eight rows, of which it needs six at most (8 codes of 14 bits).
pub(super) const GROUPS_AT_START: usize = 2;

/// Rows that a stream has loaded when it has consumed `bits`.
pub(super) fn rows_loaded(bits: usize) -> u16 {
    (3 + bits / 32) as u16
}

/// A stream needs rows that the ring cannot hold yet, because another is too far behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overrun {
    /// The superstep in which it happens.
    pub superstep: usize,
    /// Rows that can be there by then.
    pub rows: usize,
}

/// The schedule of a tile.
///
/// `loaded`: (supersteps + 1,) rows that each stream has loaded before each superstep and at the end; `lens`: words of each stream.
pub(super) fn schedule(loaded: &[[u16; STREAMS]], lens: &[u16; STREAMS]) -> Result<u64, Overrun> {
    let rows = usize::from(lens.iter().copied().max().unwrap_or(0));
    let groups = rows.div_ceil(GROUP_WORDS);
    let (mut asked, mut arrived, mut schedule) = (RING_GROUPS, GROUPS_AT_START, 0u64);
    for superstep in 0..loaded.len() - 1 {
        let needed = loaded[superstep + 1].iter().zip(lens).map(|(&loaded, &len)| loaded.min(len)).max().unwrap_or(0);
        let needed = usize::from(needed).div_ceil(GROUP_WORDS);
        if needed > asked {
            return Err(Overrun { superstep, rows: asked * GROUP_WORDS });
        }
        // a superstep takes 3.5 rows at most, so one more group always suffices
        if needed > arrived {
            schedule |= 2 << (2 * superstep);
            arrived += 1;
        }
        // the oldest group may go when every stream has loaded it or has come to its end
        let behind =
            loaded[superstep].iter().zip(lens).map(|(&loaded, &len)| if loaded >= len { u16::MAX } else { loaded }).min().unwrap_or(0);
        if asked < groups && usize::from(behind) >= (asked - RING_GROUPS + 1) * GROUP_WORDS {
            schedule |= 1 << (2 * superstep);
            asked += 1;
        }
    }
    Ok(schedule)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Streams of which each consumes a constant number of bits per superstep.
    fn streams(bits: [usize; STREAMS], supersteps: usize) -> (Vec<[u16; STREAMS]>, [u16; STREAMS]) {
        let loaded = (0..=supersteps).map(|superstep| bits.map(|bits| rows_loaded(bits * superstep))).collect();
        (loaded, bits.map(|bits| (bits * supersteps + 2).div_ceil(32) as u16))
    }

    #[test]
    fn equal_streams_never_overrun() {
        for bits in 8..=112 {
            for supersteps in 1..=32 {
                let (loaded, lens) = streams([bits; STREAMS], supersteps);
                assert!(schedule(&loaded, &lens).is_ok(), "{bits} bits, {supersteps} supersteps");
            }
        }
    }

    #[test]
    fn a_slow_stream_holds_the_ring() {
        let mut bits = [112; STREAMS];
        bits[7] = 8;
        let (loaded, lens) = streams(bits, 32);
        // 16 rows: 3 + 3.5 s > 16 first after superstep 3; row 3 of stream 7 is loaded after 32 / 8 = 4 supersteps
        assert_eq!(schedule(&loaded, &lens), Err(Overrun { superstep: 3, rows: 16 }));
        // it has come to its end at once
        let mut lens = lens;
        lens[7] = 3;
        assert!(schedule(&loaded, &lens).is_ok());
    }

    #[test]
    fn schedule_by_hand() {
        // 64 bits, 2 rows a superstep: 3, 5, 7, 9, 11 .. rows; 17 rows in all, so one group is asked for besides the first four
        let (loaded, mut lens) = streams([64; STREAMS], 8);
        lens.fill(17);
        // waits: more than 8 rows at the end of superstep 2, more than 12 in 4, more than 16 in 6; asks: four rows loaded before superstep 1
        assert_eq!(schedule(&loaded, &lens), Ok(2 << 4 | 2 << 8 | 2 << 12 | 1 << 2));
    }
}
