"""Processes of a run: started, supervised, and their failures traced to one rank."""
