"""The command line of data preparation, one file a command."""
