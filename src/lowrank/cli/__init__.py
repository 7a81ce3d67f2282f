"""The command line."""

from lowrank.cli.app import main

__all__ = ["main"]
