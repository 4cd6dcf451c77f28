# SPDX-License-Identifier: MIT
"""Where the parts of the installed package are, editable installations included."""

from importlib import resources
from pathlib import Path

_PACKAGE = "mscclpp_ep"


def _folder_of(*parts: str) -> Path:
    """Return the folder of a file of the package, which must exist as a file on disk."""
    # A file, not its folder: an editable installation spreads one folder over several places.
    file = resources.files(_PACKAGE).joinpath(*parts)
    if not file.is_file() or not isinstance(file, Path):
        name = "/".join(parts)
        raise FileNotFoundError(
            f"this installation of {_PACKAGE} has no {name}: install it again with pip"
        )
    return file.parent


def cmake_dir() -> Path:
    """Return the folder that `find_package(mscclpp_ep)` needs as `mscclpp_ep_DIR`."""
    return _folder_of("lib", "cmake", _PACKAGE, f"{_PACKAGE}-config.cmake")


def include_dir() -> Path:
    """Return the folder of the C++ headers, to be given to a compiler with `-I`."""
    return _folder_of("include", _PACKAGE, "version.hpp").parent


def library() -> Path:
    """Return the path of the C++ library that this process has loaded."""
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        for line in maps:
            path = Path(line.split(maxsplit=5)[-1].strip())
            if path.name.startswith("libmscclpp_ep.so"):
                return path
    raise FileNotFoundError("libmscclpp_ep.so is not loaded")


def sample_text() -> str:
    """Return the text that `python -m mscclpp_ep demo` reads by default."""
    return resources.files(_PACKAGE).joinpath("data", "sample.txt").read_text(encoding="utf-8")
