"""Calibration: find a plan for one model, size, number of steps and scheduler by real runs."""

from fastdiff.calibration.mode_search import Rules
from fastdiff.calibration.prompts import prompts
from fastdiff.calibration.runs import Runs
from fastdiff.calibration.search import Goal, calibrate
from fastdiff.calibration.work import Work

__all__ = ["Goal", "Rules", "Runs", "Work", "calibrate", "prompts"]
