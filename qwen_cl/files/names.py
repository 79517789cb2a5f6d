"""Names inside a run folder that packages below ``runs`` use too."""

MODEL_FILES = "model_files"
