import pytest


@pytest.fixture(params=["amx", "avx512", "float32"])
def products(request):
    """Every way to multiply that this CPU has."""
    from graph_utils import neighbours as nb
    try:
        nb.use_products(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    yield
    nb.use_products("")
