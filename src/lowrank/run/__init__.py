"""A run as data, its settings and their checks, and the session that makes it real."""

from lowrank.run.overrides import Catalogue, catalogue, fingerprint, options, override, resolve
from lowrank.run.run import Call, Run

__all__ = ["Call", "Catalogue", "Run", "catalogue", "fingerprint", "options", "override", "resolve"]
