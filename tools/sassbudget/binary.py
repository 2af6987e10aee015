"""Compiled files: facts of a cubin's ELF, the disassemblers, and the functions in any file that the tools take."""

import collections
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from .sass import parse_sass


def sections(data):
    """(names, headers) of an ELF file's sections, and what reads a string of one of them."""
    (shoff,) = struct.unpack_from("<Q", data, 0x28)
    shentsize, shnum, shstrndx = struct.unpack_from("<3H", data, 0x3A)
    sec = [struct.unpack_from("<IIQQQQIIQQ", data, shoff + i * shentsize) for i in range(shnum)]

    def string(table, off):
        start = sec[table][4] + off
        return data[start : data.index(b"\0", start)].decode()

    return [string(shstrndx, s[0]) for s in sec], sec, string


def holds(cubin, pattern):
    """Whether a kernel of the cubin matches the regex, by its name, mangled or not."""
    kernels = [name.removeprefix(".text.") for name in sections(read_bytes(cubin))[0] if name.startswith(".text.")]
    return any(re.search(pattern, name) for name in kernels + demangle(kernels))


def elf_facts(data):
    """registers, stack, static shared memory and thread count per kernel, from a cubin's ELF."""
    facts = collections.defaultdict(dict)
    if data[:4] != b"\x7fELF":
        return facts
    names, sec, string = sections(data)
    symbols = []
    for s in sec:
        if s[1] == 2:  # SHT_SYMTAB
            for p in range(s[4], s[4] + s[5], 24):
                symbols.append(string(s[6], struct.unpack_from("<I", data, p)[0]))
    for name, s in zip(names, sec, strict=False):
        if name.startswith(".nv.shared.") and not name.startswith(".nv.shared.reserved"):
            facts[name[len(".nv.shared.") :]]["smem"] = s[5]
        if not name.startswith(".nv.info"):
            continue
        kernel = name[len(".nv.info.") :]
        p, end = s[4], s[4] + s[5]
        while p + 4 <= end:
            fmt, attr, value = struct.unpack_from("<BBH", data, p)
            p += 4
            if fmt != 4:
                continue
            body, p = data[p : p + value], p + value
            if not kernel and attr in (0x2F, 0x11, 0x12) and len(body) >= 8:
                sym, val = struct.unpack_from("<II", body)
                if sym < len(symbols):
                    key = {0x2F: "registers", 0x11: "frame", 0x12: "stack"}[attr]
                    facts[symbols[sym]][key] = val
            elif kernel and attr in (0x05, 0x10) and len(body) >= 12:  # MAX_THREADS, REQNTID
                x, y, z = struct.unpack_from("<III", body)
                facts[kernel]["max_threads"] = x * y * z
    return facts


WHEELS = ["nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"]


def fail(message):
    sys.stderr.write(f"sassbudget: {message}\n")
    sys.exit(2)


def tool_dirs():
    yield from filter(None, [os.environ.get("SASSBUDGET_TOOLS")])
    for home in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(home):
            yield os.path.join(os.environ[home], "bin")
    roots = list(sys.path)
    if os.environ.get("VIRTUAL_ENV"):
        lib = os.path.join(os.environ["VIRTUAL_ENV"], "lib")
        if os.path.isdir(lib):
            roots += [os.path.join(lib, d, "site-packages") for d in sorted(os.listdir(lib))]
    for root in roots:  # wheels put them in nvidia/cu13/bin
        nv = os.path.join(root, "nvidia")
        if os.path.isdir(nv):
            for d in sorted(os.listdir(nv), reverse=True):
                yield os.path.join(nv, d, "bin")
    if os.path.isdir("/usr/local"):
        for d in sorted(os.listdir("/usr/local"), reverse=True):
            if d.startswith("cuda"):
                yield os.path.join("/usr/local", d, "bin")


def find_tool(name, required=True):
    found = shutil.which(name)
    for d in tool_dirs():
        path = os.path.join(d, name)
        if not found and os.access(path, os.X_OK):
            found = path
    if not found and required:
        fail(
            "{} not found on PATH, in CUDA_HOME/bin, or in a pip package.\n"
            "  install both tools with:  sassbudget --setup\n"
            "  which runs:               {} -m pip install {}\n"
            "  or point SASSBUDGET_TOOLS at a folder that holds them".format(
                name, os.path.basename(sys.executable), " ".join(WHEELS)
            )
        )
    return found


def output(cmd, cwd=None):
    p = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True)
    if p.returncode:
        fail(f"{os.path.basename(cmd[0])} failed: {p.stderr.strip()[:300]}")
    return p.stdout


def demangle(names):
    tool = shutil.which("c++filt") or find_tool("cu++filt", required=False)
    if not tool or not names:
        return names
    p = subprocess.run([tool], input="\n".join(names), stdout=subprocess.PIPE, text=True)
    out = p.stdout.splitlines()
    return out if len(out) == len(names) else names


def read_bytes(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        fail(str(e))


def is_cubin(data):
    return data[:4] == b"\x7fELF" and struct.unpack_from("<H", data, 18)[0] == 190  # EM_CUDA


def cubins_of(path, folder, arch, pattern=None):
    """The cubin at ``path``, or those in a library, program or object, extracted into ``folder``: of ``arch`` where there are such, and
    those alone that hold a kernel that matches."""
    cubins = [os.path.abspath(path)]
    if not is_cubin(read_bytes(path)):
        output([find_tool("cuobjdump"), "-xelf", "all", cubins[0]], cwd=folder)
        found = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        cubins = [cubin for cubin in found if f".{arch}." in cubin or f".{arch}a." in cubin] or found
    return [cubin for cubin in cubins if not pattern or holds(cubin, pattern)]


def load(path, args):
    """-> list of Functions with facts, from any input this tool takes."""
    data = read_bytes(path)
    functions = []
    if data[:4] != b"\x7fELF" and b"/*0000*/" in data:  # SASS text
        functions = parse_sass(data.decode(errors="replace"))
    else:
        with tempfile.TemporaryDirectory() as tmp:
            cubins = cubins_of(path, tmp, args.arch, args.kernel)
            if not cubins:
                fail(
                    f"{path} holds no device code"
                    + (f" with a kernel that matches {args.kernel!r}" if args.kernel else "")
                )
            nvdisasm = find_tool("nvdisasm")
            pool = ThreadPoolExecutor(os.cpu_count())  # of processes that run ahead of the parsing
            texts = pool.map(lambda cubin: output([nvdisasm, "-c", "-g", cubin]), cubins)
            for cubin, text in zip(cubins, texts, strict=True):
                facts = elf_facts(read_bytes(cubin))
                part = parse_sass(text)
                live = parse_sass(output([nvdisasm, "-c", "-plr", "-lrm", "count", cubin])) if args.live else []
                by_name = {f.name: f for f in live}
                for f in part:
                    f.facts = dict(facts.get(f.name, {}))
                    f.facts.setdefault("smem", 0)
                    if f.name in by_name and len(by_name[f.name].instrs) == len(f.instrs):
                        f.instrs = [
                            i._replace(live=j.live) for i, j in zip(f.instrs, by_name[f.name].instrs, strict=False)
                        ]
                functions += part
    for f, nice in zip(functions, demangle([f.name for f in functions]), strict=False):
        f.demangled = nice
        threads = f.facts.get("max_threads")
        if threads:
            producer = any(i.op.startswith("USETMAXREG.DEALLOC") for i in f.instrs)
            f.facts["compute_warpgroups"] = max(1, threads // 128 - (1 if producer else 0))
    if args.kernel:
        functions = [f for f in functions if re.search(args.kernel, f.demangled) or re.search(args.kernel, f.name)]
    if not functions:
        fail(f"no kernel in {path} matches")
    return functions
