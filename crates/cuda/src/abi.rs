//! Argument structures of the kernels, field for field as `kernels/common.cuh`, `kernels/transformer.cuh`, `rans.cuh`, `ops.cu` and `step.cu` declare them. Addresses
//! are on the device. A test compares the sizes with what the CUDA compiler says.

/// `Quad`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quad {
    pub words: u64,
    pub head: u64,
    pub lens: u64,
    pub sched: u64,
    pub far_off: u64,
    pub far: u64,
    pub patch_off: u64,
    pub patches: u64,
    pub planes: u64,
    pub table: u64,
    pub table_bytes: u32,
    pub mask: u32,
    pub lane_mask: u32,
    pub magic: u32,
    pub row_tiles: i32,
    pub segs: i32,
    pub tc: i32,
    pub n: i32,
    pub k: i32,
    pub one: i32,
    pub block_segs: i32,
    pub unused: i32,
}

/// `Plain`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain {
    pub nibbles: u64,
    pub planes: u64,
    pub far_off: u64,
    pub far: u64,
    pub row_tiles: i32,
    pub segs: i32,
    pub tc: i32,
    pub n: i32,
    pub k: i32,
    pub split: i32,
}

/// `Act`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Act {
    pub frag: u64,
    pub q: u64,
    pub info: u64,
}

/// `Sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums {
    pub sum: u64,
    pub unit: u64,
    pub scale: u64,
    pub bias: u64,
    pub n: i32,
    pub unused: i32,
}

/// `Prepare`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prepare {
    pub x: u64,
    pub stats: u64,
    pub weight: u64,
    pub rows: u64,
    pub add: Sums,
    pub frag: u64,
    pub q: u64,
    pub info: u64,
    pub unit: u64,
    pub clear: u64,
    pub eps: f32,
    pub cols: i32,
    pub k: i32,
    pub tokens: i32,
    pub nt: i32,
    pub up_row: i32,
    pub clear_n: i32,
    pub head_dim: i32,
}

/// `Place`: where a token's keys and values are.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Address of the keys, f16, (layers, kv_heads, capacity, head_dim).
    pub keys: u64,
    /// Address of the values, likewise.
    pub values: u64,
    /// Position of the token.
    pub position: u32,
    /// Positions of the cache.
    pub capacity: u32,
}

/// `Rope`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rope {
    pub sums: Sums,
    pub q_norm: u64,
    pub k_norm: u64,
    pub turn: u64,
    pub places: u64,
    pub q: u64,
    pub eps: f32,
    pub per_dim: f32,
    pub layer: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub k_row: i32,
    pub v_row: i32,
}

/// `Attention`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    pub q: u64,
    pub places: u64,
    pub out: u64,
    pub stats: u64,
    pub scale: f32,
    pub layer: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub window: i32,
}

/// `Attend`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attend {
    pub rope: Rope,
    pub attention: Attention,
}

/// `StepProduct`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepProduct {
    pub matrix: Plain,
    pub scale: u64,
    pub bias: u64,
    pub sums: u64,
    pub arrivals: u64,
}

/// `StepLayer`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepLayer {
    pub products: [StepProduct; 4],
    pub input_norm: u64,
    pub post_norm: u64,
    pub q_norm: u64,
    pub k_norm: u64,
    pub window: i32,
    pub unused: i32,
}

/// `Divisor`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Divisor {
    pub by: u32,
    pub magic: u32,
}

impl Divisor {
    pub fn new(by: u32) -> Self {
        Self { by, magic: (1u64 << 32).div_ceil(by.into()) as u32 }
    }
}

/// `Places`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    pub ring: i32,
    pub bars: i32,
    pub x: i32,
    pub frag: i32,
    pub info: i32,
    pub parts: i32,
    pub warps: i32,
    pub nibbles: i32,
    pub plan: i32,
}

/// `Step`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub layers: u64,
    pub head: StepProduct,
    pub final_norm: u64,
    pub given: u64,
    pub input: u64,
    pub parts: u64,
    pub stats: u64,
    pub qkv: u64,
    pub mixed: u64,
    pub active: u64,
    pub logits: u64,
    pub unfit: u64,
    pub answers: u64,
    pub eps: f32,
    pub scale: f32,
    pub layer_count: i32,
    pub hidden: i32,
    pub padded_hidden: i32,
    pub intermediate: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub k_row: i32,
    pub v_row: i32,
    pub up_row: i32,
    pub vocab: i32,
    pub turn_at: i32,
    pub place_at: i32,
    pub slots: i32,
    pub parts_max: i32,
    pub per_dim: f32,
    pub per_column: f32,
    pub group: Divisor,
    pub at: Places,
    pub plan: [i32; 6],
}

/// `RansChunk`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct RansChunk {
    pub offset: u64,
    pub words: u32,
    pub escapes: u32,
    pub row_tile: u32,
    pub row_tiles: u32,
}

/// `RansJob`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct RansJob {
    pub payload: u64,
    pub chunks: u64,
    pub table: u64,
    pub nibbles: u64,
    pub planes: u64,
    pub far: u64,
    pub far_count: u64,
    pub status: u64,
    pub col_steps: u32,
    pub row_tiles: u32,
    pub tc: u32,
    pub r: u32,
    pub far_capacity: u32,
    pub first_chunk: u32,
    pub raw_bits: u32,
    pub base: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the parameters of a kernel, in order, as the compiler lays them out.
    fn parameters(ptx: &str, kernel: &str) -> Vec<usize> {
        let (_, rest) = ptx.split_once(&format!(".visible .entry {kernel}(")).unwrap_or_else(|| panic!("no kernel {kernel}"));
        let (list, _) = rest.split_once(')').unwrap();
        let bytes = |line: &str| match line.rsplit_once('[') {
            Some((_, size)) => size.trim_end_matches([']', ',']).parse().unwrap(),
            None if line.contains(".u64") || line.contains(".b64") => 8,
            None => 4,
        };
        list.lines().map(str::trim).filter(|line| line.starts_with(".param")).map(bytes).collect()
    }

    #[test]
    fn structures_are_as_large_as_the_kernels_think() {
        let [quad, plain, rans, rans_pairs, ops] = [
            include_str!("kernels/ptx/quad.ptx"),
            include_str!("kernels/ptx/plain.ptx"),
            include_str!("kernels/ptx/rans.ptx"),
            include_str!("kernels/ptx/rans_pairs.ptx"),
            include_str!("kernels/ptx/ops.ptx"),
        ];
        let act = size_of::<Act>();
        assert_eq!(parameters(quad, "quad_r1_t8"), [size_of::<Quad>(), act, 8]);
        assert_eq!(parameters(quad, "quad_store"), [size_of::<Quad>(), 8]);
        assert_eq!(parameters(plain, "plain_r2_t32"), [size_of::<Plain>(), act, 8]);
        assert_eq!(parameters(rans, "rans_decode"), [size_of::<RansJob>()]);
        assert_eq!(parameters(rans_pairs, "rans_pairs_decode"), [size_of::<RansJob>()]);
        for kernel in ["prepare_norm", "prepare_copy", "prepare_silu", "prepare_mix"] {
            assert_eq!(parameters(ops, kernel), [size_of::<Prepare>()], "{kernel}");
        }
        assert_eq!(parameters(ops, "rope"), [size_of::<Rope>()]);
        assert_eq!(parameters(ops, "attention_128"), [size_of::<Attention>()]);
        assert_eq!(parameters(ops, "attend_128"), [size_of::<Attend>()]);
        assert_eq!(parameters(ops, "logits"), [size_of::<Sums>(), 8, 4]);
        // step.cu, of which there is no PTX for old GPUs, asserts the same.
        assert_eq!((size_of::<StepLayer>(), size_of::<Step>()), (392, 328));
        assert_eq!(size_of::<Place>(), 24);
        assert_eq!(size_of::<RansChunk>(), 24);
    }
}
