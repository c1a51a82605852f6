import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which looks once
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
