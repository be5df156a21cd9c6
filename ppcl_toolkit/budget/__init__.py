"""What a recipe asks for, from the teacher's config alone: sizes, memory, disk and time."""

from ppcl_toolkit.budget.beside import HEADER, side_by_side
from ppcl_toolkit.budget.machine import Machine, machine_of
from ppcl_toolkit.budget.report import check_fits, check_machine, dry_run
from ppcl_toolkit.budget.schedules import Schedules

__all__ = ["HEADER", "Machine", "Schedules", "check_fits", "check_machine", "dry_run", "machine_of", "side_by_side"]
