"""A batch's report, one page that can be sent on: cases, their pictures, plots, the model."""
