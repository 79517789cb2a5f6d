"""Names inside a run folder that a room below the runs needs too."""

MODEL_FILES = "model_files"
