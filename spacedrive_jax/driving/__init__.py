"""Closed loop: the world's drives and their scores; the policy server, its client, the Bench2Drive agent."""
