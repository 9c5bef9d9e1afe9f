"""The report of a run or of a cascade: one HTML page."""
