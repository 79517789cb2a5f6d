"""Models on the Hugging Face Hub: pinned, downloaded, verified, and uploaded."""
