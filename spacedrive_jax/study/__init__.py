"""Studies: plans of runs, their results as one table, paired statistics, one page."""
