"""The operators in C++: built as users build them, loaded by torch, by AOTInductor's packages and by a C++ program."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import bitwright
from bitwright.kernels import cpu

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "torch_ops"  # kept: kernels take minutes to compile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cpu.native is None, reason="no native kernels here"),
    pytest.mark.skipif(not all(map(shutil.which, ("g++", "cmake", "ninja"))), reason="needs g++, cmake and ninja"),
]


def run(*command: object, cwd: Path = ROOT) -> str:
    """What a command that has to succeed prints."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def adopt_objects() -> list[str]:
    """Start from the newest other build's objects and ninja's record of them: it compiles again what does not fit.

    The result names that build's compiler, as commands have to be the same.
    """
    others = [log for log in ROOT.glob("build/*/.ninja_log") if (log.parent / "CMakeFiles" / "kernels.dir").is_dir()]
    if BUILD.exists() or not others:
        return []
    newest = max(others, key=lambda log: log.stat().st_mtime).parent
    shutil.copytree(newest / "CMakeFiles" / "kernels.dir", BUILD / "CMakeFiles" / "kernels.dir")
    for name in (".ninja_log", ".ninja_deps"):
        shutil.copy2(newest / name, BUILD / name)
    cache = (newest / "CMakeCache.txt").read_text().splitlines()
    return [f"-D{line}" for line in cache if line.startswith("CMAKE_CXX_COMPILER:")]


@pytest.fixture(scope="module")
def library() -> Path:
    options = (*adopt_objects(), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DBITWRIGHT_TORCH_OPS=ON")
    run("cmake", "-S", ROOT, "-B", BUILD, *options)
    run("cmake", "--build", BUILD, "--target", "_torch_ops")
    return BUILD / "_torch_ops.so"


def test_operators_equal_those_of_python(library: Path) -> None:
    out = run(sys.executable, HERE / "cpp_operators.py", library, "equal", "registered", "refused", "compiled")
    assert out.count("calls equal") == 5, out


def test_packages_run_without_python(library: Path, tmp_path: Path) -> None:
    """A converted net compiled by AOTInductor, in Python and in a program that links no Python."""
    run(sys.executable, HERE / "cpp_operators.py", library, "packaged", cwd=tmp_path)
    root, program = Path(torch.__file__).parent, tmp_path / "run_package"
    libraries = (f"-L{root}/lib", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib")
    source = HERE / "run_package.cpp"
    run("g++", "-std=c++20", "-O0", "-isystem", root / "include", source, "-o", program, *libraries)
    with (tmp_path / "x").open("rb") as x:
        command = [program, library, tmp_path / "net.pt2", "4", "3", "8", "8"]
        done = subprocess.run(command, stdin=x, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == (tmp_path / "y").read_bytes()


def installed(folder: Path, library: Path | None) -> Path:
    """A copy of the package as pip installs it, with the native module and (or not) the operators beside it."""
    package = folder / "bitwright"
    shutil.copytree(Path(bitwright.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / Path(cpu.native.__file__).name).symlink_to(cpu.native.__file__)
    if library is not None:
        (package / library.name).symlink_to(library)
    return package


def imported(folder: Path) -> str:
    """What importing that copy prints: who runs the operators, or the last line of an error."""
    places = [str(folder), sysconfig.get_paths()["purelib"]]
    program = f"import sys; sys.path[:0] = {places}; import bitwright.kernels.table; " + (
        "from bitwright.kernels import operators; print(operators.implementation())"
    )
    command = [sys.executable, "-S", "-c", program]  # without site the checkout is not on the path
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return (done.stdout or done.stderr).splitlines()[-1]


def test_operators_beside_the_native_module_serve(library: Path, tmp_path: Path) -> None:
    package = installed(tmp_path, library)
    assert imported(tmp_path) == "C++"
    code = (package / "kernels" / "cpu.py").read_text()
    (package / "kernels" / "cpu.py").write_text(code.replace("int[2] range_b)", "int[2] range_b, int more)"))
    message = imported(tmp_path)
    assert "KernelError: the C++ operators are not those of this version of bitwright: found bitwright::add(" in message
    assert message.endswith("build bitwright again with BITWRIGHT_TORCH_OPS=ON, or delete the file to run the "
                            "operators from Python")  # fmt: skip
    (package / library.name).unlink()
    assert imported(tmp_path) == "Python"
    (package / library.name).write_text("no library")
    assert "_torch_ops.so does not load with torch" in imported(tmp_path)
