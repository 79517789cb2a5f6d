"""The bundled demo model and data, for a first run without network or GPU."""
