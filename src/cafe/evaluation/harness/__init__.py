"""Adapters for external evaluation harnesses: mteb (MIEB) and lmms-eval.

Neither needs to be installed to import this package.
"""
