//! Kernels from text to a GPU: compiled by NVRTC at first use and kept on disk, or compiled by the driver from PTX that comes with this crate.
//!
//! NVRTC is loaded here and not through cudarc: cudarc panics where it is missing and does not look where CUDA and PyTorch put it.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::Library;
use xxhash_rust::xxh3::xxh3_64;

use crate::driver::{Device, Module};
use crate::{CudaError, layout};

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Name of the file.
    pub name: &'static str,
    /// What it shares with other files, besides `common.cuh`.
    shared: &'static str,
    text: &'static str,
    /// Compiled to PTX for compute capability 8.0 by `tools/check_cuda.py --write`, for machines without NVRTC.
    ptx: &'static str,
}

macro_rules! source {
    ($name:literal, $shared:expr) => {
        Source {
            name: concat!($name, ".cu"),
            shared: $shared,
            text: include_str!(concat!("kernels/", $name, ".cu")),
            ptx: include_str!(concat!("kernels/ptx/", $name, ".ptx")),
        }
    };
}

const RANS: &str = include_str!("kernels/rans.cuh");
const TRANSFORMER: &str = include_str!("kernels/transformer.cuh");

/// All kernels.
pub const SOURCES: [Source; 6] = [
    source!("quad", ""),
    source!("plain", ""),
    source!("rans", RANS),
    source!("rans_pairs", RANS),
    source!("ops", TRANSFORMER),
    source!("step", TRANSFORMER),
];

impl Source {
    /// What the compiler sees: the constants of the layouts, what the kernels share, the kernels.
    #[must_use]
    pub fn full_text(&self) -> String {
        let common = include_str!("kernels/common.cuh");
        format!("{}\n{common}\n{}\n#line 1 \"{}\"\n{}", layout::header(), self.shared, self.name, self.text)
    }

    /// The first line of the PTX that belongs to the text.
    #[must_use]
    pub fn ptx_stamp(&self) -> String {
        format!("// {} {:016x}", self.name, xxh3_64(self.full_text().as_bytes()))
    }

    /// The PTX that comes with the crate.
    #[must_use]
    pub fn ptx(&self) -> &'static str {
        self.ptx
    }
}

/// Products and sums are fused only where the text says so: kernels that share a function shall compute the same bits with it.
const OPTIONS: [&CStr; 2] = [c"--std=c++17", c"--fmad=false"];

/// Loads a file of kernels: from `cache` if it was compiled before, else by NVRTC, else from the crate's PTX. True if it was compiled for this
/// architecture, so that it uses what the architecture has.
pub(crate) fn load(device: &Arc<Device>, source: &Source, cache: Option<&Path>) -> Result<(Module, bool), CudaError> {
    let text = source.full_text();
    let arch = arch(device.properties().capability);
    let from_ptx = || Ok((load_ptx(device, source)?, false));
    let Some(compiler) = Nvrtc::find() else { return from_ptx() };
    let version = compiler.version();
    let key = xxh3_64(format!("{arch} {version:?} {OPTIONS:?}\n{text}").as_bytes());
    let file = cache.map(|dir| dir.join(format!("{}-{arch}-{key:016x}.cubin", source.name.trim_end_matches(".cu"))));
    if let Some(image) = file.as_deref().and_then(read_cached)
        && let Ok(module) = Module::load(device, &image)
    {
        return Ok((module, true));
    }
    // A compiler older than the GPU: its driver can do what the compiler cannot.
    let Some(image) = compiler.compile(&text, source.name, &arch)? else { return from_ptx() };
    let module = Module::load(device, &image)?;
    if let Some(file) = file {
        write_cached(&file, &image);
    }
    Ok((module, true))
}

pub(crate) fn load_ptx(device: &Arc<Device>, source: &Source) -> Result<Module, CudaError> {
    let mut image = source.ptx.as_bytes().to_vec();
    image.push(0);
    Module::load(device, &image)
}

/// `sm_90a` has instructions that `sm_90` lacks; nothing older has such a variant.
fn arch((major, minor): (i32, i32)) -> String {
    format!("sm_{major}{minor}{}", if (major, minor) == (9, 0) { "a" } else { "" })
}

/// An image with its checksum before it: a torn or damaged file is compiled anew.
fn read_cached(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (sum, image) = bytes.split_first_chunk::<8>()?;
    (u64::from_le_bytes(*sum) == xxh3_64(image)).then(|| image.to_vec())
}

/// Does its best: without a cache the next start takes seconds longer.
fn write_cached(file: &Path, image: &[u8]) {
    let temporary = file.with_extension(format!("tmp-{}", std::process::id()));
    let bytes: Vec<u8> = xxh3_64(image).to_le_bytes().iter().chain(image).copied().collect();
    let written = file.parent().is_some_and(|dir| fs::create_dir_all(dir).is_ok()) && fs::write(&temporary, bytes).is_ok();
    if !written || fs::rename(&temporary, file).is_err() {
        let _ = fs::remove_file(&temporary);
    }
}

type Program = *mut c_void;

/// The functions of libnvrtc that are used here (`nvrtc.h`); 0 is success, 5 an unknown architecture.
struct Nvrtc {
    library: Library,
    /// NVRTC opens it by name, which only finds it if it is loaded already.
    _builtins: Option<Library>,
}

/// What a compiled program can be asked for.
#[derive(Clone, Copy)]
enum Part {
    Image,
    Log,
}

const NVRTC_ERROR_INVALID_OPTION: c_int = 5;

macro_rules! call {
    ($self:ident, $name:literal, ($($t:ty),*), ($($arg:expr),*)) => {{
        // SAFETY: name and types are those of nvrtc.h.
        unsafe { $self.library.get::<unsafe extern "C" fn($($t),*) -> c_int>(concat!($name, "\0").as_bytes()).map_or(-1, |f| f($($arg),*)) }
    }};
}

impl Nvrtc {
    /// The newest library that is found: by the loader, in CUDA's folders, beside PyTorch.
    fn find() -> Option<Self> {
        let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
        folders().iter().find_map(|folder| {
            names.iter().find_map(|name| {
                // SAFETY: libraries of NVIDIA, whose initializers are theirs.
                let library = unsafe { Library::new(folder.join(name)) }.ok()?;
                let nvrtc = Self { library, _builtins: None };
                let (major, minor) = nvrtc.version();
                // SAFETY: likewise.
                let builtins = unsafe { Library::new(folder.join(format!("libnvrtc-builtins.so.{major}.{minor}"))) }.ok();
                Some(Self { _builtins: builtins, ..nvrtc })
            })
        })
    }

    fn version(&self) -> (c_int, c_int) {
        let (mut major, mut minor) = (0, 0);
        // A library that does not answer is version 0.0, which finds no builtins and compiles nothing.
        let _ = call!(self, "nvrtcVersion", (*mut c_int, *mut c_int), (&raw mut major, &raw mut minor));
        (major, minor)
    }

    /// Machine code, or `None` if the compiler does not know the architecture.
    fn compile(&self, text: &str, name: &'static str, arch: &str) -> Result<Option<Vec<u8>>, CudaError> {
        let failed = |cause: String| CudaError::Compile { kernel: name, arch: arch.to_owned(), cause };
        let inner = |e: std::ffi::NulError| failed(e.to_string());
        let (text, file) = (CString::new(text).map_err(inner)?, CString::new(name).map_err(inner)?);
        let mut program: Program = std::ptr::null_mut();
        let created = call!(
            self,
            "nvrtcCreateProgram",
            (*mut Program, *const c_char, *const c_char, c_int, *const c_void, *const c_void),
            (&raw mut program, text.as_ptr(), file.as_ptr(), 0, std::ptr::null(), std::ptr::null())
        );
        if created != 0 {
            return Err(failed(format!("NVRTC refuses the program: error {created}")));
        }
        let arch = CString::new(format!("--gpu-architecture={arch}")).map_err(inner)?;
        let pointers = [arch.as_ptr(), OPTIONS[0].as_ptr(), OPTIONS[1].as_ptr()];
        let result = call!(
            self,
            "nvrtcCompileProgram",
            (Program, c_int, *const *const c_char),
            (program, pointers.len() as c_int, pointers.as_ptr())
        );
        let image = match result {
            0 => Ok(Some(self.bytes(program, Part::Image))),
            NVRTC_ERROR_INVALID_OPTION => Ok(None),
            _ => Err(failed(self.first_error(program))),
        };
        let _ = call!(self, "nvrtcDestroyProgram", (*mut Program), (&raw mut program));
        image
    }

    /// Machine code or log of a program; empty if the library does not give it.
    fn bytes(&self, program: Program, what: Part) -> Vec<u8> {
        let mut size = 0usize;
        let answer = match what {
            Part::Image => call!(self, "nvrtcGetCUBINSize", (Program, *mut usize), (program, &raw mut size)),
            Part::Log => call!(self, "nvrtcGetProgramLogSize", (Program, *mut usize), (program, &raw mut size)),
        };
        if answer != 0 {
            return Vec::new();
        }
        let mut bytes = vec![0u8; size];
        let answer = match what {
            Part::Image => call!(self, "nvrtcGetCUBIN", (Program, *mut u8), (program, bytes.as_mut_ptr())),
            Part::Log => call!(self, "nvrtcGetProgramLog", (Program, *mut u8), (program, bytes.as_mut_ptr())),
        };
        if answer == 0 { bytes } else { Vec::new() }
    }

    fn first_error(&self, program: Program) -> String {
        let log = self.bytes(program, Part::Log);
        let log = CStr::from_bytes_until_nul(&log).map_or(String::new(), |text| text.to_string_lossy().into_owned());
        log.lines().find(|line| line.contains("error")).unwrap_or("no reason given").trim().to_owned()
    }
}

/// Where NVRTC may be. The first, empty one leaves the search to the loader.
fn folders() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::new(), PathBuf::from("/usr/local/cuda/lib64"), PathBuf::from("/usr/lib/x86_64-linux-gnu")];
    let beside = |root: &str, tail: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().join(tail)).filter(|path| path.is_dir()).collect()
    };
    folders.extend(beside("/usr/local", "lib64"));
    for root in ["/usr/lib", "/usr/local/lib", "/opt/torch/.venv/lib"] {
        for packages in ["site-packages", "dist-packages"] {
            for python in beside(root, packages) {
                folders.extend(
                    ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|tail| python.join(tail)).into_iter().filter(|path| path.is_dir()),
                );
            }
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ptx_belongs_to_the_kernels() {
        for source in &SOURCES {
            let found = source.ptx.lines().next().unwrap_or_default();
            assert_eq!(found, source.ptx_stamp(), "{}: run tools/check_cuda.py --write", source.name);
        }
    }

    #[test]
    fn a_damaged_cache_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sub/kernel.cubin");
        write_cached(&file, b"machine code");
        assert_eq!(read_cached(&file).unwrap(), b"machine code");
        let mut bytes = fs::read(&file).unwrap();
        bytes[10] ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert_eq!(read_cached(&file), None);
        fs::write(&file, &bytes[..5]).unwrap();
        assert_eq!(read_cached(&file), None);
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn architectures() {
        assert_eq!([(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)].map(arch), ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"]);
    }
}
