"""Raw text: read in any format, tokenized once, and cut into sequences."""
