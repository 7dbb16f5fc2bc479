"""Import the packages that need care before or during their import.

Scripts get faiss and torchvision from here and nowhere else:

    from lowshot.packages import faiss
    from lowshot.packages import load_torchvision
"""
import os
import sys


def _cpu_flags():
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("flags"):
                    return set(line.split())
    except OSError:
        pass
    return set()


def set_blas_core_type():
    """Name the OpenBLAS kernels by what the CPU can do, unless the user did.

    The OpenBLAS inside faiss-cpu takes its oldest kernels on CPUs that it does not know, five times slower.
    It reads the variable once, so this comes before `import faiss`; a process that has loaded faiss keeps its kernels.
    """
    flags = _cpu_flags()
    if "avx512f" in flags and "avx512vl" in flags:
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    elif "avx2" in flags:
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")


set_blas_core_type()
import faiss  # noqa: E402


def write_by_faiss(write, what, path):
    """faiss.write_index or write_VectorTransform of `what`, to a file that Python closes: where Faiss does, the last bytes may be
    lost on a full disk without an error."""
    with open(path, "wb") as f:
        write(what, faiss.PyCallbackIOWriter(f.write))


def load_torchvision():
    """Return the module torchvision, also beside a CPU-only torch.

    torchvision's wheel registers shapes for two of its compiled operators at import, and fails where the compiled
    library could not be loaded; declaring their schemas is enough, as nothing here calls them.
    """
    import torch
    if not torch.cuda.is_available():
        # torchvision has torch look for Triton, which is of no use on a CPU and complains at the end of the process
        sys.modules.setdefault("triton", None)
    try:
        import torchvision
    except RuntimeError:
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        load_torchvision.library = library      # the operators live as long as this object
        import torchvision
    return torchvision
