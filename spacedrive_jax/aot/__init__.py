"""Planning for devices that are not there: memory, communication and time by ahead-of-time compilation."""
