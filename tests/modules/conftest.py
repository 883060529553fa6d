"""Everything is float64 in these tests, and draws the same numbers each time."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
