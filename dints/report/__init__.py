"""A run's report, one page that can be sent on: cases looked at, their pictures, plots, the model,
the page.
"""
