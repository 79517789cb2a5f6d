"""From files of rows to NeMo data modules."""
