"""Lets `import torchvision` succeed beside a CPU build of torch when torchvision's own C++ library cannot
load.

PyPI has only CUDA builds of torchvision for Linux. Beside CPU torch their `_C.so` does not load, and
`import torchvision` then stops at `operator torchvision::nms does not exist`, although medray, transformers
and vLLM use none of its C++ operators. This module declares the two operators torchvision registers fakes
for, and only when the library really cannot be loaded; with a matching build it does nothing.

It is started by `medray_torchvision_shim.pth` (one line, in site-packages), so it holds in every process of
the environment, vLLM's and Ray's workers included. Importing it costs nothing: torch is touched only at the
moment torchvision itself is imported.
"""

import importlib.machinery
import sys

_SIGNATURES = ("nms", "qnms")
_declared = []  # keeps the handle of the declarations alive: the operators vanish with it


def _declare_missing_operators(package_directories):
    """Declares torchvision::nms and ::qnms unless torchvision's `_C` library loads."""
    import torch
    from torch import library

    finder = importlib.machinery.FileFinder(
        package_directories[0],
        (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
    )
    spec = finder.find_spec("_C")
    if spec is not None:
        try:
            torch.ops.load_library(spec.origin)
        except OSError:
            pass
        else:
            return
    declarations = library.Library("torchvision", "DEF")
    for name in _SIGNATURES:
        declarations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(declarations)


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        if not _declared:
            _declare_missing_operators(module.__path__)
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


if not any(finder is _Finder for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder)
