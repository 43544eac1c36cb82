"""`cafe demo`: the first five minutes with the library, from generated data to a trained model."""

from __future__ import annotations

from cafe.demo.run import run_demo

__all__ = ["run_demo"]
