"""The processes of a run, on this machine or in a cluster: started, watched, and stopped."""
