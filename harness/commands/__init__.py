"""The subcommands, one a file. Importing them loads no torch: what a command needs it imports when it runs."""
