"""What is in a dataset, for people and for machines."""

from nemo_image.reports.report import Report, write_report

__all__ = ["Report", "write_report"]
