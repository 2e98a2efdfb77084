import pytest

from prefloss.kernels.cpu import native


@pytest.fixture(params=["native", "torch"])
def row_passes(request, monkeypatch):
    """The test runs with the compiled row operations and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif not native.library():
        pytest.skip("no C compiler")
    return request.param
