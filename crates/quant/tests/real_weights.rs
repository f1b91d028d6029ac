//! On trained weights (`shared/data/books-52m`, found in a directory above): the rate model against true histograms, and the solver
//! against what quantizing gives. Skipped with a notice where the data is absent, unless `TERSOR_REQUIRE` contains `data`.

use std::collections::BTreeMap;
use std::path::Path;
use tersor_quant::{
    Dtype, EcsqParams, Grid, GridChoice, Plan, RateModel, RateTarget, RateTensor, Role, Rows, entropy_cost_bits, quantize, solve_step,
    sqnr_db,
};

/// The 2-D tensors of a safetensors file, bf16.
struct Checkpoint {
    bytes: Vec<u8>,
    tensors: BTreeMap<String, (usize, usize, usize)>,
}

struct Bf16Rows<'a> {
    bytes: &'a [u8],
    rows: usize,
    cols: usize,
}

impl Rows for Bf16Rows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn dtype(&self) -> Dtype {
        Dtype::Bf16
    }
    fn read(&self, row: usize, out: &mut [f32]) {
        let bytes = &self.bytes[row * self.cols * 2..][..self.cols * 2];
        for (w, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *w = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        }
    }
}

impl Checkpoint {
    fn open() -> Option<Checkpoint> {
        let found = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .map(|dir| dir.join("shared/data/books-52m/model.safetensors"))
            .find(|path| path.exists());
        let Some(path) = found else {
            let required = std::env::var("TERSOR_REQUIRE").is_ok_and(|r| r.contains("data"));
            assert!(!required, "TERSOR_REQUIRE wants data, and there is no shared/data/books-52m above this crate");
            println!("SKIPPED: no shared/data/books-52m above this crate");
            return None;
        };
        let bytes = std::fs::read(path).unwrap();
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
        let number = |v: &serde_json::Value| v.as_u64().unwrap() as usize;
        let tensors = header
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, t)| t["shape"].as_array().is_some_and(|s| s.len() == 2))
            .map(|(name, t)| {
                assert_eq!(t["dtype"], "BF16");
                let begin = 8 + header_bytes + number(&t["data_offsets"][0]);
                (name.clone(), (begin, number(&t["shape"][0]), number(&t["shape"][1])))
            })
            .collect();
        Some(Checkpoint { bytes, tensors })
    }

    fn rows(&self, name: &str) -> Bf16Rows<'_> {
        let (begin, rows, cols) = self.tensors[name];
        Bf16Rows { bytes: &self.bytes[begin..][..rows * cols * 2], rows, cols }
    }
}

/// Entropy of the symbols, bits per symbol.
fn entropy(symbols: &[i16]) -> f64 {
    let mut counts = vec![0u32; 1 << 16];
    symbols.iter().for_each(|&s| counts[(s as u16) as usize] += 1);
    let n = symbols.len() as f64;
    counts.iter().filter(|&&c| c > 0).map(|&c| -(f64::from(c) / n) * (f64::from(c) / n).log2()).sum()
}

#[test]
fn estimated_entropy_and_error_are_true() {
    let Some(checkpoint) = Checkpoint::open() else { return };
    let mut worst = (0.0f64, String::new());
    for name in [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.6.mlp.down_proj.weight",
        "model.layers.13.self_attn.v_proj.weight",
    ] {
        let rows = checkpoint.rows(name);
        let model = RateModel::measure(&rows).unwrap();
        for grid in [Grid::Row, Grid::Tensor] {
            for (relative_step, rounding) in [(0.07, 0.5), (0.15, 0.5), (0.3, 0.5), (0.3, 0.4), (0.6, 0.5), (1.1, 0.5), (1.6, 0.4)] {
                let tensor = quantize(&Plan::Ecsq(EcsqParams { grid, relative_step, rounding }), &rows).unwrap();
                let (step, offset) = (f64::from(relative_step), f64::from(rounding));
                let (estimate, truth) = (model.entropy_bits(grid, step, offset), entropy(&tensor.symbols));
                let at = format!("{name} {grid:?} step {relative_step} rounding {rounding}: {estimate:.5} for {truth:.5}");
                assert!((estimate - truth).abs() < 0.003, "{at}");
                if (estimate - truth).abs() > worst.0 {
                    worst = ((estimate - truth).abs(), at.clone());
                }
                // least squares per row does no worse than per tensor, which the model assumes
                let db = sqnr_db(&rows, &tensor);
                let estimate_db = -10.0 * model.relative_error(grid, step, offset).log10();
                assert!((estimate_db - db).abs() < 0.1, "{at}: {estimate_db:.3} dB for {db:.3} dB");
            }
        }
    }
    println!("largest difference {:.6} bit: {}", worst.0, worst.1);
}

#[test]
fn a_whole_model_meets_its_target() {
    let Some(checkpoint) = Checkpoint::open() else { return };
    let names: Vec<&String> = checkpoint.tensors.keys().collect();
    let models: Vec<RateModel> = names.iter().map(|name| RateModel::measure(&checkpoint.rows(name)).unwrap()).collect();
    for (bpw, only_rows) in [(2.25, true), (2.25, false), (3.75, true), (3.75, false), (5.5, false)] {
        let tensors: Vec<RateTensor> = names
            .iter()
            .zip(&models)
            .map(|(name, model)| {
                let recommended = RateTensor::recommended(model, Role::of_name(name));
                if only_rows { RateTensor { grid: GridChoice::Fixed(Grid::Row), ..recommended } } else { recommended }
            })
            .collect();
        let target = RateTarget { bpw, fixed_bits: 0.0, fixed_weights: 0.0, rounding: 0.5 };
        let solution = solve_step(&tensors, &target, &entropy_cost_bits).unwrap();
        let (mut bits, mut weights, mut row_grids) = (0.0, 0.0, 0);
        for ((name, model), params) in names.iter().zip(&models).zip(&solution.params) {
            let tensor = quantize(&Plan::Ecsq(*params), &checkpoint.rows(name)).unwrap();
            bits += entropy(&tensor.symbols) * model.weights() + model.scale_bits(params.grid);
            weights += model.weights();
            row_grids += usize::from(params.grid == Grid::Row);
        }
        println!("{bpw}: step {:.4}, {:.4} bpw, {row_grids} of {} tensors by row", solution.relative_step, bits / weights, names.len());
        assert!((bits / weights - bpw).abs() < 0.002, "{bpw}: {}", bits / weights);
    }
}
