"""The reports of metrics: the console, plots, the HTML page, and W&B."""
