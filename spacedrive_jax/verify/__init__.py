"""`python -m spacedrive_jax verify CASE_DIR`: this project's numbers against recorded ones."""
