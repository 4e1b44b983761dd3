"""The report page of a run, and the table printed at its end."""

from __future__ import annotations

from compressor.report.explain import checks
from compressor.report.html import write_report
from compressor.report.judgement import judge, verdict
from compressor.report.table import closing_table

__all__ = ["checks", "closing_table", "judge", "verdict", "write_report"]
