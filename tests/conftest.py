import gc
import glob
import os

import pytest

if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ["TRITON_INTERPRET"] = "1"        # read when Triton is imported

def pytest_sessionfinish():
    gc.unfreeze()       # save_features.py freezes all there is, of which Triton complains at the end


@pytest.fixture(params=["amx", "avx512", "int16", "float32"])
def products(request):
    """Every way to multiply that this CPU has."""
    from graph_utils import neighbours as nb
    try:
        nb.use_products(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    yield
    nb.use_products("")
