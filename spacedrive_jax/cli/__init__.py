"""The command line: commands, one or a few that go together in a file."""
