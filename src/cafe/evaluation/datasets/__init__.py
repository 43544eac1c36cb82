"""Readers of data sets: each turns files or hub rows into the inputs of tasks."""
