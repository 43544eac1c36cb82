"""The tasks of the bundled scenes."""
