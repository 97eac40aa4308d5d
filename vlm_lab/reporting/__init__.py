"""The report of a sweep: study.py reads, analysis.py computes, plots.py draws, tables.py and page.py write."""
