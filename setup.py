"""Builds `pgolf._C` by handing over to CMake and ninja; CMakeLists.txt is the one description of the build.

The module runs on every torch from 2.11 and every Python from 3.10: torch's stable ABI, Python's limited API.
The torch whose headers are read is the one of this environment, never one that pip fetched into an isolated
build. The build tree is build/<python>-torch<version>, so that two environments never share a stale cache. In
the edit loop call `cmake --build` on that tree directly and copy the module, or reinstall.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
MODULE = "_C.abi3.so"

TORCH_QUERY = """
import json, pathlib, torch
maps = pathlib.Path("/proc/self/maps")
mapped = [line.split()[-1] for line in maps.read_text().splitlines()] if maps.exists() else []
print(json.dumps({
    "libstdcxx": next((path for path in mapped if "/libstdc++.so" in path), ""),
    "root": str(pathlib.Path(torch.__file__).parent),
    "version": torch.__version__,
}))
"""


def query_torch() -> dict[str, str]:
    """Ask the environment's torch for its version and place.

    `-I` hides the overlay of pip's isolated build; the plain call finds a torch that only PYTHONPATH names.
    """
    errors = []
    for flags in (["-I"], []):
        command = [sys.executable, *flags, "-c", TORCH_QUERY]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return {key: str(value) for key, value in json.loads(answer.stdout.splitlines()[-1]).items()}
        errors.append((answer.stderr.strip().splitlines() or ["no output"])[-1])
    raise SystemExit(
        f"pgolf: cannot import torch with {sys.executable} ({'; '.join(errors)}); "
        "install torch first (pip install torch), then repeat the command"
    )


def find_tool(name: str) -> str:
    """Return the path of a build tool: the one of this interpreter's environment, or else the one on PATH."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        raise SystemExit(f"pgolf: {name} not found; install it with: pip install {name}")
    return found


def pybind11_include() -> str:
    """Return the include directory of pybind11."""
    try:
        import pybind11
    except ImportError as e:
        raise SystemExit("pgolf: pybind11 not found; install it with: pip install pybind11") from e
    return str(pybind11.get_include())


class CMakeBuild(build_ext):
    """Configures and builds the CMake project, then puts the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` in the tree of this (python, torch) pair and copy it to its place."""
        torch = query_torch()
        tag = f"{sys.implementation.cache_tag}-torch{torch['version']}"
        tree = ROOT / "build" / tag
        facts = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "PGOLF_BUILD_MODULE": "ON",
            "PGOLF_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PGOLF_PYBIND11_INCLUDE": pybind11_include(),
            "PGOLF_TORCH_ROOT": torch["root"],
            "PGOLF_TORCH_VERSION": torch["version"],
            "PGOLF_LIBSTDCXX": torch["libstdcxx"],
        }
        cmake = find_tool("cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja"]
        self.call([*configure, *(f"-D{key}={value}" for key, value in facts.items())])
        self.call([cmake, "--build", str(tree), "--target", "pgolf_all"])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Also those of earlier builds, which Python would prefer. And a new inode: overwriting a module that
        # a running process has mapped would crash that process.
        for old in target.parent.glob("_C.*.so"):
            old.unlink()
        shutil.copy2(tree / MODULE, target)

    def call(self, command: list[str]) -> None:
        """Run one build command; its own output says what failed."""
        result = subprocess.run(command, check=False)
        if result.returncode != 0:
            raise SystemExit(f"pgolf: build step failed (exit {result.returncode}): {' '.join(command)}")


def write_build_info(package: Path) -> None:
    """Write the commit of these sources beside the modules of a built package, where `pgolf.env` reads it."""
    spec = importlib.util.spec_from_file_location("pgolf_env", ROOT / "pgolf" / "env.py")
    assert spec is not None and spec.loader is not None
    env = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = env  # dataclasses look their module up
    spec.loader.exec_module(env)
    commit, dirty = env.source_commit(ROOT / "pgolf")
    path = package / env.BUILD_INFO
    path.unlink(missing_ok=True)  # an sdist's files may be hard links to the tree's
    path.write_text(json.dumps({"commit": commit, "dirty": dirty}) + "\n")


class BuildWithCommit(build_py):
    """Builds the modules and bakes the commit in; an editable install asks git instead."""

    def run(self) -> None:
        """Copy the modules, then write the commit beside them."""
        super().run()
        package = Path(self.build_lib) / "pgolf"
        if not self.editable_mode and package.is_dir():
            write_build_info(package)


class SdistWithCommit(sdist):
    """Makes an sdist that knows its commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, then write the commit beside the modules."""
        super().make_release_tree(base_dir, files)
        write_build_info(Path(base_dir) / "pgolf")


setup(
    ext_modules=[Extension("pgolf._C", sources=[], py_limited_api=True)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildWithCommit, "sdist": SdistWithCommit},
)
