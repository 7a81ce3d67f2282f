"""What is silently wrong in a training script: one real step is watched, and what it shows is said in plain words."""

from typing import TYPE_CHECKING

from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank.doctor.check import check
    from lowrank.doctor.faults import Fault, examine
    from lowrank.doctor.script import Examination, examine_script
    from lowrank.doctor.watch import Watch

__getattr__ = attributes(__name__, __file__)

__all__ = ["Examination", "Fault", "Watch", "check", "examine", "examine_script"]
