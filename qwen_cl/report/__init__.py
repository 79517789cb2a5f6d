"""``task=report``: a page of a run, or of all the trials of a sweep, from what their folders hold."""
