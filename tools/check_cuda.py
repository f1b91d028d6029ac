#!/usr/bin/env python3
"""Compiles every CUDA kernel for sm_80, sm_90a and sm_100 with NVRTC from PyPI; needs no GPU and no CUDA toolkit.

usage: tools/check_cuda.py [--venv DIR] [--write] [FILE.cu ...]

The texts are those that the product compiles: `cargo run -p tersor-cuda --example kernel_sources` writes them, generated constants first. FILEs are
compiled as they are instead. Prints registers, spills and shared memory of each kernel; fails on any error, and if there is nothing to compile.
With --write the PTX that comes with the crate (for machines without NVRTC) is written anew.
"""

import argparse
import ctypes
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "nvidia-cuda-nvrtc==13.0.*"
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]
PTX = "compute_80"


def load_nvrtc(directory):
    """NVRTC of a virtual environment in `directory`, made at first use."""
    pattern = "lib/python*/site-packages/nvidia/**/libnvrtc.so.*"
    if not list(directory.glob(pattern)):
        venv.create(directory, with_pip=True)
        subprocess.run([directory / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE], check=True)
    library = next(directory.glob(pattern))
    # NVRTC looks for its builtins by name; preloading them spares LD_LIBRARY_PATH
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


def compile_kernel(nvrtc, path, architecture):
    """(whether it compiled, log, PTX) of the text in `path`."""
    program = ctypes.c_void_p()
    text, name = path.read_bytes(), path.name.encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None) != 0:
        raise RuntimeError("nvrtcCreateProgram failed")
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--fmad=false", "--diag-suppress=177"] + ([] if architecture == PTX else ["--ptxas-options=--verbose"])
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    result = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(max(size.value, 1))
    nvrtc.nvrtcGetProgramLog(program, log)
    ptx = b""
    if result == 0:
        nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetPTX(program, buffer)
        ptx = buffer.value
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return result == 0, log.value.decode(errors="replace"), ptx.decode()


def write_ptx(nvrtc, path):
    """Writes the PTX of a kernel's file beside the crate's others, its stamp first."""
    compiled, log, ptx = compile_kernel(nvrtc, path, PTX)
    if not compiled:
        sys.exit(log)
    target = ROOT / "crates/cuda/src/kernels/ptx" / path.with_suffix(".ptx").name
    # Comments tell the compiler's build, which is none of the repository's business.
    lines = [line for line in ptx.splitlines() if not line.startswith("//")]
    target.write_text(path.with_suffix(".stamp").read_text() + "\n" + "\n".join(lines).strip() + "\n")
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size} bytes")


def resources(log):
    """(kernel, its registers and memory) for each kernel that the assembler reports."""
    for block in re.split(r"(?=Compiling entry function)", log):
        kernel = re.search(r"Compiling entry function '([^']+)'", block)
        used = re.search(r"Used (\d+ registers.*)", block)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        if kernel and used:
            spilled = f", SPILLS {spills[1]} + {spills[2]} bytes" if spills and spills.groups() != ("0", "0") else ""
            yield kernel[1], used[1] + spilled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="texts to compile instead of the product's")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / "target/nvrtc", help="where NVRTC is installed (default: target/nvrtc)")
    parser.add_argument("--write", action="store_true", help="write crates/cuda/src/kernels/ptx")
    arguments = parser.parse_args()
    nvrtc = load_nvrtc(arguments.venv)
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files
        if not files:
            subprocess.run(["cargo", "run", "--quiet", "-p", "tersor-cuda", "--example", "kernel_sources", "--", folder], cwd=ROOT, check=True)
            files = sorted(pathlib.Path(folder).glob("*.cu"))
        if not files:
            sys.exit("no kernels found")
        failures = 0
        for path in files:
            if arguments.write:
                write_ptx(nvrtc, path)
                continue
            for architecture in ARCHITECTURES:
                start = time.monotonic()
                compiled, log, _ = compile_kernel(nvrtc, path, architecture)
                print(f"{path.name} {architecture}: {'ok' if compiled else 'FAILED'} ({time.monotonic() - start:.1f} s)")
                # what the compiler says, less the assembler's report
                for line in log.splitlines():
                    if not compiled or (re.search(r"\b(warning|error)\b", line) and "ptxas info" not in line):
                        print("   ", line)
                for kernel, used in resources(log):
                    print(f"    {kernel}: {used}")
                failures += not compiled
    if failures:
        sys.exit(f"{failures} compilations failed")


if __name__ == "__main__":
    main()
