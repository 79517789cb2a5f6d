"""Start and supervise the processes of a run, and trace its failures to one rank."""
