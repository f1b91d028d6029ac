//! Quantized tensors to blobs and back.

use tersor_codec::Codec;
use tersor_quant::QuantizedTensor;

use crate::error::{EncodeTensorError, TensorError};
use crate::tensor::{CodedTensor, RawTensor};

/// Symbols in a chunk unless the caller asks for another number.
pub const CHUNK_SYMBOLS_TARGET: u32 = 65_536;

/// A tensor encoded in memory: a blob with its scales and biases.
#[derive(Clone, Debug)]
pub struct EncodedTensor {
    pub(crate) coded: CodedTensor,
}

impl EncodedTensor {
    /// The tensor as a kernel sees it.
    pub fn tensor(&self) -> &CodedTensor {
        &self.coded
    }

    /// The blob's bytes.
    pub fn blob(&self) -> &[u8] {
        self.coded.blob()
    }

    /// The stored scales.
    pub fn scales(&self) -> &RawTensor {
        self.coded.scales().raw()
    }

    /// The stored biases, if the scheme has them.
    pub fn biases(&self) -> Option<&RawTensor> {
        self.coded.scales().raw_biases()
    }
}

/// Encodes a tensor in chunks of about `chunk_symbols_target` symbols (whole row tiles, at least one), in parallel on
/// rayon's current pool. The bytes do not depend on the number of threads.
///
/// # Errors
/// Inconsistent input, limits exceeded, or symbols that the codec cannot represent.
pub fn encode_tensor(
    tensor: &QuantizedTensor,
    codec: Codec,
    chunk_symbols_target: u32,
) -> Result<EncodedTensor, EncodeTensorError> {
    todo!()
}

/// Decodes a whole tensor with the codec's oracle: symbols row-major, scales as stored.
///
/// # Errors
/// A chunk that does not decode, or memory that cannot be had.
pub fn decode_tensor(tensor: &CodedTensor) -> Result<QuantizedTensor, TensorError> {
    todo!()
}
