"""Closed loop: the policy server and its client, the Bench2Drive agent and its controllers."""
