"""Builds rlhf_kernels._C with ninja. Needs a C++17 compiler, never torch.

The row kernels are compiled once per instruction set; which one runs is decided on the machine that imports them.
Without a compiler, or if compiling fails, the package installs without the extension and runs on the eager backend.
RLHF_KERNELS_EXT=1 insists on the extension, =0 skips it. CXX names the compiler.
"""

import os
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
}


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


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


def ninja_file(cxx: list[str], target: Path) -> str:
    """Which source becomes which object with which flags."""
    openmp = ["-fopenmp"] if accepts(cxx, ["-fopenmp"]) else []
    isas = {"scalar": [], **{name: flags for name, flags in ISAS.items() if accepts(cxx, flags)}}
    has = [f"-DRLHF_HAS_{name.upper()}" for name in isas]
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    link = [*openmp, *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-s"])]

    def escaped(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        f"  command = {shlex.join([*cxx, *FLAGS, *openmp, *has, *includes])} $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*cxx, '-shared'])} $in -o $out {shlex.join(link)}",
    ]
    objects = []
    for source in relative("*.cpp"):
        name = Path(source).name
        for isa in PER_ISA.get(name, ["any"]):
            if isa != "any" and isa not in isas:
                continue
            objects.append(f"{name}.{isa}.o")
            lines.append(f"build {objects[-1]}: compile {escaped(ROOT / source)}")
            if isa != "any":
                lines.append(f"  isa = {shlex.join([f'-DRLHF_ISA={isa}', *isas[isa]])}")
    return "\n".join([*lines, f"build {escaped(target)}: link {' '.join(objects)}", ""])


class BuildExt(build_ext):
    """Hands the one extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        wish = os.environ.get("RLHF_KERNELS_EXT", "")
        if wish == "0":
            return
        target, folder = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / "build.ninja").write_text(ninja_file(find_compiler(), target))
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except Exception as error:
            if wish == "1":
                raise
            print(f"rlhf_kernels installs WITHOUT its C++ extension; the eager backend will run: {error}", flush=True)


extension = Extension("rlhf_kernels._C", relative("*.cpp"), depends=relative("*.h"), optional=True)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
