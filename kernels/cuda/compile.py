#!/usr/bin/env python3
"""Compiles the CUDA kernels to PTX. Needs no GPU and no CUDA installation.

    python3 kernels/cuda/compile.py             compile, write ptx/*.ptx and ptx/manifest.json
    python3 kernels/cuda/compile.py --check     compile again; fail if what is committed differs
    python3 kernels/cuda/compile.py --hashes    only compare the hashes of sources and PTX (no download, no compiler)

Both ways, the PTX is assembled for each card in CARDS, as a driver does when it loads it, and the registers that each
kernel takes and spills are read from the assembler's report. The compiler (NVRTC) and the assembler (nvJitLink) come from
PyPI into a virtual environment under target/.
"""

import argparse
import ctypes
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# An old compiler, so that drivers from CUDA 12.1 (530) on load the PTX; an assembler that knows newer cards.
COMPILER = ("nvidia-cuda-nvrtc-cu12==12.1.105", "libnvrtc.so.12")
ASSEMBLER = ("nvidia-nvjitlink==13.0.88", "libnvJitLink.so.13")
BASELINE = "compute_80"
CARDS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
# Bytes that a thread may write and read for want of registers: a few outside the innermost loop.
MOST_SPILLED_BYTES = 64


def sources():
    """Every .cu file, and the hash of all that decides what it compiles to."""
    shared = b"".join(path.name.encode() + path.read_bytes() for path in sorted(HERE.glob("*.cuh")))
    shared += f"{COMPILER} {BASELINE}".encode()
    for path in sorted(HERE.glob("*.cu")):
        yield path, hashlib.sha256(path.read_bytes() + shared).hexdigest()


def libraries():
    """The compiler and the assembler, installed on first use."""
    folder = ROOT / "target" / "cuda-venv"
    packages = [package for package, _ in (COMPILER, ASSEMBLER)]
    marker = folder / "+".join(packages)
    if not marker.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
        marker.touch()
    for _, name in (COMPILER, ASSEMBLER):
        found = list(folder.glob(f"lib/python*/site-packages/nvidia/**/{name}"))
        if not found:
            sys.exit(f"{folder} holds no {name}")
        # Loaded by name later on, from a folder that the loader does not search.
        for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
            if "alt" not in builtins.name:
                ctypes.CDLL(str(builtins))
        yield ctypes.CDLL(str(found[0]))


def answer(get_size, get, *handle):
    """What a pair of functions gives: the size of a text, and the text."""
    size = ctypes.c_size_t()
    if get_size(*handle, ctypes.byref(size)):
        return b""
    text = ctypes.create_string_buffer(size.value + 1)
    get(*handle, text)
    return text.value


def compiled(nvrtc, path):
    """The PTX of one file, without comments and blank lines."""
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None):
        sys.exit(f"{path.name}: NVRTC takes no program")
    options = [f"--gpu-architecture={BASELINE}", f"--include-path={HERE}", "--std=c++17"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    log = answer(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().strip()
    if status:
        sys.exit(f"{path.name} does not compile:\n{log}")
    if log:
        print(log)
    ptx = answer(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).decode()
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    lines = (re.sub(r"\s+", " ", line.split("//")[0]).strip() for line in ptx.splitlines())
    return "".join(line + "\n" for line in lines if line).encode()


def assembled(linker, name, ptx, card):
    """For each kernel (registers, spilled bytes, static shared bytes) on a card."""
    handle = ctypes.c_void_p()
    options = (ctypes.c_char_p * 2)(f"-arch={card}".encode(), b"-verbose")
    if linker.nvJitLinkCreate(ctypes.byref(handle), 2, options):
        sys.exit(f"nvJitLink does not know {card}")
    kind_ptx = 2
    status = linker.nvJitLinkAddData(handle, kind_ptx, ptx, ctypes.c_size_t(len(ptx)), name.encode())
    status = status or linker.nvJitLinkComplete(handle)
    if status:
        log = answer(linker.nvJitLinkGetErrorLogSize, linker.nvJitLinkGetErrorLog, handle).decode()
        sys.exit(f"{name}.ptx does not assemble for {card}:\n{log}")
    report = answer(linker.nvJitLinkGetInfoLogSize, linker.nvJitLinkGetInfoLog, handle).decode()
    linker.nvJitLinkDestroy(ctypes.byref(handle))
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.split("'")[0]] = (registers, max(stores, loads), int(shared[1]) if shared else 0)
    if len(found) != ptx.count(b".entry "):
        sys.exit(f"{name}.ptx on {card}: the assembler's report names {len(found)} kernels")
    return found


def compare_hashes(committed):
    """Fails if PTX was written by hand or is older than its sources."""
    for name, entry in committed.items():
        ptx = HERE / "ptx" / f"{name}.ptx"
        if not ptx.exists() or hashlib.sha256(ptx.read_bytes()).hexdigest() != entry["ptx"]:
            sys.exit(f"{ptx} is not what the manifest says: run kernels/cuda/compile.py")
    wanted = {path.stem: source for path, source in sources()}
    had = {name: entry["source"] for name, entry in committed.items()}
    if wanted != had:
        stale = sorted(name for name in wanted.keys() | had.keys() if wanted.get(name) != had.get(name))
        sys.exit(f"the PTX is older than its sources ({', '.join(stale)}): run kernels/cuda/compile.py")
    print(f"the PTX of {len(had)} files is as its sources")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--hashes", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="print what every kernel takes on every card")
    options = parser.parse_args()
    manifest_path = HERE / "ptx" / "manifest.json"
    committed = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    if options.hashes:
        return compare_hashes(committed)
    nvrtc, linker = libraries()
    manifest, spilled = {}, []
    for path, source in sources():
        name = path.stem
        ptx = compiled(nvrtc, path)
        manifest[name] = {"source": source, "ptx": hashlib.sha256(ptx).hexdigest()}
        most = 0
        for card in CARDS:
            for kernel, (registers, bytes_spilled, shared) in sorted(assembled(linker, name, ptx, card).items()):
                most = max(most, registers)
                if options.verbose:
                    print(f"  {card} {kernel}: {registers} registers, {bytes_spilled} bytes spilled, {shared} shared")
                if bytes_spilled > MOST_SPILLED_BYTES:
                    spilled.append(f"{card} {kernel}: {bytes_spilled} bytes")
        print(f"{name}: {ptx.count(b'.entry ')} kernels, at most {most} registers, {len(ptx)} bytes", flush=True)
        out = HERE / "ptx" / f"{name}.ptx"
        if options.check:
            if committed.get(name) != manifest[name] or not out.exists() or out.read_bytes() != ptx:
                sys.exit(f"{out} is stale: run kernels/cuda/compile.py")
        else:
            out.parent.mkdir(exist_ok=True)
            out.write_bytes(ptx)
    if spilled:
        sys.exit("kernels that spill registers:\n  " + "\n  ".join(spilled))
    if options.check:
        if manifest != committed:
            sys.exit("ptx/manifest.json is stale: run kernels/cuda/compile.py")
    else:
        for stray in (HERE / "ptx").glob("*.ptx"):
            if stray.stem not in manifest:
                stray.unlink()
        manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
