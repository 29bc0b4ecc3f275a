"""Builds rlhf_kernels._C, and _cuda where there is an nvcc, with ninja. Needs a C++17 compiler, never torch or a GPU.

The row kernels are compiled once per instruction set; which one runs is decided on the machine that imports them.
Without a compiler, or if compiling fails, the package installs without the extension and runs on the eager backend.
RLHF_KERNELS_EXT=1 insists on _C, =0 skips it; RLHF_KERNELS_CUDA=1 insists on _cuda, =0 skips it.
CXX names the compiler, NVCC that for CUDA. RLHF_KERNELS_FLAGS are more flags for the C++ compiler and linker, which
come last and so win: "-O1 -g -fsanitize=address". CXXFLAGS is not read: some shells set it, and to less than -O3.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# no-math-errno and no-trapping-math change no value: they allow selects where there would be branches or calls.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12 misreads AVX-512 intrinsics
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
ISAS = {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
HEAD = ["avx512", "avx512bf16"]
PER_ISA = {
    "rows.cpp": ["scalar", "avx2", "avx512"],
    "head_forward.cpp": HEAD,
    "head_backward.cpp": HEAD,
    "head_kernels.cpp": HEAD,
    "head_sparse.cpp": HEAD,
}
GPUS = ["80", "90", "100"]  # machine code for each that nvcc knows, and PTX of the last for what comes after


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def sources(cuda: bool) -> list[str]:
    return [path for path in [*relative("*.cpp"), *relative("*.cu")] if (Path(path).parent.name == "cuda") == cuda]


def find_compiler() -> list[str]:
    wanted = [os.environ.get("CXX"), "c++", "g++", "clang++", sysconfig.get_config_var("CXX")]
    for command in filter(None, wanted):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise RuntimeError("no C++ compiler found")


def accepts(cxx: list[str], flags: list[str]) -> bool:
    """Whether the compiler makes a program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("int main() { return 0; }\n")
        return subprocess.run([*cxx, *flags, source, "-o", program], capture_output=True).returncode == 0


def escaped(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def rules(cxx: list[str], flags: list[str], link: list[str]) -> list[str]:
    """How ninja compiles C++ and links an extension."""
    more = shlex.split(os.environ.get("RLHF_KERNELS_FLAGS", ""))
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    strip = [] if more else ["-s"]  # Who asks for flags may want to see names of functions.
    link = [*link, *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else strip), *more]
    return [
        "rule compile",
        f"  command = {shlex.join([*cxx, *FLAGS, *flags, *more, *includes])} $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*cxx, '-shared'])} $in -o $out {shlex.join(link)}",
    ]


def ninja_file(target: Path) -> str:
    """Which source becomes which object with which flags."""
    cxx = find_compiler()
    openmp = ["-fopenmp"] if accepts(cxx, ["-fopenmp"]) else []
    isas = {"scalar": [], **{name: flags for name, flags in ISAS.items() if accepts(cxx, flags)}}
    lines = rules(cxx, [*openmp, *(f"-DRLHF_HAS_{name.upper()}" for name in isas)], openmp)
    objects = []
    for source in sources(cuda=False):
        name = Path(source).name
        for isa in PER_ISA.get(name, ["any"]):
            if isa != "any" and isa not in isas:
                continue
            objects.append(f"{name}.{isa}.o")
            lines.append(f"build {objects[-1]}: compile {escaped(ROOT / source)}")
            if isa != "any":
                lines.append(f"  isa = {shlex.join([f'-DRLHF_ISA={isa}', *isas[isa]])}")
    return "\n".join([*lines, f"build {escaped(target)}: link {' '.join(objects)}", ""])


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    wanted = [named] if (named := os.environ.get("NVCC")) else ["nvcc", os.path.join(home, "bin", "nvcc")]
    for command in wanted:
        if found := shutil.which(command):
            return found
    raise RuntimeError(f"no nvcc found: {' and '.join(wanted)} cannot be run")


def cuda_ninja_file(target: Path) -> str:
    """As ``ninja_file``, with the CUDA runtime inside: the module imports where there is neither toolkit nor driver."""

    def says(*flags: str) -> str:
        done = subprocess.run([nvcc, *flags], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{nvcc} {' '.join(flags)}: {(done.stderr or done.stdout).strip()[-400:]}")
        return done.stdout + done.stderr

    cxx, nvcc = find_compiler(), find_nvcc()
    known = set(re.findall(r"sm_(\d+)\b", says("--list-gpu-code")))
    gpus = [gpu for gpu in GPUS if gpu in known]
    if not gpus:
        raise RuntimeError(f"{nvcc} knows none of sm_{', sm_'.join(GPUS)}")
    # nvcc's own libraries are where it would look for them itself, whatever wrappers and links led to it
    libraries = re.findall(r'-L"?([^"\s]+)', says("--dryrun", "-x", "cu", os.devnull))
    codes = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus]
    codes.append(f"-gencode=arch=compute_{gpus[-1]},code=compute_{gpus[-1]}")
    device = [nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all", *codes]
    static = [*(f"-L{path}" for path in dict.fromkeys(libraries)), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    lines = rules(cxx, [], static)
    lines += ["rule device", f"  command = {shlex.join(device)} -MD -MF $out.d -c $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for source in sources(cuda=True):
        objects.append(f"{Path(source).name}.o")
        rule = "device" if source.endswith(".cu") else "compile"
        lines.append(f"build {objects[-1]}: {rule} {escaped(ROOT / source)}")
    return "\n".join([*lines, f"build {escaped(target)}: link {' '.join(objects)}", ""])


class BuildExt(build_ext):
    """Hands the extensions to ninja, each in a folder of its own."""

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name.endswith("._cuda")
        wish = os.environ.get("RLHF_KERNELS_CUDA" if cuda else "RLHF_KERNELS_EXT", "")
        if wish == "0":
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, ext.name.rpartition(".")[2]).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / "build.ninja").write_text(cuda_ninja_file(target) if cuda else ninja_file(target))
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except Exception as error:
            if wish == "1":
                raise
            what = "CUDA extension; GPUs run on Triton" if cuda else "C++ extension; the eager backend will run"
            print(f"rlhf_kernels installs WITHOUT its {what}: {error}", flush=True)


headers = relative("*.h")
extensions = [
    Extension("rlhf_kernels._C", sources(cuda=False), depends=headers, optional=True),
    Extension("rlhf_kernels._cuda", sources(cuda=True), depends=headers, optional=True),
]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt})
