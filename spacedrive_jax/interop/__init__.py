"""The only room that knows what somebody else's file looks like."""
