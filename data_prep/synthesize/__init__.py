"""`python -m data_prep synthesize`: the synthetic world recorded as a nuScenes v1.0 folder."""
