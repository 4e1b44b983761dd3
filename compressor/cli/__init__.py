"""The command line: `compress` and its subcommands. Importing it does not import torch."""

from compressor.cli.app import app, main

__all__ = ["app", "main"]
