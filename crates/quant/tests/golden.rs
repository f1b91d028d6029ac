//! Golden vectors made without our code by `tools/golden_quant.py`, compared bit for bit.

use half::{bf16, f16};
use serde_json::Value;
use tersor_quant::{Dtype, EcsqParams, Grid, Plan, QuantizedTensor, ScaleVec, Scales, SliceRows, affine4, q4_0, quantize};

fn load(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn bytes(value: &Value, key: &str) -> Vec<u8> {
    let hex = value[key].as_str().unwrap();
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn number(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap() as usize
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let values = ScaleVec::from_le_bytes(dtype, bytes).unwrap();
    (0..values.len()).map(|i| values.get(i)).collect()
}

#[test]
fn affine4_is_mlx_bit_for_bit() {
    let golden = load(include_str!("golden/affine4.json"));
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 9, "3 types x 3 group sizes");
    for case in cases {
        let dtype = match case["dtype"].as_str().unwrap() {
            "f16" => Dtype::F16,
            "bf16" => Dtype::Bf16,
            "f32" => Dtype::F32,
            other => panic!("type {other}"),
        };
        let (cols, group_size) = (number(case, "cols"), number(case, "group_size") as u32);
        let weights = floats(dtype, &bytes(case, "weights"));
        let tensor = quantize(&Plan::Affine4 { group_size }, &SliceRows::new(&weights, cols, dtype)).unwrap();
        let words: Vec<u8> = affine4::pack(&tensor.symbols).unwrap().iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(words, bytes(case, "words"), "words, {dtype:?} g{group_size}");
        let Scales::Group { scales, biases: Some(biases), .. } = &tensor.scales else { panic!("group scales") };
        assert_eq!(scales.dtype(), dtype);
        assert_eq!(scales.to_le_bytes(), bytes(case, "scales"), "scales, {dtype:?} g{group_size}");
        assert_eq!(biases.to_le_bytes(), bytes(case, "biases"), "biases, {dtype:?} g{group_size}");

        let words: Vec<u32> = words.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        let again = affine4::from_packed(tensor.rows, cols, group_size, &words, scales.clone(), biases.clone());
        assert_eq!(again.unwrap(), tensor);
    }
}

#[test]
fn q4_0_is_ggml_bit_for_bit() {
    let golden = load(include_str!("golden/q4_0.json"));
    let weights = floats(Dtype::F32, &bytes(&golden, "weights"));
    let tensor = quantize(&Plan::Q4_0, &SliceRows::new(&weights, number(&golden, "cols"), Dtype::F32)).unwrap();
    let blocks = bytes(&golden, "blocks");
    let packed = q4_0::pack(&tensor).unwrap();
    let differs = packed.chunks(q4_0::BLOCK_BYTES).zip(blocks.chunks(q4_0::BLOCK_BYTES)).position(|(a, b)| a != b);
    assert_eq!((packed.len(), differs), (blocks.len(), None), "first block that differs");
    assert_eq!(q4_0::unpack(tensor.rows, tensor.cols, &blocks).unwrap(), tensor);
}

#[test]
fn ecsq_follows_its_formulas() {
    let golden = load(include_str!("golden/ecsq.json"));
    let weights = floats(Dtype::F32, &bytes(&golden, "weights"));
    let cols = number(&golden, "cols");
    let mut with_exponent = 0;
    for case in golden["cases"].as_array().unwrap() {
        let params = EcsqParams {
            grid: if case["grid"] == "row" { Grid::Row } else { Grid::Tensor },
            relative_step: case["relative_step"].as_f64().unwrap() as f32,
            rounding: case["rounding"].as_f64().unwrap() as f32,
        };
        let QuantizedTensor { symbols, scales, .. } = quantize(&Plan::Ecsq(params), &SliceRows::new(&weights, cols, Dtype::F32)).unwrap();
        let symbols: Vec<u8> = symbols.iter().flat_map(|s| s.to_le_bytes()).collect();
        assert_eq!(symbols, bytes(case, "symbols"), "{params:?}");
        let (scales, exponent) = match scales {
            Scales::Row { scales, scale_exponent } => (scales, scale_exponent),
            Scales::Tensor { scale, scale_exponent } => (vec![scale], scale_exponent),
            Scales::Group { .. } => panic!("ecsq has no groups"),
        };
        assert_eq!(i64::from(exponent), case["scale_exponent"].as_i64().unwrap(), "{params:?}");
        assert_eq!(ScaleVec::F16(scales).to_le_bytes(), bytes(case, "scales"), "{params:?}");
        with_exponent += u32::from(exponent != 0);
    }
    assert!(with_exponent > 0, "some case needs a scale exponent");
}

#[test]
fn halves_convert_without_loss() {
    // What `floats` relies on: reading back a stored half gives its bits.
    for bits in (0..=u16::MAX).filter(|&b| !f16::from_bits(b).is_nan() && !bf16::from_bits(b).is_nan()) {
        let (f, b) = (ScaleVec::F16(vec![bits]).get(0), ScaleVec::Bf16(vec![bits]).get(0));
        assert_eq!((f16::from_f32(f).to_bits(), bf16::from_f32(b).to_bits()), (bits, bits));
    }
}
