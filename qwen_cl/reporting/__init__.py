"""Where metrics show: the console, figures, and the page."""
