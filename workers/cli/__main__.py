"""`python -m logsync.workers.cli` is the command `logsync`."""

from logsync.workers.cli.app import main

main()
