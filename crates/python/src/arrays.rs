//! NumPy's arrays as the libraries' types, and back.

use numpy::{PyArrayDescrMethods, PyReadonlyArray2, PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tersor_format::{Dtype, RawTensor};

use crate::errors::OrRaise;

/// A matrix of symbols, row-major.
pub struct Symbols {
    pub rows: usize,
    pub cols: usize,
    pub symbols: Vec<i16>,
}

fn dims<'py, T: numpy::Element>(array: &PyReadonlyArray2<'py, T>) -> (usize, usize) {
    let shape = array.shape();
    (shape[0], shape[1])
}

/// "int16 array of shape (2, 3)", or the type of what is no array.
fn describe(object: &Bound<'_, PyAny>) -> String {
    match object.cast::<PyUntypedArray>() {
        Ok(array) => format!("{} array of shape {:?}", array.dtype(), array.shape()),
        Err(_) => object.get_type().to_string(),
    }
}

fn refuse(what: &str, expected: &str, found: &Bound<'_, PyAny>) -> PyErr {
    PyValueError::new_err(format!("{what} must be {expected}, not {}", describe(found)))
}

/// int8 or int16, (rows, cols).
pub fn symbols(object: &Bound<'_, PyAny>) -> PyResult<Symbols> {
    if let Ok(array) = object.extract::<PyReadonlyArray2<'_, i16>>() {
        let (rows, cols) = dims(&array);
        return Ok(Symbols { rows, cols, symbols: array.as_array().iter().copied().collect() });
    }
    if let Ok(array) = object.extract::<PyReadonlyArray2<'_, i8>>() {
        let (rows, cols) = dims(&array);
        return Ok(Symbols { rows, cols, symbols: array.as_array().iter().map(|&s| i16::from(s)).collect() });
    }
    Err(refuse("symbols", "an int8 or int16 array (rows, cols)", object))
}

/// int8 or int16 of any shape.
pub fn symbols_any(object: &Bound<'_, PyAny>) -> PyResult<Vec<i16>> {
    if let Ok(array) = object.extract::<PyReadonlyArrayDyn<'_, i16>>() {
        return Ok(array.as_array().iter().copied().collect());
    }
    if let Ok(array) = object.extract::<PyReadonlyArrayDyn<'_, i8>>() {
        return Ok(array.as_array().iter().map(|&s| i16::from(s)).collect());
    }
    Err(refuse("symbols", "an int8 or int16 array", object))
}

/// uint32, (rows, words).
pub fn words(object: &Bound<'_, PyAny>) -> PyResult<(usize, usize, Vec<u32>)> {
    let array = object.extract::<PyReadonlyArray2<'_, u32>>();
    let array = array.map_err(|_| refuse("packed", "a uint32 array (rows, cols / 8)", object))?;
    let (rows, words) = dims(&array);
    Ok((rows, words, array.as_array().iter().copied().collect()))
}

/// A blob: a uint8 array of one dimension, or bytes.
pub fn blob(object: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return Ok(bytes.as_bytes().to_vec());
    }
    match object.extract::<PyReadonlyArrayDyn<'_, u8>>() {
        Ok(array) if array.ndim() == 1 => Ok(array.as_array().iter().copied().collect()),
        _ => Err(refuse("a blob", "a uint8 array of one dimension or bytes", object)),
    }
}

/// A matrix of reals: float16, float32, or bfloat16, which is `ml_dtypes.bfloat16` or its bits as uint16.
pub fn reals(what: &str, object: &Bound<'_, PyAny>) -> PyResult<RawTensor> {
    let wrong = || refuse(what, "a float16, float32, bfloat16 or uint16 (the bits of bfloat16) array (rows, groups)", object);
    let array = object.cast::<PyUntypedArray>().map_err(|_| wrong())?;
    let dtype = array.dtype();
    let (dtype, bits) = match (dtype.kind(), dtype.itemsize(), dtype.to_string().as_str()) {
        (b'f', 2, _) => (Dtype::F16, object.call_method1("view", ("uint16",))?),
        (b'f', 4, _) => (Dtype::F32, object.call_method1("view", ("uint32",))?),
        (_, 2, "bfloat16") => (Dtype::Bf16, object.call_method1("view", ("uint16",))?),
        (b'u', 2, _) => (Dtype::Bf16, object.clone()),
        _ => return Err(wrong()),
    };
    let (shape, bytes): (_, Vec<u8>) = if dtype == Dtype::F32 {
        let array = bits.extract::<PyReadonlyArray2<'_, u32>>().map_err(|_| wrong())?;
        (array.shape().to_vec(), array.as_array().iter().flat_map(|b| b.to_le_bytes()).collect())
    } else {
        let array = bits.extract::<PyReadonlyArray2<'_, u16>>().map_err(|_| wrong())?;
        (array.shape().to_vec(), array.as_array().iter().flat_map(|b| b.to_le_bytes()).collect())
    };
    RawTensor::new(dtype, shape, bytes.into()).or_raise()
}

/// Activations: float32, (cols) or (tokens, cols). Returns tokens, columns, values.
pub fn activations(object: &Bound<'_, PyAny>) -> PyResult<(usize, usize, Vec<f32>)> {
    let wrong = || refuse("x", "a float32 array (cols) or (tokens, cols)", object);
    let array = object.extract::<PyReadonlyArrayDyn<'_, f32>>().map_err(|_| wrong())?;
    let (tokens, cols) = match *array.shape() {
        [cols] => (1, cols),
        [tokens, cols] => (tokens, cols),
        _ => return Err(wrong()),
    };
    Ok((tokens, cols, array.as_array().iter().copied().collect()))
}
