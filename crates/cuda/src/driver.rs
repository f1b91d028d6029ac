//! One GPU: context, streams, memory, modules, launches. The rest of the crate calls the driver through this file only.
//!
//! Built on cudarc's contexts, streams, events and graphs. Modules, launches with attributes (clusters, programmatic dependent launches) and
//! untyped memory are wrapped here.

use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError, result};

use crate::CudaError;

pub(crate) fn failed(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |e| CudaError::Call { call, cause: explain(e) }
}

/// `CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered`
fn explain(e: DriverError) -> String {
    let text =
        |name: Result<&std::ffi::CStr, DriverError>| name.map_or_else(|_| "unknown error".to_owned(), |n| n.to_string_lossy().into_owned());
    format!("{}: {}", text(e.error_name()), text(e.error_string()))
}

/// Number of GPUs.
///
/// # Errors
/// No driver, or one that is too old.
pub fn device_count() -> Result<usize, CudaError> {
    // SAFETY: tries to load the library, whose initializers are the driver's.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: writes one integer; may be called before cuInit.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
    if version < 12_000 {
        return Err(CudaError::DriverTooOld { major: version / 1000, minor: version % 1000 / 10 });
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::cudaError_enum::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        Err(e) => return Err(failed("cuInit")(e)),
    }
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// As `nvidia-smi` shows it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
}

/// One GPU, with a stream for computing and one for copies and decoding beside it.
pub struct Device {
    ctx: Arc<CudaContext>,
    compute: Arc<CudaStream>,
    side: Arc<CudaStream>,
    properties: Properties,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("properties", &self.properties).finish_non_exhaustive()
    }
}

/// One of a device's two streams.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    /// The model's kernels.
    Compute,
    /// Copies and decoding that run beside them.
    Side,
}

impl Device {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// No driver, no such GPU, a GPU or driver that is too old.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        let count = device_count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let ctx = CudaContext::new(ordinal).map_err(failed("opening the GPU"))?;
        // SAFETY: all use of one buffer by two streams is ordered by events of this crate.
        unsafe { ctx.disable_event_tracking() };
        let name = ctx.name().map_err(failed("cuDeviceGetName"))?;
        let capability = ctx.compute_capability().map_err(failed("compute capability"))?;
        if capability.0 < 8 {
            return Err(CudaError::DeviceTooOld { name, major: capability.0, minor: capability.1 });
        }
        let attribute = |a| ctx.attribute(a).map(|v| u32::try_from(v).unwrap_or(0)).map_err(failed("cuDeviceGetAttribute"));
        let properties = Properties {
            name,
            capability,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            memory_bytes: ctx.total_mem().map_err(failed("cuDeviceTotalMem"))? as u64,
        };
        let compute = ctx.new_stream().map_err(failed("cuStreamCreate"))?;
        let side = ctx.new_stream().map_err(failed("cuStreamCreate"))?;
        Ok(Arc::new(Self { ctx, compute, side, properties }))
    }

    /// What it is.
    #[must_use]
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Bytes of its memory that nobody uses.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_bytes(&self) -> Result<u64, CudaError> {
        Ok(self.ctx.mem_get_info().map_err(failed("cuMemGetInfo"))?.0 as u64)
    }

    /// Memory on the device, with arbitrary contents.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], which says what the memory is for.
    pub fn allocate(self: &Arc<Self>, bytes: usize, what: &'static str) -> Result<Buffer, CudaError> {
        self.bind()?;
        // The driver refuses empty allocations; what follows a buffer may be read by kernels that load whole vectors.
        let size = bytes.max(16).next_multiple_of(256);
        // SAFETY: a context is current.
        match unsafe { result::malloc_sync(size) } {
            Ok(address) => Ok(Buffer { device: Arc::clone(self), address, bytes }),
            Err(DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, total) = self.ctx.mem_get_info().map_err(failed("cuMemGetInfo"))?;
                Err(CudaError::OutOfMemory { what, bytes: bytes as u64, free: free as u64, total: total as u64 })
            }
            Err(e) => Err(failed("cuMemAlloc")(e)),
        }
    }

    /// Memory on the device that holds `data`.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn upload<T: Plain>(self: &Arc<Self>, data: &[T], what: &'static str) -> Result<Buffer, CudaError> {
        let buffer = self.allocate(size_of_val(data), what)?;
        buffer.write(0, data)?;
        Ok(buffer)
    }

    /// Host memory that copies at full speed and beside the host's work.
    ///
    /// # Errors
    /// [`CudaError::Pin`].
    pub fn pin(self: &Arc<Self>, bytes: usize) -> Result<Pinned, CudaError> {
        self.bind()?;
        // SAFETY: a context is current.
        let address = unsafe { result::malloc_host(bytes.max(16), 0) }
            .map_err(|e| CudaError::Pin { bytes: bytes as u64, cause: explain(e) })?
            .cast::<u8>();
        // SAFETY: as many bytes were just allocated. Zeroed, so that they may be read as a slice.
        unsafe { address.write_bytes(0, bytes.max(16)) };
        Ok(Pinned { device: Arc::clone(self), address, bytes })
    }

    /// Waits until all work of both streams is done.
    ///
    /// # Errors
    /// The first error of any kernel since the last wait.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.compute.synchronize().map_err(failed("a kernel"))?;
        self.side.synchronize().map_err(failed("a copy or kernel on the second stream"))
    }

    /// Waits until all work of one stream is done.
    ///
    /// # Errors
    /// As [`synchronize`](Self::synchronize).
    pub fn synchronize_stream(&self, stream: Stream) -> Result<(), CudaError> {
        self.stream(stream).synchronize().map_err(failed("a kernel"))
    }

    /// A mark in a stream that another can wait for, and that can be timed.
    ///
    /// # Errors
    /// The driver's.
    pub fn event(&self, timed: bool) -> Result<Event, CudaError> {
        let flags = if timed { sys::CUevent_flags::CU_EVENT_DEFAULT } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING };
        Ok(Event(self.ctx.new_event(Some(flags)).map_err(failed("cuEventCreate"))?))
    }

    /// Marks the present end of a stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, event: &Event, stream: Stream) -> Result<(), CudaError> {
        event.0.record(self.stream(stream)).map_err(failed("cuEventRecord"))
    }

    /// Lets what follows in a stream wait for a mark.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(&self, event: &Event, stream: Stream) -> Result<(), CudaError> {
        self.stream(stream).wait(&event.0).map_err(failed("cuStreamWaitEvent"))
    }

    /// Records what `work` launches on the compute stream (and on the side stream between two events) instead of running it.
    ///
    /// # Errors
    /// Those of `work`, and the driver's.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        self.compute
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(failed("cuStreamBeginCapture"))?;
        let done = work();
        // Also after an error: it takes the stream out of its capturing state.
        let graph = self.compute.end_capture(sys::CUgraphInstantiate_flags(0));
        done?;
        graph
            .map_err(failed("cuStreamEndCapture"))?
            .map(Graph)
            .ok_or(CudaError::Call { call: "cuStreamEndCapture", cause: "no graph".into() })
    }

    /// Copies pinned bytes to the device.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If a range leaves its memory.
    pub fn copy_in(&self, to: &Buffer, to_at: usize, from: &Pinned, from_at: usize, bytes: usize, stream: Stream) -> Result<(), CudaError> {
        assert!(to_at + bytes <= to.bytes && from_at + bytes <= from.bytes, "the copy leaves its memory");
        self.bind()?;
        // SAFETY: both ranges were just checked; both memories outlive the work: their drops synchronize.
        unsafe {
            let from = std::slice::from_raw_parts(from.address.add(from_at), bytes);
            result::memcpy_htod_async(to.address + to_at as u64, from, self.stream(stream).cu_stream())
        }
        .map_err(failed("cuMemcpyHtoDAsync"))
    }

    /// Copies device bytes to pinned memory; read it after [`synchronize_stream`](Self::synchronize_stream).
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If a range leaves its memory.
    pub fn copy_out(&self, to: &mut Pinned, from: &Buffer, bytes: usize, stream: Stream) -> Result<(), CudaError> {
        assert!(bytes <= to.bytes && bytes <= from.bytes, "the copy leaves its memory");
        self.bind()?;
        // SAFETY: as above.
        unsafe {
            let to = std::slice::from_raw_parts_mut(to.address, bytes);
            result::memcpy_dtoh_async(to, from.address, self.stream(stream).cu_stream())
        }
        .map_err(failed("cuMemcpyDtoHAsync"))
    }

    pub(crate) fn bind(&self) -> Result<(), CudaError> {
        self.ctx.bind_to_thread().map_err(failed("cuCtxSetCurrent"))
    }

    fn stream(&self, stream: Stream) -> &Arc<CudaStream> {
        match stream {
            Stream::Compute => &self.compute,
            Stream::Side => &self.side,
        }
    }

    /// Launches a kernel.
    ///
    /// # Safety
    /// `args` are the kernel's parameters, in order and type; pointers in them are valid on the device for what the kernel does.
    pub(crate) unsafe fn launch(&self, kernel: &Function, shape: Shape, stream: Stream, args: &mut [*mut c_void]) -> Result<(), CudaError> {
        let mut attributes = [const { std::mem::MaybeUninit::<sys::CUlaunchAttribute>::zeroed() }; 3];
        let mut count = 0;
        // SAFETY: all-zero bytes are a valid attribute; fields are set by their id.
        unsafe {
            if shape.cluster > 1 {
                let attribute = attributes[count].assume_init_mut();
                attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
                attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: shape.cluster, y: 1, z: 1 };
                count += 1;
            }
            if shape.programmatic {
                let attribute = attributes[count].assume_init_mut();
                attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                attribute.value.programmaticStreamSerializationAllowed = 1;
                count += 1;
            }
            if shape.cooperative {
                let attribute = attributes[count].assume_init_mut();
                attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
                attribute.value.cooperative = 1;
                count += 1;
            }
            let config = sys::CUlaunchConfig {
                gridDimX: shape.grid.0,
                gridDimY: shape.grid.1,
                gridDimZ: 1,
                blockDimX: shape.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: shape.shared_bytes,
                hStream: self.stream(stream).cu_stream(),
                attrs: attributes.as_mut_ptr().cast(),
                numAttrs: count as u32,
            };
            self.bind()?;
            sys::cuLaunchKernelEx(&raw const config, kernel.handle, args.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(|e| CudaError::Call { call: kernel.name, cause: explain(e) })
    }
}

/// Shape of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub grid: (u32, u32),
    pub threads: u32,
    pub shared_bytes: u32,
    /// Blocks of a cluster, along the grid's first dimension.
    pub cluster: u32,
    /// May begin before the kernel before it has ended.
    pub programmatic: bool,
    /// All blocks are on the GPU at once: they may wait for each other.
    pub cooperative: bool,
}

/// A mark in a stream.
#[derive(Debug)]
pub struct Event(CudaEvent);

impl Event {
    /// Waits, on the host, until the mark is reached; at once if it was never recorded.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait_on_host(&self) -> Result<(), CudaError> {
        self.0.synchronize().map_err(failed("cuEventSynchronize"))
    }

    /// Whether the mark is reached.
    ///
    /// # Errors
    /// The first error of any kernel before it.
    pub fn passed(&self) -> Result<bool, CudaError> {
        self.0.try_is_complete().map_err(failed("cuEventQuery"))
    }

    /// Seconds from this mark to a later one; waits for both. Both must be timed.
    ///
    /// # Errors
    /// The driver's.
    pub fn seconds_until(&self, later: &Event) -> Result<f64, CudaError> {
        Ok(f64::from(self.0.elapsed_ms(&later.0).map_err(failed("cuEventElapsedTime"))?) * 1e-3)
    }
}

/// Recorded work.
pub struct Graph(CudaGraph);

// SAFETY: the driver's handles belong to a context, not to a thread, and the wrapper binds the context before each launch; destroying them
// needs none bound. The driver wants uses of one graph to follow each other; a value that is Send and not Sync is used by one thread at a time.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

impl Graph {
    /// Runs it on the compute stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self) -> Result<(), CudaError> {
        self.0.launch().map_err(failed("cuGraphLaunch"))
    }
}

/// Types whose bytes may be copied to and from a device: no padding, no invalid values.
///
/// # Safety
/// Every bit pattern is a value, and there are no padding bytes.
pub unsafe trait Plain: Copy {}
macro_rules! plain {
    ($($t:ty),*) => { $( // SAFETY: integers and floats.
        unsafe impl Plain for $t {} )* };
}
plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32);

/// Memory on a device.
#[derive(Debug)]
pub struct Buffer {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Where it is, for kernels.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes asked for.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes `data` at `at` bytes; waits until it is there.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the range leaves the buffer.
    pub fn write<T: Plain>(&self, at: usize, data: &[T]) -> Result<(), CudaError> {
        assert!(at + size_of_val(data) <= self.bytes, "the write leaves the buffer");
        self.device.bind()?;
        // SAFETY: the range was just checked.
        unsafe { result::memcpy_htod_sync(self.address + at as u64, data) }.map_err(failed("cuMemcpyHtoD"))?;
        // The call returns when the host's memory may change; its last part may still be on its way, and our streams do not wait for the default one.
        // SAFETY: the null stream is the default one.
        unsafe { result::stream::synchronize(std::ptr::null_mut()) }.map_err(failed("cuStreamSynchronize"))
    }

    /// Reads `count` elements from `at` bytes on; waits for the device's streams first.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the range leaves the buffer.
    pub fn read<T: Plain + Default>(&self, at: usize, count: usize) -> Result<Vec<T>, CudaError> {
        let mut data = vec![T::default(); count];
        assert!(at + size_of_val(&data[..]) <= self.bytes, "the read leaves the buffer");
        self.device.synchronize()?;
        // SAFETY: the range was just checked.
        unsafe { result::memcpy_dtoh_sync(&mut data, self.address + at as u64) }.map_err(failed("cuMemcpyDtoH"))?;
        Ok(data)
    }

    /// Sets `count` bytes from `at` on, in order with the work of a stream.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the range leaves the buffer.
    pub fn fill_range(&self, at: usize, count: usize, byte: u8, stream: Stream) -> Result<(), CudaError> {
        assert!(at + count <= self.bytes, "the range leaves the buffer");
        if count == 0 {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the range was just checked.
        unsafe { result::memset_d8_async(self.address + at as u64, byte, count, self.device.stream(stream).cu_stream()) }
            .map_err(failed("cuMemsetD8Async"))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Work that still uses the memory ends first. An error here has been, or will be, reported by the next call.
        let _ = self.device.synchronize();
        // SAFETY: allocated by `allocate`, freed once.
        let _ = self.device.bind().map(|()| unsafe { result::free_sync(self.address) });
    }
}

/// Pinned host memory.
#[derive(Debug)]
pub struct Pinned {
    device: Arc<Device>,
    address: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory, owned.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and zeroed by `pin`. Whoever copies into it by the device waits before reading (`copy_out`).
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }

    /// The bytes, to be written.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }

    /// Where a kernel finds it: pinned memory has one address for host and devices.
    pub(crate) fn device_address(&self) -> u64 {
        self.address as u64
    }

    /// Its whole words of 8 bytes, which a kernel may write meanwhile.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: page aligned, as long as that, and any bits are a number.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.bytes / size_of::<AtomicU64>()) }
    }

    /// The first `count` bytes / 4 as floats.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn floats(&self, count: usize) -> &[f32] {
        assert!(count * 4 <= self.bytes, "more floats than bytes");
        // SAFETY: page aligned, long enough, and every bit pattern is a float.
        unsafe { std::slice::from_raw_parts(self.address.cast(), count) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
        // SAFETY: allocated by `pin`, freed once.
        let _ = self.device.bind().map(|()| unsafe { result::free_host(self.address.cast()) });
    }
}

/// Loaded machine code.
#[derive(Debug)]
pub(crate) struct Module {
    device: Arc<Device>,
    handle: sys::CUmodule,
}

// SAFETY: handles of the driver are valid in all threads.
unsafe impl Send for Module {}
// SAFETY: likewise.
unsafe impl Sync for Module {}

impl Module {
    /// From a CUBIN, or from PTX, which ends in a zero byte and is compiled by the driver.
    pub(crate) fn load(device: &Arc<Device>, image: &[u8]) -> Result<Self, CudaError> {
        device.bind()?;
        // SAFETY: the image carries its own length, or ends in a zero byte.
        let handle = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed("cuModuleLoadData"))?;
        Ok(Self { device: Arc::clone(device), handle })
    }

    /// A kernel that may use all of a block's shared memory. Its module must be kept.
    pub(crate) fn function(&self, name: &'static str) -> Result<Function, CudaError> {
        let symbol = CString::new(name).map_err(|_| CudaError::Call { call: name, cause: "not a name".into() })?;
        // SAFETY: the module is loaded.
        let handle = unsafe { result::module::get_function(self.handle, symbol) }.map_err(failed(name))?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function was just found.
        let fixed = unsafe { result::function::get_function_attribute(handle, attribute) }.map_err(failed(name))?;
        let most = self.device.properties.shared_bytes as i32 - fixed;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: likewise.
        unsafe { result::function::set_function_attribute(handle, attribute, most) }.map_err(failed(name))?;
        Ok(Function { handle, name, shared_bytes: most as u32 })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
        // SAFETY: loaded once, unloaded once; functions are kept beside their module.
        let _ = self.device.bind().map(|()| unsafe { result::module::unload(self.handle) });
    }
}

/// A kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function {
    handle: sys::CUfunction,
    pub name: &'static str,
    /// Most dynamic shared memory of a block.
    pub shared_bytes: u32,
}

// SAFETY: handles of the driver are valid in all threads.
unsafe impl Send for Function {}
// SAFETY: likewise.
unsafe impl Sync for Function {}
