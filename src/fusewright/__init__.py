"""Fusewright: a graph compiler for fine-tuning."""

__version__ = "0.1.0"
