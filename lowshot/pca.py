"""The PCA that brings network features to the dimension of the graph, a Faiss VectorTransform."""
import glob
import os
import re

import numpy as np

from lowshot.features import check_readable, check_same_network
from lowshot.files import file_sha256, read_note
from lowshot.layout import pca_command
from lowshot.packages import faiss
from lowshot.script import log


def load_pca(path, features=None):
    """Read PCAR256.vt. features: FeatureFile that it is for; checked if given.

    Returns the transform: x float32 (n, d_in) -> transform.apply(x) float32 (n, d_out), not normalised.
    """
    name = re.fullmatch(r"PCAR(\d+)\.vt", os.path.basename(path))
    maker = pca_command("train", int(name.group(1)) if name else 256)
    again = f"{maker} --overwrite makes it again"
    check_readable(path, maker)
    try:
        transform = faiss.read_VectorTransform(path)
    except RuntimeError as e:
        raise ValueError(f"{path} ({os.path.getsize(path)} bytes) is truncated or not a Faiss VectorTransform: "
                         f"{again} ({str(e).splitlines()[0]})")
    if name and transform.d_out != int(name.group(1)):
        raise ValueError(f"{path} gives {transform.d_out} dimensions, its name says {name.group(1)}: {again}")
    if not isinstance(transform, faiss.LinearTransform):
        raise ValueError(f"{path} holds a {type(transform).__name__}, a linear transform (PCAMatrix) was expected: {again}")
    A, b = (faiss.vector_to_array(part) for part in (transform.A, transform.b))
    if transform.is_trained and (len(A) != transform.d_in * transform.d_out or transform.have_bias and len(b) != transform.d_out):
        raise ValueError(f"{path} is damaged: matrix or bias have another size than {transform.d_in} x {transform.d_out}: "
                         f"{again}")
    if not transform.is_trained or not np.isfinite(A).all() or not np.isfinite(b).all():
        raise ValueError(f"{path} is {'damaged: it holds NaN or infinity' if transform.is_trained else 'not trained'}: "
                         f"{again}")
    if features is not None and transform.d_in != features.d:
        raise ValueError(f"{features.path} has {features.d} columns, {path} expects {transform.d_in}: "
                         "both must come from the same network")
    if features is not None:
        trained_on = read_note(path + ".json").get("network")       # as train_apply_pca.py noted
        check_same_network(features.path, features.network, f"{path} (says its .json)",
                           trained_on if isinstance(trained_on, dict) else {})
    return transform


def check_made_by(pca_path, raw, dim):
    """ValueError where the notes beside them tell that another PCA made the background's vectors, and a line where features are
    newer than these. Published files have no notes: they are believed, but for vectors beside a PCA that was trained here."""
    made_by = read_note(raw + ".json").get("pca_sha256")
    if made_by is None and os.path.exists(raw + ".json"):
        raise ValueError(f"{raw}.json is damaged, it does not tell which PCA made the vectors: {pca_command('apply', dim)} "
                         "--overwrite makes both again")
    if os.path.exists(pca_path + ".json") if made_by is None else made_by != file_sha256(pca_path):
        raise ValueError(f"{raw} was made by another PCA than {pca_path}: {pca_command('apply', dim)} --overwrite makes "
                         "vectors, build_graph.py --overwrite then the graph; or, if both files were put there, delete the "
                         ".json beside them")
    if made_by is not None:
        blocks = glob.glob(os.path.join(glob.escape(os.path.dirname(raw)), "block*.hdf5"))
        newest = max(blocks, key=os.path.getmtime, default=raw)
        if os.path.getmtime(newest) > os.path.getmtime(raw):
            log(f"note: {newest} is newer than {raw}: {pca_command('apply', dim)} tells whether these vectors are of it")
