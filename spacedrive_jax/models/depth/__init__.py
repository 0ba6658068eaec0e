"""Depth networks: UniDepthV2 and Depth Anything V2 over DINOv2."""
