"""The model and everything that turns messages into its tensors and back.

Importing this package makes torchvision usable next to a CPU-only torch, which transformers needs
before it builds any processor (`cafe.model.torchvision_pair`).
"""

from __future__ import annotations

from cafe.model.torchvision_pair import ensure_torchvision

ensure_torchvision()
