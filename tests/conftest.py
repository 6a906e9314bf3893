"""Tests run on the CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
