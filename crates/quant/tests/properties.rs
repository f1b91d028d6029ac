//! Properties over random shapes and values, refusals, and independence of threads.

use half::f16;
use proptest::prelude::*;
use tersor_quant::{
    Dtype, EcsqParams, Grid, GridChoice, PackError, Plan, QuantizeError, RateModel, RateTarget, RateTensor, Rows, ScaleVec, Scales, Scheme,
    SliceRows, SolveError, affine4, entropy_cost_bits, quantize, solve_step, sqnr_db,
};

const PLANS: [Plan; 7] = [
    Plan::Ecsq(EcsqParams { grid: Grid::Row, relative_step: 0.3, rounding: 0.5 }),
    Plan::Ecsq(EcsqParams { grid: Grid::Tensor, relative_step: 0.9, rounding: 0.4 }),
    Plan::Affine4 { group_size: 32 },
    Plan::Affine4 { group_size: 128 },
    Plan::Q4_0,
    Plan::Int4Row,
    Plan::Int4Tensor,
];

/// Roughly normal weights without a random number crate: sums of a splitmix64 stream.
fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 0.02).collect()
}

fn in_pool<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run)
}

fn weights() -> impl Strategy<Value = (Vec<f32>, usize)> {
    let value = prop_oneof![4 => -1.0f32..1.0, 1 => Just(0.0f32), 1 => -100.0f32..100.0, 1 => -1e-6f32..1e-6];
    (1usize..5, 1usize..70).prop_flat_map(move |(rows, cols)| (prop::collection::vec(value.clone(), rows * cols), Just(cols)))
}

proptest! {
    #[test]
    fn ecsq_rounds_every_weight((weights, cols) in weights(), step in 0.05f32..3.0, rounding in 0.0f32..=0.5, by_row: bool) {
        let grid = if by_row { Grid::Row } else { Grid::Tensor };
        let source = SliceRows::new(&weights, cols, Dtype::F32);
        let tensor = quantize(&Plan::Ecsq(EcsqParams { grid, relative_step: step, rounding }), &source).unwrap();
        let rms = |w: &[f32]| (w.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / w.len() as f64).sqrt();
        for (row, w) in weights.chunks(cols).enumerate() {
            let q = &tensor.symbols[row * cols..][..cols];
            let step = f64::from(step) * if by_row { rms(w) } else { rms(&weights) };
            for (&w, &q) in w.iter().zip(q) {
                if step == 0.0 {
                    prop_assert_eq!(q, 0);
                    continue;
                }
                // |q| <= |w| / step + rounding < |q| + 1, up to f32 rounding of the quotient
                let shifted = f64::from(w).abs() / step + f64::from(rounding);
                let slack = 1e-6 * (1.0 + shifted);
                prop_assert!(f64::from(q.abs()) <= shifted + slack && shifted < f64::from(q.abs()) + 1.0 + slack, "{} -> {}", w, q);
                prop_assert!(q == 0 || (q < 0) == (w < 0.0));
            }
        }
    }

    #[test]
    fn ecsq_scales_are_least_squares((weights, cols) in weights(), step in 0.1f32..2.0) {
        let source = SliceRows::new(&weights, cols, Dtype::F32);
        let plan = Plan::Ecsq(EcsqParams { grid: Grid::Row, relative_step: step, rounding: 0.5 });
        let tensor = quantize(&plan, &source).unwrap();
        let Scales::Row { scales, scale_exponent } = &tensor.scales else { panic!("row scales") };
        for (row, w) in weights.chunks(cols).enumerate() {
            let q = &tensor.symbols[row * cols..][..cols];
            let scale = f16::from_bits(scales[row]).to_f64() * 2f64.powi(i32::from(*scale_exponent));
            let error = |s: f64| w.iter().zip(q).map(|(&w, &q)| (f64::from(w) - s * f64::from(q)).powi(2)).sum::<f64>();
            // fp16 is within 2^-11 of the optimum: 2^-10 away on either side cannot be better
            let away = 2f64.powi(-10) * 1.001;
            let slack = 1.0 + 1e-9;
            prop_assert!(error(scale) <= error(scale * (1.0 + away)) * slack && error(scale) <= error(scale * (1.0 - away)) * slack);
        }
    }

    #[test]
    fn affine4_is_within_half_a_step(seed: u64, offset in -1.0f32..1.0) {
        let weights: Vec<f32> = gaussian(64, seed).iter().map(|w| w + offset).collect();
        let tensor = quantize(&Plan::Affine4 { group_size: 64 }, &SliceRows::new(&weights, 64, Dtype::F32)).unwrap();
        let Scales::Group { scales, .. } = &tensor.scales else { panic!("group scales") };
        let mut restored = [0f32; 64];
        tensor.dequantize_row(0, &mut restored);
        // The edge is moved onto the grid, which may cut the other end by up to half a step more.
        let limit = scales.get(0).abs() * 1.001 + 1e-6;
        prop_assert!(weights.iter().zip(restored).all(|(w, r)| (w - r).abs() <= limit));
        prop_assert!(tensor.symbols.iter().all(|s| (-8..=7).contains(s)));
        prop_assert_eq!(affine4::unpack(&affine4::pack(&tensor.symbols).unwrap()), tensor.symbols);
    }

    #[test]
    fn int4_is_within_half_a_step((weights, cols) in weights(), by_row: bool) {
        let plan = if by_row { Plan::Int4Row } else { Plan::Int4Tensor };
        let tensor = quantize(&plan, &SliceRows::new(&weights, cols, Dtype::F32)).unwrap();
        let all = weights.iter().fold(0f32, |m, w| m.max(w.abs()));
        let mut restored = vec![0f32; cols];
        for (row, w) in weights.chunks(cols).enumerate() {
            tensor.dequantize_row(row, &mut restored);
            let abs_max = if by_row { w.iter().fold(0f32, |m, w| m.max(w.abs())) } else { all };
            // half a step, and 7 steps times fp16's rounding; a scale far below the largest may be subnormal in fp16
            let limit = abs_max / 7.0 * (0.5 + 7.0 / 2048.0) * 1.001 + all * 2f32.powi(-38);
            prop_assert!(w.iter().zip(&restored).all(|(w, r)| (w - r).abs() <= limit));
        }
    }

    #[test]
    fn the_rate_model_counts_every_weight((weights, cols) in weights(), step in 0.01f64..4.0, rounding in 0.0f64..=0.5) {
        let model = RateModel::measure(&SliceRows::new(&weights, cols, Dtype::F32)).unwrap();
        for grid in [Grid::Row, Grid::Tensor] {
            let counts = model.counts(grid, step, rounding);
            prop_assert!((counts.total() - weights.len() as f64).abs() < 1e-6);
            prop_assert!(counts.counts.is_sorted_by(|a, b| a.0 < b.0));
            let error = model.relative_error(grid, step, rounding);
            prop_assert!((0.0..=1.0).contains(&error));
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let cols = 384;
    let mut weights = gaussian(600 * cols, 1);
    weights[5 * cols..6 * cols].fill(0.0);
    let source = SliceRows::new(&weights, cols, Dtype::Bf16);
    let target = RateTarget { bpw: 3.0, fixed_bits: 1e4, fixed_weights: 100.0, rounding: 0.5 };
    let all = |threads| {
        in_pool(threads, || {
            let tensors: Vec<_> = PLANS.iter().map(|plan| quantize(plan, &source).unwrap()).collect();
            let sqnr: Vec<u64> = tensors.iter().map(|t| sqnr_db(&source, t).to_bits()).collect();
            let model = RateModel::measure(&source).unwrap();
            let tensor = RateTensor { model: &model, step_multiplier: 1.0, grid: GridChoice::Cheapest };
            let solution = solve_step(&[tensor, tensor, tensor], &target, &entropy_cost_bits).unwrap();
            (tensors, sqnr, solution)
        })
    };
    let one = all(1);
    for threads in [2, 5] {
        assert_eq!(all(threads), one, "{threads} threads");
    }
}

#[test]
fn all_zero_rows_and_tensors() {
    let mut weights = gaussian(4 * 128, 3);
    weights[128..256].fill(0.0);
    for plan in PLANS {
        let tensor = quantize(&plan, &SliceRows::new(&weights, 128, Dtype::F16)).unwrap();
        let mut row = [1f32; 128];
        tensor.dequantize_row(1, &mut row);
        assert_eq!(row, [0.0; 128], "{plan:?}");
        let zeros = quantize(&plan, &SliceRows::new(&[0.0; 256], 128, Dtype::F16)).unwrap();
        zeros.dequantize_row(1, &mut row);
        assert_eq!(row, [0.0; 128], "{plan:?}");
        assert_eq!(sqnr_db(&SliceRows::new(&[0.0; 256], 128, Dtype::F16), &zeros), f64::INFINITY);
    }
}

#[test]
fn tiny_weights_keep_their_precision() {
    let weights = gaussian(8 * 128, 4);
    for exponent in [-100, -60, -20, 60] {
        let scaled: Vec<f32> = weights.iter().map(|&w| w * 2f32.powi(exponent)).collect();
        for plan in [PLANS[0], PLANS[1], Plan::Int4Row, Plan::Int4Tensor] {
            let plain = quantize(&plan, &SliceRows::new(&weights, 128, Dtype::F32)).unwrap();
            let tiny = quantize(&plan, &SliceRows::new(&scaled, 128, Dtype::F32)).unwrap();
            assert_eq!(plain.symbols, tiny.symbols, "2^{exponent} {plan:?}");
            let (mut a, mut b) = ([0f32; 128], [0f32; 128]);
            plain.dequantize_row(3, &mut a);
            tiny.dequantize_row(3, &mut b);
            assert_eq!(a.map(|a| a * 2f32.powi(exponent)), b, "2^{exponent} {plan:?}");
        }
    }
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let mut weights = gaussian(900 * 128, 5);
    weights[700 * 128 + 3] = f32::NAN;
    weights[123 * 128 + 77] = f32::INFINITY;
    weights[123 * 128 + 78] = f32::NAN;
    let source = SliceRows::new(&weights, 128, Dtype::F32);
    let expected = QuantizeError::NotFinite { row: 123, col: 77, value: f32::INFINITY };
    assert_eq!(expected.to_string(), "weight at row 123, column 77 is inf, not a finite number");
    for threads in [1, 3] {
        for plan in PLANS {
            assert_eq!(in_pool(threads, || quantize(&plan, &source)), Err(expected.clone()));
        }
        assert_eq!(in_pool(threads, || RateModel::measure(&source)).unwrap_err(), expected);
    }
}

struct Empty;

impl Rows for Empty {
    fn rows(&self) -> usize {
        3
    }
    fn cols(&self) -> usize {
        0
    }
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn read(&self, _: usize, _: &mut [f32]) {}
}

#[test]
fn shapes_and_parameters_that_are_refused() {
    let weights = gaussian(2 * 33, 6);
    let source = SliceRows::new(&weights, 33, Dtype::F32);
    assert_eq!(quantize(&Plan::Q4_0, &source), Err(QuantizeError::ColumnsNotGrouped { cols: 33, group_size: 32 }));
    let affine4 = |group_size| quantize(&Plan::Affine4 { group_size }, &source);
    assert_eq!(affine4(64), Err(QuantizeError::ColumnsNotGrouped { cols: 33, group_size: 64 }));
    assert_eq!(affine4(33), Err(QuantizeError::UnsupportedGroupSize { group_size: 33 }));
    for plan in PLANS {
        assert_eq!(quantize(&plan, &Empty), Err(QuantizeError::Shape { rows: 3, cols: 0 }));
    }
    for (relative_step, rounding, name) in
        [(0.0, 0.5, "relative_step"), (f32::NAN, 0.5, "relative_step"), (1.0, 0.6, "rounding"), (1.0, f32::NAN, "rounding")]
    {
        let refused = quantize(&Plan::Ecsq(EcsqParams { grid: Grid::Row, relative_step, rounding }), &source);
        assert!(matches!(refused, Err(QuantizeError::Parameter { name: n, .. }) if n == name));
    }
    let huge = vec![1e9f32; 32];
    let overflow = QuantizeError::ScaleOverflow { row: 0, col: 0 };
    assert_eq!(quantize(&Plan::Q4_0, &SliceRows::new(&huge, 32, Dtype::F32)), Err(overflow.clone()));
    let mut opposite = vec![f32::MAX; 32];
    opposite[1] = f32::MIN;
    assert_eq!(quantize(&Plan::Affine4 { group_size: 32 }, &SliceRows::new(&opposite, 32, Dtype::F32)), Err(overflow));

    let f16 = || ScaleVec::F16(vec![0x3c00]);
    let packed = |rows, cols, words: &[u32], biases| affine4::from_packed(rows, cols, 32, words, f16(), biases);
    assert!(packed(1, 32, &[0; 4], f16()).is_ok());
    assert_eq!(packed(1, 32, &[0; 4], ScaleVec::Bf16(vec![0])), Err(PackError::ScaleKind));
    assert_eq!(packed(1, 32, &[0; 5], f16()), Err(PackError::Length { what: "words", actual: 5, expected: 4 }));
    assert_eq!(packed(1, 33, &[0; 4], f16()), Err(PackError::Shape { rows: 1, cols: 33, group_size: 32 }));
    assert!(matches!(packed(usize::MAX, 64, &[0; 4], f16()), Err(PackError::Shape { .. })));
}

#[test]
fn any_column_count_suits_the_row_schemes() {
    for cols in [1, 7, 17, 255, 257] {
        let weights = gaussian(3 * cols, cols as u64);
        let source = SliceRows::new(&weights, cols, Dtype::F32);
        for plan in [Plan::Ecsq(EcsqParams { grid: Grid::Row, relative_step: 0.02, rounding: 0.5 }), Plan::Int4Row, Plan::Int4Tensor] {
            let tensor = quantize(&plan, &source).unwrap();
            assert_eq!(tensor.symbols.len(), 3 * cols);
            assert!(sqnr_db(&source, &tensor) > 8.0, "{cols} columns, {plan:?}");
        }
    }
}

#[test]
fn names_of_schemes_round_trip() {
    for plan in PLANS {
        assert_eq!(plan.scheme().to_string().parse(), Ok(plan.scheme()));
    }
    assert_eq!("affine4".parse(), Ok(Scheme::Affine4 { group_size: 64 }));
    let unknown = "q5_k".parse::<Scheme>().unwrap_err();
    assert!(unknown.to_string().starts_with("unknown scheme \"q5_k\""));
}

#[test]
fn the_solver_meets_its_target_from_below() {
    let weights = gaussian(512 * 512, 8);
    let source = SliceRows::new(&weights, 512, Dtype::F32);
    let model = RateModel::measure(&source).unwrap();
    let plain = RateTensor { model: &model, step_multiplier: 1.0, grid: GridChoice::Fixed(Grid::Row) };
    let fine = RateTensor { step_multiplier: 0.5, ..plain };
    for bpw in [0.5, 1.5, 2.25, 3.75, 6.0, 8.0] {
        let target = RateTarget { bpw, fixed_bits: 5000.0, fixed_weights: 300.0, rounding: 0.5 };
        let solution = solve_step(&[plain, fine], &target, &entropy_cost_bits).unwrap();
        assert!(solution.bpw <= bpw && solution.bpw > bpw - 1e-3, "{bpw}: {}", solution.bpw);
        let [a, b] = solution.params[..] else { panic!("two tensors") };
        assert!((b.relative_step / a.relative_step - 0.5).abs() < 1e-6);
        let bits: f64 = [a, b].iter().map(|p| model.entropy_bits(p.grid, f64::from(p.relative_step), 0.5) * 262_144.0 + 512.0 * 16.0).sum();
        assert!(((bits + 5000.0) / (2.0 * 262_144.0 + 300.0) - solution.bpw).abs() < 1e-5);
    }
    let refused = |bpw, tensors: &[_]| {
        solve_step(tensors, &RateTarget { bpw, fixed_bits: 0.0, fixed_weights: 0.0, rounding: 0.5 }, &entropy_cost_bits).unwrap_err()
    };
    assert!(matches!(refused(0.01, &[plain]), SolveError::OutOfReach { .. }));
    assert!(matches!(refused(15.0, &[plain]), SolveError::OutOfReach { .. }));
    assert!(matches!(refused(f64::NAN, &[plain]), SolveError::Parameter { name: "bpw", .. }));
    assert!(matches!(refused(3.0, &[RateTensor { step_multiplier: 0.0, ..plain }]), SolveError::Parameter { name: "step_multiplier", .. }));
    assert_eq!(refused(3.0, &[]), SolveError::NoWeights);
}
