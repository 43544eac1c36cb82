"""Other people's evaluation harnesses: mteb (MIEB) and lmms-eval, each with a `CAFe` inside.

Neither is needed to import this package.
"""
