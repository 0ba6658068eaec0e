"""Planning for devices that are not there: FLOPs, memory, communication, ahead-of-time compilation."""
