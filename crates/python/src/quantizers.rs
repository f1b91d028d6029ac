//! Quantizers over arrays.

use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tersor_quant::{
    DEFAULT_ROUNDING, Plan, QuantizedTensor, RateModel, RateTarget, RateTensor, Role, Rows, Scales, Scheme, entropy_cost_bits, quantize,
    solve_step,
};

use crate::arrays;
use crate::errors::OrRaise;

/// What `ecsq` aims at unless told otherwise.
const BPW_DEFAULT: f64 = 4.0;

type Parts<'py> = (Bound<'py, PyArray2<i16>>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, Bound<'py, PyArray2<f32>>);

/// Symbols, real scales, biases, dequantized weights.
#[pyfunction]
#[pyo3(signature = (w, *, scheme = "ecsq", bpw = None, group_size = None))]
pub fn quantize_array<'py>(
    py: Python<'py>,
    w: &Bound<'py, PyAny>,
    scheme: &str,
    bpw: Option<f64>,
    group_size: Option<u32>,
) -> PyResult<Parts<'py>> {
    let scheme = match (scheme.parse::<Scheme>().or_raise()?, group_size) {
        (Scheme::Affine4 { .. }, Some(group_size)) => Scheme::Affine4 { group_size },
        (scheme, Some(_)) => return Err(PyValueError::new_err(format!("group_size is for scheme affine4, not {scheme}"))),
        (scheme, None) => scheme,
    };
    if bpw.is_some() && scheme != Scheme::Ecsq {
        return Err(PyValueError::new_err(format!("bpw is for scheme ecsq; the size of {scheme} is what it is")));
    }
    let raw = arrays::reals("w", w)?;
    let rows = raw.as_rows().ok_or_else(|| PyValueError::new_err("w has no elements"))?;
    let (tensor, dequantized) = py.detach(|| {
        let plan = plan(scheme, bpw.unwrap_or(BPW_DEFAULT), &rows)?;
        let tensor = quantize(&plan, &rows).or_raise()?;
        let mut dequantized = vec![0f32; tensor.symbols.len()];
        for (row, out) in dequantized.chunks_exact_mut(tensor.cols).enumerate() {
            tensor.dequantize_row(row, out);
        }
        Ok::<_, PyErr>((tensor, dequantized))
    })?;
    let QuantizedTensor { rows, cols, symbols, scales } = tensor;
    let (scales, biases) = real_scales(py, &scales, rows)?;
    let symbols = PyArray1::from_vec(py, symbols).reshape([rows, cols])?;
    Ok((symbols, scales, biases, PyArray1::from_vec(py, dequantized).reshape([rows, cols])?))
}

/// The plan of a scheme; for `ecsq` the step at which entropy and scales together take `bpw` bits per weight.
fn plan(scheme: Scheme, bpw: f64, rows: &dyn Rows) -> PyResult<Plan> {
    Ok(match scheme {
        Scheme::Ecsq => {
            let model = RateModel::measure(rows).or_raise()?;
            let tensors = [RateTensor::recommended(&model, Role::Linear)];
            let target = RateTarget { bpw, fixed_bits: 0.0, fixed_weights: 0.0, rounding: DEFAULT_ROUNDING };
            let solution = solve_step(&tensors, &target, &entropy_cost_bits).or_raise()?;
            Plan::Ecsq(solution.params[0])
        }
        Scheme::Affine4 { group_size } => Plan::Affine4 { group_size },
        Scheme::Q4_0 => Plan::Q4_0,
        Scheme::Int4Row => Plan::Int4Row,
        Scheme::Int4Tensor => Plan::Int4Tensor,
        other => return Err(PyValueError::new_err(format!("scheme {other} is not known here"))),
    })
}

/// Scales and biases as float32: (1), (rows) or (rows, groups).
fn real_scales<'py>(py: Python<'py>, scales: &Scales, rows: usize) -> PyResult<(Bound<'py, PyAny>, Option<Bound<'py, PyAny>>)> {
    let real =
        |bits: u16, exponent: i8| (f64::from(tersor_quant::ScaleVec::F16(vec![bits]).get(0)) * 2f64.powi(i32::from(exponent))) as f32;
    let groups = |values: &tersor_quant::ScaleVec| -> PyResult<Bound<'py, PyAny>> {
        let all: Vec<f32> = (0..values.len()).map(|i| values.get(i)).collect();
        Ok(PyArray1::from_vec(py, all).reshape([rows, values.len() / rows])?.into_any())
    };
    Ok(match scales {
        &Scales::Tensor { scale, scale_exponent } => (PyArray1::from_vec(py, vec![real(scale, scale_exponent)]).into_any(), None),
        Scales::Row { scales, scale_exponent } => {
            let all = scales.iter().map(|&scale| real(scale, *scale_exponent)).collect();
            (PyArray1::from_vec(py, all).into_any(), None)
        }
        Scales::Group { scales, biases, .. } => (groups(scales)?, biases.as_ref().map(groups).transpose()?),
    })
}
