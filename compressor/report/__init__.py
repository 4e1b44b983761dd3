"""The report page of a run, and the table printed at its end."""

from __future__ import annotations

from compressor.report.comparison import closing_table
from compressor.report.explain import checks
from compressor.report.front import closing_front, judge_front, write_front
from compressor.report.judgement import judge, verdict
from compressor.report.page import write_report

__all__ = [
    "checks",
    "closing_front",
    "closing_table",
    "judge",
    "judge_front",
    "verdict",
    "write_front",
    "write_report",
]
