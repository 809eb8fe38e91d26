"""Compiles the kernels of `deform_attn` when they are first used, or says why it cannot.

The sources know nothing of PyTorch: arrays come in as addresses, through ctypes. So a build takes seconds, needs only a
compiler (not PyTorch's headers, ninja or a toolkit of PyTorch's own CUDA version), and outlives a PyTorch update. The
result lies in PyTorch's extension cache (TORCH_EXTENSIONS_DIR), under a name that changes with the sources, the
compiler and the processor.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = {"cpu": "cpu.cpp", "cuda": "cuda.cu"}
COMMON = ["-O3", "-shared"]
CPU_FLAGS = ["-std=gnu++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
CPU_ATTEMPTS = [["-march=native", "-fopenmp"], ["-march=native"], []]  # what a compiler may not know, from the best on
CUDA_FLAGS = ["-std=c++17", "-Xcompiler", "-fPIC"]


class BuildError(Exception):
    """Why there is no kernel, in one clause."""


def load(device, folder=None):
    """The library with the kernels for device 'cpu' or 'cuda', compiled unless the cache has it. Raises BuildError."""
    commands = cpu_commands() if device == "cpu" else [cuda_command()]
    try:
        path = Path(folder or cache()) / f"deform_attn_{device}_{fingerprint(commands)}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                if not path.exists():  # else another process has just built it
                    build(commands, HERE / SOURCES[device], path)
        return bound(ctypes.CDLL(str(path)))
    except OSError as error:
        remedy = "remove the file if it is damaged, or set TORCH_EXTENSIONS_DIR to a folder that can be written"
        raise BuildError(f"the compiled kernel cannot be written or loaded ({error}): {remedy}") from error


def cpu_commands():
    """The commands to try, best first, each without its output and source. CXX chooses the compiler."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [shlex.split(name) for name in names if shutil.which(shlex.split(name)[0])]
    if not found:
        raise BuildError(f"no C++ compiler ({' or '.join(names)}) on the PATH")
    return [[*found[0], *COMMON, *CPU_FLAGS, *more] for more in CPU_ATTEMPTS]


def cuda_command(architectures=None):
    """The nvcc command for the visible GPUs, or for the given architectures ('90', ...; '90+PTX' adds its PTX)."""
    if architectures is None:
        if not torch.cuda.is_available():
            raise BuildError("no CUDA device is visible")
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        architectures = [f"{major}{minor}" for major, minor in sorted(capabilities)]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")
    if not nvcc:
        raise BuildError("no nvcc in CUDA_HOME or on the PATH")
    code = []
    for name in architectures:
        number = name.removesuffix("+PTX")
        kinds = [f"sm_{number}", *([f"compute_{number}"] if number != name else [])]
        code += [f"-gencode=arch=compute_{number},code=[{','.join(kinds)}]"]
    return [nvcc, *COMMON, *CUDA_FLAGS, *code]


def cache():
    """The folder for compiled kernels, PyTorch's own choice."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        base = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME", "~/.cache")
        root = os.path.join(os.path.expanduser(base), "torch_extensions")
    return Path(root) / "siamese_detr"


def fingerprint(commands):
    """A name for what the binary depends on: sources, compiler and its flags, the processor's abilities."""
    parts = [path.read_bytes() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp", ".cu")]
    version = subprocess.run([commands[0][0], "--version"], capture_output=True, check=False).stdout
    parts += [repr(commands).encode(), version, platform.machine().encode(), abilities().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def abilities():
    """The processor's features: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(x for x in lines if x.lower().startswith(("flags", "features", "model name"))))


@contextlib.contextmanager
def locked(path):
    """Holds a lock that dies with its process. Without one (some network folders) two builds at once are only waste."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(commands, source, path):
    """Compiles `source` to `path` with the first command that works; the file appears whole or not at all."""
    print(f"ops: compiling {source.name} for this machine, once, into {path.parent}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out = os.path.join(folder, path.name)
        for command in commands:
            done = subprocess.run([*command, str(source), "-o", out], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                with open(out, "rb") as file:
                    os.fsync(file.fileno())  # or a power cut leaves an empty file under the final name
                os.replace(out, path)
                return
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
    raise BuildError(f"{shlex.join(command)} failed: {lines[0] if lines else f'exit status {done.returncode}'}")


def bound(library):
    """Declares the two functions' arguments, so that ctypes passes addresses whole."""
    for name, arrays in {"deform_attn_forward": 4, "deform_attn_backward": 7}.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * (arrays + 2), ctypes.c_int64]
        function.restype = ctypes.c_char_p
    return library
