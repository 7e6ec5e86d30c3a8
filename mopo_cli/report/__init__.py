"""The report: what it knows of runs, the figures it draws, and the page it becomes."""
