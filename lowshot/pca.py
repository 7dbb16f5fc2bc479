"""The PCA that brings network features to the dimension of the graph, a Faiss VectorTransform."""
import os

from lowshot.packages import faiss


def load_pca(path, columns=None, source=None):
    """Read PCAR256.vt. columns: width of the features it is for, those of the file `source`; checked if given.

    Returns the transform: x float32 (n, d_in) -> transform.apply(x) float32 (n, d_out), not normalised.
    """
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist: python train_apply_pca.py train makes it")
    try:
        transform = faiss.read_VectorTransform(path)
    except RuntimeError as e:
        raise ValueError(f"{path} ({os.path.getsize(path)} bytes) is truncated or not a Faiss VectorTransform: "
                         f"{str(e).splitlines()[0]}")
    if columns is not None and transform.d_in != columns:
        raise ValueError(f"{source} has {columns} columns, {path} expects {transform.d_in}: "
                         "both must come from the same network")
    return transform
