"""The command `logsync`: look at a run, draw it, and see what `connect` would do here."""
