#!/usr/bin/env python3
"""Compiles the CUDA kernels to PTX with NVRTC. Needs no GPU and no CUDA installation.

    python3 kernels/cuda/compile.py             compile, write ptx/*.ptx and ptx/manifest.json
    python3 kernels/cuda/compile.py --check     compile again; fail if what is committed differs, or an architecture fails
    python3 kernels/cuda/compile.py --hashes    only compare the hashes of the sources (no download, no compiler)

NVRTC comes from PyPI into a virtual environment under target/. The PTX is for compute_80 (the driver compiles it for the
card); every kernel is also compiled to machine code for each architecture in ARCHITECTURES, and its registers, shared
memory and spills are read from the result.
"""

import argparse
import ctypes
import hashlib
import json
import pathlib
import re
import struct
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# The PTX comes from an old compiler, so that drivers from CUDA 12.1 (530) on load it; a newer one knows newer cards.
PTX_COMPILER = ("nvidia-cuda-nvrtc-cu12==12.1.105", "libnvrtc.so.12")
NEW_COMPILER = ("nvidia-cuda-nvrtc==13.0.88", "libnvrtc.so.13")
BASELINE = "compute_80"
ARCHITECTURES = {"sm_80": PTX_COMPILER, "sm_90": PTX_COMPILER, "sm_100": NEW_COMPILER}
# A thread may keep this much of its registers in memory: a few outside the innermost loop.
MOST_SPILLED_BYTES = 64


def sources():
    """Every .cu file, and the text that decides what it compiles to."""
    headers = b"".join(path.name.encode() + path.read_bytes() for path in sorted(HERE.glob("*.cuh")))
    for path in sorted(HERE.glob("*.cu")):
        yield path, hashlib.sha256(path.read_bytes() + headers).hexdigest()


def libraries():
    """The compilers, installed on first use."""
    folder = ROOT / "target" / "cuda-venv"
    packages = [package for package, _ in (PTX_COMPILER, NEW_COMPILER)]
    marker = folder / "+".join(packages)
    if not marker.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
        marker.touch()
    loaded = {}
    for compiler in (PTX_COMPILER, NEW_COMPILER):
        found = list(folder.glob(f"lib/python*/site-packages/nvidia/**/{compiler[1]}"))
        if not found:
            sys.exit(f"{folder} holds no {compiler[1]}")
        # Loaded by name later on, from a folder that the loader does not search.
        for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
            if "alt" not in builtins.name:
                ctypes.CDLL(str(builtins))
        loaded[compiler] = ctypes.CDLL(str(found[0]))
    return loaded


def compiled(nvrtc, path, architecture):
    """The PTX (compute_XX) or machine code (sm_XX) of one file."""
    program = ctypes.c_void_p()
    check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None))
    options = [f"--gpu-architecture={architecture}", f"--include-path={HERE}", "--std=c++17"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.value.decode().strip()
    if status:
        sys.exit(f"{path.name} does not compile for {architecture}:\n{text}")
    if text:
        print(f"{path.name} for {architecture}:\n{text}")
    kind = "CUBIN" if architecture.startswith("sm_") else "PTX"
    check(nvrtc, getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    code = ctypes.create_string_buffer(size.value)
    check(nvrtc, getattr(nvrtc, f"nvrtcGet{kind}")(program, code))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw if kind == "CUBIN" else code.value


def check(nvrtc, status):
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        sys.exit(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def usage(cubin):
    """For each kernel of an ELF: registers a thread, stack bytes a thread, static shared bytes a block."""
    assert cubin[:4] == b"\x7fELF" and cubin[4] == 2
    offset, = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + index * size) for index in range(count)]
    text = lambda table, at: cubin[table[4] + at : cubin.index(b"\0", table[4] + at)].decode()
    found = {}
    symbols = []
    stacks = {}
    for section in sections:
        name = text(sections[names], section[0])
        if name == ".symtab":
            table = sections[section[6]]
            for at in range(section[4], section[4] + section[5], 24):
                symbols.append(text(table, struct.unpack_from("<I", cubin, at)[0]))
        if name.startswith(".text."):
            # The upper byte of sh_info is the number of registers.
            found.setdefault(name[6:], {})["registers"] = section[7] >> 24
        if name.startswith(".nv.shared."):
            found.setdefault(name[11:], {})["shared"] = section[5]
    for section in sections:
        if text(sections[names], section[0]) != ".nv.info":
            continue
        at, end = section[4], section[4] + section[5]
        while at + 4 <= end:
            form, attribute, length = struct.unpack_from("<BBH", cubin, at)
            if form == 4:
                # EIATTR_FRAME_SIZE: a symbol and the bytes of its stack frame.
                if attribute == 0x11:
                    symbol, frame = struct.unpack_from("<II", cubin, at + 4)
                    stacks[symbols[symbol]] = frame
                # EIATTR_REGCOUNT
                if attribute == 0x2F:
                    symbol, registers = struct.unpack_from("<II", cubin, at + 4)
                    found.setdefault(symbols[symbol], {})["registers"] = registers
                at += 4 + length
            else:
                at += 4
    for kernel, stack in stacks.items():
        found.setdefault(kernel, {})["stack"] = stack
    return found


def stripped(ptx):
    """PTX without comments and blank lines; every name is indented by at most a tab."""
    lines = (re.sub(r"\s+", " ", line.split("//")[0]).strip() for line in ptx.decode().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--hashes", action="store_true")
    parser.add_argument("--only", help="compile this file alone, writing nothing")
    parser.add_argument("--ptx-only", action="store_true", help="do not compile to machine code: quicker")
    parser.add_argument("--verbose", action="store_true", help="print what every kernel uses on every architecture")
    options = parser.parse_args()
    manifest_path = HERE / "ptx" / "manifest.json"
    committed = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    if options.hashes:
        wanted = {path.stem: source for path, source in sources()}
        had = {name: entry["source"] for name, entry in committed.items()}
        for name, entry in committed.items():
            ptx = HERE / "ptx" / f"{name}.ptx"
            if not ptx.exists() or hashlib.sha256(ptx.read_bytes()).hexdigest() != entry["ptx"]:
                sys.exit(f"{ptx} is not what the manifest says: run kernels/cuda/compile.py")
        if wanted != had:
            stale = sorted(name for name in wanted.keys() | had.keys() if wanted.get(name) != had.get(name))
            sys.exit(f"the PTX is older than its sources ({', '.join(stale)}): run kernels/cuda/compile.py")
        print(f"the PTX of {len(had)} files is as its sources")
        return
    compilers = libraries()
    manifest = {}
    spilled = []
    for path, source in sources():
        if options.only and path.stem != options.only:
            continue
        ptx = stripped(compiled(compilers[PTX_COMPILER], path, BASELINE)).encode()
        manifest[path.stem] = {"source": source, "ptx": hashlib.sha256(ptx).hexdigest()}
        most = 0
        for architecture, compiler in ({} if options.ptx_only else ARCHITECTURES).items():
            for kernel, used in sorted(usage(compiled(compilers[compiler], path, architecture)).items()):
                if "registers" not in used:
                    continue
                most = max(most, used["registers"])
                if options.verbose:
                    print(f"  {architecture} {kernel}: {used}")
                if used.get("stack", 0) > MOST_SPILLED_BYTES:
                    spilled.append(f"{architecture} {kernel}: {used['stack']} bytes")
        kernels = ptx.count(b".entry ")
        registers = "" if options.ptx_only else f", at most {most} registers"
        print(f"{path.stem}: {kernels} kernels{registers}, {len(ptx)} bytes of PTX", flush=True)
        out = HERE / "ptx" / f"{path.stem}.ptx"
        if options.check:
            if committed.get(path.stem) != manifest[path.stem] or out.read_bytes() != ptx:
                sys.exit(f"{out} is stale: run kernels/cuda/compile.py")
        elif not options.only:
            out.write_bytes(ptx)
    if spilled:
        sys.exit("kernels that keep registers in memory:\n  " + "\n  ".join(spilled))
    if options.check:
        if manifest != committed:
            sys.exit("ptx/manifest.json is stale: run kernels/cuda/compile.py")
    elif not options.only:
        manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
