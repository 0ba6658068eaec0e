"""Reading a nuScenes v1.0 folder: tables, keyframe fields, CAN bus, maps, sensor files."""
